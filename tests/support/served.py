"""Serve the page for tests: a small random model, an index of real files, a real port."""

import contextlib
import shutil
import threading

import saved_models
import videos
from flax import nnx

import stoa_jax
from stoa_jax.models.stoa import Stoa
from stoa_jax.serve import app, example_library, server

ANSWERS = ["red", "blue", "two"]
CLIPS = 6


def write_model(folder, answers=ANSWERS, **changes):
    """Write a model of random weights, small enough to compile in seconds."""
    config = saved_models.shallow(num_answers=4, **changes)
    return saved_models.write_network(folder, Stoa(config, rngs=nnx.Rngs(0)), answers)


def write_library(folder, model):
    """Write a small example library with an .avi file and a video that is deleted once indexed."""
    library = example_library.open_library(model, folder, CLIPS)
    first = sorted((library / "videos").iterdir())[0]
    old = videos.write(library / "videos" / "old.avi", codec="mpeg4", size=(160, 120))
    gone = library / "videos" / "vanished.mp4"
    shutil.copy(first, gone)
    with stoa_jax.Index.open(library / "index", model) as index:
        assert not index.add([str(old), str(gone)]).failed
    gone.unlink()
    return library


def open_page(model, library, **options):
    """Return the application over a library of `write_library`."""
    index = stoa_jax.Index.open(library / "index", model)
    return app.create_app(
        index,
        model,
        **{
            "cache": library.parent / "transcoded",
            "roots": [library / "videos"],
            "detections": library / example_library.DETECTIONS,
            "examples": ["a red ball grows"],
            **options,
        },
    )


@contextlib.contextmanager
def running(application):
    """Serve an application on a free port; yield its address."""
    import uvicorn

    with server.listen("127.0.0.1", 0) as socket:
        config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)
        instance = uvicorn.Server(config)
        thread = threading.Thread(target=instance.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        while not instance.started:
            threading.Event().wait(0.05)
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        instance.should_exit = True
        thread.join(20)

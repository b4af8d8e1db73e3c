"""`stoa check-install`: print versions and devices, and run a tiny model on a tiny video."""

import argparse
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stoa_jax.cli import shared
from stoa_jax.command_line import DONE, FAILED

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "av", "opencv-python-headless", "spacy", "numkong")
OPTIONAL = ("usearch", "huggingface_hub", "torch", "transformers", "tensorflow-datasets", "grain")


def register(subparsers: Any) -> None:
    """Add the command `check-install`."""
    text = "print versions and devices, and run a tiny model on a tiny video"
    parser = subparsers.add_parser("check-install", help=text, description=f"{text}.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check every part, continue after failures, and return 1 if there were any."""
    import stoa_jax

    versions = {"stoa_jax": stoa_jax.__version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    checks: dict[str, str] = {}
    steps: list[tuple[str, Callable[[], str]]] = [
        ("devices", _devices),
        ("vectors, matches and a caption of a video file", _tiny_run),
        ("nouns and verbs", _tag),
        ("the search index", _search),
    ]
    for name, step in steps:
        started = time.perf_counter()
        try:
            words = step()
            checks[name] = f"{words} ({time.perf_counter() - started:.1f} s)"
        except Exception as error:  # the report must list all failures
            checks[name] = f"FAILED: {type(error).__name__}: {error}"
    failed = [name for name, words in checks.items() if words.startswith("FAILED")]
    if arguments.json:
        shared.print_json({"versions": versions, "checks": checks, "ok": not failed})
    else:
        for name, version in versions.items():
            print(f"{name:24} {version}")
        for name, words in checks.items():
            print(f"{name}: {words}")
        print("everything works" if not failed else f"{len(failed)} of {len(checks)} checks failed")
    return FAILED if failed else DONE


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" + ("" if package in PACKAGES else " (optional)")


def _devices() -> str:
    import jax

    return ", ".join(f"{d.platform} {d.device_kind}" for d in jax.devices())


def _tiny_run() -> str:
    import dataclasses
    import warnings

    import numpy as np
    from flax import nnx

    from stoa_jax.inference.model import Model
    from stoa_jax.models.config import ModelConfig
    from stoa_jax.models.stoa import Stoa
    from stoa_jax.text import Tokenizer

    config = dataclasses.replace(ModelConfig.tiny(), text_length=16)
    network = Stoa(config, rngs=nnx.Rngs(0))
    tokenizer = Tokenizer(config.vocab_size)
    model = Model(config, "stoa_jax", tokenizer, frames=4, network=network, source="check")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model is not calibrated, and the video has no boxes
        path = Path(folder) / "tiny.mp4"
        _write_video(path)
        vectors = model.encode_video([path])
        probability = model.match([path], ["a grey square"])
        model.caption([path], beam=1, max_pieces=4)
    assert np.isfinite(vectors).all() and np.isfinite(probability).all()
    return "fine"


def _write_video(path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(10):
            picture = np.full((64, 64, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _tag() -> str:
    from stoa_jax.text import Tagger

    words = Tagger().tag("a dog runs")
    return " ".join(f"{word.word}/{word.upos}" for word in words)  # type: ignore[union-attr]


def _search() -> str:
    import numpy as np

    import stoa_jax
    from stoa_jax.index import scan

    with tempfile.TemporaryDirectory() as folder:
        vectors = np.eye(64, dtype=np.float32)
        with stoa_jax.Index.create(Path(folder) / "index", dim=64) as index:
            index.add_vectors(vectors, [str(i) for i in range(64)])
            (best,) = index.search(vectors[7], 1)
    assert best.id == "7"
    return f"fine, scanned by {scan.described(512)}"

"""`stoa serve`: the page, over the example library or your own index."""

import argparse
import sys
from pathlib import Path
from typing import Any

from stoa_jax.errors import UserError


def register(subparsers: Any) -> None:
    """Add the command `serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="open a page to search videos and see why they match",
        description="Open a page to search videos by text or by a clip, and to see which object "
        "and which action is matched to which word. Without arguments it shows a small synthetic "
        "library with the model that ships with the package.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the page."""
    parser.add_argument("--index", type=Path, help="an index created by `stoa index`")
    parser.add_argument("--model", help="default: the model of the index, or the shipped one")
    parser.add_argument(
        "--library",
        type=Path,
        action="append",
        default=[],
        help="a directory whose videos may be shown; may be repeated (default: the directory that "
        "all indexed videos have in common)",
    )
    parser.add_argument("--detections", type=Path, help="detections of the videos, to show objects")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0 for a free one")
    parser.add_argument("--auth", default="", help="USER:PASSWORD, or @FILE that holds it")
    parser.add_argument(
        "--cache", type=Path, help="directory of generated videos (default: $STOA_CACHE)"
    )
    parser.add_argument("--upload-mb", type=float, default=100, help="of a clip; default: 100")
    parser.add_argument(
        "--upload-seconds", type=float, default=120, help="of a clip (default: 120)"
    )
    parser.add_argument(
        "--cache-mb", type=float, default=2048, help="of transcoded videos (default: 2048)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from stoa_jax.serve import access

    login = access.password_of(arguments.auth) if arguments.auth else None
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port: {arguments.port}; choose from 0 to 65535")
    for name in ("upload_mb", "upload_seconds", "cache_mb"):
        if getattr(arguments, name) <= 0:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: {getattr(arguments, name):g}; it must be above 0")
    app, about = open_app(arguments, login)
    local = access.is_loopback(arguments.host)
    if not local and login is None:
        print(
            f"warning: everybody who reaches {arguments.host} can see these videos; "
            "set a password with --auth=USER:PASSWORD",
            file=sys.stderr,
        )
    from stoa_jax.serve import server

    with server.listen(arguments.host, arguments.port) as socket:
        host, port = socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"{about}: open http://{shown}:{port}/ (Ctrl-C to stop)", flush=True)
        server.serve(app, socket)
    return 0


def open_app(arguments: argparse.Namespace, login: tuple[str, str] | None) -> tuple[Any, str]:
    """Return the application, and a line that describes what it shows."""
    from stoa_jax.serve import access, app, example_library

    app.require()
    import stoa_jax

    cache = arguments.cache or example_library.cache_directory()
    if arguments.index is None and arguments.library:
        raise UserError("--library: name the index of these videos too, with --index=DIR")
    model = stoa_jax.load(_model_name(arguments))
    examples: list[str] = []
    detections, place = arguments.detections, arguments.index
    if place is None:
        if detections is not None:
            raise UserError("--detections: name the index of these videos too, with --index=DIR")
        print("opening the example library (made on first use)", file=sys.stderr)
        library = example_library.open_library(model, cache)
        place, detections = library / "index", library / example_library.DETECTIONS
        examples = example_library.example_queries(library)
    index = stoa_jax.Index.open(place, model)
    hosts = ()
    if access.is_loopback(arguments.host):
        hosts = ("localhost", "127.0.0.1", "::1", arguments.host)
    made = app.create_app(
        index,
        model,
        cache=Path(cache) / "transcoded",
        roots=arguments.library,
        detections=detections,
        examples=examples,
        hosts=hosts,
        login=login,
        limits=app.Limits(
            round(arguments.upload_mb * 2**20),
            arguments.upload_seconds,
            round(arguments.cache_mb * 2**20),
        ),
    )
    return made, f"{len(index)} moments of {len(index.ids())} videos"


def _model_name(arguments: argparse.Namespace) -> str:
    """Return the model to load: the one named, else the index's own, else the shipped one."""
    import stoa_jax

    if arguments.model:
        return arguments.model
    if arguments.index is None:
        return "synthetic"
    with stoa_jax.Index.open(arguments.index) as index:
        name = index.settings.model
    if not name:
        raise UserError(f"{arguments.index}: it names no model; pass --model=PATH")
    return name

"""The server: the guard, the videos, the uploads, and the page."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stoa_jax.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from stoa_jax.index.index import Index
    from stoa_jax.inference.model import Model

INSTALL = "pip install 'stoa-jax[serve]'"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on what a visitor may use."""

    upload_bytes: int = 100 << 20
    upload_seconds: float = 120.0
    cache_bytes: int = 2 << 30  # of transcoded videos


def require() -> None:
    """Raise `UserError` with the install line if the page's packages are missing."""
    for name in ("gradio", "fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the page needs {name}, which is not installed; {INSTALL}")


def create_app(
    index: "Index",
    model: "Model",
    *,
    cache: str | Path,
    roots: Sequence[str | Path] = (),
    detections: str | Path | None = None,
    examples: Sequence[str] = (),
    hosts: Sequence[str] = (),
    login: tuple[str, str] | None = None,
    limits: Limits | None = None,
) -> "FastAPI":
    """Return the page over an index and the model that filled it, as an ASGI application.

    Videos outside `roots` are refused; by default that is the common directory of all indexed
    videos. `hosts` are the host names that the server answers to; any, if empty.
    """
    require()
    from fastapi import FastAPI

    from stoa_jax.serve import access, clip_route, page, uploads
    from stoa_jax.serve.finder import Finder
    from stoa_jax.serve.library import Library
    from stoa_jax.serve.transcode import Cache

    limits = limits or Limits()
    library = Library(index.videos(), roots)
    received = uploads.Uploads(limits.upload_bytes, limits.upload_seconds)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        received.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(clip_route.router(library, Cache(Path(cache), limits.cache_bytes)))
    app.include_router(uploads.router(received))
    app.add_middleware(access.Guard, hosts=hosts, login=login)
    app.add_middleware(access.Guard, hosts=hosts, login=login)
    return page.mount(app, Finder(index, model, library, received, detections), tuple(examples))

"""Clips that visitors search by: limited in size, length and number, and soon deleted."""

import contextlib
import dataclasses
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from stoa_jax.errors import UserError

HEADER = "x-stoa-upload"  # pages of other sites cannot send this header without a preflight request
KEEP_SECONDS = 600.0  # how long a clip waits for its search
MOST = 8  # clips that may wait at once


class UploadError(UserError):
    """A clip that is refused: too large, too long, broken, or one too many."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass
class _Waiting:
    path: Path
    since: float


class Uploads:
    """A separate directory for uploaded clips, each identified by a random token."""

    def __init__(self, max_bytes: int, max_seconds: float):
        self.max_bytes, self.max_seconds = max_bytes, max_seconds
        self.directory = Path(tempfile.mkdtemp(prefix="stoa-uploads-"))
        self._waiting: dict[str, _Waiting] = {}
        self._lock = threading.Lock()

    async def receive(self, body: AsyncIterator[bytes], length: int | None) -> str:
        """Store a clip and return its token."""
        if length is not None and length > self.max_bytes:
            raise self._too_large()
        token = self._reserve()
        path = self._waiting[token].path
        try:
            await self._store(body, path)
            await anyio.to_thread.run_sync(self._check, path)
        except BaseException:  # a cancelled request, too, must leave no file
            self._drop(token)
            raise
        return token

    async def _store(self, body: AsyncIterator[bytes], path: Path) -> None:
        size = 0
        async with await anyio.open_file(path, "wb") as file:
            async for chunk in body:
                size += len(chunk)
                if size > self.max_bytes:
                    raise self._too_large()
                await file.write(chunk)
        if not size:
            raise UploadError("the uploaded file is empty; choose a video", 400)

    def _check(self, path: Path) -> None:
        from stoa_jax.data.video import VideoError, probe

        try:
            info = probe(path, timeout=20.0)
        except VideoError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise UploadError(
                f"the uploaded file cannot be read as a video: {reason}", 415
            ) from None
        if info.duration > self.max_seconds:
            raise UploadError(
                f"the uploaded clip lasts {info.duration:.0f} s; the limit is "
                f"{self.max_seconds:.0f} s; cut it shorter",
                413,
            )

    def _too_large(self) -> UploadError:
        return UploadError(
            f"the uploaded file is larger than the limit of {self.max_bytes / 2**20:.3g} MB; "
            "cut it shorter or make it smaller",
            413,
        )

    @contextlib.contextmanager
    def taken(self, token: str) -> Iterator[Path]:
        """Provide an uploaded clip for one use; it is deleted afterwards in any case."""
        with self._lock:
            waiting = self._waiting.pop(token, None)
        if waiting is None:
            raise UserError("the uploaded clip was deleted; choose it again")
        try:
            yield waiting.path
        finally:
            waiting.path.unlink(missing_ok=True)

    def _reserve(self) -> str:
        now = time.monotonic()
        with self._lock:
            late = [t for t, w in self._waiting.items() if now - w.since > KEEP_SECONDS]
            for token in late:
                self._waiting.pop(token).path.unlink(missing_ok=True)
            if len(self._waiting) >= MOST:
                raise UploadError(
                    f"{MOST} uploaded clips are already waiting; try again in a few minutes", 503
                )
            token = secrets.token_urlsafe(16)
            self._waiting[token] = _Waiting(self.directory / secrets.token_hex(16), now)
        return token

    def _drop(self, token: str) -> None:
        with self._lock:
            waiting = self._waiting.pop(token, None)
        if waiting is not None:
            waiting.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete all clips."""
        shutil.rmtree(self.directory, ignore_errors=True)


def router(uploads: Uploads) -> APIRouter:
    """Return the route `POST /upload`, which takes a file as the body and answers its token."""
    routes = APIRouter()

    @routes.post("/upload", include_in_schema=False)
    async def upload(request: Request) -> Response:
        if HEADER not in request.headers:
            return JSONResponse({"error": "uploads are accepted only from the page"}, 403)
        length = request.headers.get("content-length", "")
        try:
            token = await uploads.receive(
                request.stream(), int(length) if length.isascii() and length.isdigit() else None
            )
        except UploadError as error:
            return JSONResponse({"error": str(error)}, error.status)
        return JSONResponse({"token": token})

    return routes

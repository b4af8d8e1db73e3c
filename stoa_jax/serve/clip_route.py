"""`GET /clip/<row>`: a video of the library, whole or one byte range."""

import hashlib
import io
import os
from collections.abc import AsyncIterator, Mapping

import anyio
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from stoa_jax.data.video.container import VideoError
from stoa_jax.serve import ranges
from stoa_jax.serve.library import GoneError, Library, OpenFile
from stoa_jax.serve.transcode import Cache, playable_type

CHUNK = 256 << 10  # bytes in memory per request
MAX_DIGITS = 10  # in a row number
_COMMON = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "private, no-cache",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; media-src 'self'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def router(library: Library, cache: Cache) -> APIRouter:
    """Return the route over a library."""
    routes = APIRouter()

    @routes.api_route("/clip/{row}", methods=["GET", "HEAD"], include_in_schema=False)
    async def clip(row: str, request: Request) -> Response:
        if not (row.isascii() and row.isdigit() and len(row) <= MAX_DIGITS):
            return _refusal(404, "a clip is addressed by its number")
        try:
            file, media_type = await anyio.to_thread.run_sync(_ready, library, cache, int(row))
        except GoneError as error:
            return _refusal(404, str(error))
        except VideoError as error:
            return _refusal(415, str(error))
        return answer(file, media_type, request.method, request.headers)

    return routes


def _ready(library: Library, cache: Cache, row: int) -> tuple[OpenFile, str]:
    """Open the file to send for a row: the original, or its transcoded form."""
    opened = library.open(row)
    try:
        media_type = playable_type(opened.path, opened.key[1:])
        if media_type is not None:
            return opened, media_type
        made = cache.get(opened.path, opened.key)
        transcoded = OpenFile.of(io.FileIO(made), made)
    except VideoError as error:
        opened.file.close()
        # Visitors need not know the path of the library.
        raise VideoError(str(error).replace(str(opened.path), opened.path.name)) from None
    except BaseException:  # close the file after any failure, or a cancelled request
        opened.file.close()
        raise
    opened.file.close()
    return transcoded, "video/mp4"


def answer(file: OpenFile, media_type: str, method: str, request: Mapping[str, str]) -> Response:
    """Answer a request for an open file, and close it when everything is sent."""
    tag = '"' + hashlib.sha256(repr(file.key).encode("utf-8", "surrogatepass")).hexdigest()[:24]
    tag += '"'
    modified = file.modified_ns / 1e9
    headers = {**_COMMON, "ETag": tag, "Last-Modified": ranges.http_date(modified)}
    if ranges.names_tag(request.get("if-none-match"), tag):
        file.file.close()
        return Response(status_code=304, headers=headers)
    asked = request.get("range") if method == "GET" else None
    if not ranges.range_still_valid(request.get("if-range"), tag, modified):
        asked = None
    try:
        part = ranges.parse(asked, file.size)
    except ranges.Unsatisfiable:
        file.file.close()
        return Response(
            status_code=416, headers={**headers, "Content-Range": f"bytes */{file.size}"}
        )
    start, end = part or (0, file.size - 1)
    headers["Content-Length"] = str(end - start + 1)
    if part:
        headers["Content-Range"] = f"bytes {start}-{end}/{file.size}"
    if method == "HEAD":
        file.file.close()
        return Response(status_code=200, headers=headers, media_type=media_type)
    return StreamingResponse(
        _bytes(file.file, start, end), 206 if part else 200, headers, media_type
    )


async def _bytes(file: io.FileIO, start: int, end: int) -> AsyncIterator[bytes]:
    """Yield bytes `start` to `end` of a file in chunks, and close it."""
    try:
        while start <= end:
            size = min(CHUNK, end - start + 1)
            chunk = await anyio.to_thread.run_sync(os.pread, file.fileno(), size, start)
            if not chunk:
                raise OSError("the file became shorter while it was sent")
            start += len(chunk)
            yield chunk
    finally:
        file.close()


def _refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status, headers={"X-Content-Type-Options": "nosniff"})

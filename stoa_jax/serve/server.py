"""The socket and the HTTP server."""

import contextlib
import socket as sockets
from collections.abc import Iterator
from typing import Any

from stoa_jax.errors import UserError


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[sockets.socket]:
    """Listen on a host and port, or raise UserError with the reason."""
    family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
    with sockets.socket(family, sockets.SOCK_STREAM) as socket:
        socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            socket.bind((host, port))
            socket.listen(128)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"cannot listen on {host}, port {port} ({reason}); choose another with --port "
                "or --host"
            ) from None
        yield socket


def serve(app: Any, socket: sockets.socket) -> None:
    """Serve an application until Ctrl-C or SIGTERM."""
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,  # the page's event streams never end
        h11_max_incomplete_event_size=64 << 10,
    )
    uvicorn.Server(settings).run(sockets=[socket])

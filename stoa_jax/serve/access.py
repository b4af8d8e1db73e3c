"""Access control: allowed host names, a password, and no route that reads files by name."""

import base64
import binascii
import ipaddress
import re
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stoa_jax.errors import UserError

# The only routes that the page needs. Gradio has others, which read files by path, forward to other
# addresses, accept uploads, and serve developers. The guard blocks all of them.
ALLOWED = re.compile(
    r"""/ | /clip/[^/]+ | /upload
    | /config/? | /theme\.css | /favicon\.ico | /manifest\.json | /robots\.txt
    | /(assets|static)/[\w./-]+
    | /gradio_api/(startup-events|theme\.css|app_id/?|login_check/?|cancel|reset/?)
    | /gradio_api/queue/(join|data) | /gradio_api/heartbeat/\w+""",
    re.ASCII | re.VERBOSE,
)
MAX_BODY = 1 << 20  # bytes of any request except uploads


def password_of(text: str) -> tuple[str, str]:
    """Return user and password from `--auth`: `USER:PASSWORD`, or `@FILE` with one such line."""
    if text.startswith("@"):
        try:
            with open(text[1:], encoding="utf-8") as file:
                text = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--auth: {text[1:]} cannot be read ({error})") from None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise UserError("--auth: write USER:PASSWORD, or @FILE with one such line")
    return user, password


def is_loopback(host: str) -> bool:
    """Return whether a bind address is reachable only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware that refuses unknown hosts, wrong passwords and other routes."""

    def __init__(
        self, app: ASGIApp, hosts: Sequence[str] = (), login: tuple[str, str] | None = None
    ):
        self.app, self.hosts, self.login = app, frozenset(hosts), login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer with the reason for refusing it."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
        elif scope["type"] != "websocket":  # the page uses no websockets
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        # Other sites' host names that resolve to this machine must not read from it (DNS
        # rebinding).
        if self.hosts and _host(headers.get("host", "")) not in self.hosts:
            return PlainTextResponse("unknown host; open the address that was printed", 421)
        if self.login is not None and not _knows(headers.get("authorization", ""), self.login):
            ask = {"WWW-Authenticate": 'Basic realm="stoa", charset="UTF-8"'}
            return PlainTextResponse("user and password are required", 401, headers=ask)
        path = scope["path"]
        if not ALLOWED.fullmatch(path) or ".." in path:
            return PlainTextResponse("not found", 404)
        if scope["method"] not in ("GET", "HEAD") and path != "/upload":
            length = headers.get("content-length", "")
            if not (length.isascii() and length.isdigit()):
                return PlainTextResponse("a Content-Length is required", 411)
            if int(length) > MAX_BODY:
                return PlainTextResponse("too large", 413)
        return None


def _host(header: str) -> str:
    """Return the name in a Host header, without the port."""
    name, _, port = header.rpartition(":")
    return (name if port.isdigit() and name else header).strip("[]").lower()


def _knows(header: str, login: tuple[str, str]) -> bool:
    kind, _, code = header.partition(" ")
    try:
        said = base64.b64decode(code, validate=True)
    except (binascii.Error, ValueError):
        said = b""
    right = secrets.compare_digest(said, ":".join(login).encode())
    return kind.lower() == "basic" and right

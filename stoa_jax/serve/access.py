"""Who may ask, and for what: host names, a password, and no route that reads files by name."""

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

# All that the page asks for. Gradio has more routes: they read files by their path, forward to
# addresses, take uploads, and serve developers. None of them is reached.
ALLOWED = re.compile(
    r"""/ | /clip/[^/]+ | /upload
    | /config/? | /theme\.css | /favicon\.ico | /manifest\.json | /robots\.txt
    | /(assets|static)/[\w./-]+
    | /gradio_api/(startup-events|theme\.css|app_id/?|login_check/?|cancel|reset/?)
    | /gradio_api/queue/(join|data) | /gradio_api/heartbeat/\w+""",
    re.ASCII | re.VERBOSE,
)
MAX_BODY = 1 << 20  # bytes of any request but an upload


def password_of(text: str) -> tuple[str, str]:
    """Return the user and the password of `--auth`: `USER:PASSWORD`, or `@FILE` that holds it."""
    if text.startswith("@"):
        try:
            with open(text[1:], encoding="utf-8") as file:
                text = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--auth: {text[1:]} cannot be read ({error})") from None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise UserError("--auth: give USER:PASSWORD, or @FILE whose one line is that")
    return user, password


def is_loopback(host: str) -> bool:
    """Whether a host to bind to is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware before everything else: refuses hosts, strangers, and routes."""

    def __init__(
        self, app: ASGIApp, hosts: Sequence[str] = (), login: tuple[str, str] | None = None
    ):
        self.app, self.hosts, self.login = app, frozenset(hosts), login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer why not."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
        elif scope["type"] != "websocket":  # the page uses none
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        # Another site's name that leads to this machine must not read from it (DNS rebinding).
        if self.hosts and _host(headers.get("host", "")) not in self.hosts:
            return PlainTextResponse("unknown host; open the address that was printed", 421)
        if self.login is not None and not _knows(headers.get("authorization", ""), self.login):
            ask = {"WWW-Authenticate": 'Basic realm="stoa", charset="UTF-8"'}
            return PlainTextResponse("user and password, please", 401, headers=ask)
        path = scope["path"]
        if not ALLOWED.fullmatch(path) or ".." in path:
            return PlainTextResponse("not found", 404)
        if scope["method"] not in ("GET", "HEAD") and path != "/upload":
            length = headers.get("content-length", "")
            if not (length.isascii() and length.isdigit()):
                return PlainTextResponse("a length is wanted", 411)
            if int(length) > MAX_BODY:
                return PlainTextResponse("too large", 413)
        return None


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
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

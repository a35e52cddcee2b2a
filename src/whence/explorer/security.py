"""Who may ask: pages of this server alone, on loopback; elsewhere whoever has the token.

A page of another site must not read the model through a visitor's browser. So a request's Host is one of the server's
own names (against DNS rebinding), its Origin and Sec-Fetch-Site say the same site where a browser sends them, and
every answer forbids frames, inline scripts and whatever else is not of this server. Bodies end at `MOST_BYTES`.

With a token the server may have any name, and `/?token=TOKEN` sets a cookie that no script reads and that other sites'
pages send with no more than a link to the page, and leads to `/`.

Sources: https://www.w3.org/TR/CSP3/; https://www.w3.org/TR/fetch-metadata/.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BYTES = 2**20
FOREIGN = "requests from pages of other sites are refused"
TOO_LARGE = f"a request has {MOST_BYTES:,} bytes at most"
COOKIE = "whence-token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Lets only allowed requests through to an app.

    Args:
        app: The app.
        hosts: Names by which this server may be called, without a port.
        token: What every request must show; None: nothing.
    """

    def __init__(self, app: App, *, hosts: Iterable[str], token: str | None = None):
        self.app = app
        self.hosts = {host.lower() for host in hosts}
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        guarded = _with_headers(send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if (refusal := self._refusal(scope, headers)) is not None:
            await _refuse(guarded, *refusal)
        elif self.token is not None and not self._shows_token(headers):
            await self._admit(scope, guarded)
        else:
            await self._within_limits(scope, receive, guarded)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Why a request is not of this server's own page."""
        host = _host(headers.get("host", ""))
        if self.token is None and host not in self.hosts:  # a token is what another site's page cannot know
            return 421, f"this server is not called by that name, but by {', '.join(sorted(self.hosts))}"
        origin = headers.get("origin")
        if origin is not None and _origin(origin) != headers.get("host", "").lower():
            return 403, FOREIGN
        is_link = (scope["method"], scope["path"], headers.get("sec-fetch-mode")) == ("GET", "/", "navigate")
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and not is_link:
            return 403, FOREIGN
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > MOST_BYTES:
            return 413, TOO_LARGE
        is_json = headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
        if scope["method"] == "POST" and not is_json:
            return 415, "application/json is expected"
        return None

    def _shows_token(self, headers: dict[str, str]) -> bool:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        shown = cookies[COOKIE].value if COOKIE in cookies else ""
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        return any(_is_same(value, self.token or "") for value in (shown, bearer))

    async def _admit(self, scope: Scope, send: Send) -> None:
        """Set the cookie for whoever brings the token in the page's address."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["path"] != "/" or not _is_same(query.get("token", [""])[0], self.token or ""):
            await _refuse(send, 401, "open the address that whence explore printed: it has a token")
            return
        cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Lax; Path=/"
        await send({"type": "http.response.start", "status": 303,
                    "headers": [(b"location", b"/"), (b"set-cookie", cookie.encode("latin-1"))]})  # fmt: skip
        await send({"type": "http.response.body", "body": b""})

    async def _within_limits(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, which may have had no stated length."""
        body, has_more = b"", True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
            if len(body) > MOST_BYTES:
                await _refuse(send, 413, TOO_LARGE)
                return
        pieces = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replayed() -> Message:
            return next(pieces, None) or await receive()

        await self.app(scope, replayed, send)


def _host(header: str) -> str:
    """A Host header without its port.

    >>> _host("localhost:8765"), _host("[::1]:8765"), _host("LOCALHOST")
    ('localhost', '::1', 'localhost')
    """
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _origin(header: str) -> str:
    """Host and port of an Origin header; what is none has none."""
    try:
        return urlsplit(header).netloc.lower()
    except ValueError:
        return ""


def _is_same(one: str, other: str) -> bool:
    return bool(other) and hmac.compare_digest(one.encode(), other.encode())


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message["headers"] = [*message.get("headers", []), *own]
        await send(message)

    return sending


async def _refuse(send: Send, status: int, error: str) -> None:
    body = json.dumps({"error": error}).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})

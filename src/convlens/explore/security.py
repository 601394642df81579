"""ASGI middleware that keeps a local server closed to other people and to other web pages.

A server on 127.0.0.1 can be reached by every page that is open in the browser, by every user of
the machine, and, with a name that resolves to 127.0.0.1 (DNS rebinding), by scripts of other hosts.
So a request needs the token, a `Host` of this machine and, if it changes anything, the `Origin` of
the page itself. Bodies are limited in size and time, and requests in number.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SAFE_METHODS = ("GET", "HEAD")
RETRY_SECONDS = 1  # after which a client that was refused for lack of room should try again
# A long number in a path would be an error of Python, which converts at most 4,300 digits.
MAX_TARGET = 4096  # characters of path and query
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 << 10
_HOST = re.compile(
    r"(?:\[(?P<ip6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::[0-9]{1,5})?", re.IGNORECASE
)
# Scripts, styles and data come from this server only. Charts and thumbnails are data URIs.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
        token: what a request has to know; empty if none is needed.
        names: the host names and addresses by which the server may be addressed.
        addresses: also allow all IP addresses, for a server that is open to other machines. They
            are no help for DNS rebinding, which needs a name.
        cookie: name of the cookie with the token. Cookies are shared by all ports of a host, so
            servers on different ports need different names.
        bearer_only: programs send the token as `Authorization: Bearer TOKEN`. No browser does that
            by itself, so that any host name is accepted.
        open_paths: what may be requested without a token.
    """

    token: str
    names: frozenset[str] = frozenset(LOOPBACK_NAMES)
    addresses: bool = False
    cookie: str = "convlens"
    bearer_only: bool = False
    open_paths: frozenset[str] = frozenset()

    def allows_host(self, host: str) -> bool:
        """Return whether a `Host` header names this server; the port may be that of a tunnel."""
        name = _host_name(host)
        if name in self.names or self.bearer_only:
            return True
        return self.addresses and _is_address(name)

    def knows_token(self, text: str) -> bool:
        return not self.token or hmac.compare_digest(text.encode(), self.token.encode())

    def knows_cookie(self, headers: Headers) -> bool:
        """Return whether one of the cookies has the token.

        The value that a browser sends is compared as it is. `SimpleCookie` would need 7 seconds to
        parse 60 kB of backslashes (Python 3.11.7), for anybody who connects.
        """
        if not self.token:
            return True
        expected = SimpleCookie({self.cookie: self.token})[self.cookie].coded_value.encode()
        pairs = ";".join(headers.getlist("cookie")).split(";")
        sent = [
            value
            for name, _, value in (pair.strip().partition("=") for pair in pairs)
            if name == self.cookie
        ]
        return any(hmac.compare_digest(value.encode(), expected) for value in sent)


@dataclass(frozen=True)
class Limits:
    """Limits on what one client can make the server hold.

    Attributes:
        body_bytes: of a request.
        body_seconds: until its body has arrived.
        requests: at the same time; the others are refused, not queued.
    """

    body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    requests: int = 64


def _host_name(host: str) -> str:
    """Return the name in a `Host` header, without port and brackets; "" if it is not valid."""
    match = _HOST.fullmatch(host)
    return (match["ip6"] or match["name"]).lower() if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware that refuses requests which `access` and `limits` do not allow."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits | None = None) -> None:
        self.app = app
        self.access = access
        self.limits = limits or Limits()
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no part of the page uses WebSockets
            await send({"type": "websocket.close", "code": 1008})
            return

        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            has_started = True
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None and self._active >= self.limits.requests:
            refusal = refuse(503, "too many requests at the same time", "try again")
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        self._active += 1
        try:
            await self.app(scope, self._limited(receive), send_with_headers)
        except asyncio.CancelledError:
            # At its end uvicorn cancels what takes too long, e.g. a model that is being loaded, and
            # would print a traceback.
            if not has_started:
                await refuse(503, "the server has been stopped")(scope, receive, send_with_headers)
        finally:
            self._active -= 1

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that is not allowed; None for one that is."""
        headers = Headers(scope=scope)
        malformed = _malformed(scope, headers)
        if malformed is not None:
            return malformed
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.access.allows_host(hosts[0]):
            return refuse(421, "this server does not answer for that host name")
        problem = _other_site(scope["method"], headers, f"{scope['scheme']}://{hosts[0]}")
        if problem:
            return refuse(403, problem)
        if scope["path"] in self.access.open_paths:
            return self._too_large(headers)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        has_bearer = scheme == "Bearer" and self.access.knows_token(bearer)
        if self.access.bearer_only:
            if has_bearer:
                return self._too_large(headers)
            return refuse(
                401, "the token is missing or wrong", "send it as `Authorization: Bearer TOKEN`"
            )
        if not self.access.knows_cookie(headers):
            if has_bearer:
                return self._too_large(headers)
            return self._log_in(scope)
        # A browser states the origin of every request that changes something.
        if scope["method"] not in SAFE_METHODS and self.access.token and "origin" not in headers:
            return refuse(403, "a request that changes something needs an Origin header")
        return self._too_large(headers)

    def _too_large(self, headers: Headers) -> Response | None:
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return refuse(400, "the length of the body is not a number")
        if len(length) > 20 or int(length) > self.limits.body_bytes:
            return refuse(413, self._size_problem())
        return None

    def _log_in(self, scope: Scope) -> Response:
        """Move the token of the URL into a cookie, or ask for it."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in query if name == "token"]
        if scope["method"] == "GET" and tokens and self.access.knows_token(tokens[0]):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            # A path that starts with two slashes would be the URL of another host.
            path = "/" + scope["path"].lstrip("/")
            response = RedirectResponse(path + (f"?{rest}" if rest else ""), status_code=303)
            response.set_cookie(
                self.access.cookie, self.access.token, httponly=True, samesite="strict"
            )
            return response
        problem = "the token is missing or wrong"
        if scope["path"].startswith("/api/"):
            return refuse(401, problem, "open the URL that convlens printed at its start")
        return PlainTextResponse(
            f"{problem}.\nOpen the complete URL that convlens printed when it was started.\n",
            status_code=401,
        )

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` that raises an `HTTPException` for a large or slow body."""
        received, deadline = 0, asyncio.get_running_loop().time() + self.limits.body_seconds
        complete = False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # only the end of the connection can follow
                return await receive()
            remaining = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(remaining, 0))
            except TimeoutError:
                raise HTTPException(408, "the body took too long to arrive") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.limits.body_bytes:
                raise HTTPException(413, self._size_problem())
            return message

        return limited

    def _size_problem(self) -> str:
        return f"the body has more than {self.limits.body_bytes >> 20} MB"


def _malformed(scope: Scope, headers: Headers) -> Response | None:
    """Return the answer to a request that is too long, or has a body of uncertain extent."""
    if len(scope["path"]) + len(scope["query_string"]) > MAX_TARGET:
        return refuse(414, f"the URL has more than {MAX_TARGET:,} characters")
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        return refuse(431, "the headers are too large or too many")
    is_chunked, length = "transfer-encoding" in headers, headers.get("content-length", "0")
    if is_chunked and "content-length" in headers:
        # A proxy may believe the other one, and take a part of the body for a request.
        return refuse(400, "a body has either a length or chunks")
    if scope["method"] in SAFE_METHODS and (is_chunked or length != "0"):
        # Nobody reads it. If it were too slow or too large, the answer would have started already.
        return refuse(400, f"a {scope['method']} request has no body")
    return None


def _other_site(method: str, headers: Headers, own: str) -> str:
    """Return why a request comes from another page than those of this server, or ""."""
    origins = headers.getlist("origin")
    if any(origin != own for origin in origins):
        return "requests from other pages are refused"
    site = headers.get("sec-fetch-site", "none")
    # A link on another page may open this one, but nothing of it can be embedded or fetched.
    is_visit = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    is_visit = is_visit and headers.get("sec-fetch-dest", "document") == "document"
    if site not in ("same-origin", "none") and not is_visit:
        return "requests from other pages are refused"
    return ""


class Answer(JSONResponse):
    """JSON in ASCII: names of files can have characters that UTF-8 cannot represent."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def refuse(status: int, what: str, fix: str = "") -> JSONResponse:
    """Return an error as data, in the form of a `ConvlensError`."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else None
    return Answer({"error": what, "where": "", "fix": fix}, status_code=status, headers=headers)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def own_names(host: str, others: Iterable[str] = ()) -> frozenset[str]:
    """Return the names of a server that listens on `host`."""
    return frozenset(name.lower() for name in (*LOOPBACK_NAMES, host, *others))

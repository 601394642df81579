from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from convlens.explore.security import Access, Guard, Limits, is_loopback, own_names

TOKEN = "a secret of the test"
URL = "http://localhost:8000"


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{request.method} {len(await request.body())}")


def client(access: Access | None = None, **limits: Any) -> TestClient:
    guard = Middleware(Guard, access=access or Access(TOKEN), limits=Limits(**limits))
    routes = [Route("/{path:path}", echo, methods=["GET", "POST", "DELETE"])]
    app = Starlette(routes=routes, middleware=[guard])
    return TestClient(app, base_url=URL, follow_redirects=False)


def logged_in(**limits: Any) -> TestClient:
    visitor = client(**limits)
    visitor.get("/", params={"token": TOKEN})
    return visitor


def test_token_moves_from_the_url_into_a_cookie() -> None:
    visitor = client()
    assert visitor.get("/try").status_code == 401
    answer = visitor.get("/try", params={"run": "a&b", "token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/try?run=a%26b")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert visitor.get("/try").text == "GET 0"


@pytest.mark.parametrize("path", ["//evil.example/x", "/\\evil.example", "/%2f%2fevil.example"])
def test_redirect_stays_on_this_server(path: str) -> None:
    answer = client().get(f"{URL}{path}", params={"token": TOKEN})
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/")
    assert not answer.headers["location"].startswith("//")
    assert "\\" not in answer.headers["location"]


@pytest.mark.parametrize("token", ["a;b, c", 'quote " and \\ backslash', "plain-token_1"])
def test_cookie_with_any_token_is_accepted_as_the_browser_returns_it(token: str) -> None:
    access = Access(token, cookie="convlens-1")
    answer = client(access).get("/", params={"token": token})
    cookie = answer.headers["set-cookie"].split("; HttpOnly")[0]
    name, _, value = cookie.partition("=")
    others = "convlens-2=x; convlens-1=old"
    for sent, status in (
        (cookie, 200),
        (f"{others}; {cookie}", 200),
        (f"{cookie};{others}", 200),
        (f"{name}={value}x", 401),
        (f"{name}={value[:-1]}", 401),
        (f"x{name}={value}", 401),
        (value, 401),
        (name, 401),
    ):
        assert client(access).get("/try", headers={"cookie": sent}).status_code == status, sent


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", "\u017ftoken"])
def test_wrong_tokens_are_refused(token: str) -> None:
    assert client().get("/try", params={"token": token}).status_code == 401
    assert client().get("/", headers={"authorization": f"Bearer {token!a}"}).status_code == 401


@pytest.mark.parametrize("scheme", ["", "bearer ", "Basic ", "Bearer  "])
def test_token_without_its_scheme_is_refused(scheme: str) -> None:
    assert client().get("/", headers={"authorization": f"{scheme}{TOKEN}"}).status_code == 401


def test_bearer_token_is_accepted_without_an_origin() -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert client().post("/api/x", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8000",
        "192.168.0.1",
        "",
        "localhost:abc",
        "localhost:80:80",
        "localhost/evil.example",
        "[::1].evil.example",
        "[::1",
    ],
)
def test_other_host_names_are_refused(host: str) -> None:
    assert logged_in().get("/", headers={"host": host}).status_code == 421


def test_names_of_this_server() -> None:
    open_access = Access("x", own_names("0.0.0.0", ["Workstation"]), addresses=True)
    assert open_access.allows_host("workstation:8000")
    assert open_access.allows_host("192.168.0.1:8000")
    assert open_access.allows_host("[fe80::1]:8000")
    assert not open_access.allows_host("evil.example")
    assert Access("x").allows_host("[::1]:9")
    assert not Access("x").allows_host("192.168.0.1")
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [
        True
    ] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org")] == [
        False
    ] * 4


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://localhost:8000"},
        {"origin": "http://localhost:8001"},
        {"origin": URL, "sec-fetch-site": "cross-site"},
        {"origin": URL, "sec-fetch-site": "same-site"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_changes_need_the_origin_of_the_page(headers: dict[str, str], method: str) -> None:
    assert logged_in().request(method, "/api/x", headers=headers).status_code == 403


def test_changes_by_the_page_itself_are_accepted() -> None:
    headers = {"origin": URL, "sec-fetch-site": "same-origin"}
    assert logged_in().post("/api/x", content=b"abc", headers=headers).text == "POST 3"


def test_other_pages_may_link_here_but_not_embed_or_fetch() -> None:
    visitor = logged_in()
    other = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert visitor.get("/try", headers={**other, "sec-fetch-dest": "document"}).status_code == 200
    assert visitor.get("/try", headers={**other, "sec-fetch-dest": "iframe"}).status_code == 403
    image = {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}
    assert visitor.get("/api/x", headers=image).status_code == 403


def test_every_answer_forbids_inline_scripts_and_other_hosts() -> None:
    for answer in (client().get("/"), logged_in().get("/")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_large_bodies_are_refused_with_and_without_a_length() -> None:
    visitor = logged_in(body_bytes=1000)
    headers = {"origin": URL}
    assert visitor.post("/", content=b"x" * 1000, headers=headers).text == "POST 1000"
    assert visitor.post("/", content=b"x" * 1001, headers=headers).status_code == 413
    chunks = (b"x" * 400 for _ in range(3))
    assert visitor.post("/", content=chunks, headers=headers).status_code == 413
    huge = {**headers, "content-length": "9" * 30}
    assert visitor.post("/", content=b"x", headers=huge).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/" + "9" * 5000, {}, 414),
        ("POST", "/?a=" + "b" * 5000, {}, 414),
        ("GET", "/", {f"x-{number}": "y" for number in range(200)}, 431),
        ("GET", "/", {"x": "y" * 70_000}, 431),
        ("GET", "/", {"content-length": "1"}, 400),
        ("GET", "/", {"transfer-encoding": "chunked"}, 400),
        ("POST", "/", {"content-length": "1", "transfer-encoding": "chunked"}, 400),
    ],
    ids=lambda each: str(each)[:20],
)
def test_requests_that_are_long_or_unclear_are_refused(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    # Also without the token: nothing else is looked at before.
    for visitor in (client(), logged_in()):
        answer = visitor.request(method, path, headers={"origin": URL, **headers})
        assert answer.status_code == status
        assert set(answer.json()) == {"error", "where", "fix"}


def run_guard(scope: dict[str, Any], receive: Any, limits: Limits) -> list[int]:
    """Send one request to a guarded app and return the status codes of the answer."""
    app = Starlette(
        routes=[Route("/", echo, methods=["POST"])],
        middleware=[Middleware(Guard, access=Access(""), limits=limits)],
    )
    sent: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            sent.append(message["status"])

    asyncio.run(app(scope, receive, send))
    return sent


def post_scope() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "scheme": "http",
        "headers": [(b"host", b"localhost:8000"), (b"origin", URL.encode())],
    }


def test_slow_bodies_are_cut_off() -> None:
    async def never() -> Any:
        await asyncio.sleep(60)

    assert run_guard(post_scope(), never, Limits(body_seconds=0.01)) == [408]


def test_requests_above_the_limit_are_refused() -> None:
    async def body() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    assert run_guard(post_scope(), body, Limits(requests=0)) == [503]
    assert run_guard(post_scope(), body, Limits(requests=1)) == [200]


def test_request_that_is_cancelled_at_the_end_of_the_server_is_answered() -> None:
    async def wait(*_: Any) -> Any:
        await asyncio.sleep(60)

    async def cancel_request() -> list[int]:
        sent: list[int] = []

        async def send(message: Any) -> None:
            sent.extend([message["status"]] if message["type"] == "http.response.start" else [])

        guard = Guard(wait, access=Access(""), limits=Limits())
        task = asyncio.create_task(guard(post_scope(), wait, send))
        await asyncio.sleep(0.01)
        task.cancel()
        await task
        return sent

    assert asyncio.run(cancel_request()) == [503]


def test_two_host_headers_are_refused() -> None:
    async def body() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = post_scope()
    scope["headers"].append((b"host", b"localhost:8000"))
    assert run_guard(scope, body, Limits()) == [421]


def test_programs_send_the_token_themselves_and_use_any_host_name() -> None:
    access = Access(TOKEN, bearer_only=True, open_paths=frozenset({"/open"}))
    with client(access) as programs:
        headers = {"host": "classifier:8000"}
        assert programs.get("/open", headers=headers).status_code == 200
        for wrong in ({}, {"authorization": "Bearer no"}, {"cookie": f"{access.cookie}={TOKEN}"}):
            answer = programs.get("/", headers={**headers, **wrong})
            assert answer.status_code == 401
            assert "Authorization: Bearer" in answer.json()["fix"]
        answer = programs.get("/", headers={**headers, "authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 200
        assert programs.get(f"/?token={TOKEN}", headers=headers).status_code == 401

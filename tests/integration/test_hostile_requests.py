"""Hostile requests to `convlens explore` and `convlens serve`: refused, and the servers go on.

The requests are made from the routes of both applications (`helpers/hostile_requests.py`) and sent
to processes of the real commands. After each family the server answers as before, has printed no
traceback, and has shown no file, token or markup.
"""

from __future__ import annotations

import contextlib
import html
import itertools
import json
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import convlens
from convlens.data.decode import UnreadableImage, decode
from convlens.explore.security import SECURITY_HEADERS, Access
from convlens.explore.serve import MAX_BODY_BYTES, make_service_app
from convlens.explore.server import MAX_CONNECTIONS, PARTS, make_app
from helpers.commands import pictures
from helpers.hostile import hostile_images
from helpers.hostile_clients import WAIT_SECONDS, Reply, Server, SlowClients, read_reply
from helpers.hostile_requests import (
    BAD_CHUNKS,
    FAMILIES,
    MARKUP,
    NO_JSON,
    REVIEW,
    SEARCHED_LATER,
    Case,
    Family,
    RouteFacts,
    routes_of,
    valid_body,
)
from helpers.reviews import review_table
from helpers.serving_models import multipart, png
from helpers.support import TINY, working_in

SECRET = "this is the secret of a file"
CLASSES = ("<b onclick=alert(3)>", "\"'><svg onload=alert(4)>", "{{7*7}}${7*7}")
UNDECODABLE = "<i onclick=alert(5)>\udcff"  # part of a file name that is not UTF-8
MEMORY_GROWTH_KIB = 600 << 10
MAX_THREADS = 100


def application_routes(kind: str) -> list[RouteFacts]:
    nothing: Any = None  # routes do not depend on what is served
    make = make_app if kind == "explore" else make_service_app
    return routes_of(make(nothing, Access("")))


ROUTES = {kind: application_routes(kind) for kind in FAMILIES}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on digits, and one whose name, classes and images are markup."""
    root = tmp_path_factory.mktemp("hostile")
    with working_in(root):
        convlens.train(TINY, name="small", test=False, quiet=True)
        photos = pictures(root / "photos", dict.fromkeys(CLASSES, 12), size=8)
        for number, path in enumerate(sorted(photos.rglob("*.png"))):
            path.rename(path.with_name(f"{UNDECODABLE}{number}.png"))
        recipe = {**TINY, "data": {"name": str(photos)}}
        convlens.train(recipe, {"train.epochs": 1}, name="markup", test=False, quiet=True)
        Path("models/markup").rename(f"models/{MARKUP}")
        table = review_table(root)
        table.parent.rename(table.parent.with_name(f"labels-{REVIEW}"))
        Path("secret.txt").write_text(SECRET)
    return root


@contextlib.contextmanager
def running(kind: str, root: Path, *arguments: str) -> Iterator[Server]:
    """Run a command in a folder; it ends in order and has printed no traceback."""
    with working_in(root):
        server = Server(kind, *arguments)
    try:
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=WAIT_SECONDS) == 0
        assert "Traceback" not in "".join(server.errors)
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def explore(root: Path) -> Iterator[Server]:
    with running("explore", root, "--no-open", "--data", "photos", "--port", "0") as server:
        server.ids["image"] = server.ask("POST", "/api/try/images", png(100)).json["image"]
        body = {"run": "small", "image": server.ids["image"]}
        server.ids["layer"] = server.post("/api/try/activations", body)["layers"][0]["layer"]
        server.ids["job"] = server.post("/api/data/open", {"set": "run:small"})["job"]
        assert server.result(server.ids["job"])["state"] == "done"
        server.remember_usage()
        yield server


@pytest.fixture(scope="module")
def serve(root: Path) -> Iterator[Server]:
    with running("serve", root, MARKUP, "--port", "0", "--top", "2") as server:
        assert server.ask("POST", "/predict", png(100)).status == 200
        server.remember_usage()
        yield server


@pytest.fixture(params=list(FAMILIES))
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def slow_clients(explore: Server, serve: Server) -> Iterator[dict[str, SlowClients]]:
    """Slow clients of both servers, which begin before the other requests."""
    with SlowClients(explore) as of_explore, SlowClients(serve) as of_serve:
        yield {"explore": of_explore, "serve": of_serve}


def check_alive(server: Server) -> None:
    """Assert that a server answers as before and has printed no traceback."""
    path = "/healthz" if server.kind == "serve" else f"/{PARTS[0].name}"
    assert server.ask("GET", path).status == 200
    assert server.process.poll() is None
    printed = "".join(server.errors)
    assert not re.search("Traceback|Exception|Error:", printed), printed


def problem_of(case: Case, reply: Reply) -> str:
    """Return what is wrong with a refusal, or ""."""
    text = reply.body.decode(errors="replace")
    if reply.status != case.status:
        return f"status {reply.status} instead of {case.status}: {text[:200]}"
    if problem := leak_of(reply):
        return problem
    if case.method == "HEAD":
        return "has a body" if text else ""
    kind = reply.headers["content-type"]
    if kind.startswith("text/plain"):  # for a person who opens the page without its token
        return "" if reply.status == 401 and "<" not in text else f"text: {text[:200]}"
    return "" if set(reply.json) == {"error", "where", "fix"} else f"not an error: {text[:200]}"


def leak_of(reply: Reply) -> str:
    """Return what an answer shows that it must not show, or how it could be misread, or ""."""
    text = reply.body.decode(errors="replace")
    if any(each in text for each in (SECRET, "root:x:", "Traceback", "site-packages")):
        return f"shows a file: {text[:200]}"
    for name, value in SECURITY_HEADERS.items():
        if name != "cache-control" and reply.headers.get(name) != value:
            return f"the header {name} is {reply.headers.get(name)}"
    return ""


# -- requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_there_are_at_least_300_different_requests_for_each_server(kind: str) -> None:
    cases = [case for family in FAMILIES[kind] for case in family(ROUTES[kind])]
    assert len({case.content({}) for case in cases}) >= 300
    assert all(case.status >= 400 for case in cases)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_route_gets_hostile_requests_for_its_body(kind: str) -> None:
    cases = [case for family in FAMILIES[kind] for case in family(ROUTES[kind])]
    for route in ROUTES[kind]:
        sent = [case for case in cases if case.target.startswith(route.target())]
        assert {405, 421, 403} <= {case.status for case in sent}, route
        if "POST" in route.methods:
            # Bodies that are not JSON need requests of their own.
            assert (route.body is None) == (route.path in NO_JSON), route


@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, family) for kind, families in FAMILIES.items() for family in families],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_requests_of_a_family_are_refused(
    request: pytest.FixtureRequest, slow_clients: object, kind: str, family: Family
) -> None:
    server: Server = request.getfixturevalue(kind)
    replies = {case.name: problem_of(case, server.send(case)) for case in family(ROUTES[kind])}
    assert {name: problem for name, problem in replies.items() if problem} == {}
    check_alive(server)


def test_layers_that_do_not_exist_are_errors_of_the_job(explore: Server) -> None:
    for path, field in SEARCHED_LATER:
        for value in ("", "../x", MARKUP, "forward", "__class__", "9" * 4000):
            started = explore.post(path, {"run": "small", "channel": 0, field: value})
            state = explore.result(started["job"])
            assert state["state"] == "failed"
            assert "unexpectedly" not in state["error"]
    check_alive(explore)


# -- images and bodies ------------------------------------------------------------------------


def chosen_images() -> list[tuple[str, bytes, bool]]:
    """Return name and content of hostile files, and whether the library can read them."""
    chosen = []
    for name, content in hostile_images():
        if re.match(r"cut(?!5)|flip(?!0)", name):  # more of the same kinds
            continue
        try:
            decode(content, size=8, channels=3, fit="stretch", name=name)
            chosen.append((name, content, True))
        except UnreadableImage:
            chosen.append((name, content, False))
    return chosen


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_images_and_bombs_are_refused_as_by_the_library(
    root: Path, explore: Server, serve: Server
) -> None:
    images = chosen_images()
    assert sum(not readable for _, _, readable in images) > 80
    problems = {}
    for name, content, readable in images:
        target = f"/api/try/images?name={name}"
        upload = explore.send(Case(name, 200 if content else 400, target=target, body=content))
        answers = {"serve": (serve.ask("POST", "/predict", content), 200 if readable else 415)}
        if content:
            body = json.dumps({"run": "small", "image": upload.json["image"]}).encode()
            reply = explore.ask("POST", "/api/try/predict", body)
            answers["explore"] = (reply, 200 if readable else 422)
        for kind, (reply, status) in answers.items():
            problem = leak_of(reply) if status == 200 else problem_of(Case(name, status), reply)
            if problem or reply.status != status:
                problems[f"{kind} {name}"] = problem or f"status {reply.status}"
    assert problems == {}
    assert not (root / "hacked").exists()
    check_alive(explore)
    check_alive(serve)


def test_every_view_of_a_broken_image_is_refused(explore: Server) -> None:
    image = explore.ask("POST", "/api/try/images?name=x", b"<svg onload=alert(1)>").json["image"]
    for route in ROUTES["explore"]:
        if route.body is not None and {"run", "image"} <= set(route.body.model_fields):
            body = {**valid_body(route.body), "image": image}
            case = Case(route.path, 422, target=route.path, body=json.dumps(body).encode())
            reply = explore.send(case)
            if "job" not in reply.json:  # the image is read when the training images are known
                assert problem_of(case, reply) == ""


def test_bodies_without_an_end_are_cut_off(server: Server) -> None:
    path = "/predict" if server.kind == "serve" else "/api/try/images"
    headers = {"Transfer-Encoding": "chunked", "Content-Length": None}
    head = Case("endless", 413, "POST", path, headers).content(server.ids)
    part = bytes(1 << 20)
    with server.connect() as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):  # it is closed after the answer
            for _ in range(2 * MAX_BODY_BYTES // len(part)):
                connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))
        reply = read_reply(connection)
    assert reply.status in (413, 0)  # a reset may overtake the answer
    check_alive(server)


# -- connections ------------------------------------------------------------------------------


def upload_start(server: Server, length: int, host: str = "{host}") -> bytes:
    """Return the head of a request with a body, on a connection that stays open."""
    path = "/predict" if server.kind == "serve" else "/api/try/images"
    origin = "http://{host}" if host == "{host}" else None
    headers = {"Connection": None, "Host": host, "Origin": origin, "Content-Length": str(length)}
    return Case("upload", 200, "POST", path, headers).content(server.ids)


def test_connections_that_end_in_the_middle_of_a_body_leave_nothing(server: Server) -> None:
    for number in range(20):
        with server.connect() as connection:
            connection.sendall(upload_start(server, 1000) + bytes(10 * number))
            if number % 2:  # close with a reset
                option = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
    check_alive(server)


def test_bytes_after_a_request_are_not_a_part_of_it(server: Server) -> None:
    image = png(100)
    with server.connect() as connection:
        connection.sendall(upload_start(server, len(image)) + image + b"more than promised\r\n\r\n")
        first = read_reply(connection)
        second = read_reply(connection)
        assert (first.status, second.status) == (200, 400)
        assert problem_of(Case("second", 400), second) == ""
        with contextlib.suppress(ConnectionError):  # a reset
            assert connection.recv(1) == b""
    check_alive(server)


def test_damage_after_a_refusal_closes_the_connection(server: Server) -> None:
    """The request has been answered, so there is no second answer."""
    for name, chunks in BAD_CHUNKS.items():
        with server.connect() as connection:
            head = upload_start(server, 0, "evil.example")
            connection.sendall(head.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
            assert read_reply(connection).status == 421, name
            connection.sendall(chunks)
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b"", name
    check_alive(server)


def test_more_connections_than_allowed_are_closed(server: Server) -> None:
    files = Path(f"/proc/{server.process.pid}/fd")
    with contextlib.ExitStack() as stack:
        for _ in range(2 * MAX_CONNECTIONS + 200):
            stack.enter_context(server.connect())
        assert server.ask("GET", "/healthz").status in (503, 0)
        assert len(list(files.iterdir())) < 2 * MAX_CONNECTIONS + 150
    end = time.monotonic() + WAIT_SECONDS
    while server.ask("GET", "/nothing").status != 404 and time.monotonic() < end:
        time.sleep(0.05)  # it still closes them
    check_alive(server)


def test_dropped_event_streams_leave_no_trace(explore: Server) -> None:
    head = Case("events", 200, "GET", "/api/watch/events").content(explore.ids)
    threads = explore.usage("Threads")
    for count in (1, 20, 1, 20, 1, 20, 1, 20):  # more than may be open at the same time
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(explore.connect()) for _ in range(count)]
            for stream in streams:
                stream.sendall(head)
            for stream in streams:
                received = b""
                while b"data: " not in received:
                    part = stream.recv(1 << 16)
                    assert part, received
                    received += part
                assert b"HTTP/1.1 200" in received
        check_alive(explore)
    assert explore.usage("Threads") < threads + 40


# -- names ------------------------------------------------------------------------------------


def texts_of(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all texts in JSON, each with the key that it has."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield "", name
            yield from texts_of(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from texts_of(value, key)
    elif isinstance(content, str):
        yield key, content


def shown(name: str) -> str:
    """Return a name as it is shown, with an escape for what is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


NAMES = (MARKUP, REVIEW, *CLASSES, shown(UNDECODABLE))
STARTS_A_PROCESS = {"/api/labels/find", "/api/labels/train"}


def test_pages_show_names_as_text(explore: Server) -> None:
    pages = {part.name: explore.ask("GET", f"/{part.name}") for part in PARTS}
    for reply in pages.values():
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert leak_of(reply) == ""
        assert not any(name in reply.body.decode() for name in NAMES if "<" in name)
    assert html.escape(MARKUP) in pages["try"].body.decode()


def test_answers_show_names_as_json_or_escaped(explore: Server) -> None:
    upload = explore.ask("POST", "/api/try/images?name=%3Cscript%3Ealert(6)%3C/script%3E", png(3))
    assert upload.json["name"] == "<script>alert(6)</script>"
    known = {"image": [upload.json["image"]], "run": [MARKUP], "runs": [[MARKUP, "small"]]}
    known |= {"set": [f"run:{MARKUP}", "set:0"], "split": ["train", "val"]}
    seen: set[str] = set()
    answered: set[str] = set()
    posts = [route for route in ROUTES["explore"] if "POST" in route.methods]
    for route in [*posts, *posts]:  # in the second round with the ids of the first one
        if route.path in STARTS_A_PROCESS:
            continue
        body = {} if route.body is None else valid_body(route.body)
        names = [name for name in body if name in known]
        for values in itertools.product(*(known[name] for name in names)):
            content = {**body, **dict(zip(names, values, strict=True))}
            reply = explore.send(
                Case("names", 200, target=route.path, body=json.dumps(content).encode())
            )
            assert reply.headers["content-type"] == "application/json"
            assert leak_of(reply) == ""
            found = reply.json
            if reply.status == 200:
                answered.add(route.path)
                if job := found.get("job"):
                    found = explore.result(job)
            assert "unexpectedly" not in json.dumps(found), (route.path, content, found)
            for key, text in texts_of(found):
                seen.add(text)
                if key == "html":
                    assert not any(name in text for name in NAMES if "<" in name), text
                if key == "gallery":
                    known["gallery"] = [text]
    assert len(answered) > 20
    assert [name for name in NAMES if not any(name in text for text in seen)] == []
    check_alive(explore)


def test_the_service_answers_with_names_as_json(serve: Server) -> None:
    names = [MARKUP, "</script><script>alert(1)</script>.png", "{{7*7}}", "a\0b", "..\\..\\x"]
    body, kind = multipart([(name, png(100)) for name in names])
    reply = serve.ask("POST", "/predict", body, **{"Content-Type": kind})
    assert (reply.status, leak_of(reply)) == (200, "")
    assert reply.headers["content-type"] == "application/json"
    assert [each["filename"] for each in reply.json["predictions"]] == names
    assert {each["label"] for each in reply.json["predictions"]} <= set(CLASSES)
    # Half of a surrogate pair cannot be written as UTF-8.
    body, kind = multipart([("\\ud800.png", png(100))])
    headers = {"Content-Type": f"{kind}; charset=unicode_escape"}
    reply = serve.ask("POST", "/predict", body, **headers)
    assert reply.json["predictions"][0]["filename"] == "\ud800.png"
    check_alive(serve)


# -- the end ----------------------------------------------------------------------------------


def test_slow_clients_are_cut_off(server: Server, slow_clients: dict[str, SlowClients]) -> None:
    problems = slow_clients[server.kind].problems()
    assert problems == {}
    check_alive(server)


def test_memory_and_threads_have_not_run_away(server: Server, root: Path) -> None:
    assert server.usage("VmRSS") < server.usage_at_start["VmRSS"] + MEMORY_GROWTH_KIB
    assert server.usage("Threads") < MAX_THREADS
    written = {path.name for path in root.iterdir()}
    assert written <= {"models", "photos", "plots", "secret.txt", "cache"}
    assert set(os.listdir(root / "models")) == {"small", MARKUP}

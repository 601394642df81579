"""Hostile requests to `convlens explore` and `convlens serve`: refused, and the servers go on.

The requests are made from the routes of both applications (`helpers/hostile_requests.py`) and sent
to processes of the real commands. After each family the server answers as before, has printed no
traceback, and has shown no file, token or markup.
"""

from __future__ import annotations

import contextlib
import html
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.applications import Starlette

import convlens
from convlens.data.decode import UnreadableImage, decode
from convlens.explore.security import SECURITY_HEADERS, Access
from convlens.explore.serve import MAX_BODY_BYTES, MAX_IMAGES, make_service_app
from convlens.explore.server import MAX_CONNECTIONS, PARTS, make_app
from helpers.commands import pictures, start
from helpers.hostile import hostile_images
from helpers.hostile_requests import (
    BAD_CHUNKS,
    FAMILIES,
    MARKUP,
    NO_JSON,
    REVIEW,
    Case,
    RouteFacts,
    routes_of,
    valid_body,
)
from helpers.reviews import review_table
from helpers.serving_models import multipart, png
from helpers.support import TINY, working_in

SECRET = "this is the secret of a file"
CLASSES = ("<b onclick=alert(3)>", "\"'><svg onload=alert(4)>", "{{7*7}}${7*7}")
WAIT_SECONDS = 120.0  # for what needs 30 at most on a quiet machine
MEMORY_GROWTH = 500 << 20
MAX_THREADS = 100


@dataclass
class Reply:
    """An answer; the status is 0 if the connection was closed without one."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A process of a command that serves a folder, and a client of it."""

    def __init__(self, kind: str, root: Path, *arguments: str) -> None:
        self.kind, self.root = kind, root
        app = make_app(None, Access("")) if kind == "explore" else make_service_app(None, Access(""))  # type: ignore[arg-type]
        self.routes = routes_of(app)
        self.errors: list[str] = []
        self.process = start(kind, *arguments)
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(?:/\?token=(\S+))?", url)
        assert match, self.process.communicate()[1]
        self.address = ("127.0.0.1", int(match[1]))
        self.ids = {"host": f"127.0.0.1:{match[1]}"}
        if match[2]:
            self.ids |= {"cookie": f"convlens-{match[1]}", "token": match[2]}
            self.ids["token-prefix"] = match[2][:-1]
        threading.Thread(target=self._read_errors, daemon=True).start()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)  # line by line

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=WAIT_SECONDS)

    def send(self, case: Case) -> Reply:
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):  # refused before it was read
                connection.sendall(case.content(self.ids))
            return read_reply(connection, case.method)

    def ask(self, method: str, target: str, body: bytes = b"", **headers: str) -> Reply:
        """Send a request that is allowed."""
        return self.send(Case("allowed", 200, method, target, headers, body))

    def post(self, target: str, content: Any) -> Any:
        """Send JSON and return that of the answer."""
        reply = self.ask("POST", target, json.dumps(content).encode())
        assert reply.status == 200, reply.body
        return reply.json

    def result(self, job: str) -> Any:
        """Wait for a job; return its description with the result or the error."""
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            state = self.ask("GET", f"/api/jobs/{job}").json
            if state["state"] not in ("waiting", "running"):
                return state
            time.sleep(0.02)
        raise AssertionError("the job did not end")

    def check_alive(self) -> None:
        """Assert that it answers as before and has printed no traceback."""
        path = "/healthz" if self.kind == "serve" else f"/{PARTS[0].name}"
        assert self.ask("GET", path).status == 200
        assert self.process.poll() is None
        printed = "".join(self.errors)
        assert not re.search("Traceback|Exception|Error:", printed), printed

    def status(self, name: str) -> int:
        """Return a number of /proc/PID/status, in KiB or threads."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[0])


def read_reply(connection: socket.socket, method: str = "POST") -> Reply:
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
        return Reply(response.status, response.headers, response.read())
    except ConnectionError:
        return Reply()
    finally:
        response.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on digits, and one whose name, classes and images are markup."""
    root = tmp_path_factory.mktemp("hostile")
    with working_in(root):
        convlens.train(TINY, name="small", test=False, quiet=True)
        photos = pictures(root / "photos", dict.fromkeys(CLASSES, 12), size=8)
        for number, path in enumerate(sorted(photos.rglob("*.png"))):
            path.rename(path.with_name(f"<i onclick=alert({number})>.png"))
        shutil.copy(path.with_name(f"<i onclick=alert({number})>.png"), os.fsencode(photos / CLASSES[0]) + b"/\xff\xfe.png")
        recipe = {**TINY, "name": "markup", "data": {"name": str(photos)}}
        convlens.train(recipe, {"train.epochs": 1}, name="markup", quiet=True, test=False)
        Path("models/markup").rename(f"models/{MARKUP}")
        table = review_table(root)
        table.parent.rename(table.parent.with_name(f"labels-{REVIEW}"))
        Path("secret.txt").write_text(SECRET)
    return root


@contextlib.contextmanager
def running(kind: str, root: Path, *arguments: str) -> Iterator[Server]:
    """Run a command in a folder; it ends in order and has printed no traceback."""
    with working_in(root):
        server = Server(kind, root, *arguments)
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
        yield server


@pytest.fixture(scope="module")
def serve(root: Path) -> Iterator[Server]:
    with running("serve", root, MARKUP, "--port", "0", "--top", "2") as server:
        yield server


@pytest.fixture(params=["explore", "serve"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


def problem_of(case: Case, reply: Reply, root: Path) -> str:
    """Return what is wrong with a refusal, or ""."""
    text = reply.body.decode(errors="replace")
    if reply.status != case.status:
        return f"status {reply.status} instead of {case.status}: {text[:200]}"
    for name in ("x-content-type-options", "content-security-policy"):
        if reply.headers.get(name) != SECURITY_HEADERS[name]:
            return f"no header {name}"
    if any(each in text for each in (SECRET, str(root), "root:x:", "Traceback", "site-packages")):
        return f"shows a file: {text[:200]}"
    kind = reply.headers.get("content-type", "")
    if kind.startswith("text/plain"):
        return "" if reply.status == 401 and "<" not in text else f"text: {text[:200]}"
    if kind != "application/json":
        return f"has the type {kind}"
    if case.method == "HEAD":
        return "has a body" if text else ""
    return "" if set(reply.json) == {"error", "where", "fix"} else f"not an error: {text[:200]}"


@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, family) for kind, families in FAMILIES.items() for family in families],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_requests_of_a_family_are_refused(
    request: pytest.FixtureRequest, kind: str, family: Callable[..., Iterator[Case]]
) -> None:
    server: Server = request.getfixturevalue(kind)
    started, used = time.perf_counter(), time.process_time()
    problems = {}
    n = 0
    for case in family(server.routes):
        n += 1
        if problem := problem_of(case, server.send(case), server.root):
            problems[case.name] = problem
    print(kind, family.__name__, n, round(time.perf_counter() - started, 2), round(time.process_time() - used, 2))
    assert problems == {}
    server.check_alive()

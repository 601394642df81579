"""The web service answers as `predict` does, refuses what is hostile, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from openapi_spec_validator import validate
from starlette.testclient import TestClient

from convlens import model_export
from convlens.explore.batching import Room
from convlens.explore.security import Access
from convlens.explore.serve import (
    MAX_BODY_BYTES,
    MAX_IMAGES,
    OPEN_PATHS,
    make_service_app,
    open_service,
)
from helpers.commands import DIGITS, brightness_model, here
from helpers.hostile_requests import routes_of, wrong_tokens
from helpers.paths import REPOSITORY
from helpers.serving_models import multipart, png, running_service

DOCS = REPOSITORY / "docs" / "serve.md"
LEVELS = {"a.png": 30, "b.png": 220}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server for a model that tells dark images from light ones."""
    model = brightness_model(tmp_path_factory.mktemp("served") / "bright")
    with running_service(str(model.model_path), "--port", "0", "--top", "2") as (url, _):
        yield url


def ask(
    url: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, Any]:
    """Send a request to `/predict`; return status and JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        path = urlsplit(url).path or "/predict"
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def send_raw(url: str, content: bytes, *, wait: bool = True) -> bytes:
    """Send bytes to a server and return what it answers before it closes the connection."""
    host, port = urlsplit(url).netloc.split(":")
    received = b""
    connection = socket.create_connection((host, int(port)), timeout=30)
    # The server may reset the connection before it has read everything.
    with connection, contextlib.suppress(OSError):
        connection.sendall(content)
        if wait:
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                received += part
    return received


def is_alive(url: str) -> bool:
    return ask(url, png(30))[0] == 200


# Answers


@pytest.mark.parametrize("kind", ["run", "onnx"])
def test_answers_are_those_of_predict(kind: str, tmp_path: Path) -> None:
    assert here("train", *DIGITS, "--no-test", "--name", "small").code == 0
    model = "small"
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        (exported,) = model_export.export("small")
        model = exported.path
    files = {f"{level}.png": png(level) for level in (0, 90, 255)}
    for name, content in files.items():
        Path(name).write_bytes(content)
    Path("text.png").write_text("text")
    files["text.png"] = b"text"
    expected = here("predict", model, *files, "--json", "--top", "3").json["predictions"]
    opened = open_service(model, top_k=3, device="cpu")
    with opened.batcher, TestClient(make_service_app(opened, Access(""))) as client:
        client.base_url = "http://127.0.0.1"  # type: ignore[assignment]
        several = client.post("/predict", files=[("x", (name, c)) for name, c in files.items()])
        single = client.post("/predict", content=files["90.png"])
    assert several.status_code == single.status_code == 200
    answers = several.json()["predictions"]
    assert [list(each) for each in answers] == [list(each) for each in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert answer["filename"] == other["filename"]
        if "error" in other:
            assert answer["error"] == other["error"]
            continue
        assert answer["label"] == other["label"]
        assert answer["prob"] == pytest.approx(other["prob"], abs=1e-6)
        assert [each["label"] for each in answer["top"]] == [e["label"] for e in other["top"]]
        for each, of_other in zip(answer["top"], other["top"], strict=True):
            assert each["prob"] == pytest.approx(of_other["prob"], abs=1e-6)
    (alone,) = single.json()["predictions"]
    assert alone["filename"] == "-"
    assert alone["prob"] == pytest.approx(answers[1]["prob"], abs=1e-6)


def test_content_type_of_an_image_does_not_matter(service: str) -> None:
    for content_type in ("image/jpeg", "text/plain", "application/x-www-form-urlencoded", "x"):
        status, answer = ask(service, png(220), {"content-type": content_type})
        assert (status, answer["predictions"][0]["label"]) == (200, "light")


def test_body_that_is_not_an_image_is_refused_with_the_reason(service: str) -> None:
    for body, reason in (
        (b"", "empty"),
        (b"hello", "it is text, not an image"),
        (b"<html>", "a web page"),
        (b'{"image": 1}', "it is text"),
        (png(30)[:-30], "cut short"),
        (bytes(range(256)), "not an image"),
    ):
        status, answer = ask(service, body)
        assert status == 415
        assert reason in answer["error"]


def test_of_several_images_each_has_its_own_error(service: str) -> None:
    body, content_type = multipart([("<b>.png", b"hello"), ("ünï.png", png(220))])
    status, answer = ask(service, body, {"content-type": content_type})
    assert status == 200
    first, second = answer["predictions"]
    assert first == {"filename": "<b>.png", "error": "it is text, not an image"}
    assert (second["filename"], second["label"]) == ("ünï.png", "light")


def test_a_hundred_requests_at_once_are_answered(service: str) -> None:
    levels = [30 if n % 3 else 220 for n in range(100)]

    def label(level: int) -> str:
        status, answer = ask(service, png(level))
        assert status == 200, answer
        return str(answer["predictions"][0]["label"])

    with ThreadPoolExecutor(100) as pool:
        labels = list(pool.map(label, levels))
    assert labels == ["dark" if level == 30 else "light" for level in levels]


def test_description_is_valid_openapi(service: str) -> None:
    status, description = ask(f"{service}/openapi.json", method="GET")
    assert status == 200
    assert description["openapi"].startswith("3.1")
    validate(description)
    assert set(description["paths"]) == {"/predict", "/healthz"}


# Hostile requests


def bomb() -> bytes:
    """Return a small PNG of 36 million black pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", 6000, 6000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(6001 * 6000), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_decompression_bombs_are_refused(service: str) -> None:
    status, answer = ask(service, bomb())
    assert status == 415
    assert "more than 33 million pixels are refused (6000 x 6000)" in answer["error"]
    status, answer = ask(service, gzip.compress(png(30)), {"content-encoding": "gzip"})
    assert status == 415
    assert "compressed" in answer["error"]


def test_multipart_bodies_that_are_damaged_or_too_many_are_refused(service: str) -> None:
    good, content_type = multipart([("a.png", png(30))])
    many, _ = multipart([("a.png", b"x")] * (MAX_IMAGES + 1))
    more, _ = multipart([("a.png", b"x")] * 500)
    nameless, _ = multipart([("", png(30))])
    empty, _ = multipart([])
    cases: list[tuple[bytes, str, int, str]] = [
        (good, "multipart/form-data", 400, "boundary"),
        (good, "multipart/form-data; boundary=other", 400, ""),
        (good[:40], content_type, 400, ""),
        (b"nothing", content_type, 400, ""),
        (good, f"{content_type}; charset=undefined", 400, "damaged"),
        (nameless, content_type, 400, "needs a filename"),
        (empty, content_type, 400, "no files"),
        (many, content_type, 413, "more than 64 images"),
        (more, content_type, 413, "more than 64 images"),
    ]
    for body, kind, expected, text in cases:
        status, answer = ask(service, body, {"content-type": kind})
        assert status == expected, (kind, answer)
        assert text in answer["error"]
    assert is_alive(service)


def test_bodies_without_a_length_are_accepted_up_to_the_limit(service: str) -> None:
    status, answer = ask(service, iter([png(220)[:50], png(220)[50:]]))  # sent in chunks
    assert (status, answer["predictions"][0]["label"]) == (200, "light")
    size = MAX_BODY_BYTES // 8
    status, answer = ask(service, (bytes(size) for _ in range(9)))
    assert (status, answer["error"]) == (413, "the body has more than 32 MB")


def test_requests_that_are_broken_do_not_disturb_others(service: str) -> None:
    host = urlsplit(service).netloc
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\n"
    huge = send_raw(service, f"{head}Content-Length: {10**15}\r\n\r\n".encode())
    assert huge.startswith(b"HTTP/1.1 413")
    assert send_raw(service, b"\x16\x03\x01\x02\x00garbage\r\n\r\n").startswith(b"HTTP/1.1 400")
    long = send_raw(service, f"{head}X: {'y' * 200_000}\r\n\r\n".encode())
    assert long == b"" or long.startswith(b"HTTP/1.1 4")
    # These end in the middle of the body.
    send_raw(service, f"{head}Content-Length: 1000\r\n\r\n1234".encode(), wait=False)
    send_raw(service, f"{head}Transfer-Encoding: chunked\r\n\r\nff\r\n1".encode(), wait=False)
    send_raw(service, f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode())
    assert is_alive(service)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_other_pages_cannot_use_a_local_server(
    service: str, headers: dict[str, str], status: int
) -> None:
    assert ask(service, png(30), headers)[0] == status


def test_other_paths_and_methods_are_refused(service: str) -> None:
    for path, method, status in (
        ("/predict", "GET", 405),
        ("/healthz", "POST", 405),
        ("/", "GET", 404),
        ("/../model.safetensors", "GET", 404),
    ):
        found, answer = ask(service + path, method=method)
        assert found == status
        assert set(answer) == {"error", "where", "fix"}


def test_too_much_work_is_refused_and_accepted_later(tmp_path: Path) -> None:
    service = open_service(brightness_model(tmp_path / "bright"), device="cpu")
    service.images, service.body_bytes = Room(2, "images"), Room(3000, "bytes")
    with service.batcher, TestClient(make_service_app(service, Access(""))) as client:
        client.base_url = "http://127.0.0.1"  # type: ignore[assignment]
        small = png(30, width=2, height=2)
        full = client.post("/predict", files=[("x", ("a.png", small))] * 3)
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        assert "more than 2 images are waiting" in full.json()["error"]
        large = client.post("/predict", content=bytes(4000))
        assert (large.status_code, large.headers["retry-after"]) == (503, "1")
        accepted = client.post("/predict", files=[("x", ("a.png", small))] * 2)
        assert accepted.status_code == 200
    assert (service.images.used, service.body_bytes.used) == (0, 0)


def test_slow_bodies_are_cut_off(tmp_path: Path) -> None:
    service = open_service(brightness_model(tmp_path / "bright"), device="cpu")
    app = make_service_app(service, Access(""), body_seconds=0.05)
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    parts = iter([{"type": "http.request", "body": png(30)[:20], "more_body": True}])

    async def receive() -> dict[str, Any]:
        for part in parts:
            return part
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert service.body_bytes.used == 0


# Documentation, token, end


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)


def test_clients_of_the_documentation_work(service: str, tmp_path: Path) -> None:
    for name, level in LEVELS.items():
        (tmp_path / name).write_bytes(png(level))
    programs = code_blocks("python")
    assert len(programs) == 2
    outputs = []
    for program in programs:
        text = program.replace("http://127.0.0.1:8000", service)
        assert text != program
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout.split())
    assert outputs[0][0] == "dark"
    assert outputs[1] == ["a.png", "dark", "b.png", "light"]


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_commands_of_the_documentation_work(service: str, tmp_path: Path) -> None:
    for name, level in LEVELS.items():
        (tmp_path / name).write_bytes(png(level))
    (script,) = code_blocks("bash")
    script = script.replace("http://127.0.0.1:8000", service)
    done = subprocess.run(
        ["sh", "-e", "-c", script.replace("/predict\n", "/predict; echo\n")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert [each["label"] for each in first["predictions"]] == ["dark"]
    assert [each["label"] for each in second["predictions"]] == ["dark", "light"]


def test_container_needs_the_token_and_finishes_requests_after_sigterm(tmp_path: Path) -> None:
    """Runs the command of the Dockerfile in the documentation."""
    (dockerfile,) = code_blocks("dockerfile")
    command = json.loads(re.findall(r"^CMD (.*)$", dockerfile, re.MULTILINE)[0])
    model = brightness_model(tmp_path / "bright").model_path
    arguments = [str(model) if each.startswith("/model") else each for each in command[2:]]
    arguments[arguments.index("--port") + 1] = "0"
    assert command[:2] == ["convlens", "serve"]
    token = "a-token-of-this-test"
    with running_service(*arguments, CONVLENS_TOKEN=token) as (url, process):
        port = urlsplit(url).port
        assert port is not None
        local = f"http://127.0.0.1:{port}"
        assert ask(f"{local}/healthz", method="GET") == (200, {"status": "ok"})
        for headers in ({}, {"authorization": "Bearer wrong"}):
            status, answer = ask(local, png(30), headers)
            assert status == 401
            assert "Authorization: Bearer" in answer["fix"]
        allowed = {"authorization": f"Bearer {token}", "host": "any-name:8000"}
        assert ask(local, png(30), allowed)[0] == 200

        content, half = png(220), 60
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(
                f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
                f"Content-Length: {len(content)}\r\n\r\n".encode()
                + content[:half]
            )
            ask(f"{local}/healthz", method="GET")  # the server has read what was sent before
            process.send_signal(signal.SIGTERM)
            wait_until_refused(port)
            connection.sendall(content[half:])
            answer = b""
            while part := connection.recv(1 << 16):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"label":"light"' in answer
        assert process.wait(timeout=60) == 0


def test_wrong_tokens_are_refused_on_every_route() -> None:
    token = "a-token-of-this-test"
    nothing: Any = None
    app = make_service_app(nothing, Access(token, bearer_only=True, open_paths=OPEN_PATHS))
    ids = {"token": token, "token-prefix": token[:-1], "cookie": "convlens", "host": "127.0.0.1"}

    def filled(text: str) -> str:
        return re.sub(r"{([a-z-]+)}", lambda match: ids[match[1]], text)

    client = TestClient(app, raise_server_exceptions=False)
    count = 0
    for case in wrong_tokens(routes_of(app)):
        headers = {name: filled(value) for name, value in case.headers.items() if value is not None}
        answer = client.request(case.method, filled(case.target), headers=headers)
        is_open = case.target.partition("?")[0] in OPEN_PATHS
        assert answer.status_code == (200 if is_open else 401), case.name
        count += not is_open
    assert count > 100


def wait_until_refused(port: int) -> None:
    """Wait until a server accepts no connections any more."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    raise AssertionError("the server still accepts connections")

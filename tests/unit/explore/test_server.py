from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from starlette.applications import Starlette

from convlens.errors import ConvlensError, UsageError
from convlens.explore.security import Access, Limits
from convlens.explore.server import (
    PARTS,
    ExploreServer,
    check_host,
    make_app,
    run_server,
    server_config,
)
from helpers.commands import environment
from helpers.exploring import TOKEN, Page, running_page
from helpers.hostile_clients import read_reply


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_has_a_page_whose_files_are_served(page: Page, part: object) -> None:
    name = part.name  # type: ignore[attr-defined]
    html = page.client.get(f"/{name}").text
    assert "small" in html
    files = re.findall(r'(?:src|href)="(/static/[^"]+)"', html)
    assert f"/static/{name}.js" in files
    for file in files:
        answer = page.client.get(file)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(("text/css", "text/javascript"))
    # The policy would block them.
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", html)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static//etc/passwd",
        "/static/page.html",
        "/static/",
        "/api/jobs/x",
        "/models/small/model.safetensors",
    ],
)
def test_other_files_and_unknown_ids_are_not_found(page: Page, path: str) -> None:
    answer = page.client.get(path)
    assert answer.status_code == 404
    assert set(answer.json()) == {"error", "where", "fix"}


def test_jobs_show_progress_results_and_errors(page: Page) -> None:
    def fail(job: object) -> None:
        raise UsageError("not possible", fix="do something else")

    queue = page.workspace.jobs.long
    assert page.result(queue.submit(lambda job: {"n": 3}).id) == {"n": 3}
    failed = queue.submit(fail, title="trying")
    queue.wait_until_idle(20)
    state = page.get(f"/api/jobs/{failed.id}")
    assert (state["state"], state["error"]) == ("failed", "not possible")
    assert (state["fix"], state["title"]) == ("do something else", "trying")
    cancelled = page.client.delete(
        f"/api/jobs/{failed.id}", headers={"origin": str(page.client.base_url)}
    )
    assert cancelled.status_code == 200


def test_host_that_others_can_reach_must_be_asked_for() -> None:
    check_host("127.0.0.1", False, None)
    for host, allowed, token in (
        ("0.0.0.0", False, "long enough token"),
        ("0.0.0.0", True, None),
        ("192.168.0.1", True, "short"),
    ):
        with pytest.raises(ConvlensError):
            check_host(host, allowed, token)
    check_host("0.0.0.0", True, "long enough token")


def test_importing_the_server_does_not_import_torch() -> None:
    code = "import sys, convlens.explore.server; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.strip() == "False"


def test_command_prints_its_url_and_ends_with_ctrl_c(
    explored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(explored)
    with running_page("small") as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S{16,}", url)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(url) as answer:
            assert answer.url.endswith("/try")
            assert "token" not in answer.url
        base = url.partition("?")[0]
        with opener.open(f"{base}api/runs") as answer:
            assert json.load(answer) == {"runs": ["small"]}


@contextlib.contextmanager
def listening_server(app: Starlette) -> Iterator[tuple[str, int]]:
    """Run an app in a thread on a real socket; yields its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = ExploreServer(server_config(app))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            server.handle_exit(signal.SIGINT, None)
            thread.join(20)
            assert not thread.is_alive()


def ask_by_socket(address: tuple[str, int], sent: bytes) -> bytes:
    """Send bytes and return the start of the answer; nothing if the connection is closed."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(sent)
        return connection.recv(4096)


def test_hostile_bytes_and_slow_clients_are_cut_off_and_the_server_lives(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convlens.explore.server.HEADER_SECONDS", 0.3)
    limits = Limits(body_seconds=0.3)
    app = make_app(page.workspace, Access(TOKEN, cookie="c"), limits)
    host = b"Host: localhost\r\n"
    cookie = b"Cookie: c=" + TOKEN.encode() + b"\r\nOrigin: http://localhost\r\n"
    with listening_server(app) as address:
        assert ask_by_socket(address, b"") == b""  # says nothing
        assert ask_by_socket(address, b"GET / HTTP/1.1\r\nHost: loc") == b""  # never ends
        slow = (
            b"POST /api/try/images HTTP/1.1\r\n" + host + cookie + b"Content-Length: 9\r\n\r\nabc"
        )
        assert ask_by_socket(address, slow).startswith(b"HTTP/1.1 408 ")
        for hostile, status in (
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b"400"),
            (b"GET / HTTP/9.9\r\n" + host + b"\r\n", b"401"),
            (b"GET / HTTP/1.1\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\n" + host + b"A: \x00\r\n\r\n", b"400"),
            (b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"421"),
            (b"GET / HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", b"401"),
            (b"TRACE / HTTP/1.1\r\n" + host + cookie + b"Connection: close\r\n\r\n", b"405"),
            (
                b"POST / HTTP/1.1\r\n" + host + cookie + b"Content-Length: -1\r\n\r\n",
                b"400",
            ),
            (
                b"GET /api/try/run HTTP/1.1\r\n"
                + host
                + cookie
                + b"Upgrade: websocket\r\nConnection: close, Upgrade\r\n\r\n",
                b"405",
            ),
        ):
            answer = ask_by_socket(address, hostile)
            assert answer.startswith(b"HTTP/1.1 " + status), (hostile[:60], answer[:200])
            assert b"Traceback" not in answer
        good = b"GET /try HTTP/1.1\r\n" + host + cookie + b"Connection: close\r\n\r\n"
        assert ask_by_socket(address, good).startswith(b"HTTP/1.1 200 ")


def test_a_connection_has_as_little_time_for_its_second_request(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convlens.explore.server.HEADER_SECONDS", 0.3)
    app = make_app(page.workspace, Access(TOKEN, cookie="c"))
    refused = b"POST /try HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 999\r\n\r\n"
    asked = b"GET /try HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with listening_server(app) as address:
        for begin, status in ((asked + asked[:-2], 401), (refused, 421)):
            with socket.create_connection(address, timeout=20) as connection:
                connection.sendall(begin)
                assert read_reply(connection).status == status
                # Each byte would start the limit of uvicorn again.
                with contextlib.suppress(ConnectionError):
                    while True:
                        connection.sendall(b"X: y\r\n")
                        connection.settimeout(0.05)
                        with contextlib.suppress(TimeoutError):
                            assert connection.recv(1) == b""
                            break


def test_bytes_that_are_not_http_after_an_answer_close_the_connection(
    page: Page, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(page.workspace, Access(TOKEN, cookie="c"))
    head = b"POST /try HTTP/1.1\r\nHost: evil.example\r\nTransfer-Encoding: chunked\r\n\r\n"
    with (
        listening_server(app) as address,
        socket.create_connection(address, timeout=20) as connection,
    ):
        connection.sendall(head)
        assert read_reply(connection).status == 421
        connection.sendall(b"not a size\r\n")
        assert connection.recv(1) == b""
    assert caplog.records == []  # asyncio would log that the protocol has failed


def test_connections_above_the_limit_are_closed(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convlens.explore.server.MAX_CONNECTIONS", 2)
    app = make_app(page.workspace, Access(TOKEN, cookie="c"))
    ask = b"GET /try HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with listening_server(app) as address:
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(socket.create_connection(address, timeout=20))
            with contextlib.suppress(ConnectionError):  # a reset
                assert ask_by_socket(address, ask) == b""
        while (answer := ask_by_socket(address, ask)).startswith(b"HTTP/1.1 503"):
            pass  # the others are being closed
        assert answer.startswith(b"HTTP/1.1 401")


def test_server_runs_beside_the_event_loop_of_a_notebook(page: Page) -> None:
    app = make_app(page.workspace, Access(TOKEN, cookie="c"))

    async def cell() -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            address = listening.getsockname()
            stop = threading.Timer(0.5, lambda: app.state.server.handle_exit(signal.SIGINT, None))
            stop.start()
            run_server(app, listening)
            stop.join()
            assert app.state.stopping.is_set()
            assert address

    asyncio.run(cell())


def test_color_scales_of_the_page_are_those_of_the_figures() -> None:
    from convlens.plots import attributions, style

    script = (resources.files("convlens.explore") / "static" / "colors.js").read_text()
    scales = dict(re.findall(r'(\w+): "([0-9a-f]+)"', script))
    used = {style.SEQUENTIAL, style.DIVERGING}
    used |= {attributions.UNSIGNED_COLORMAP, attributions.SIGNED_COLORMAP}
    assert scales.keys() == used
    for name, stops in scales.items():
        colors = matplotlib.colormaps[name](np.linspace(0, 1, 17))[:, :3]
        assert bytes.fromhex(stops) == (colors * 255).round().astype(np.uint8).tobytes()

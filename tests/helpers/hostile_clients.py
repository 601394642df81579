"""A server in a process of its own, and clients of it that are free to misbehave."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.commands import start
from helpers.hostile_requests import Case

WAIT_SECONDS = 120.0  # for what needs 30 at most on a quiet machine
DRIP_SECONDS = 0.25


@dataclass
class Reply:
    """An answer; the status is 0 if the connection was closed without one."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def read_reply(connection: socket.socket, method: str = "POST") -> Reply:
    """Read one answer; what follows it stays in the connection."""
    response = http.client.HTTPResponse(_Unbuffered(connection), method=method)  # type: ignore[arg-type]
    try:
        response.begin()
        return Reply(response.status, response.headers, response.read())
    except ConnectionError:
        return Reply()
    finally:
        response.close()


class _Unbuffered:
    """A socket whose file reads no more than it is asked for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def makefile(self, mode: str) -> Any:
        return self._connection.makefile(mode, buffering=0)


class Server:
    """A process of a command that serves the current folder, and a client of it.

    Attributes:
        ids: values for names in braces of a `Case`.
        errors: the lines that the process has printed on stderr.
    """

    def __init__(self, kind: str, *arguments: str) -> None:
        self.kind = kind
        self.errors: list[str] = []
        self.usage_at_start: dict[str, int] = {}
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
        for line in self.process.stderr:
            self.errors.append(line)

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

    def usage(self, name: str) -> int:
        """Return `VmRSS` (KiB) or `Threads` of the process."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[0])

    def remember_usage(self) -> None:
        self.usage_at_start = {name: self.usage(name) for name in ("VmRSS", "Threads")}


@dataclass
class SlowClient:
    """A connection that sends its beginning, and then little or nothing.

    Attributes:
        begin: the bytes that are sent at once.
        expected: how the answer must begin; empty if there must be none.
        drip: what is sent again and again, slowly.
        reads: whether it reads what it gets.
    """

    begin: bytes
    expected: bytes = b""
    drip: bytes = b""
    reads: bool = True
    received: bytes = b""
    is_closed: bool = False

    def connect(self, address: tuple[str, int]) -> None:
        self.connection = socket.socket()
        if not self.reads:  # its buffers are full soon
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connection.settimeout(WAIT_SECONDS)
        self.connection.connect(address)
        self.connection.sendall(self.begin)
        self.connection.setblocking(False)

    def step(self) -> None:
        """Read what has arrived and send a little more."""
        try:
            if self.reads:
                with contextlib.suppress(BlockingIOError):
                    part = self.connection.recv(1 << 16)
                    self.received += part
                    self.is_closed = not part
            if self.drip:
                with contextlib.suppress(BlockingIOError):
                    self.connection.send(self.drip)
        except OSError:  # a reset
            self.is_closed = True


def slow_clients(server: Server) -> dict[str, SlowClient]:
    """Return slow clients of every kind, by name."""

    def request(method: str, target: str, **headers: str | None) -> bytes:
        changes = {"Connection": None, **headers}
        return Case("slow", 200, method, target, changes).content(server.ids)

    body, page, large = (
        ("/predict", "/healthz", "/openapi.json")
        if server.kind == "serve"
        else ("/api/try/images", "/try", "/static/explore.css")
    )
    ok, timeout, other_host = b"HTTP/1.1 200", b"HTTP/1.1 408", b"HTTP/1.1 421"
    get = request("GET", page)
    chunked = request("POST", body, **{"Content-Length": None, "Transfer-Encoding": "chunked"})
    post = request("POST", body, **{"Content-Length": "1000000"})
    refused = request("POST", body, Host="evil.example", Origin=None, **{"Content-Length": "9999"})
    expecting = request("POST", body, **{"Content-Length": "9", "Expect": "100-continue"})
    return {
        "says nothing": SlowClient(b""),
        "request line": SlowClient(b"GET /", drip=b"a"),
        "header": SlowClient(get[:-2], drip=b"X: y\r\n"),
        "empty lines": SlowClient(b"", b"HTTP/1.1 400", b"\r\n"),
        "idle after an answer": SlowClient(get, ok),
        "header of the second request": SlowClient(get + get[:-2], ok, b"X: y\r\n"),
        "empty lines after an answer": SlowClient(get, ok, b"\r\n"),
        "body": SlowClient(post, timeout, b"y"),
        "body that does not come": SlowClient(post + b"abc", timeout),
        "body after 100 Continue": SlowClient(expecting, b"HTTP/1.1 100"),
        "chunks": SlowClient(chunked, timeout, b"1\r\ny\r\n"),
        "extension of a chunk": SlowClient(chunked + b"5;", timeout, b"y"),
        "body after a refusal": SlowClient(refused, other_host, b"y"),
        "body of the second request": SlowClient(get + post, ok, b"y"),
        "does not read": SlowClient(request("GET", large) * 4000, drip=b"y", reads=False),
    }


class SlowClients:
    """Slow clients of a server that a thread keeps busy. A context manager."""

    def __init__(self, server: Server) -> None:
        self._clients = slow_clients(server)
        self._address = server.address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._drip, daemon=True)

    def __enter__(self) -> SlowClients:
        for client in self._clients.values():
            client.connect(self._address)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for client in self._clients.values():
            client.connection.close()

    def _open(self) -> Iterator[SlowClient]:
        return (client for client in self._clients.values() if not client.is_closed)

    def _drip(self) -> None:
        while not self._stop.wait(DRIP_SECONDS) and any(self._open()):
            for client in self._open():
                client.step()

    def problems(self) -> dict[str, str]:
        """Wait until the server has closed all connections; return what was wrong."""
        self._thread.join(WAIT_SECONDS)
        found = {}
        for name, client in self._clients.items():
            if not client.is_closed:
                found[name] = "is still connected"
            elif client.reads and client.received[: len(client.expected) or 1] != client.expected:
                found[name] = f"received {client.received[:200]!r}"
        return found

"""A client of `convlens explore` without a network, and one that runs in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.testclient import TestClient

from convlens.explore.jobs import started_jobs
from convlens.explore.security import Access, Limits
from convlens.explore.server import make_app
from convlens.explore.workspace import Workspace
from helpers.commands import start

TOKEN = "token-of-the-tests"
URL = "http://localhost:8000"


class Page:
    """The server as a page of it sees it: with the cookie and the right origin."""

    def __init__(self, client: TestClient, workspace: Workspace) -> None:
        self.client = client
        self.workspace = workspace

    def get(self, path: str, **options: Any) -> Any:
        """Return the JSON of a successful request."""
        return self._content(self.client.get(path, **options))

    def post(self, path: str, body: Any = None, content: bytes | None = None) -> Any:
        """Send JSON, or bytes, and return the JSON of the answer to a successful request."""
        return self._content(self.send(path, body, content))

    def send(self, path: str, body: Any = None, content: bytes | None = None) -> Any:
        """Send JSON, or bytes, and return the response."""
        if content is not None:
            return self.client.post(path, content=content, headers={"origin": URL})
        return self.client.post(path, json=body, headers={"origin": URL})

    def result(self, job: str, seconds: float = 60) -> Any:
        """Wait for long work and return its result."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = self.get(f"/api/jobs/{job}")
            if state["state"] not in ("waiting", "running"):
                assert state["state"] == "done", state
                return state["result"]
            time.sleep(0.01)
        raise AssertionError(f"job {job} did not end")

    @staticmethod
    def _content(response: Any) -> Any:
        assert response.status_code == 200, response.text
        return response.json()


@contextlib.contextmanager
def open_page(
    runs: Sequence[str] = (), limits: Limits | None = None, data: Sequence[str] = ()
) -> Iterator[Page]:
    """Start a server for runs of the current directory and log in."""
    with started_jobs() as jobs:
        workspace = Workspace(runs, jobs, device="cpu", data=data)
        app = make_app(workspace, Access(TOKEN), limits)
        with TestClient(app, base_url=URL, follow_redirects=False) as client:
            assert client.get(f"/?token={TOKEN}").status_code == 303
            yield Page(client, workspace)


@contextlib.contextmanager
def running_page(*arguments: str) -> Iterator[str]:
    """Run `convlens explore --no-open ARGUMENTS` and yield the URL that it prints."""
    process = start("explore", "--no-open", *arguments)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors, errors
    finally:
        process.kill()
        process.wait()

"""convlens commands in processes of their own: long work that must not slow the server down."""

from __future__ import annotations

import contextlib
import queue
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from convlens import user_code
from convlens.errors import ResourceError
from convlens.explore.jobs import Job

LINES_KEPT = 12
POLL_SECONDS = 0.2
STOP_SECONDS = 20.0  # for a training to save its state
_RUN = re.compile(r", (\d+) of (\d+)$")
_EPOCH = re.compile(r"^epoch +(\d+)/(\d+)")


def command_line(arguments: Sequence[str]) -> str:
    """Return the command as one types it."""
    return shlex.join(["convlens", *arguments])


def _start(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "convlens", *arguments, *trust_option()],
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        **options,
    )


def trust_option() -> list[str]:
    """Return the option with which a command may import the user code that this page may."""
    return ["--trust-code"] if user_code.trusted() is True else []


def run_command(job: Job, arguments: Sequence[str]) -> None:
    """Run a command that trains several models, with its progress; cancelling the job stops it.

    Raises:
        ResourceError: it failed.
        JobCancelled: the job was cancelled. Finished models stay.
    """
    process = _start(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_lines, args=(process.stderr, lines), daemon=True)
    reader.start()
    progress = TrainingProgress()
    try:
        while reader.is_alive() or not lines.empty():
            with contextlib.suppress(queue.Empty):
                progress.read(lines.get(timeout=POLL_SECONDS))
            job.progress(progress.text, progress.done, progress.total)
        if process.wait() != 0:
            raise ResourceError(
                progress.error or f"the command ended with the status {process.returncode}",
                fix=f"run it in a terminal: {command_line(arguments)}",
            )
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(POLL_SECONDS)
        process.stderr.close()


def _read_lines(stream: IO[str], lines: queue.SimpleQueue[str]) -> None:
    with contextlib.suppress(ValueError):  # closed
        for line in stream:
            lines.put(line.rstrip())


@dataclass
class TrainingProgress:
    """How far a command is that trains one model after the other, by what it prints."""

    text: str = "starting"
    done: int = 0
    total: int = 0
    error: str = ""
    _runs_done: int = 0
    _runs: int = 1

    def read(self, line: str) -> None:
        if not line.strip():
            return
        self.text = line[:200]
        if line.startswith("error:"):
            self.error = line.removeprefix("error:").strip()
        if match := _RUN.search(line):
            self._runs_done, self._runs = int(match[1]) - 1, int(match[2])
        if match := _EPOCH.match(line):
            epoch, epochs = int(match[1]), int(match[2])
            self.done, self.total = self._runs_done * epochs + epoch, self._runs * epochs


@dataclass
class Background:
    """A training that goes on when the page and its server end."""

    arguments: list[str]
    log: Path
    id: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    _process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self._process = _start(
                self.arguments, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def to_dict(self) -> dict[str, Any]:
        """Return its state and the last lines that it has printed."""
        assert self._process is not None
        code = self._process.poll()
        state = "running" if code is None else "done" if code == 0 else "failed"
        with self.log.open(errors="replace") as log:
            lines = [line.rstrip() for line in deque(log, LINES_KEPT)]
        return {"id": self.id, "state": state, "lines": lines}

"""Start commands and scripts under `torchrun` on this machine, and wait for processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers.commands import Done, environment

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
# Far longer than anything takes on a busy machine: whatever exceeds it hangs.
HANG_TIMEOUT_S = 300.0


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until the condition holds; fail if `process` ends before that."""
    deadline = time.monotonic() + HANG_TIMEOUT_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


def launch(
    count: int, *arguments: str | Path, launcher: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start `count` processes of `arguments` (`-m convlens ...`, or a script)."""
    line = [*(launcher or (*LAUNCH, str(count))), *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, *line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def ended(process: subprocess.Popen[str], timeout: float = HANG_TIMEOUT_S) -> Done:
    """Wait for all processes; a hang fails the test and leaves no process behind."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its own processes
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"it hangs; stderr:\n{err}") from None
    return Done(process.returncode, out, err)


def torchrun(count: int, *arguments: str | Path) -> Done:
    """Run `count` processes of `arguments` to their end."""
    return ended(launch(count, *arguments))

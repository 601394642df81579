"""Commands and scripts under `torchrun`, on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.commands import Done, environment

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def launch(count: int, *arguments: str | Path, how: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Begins `count` processes of `arguments` (`-m convlens ...`, or a script)."""
    line = [*(how or (*LAUNCH, str(count))), *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, *line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def ended(process: subprocess.Popen[str], timeout: float = 600) -> Done:
    """Waits for all of them; a hang fails the test and leaves no process behind."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its own
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"it hung; said:\n{err}") from None
    return Done(process.returncode, out, err)


def torchrun(count: int, *arguments: str | Path) -> Done:
    """Runs `count` processes of `arguments` to their end."""
    return ended(launch(count, *arguments))

"""Start commands and scripts under `torchrun` on this machine, and wait for processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers.commands import Done, environment

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
# Far longer than anything takes on a busy machine: whatever exceeds it hangs.
HANG_TIMEOUT_S = 300.0

FORK_SERVER = multiprocessing.get_context("forkserver")
# torch imports `torch._dynamo` in the first step of several processes, which takes seconds.
FORK_SERVER.set_forkserver_preload(
    ["convlens.data.cache", "convlens.engine.data_parallel", "convlens.run", "torch._dynamo"]
)
_numbers = itertools.count()


class Forked:
    """Run `python -c CODE ARGUMENTS` in a process forked from one that has imported torch.

    It starts in milliseconds instead of seconds; for tests that need several processes, whatever
    started them. Has the methods of `subprocess.Popen` that the tests use. stdout and stderr go to
    one file.
    """

    def __init__(self, code: str, *arguments: str, **variables: object) -> None:
        self.log = Path(f"forked-{next(_numbers)}.txt").absolute()
        self.log.touch()
        variables = environment(**{name: str(value) for name, value in variables.items()})
        self._process = FORK_SERVER.Process(
            target=_execute, args=(code, arguments, variables, Path.cwd(), self.log)
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = HANG_TIMEOUT_S) -> tuple[str, str]:
        """Wait for the end; return what was printed, twice, since stderr is not separate."""
        self._process.join(timeout)
        printed = self.log.read_text()
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"it hangs; it printed:\n{printed}")
        return printed, printed


def _execute(
    code: str, arguments: tuple[str, ...], variables: dict[str, str], folder: Path, log: Path
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | Forked) -> None:
    """Wait until the condition holds; fail if `process` ends before that."""
    deadline = time.monotonic() + HANG_TIMEOUT_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


def rank_variables(rank: int, size: int, port: int) -> dict[str, object]:
    """Return the variables that torchrun sets for a process; `port` is that of its store."""
    return {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }


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

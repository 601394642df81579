"""Ctrl-C, SIGTERM and the like: a flag between two steps of a training, an exception elsewhere.

A training is asked by a flag that it looks at between two steps: saving inside a signal handler
can meet half an update. A second signal ends the process at once (files are written atomically,
so nothing is corrupted); of several processes not, since `torchrun` sends its own when one of
them has ended, and the first may still be saving. (It kills what is left after half a minute.)

All else (decoding, downloading, testing) has nothing to save, and is left by `Terminated`, as by
KeyboardInterrupt: temporary files are deleted on the way.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import gc
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

# SIGHUP is a closed terminal; SIGUSR1 is what schedulers are often told to send first.
STOPPING = ("SIGTERM", "SIGHUP", "SIGUSR1")


class Terminated(BaseException):
    """One of `STOPPING` outside the steps of a training; like KeyboardInterrupt no `Exception`."""


Handlers = dict[signal.Signals, Any]


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Turns the first signal of `STOPPING` in the main thread into `Terminated`; the next kills."""

    def leave(number: signal.Signals, before: Handlers) -> None:
        _set(dict.fromkeys(before, signal.SIG_DFL))
        raise Terminated(number.name)

    with _handle_signals(STOPPING, leave):
        yield


@dataclass
class StopSignal:
    """Whether a signal has arrived, and its name. `interrupted` is true for Ctrl-C."""

    is_set: bool = False
    name: str = ""

    @property
    def interrupted(self) -> bool:
        return self.name == "SIGINT"


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopSignal]:
    """Catches SIGINT and `STOPPING` in the main thread; elsewhere the flag never goes up."""
    flag = StopSignal()

    def raise_flag(number: signal.Signals, before: Handlers) -> None:
        flag.is_set, flag.name = True, number.name
        if world_size() == 1:
            _set(before)

    with _handle_signals(("SIGINT", *STOPPING), raise_flag):
        yield flag


@contextlib.contextmanager
def _handle_signals(
    names: Sequence[str], act: Callable[[signal.Signals, Handlers], None]
) -> Iterator[None]:
    """Inside, in the main thread, a signal of these names calls `act`, with the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _handlers(names)

    def handle(number: int, frame: FrameType | None) -> None:
        act(signal.Signals(number), before)

    _set(dict.fromkeys(before, handle))
    try:
        yield
    finally:
        _set(before)


def _handlers(names: Sequence[str]) -> Handlers:
    """The present handlers of those signals that exist (Windows has fewer) and may be caught.

    Ignored signals stay ignored: that is what `nohup` asks for. A handler that was not installed
    from Python is None here; it could not be restored.
    """
    numbers = [each for each in signal.Signals if each.name in names]
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {number: held for number, held in handlers.items() if held not in (None, signal.SIG_IGN)}


def _set(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- ranks ----------------------------------------
# Rank and size of this process in the environment that `torchrun` sets. Does not import torch.
#
# A job counts as distributed only if all variables are set that `torchrun` sets: a WORLD_SIZE that a
# container happens to define must not make a training wait for other processes.

TORCHRUN_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def world_size() -> int:
    """Return the number of processes that train together, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if all(map(os.environ.get, TORCHRUN_VARIABLES)) else 1


def global_rank() -> int:
    """Return the rank of this process. Rank 0 alone writes and prints."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def local_rank() -> int:
    """Return the rank of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def restarted() -> bool:
    """Return whether this machine's torchrun has restarted its processes (`--max-restarts`)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def first_exit_code(exit_code: int) -> int | None:
    """Record that this process fails; return the exit code of an earlier failure on this machine.

    Returns None to the first process that fails, which prints its error; the others exit with its
    code. One error would otherwise be printed by every process, and the processes that lose a peer
    would hide why it ended. The record is a file in the folder of torchrun's error files, which is
    created for each restart. Without these, every process counts as the first.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return None
    record = Path(error_file).parent.parent / "convlens_exit_code"
    try:
        with record.open("x") as file:
            file.write(str(exit_code))
    except FileExistsError:
        return int(record.read_text() or exit_code)  # empty: the other one is about to write it
    except OSError:
        pass  # a full disk: printed twice is better than not at all
    return None


def threads_chosen() -> bool:
    """Return whether the user set OMP_NUM_THREADS.

    `torchrun` sets it to 1 if it is not set. On Linux the environment of torchrun itself says
    what the user set; elsewhere a value of 1 is assumed to be torchrun's.
    """
    if world_size() == 1:
        return "OMP_NUM_THREADS" in os.environ
    try:
        of_torchrun = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ.get("OMP_NUM_THREADS", "1") != "1"
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in of_torchrun)


# ---- process ----------------------------------------
# Settings of the whole process, for processes of convlens's own. No torch.
#
# The command line, the tests and the benchmarks apply them. The Python API does not: a program that
# imports a library keeps its environment, its memory allocator and its garbage collector as they are.

# Turns for which a thread of libgomp spins at a barrier before it sleeps. By default it is billions
# where there are at least as many cores as threads; but when another program takes one of the
# cores, the thread on the other core spins until its partner runs again. Measured on 2 cores with 2
# threads (torch 2.15, a small CNN, images/s, default against 1000): nothing else running 209-313
# against 210-256, within the noise of these rounds; one competing process of normal priority 95-106
# against 145-168; several background processes 35-44 against 161-192. 20,000 and
# OMP_WAIT_POLICY=PASSIVE help less with one competitor (107-144, 139-154).
SPIN_COUNT = "1000"

# cuBLAS is deterministic only with a fixed workspace (https://docs.nvidia.com/cuda/cublas, "Results
# reproducibility"). The variable is read once, when the first handle is made, which may be before
# the recipe is known. It costs about 24 MiB; on Hopper nothing, where torch takes as much anyway.
CUBLAS_WORKSPACE = ":4096:8"


def set_environment() -> None:
    """Set what libraries read from the environment when they are loaded; the user's values win.

    To be called before torch is imported, and effective in child processes, too.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next step instead of returning it to the system.

    By default every tensor above 128 KB to 32 MB is mapped and unmapped again, and each of its
    pages faulted in again, in every step: a hundred times the page faults, and up to a quarter of
    a small network's time on a CPU (BENCHMARKS.md). Returns False on other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    options = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 * 2**20))
    return all(mallopt(option, value) == 1 for option, value in options)


def set_up() -> None:
    """Set up a process of the command line, before it imports anything heavy."""
    set_environment()
    keep_freed_memory()
    # Importing torch makes a million objects that stay: searching them for garbage again and again
    # is a twentieth of the time that it takes.
    gc.set_threshold(50_000)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be anything
        faulthandler.enable()  # a crash in C code prints where it was

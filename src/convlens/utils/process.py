"""Signals, the ranks that torchrun assigns, and settings of a whole process. Imports no torch.

Only the command line, the tests and the benchmarks change settings of the process (`set_up`). The
Python API does not: a program that imports a library keeps its environment, its memory allocator
and its garbage collector as they are.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

# SIGHUP: the terminal was closed. SIGUSR1: many schedulers can be set to send it first.
STOP_SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1")

# torchrun sets all of these. A job counts as distributed only if every one is set: a WORLD_SIZE
# that a container happens to define must not make a training wait for other processes.
TORCHRUN_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

# Iterations for which a thread of libgomp spins at a barrier before it sleeps. By default it is
# billions where there are at least as many cores as threads; but when another program occupies one
# of the cores, the thread on the other core spins until its partner runs again. Measured on 2 cores
# with 2 threads (torch 2.15, a small CNN, images/s, default against 1000): nothing else running
# 209-313 against 210-256, within the noise of these rounds; one competing process of normal
# priority 95-106 against 145-168; several background processes 35-44 against 161-192. 20,000 and
# OMP_WAIT_POLICY=PASSIVE help less with one competitor (107-144, 139-154).
SPIN_COUNT = "1000"

# cuBLAS is deterministic only with a fixed workspace (https://docs.nvidia.com/cuda/cublas, "Results
# reproducibility"). The variable is read once, when the first handle is created, which may be
# before the recipe is known. It costs about 24 MiB; nothing on Hopper, where torch uses as much
# anyway.
CUBLAS_WORKSPACE = ":4096:8"

GC_THRESHOLD = 50_000  # new objects before a garbage collection; Python's default is 700 to 2,000

SIGNAL_SECONDS = 0.1  # how long a signal waits for a thread pool

Handlers = dict[signal.Signals, Any]
T = TypeVar("T")
Parameters = ParamSpec("Parameters")


class Terminated(BaseException):
    """One of `STOP_SIGNALS` arrived outside a training step.

    Like KeyboardInterrupt not an `Exception`, so that `except Exception` does not swallow it.
    """


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Terminated` on the first of `STOP_SIGNALS` in the main thread; a second one kills.

    For work that has nothing to save (decoding, downloading, evaluation): temporary files are
    deleted while the exception propagates, as with KeyboardInterrupt.
    """

    def raise_terminated(number: signal.Signals, previous: Handlers) -> None:
        _install(dict.fromkeys(previous, signal.SIG_DFL))
        raise Terminated(number.name)

    with _handle_signals(STOP_SIGNALS, raise_terminated):
        yield


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Deliver SIGINT and `STOP_SIGNALS` that arrive in the block when it ends.

    An exception that a signal handler raises between two instructions of `threading` can leave a
    lock acquired, and the threads that need it never end.
    """
    received: list[signal.Signals] = []

    def record(number: signal.Signals, previous: Handlers) -> None:
        received.append(number)

    try:
        with _handle_signals(("SIGINT", *STOP_SIGNALS), record):
            yield
    finally:
        for number in received:
            signal.raise_signal(number)


def submit_task(
    pool: Executor,
    function: Callable[Parameters, T],
    *args: Parameters.args,
    **kwargs: Parameters.kwargs,
) -> Future[T]:
    """Submit a call to a thread pool; a signal is delivered afterwards (`defer_signals`)."""
    with defer_signals():
        return pool.submit(function, *args, **kwargs)


def wait_for_result(future: Future[T]) -> T:
    """Wait for a call of a thread pool; a signal is delivered within 0.1 s or after it."""
    while True:
        with defer_signals():
            if wait([future], timeout=SIGNAL_SECONDS).done:
                return future.result()


@dataclass
class StopSignal:
    """A request to stop. A training reads it between two steps.

    Attributes:
        is_set: whether a signal has arrived.
        name: the name of the signal, e.g. `SIGTERM`.
    """

    is_set: bool = False
    name: str = ""

    @property
    def interrupted(self) -> bool:
        """Whether the signal was Ctrl-C."""
        return self.name == "SIGINT"


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopSignal]:
    """Catch SIGINT and `STOP_SIGNALS` in the main thread; in other threads nothing is caught.

    A flag is used because saving inside a signal handler could meet a half-finished update. A
    second signal ends a single process at once (files are written atomically, so nothing is
    corrupted). With several processes it does not: torchrun sends signals of its own when one
    process has ended, and rank 0 may still be saving. (torchrun kills what is left after 30 s.)
    """
    stop_signal = StopSignal()

    def set_flag(number: signal.Signals, previous: Handlers) -> None:
        stop_signal.is_set, stop_signal.name = True, number.name
        if world_size() == 1:
            _install(previous)

    with _handle_signals(("SIGINT", *STOP_SIGNALS), set_flag):
        yield stop_signal


@contextlib.contextmanager
def _handle_signals(
    names: Sequence[str], callback: Callable[[signal.Signals, Handlers], None]
) -> Iterator[None]:
    """Call `callback` with each signal of these names and with the previous handlers.

    Does nothing outside the main thread, where Python cannot install handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = _current_handlers(names)

    def handle(number: int, frame: FrameType | None) -> None:
        callback(signal.Signals(number), previous)

    _install(dict.fromkeys(previous, handle))
    try:
        yield
    finally:
        _install(previous)


def _current_handlers(names: Sequence[str]) -> Handlers:
    """Return the current handlers of those signals that exist (Windows has fewer).

    Ignored signals are left out and stay ignored: that is the purpose of `nohup`. A handler that
    was not installed from Python is None; it is left out too, since it could not be restored.
    """
    numbers = [signal.Signals[name] for name in names if name in signal.Signals.__members__]
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {
        number: handler
        for number, handler in handlers.items()
        if handler not in (None, signal.SIG_IGN)
    }


def _install(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def world_size() -> int:
    """Return the number of processes that train together, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if all(map(os.environ.get, TORCHRUN_VARIABLES)) else 1


def global_rank() -> int:
    """Return the rank of this process. Only rank 0 writes and prints."""
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

    `torchrun` sets it to 1 if it is not set. On Linux the environment of torchrun itself shows
    whether the user set it; elsewhere a value of 1 is assumed to be torchrun's.
    """
    if world_size() == 1:
        return "OMP_NUM_THREADS" in os.environ
    try:
        torchrun_environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ.get("OMP_NUM_THREADS", "1") != "1"
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in torchrun_environment)


def process_age() -> float:
    """Return the seconds since this process was started; 0 on systems other than Linux."""
    started = _start_ticks(os.getpid())
    if started is None:
        return 0.0
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return max(0.0, uptime - started / os.sysconf("SC_CLK_TCK"))


def set_environment() -> None:
    """Set variables that libraries read from the environment when they are loaded.

    Values that the user has set are kept. Call this before torch is imported; child processes
    inherit the variables.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next step instead of returning it to the system.

    By default every tensor above 128 KB to 32 MB is mapped and unmapped again, and each of its
    pages is faulted in again, in every step: a hundred times the page faults, and up to a quarter
    of a small network's time on a CPU (BENCHMARKS.md). Returns False on other C libraries.
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
    # Importing torch creates a million objects that stay alive. Searching them for garbage again
    # and again takes a twentieth of the time of the import.
    gc.set_threshold(GC_THRESHOLD)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be replaced
        faulthandler.enable()  # prints a traceback when C code crashes


def identify_process(pid: int | None = None) -> dict[str, Any]:
    """Return what tells a process of this machine from every other one: host, pid and start.

    Args:
        pid: by default this process.
    """
    pid = os.getpid() if pid is None else pid
    return {"host": platform.node(), "pid": pid, "started": _start_ticks(pid)}


def is_running(identity: Mapping[str, Any]) -> bool | None:
    """Return whether a process that `identify_process` described still runs.

    None if it is one of another machine, which cannot be seen from here.
    """
    if identity.get("host") != platform.node():
        return None
    pid = identity.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        pass
    # A later process may have the same number.
    return _start_ticks(pid) == identity.get("started")


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the machine did; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # not Linux
        return None
    # The name of the program is in parentheses and may contain spaces and parentheses.
    return int(stat.rpartition(")")[2].split()[19])

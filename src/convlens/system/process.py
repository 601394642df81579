"""Settings of the whole process, for processes of convlens's own. No torch.

The command line, the tests and the benchmarks apply them. The Python API does not: a program that
imports a library keeps its environment, its memory allocator and its garbage collector as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import gc
import os
import platform

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

"""Rank and size of this process in the environment that `torchrun` sets. Does not import torch.

A job counts as distributed only if all variables are set that `torchrun` sets: a WORLD_SIZE that a
container happens to define must not make a training wait for other processes.
"""

from __future__ import annotations

import os
from pathlib import Path

TORCHRUN_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def size() -> int:
    """Return the number of processes that train together, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if all(map(os.environ.get, TORCHRUN_VARIABLES)) else 1


def rank() -> int:
    """Return the rank of this process. Rank 0 alone writes and prints."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


def local_rank() -> int:
    """Return the rank of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


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
    if size() == 1:
        return "OMP_NUM_THREADS" in os.environ
    try:
        of_torchrun = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ.get("OMP_NUM_THREADS", "1") != "1"
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in of_torchrun)

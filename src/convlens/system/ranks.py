"""Which of several processes this one is, as `torchrun` tells it in the environment. No torch.

Alone is one of one. A job counts as several processes only where all that `torchrun` sets is
there: a stray WORLD_SIZE in a container must not make a training wait for nobody.
"""

from __future__ import annotations

import os
from pathlib import Path

SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def size() -> int:
    """How many processes train together, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if all(map(os.environ.get, SET)) else 1


def rank() -> int:
    """The number of this one, from 0; the first leads: it alone writes and speaks."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


def local_rank() -> int:
    """The number of this one among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


def restarted() -> bool:
    """Whether `torchrun --max-restarts` has started this process in place of one that ended."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def threads_chosen() -> bool:
    """Whether the user set OMP_NUM_THREADS.

    `torchrun` sets it to 1 where it isn't set. What the user set is what torchrun itself was
    started with, which Linux tells; elsewhere 1 is taken for torchrun's.
    """
    if size() == 1:
        return "OMP_NUM_THREADS" in os.environ
    try:
        begun_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ.get("OMP_NUM_THREADS", "1") != "1"
    return any(each.startswith(b"OMP_NUM_THREADS=") for each in begun_with)

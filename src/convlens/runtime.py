"""Where a job runs: its device, the processes that share it, and the memory for images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from convlens.device import memory_budget, select_device
from convlens.distributed import SINGLE_PROCESS, ProcessGroup, init_process_group

T = TypeVar("T")


@dataclass(frozen=True)
class RuntimeContext:
    """The device and the processes of a job.

    Attributes:
        device: name of the device of this process, e.g. `cpu` or `cuda:1`.
        process_group: all processes of the job; a single one outside of `torchrun`.
        memory_budget: bytes of images that this process may keep on its device.
        quiet: show no progress bars.
    """

    device: str
    process_group: ProcessGroup = SINGLE_PROCESS
    memory_budget: int = 0
    quiet: bool = False

    @classmethod
    def create(cls, device: str | None = None, *, quiet: bool = False) -> RuntimeContext:
        """Join the process group and select the device.

        Args:
            device: e.g. `cpu`, `cuda:1`; by default the best one available.

        Raises:
            UsageError: the device is not available.
            ResourceError: the GPU is busy, or the other processes cannot be reached.
        """
        process_group = init_process_group()
        name = select_device(device)
        return cls(name, process_group, memory_budget(name), quiet)

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, the only one that writes files and prints messages."""
        return self.process_group.is_main_process

    def broadcast(self, fn: Callable[[], T]) -> T:
        """Run `fn` on rank 0 and broadcast its JSON-serializable result to every rank.

        Decisions that all ranks must share are made this way: no rank reads the file system by
        itself, since another rank may already have changed it.
        """
        return self.process_group.broadcast(fn)

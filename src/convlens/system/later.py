"""Numbers on their way from the device to the host, which nobody has to stand waiting for.

Reading a number off a GPU (`.item()`, `float`) waits for everything the GPU was told before, and
leaves it without work until the host has told it more. A copy into pinned memory with an event
behind it is done when that much work is done, whatever was asked for meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """The values of some 0-d tensors as they are now, as float32, to be read later.

    On devices other than CUDA they are read at once.
    """

    def __init__(self, *tensors: Tensor) -> None:
        with torch.no_grad():
            values = torch.stack([tensor.detach().float() for tensor in tensors])
        self._event: torch.cuda.Event | None = None
        if not values.is_cuda:
            self._host = values.cpu()
            return
        self._host = torch.empty(len(tensors), pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def ready(self) -> bool:
        """Whether `values` needn't wait."""
        return self._event is None or bool(self._event.query())

    def values(self) -> list[float]:
        """The numbers; waits for the work up to where they were asked for, and no longer."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._host.tolist()  # of memory of the host: asks no device
        return values


def send(tensor: Tensor, device: str) -> Tensor:
    """`tensor` on the device; a GPU isn't waited for, as it would be for memory that may move."""
    if not device.startswith("cuda") or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

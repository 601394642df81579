"""Copies between host and device that do not wait for the device.

Reading a number off a GPU (`.item()`, `float`) waits for all work queued on the GPU, and leaves
the GPU idle until the host has queued more. A copy into pinned memory, followed by an event, is
complete as soon as the work queued before it is, whatever was queued after it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncScalars:
    """Copy 0-d tensors to the host as float32 without waiting; read the values later.

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
        """Whether `values` would return without waiting."""
        return self._event is None or bool(self._event.query())

    def values(self) -> list[float]:
        """The numbers. Waits for the work queued before the copy, and for nothing after it."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._host.tolist()  # host memory: no device call
        return values


def to_device_async(tensor: Tensor, device: str) -> Tensor:
    """Move a tensor to the device; through pinned memory for CUDA, so that nothing waits."""
    if not device.startswith("cuda") or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

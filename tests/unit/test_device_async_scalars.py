"""Asynchronous copies of scalars from the device."""

from __future__ import annotations

import pytest
import torch

from convlens.device import AsyncScalars, to_device_async


def test_values_on_the_cpu_are_ready_at_once_and_do_not_change_later() -> None:
    loss, num_correct = torch.tensor(0.5, requires_grad=True), torch.tensor(7)
    scalars = AsyncScalars(loss, num_correct)
    with torch.no_grad():
        loss.add_(1)
    assert scalars.ready()
    assert scalars.values() == [0.5, 7.0]


def test_moving_a_cpu_tensor_to_the_cpu_does_not_copy_it() -> None:
    tensor = torch.arange(3)
    assert to_device_async(tensor, "cpu") is tensor


@pytest.mark.gpu
def test_values_on_a_gpu_are_ready_after_the_work_queued_before() -> None:
    """Neither the copy nor `ready` waits; the value is the one at the time of the copy."""
    big = torch.randn(4096, 4096, device="cuda")
    value = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            big = (big @ big).clamp_(-1, 1)
        scalars = AsyncScalars(value)
        value.add_(1)
        assert not scalars.ready()
        assert scalars.values() == [1.0]
        assert scalars.ready()
        moved = to_device_async(torch.arange(1000), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.cpu(), torch.arange(1000))

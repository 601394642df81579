"""Numbers that are asked for now and read later, and who looks at them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from convlens.device import AsyncScalars, to_device_async
from convlens.utils.console import ProgressDisplay


def test_on_the_cpu_they_are_there_at_once_and_stay_what_they_were() -> None:
    loss, right = torch.tensor(0.5, requires_grad=True), torch.tensor(7)
    later = AsyncScalars(loss, right)
    with torch.no_grad():
        loss.add_(1)
    assert later.ready()
    assert later.values() == [0.5, 7.0]


def test_sending_to_the_cpu_is_no_copy() -> None:
    tensor = torch.arange(3)
    assert to_device_async(tensor, "cpu") is tensor


@pytest.mark.gpu
def test_on_a_gpu_they_come_when_it_gets_there() -> None:
    """A long product first: asking doesn't wait for it, and the value is that of its moment."""
    big = torch.randn(4096, 4096, device="cuda")
    value = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            big = (big @ big).clamp_(-1, 1)
        later = AsyncScalars(value)
        value.add_(1)
        assert not later.ready()
        assert later.values() == [1.0]
        assert later.ready()
        sent = to_device_async(torch.arange(1000), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(sent.cpu(), torch.arange(1000))


@dataclass
class Coming:
    """A step whose numbers arrive after it was asked for them a few times."""

    epoch: int = 1
    images: int = 4
    asked: int = 0
    after: int = 2

    def numbers(self) -> Coming:
        return self

    def ready(self) -> bool:
        self.asked += 1
        return self.asked > self.after

    def values(self) -> list[float]:
        assert self.asked > self.after
        return [0.25, 3.0]


class Bar:
    def __init__(self) -> None:
        self.moves: list[tuple[int, str | None]] = []

    def advance(self, amount: int = 1, text: str | None = None) -> None:
        self.moves.append((amount, text))


def test_the_watch_shows_numbers_when_they_have_arrived() -> None:
    bar = Bar()
    watch = ProgressDisplay(bar, 3)
    watch.interval_s = 0.0
    first, others = Coming(), [Coming(after=0) for _ in range(3)]
    for record in [first, *others]:
        watch.step(record)
    # Asked for at the first step, there at the third: those of the first are shown by then.
    (amount, text), (next_amount, _) = bar.moves
    assert (amount, next_amount) == (3, 1)
    assert text is not None
    assert text.startswith("epoch 1/3  loss 0.250  accuracy 75.0%")

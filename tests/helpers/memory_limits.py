"""Networks that run out of memory in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def allocate_too_much() -> None:
    """Make torch's allocator fail: no machine has 2^60 bytes."""
    torch.empty(1 << 60, dtype=torch.uint8)


class FailingBackward(torch.autograd.Function):
    """The identity; the backward pass allocates too much."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        allocate_too_much()
        return gradient


def greedy(model: nn.Module, most: int, *, back: bool = False, first: int = 0) -> list[int]:
    """Make a network run out of memory when it trains on more than `most` images at once.

    It fails after the forward pass, so norms have already updated their statistics. Returns the
    number of images of each call.

    Args:
        back: fail in the backward pass instead.
        first: number of calls that succeed with any number of images.
    """
    seen: list[int] = []

    def fail(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if not module.training:
            return output
        seen.append(len(output))
        if len(output) <= most or len(seen) <= first:
            return output
        if back:
            return FailingBackward.apply(output)
        allocate_too_much()
        return output

    model.register_forward_hook(fail)
    return seen

"""Batches and state for tests of the training loop."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Listed:
    """The same batches in each epoch."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.batches[start:]


def copy_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return a copy of weights, norm statistics, counters and optimizer state."""
    state = dict(model.state_dict())
    for index, values in optimizer.state_dict()["state"].items():
        state |= {f"optim.{index}.{k}": v for k, v in values.items() if v is not None}
    return {key: tensor.clone() for key, tensor in state.items()}

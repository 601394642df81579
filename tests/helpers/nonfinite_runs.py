"""Shared by the tests of numerics and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convlens import optim
from convlens.engine.loop import Records, TrainLoop, TrainState
from convlens.models.cnn import CNN
from convlens.recipe import OptimConfig
from helpers.support import PLAN
from helpers.train_loops import Listed, everything

OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.1},
    "nesterov": {"name": "sgd", "lr": 0.1, "nesterov": True, "weight_decay": 0.01},
    "adam": {"name": "adam", "lr": 0.02},
    "adamw": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1, "clip_norm": 0.5},
    "muon": {"name": "muon", "lr": 0.05, "aux_lr": 0.1, "momentum": 0.6, "nesterov": True},
    "ema": {"name": "sgd", "lr": 0.1, "ema": 0.9},
    "lookahead": {"name": "adam", "lr": 0.02, "lookahead": {"every": 2}},
    "windows": {
        "name": "sgd",
        "lr": 0.1,
        "groups": [{"params": "classifier.*", "end": 0.4}, {"params": "stage1.*", "start": 0.2}],
    },
}


def batches(steps: int, bad: int | None, value: float = float("nan")) -> Listed:
    """Batches of 9 and 8 images in turn; those of step `bad`, from 0, are multiplied by `value`."""
    generator = torch.Generator().manual_seed(5)
    found = [
        (torch.randn(9 - step % 2, 1, 8, 8, generator=generator), torch.arange(9 - step % 2) % 3)
        for step in range(steps)
    ]
    if bad is not None:
        found[bad] = (found[bad][0] * value, found[bad][1])
    return Listed(found)


class Run:
    """A small training whose losses are read in each step, or later."""

    def __init__(
        self, asked: dict[str, Any], steps: int, synchronous: bool, epochs: int = 2
    ) -> None:
        torch.manual_seed(1)
        self.config = OptimConfig(**asked)
        self.model = CNN(3, 1, 8, widths=[4, 6], dropout=0.3)
        self.optimizer = optim.build_optimizer(self.model, self.config)
        self.averager = optim.build_averager(self.model, self.config, epochs * steps)
        self.progress = TrainState()
        self.synchronous, self.epochs = synchronous, epochs

    def fit(self, listed: Listed) -> Records:
        loop = TrainLoop(
            self.model,
            self.optimizer,
            nn.CrossEntropyLoss(),
            PLAN,
            clip_norm=self.config.clip_norm,
            averager=self.averager,
            check_loss_synchronously=self.synchronous,
        )
        schedule = optim.build_schedule(self.config)
        return loop.run(listed, schedule, epochs=self.epochs, seed=3, state=self.progress)

    def learned(self) -> dict[str, Tensor]:
        """Weights and optimizer state, without buffers."""
        buffers = {name for name, _ in self.model.named_buffers()}
        found = everything(self.model, self.optimizer)
        return {name: tensor for name, tensor in found.items() if name not in buffers}

    def state(self) -> dict[str, Tensor]:
        found = everything(self.model, self.optimizer)
        if self.averager is not None:
            found |= {f"average.{i}": t for i, t in enumerate(self.averager.state()["average"])}
            found["average.steps"] = torch.tensor(self.averager.steps)
        at = self.progress
        numbers = [float(v) for v in (at.epoch, at.step, at.images, at.loss_sum, at.num_correct)]
        return {**found, "progress": torch.tensor(numbers, dtype=torch.float64)}

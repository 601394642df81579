"""Small trainings with a batch whose loss is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convlens import optim
from convlens.engine.loop import Records, TrainLoop, TrainState
from convlens.models.cnn import CNN
from convlens.recipe import OptimConfig
from helpers.support import PLAN
from helpers.train_loops import Listed, copy_state

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
    """Alternating batches of 9 and 8 images; those of step `bad` (from 0) are times `value`."""
    generator = torch.Generator().manual_seed(5)
    listed = [
        (torch.randn(9 - step % 2, 1, 8, 8, generator=generator), torch.arange(9 - step % 2) % 3)
        for step in range(steps)
    ]
    if bad is not None:
        images, labels = listed[bad]
        listed[bad] = (images * value, labels)
    return Listed(listed)


class Run:
    """A small training; losses are read in each step (`synchronous`), or later."""

    def __init__(
        self, options: dict[str, Any], steps: int, synchronous: bool, epochs: int = 2
    ) -> None:
        torch.manual_seed(1)
        self.config = OptimConfig(**options)
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
        tensors = copy_state(self.model, self.optimizer)
        return {name: tensor for name, tensor in tensors.items() if name not in buffers}

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers, optimizer state, average and progress."""
        tensors = copy_state(self.model, self.optimizer)
        if self.averager is not None:
            average = self.averager.state()["average"]
            tensors |= {f"average.{i}": tensor for i, tensor in enumerate(average)}
            tensors["average.steps"] = torch.tensor(self.averager.steps)
        p = self.progress
        numbers = [float(n) for n in (p.epoch, p.step, p.images, p.loss_sum, p.num_correct)]
        return {**tensors, "progress": torch.tensor(numbers, dtype=torch.float64)}

"""Small trainings by one process or by several that share each batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convlens import distributed, optim
from convlens.distributed import ProcessGroup
from convlens.engine.data_parallel import DataParallel
from convlens.engine.loop import Step, TrainLoop, TrainState
from convlens.engine.losses import ClassificationLoss
from convlens.models.cnn import CNN
from convlens.recipe import OptimConfig
from helpers.support import PLAN

SIZES = [13, 12, 5, 3]  # of 4 processes, 2 and 3 have no rows of the last two batches
WINDOWS = [{"params": "classifier.*", "end": 0.4}, {"params": "stage1.*", "start": 0.2}]
Result = dict[str, Any]


class Shares:
    """The rows of this process in random batches."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __len__(self) -> int:
        return len(SIZES)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in whole_batches(epoch)[start:]:
            rows = self.group.share(len(targets)).rows
            yield images[rows], targets[rows]


def whole_batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    return [
        (
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in SIZES
    ]


class WithUnused(nn.Module):
    """A network with parameters that do not affect the output."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.used(images.flatten(1))
        return logits


def network(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "norm":
        return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3))
    if kind == "unused":
        return WithUnused()
    return CNN(3, 1, 8, widths=[4, 6], batch_norm=False, dropout=0.3 if kind == "dropout" else 0.0)


def train(
    group: ProcessGroup,
    kind: str,
    steps: int,
    *,
    stop: int = 0,
    micro_batch_size: int = 0,
    criterion: nn.Module | None = None,
    **config: Any,
) -> Result:
    """Return weights and losses after `steps` steps; the training is resumed after `stop` steps."""
    model = network(kind)
    options = OptimConfig(**{"name": "sgd", "lr": 0.1, **config})
    optimizer, state = optim.build_optimizer(model, options), TrainState()
    plan = replace(PLAN, micro_batch_size=micro_batch_size)
    losses: list[float] = []
    for count in (stop, steps - stop):
        loop = TrainLoop(
            model,
            optimizer,
            criterion or nn.CrossEntropyLoss(),
            plan,
            clip_norm=options.clip_norm,
            data_parallel=DataParallel(group, SIZES) if group.size > 1 else None,
        )
        schedule = optim.build_schedule(options)
        records = loop.run(Shares(group), schedule, epochs=3, seed=3, state=state)
        done = 0
        while done < count:
            record = next(records)
            if isinstance(record, Step):
                losses.append(float(record.loss))
                done += 1
        records.close()
    return {"weights": dict(model.state_dict()), "losses": losses}


# Unequal weights: a mean over the weights of each process would not be that of the batch.
WEIGHTED = ClassificationLoss((0.1, 1.0, 5.0), gamma=2.0, label_smoothing=0.1)


def results(group: ProcessGroup) -> dict[str, Result]:
    return {
        "one step": train(group, "plain", 1),
        "three epochs": train(group, "plain", 12, clip_norm=0.5, groups=WINDOWS),
        "adamw": train(group, "plain", 12, name="adamw", lr=0.003),
        "micro-batches": train(group, "plain", 12, micro_batch_size=2),
        "weighted": train(group, "plain", 12, micro_batch_size=2, criterion=WEIGHTED),
        "weighted step": train(group, "plain", 1, criterion=WEIGHTED),
        "unused": train(group, "unused", 4),
        "norm": train(group, "norm", 1),
        "dropout": train(group, "dropout", 12),
        "resumed": train(group, "dropout", 12, stop=6),
    }


def main(path: str) -> None:
    torch.set_num_threads(1)
    group = distributed.init_process_group()
    torch.save(results(group), f"{path}-{group.rank}")

"""skorch: a NeuralNetClassifier fitted on arrays, or on a data set if images are augmented."""

from __future__ import annotations

from typing import Any

import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from torch import nn

import torchside
from turns import Row, Turns, serve


class Lap(Callback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_epoch_end(self, net: NeuralNetClassifier, **_: Any) -> None:
        self.turns.epoch()


def train(row: Row, variant: str, turns: Turns) -> None:
    net = NeuralNetClassifier(
        torchside.network(row, variant),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        optimizer__fused=torchside.fused(variant),
        lr=row.lr,
        batch_size=row.batch,
        max_epochs=10**6,
        train_split=None,
        iterator_train__shuffle=True,
        callbacks=[("lap", Lap(turns))],
        callbacks__print_log=None,
        verbose=0,
        **{f"iterator_train__{k}": v for k, v in torchside.workers(variant).items()},
    )
    if variant.startswith("tensors"):
        images, labels = torchside.normalized(row)
        net.fit(images.numpy(), labels.numpy())
    else:
        net.fit(torchside.dataset(row, variant), y=None)


if __name__ == "__main__":
    serve(train, torchside.variants, ["skorch", "torch"])

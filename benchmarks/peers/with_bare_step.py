"""The upper bound: forward, backward and optimizer on one normalized batch, repeatedly."""

from __future__ import annotations

from torch import nn

import torchside
from turns import Row, Turns, serve


def train(row: Row, variant: str, turns: Turns) -> None:
    model = torchside.network(row, variant).train()
    optimizer, objective = torchside.adam(model, row, variant), nn.CrossEntropyLoss()
    images, labels = torchside.normalized(row)
    steps = len(images) // row.batch
    images, labels = images[: row.batch].clone(), labels[: row.batch].clone()
    while True:
        for _ in range(steps):
            optimizer.zero_grad()
            objective(model(images), labels).backward()
            optimizer.step()
        turns.epoch()


if __name__ == "__main__":
    serve(train, lambda row: ["contiguous", "channels_last"], ["torch"])

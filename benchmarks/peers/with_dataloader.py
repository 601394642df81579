"""The loop of tutorials: torchvision's transforms, a DataLoader, five lines of PyTorch.

With `--tuned` it is a second peer that also tries the faster variants.
"""

from __future__ import annotations

import sys

from torch import nn
from torch.utils.data import DataLoader

import torchside
from turns import Row, Turns, serve


def train(row: Row, variant: str, turns: Turns) -> None:
    loader = DataLoader(
        torchside.dataset(row, variant),
        batch_size=row.batch,
        shuffle=True,
        **torchside.workers(variant),
    )
    model = torchside.network(row, variant).train()
    optimizer, objective = torchside.adam(model, row, variant), nn.CrossEntropyLoss()
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            objective(model(images), labels).backward()
            optimizer.step()
        turns.epoch()


def variants(row: Row) -> list[str]:
    if "--tuned" in sys.argv:
        return [v for v in torchside.variants(row) if not v.startswith("pil")]
    return ["pil", "pil, 2 workers"]


if __name__ == "__main__":
    serve(train, variants, ["torch", "torchvision"])

"""What the peers of benchmarks/photographs.py share: the list of images, the network and the clock.

A peer gets a list of images with their splits, a file with the weights of the backbone, and a
number of minutes. It trains and classifies the test images within them: the clock starts with the
process, so imports, decoding and predictions count. Its number of epochs is chosen from the time of
its first batches, as a user with a watch would do.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn

# EfficientNet-Lite's own normalization, for images in 0..1.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
NETWORK = "tf_efficientnet_lite0"


def process_age() -> float:
    """Return the seconds since this process was started (Linux)."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(stat[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started


@dataclass
class Task:
    """One training: images by split, classes, weights and the time that is left."""

    images: dict[str, list[tuple[str, int]]]
    classes: list[str]
    weights: Path
    minutes: float
    seed: int
    out: Path
    _end: float = field(default=0.0)

    def __post_init__(self) -> None:
        self._end = time.monotonic() - process_age() + 60 * self.minutes

    def left(self) -> float:
        """Return the seconds until the time is over."""
        return self._end - time.monotonic()

    def network(self, classes: int | None = None) -> nn.Module:
        """Return the backbone with a new head; with `classes=0` without a head."""
        count = len(self.classes) if classes is None else classes
        model = timm.create_model(NETWORK, num_classes=count)
        tensors = load_file(self.weights)
        own = model.state_dict()
        fitting = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
        missing = model.load_state_dict(fitting, strict=False).missing_keys
        assert all(name.startswith("classifier") for name in missing), missing
        return model

    def write(self, predicted: list[int], **facts: object) -> None:
        """Write the predictions of the test images and how long everything took."""
        correct = sum(
            p == label for p, (_, label) in zip(predicted, self.images["test"], strict=True)
        )
        result = {
            "predicted": predicted,
            "accuracy": correct / len(predicted),
            "seconds": process_age(),
            **facts,
        }
        self.out.write_text(json.dumps(result))


def read_task() -> Task:
    parser = argparse.ArgumentParser()
    parser.add_argument("list", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("minutes", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    with options.list.open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    images: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    for row in rows:
        images[row["split"]].append((row["path"], classes.index(row["label"])))
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    return Task(images, classes, options.weights, options.minutes, options.seed, options.out)

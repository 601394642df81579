"""What the peers of `benchmarks/photographs.py` share: images, network, clock and number of epochs.

A peer gets a list of images with their splits, a file with the weights of the backbone, and a
number of minutes. It trains and classifies the test images within that time. The clock starts with
the process, so imports, decoding and predictions count. Image size and epochs are chosen by the
time of the first batches, as a user with a watch would do.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn

# EfficientNet-Lite's own normalization, for images in 0..1.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
NETWORK = "tf_efficientnet_lite0"
# Image sizes, and the number of epochs for which there must be time to use one above the smallest.
SIZES, MIN_EPOCHS = (128, 160, 192, 224), 5
TIMED_SIZE, TIMED_BATCHES = 160, 6  # the first batch is a warm-up and does not count
MAX_EPOCHS = 20
MARGIN = 1.05


def process_age() -> float:
    """Return the seconds since this process was started (Linux)."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(stat[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started


@dataclass
class Task:
    """A training: paths and labels of the images by split, weights, and the end of the time."""

    images: dict[str, list[tuple[str, int]]]
    classes: list[str]
    weights: Path
    seed: int
    out: Path
    end: float  # as `time.monotonic`

    def left(self) -> float:
        """Return the seconds until the time is over."""
        return self.end - time.monotonic()

    def network(self, classes: int | None = None) -> nn.Module:
        """Return the pretrained backbone with a new head; with `classes=0` without a head."""
        count = len(self.classes) if classes is None else classes
        model = timm.create_model(NETWORK, num_classes=count)
        tensors = load_file(self.weights)
        own = model.state_dict()
        fitting = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
        missing = model.load_state_dict(fitting, strict=False).missing_keys
        assert all(name.startswith("classifier") for name in missing), missing
        return model

    def write(self, predicted: list[int], **facts: object) -> None:
        """Write the predicted classes of the test images, and how long everything took."""
        result = {"predicted": predicted, "seconds": process_age(), **facts}
        self.out.write_text(json.dumps(result))


def size_and_epochs(
    batch_seconds: Sequence[float], batches: float, seconds: float, *, other_batches: float
) -> tuple[int, int]:
    """Return the largest image size for which enough epochs fit, and their number.

    Args:
        batch_seconds: of batches with images of `TIMED_SIZE`, the first one being a warm-up.
        batches: of an epoch with its validation.
        seconds: the time for training and test.
        other_batches: work besides these epochs, in training batches.
    """
    timed = batch_seconds[1:] or batch_seconds
    for size in reversed(SIZES):
        per_batch = MARGIN * statistics.median(timed) * (size / TIMED_SIZE) ** 2
        epochs = int((seconds / per_batch - other_batches) / batches)
        if epochs >= MIN_EPOCHS or size == SIZES[0]:
            break
    return size, min(max(1, epochs), MAX_EPOCHS)


def read_task() -> Task:
    """Return the task that the arguments describe, after setting the seed and two threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("list", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("minutes", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    end = time.monotonic() - process_age() + 60 * options.minutes
    with options.list.open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    images: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    for row in rows:
        images[row["split"]].append((row["path"], classes.index(row["label"])))
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    return Task(images, classes, options.weights, options.seed, options.out, end)

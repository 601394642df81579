"""Which images a network is measured on: a seeded sample of a split, and of training images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convlens import device
from convlens.data import Split, load_foreign
from convlens.errors import DataError
from convlens.evaluation import SPLITS
from convlens.inspection.subjects import Subject
from convlens.names import pick

PART = 5  # one image of so many is held out where a split has none of its own


@dataclass(frozen=True)
class Sample:
    """Some images of a split: their numbers int64 `[N]`, and what its labels mean."""

    split: Split
    index: Tensor
    classes: tuple[str, ...]
    data: str

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> Tensor:
        return self.split.labels[self.index]

    @property
    def ids(self) -> tuple[str, ...]:
        """Which images they are, whatever network they are shown to."""
        return tuple(self.split.ids[i] for i in self.index.tolist())

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images `[B, C, H, W]` and labels `[B]`, on the CPU."""
        for some in self.index.split(size):
            yield self.split.rows.gather(some), self.split.labels[some]


def sample(
    subject: Subject,
    split: str,
    *,
    data: str | Path | None = None,
    most: int,
    seed: int = 0,
    learning: bool = False,
) -> Sample:
    """Up to `most` images, drawn by `seed`, of a split of its own data or of another set.

    Args:
        learning: training images to learn from that are none of those which the split itself
            gives. `train`, and the splits that another set doesn't have apart (`val` always),
            are a fifth of the training images, the others being left to learn from.

    Labels of another set are in that set's own order: its classes need not be the network's.

    Raises:
        UsageError: no such split, or no run and no `data`; DataError: no images in it, or as
            `evaluation.judged_by`.
    """
    pick(dict.fromkeys(SPLITS), split, "split")
    asked = "train" if learning else split
    if data is None:
        apart = split != "train"
        found, classes, name = subject.split(asked), subject.classes, subject.data.name
    else:
        found, classes, name = _of_set(subject, data, "train")
        apart = split == "test" and not _same(tested := _of_set(subject, data, split)[0], found)
        found = tested if apart and not learning else found
    generator = torch.Generator().manual_seed(device.seed_of(seed, len(found)))
    order = torch.randperm(len(found), generator=generator)
    if not apart:
        held = len(found) // PART
        order = order[held:] if learning else order[:held]
    if not len(order):
        raise DataError(f"{name} has too few images: none to measure on", where=asked)
    # In order: neighbours are read from the disk in one go.
    return Sample(found, order[:most].sort().values, classes, name)


def _of_set(subject: Subject, data: str | Path, part: str) -> tuple[Split, tuple[str, ...], str]:
    pre = subject.loaded.preprocessing
    found, classes, name, _ = load_foreign(
        str(data),
        part,
        image_size=pre.image_size,
        channels=pre.channels,
        fit=pre.fit,
        memory_budget=device.memory_budget(subject.plan.device),
    )
    return found, classes, name


def _same(one: Split, other: Split) -> bool:
    return len(one) == len(other) and one.ids[0] == other.ids[0]

"""Small images, splits and recipes that several test files share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convlens import device
from convlens.data.dataset import Data, load_data
from convlens.recipe import Recipe, load_recipe
from convlens.run import RunDir
from convlens.runtime import RuntimeContext
from convlens.training.setup import TrainingJob, build_training_job

PLAN = device.Plan("cpu", "fp32", "contiguous")
BAD_DISK = Path("/proc/self/mem")  # reading it from its beginning is a real EIO


class Memory:
    """Images in memory."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.shape = tuple(images.shape)

    def gather(self, index: Tensor) -> Tensor:
        return self.images[index]

    def in_memory_tensor(self) -> Tensor | None:
        return self.images


class Streamed(Memory):
    """The same images as if they were on disk; `reads` lists the rows that were read."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.reads: list[list[int]] = []

    def gather(self, index: Tensor) -> Tensor:
        self.reads.append(index.tolist())
        return self.images[index].clone()

    def in_memory_tensor(self) -> Tensor | None:
        return None


@dataclass
class Split:
    rows: Any
    labels: Tensor
    ids: Sequence[str] = field(default_factory=list)


def pictures(count: int, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    """Return random uint8 images; pixel (0, 0) of channel 0 is the number of the image."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, size, size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count) % 256
    return images


TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "per_class": 8},
    "model": {"name": "cnn", "widths": [4, 8]},
    "optim": {"name": "adamw", "lr": 0.01},
    "train": {"epochs": 3, "batch_size": 16, "memory_format": "contiguous", "precision": "fp32"},
}


@contextlib.contextmanager
def working_in(root: Path) -> Iterator[None]:
    """Make a folder the current one, with a cache of its own, for fixtures of a whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("CONVLENS_CACHE", str(root / "cache"))
        yield


def tiny(*overrides: str) -> Recipe:
    """Return a recipe that trains in a fraction of a second: 80 digits, 3 epochs of 5 steps."""
    return load_recipe(TINY, overrides)


_loaded: dict[str, Data] = {}


def images_of(recipe: Recipe) -> Data:
    """Return the data of a recipe, loaded once per process."""
    key = recipe.data.model_dump_json()
    if key not in _loaded:
        _loaded[key] = load_data(recipe.data, memory_budget=1 << 30)
    return _loaded[key]


def begin(recipe: Recipe, name: str) -> tuple[TrainingJob, RunDir]:
    """Prepare a new or an interrupted run for `training.train.fit`."""
    job = build_training_job(recipe, images_of(recipe), RuntimeContext("cpu", quiet=True))
    run_dir = RunDir(Path("models") / name)
    if not run_dir.metadata():
        run_dir.create(job.recipe, {"digests": [recipe.digest()]})
    return job, run_dir


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Assert that two sets of tensors are bit-identical."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different

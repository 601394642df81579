"""fastai: `vision_learner(...).fine_tune`, as its documentation shows it.

`Resize` of the items, `aug_transforms` of the batches; first one epoch with a frozen backbone, then
all layers with discriminative learning rates. The weights of the last epoch are used.
"""

from __future__ import annotations

import time

import fastai.callback.progress
import fastai.callback.schedule  # noqa: F401  (both add methods to Learner)
import pandas as pd
import torch
from fastai.callback.core import CancelFitException
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import ColReader, IndexSplitter, Normalize
from fastai.learner import Callback, Learner
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from safetensors.torch import load_file

from photographs_task import (
    MEAN,
    NETWORK,
    STD,
    TIMED_BATCHES,
    TIMED_SIZE,
    Task,
    read_task,
    size_and_epochs,
)

BATCH = 32
RESERVE = 5.0  # seconds for the end of the process
FROZEN_EPOCH = 0.6  # the time of the epoch with a frozen backbone, in epochs


class Timing(Callback):
    """Keeps the times of some batches, with the waiting for them, and ends the fit."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def before_epoch(self) -> None:
        self.start = time.perf_counter()

    def after_batch(self) -> None:
        self.times.append(time.perf_counter() - self.start)
        self.start = time.perf_counter()
        if len(self.times) == TIMED_BATCHES:
            raise CancelFitException


def loaders(task: Task, size: int) -> DataLoaders:
    rows = [
        (path, task.classes[label], split == "val")
        for split in ("train", "val")
        for path, label in task.images[split]
    ]
    table = pd.DataFrame(rows, columns=["path", "label", "is_valid"])
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=task.classes)),
        get_x=ColReader("path"),
        get_y=ColReader("label"),
        splitter=IndexSplitter(table.index[table.is_valid].tolist()),
        item_tfms=Resize(round(size * 1.15)),
        batch_tfms=[*aug_transforms(size=size, min_scale=0.6), Normalize.from_stats(MEAN, STD)],
    )
    return block.dataloaders(table, bs=BATCH, num_workers=2, device=torch.device("cpu"))


def learner(task: Task, data: DataLoaders) -> Learner:
    made = vision_learner(data, NETWORK, pretrained=False, normalize=False)
    body = made.model[0].model
    own, tensors = body.state_dict(), load_file(task.weights)
    body.load_state_dict({name: tensors[name] for name in own}, strict=True)
    made.freeze()
    return made


def main() -> None:
    task = read_task()
    timing, trial = Timing(), learner(task, loaders(task, TIMED_SIZE))
    trial.unfreeze()
    with trial.no_bar(), trial.no_logging():
        trial.fit(1, lr=1e-6, cbs=timing)
    images = {split: len(items) / BATCH for split, items in task.images.items()}
    per_epoch = max(1, int(images["train"])) + images["val"] / 2  # without a backward pass
    size, epochs = size_and_epochs(
        timing.times,
        per_epoch,
        task.left() - RESERVE,
        other_batches=FROZEN_EPOCH * per_epoch + images["test"] / 2,
    )
    data = loaders(task, size)
    final = learner(task, data)
    with final.no_bar(), final.no_logging():
        final.fine_tune(epochs)
        test = data.test_dl([path for path, _ in task.images["test"]])
        scores, _ = final.get_preds(dl=test)
    task.write([int(k) for k in scores.argmax(1)], epochs=epochs, size=size)


if __name__ == "__main__":
    main()

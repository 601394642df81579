"""fastai: `vision_learner(...).fine_tune`, as its documentation shows it.

`Resize` of the items, `aug_transforms` of the batches, the backbone frozen for one epoch, then all
layers with discriminative learning rates. The weights of the last epoch are used.
"""

from __future__ import annotations

import time

import torch
from fastai.callback.core import CancelFitException
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import ColReader, IndexSplitter, Normalize
from fastai.learner import Callback
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from safetensors.torch import load_file

from photographs import MEAN, NETWORK, STD, read_task

SIZE, BATCH = 160, 32
RESERVE = 5.0


class Pilot(Callback):
    """Ends a fit after a few batches and keeps their times."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def before_batch(self) -> None:
        self.start = time.perf_counter()

    def after_batch(self) -> None:
        self.times.append(time.perf_counter() - self.start)
        if len(self.times) == 5:
            raise CancelFitException


def main() -> None:
    import pandas as pd

    task = read_task()
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
        item_tfms=Resize(round(SIZE * 1.15)),
        batch_tfms=[*aug_transforms(size=SIZE, min_scale=0.6), Normalize.from_stats(MEAN, STD)],
    )
    loaders = block.dataloaders(table, bs=BATCH, num_workers=2, device=torch.device("cpu"))

    def learner():
        made = vision_learner(loaders, NETWORK, pretrained=False, normalize=False)
        body = made.model[0].model
        own = body.state_dict()
        tensors = load_file(task.weights)
        body.load_state_dict({k: tensors[k] for k in own if k in tensors}, strict=True)
        made.freeze()
        return made

    pilot = Pilot()
    trial = learner()
    trial.unfreeze()
    with trial.no_bar(), trial.no_logging():
        trial.fit(1, lr=1e-6, cbs=pilot)
    seconds = sorted(pilot.times)[2] * 1.05
    per_epoch = seconds * len(loaders.train) + seconds / 2 * len(loaders.valid)
    test_seconds = seconds / 2 * len(task.images["test"]) / BATCH
    # The first epoch, with the frozen backbone, takes about 0.6 of the time.
    epochs = max(1, int((task.left() - test_seconds - RESERVE) / per_epoch - 0.6))
    final = learner()
    with final.no_bar(), final.no_logging():
        final.fine_tune(epochs)
        test = loaders.test_dl([path for path, _ in task.images["test"]])
        scores, _ = final.get_preds(dl=test)
    task.write([int(k) for k in scores.argmax(1)], epochs=epochs, size=SIZE)


if __name__ == "__main__":
    main()

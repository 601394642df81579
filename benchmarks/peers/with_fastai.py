"""fastai: a Learner without bar and log, with its pipeline of PIL images (`pil`) or tensors.

fastai converts and normalizes whole batches.
"""

from __future__ import annotations

from functools import partial

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import CancelValidException
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor
from fastai.learner import Callback, Learner
from fastai.optimizer import Adam, OptimWrapper
from fastai.vision.augment import CropPad, FlipItem, PadMode, RandomCrop
from fastai.vision.core import PILImage, PILImageBW
from torch import nn
from torch.utils.data import TensorDataset

import torchside
from turns import Row, Turns, serve


class Lap(Callback):
    """Ends a turn after each training epoch; validation is excluded for all peers."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def after_train(self) -> None:
        self.turns.epoch()

    def before_validate(self) -> None:
        raise CancelValidException


def loaders(row: Row, variant: str) -> DataLoaders:
    options = torchside.workers(variant) or {"num_workers": 0}
    if not variant.startswith("pil"):
        data = TensorDataset(*torchside.normalized(row))
        train = DataLoader(data, bs=row.batch, shuffle=True, **options)
        return DataLoaders(train, train, device=torch.device("cpu"))
    images, labels = row.load()
    size, targets = images.shape[1], torch.from_numpy(labels)
    kind = PILImageBW if row.channels == 1 else PILImage
    sets = Datasets(
        range(len(images)),
        [[lambda i: kind.create(images[i])], [lambda i: targets[i]]],
        splits=[list(range(len(images))), []],
    )
    padding = CropPad(size + 4, pad_mode=PadMode.Reflection)
    changes = [padding, RandomCrop(size), FlipItem()] if row.augment else []
    return sets.dataloaders(
        bs=row.batch,
        after_item=[*changes, ToTensor()],
        after_batch=[IntToFloatTensor(), Normalize.from_stats(row.mean, row.std, cuda=False)],
        device=torch.device("cpu"),
        drop_last=False,
        **options,
    )


def train(row: Row, variant: str, turns: Turns) -> None:
    tuned = partial(OptimWrapper, opt=torch.optim.Adam, fused=True)
    learner = Learner(
        loaders(row, variant),
        torchside.network(row, variant),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=tuned if "fused" in variant else Adam,
        lr=row.lr,
        wd=0.0,
        cbs=[Lap(turns), *([ChannelsLast()] if "channels_last" in variant else [])],
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(10**6)


def variants(row: Row) -> list[str]:
    if row.augment:
        return ["pil, 2 workers, fused", "pil, fused", "pil, fused, channels_last", "pil"]
    return ["tensors, fused", "tensors, fused, channels_last", "tensors", "pil", "pil, 2 workers"]


if __name__ == "__main__":
    serve(train, variants, ["fastai", "torch"])

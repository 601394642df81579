"""What is looked at: a trained network, and the images it is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor, nn

from convlens import evaluation, models, prediction, run
from convlens.data import Data, Split
from convlens.data.decode import UnreadableImage, decode
from convlens.device import Plan
from convlens.errors import ConvlensError, DataError, UsageError
from convlens.inference import placed, split_logits
from convlens.models import zoo
from convlens.names import pick
from convlens.picturing import worst_of
from convlens.run import Loaded, Preprocessing, RunFolder
from convlens.schema import ModelConfig
from convlens.starting import weights
from convlens.system.console import print_status

SIZE = 224  # of images for a network whose weights don't say
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_PLACE = re.compile(r"(train|val|test|worst|class):(.+)")


class Picture(NamedTuple):
    """One image as the network sees it before normalisation.

    `pixels` are uint8 `[C, S, S]`, `label` its class in the model's order where it is known,
    `name` what it was asked for by, e.g. `cat.png` or `test:17`, and `id` that of the image in its
    data set, if it comes from one.
    """

    name: str
    pixels: Tensor
    label: int | None
    id: str | None = None


@dataclass
class Subject:
    """A network to be looked at, in eval mode on its device, float32.

    `place` is the run it comes from; None for a network of torchvision or timm.
    """

    name: str
    loaded: Loaded
    plan: Plan
    place: RunFolder | None = None
    _splits: dict[tuple[str, str | None], Split] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def classes(self) -> tuple[str, ...]:
        return self.loaded.classes

    @cached_property
    def data(self) -> Data:
        """The data of its run.

        Raises:
            UsageError: it isn't a run; DataError: the images changed or have moved.
        """
        if self.place is None:
            raise UsageError(
                f"{self.name} is no run of convlens: it has no images of its own",
                fix="name image files, or a data set with --data",
            )
        try:
            return evaluation.own_data(self.loaded, self.plan.device)
        except UsageError as error:
            raise DataError(
                f"the images of {self.name} can't be found: {error.what}",
                fix="put them back where they were in training, or name image files",
            ) from error

    def split(self, name: str, data: str | Path | None = None) -> Split:
        """A split of its own data or of another set, with labels in the model's order.

        The first time that its test split is opened is logged in its run as a look at it.
        """
        key = name, None if data is None else str(data)
        if key not in self._splits:
            own = self.data if data is None else None
            on = self.plan.device
            found = evaluation.judged_by(self.loaded, name, data=data, on=on, own=own)
            self._splits[key] = found.part
            if own is not None and name == "test":
                self._log(found)
        return self._splits[key]

    def _log(self, opened: evaluation.Judged) -> None:
        assert self.place is not None
        entry = self.place.add_result(
            {"run": self.place.name, "split": "test", "data": opened.name, "own": True,
             "n": len(opened.part), "by": "look", "data_fingerprint": opened.fingerprint,
             "model_sha256": self.loaded.card["sha256"]}
        )  # fmt: skip
        print_status(
            f"{escape(self.name)}: test set used {evaluation.times(entry['looks'])} (logged)"
        )

    def held_out(self, data: str | Path | None = None) -> str:
        """The split for what nobody named one: validation, so that a sealed test stays sealed.

        Training images where a run held none out. Of another set what is called `test`, or all.
        """
        if data is not None:
            return "test"
        return "val" if len(self.data.val) else "train"

    def prepared(self, pixels: Tensor) -> Tensor:
        """uint8 `[N, C, S, S]` normalised, float32 on the device: what the network takes."""
        return self.loaded.preprocessing.normalise(pixels.to(self.plan.device), self.plan)


def open_subject(text: str, *, on: str | None = None) -> Subject:
    """A run (by name, folder or model file), or a network `NAME[:WEIGHTS]` of torchvision or timm.

    WEIGHTS are as in `model.weights`: `default`, a member of torchvision's enum, a file, `none`
    (random). Without them a network has its default weights. A run's name wins.

    Raises:
        UsageError: neither a run nor a network, with near misses; as `weights.find`.
    """
    name, _, spec = text.partition(":")
    try:
        place = run.find(text)
    except ConvlensError:
        if name not in zoo.names() and not name.startswith(zoo.TIMM):
            raise
        loaded = _of_library(ModelConfig(name=name, weights=spec or "default"))
        return Subject(text, loaded, placed(loaded.model, on))
    loaded = run.load_model(place.model_path)
    return Subject(place.name, loaded, placed(loaded.model, on), place)


def share_data(subjects: Sequence[Subject]) -> None:
    """Networks that were trained on the same images (by fingerprint) hold them only once.

    Raises:
        DataError: the images of one of them changed or have moved.
    """
    loaded: dict[str, Data] = {}
    for subject in subjects:
        if subject.place is not None:
            mark = subject.loaded.card["data"]["fingerprint"]
            subject.data = loaded[mark] = loaded.get(mark) or subject.data


def _of_library(config: ModelConfig) -> Loaded:
    """A network as its library has it, for as many classes as its weights know."""
    models.options_of(config.name)
    options = {"stem": "imagenet"} if config.name.startswith("resnet") else {}
    options = options if config.name in models.MODELS else {}
    if config.weights == "none":
        count, mean, std, source = 1000, None, None, None
    else:
        weights.check(config)
        source = weights.find(config)
        mean, std = source.mean, source.std
        count = len(source.classes) if source.classes else _outputs(source.tensors)
    classes = source.classes if source and source.classes else tuple(map(str, range(count)))
    with torch.random.fork_rng(devices=[]):
        model = models.build(config.name, count, 3, SIZE, options)
    if source is not None:
        weights.start(source, model, classes)
    preprocessing = Preprocessing(SIZE, 3, "crop", mean or IMAGENET[0], std or IMAGENET[1])
    card = {"model": {"name": config.name, "options": options}}
    return Loaded(model.eval(), classes, preprocessing, card)


def _outputs(tensors: dict[str, Tensor]) -> int:
    """How many classes the last matrix (or 1x1 convolution) of a state dict is for."""
    return [value.shape[0] for value in tensors.values() if value.ndim >= 2][-1]


def is_place(text: str) -> bool:
    """Whether `text` means images of a split (`test:17`, `worst:5`, ...) and no file's name."""
    return _PLACE.fullmatch(text) is not None and not os.path.exists(text)


def choose_pictures(subject: Subject, asked: Sequence[str]) -> list[Picture]:
    """The images asked for, in that order.

    Each is a file, folder or glob; `train:N`, `val:N`, `test:N` (the image number N of a split);
    `worst:N` (the N surest mistakes on the test split); `class:NAME:N` (the first N of a class
    in the test split).

    Raises:
        UsageError: a number or class that isn't there, with near misses; nothing asked for.
        DataError: files that can't be found or read.
    """
    found: list[Picture] = []
    for text in asked:
        place = _PLACE.fullmatch(text) if is_place(text) else None
        found += _from_split(subject, place[1], place[2]) if place else _from_files(subject, text)
    if not found:
        right = any(text.startswith("worst:") for text in asked)
        what = "no mistake on the test split, so no worst one" if right else "no images to look at"
        raise UsageError(what, fix="name files, test:17, worst:5 or class:cat:3")
    return found


def _from_files(subject: Subject, text: str) -> list[Picture]:
    pre = subject.loaded.preprocessing
    found = []
    for path in prediction.expand([text]):
        try:
            pixels = decode(path, size=pre.image_size, channels=pre.channels, fit=pre.fit)
        except UnreadableImage as error:
            raise DataError(
                f"can't be read as an image: {error.reason}", where=path, fix="name another file"
            ) from error
        found.append(Picture(Path(path).name, torch.from_numpy(np.ascontiguousarray(pixels)), None))
    return found


def _from_split(subject: Subject, kind: str, rest: str) -> list[Picture]:
    # All that can be wrong is told before a split is opened, for the test split's log.
    label, _, number = rest.rpartition(":") if kind == "class" else ("", "", rest)
    if kind == "class" and not (label and number.isdecimal()):
        raise UsageError(f"class:{rest}: how many of them?", fix=f"write class:{rest}:3")
    if not number.isdecimal():
        raise UsageError(
            f"{kind}:{rest}: {number!r} is no number", fix="write test:17, worst:5 or val:3"
        )
    numbers = {name: place for place, name in enumerate(subject.classes)}
    wanted_class = pick(numbers, label, "class") if kind == "class" else -1
    count = int(number)
    split = subject.split(kind if kind in ("train", "val") else "test")
    if kind == "worst":
        wanted = worst(subject, split)[:count]
    elif kind == "class":
        wanted = (split.labels == wanted_class).nonzero()[:count, 0]
    elif count >= len(split):
        raise UsageError(
            f"{kind}:{count} isn't there", fix=f"the split has images 0 to {len(split) - 1:,}"
        )
    else:
        wanted = torch.tensor([count])
    pixels, labels = split.rows.gather(wanted), split.labels[wanted].tolist()
    shown = "test" if kind in ("worst", "class") else kind
    rows = zip(wanted.tolist(), pixels, labels, strict=True)
    return [Picture(f"{shown}:{i}", image, label, str(split.ids[i])) for i, image, label in rows]


def worst(subject: Subject, split: Split) -> Tensor:
    """int64 positions of the wrong answers in a split, the one least likely to its truth first."""
    normalise = subject.loaded.preprocessing.normalise
    logits, labels = split_logits(subject.model, split, normalise, subject.plan)
    chances = logits.double().softmax(1).cpu().numpy()
    return torch.from_numpy(worst_of(chances, labels.cpu().numpy()))

"""One network, its images and the measures of its stages: what `measuring` puts together."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from convlens import models
from convlens.errors import ModelFileError
from convlens.inspection import layers
from convlens.inspection.measures import MEASURES
from convlens.inspection.sampling import Sample
from convlens.inspection.similarity import Similarity, gram
from convlens.inspection.stagebatch import Batch, Measure, Value
from convlens.inspection.subjects import Subject
from convlens.system.console import progress

PIXELS = 2**18  # of the images in a batch; the widest stages have a hundred times as many numbers
WHITENED_FROM = 2000  # images, where a network's first filters are computed from some


@dataclass(frozen=True)
class Measured:
    """One network: the values of each stage by the measure's name.

    `n` held-out images were measured and `learned` training images learned from; `broken` are
    stages with NaN or infinite activations, which have no values. `baseline`: fresh weights.
    """

    name: str
    data: str
    split: str
    n: int
    learned: int
    classes: int
    stages: dict[str, dict[str, Value]]
    broken: tuple[str, ...] = ()
    baseline: bool = False

    def to_dict(self) -> dict[str, Any]:
        stages = {
            stage: {name: value.to_dict() for name, value in values.items()}
            for stage, values in self.stages.items()
        }
        return {**self.__dict__, "broken": list(self.broken), "stages": stages}


@dataclass(frozen=True)
class Alike:
    """Linear CKA `[M, M]` between all stages of networks that saw the same `n` images."""

    stages: tuple[tuple[str, str], ...]  # network and stage
    matrix: list[list[float | None]]
    n: int

    def to_dict(self) -> dict[str, Any]:
        return {"stages": [list(each) for each in self.stages], "matrix": self.matrix, "n": self.n}


@dataclass
class Work:
    """What is to be measured of a network: on `held`, after learning from `own`."""

    subject: Subject
    held: Sample
    own: Sample | None
    stages: dict[str, dict[str, Measure]]
    baseline: bool = False
    broken: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        subject: Subject,
        held: Sample,
        own: Sample | None,
        measures: Sequence[str],
        asked: Sequence[str] = (),
    ) -> Work:
        """Fresh measures (names of `MEASURES`) at the layers asked for, by default its stages."""
        classes = len(held.classes)
        stages = {
            stage: {name: MEASURES[name](classes) for name in measures}
            for stage in layers.find(subject.model, asked)
        }
        return cls(subject, held, own, stages)

    @property
    def batch(self) -> int:
        """Images that go through the network at once."""
        return max(8, min(256, PIXELS // self.subject.loaded.preprocessing.image_size**2))

    @property
    def architecture(self) -> str:
        """Equal for networks that differ in their weights only, and are shown the same."""
        loaded = self.subject.loaded
        key = [loaded.card["model"], len(loaded.classes), loaded.preprocessing.image_size]
        return json.dumps([*key, self.held.data, self.held.ids[0]])

    def fresh(self, seed: int) -> Work:
        """The same architecture on the same images, with weights as before any training."""
        loaded = self.subject.loaded
        net, pre = loaded.card["model"], loaded.preprocessing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = models.build(
                net["name"], len(loaded.classes), pre.channels, pre.image_size, net["options"]
            )
        model = self.subject.plan.prepare_model(model.eval())
        subject = replace(
            self.subject, name=f"{net['name']}, untrained", loaded=replace(loaded, model=model)
        )
        if isinstance(model, models.Initialised):
            pixels, _ = next(self.held.batches(WHITENED_FROM))
            model.initialise(subject.prepared(pixels))
        measures = next(iter(self.stages.values()))
        return replace(
            Work.of(subject, self.held, self.own, list(measures), list(self.stages)), baseline=True
        )

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The activations of the stages that are numbers; the others are struck off for good."""
        asked = [stage for stage in self.stages if stage not in self.broken]
        found = layers.activations(self.subject.model, self.subject.prepared(images), asked)
        self.broken |= {name for name, maps in found.items() if not torch.isfinite(maps).all()}
        if len(self.broken) == len(self.stages):
            raise ModelFileError(
                f"{self.subject.name}: all activations are NaN or infinite",
                fix="its training diverged: look at a run that didn't",
            )
        # float64, which the sums are in, doesn't exist on Apple's GPUs.
        return {
            name: maps.cpu() if maps.device.type == "mps" else maps
            for name, maps in found.items()
            if name not in self.broken
        }

    def learn(self) -> None:
        """Shows the training images to the measures that learn."""
        if self.own is None:
            return
        with progress(f"{self.subject.name}, training images", len(self.own)) as bar:
            for images, labels in self.own.batches(self.batch):
                for stage, maps in self.maps(images).items():
                    batch = Batch(maps, images, labels.to(maps.device))
                    for each in self.stages[stage].values():
                        if each.learns:
                            each.learn(batch)
                bar.advance(len(images))

    def see(self, images: Tensor, labels: Tensor, *, grams: bool) -> dict[str, Tensor]:
        """Shows a batch of held-out images to all measures; each stage's `gram` if asked for."""
        products = {}
        for stage, maps in self.maps(images).items():
            batch = Batch(maps, images, labels.to(maps.device))
            for each in self.stages[stage].values():
                each.see(batch)
            if grams:
                products[stage] = gram(maps)
        return products

    def result(self, split: str) -> Measured:
        values = {
            stage: {
                name: Value(None) if stage in self.broken else each.value()
                for name, each in measures.items()
            }
            for stage, measures in self.stages.items()
        }
        return Measured(
            name=self.subject.name,
            data=self.held.data,
            split=split,
            n=len(self.held),
            learned=0 if self.own is None else len(self.own),
            classes=len(self.held.classes),
            stages=values,
            broken=tuple(stage for stage in self.stages if stage in self.broken),
            baseline=self.baseline,
        )


def together(works: Sequence[Work], *, similarity: bool) -> Alike | None:
    """Shows the held-out images, the same for all, to all networks side by side.

    One forward pass a network and batch serves every measure, and the similarity of all stages.
    """
    alike = Similarity()
    size = min(work.batch for work in works)
    names = ", ".join(work.subject.name for work in works)
    with progress(names, len(works[0].held)) as bar:
        for batches in zip(*(work.held.batches(size) for work in works), strict=True):
            found: dict[Hashable, Tensor] = {}
            for number, (work, (images, labels)) in enumerate(zip(works, batches, strict=True)):
                products = work.see(images, labels, grams=similarity)
                found |= {(number, stage): product for stage, product in products.items()}
            bar.advance(len(batches[0][0]))
            if similarity:
                alike.add(found)
    if not similarity:
        return None
    good = [(n, s) for n, work in enumerate(works) for s in work.stages if s not in work.broken]
    stages = tuple((works[n].subject.name, stage) for n, stage in good)
    return Alike(stages, alike.matrix(good), len(works[0].held))

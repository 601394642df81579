"""Measurements over a data set, stage by stage, for several networks at once: the whole job."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlens import models
from convlens.device import preserve_torch_settings
from convlens.errors import ModelFileError, UsageError, lookup
from convlens.interpret import features
from convlens.interpret.inputs import InspectedModel, Sample, draw_sample, share_data
from convlens.interpret.stage_metrics import MEASURES, Measure, MetricValue, StageBatch
from convlens.interpret.streaming_stats import CKA, gram_matrix
from convlens.utils.console import progress_bar, quiet_mode
from convlens.utils.files import write_atomic

# ---- stagework ----------------------------------------
# One network, its images and the measures of its stages: what `measuring` puts together.

PIXELS = 2**18  # of the images in a batch; the widest stages have a hundred times as many numbers
WHITENED_FROM = 2000  # images, where a network's first filters are computed from some


@dataclass(frozen=True)
class StageResults:
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
    stages: dict[str, dict[str, MetricValue]]
    broken: tuple[str, ...] = ()
    baseline: bool = False

    def to_dict(self) -> dict[str, Any]:
        stages = {
            stage: {name: value.to_dict() for name, value in values.items()}
            for stage, values in self.stages.items()
        }
        return {**self.__dict__, "broken": list(self.broken), "stages": stages}


@dataclass(frozen=True)
class CKAResult:
    """Linear CKA `[M, M]` between all stages of networks that saw the same `n` images."""

    stages: tuple[tuple[str, str], ...]  # network and stage
    matrix: list[list[float | None]]
    n: int

    def to_dict(self) -> dict[str, Any]:
        return {"stages": [list(each) for each in self.stages], "matrix": self.matrix, "n": self.n}


@dataclass
class StageMeasurement:
    """What is to be measured of a network: on `held`, after learning from `own`."""

    subject: InspectedModel
    held: Sample
    own: Sample | None
    stages: dict[str, dict[str, Measure]]
    baseline: bool = False
    broken: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        subject: InspectedModel,
        held: Sample,
        own: Sample | None,
        measures: Sequence[str],
        asked: Sequence[str] = (),
    ) -> StageMeasurement:
        """Fresh measures (names of `MEASURES`) at the layers asked for, by default its stages."""
        classes = len(held.classes)
        stages = {
            stage: {name: MEASURES[name](classes) for name in measures}
            for stage in features.find_layers(subject.model, asked)
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
        key = [loaded.model_metadata["model"], len(loaded.classes), loaded.preprocessing.image_size]
        return json.dumps([*key, self.held.data, self.held.ids[0]])

    def fresh(self, seed: int) -> StageMeasurement:
        """The same architecture on the same images, with weights as before any training."""
        loaded = self.subject.loaded
        net, pre = loaded.model_metadata["model"], loaded.preprocessing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = models.build_model(
                net["name"], len(loaded.classes), pre.channels, pre.image_size, net["options"]
            )
        model = self.subject.plan.prepare_model(model.eval())
        subject = replace(
            self.subject, name=f"{net['name']}, untrained", loaded=replace(loaded, model=model)
        )
        if isinstance(model, models.DataInitialized):
            pixels, _ = next(self.held.batches(WHITENED_FROM))
            model.initialize(subject.prepared(pixels))
        measures = next(iter(self.stages.values()))
        return replace(
            StageMeasurement.of(subject, self.held, self.own, list(measures), list(self.stages)),
            baseline=True,
        )

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The activations of the stages that are numbers; the others are struck off for good."""
        asked = [stage for stage in self.stages if stage not in self.broken]
        found = features.layer_activations(self.subject.model, self.subject.prepared(images), asked)
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
        with progress_bar(f"{self.subject.name}, training images", len(self.own)) as bar:
            for images, labels in self.own.batches(self.batch):
                for stage, maps in self.maps(images).items():
                    batch = StageBatch(maps, images, labels.to(maps.device))
                    for each in self.stages[stage].values():
                        if each.learns:
                            each.learn(batch)
                bar.advance(len(images))

    def see(self, images: Tensor, labels: Tensor, *, grams: bool) -> dict[str, Tensor]:
        """Shows a batch of held-out images to all measures; each stage's `gram` if asked for."""
        products = {}
        for stage, maps in self.maps(images).items():
            batch = StageBatch(maps, images, labels.to(maps.device))
            for each in self.stages[stage].values():
                each.see(batch)
            if grams:
                products[stage] = gram_matrix(maps)
        return products

    def result(self, split: str) -> StageResults:
        values = {
            stage: {
                name: MetricValue(None) if stage in self.broken else each.value()
                for name, each in measures.items()
            }
            for stage, measures in self.stages.items()
        }
        return StageResults(
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


def measure_similarity(works: Sequence[StageMeasurement], *, similarity: bool) -> CKAResult | None:
    """Shows the held-out images, the same for all, to all networks side by side.

    One forward pass a network and batch serves every measure, and the similarity of all stages.
    """
    alike = CKA()
    size = min(work.batch for work in works)
    names = ", ".join(work.subject.name for work in works)
    with progress_bar(names, len(works[0].held)) as bar:
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
    return CKAResult(stages, alike.matrix(good), len(works[0].held))


SIMILARITY = "similarity"
NAMES = (*MEASURES, SIMILARITY)


@dataclass(frozen=True)
class Measurements:
    """What `measure` found, and the files it wrote."""

    networks: tuple[StageResults, ...]
    similarity: tuple[CKAResult, ...]
    measures: tuple[str, ...]
    seed: int
    files: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "measures": {
                name: {"title": MEASURES[name].title, "definition": MEASURES[name].about}
                for name in self.measures
            },
            "networks": [network.to_dict() for network in self.networks],
            "similarity": [alike.to_dict() for alike in self.similarity],
            "seed": self.seed,
            "files": [str(path) for path in self.files],
        }


def select_measures(names: Sequence[str]) -> tuple[str, ...]:
    """Checked names of measurements in the table's order; none given means all of them.

    Raises:
        UsageError: no such measurement, with near misses.
    """
    for name in names:
        lookup(dict.fromkeys(NAMES), name, "measurement")
    return tuple(name for name in NAMES if not names or name in names)


@preserve_torch_settings()
def measure(
    subjects: Sequence[InspectedModel],
    names: Sequence[str] = (),
    *,
    folder: Path,
    layers: Sequence[str] = (),
    split: str = "val",
    data: str | Path | None = None,
    images: int = 2000,
    learn_from: int = 4000,
    untrained: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> Measurements:
    """Measures every stage of the networks and draws one figure of all of them.

    Args:
        names: of `MEASURES`, or `similarity`; all by default.
        folder: where `measures.png`, `similarity.png` and `measures.json` go.
        layers: other layers than the stages, the same for all networks.
        split: which images are measured on: `val`, `test` (only if asked for) or `train`.
        data: another data set than each network's own.
        images, learn_from: at most so many held-out and training images, drawn by `seed`.
        untrained: each architecture with fresh weights, too; drawn dashed.

    Memory doesn't grow with the number of images, but for a few numbers an image and stage.

    Raises:
        UsageError: unknown names; DataError: images that changed, have moved or are too few;
            ModelFileError: all activations of a network are NaN.
    """
    if not subjects:
        raise UsageError("no networks to measure", fix="name one run or several")
    if min(images, learn_from) < 1:
        raise UsageError(f"can't measure on {min(images, learn_from)} images", fix="name more")
    wanted = select_measures(names)
    singly = [name for name in wanted if name != SIMILARITY]
    learns = any(MEASURES[name].learns for name in singly)
    with quiet_mode(quiet):
        if data is None:
            share_data(subjects)
        works = []
        for subject in subjects:
            held = draw_sample(subject, split, data=data, most=images, seed=seed)
            own: Sample | None = None
            if learns:
                own = draw_sample(
                    subject, split, data=data, most=learn_from, seed=seed, learning=True
                )
            works.append(StageMeasurement.of(subject, held, own, singly, layers))
        _tell_apart(works)
        if untrained:
            works += [work.fresh(seed) for work in {w.architecture: w for w in works}.values()]
            _tell_apart(works)
        for work in works:
            work.learn()
        groups: dict[tuple[str, ...], list[StageMeasurement]] = {}
        for work in works:
            groups.setdefault(work.held.ids, []).append(work)
        asked = SIMILARITY in wanted
        alike = [measure_similarity(group, similarity=asked) for group in groups.values()]
        networks = tuple(work.result(split) for work in works)
    found = tuple(each for each in alike if each is not None)
    files = _draw(networks, found, singly, folder)
    result = Measurements(networks, found, tuple(singly), seed, (*files, folder / "measures.json"))
    write_atomic(result.files[-1], json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    return result


def _tell_apart(works: Sequence[StageMeasurement]) -> None:
    """Numbers the networks that have the same name."""
    met: dict[str, int] = {}
    for work in works:
        name = work.subject.name
        met[name] = met.get(name, 0) + 1
        if met[name] > 1:
            work.subject = replace(work.subject, name=f"{name} ({met[name]})")


def _draw(
    networks: Sequence[StageResults],
    similarity: Sequence[CKAResult],
    names: Sequence[str],
    folder: Path,
) -> list[Path]:
    from convlens import plots

    files = []
    if names:
        files.append(folder / "measures.png")
        panels = {name: (MEASURES[name].title, MEASURES[name].scale) for name in names}
        lines = [
            plots.StageLine(
                network.name,
                list(network.stages),
                {name: [_ends(v[name]) for v in network.stages.values()] for name in names},
                network.baseline,
            )
            for network in networks
        ]
        plots.save_figure(
            plots.stage_measures(lines, panels, note=_log_measurement(networks)), files[-1]
        )
    for number, alike in enumerate(similarity):
        files.append(folder / f"similarity{f'-{number + 1}' if number else ''}.png")
        title = f"Linear CKA on {alike.n:,} {networks[0].split} images"
        plots.save_figure(plots.similarity(alike.matrix, alike.stages, title), files[-1])
    return files


def _ends(value: MetricValue) -> tuple[float, float, float]:
    low, high = value.interval95 or (math.nan, math.nan)
    return (math.nan if value.value is None else value.value), low, high


def _log_measurement(networks: Sequence[StageResults]) -> str:
    """What was measured on, in a line."""
    held = sorted({(network.data, network.n) for network in networks})
    words = "; ".join(f"{n:,} {networks[0].split} images of {data}" for data, n in held)
    learned = sorted({f"{network.learned:,}" for network in networks if network.learned})
    more = f", learned from {' or '.join(learned)} training images" if learned else ""
    several = len({tuple(network.stages) for network in networks}) > 1
    spread = "; shallower networks' stages are spread evenly" if several else ""
    return f"{words}{more}; bars: 95% intervals{spread}"

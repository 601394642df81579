"""Measurements of every stage of several networks over a data set, in one pass over the images.

Writes `measures.png`, `similarity.png` (linear CKA) and `measures.json`. The measures themselves
are defined in `stage_metrics`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlens import models
from convlens.device import preserve_torch_settings
from convlens.errors import ModelFileError, UsageError, check_count, lookup
from convlens.evaluation import check_data
from convlens.interpret import features
from convlens.interpret.inputs import InspectedModel, Sample, draw_sample, share_data
from convlens.interpret.stage_metrics import MEASURES, Measure, MetricValue, StageBatch
from convlens.interpret.streaming_stats import CKA, gram_matrix
from convlens.recipe import DataConfig
from convlens.utils.console import progress_bar, quiet_mode
from convlens.utils.files import write_atomic

MAX_PIXELS_PER_BATCH = 2**18  # of the images; the widest stages have a hundred times as many values
MIN_BATCH, MAX_BATCH = 8, 256
INITIALIZATION_IMAGES = 2000  # for networks whose first filters are computed from images
SIMILARITY = "similarity"
NAMES = (*MEASURES, SIMILARITY)


# Results


@dataclass(frozen=True)
class StageResults:
    """Measurements of one network.

    Attributes:
        name: of the network.
        data: name of the data set.
        split: the split that was measured.
        n: number of images measured.
        learned: number of training images that measures were fitted to.
        classes: number of classes.
        stages: by stage, the values by name of the measure.
        broken: stages with NaN or infinite activations, whose values are None.
        baseline: whether the weights are untrained.
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
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "broken": list(self.broken), "stages": stages}


@dataclass(frozen=True)
class CKAResult:
    """Linear CKA between all stages of networks that saw the same images.

    Attributes:
        stages: pairs of network and stage.
        matrix: `[M, M]`, in the order of `stages`.
        n: number of images.
    """

    stages: tuple[tuple[str, str], ...]
    matrix: list[list[float | None]]
    n: int

    def to_dict(self) -> dict[str, Any]:
        return {"stages": [list(each) for each in self.stages], "matrix": self.matrix, "n": self.n}


@dataclass(frozen=True)
class Measurements:
    """The result of `measure`.

    Attributes:
        networks: measurements of each network.
        similarity: linear CKA, one result for each set of images.
        measures: names of the measures, without `similarity`.
        seed: of the samples.
        files: the files written.
    """

    networks: tuple[StageResults, ...]
    similarity: tuple[CKAResult, ...]
    measures: tuple[str, ...]
    seed: int
    files: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "measures": {
                name: {"title": MEASURES[name].title, "definition": MEASURES[name].definition}
                for name in self.measures
            },
            "networks": [network.to_dict() for network in self.networks],
            "similarity": [cka.to_dict() for cka in self.similarity],
            "seed": self.seed,
            "files": [str(path) for path in self.files],
        }


# Measuring


def select_measures(names: Sequence[str]) -> tuple[str, ...]:
    """Check names of measurements and return them in the order of `NAMES`; by default all.

    Raises:
        UsageError: an unknown measurement, with close matches.
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
    data: str | Path | DataConfig | None = None,
    images: int = 2000,
    learn_from: int = 4000,
    untrained: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> Measurements:
    """Measure every stage of one or several networks and draw one figure of all of them.

    Memory does not grow with the number of images, except for a few numbers per image and stage.

    Args:
        subjects: the networks.
        names: of `MEASURES`, or `similarity`; by default all.
        folder: of `measures.png`, `similarity.png` and `measures.json`.
        layers: layers to measure instead of the stages, the same for all networks.
        split: the split to measure: `val`, `test` (only on request) or `train`.
        data: another data set than each network's own.
        images: maximum number of images to measure.
        learn_from: maximum number of training images that measures are fitted to.
        untrained: also measure each architecture with untrained weights; drawn dashed.
        seed: of the samples and the untrained weights.
        quiet: print nothing.

    Raises:
        UsageError: unknown names.
        DataError: images that have changed or moved, or too few of them.
        ModelFileError: all activations of a network are NaN or infinite.
    """
    if not subjects:
        raise UsageError("no networks to measure", fix="name one or several runs")
    check_data(data)
    check_count("images", images)
    check_count("learn_from", learn_from)
    check_count("seed", seed, minimum=0)
    selected = select_measures(names)
    measures = [name for name in selected if name != SIMILARITY]
    requires_fit = any(MEASURES[name].requires_fit for name in measures)
    with quiet_mode(quiet):
        if data is None:
            share_data(subjects)
        jobs = []
        for subject in subjects:
            sample = draw_sample(subject, split, data=data, max_images=images, seed=seed)
            training: Sample | None = None
            if requires_fit:
                training = draw_sample(
                    subject, split, data=data, max_images=learn_from, seed=seed, training=True
                )
            jobs.append(StageMeasurement.create(subject, sample, training, measures, layers))
        _number_equal_names(jobs)
        if untrained:
            architectures = {job.architecture: job for job in jobs}
            jobs += [job.untrained_copy(seed) for job in architectures.values()]
            _number_equal_names(jobs)
        for job in jobs:
            job.fit()
        by_images: dict[tuple[str, ...], list[StageMeasurement]] = {}
        for job in jobs:
            by_images.setdefault(job.sample.ids, []).append(job)
        with_cka = SIMILARITY in selected
        results = [_measure_together(group, with_cka=with_cka) for group in by_images.values()]
        similarity = tuple(result for result in results if result is not None)
        networks = tuple(job.result(split) for job in jobs)
    figures = _draw(networks, similarity, measures, folder)
    path = folder / "measures.json"
    result = Measurements(networks, similarity, tuple(measures), seed, (*figures, path))
    write_atomic(path, json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    return result


@dataclass
class StageMeasurement:
    """Measurement of the stages of one network.

    Attributes:
        subject: the network.
        sample: the images that are measured.
        training: the images that measures are fitted to; None if no measure needs any.
        stages: by stage, the measures by name.
        baseline: whether the weights are untrained.
        broken: stages with NaN or infinite activations so far; they are skipped from then on.
    """

    subject: InspectedModel
    sample: Sample
    training: Sample | None
    stages: dict[str, dict[str, Measure]]
    baseline: bool = False
    broken: set[str] = field(default_factory=set)

    @classmethod
    def create(
        cls,
        subject: InspectedModel,
        sample: Sample,
        training: Sample | None,
        measures: Sequence[str],
        layers: Sequence[str] = (),
    ) -> StageMeasurement:
        """Create new measures (names of `MEASURES`) at `layers`, by default the stages."""
        classes = len(sample.classes)
        stages = {
            stage: {name: MEASURES[name](classes) for name in measures}
            for stage in features.find_layers(subject.model, layers)
        }
        return cls(subject, sample, training, stages)

    @property
    def batch_size(self) -> int:
        pixels = self.subject.loaded.preprocessing.image_size**2
        return max(MIN_BATCH, min(MAX_BATCH, MAX_PIXELS_PER_BATCH // pixels))

    @property
    def architecture(self) -> str:
        """A key shared by networks that differ only in their weights and see the same images."""
        loaded = self.subject.loaded
        key = [loaded.model_metadata["model"], len(loaded.classes), loaded.preprocessing.image_size]
        return json.dumps([*key, self.sample.data, self.sample.ids[0]])

    def untrained_copy(self, seed: int) -> StageMeasurement:
        """Return the measurement of the same architecture with initial weights."""
        loaded = self.subject.loaded
        config, pre = loaded.model_metadata["model"], loaded.preprocessing
        with torch.random.fork_rng(devices=[]), loaded.recorded_code():
            torch.manual_seed(seed)
            model = models.build_model(
                config["name"], len(loaded.classes), pre.channels, pre.image_size, config["options"]
            )
        model = self.subject.plan.prepare_model(model.eval())
        subject = replace(
            self.subject, name=f"{config['name']}, untrained", loaded=replace(loaded, model=model)
        )
        if models.initializes_from_data(model):
            pixels, _ = next(self.sample.batches(INITIALIZATION_IMAGES))
            model.initialize(subject.prepared(pixels))
        measures = list(next(iter(self.stages.values())))
        copy = StageMeasurement.create(
            subject, self.sample, self.training, measures, list(self.stages)
        )
        return replace(copy, baseline=True)

    def fit(self) -> None:
        """Fit the measures that require it to the training images."""
        if self.training is None:
            return
        with progress_bar(f"{self.subject.name}, training images", len(self.training)) as bar:
            for images, labels in self.training.batches(self.batch_size):
                for stage, maps in self._finite_maps(images).items():
                    batch = StageBatch(maps, images, labels.to(maps.device))
                    for each in self.stages[stage].values():
                        if each.requires_fit:
                            each.fit(batch)
                bar.advance(len(images))

    def update(self, images: Tensor, labels: Tensor, *, with_grams: bool) -> dict[str, Tensor]:
        """Update all measures with a batch; return the Gram matrix of each stage if requested."""
        grams = {}
        for stage, maps in self._finite_maps(images).items():
            batch = StageBatch(maps, images, labels.to(maps.device))
            for each in self.stages[stage].values():
                each.update(batch)
            if with_grams:
                grams[stage] = gram_matrix(maps)
        return grams

    def _finite_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the activations of stages that have only been finite so far."""
        stages = [stage for stage in self.stages if stage not in self.broken]
        inputs = self.subject.prepared(images)
        maps = features.layer_activations(self.subject.model, inputs, stages)
        self.broken |= {stage for stage, value in maps.items() if not value.isfinite().all()}
        if len(self.broken) == len(self.stages):
            raise ModelFileError(
                f"{self.subject.name}: all activations are NaN or infinite",
                fix="the training diverged: use another run",
            )
        # Sums are float64, which Apple's GPUs do not support.
        return {
            stage: value.cpu() if value.device.type == "mps" else value
            for stage, value in maps.items()
            if stage not in self.broken
        }

    def result(self, split: str) -> StageResults:
        values = {
            stage: {
                name: MetricValue(None) if stage in self.broken else each.compute()
                for name, each in measures.items()
            }
            for stage, measures in self.stages.items()
        }
        return StageResults(
            name=self.subject.name,
            data=self.sample.data,
            split=split,
            n=len(self.sample),
            learned=0 if self.training is None else len(self.training),
            classes=len(self.sample.classes),
            stages=values,
            broken=tuple(stage for stage in self.stages if stage in self.broken),
            baseline=self.baseline,
        )


def _measure_together(jobs: Sequence[StageMeasurement], *, with_cka: bool) -> CKAResult | None:
    """Update the measures of networks with the same sample of images, and compute their CKA.

    A single forward pass for each network and batch serves all measures and the CKA.
    """
    cka = CKA()
    size = min(job.batch_size for job in jobs)
    n = len(jobs[0].sample)
    with progress_bar(", ".join(job.subject.name for job in jobs), n) as bar:
        for batches in zip(*(job.sample.batches(size) for job in jobs), strict=True):
            grams: dict[Hashable, Tensor] = {}
            for number, (job, (images, labels)) in enumerate(zip(jobs, batches, strict=True)):
                stage_grams = job.update(images, labels, with_grams=with_cka)
                grams |= {(number, stage): gram for stage, gram in stage_grams.items()}
            bar.advance(len(batches[0][0]))
            if with_cka:
                cka.add(grams)
    if not with_cka:
        return None
    keys = [(i, s) for i, job in enumerate(jobs) for s in job.stages if s not in job.broken]
    stages = tuple((jobs[i].subject.name, stage) for i, stage in keys)
    return CKAResult(stages, cka.matrix(keys), n)


def _number_equal_names(jobs: Sequence[StageMeasurement]) -> None:
    """Append (2), (3), ... to repeated names of networks."""
    counts: dict[str, int] = {}
    for job in jobs:
        name = job.subject.name
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > 1:
            job.subject = replace(job.subject, name=f"{name} ({counts[name]})")


# Figures


def _draw(
    networks: Sequence[StageResults],
    similarity: Sequence[CKAResult],
    measures: Sequence[str],
    folder: Path,
) -> list[Path]:
    from convlens import plots

    files = []
    if measures:
        files.append(folder / "measures.png")
        panels = {name: (MEASURES[name].title, MEASURES[name].scale) for name in measures}
        lines = [
            plots.StageLine(
                network.name,
                list(network.stages),
                {
                    name: [_value_and_interval(v[name]) for v in network.stages.values()]
                    for name in measures
                },
                network.baseline,
            )
            for network in networks
        ]
        figure = plots.stage_measures(lines, panels, note=_figure_note(networks))
        plots.save_figure(figure, files[-1])
    for number, cka in enumerate(similarity):
        files.append(folder / f"similarity{f'-{number + 1}' if number else ''}.png")
        title = f"Linear CKA on {cka.n:,} {networks[0].split} images"
        plots.save_figure(plots.similarity(cka.matrix, cka.stages, title), files[-1])
    return files


def _value_and_interval(value: MetricValue) -> tuple[float, float, float]:
    low, high = value.interval95 or (math.nan, math.nan)
    return (math.nan if value.value is None else value.value), low, high


def _figure_note(networks: Sequence[StageResults]) -> str:
    """Describe the images that were measured in one line."""
    samples = sorted({(network.data, network.n) for network in networks})
    images = "; ".join(f"{n:,} {networks[0].split} images of {data}" for data, n in samples)
    counts = sorted({f"{network.learned:,}" for network in networks if network.learned})
    fitted = f", fitted on {' or '.join(counts)} training images" if counts else ""
    several = len({tuple(network.stages) for network in networks}) > 1
    spread = "; the stages of shallower networks are spread evenly" if several else ""
    return f"{images}{fitted}; bars: 95% intervals{spread}"

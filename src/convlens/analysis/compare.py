"""Comparison of runs: one table, overlaid curves, and significance tests.

Runs are grouped by recipe and compared with the first one on the same images. Which images these
are is checked before anything is evaluated, so that a refused comparison does not use a test split.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from torch import nn

from convlens import metrics, run_plots, serialization
from convlens.device import preserve_torch_settings, select_device
from convlens.engine import inference
from convlens.errors import ConvlensError, DataError, ModelFileError, UsageError
from convlens.evaluation import (
    EvalSplit,
    Evaluation,
    check_data,
    check_split,
    evaluate_split,
    load_eval_split,
    log_evaluation,
    split_hash,
)
from convlens.recipe import DataConfig, Recipe
from convlens.run import (
    PLOTS_DIR,
    LoadedModel,
    RunDir,
    RunLike,
    as_run_dir,
    list_runs,
    load_model,
    safe_name,
)
from convlens.user_code import accepts_trust
from convlens.utils.console import print_status, quiet_mode

ALPHA = 0.05  # level of significance
CLASS_MEANS = {"macro_f1": "macro F1", "balanced_accuracy": "balanced accuracy"}
MAX_NAMED_RUNS = 3  # in the name of the folder of plots


@dataclass(frozen=True)
class Candidate:
    """A run that was evaluated.

    Attributes:
        images: fingerprint of the images and labels that it was evaluated on.
        labels, preds: int64 `[N]`, in the order of these images and of the classes of
            `evaluation`.
        flops: floating-point operations for one image; a multiply-add counts as two.
        metadata: content of `run.json`; empty for a bare model file.
        epochs: rows of `metrics.csv`; none for a bare model file.
    """

    name: str
    recipe: Recipe
    evaluation: Evaluation
    images: str
    labels: np.ndarray
    preds: np.ndarray
    parameters: int
    flops: int
    file_bytes: int
    metadata: Mapping[str, Any] = field(repr=False)
    epochs: Sequence[Mapping[str, float]] = field(repr=False)

    @property
    def correct(self) -> np.ndarray:
        """Which images are classified correctly, bool `[N]`."""
        return np.asarray(self.preds == self.labels)

    @property
    def seeds(self) -> tuple[int, int]:
        """Seed of the split and seed of everything else."""
        return self.recipe.data.seed, self.recipe.train.seed

    @property
    def training_seconds(self) -> float | None:
        value = self.metadata.get("training_seconds")
        return None if value is None else float(value)

    @property
    def training_speed(self) -> float | None:
        """Images per second in training, over all epochs."""
        rows = self.epochs
        images = sum(row["images_per_second"] * row["seconds"] for row in rows)
        return images / sum(row["seconds"] for row in rows) if rows else None

    def to_dict(self) -> dict[str, Any]:
        keys = ("n", "correct", "accuracy", *CLASS_MEANS, "loss", "ece", "looks")
        intervals = ("interval95", *(f"{key}_interval95" for key in CLASS_MEANS))
        return {
            "run": self.name,
            **{key: getattr(self.evaluation, key) for key in keys},
            **{key: list(getattr(self.evaluation, key)) for key in intervals},
            "images_per_second": self.evaluation.images_per_second,
            "data_seed": self.seeds[0],
            "seed": self.seeds[1],
            "parameters": self.parameters,
            "flops": self.flops,
            "file_bytes": self.file_bytes,
            "training_seconds": self.training_seconds,
            "training_images_per_second": self.training_speed,
            "model_sha256": self.evaluation.model_sha256,
        }


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ only in their seeds; often a single run."""

    name: str
    members: Sequence[Candidate]

    @cached_property
    def accuracies(self) -> list[float]:
        return self.values("accuracy")

    def values(self, metric: str) -> list[float]:
        """Return a metric of each run."""
        return [float(getattr(member.evaluation, metric)) for member in self.members]

    @property
    def interval95(self) -> tuple[float, float] | None:
        """Wilson's interval of a single run; None for several runs."""
        return self.members[0].evaluation.interval95 if len(self.members) == 1 else None

    def mean_of(self, key: str) -> float | None:
        """Return the mean of a value over the runs; None if a run lacks it."""
        values = [member.to_dict()[key] for member in self.members]
        return None if None in values else sum(values) / len(values)

    def to_dict(self) -> dict[str, Any]:
        mean, sd = metrics.mean_sd(self.accuracies)
        return {
            "name": self.name,
            "accuracy": mean,
            "sd": sd,
            "interval95": list(self.interval95) if self.interval95 else None,
            **{metric: metrics.mean_sd(self.values(metric))[0] for metric in CLASS_MEANS},
            "runs": [member.to_dict() for member in self.members],
        }


@dataclass(frozen=True)
class Verdict:
    """Comparison of one group with the first one.

    Attributes:
        test: `images` (McNemar's exact test), `seeds` (Student's t-test of pairs with the same
            seed), `means` (Welch's t-test), or `none`.
        difference: accuracy of the group minus that of the reference.
        p: two-sided.
        details: numbers of images that only one of them classifies correctly (`images`), or
            numbers of seeds.
        p_holm: `p` corrected for the number of verdicts (Holm); it decides.
        why: the reason if nothing was tested.
        class_means: differences of macro F1 and balanced accuracy by the name of the metric: for
            `images` with intervals of a paired bootstrap, for seeds by the same t-test. Their p
            values are not corrected.
    """

    name: str
    reference: str
    test: str
    difference: float
    interval95: tuple[float, float] | None
    p: float | None
    details: Mapping[str, int]
    p_holm: float | None = None
    why: str = ""
    class_means: Mapping[str, metrics.AccuracyDifference] = field(default_factory=dict)

    @property
    def differs(self) -> bool | None:
        """Whether the difference is significant; None without a test."""
        return None if self.p_holm is None else self.p_holm < ALPHA

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        points = 100 * self.difference
        if self.differs is None:
            measured = f"{self.name} measured {points:+.2f} points against {self.reference}"
            return f"no verdict on {self.name} and {self.reference}: {self.why} ({measured})"
        assert self.p_holm is not None
        test = f"{_format_p(self.p_holm)} ({self._test_details()})"
        if not self.differs:
            return (
                f"{self.name} and {self.reference} are not distinguishable: {points:+.2f} points "
                f"for {self.name} (95% interval {_format_interval(self.interval95)}), {test}"
            )
        better, worse, interval = self.name, self.reference, self.interval95
        if points < 0:
            better, worse = worse, better
            interval = (-interval[1], -interval[0]) if interval else None
        return (
            f"{better} is more accurate than {worse} by {abs(points):.2f} points "
            f"(95% interval {_format_interval(interval)}), {test}"
        )

    @property
    def class_means_sentence(self) -> str:
        """Differences of macro F1 and balanced accuracy; empty if nothing was tested."""
        parts = [
            f"{CLASS_MEANS[metric]} {100 * each.value:+.2f} points "
            f"(95% interval {_format_interval(each.interval95)})"
            for metric, each in self.class_means.items()
        ]
        return f"{self.name} against {self.reference}: {', '.join(parts)}" if parts else ""

    def _test_details(self) -> str:
        corrected = ""
        if self.p is not None and self.p_holm != self.p:
            corrected = f"; by itself {_format_p(self.p)}, corrected by Holm"
        counts = self.details
        if self.test == "images":
            return (
                f"McNemar's exact test on {counts['n']:,} images: {counts['only_this']:,} correct "
                f"only by {self.name}, {counts['only_reference']:,} only by {self.reference}"
                f"{corrected}"
            )
        if self.test == "seeds":
            return f"paired t over {counts['seeds']} seeds{corrected}"
        return f"Welch's t over {counts['seeds']} and {counts['reference_seeds']} seeds{corrected}"

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        if self.interval95:
            content["interval95"] = list(self.interval95)
        content["class_means"] = {
            metric: {
                "difference": each.value,
                "interval95": list(each.interval95) if each.interval95 else None,
                "p": each.p,
            }
            for metric, each in self.class_means.items()
        }
        return {**content, "differs": self.differs, "sentence": self.sentence}


def without_seeds(recipe: Recipe) -> str:
    """Return the digest of a recipe without its seeds and its memory format (chosen by timing)."""
    neutral = {"train.seed": 0, "data.seed": 0, "train.memory_format": "auto"}
    return recipe.replace(**neutral).digest()


def _comparable_recipe(model_metadata: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a model; a value range that was found is `auto` again.

    It depends on the training images, which `data.seed` selects.
    """
    recipe = serialization.recipe_from_metadata(model_metadata)
    found = model_metadata["data"].get("range") == "auto"
    return recipe.replace(**{"data.range": "auto"}) if found else recipe


def group_by_recipe(candidates: Sequence[Candidate]) -> list[Group]:
    """Group runs whose recipes differ only in `train.seed` and `data.seed`.

    If this would give a single group, each run is a group of its own.
    """
    same: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        same.setdefault(without_seeds(candidate.recipe), []).append(candidate)
    if len(same) == 1:
        return [Group(candidate.name, [candidate]) for candidate in candidates]
    groups: list[Group] = []
    used_names = [members[0].name for members in same.values() if len(members) == 1]
    for members in same.values():
        name = members[0].name
        if len(members) > 1:
            # The first seed of `train --seeds` has the name of the recipe, without a hash or seed.
            run_name = min(members, key=lambda m: m.seeds).recipe.name
            name = run_name if run_name not in used_names else name
            used_names.append(name)
            name = f"{name} ({len(members)} seeds)"
        groups.append(Group(name, members))
    return groups


def compare_groups(groups: Sequence[Group], *, same_images: bool) -> list[Verdict]:
    """Compare each group with the first one, by the most suitable test.

    If both have several seeds, the test is over seeds: paired if the seeds are the same, of two
    means otherwise. If one of them is a single run, the test is over images: it compares two
    models, and not what their recipes would give with other seeds.
    """
    reference, *rest = groups
    verdicts = [_compare_group(reference, group, same_images) for group in rest]
    corrected = metrics.holm_adjust([verdict.p for verdict in verdicts])
    return [replace(verdict, p_holm=p) for verdict, p in zip(verdicts, corrected, strict=True)]


def _compare_group(reference: Group, group: Group, same_images: bool) -> Verdict:
    by_seed = {member.seeds: member for member in group.members}
    reference_by_seed = {member.seeds: member for member in reference.members}
    if not same_images:
        gain = metrics.mean_sd(group.accuracies)[0] - metrics.mean_sd(reference.accuracies)[0]
        return _untested(group.name, reference.name, gain)
    if min(len(group.members), len(reference.members)) < 2:
        shared = next((seeds for seeds in by_seed if seeds in reference_by_seed), None)
        if shared is None:
            return _compare_on_images(reference.members[0], group.members[0])
        return _compare_on_images(reference_by_seed[shared], by_seed[shared])
    same_seeds = by_seed.keys() == reference_by_seed.keys()
    if same_seeds and len(by_seed) == len(group.members) == len(reference.members):
        test, details = "seeds", {"seeds": len(by_seed)}
        test_means = metrics.paired_difference
        reference = Group(reference.name, [reference_by_seed[seeds] for seeds in by_seed])
    else:
        test, test_means = "means", metrics.welch_difference
        details = {"seeds": len(group.members), "reference_seeds": len(reference.members)}
    difference, *class_means = (
        test_means(reference.values(metric), group.values(metric))
        for metric in ("accuracy", *CLASS_MEANS)
    )
    why = "" if difference.p is not None else "there is no variation between seeds"
    differences = dict(zip(CLASS_MEANS, class_means, strict=True))
    return Verdict(
        group.name, reference.name, test, *difference, details, why=why, class_means=differences
    )


def _untested(name: str, reference: str, gain: float) -> Verdict:
    why = "they were evaluated on different images"
    return Verdict(name, reference, "none", gain, None, None, {}, why=why)


def _compare_on_images(reference: Candidate, candidate: Candidate) -> Verdict:
    if reference.images != candidate.images:
        gain = candidate.evaluation.accuracy - reference.evaluation.accuracy
        return _untested(candidate.name, reference.name, gain)
    this, other = candidate.correct, reference.correct
    both, only_reference = int((this & other).sum()), int((other & ~this).sum())
    only_this, neither = int((this & ~other).sum()), int((~this & ~other).sum())
    difference = metrics.difference_on_images(both, only_reference, only_this, neither)
    details = {
        "n": len(this),
        "both": both,
        "only_this": only_this,
        "only_reference": only_reference,
        "neither": neither,
    }
    names = reference.evaluation.classes
    # The same classes may be in another order.
    order = np.array([names.index(name) for name in candidate.evaluation.classes])
    class_means = metrics.class_means_difference(
        reference.labels, reference.preds, order[candidate.preds], len(names)
    )
    return Verdict(
        candidate.name, reference.name, "images", *difference, details, class_means=class_means
    )


def _format_p(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.2g}"


def _format_interval(interval: tuple[float, float] | None) -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return "unknown"
    low, high = interval
    return f"{100 * low:.2f} to {100 * high:.2f}"


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
        groups: one for each recipe, in the order of the runs; the first one is the reference.
        verdicts: one for each group but the first, each with its `sentence`.
        notes: limits of the comparison.
        plots: paths of the figures.
    """

    split: str
    data: str
    groups: Sequence[Group]
    verdicts: Sequence[Verdict]
    notes: Sequence[str]
    plots: Sequence[Path]

    def to_dict(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "data": self.data,
            "groups": [group.to_dict() for group in self.groups],
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "notes": list(self.notes),
            "plots": [str(path) for path in self.plots],
        }


@accepts_trust
@preserve_torch_settings()
def compare(
    *runs: RunLike,
    split: str | None = None,
    data: str | Path | DataConfig | None = None,
    force: bool = False,
    device: str | None = None,
    quiet: bool = True,
    trust_code: bool = False,
) -> Comparison:
    """Evaluate runs on the same images and test whether they differ from the first one.

    Args:
        runs: at least two runs by name, folder or model file, or as `Run`. Runs that differ only
            in their seeds form one group.
        split: `test` (by default), `val` or `train`. It is logged as an evaluation of each run. Of
            another data set without splits all images are used.
        data: evaluate all runs on another data set; may be a data section of a recipe with the
            keys to read it.
        force: continue if images or classes differ; then nothing is tested.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress.
        trust_code: import user code that the model needs; otherwise that is an error.

    Raises:
        UsageError: fewer than two runs, or unknown names.
        ModelFileError: a run without weights.
        DataError: different images or classes, or a run whose images changed or moved.

    Example:
        >>> convlens.compare("resnet18", "resnet18-noaug").verdicts[0].sentence
    """
    split = None if split is None else check_split(split)
    check_data(data)
    run_dirs = _open_runs(runs)
    device = select_device(device)
    with quiet_mode(quiet):
        opened = _open_images(run_dirs, split, data, device)
        mismatch = _find_mismatch(opened)
        if mismatch and data is not None and any(run.eval_split.own for run in opened):
            # Their own test splits of this data set differ: compare them on all of it.
            opened = _open_images(run_dirs, split, data, device, recognize=False)
            mismatch = _find_mismatch(opened)
        if mismatch and not force:
            raise DataError(
                mismatch,
                where=", ".join(run_dir.name for run_dir in run_dirs)[:200],
                fix="evaluate all of them on one data set with --data, or use --force to compare "
                "without a test",
            )
        candidates = [_evaluate_run(run, device) for run in opened]
    split = opened[0].eval_split.split
    groups = group_by_recipe(candidates)
    verdicts = compare_groups(groups, same_images=not mismatch)
    notes = [*_limits(opened, mismatch, split), *_interpretation(candidates, verdicts)]
    data_name = " and ".join(dict.fromkeys(run.eval_split.name for run in opened))
    plots = _plot(data_name, groups, verdicts)
    # Last, for all runs: a comparison that fails uses no test split.
    logged = {
        id(candidate): replace(
            candidate, evaluation=log_evaluation(run.run_dir, candidate.evaluation)
        )
        for run, candidate in zip(opened, candidates, strict=True)
    }
    groups = [
        replace(group, members=[logged[id(each)] for each in group.members]) for group in groups
    ]
    return Comparison(split, data_name, groups, verdicts, notes, plots)


def _open_runs(runs: Sequence[RunLike]) -> list[RunDir]:
    """Return the run directories; the error names all runs that cannot be opened."""
    run_dirs: dict[Path, RunDir] = {}
    errors: list[ConvlensError] = []
    for run in runs:
        try:
            run_dir = as_run_dir(run)
            if not run_dir.model_path.is_file():
                raise ModelFileError(
                    f"run {run_dir.name!r} has no weights yet",
                    where=str(run_dir.path),
                    fix="train it further with the same command, or leave it out",
                )
            run_dirs.setdefault(run_dir.model_path.resolve(), run_dir)
        except ConvlensError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        fixes = dict.fromkeys(error.fix for error in errors if error.fix)
        raise UsageError("; ".join(error.what for error in errors), fix="; ".join(fixes)[:300])
    if len(run_dirs) < 2:
        given = [run_dir.name for run_dir in run_dirs.values()]
        known = [each.name for each in list_runs() if each.name not in given]
        available = f"; others here: {', '.join(known[:6])}" if known else ""
        raise UsageError(
            f"comparing needs at least two different runs, got {len(run_dirs)}",
            fix=f"name another one{available}; `convlens evaluate RUN` evaluates one",
        )
    return list(run_dirs.values())


@dataclass(frozen=True)
class _OpenedRun:
    """A run and the images that it is evaluated on."""

    run_dir: RunDir
    loaded: LoadedModel  # without its network: those of many runs would fill the memory
    eval_split: EvalSplit
    images: str = ""  # fingerprint

    @property
    def recipe_digest(self) -> str:
        return without_seeds(_comparable_recipe(self.loaded.model_metadata))

    @property
    def input_format(self) -> str:
        """How the model sees images, e.g. `32 px, 3 channels, crop`."""
        pre = self.loaded.preprocessing
        text = f"{pre.image_size} px, {pre.channels} channels, {pre.fit}"
        if pre.value_range is not None:
            low, high = pre.value_range
            text += f", values {low:g} to {high:g}"
        return text if pre.background == "white" else f"{text}, background {pre.background}"


def _open_images(
    run_dirs: Sequence[RunDir],
    split: str | None,
    data: str | Path | DataConfig | None,
    device: str,
    *,
    recognize: bool = True,
) -> list[_OpenedRun]:
    """Load the images of each run, once where several runs share them, and fingerprint them."""
    splits: dict[str, EvalSplit] = {}
    opened = []
    for run_dir in run_dirs:
        loaded = load_model(run_dir.model_path)
        metadata = loaded.model_metadata
        config = serialization.recipe_from_metadata(metadata).data.model_dump(mode="json")
        key = json.dumps([config, metadata["data"], metadata["classes"], metadata["preprocessing"]])
        if key not in splits:
            splits[key] = load_eval_split(
                loaded, split, data=data, device=device, recognize=recognize
            )
        opened.append(_OpenedRun(run_dir, replace(loaded, model=nn.Identity()), splits[key]))
    same_format = len({run.input_format for run in opened}) == 1
    fingerprints: dict[int, str] = {}
    for run in opened:
        if id(run.eval_split) not in fingerprints:
            fingerprints[id(run.eval_split)] = _fingerprint(run, pixels=same_format)
    return [replace(run, images=fingerprints[id(run.eval_split)]) for run in opened]


def _fingerprint(run: _OpenedRun, *, pixels: bool) -> str:
    """Hash image ids and class names, and the pixels if all models see images in one format."""
    part = run.eval_split.part
    digest = hashlib.sha256(split_hash(part, run.loaded.classes).encode())
    if pixels:
        for index in torch.arange(len(part)).split(1024):
            digest.update(part.rows.gather(index).contiguous().numpy().data)
    return digest.hexdigest()


def _find_mismatch(opened: Sequence[_OpenedRun]) -> str:
    """Describe why the runs cannot be compared by a test; empty if they can.

    Runs with several splits of the data (`data.seed`) have several sets of test images: it is
    enough that each recipe was evaluated on the same sets.
    """
    first = opened[0]
    for run in opened[1:]:
        unshared = {*first.loaded.classes} ^ {*run.loaded.classes}
        if unshared:
            return (
                f"{first.run_dir.name} and {run.run_dir.name} don't have the same classes: "
                f"{', '.join(sorted(unshared)[:6])}{' ...' * (len(unshared) > 6)}"
            )
    images_by_recipe: dict[str, set[str]] = {}
    for run in opened:
        images_by_recipe.setdefault(run.recipe_digest, set()).add(run.images)
    image_sets = {frozenset(images) for images in images_by_recipe.values()}
    single_recipe_differs = len(images_by_recipe) == 1 and len(next(iter(image_sets))) > 1
    if single_recipe_differs or len(image_sets) > 1:
        described = dict.fromkeys(
            f"{run.eval_split.name} ({len(run.eval_split.part):,} images, {run.images[:8]})"
            for run in opened
        )
        return f"the runs are not evaluated on the same images: {' and '.join([*described][:3])}"
    return ""


def _evaluate_run(run: _OpenedRun, device: str) -> Candidate:
    run_dir = run.run_dir
    loaded = load_model(run_dir.model_path)
    print_status(f"evaluating [bold]{escape(run_dir.name)}[/]")
    result = evaluate_split(
        run_dir, loaded, run.eval_split, device, measure_unlike=False, draw=False
    )
    pre = loaded.preprocessing
    shape = (pre.channels, pre.image_size, pre.image_size)
    return Candidate(
        name=run_dir.name,
        recipe=_comparable_recipe(loaded.model_metadata),
        evaluation=result.evaluation,
        images=run.images,
        labels=result.labels,
        preds=result.scores.argmax(1),
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        flops=inference.flops(loaded.model, shape, device),
        file_bytes=run_dir.model_path.stat().st_size,
        metadata=run_dir.metadata(),
        epochs=run_dir.metrics(),
    )


def _limits(opened: Sequence[_OpenedRun], mismatch: str, split: str) -> list[str]:
    """Return notes on what limits the comparison of these runs on these images."""
    notes = []
    formats = sorted({run.input_format for run in opened})
    if mismatch:
        notes.append(f"{mismatch}; so nothing is tested")
    elif len(formats) > 1:
        notes.append(
            f"the models see the images differently ({'; '.join(formats)}): only names and labels "
            "show that they are the same images"
        )
    metadata = {run.run_dir.name: run.run_dir.metadata() for run in opened}
    unfinished = [n for n, each in metadata.items() if each and each.get("status") != "finished"]
    if unfinished:
        notes.append(f"training not finished: {', '.join(unfinished)}")
    if split != "test" and opened[0].eval_split.own:
        why = "were used to choose the epoch" if split == "val" else "were used for training"
        notes.append(f"the {split} images {why}: the accuracies are optimistic")
    return notes


def _interpretation(candidates: Sequence[Candidate], verdicts: Sequence[Verdict]) -> list[str]:
    """Return notes on what the verdicts mean."""
    notes = []
    seeds = {candidate.seeds for candidate in candidates}
    single_recipe = len({without_seeds(candidate.recipe) for candidate in candidates}) == 1
    if single_recipe and len(seeds) == len(candidates):
        mean, sd = metrics.mean_sd([candidate.evaluation.accuracy for candidate in candidates])
        assert sd is not None
        notes.append(
            f"one recipe with {len(seeds)} seeds: accuracy {100 * mean:.2f} ± {100 * sd:.2f} % "
            "(mean ± sd)"
        )
    elif any(verdict.test == "images" for verdict in verdicts):
        notes.append(
            "McNemar's test compares two trained models; another seed may reverse a small "
            "difference: compare several seeds (train --seeds 5) to compare recipes"
        )
    if len(verdicts) > 1:
        notes.append("each interval is a 95% interval by itself; p values are corrected (Holm)")
    return notes


def _plot(title: str, groups: Sequence[Group], verdicts: Sequence[Verdict]) -> list[Path]:
    names = [member.name for group in groups for member in group.members]
    folder = f"compare-{'-'.join(names[:MAX_NAMED_RUNS])}"
    if len(names) > MAX_NAMED_RUNS:  # a name of bounded length for each set of runs
        others = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:6]
        folder = f"compare-{names[0]}-and-{len(names) - 1}-others-{others}"
    return run_plots.plot_comparison(
        PLOTS_DIR / safe_name(folder),
        title,
        {group.name: [m.epochs for m in group.members if m.epochs] for group in groups},
        {v.name: (v.difference, v.interval95, bool(v.differs)) for v in verdicts},
        groups[0].name,
    )

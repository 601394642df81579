"""Comparing runs: one table, curves overlaid, and whether they differ by more than chance.

Runs are compared on the very same images. Which these are is known before anything is measured,
so that a comparison that is refused costs no look at a test split.
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

from convlens import metrics, run, run_plots, serialization
from convlens.device import preserve_torch_settings, select_device
from convlens.engine import inference
from convlens.errors import ConvlensError, DataError, ModelFileError, UsageError, lookup
from convlens.evaluation import (
    SPLIT_NAMES,
    EvalSplit,
    Evaluation,
    evaluate_split,
    load_eval_split,
    split_hash,
)
from convlens.recipe import Recipe
from convlens.run import LoadedModel, RunDir
from convlens.utils.console import print_status, quiet_mode

# ---- verdicts ----------------------------------------
# What is said when runs are compared: which is more accurate, by how much, how surely.
#
# `comparison.py` measures the runs; here they are grouped by recipe and set against each other.

ALPHA = 0.05


@dataclass(frozen=True)
class Candidate:
    """A run that was measured.

    Attributes:
        images: fingerprint of the images and labels it was judged by.
        right: bool `[N]`, in the order of these images.
        flops: of one image, a multiplication with its addition as two.
        epochs: the rows of its `metrics.csv`; none of a bare model file.
        facts: what its `run.json` says; empty for a bare model file.
    """

    name: str
    recipe: Recipe
    evaluation: Evaluation
    images: str
    right: np.ndarray
    parameters: int
    flops: int
    file_bytes: int
    facts: Mapping[str, Any] = field(repr=False)
    epochs: Sequence[Mapping[str, float]] = field(repr=False)

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the split and of everything else."""
        return self.recipe.data.seed, self.recipe.train.seed

    @property
    def training_seconds(self) -> float | None:
        value = self.facts.get("training_seconds")
        return None if value is None else float(value)

    @property
    def training_speed(self) -> float | None:
        """Images a second in training, over all epochs."""
        rows = self.epochs
        images = sum(row["images_per_second"] * row["seconds"] for row in rows)
        return images / sum(row["seconds"] for row in rows) if rows else None

    def to_dict(self) -> dict[str, Any]:
        keys = ("n", "correct", "accuracy", "loss", "ece", "looks", "images_per_second")
        return {
            "run": self.name,
            **{key: getattr(self.evaluation, key) for key in keys},
            "interval95": list(self.evaluation.interval95),
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
    """Runs of one recipe that differ in their seeds only; mostly it is one run."""

    name: str
    members: Sequence[Candidate]

    @cached_property
    def accuracies(self) -> list[float]:
        return [member.evaluation.accuracy for member in self.members]

    @property
    def interval95(self) -> tuple[float, float] | None:
        """Wilson's, of a single run: several are no single draw of images."""
        (first, *more) = self.members
        return None if more else first.evaluation.interval95

    def mean_of(self, key: str) -> float | None:
        """Mean of a number over its runs; None if one of them doesn't know it."""
        values = [member.to_dict()[key] for member in self.members]
        return None if None in values else sum(values) / len(values)

    def to_dict(self) -> dict[str, Any]:
        mean, sd = metrics.mean_sd(self.accuracies)
        return {
            "name": self.name,
            "accuracy": mean,
            "sd": sd,
            "interval95": list(self.interval95) if self.interval95 else None,
            "runs": [member.to_dict() for member in self.members],
        }


@dataclass(frozen=True)
class Verdict:
    """One group against the first; `difference` is its accuracy less that of the reference.

    Attributes:
        test: `images` (McNemar's exact test), `seeds` (Student's t of pairs with the same seed),
            `means` (Welch's t), or `none`.
        p: two-sided; `p_holm` is corrected for the number of verdicts, and decides.
        details: images that only one has right (`images`), or the numbers of seeds.
        why: why there is no test.
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

    @property
    def differs(self) -> bool | None:
        """Whether they can be told apart; None without a test."""
        return None if self.p_holm is None else self.p_holm < ALPHA

    @property
    def sentence(self) -> str:
        points = 100 * self.difference
        if self.differs is None:
            measured = f"{self.name} measured {points:+.2f} points against {self.reference}"
            return f"no verdict on {self.name} and {self.reference}: {self.why} ({measured})"
        assert self.p_holm is not None
        said = f"{_p(self.p_holm)} ({self._how()})"
        if not self.differs:
            return (
                f"{self.name} and {self.reference} are not distinguishable: {points:+.2f} points "
                f"for {self.name} (95% interval {_ends(self.interval95)}), {said}"
            )
        better, worse, ends = self.name, self.reference, self.interval95
        if points < 0:
            better, worse = worse, better
            ends = (-ends[1], -ends[0]) if ends else None
        return (
            f"{better} is more accurate than {worse} by {abs(points):.2f} points "
            f"(95% interval {_ends(ends)}), {said}"
        )

    def _how(self) -> str:
        corrected = ""
        if self.p is not None and self.p_holm != self.p:
            corrected = f"; by itself {_p(self.p)}, corrected by Holm"
        of = self.details
        if self.test == "images":
            return (
                f"McNemar's exact test on {of['n']:,} images: {of['only_this']:,} right only by "
                f"{self.name}, {of['only_reference']:,} only by {self.reference}{corrected}"
            )
        if self.test == "seeds":
            return f"paired t over {of['seeds']} seeds{corrected}"
        return f"Welch's t over {of['seeds']} and {of['reference_seeds']} seeds{corrected}"

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        if self.interval95:
            content["interval95"] = list(self.interval95)
        return {**content, "differs": self.differs, "sentence": self.sentence}


def without_seeds(recipe: Recipe) -> str:
    """The digest of all but the seeds, and the memory format, which is chosen by timing."""
    plain = {"train.seed": 0, "data.seed": 0, "train.memory_format": "auto"}
    return recipe.replace(**plain).digest()


def group_by_recipe(candidates: Sequence[Candidate]) -> list[Group]:
    """Runs whose recipes are the same but for `train.seed` and `data.seed` belong together.

    If all of them do, each is a group of its own: then it is the runs that are compared.
    """
    same: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        same.setdefault(without_seeds(candidate.recipe), []).append(candidate)
    if len(same) == 1:
        return [Group(candidate.name, [candidate]) for candidate in candidates]
    groups: list[Group] = []
    taken = [members[0].name for members in same.values() if len(members) == 1]
    for members in same.values():
        name = members[0].name
        if len(members) > 1:
            # The seed 0 of `train --seeds` has the recipe's name, without a hash or seed.
            run_name = min(members, key=lambda m: m.seeds).recipe.name
            name = run_name if run_name not in taken else name
            taken.append(name)
            name = f"{name} ({len(members)} seeds)"
        groups.append(Group(name, members))
    return groups


def compare_groups(groups: Sequence[Group], *, same_images: bool) -> list[Verdict]:
    """Each group against the first, by the best test there is.

    Over seeds where both have several: as pairs if the seeds are the same, as two means
    otherwise. On the images where there is one run on either side: then it is two models that
    are compared, and not what their recipes would give with other seeds.
    """
    first, *others = groups
    found = [_against(first, other, same_images) for other in others]
    corrected = metrics.holm_adjust([verdict.p for verdict in found])
    return [replace(verdict, p_holm=p) for verdict, p in zip(found, corrected, strict=True)]


def _against(reference: Group, group: Group, same_images: bool) -> Verdict:
    ours = {member.seeds: member for member in group.members}
    theirs = {member.seeds: member for member in reference.members}
    if not same_images:
        gain = metrics.mean_sd(group.accuracies)[0] - metrics.mean_sd(reference.accuracies)[0]
        return _untested(group.name, reference.name, gain)
    if min(len(group.members), len(reference.members)) < 2:
        seeds = next((s for s in ours if s in theirs), None)
        mine = group.members[0] if seeds is None else ours[seeds]
        its = reference.members[0] if seeds is None else theirs[seeds]
        return _on_images(its, mine)
    if ours.keys() == theirs.keys() and len(ours) == len(group.members) == len(reference.members):
        before = [theirs[seeds].evaluation.accuracy for seeds in ours]
        after = [member.evaluation.accuracy for member in ours.values()]
        found = metrics.paired_difference(before, after)
        test, details = "seeds", {"seeds": len(after)}
    else:
        found = metrics.welch_difference(reference.accuracies, group.accuracies)
        test = "means"
        details = {"seeds": len(group.members), "reference_seeds": len(reference.members)}
    why = "" if found.p is not None else "the seeds differ by nothing, so there is no spread"
    return Verdict(group.name, reference.name, test, *found, details, why=why)


def _untested(name: str, reference: str, gain: float) -> Verdict:
    why = "they were judged by different images"
    return Verdict(name, reference, "none", gain, None, None, {}, why=why)


def _on_images(reference: Candidate, candidate: Candidate) -> Verdict:
    if reference.images != candidate.images:
        gain = candidate.evaluation.accuracy - reference.evaluation.accuracy
        return _untested(candidate.name, reference.name, gain)
    mine, its = candidate.right, reference.right
    both, only_its = int((mine & its).sum()), int((its & ~mine).sum())
    only_mine, neither = int((mine & ~its).sum()), int((~mine & ~its).sum())
    found = metrics.difference_on_images(both, only_its, only_mine, neither)
    details = {
        "n": len(mine),
        "both": both,
        "only_this": only_mine,
        "only_reference": only_its,
        "neither": neither,
    }
    return Verdict(candidate.name, reference.name, "images", *found, details)


def _p(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.2g}"


def _ends(interval: tuple[float, float] | None) -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return "unknown"
    low, high = interval
    return f"{100 * low:.2f} to {100 * high:.2f}"


MAX_NAMED = 3  # runs in the name of the folder of plots


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: what `compare` returns.

    Attributes:
        groups: one a recipe, in the order of the runs; the first is what others are set against.
        verdicts: one for each group but the first, each with its `sentence`.
        notes: what a reader must know to trust them.
        plots: the pictures.
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


@dataclass(frozen=True)
class _OpenedRun:
    """A run, and the images it is to be judged by."""

    run_dir: RunDir
    known: LoadedModel  # without its network: many of them would fill the memory
    judged: EvalSplit
    images: str = ""

    @property
    def seedless(self) -> str:
        return without_seeds(serialization.recipe_from_metadata(self.known.model_metadata))


@preserve_torch_settings()
def compare(
    names: Sequence[str | Path | RunDir],
    split: str = "test",
    *,
    data: str | Path | None = None,
    force: bool = False,
    on: str | None = None,
    quiet: bool = False,
) -> Comparison:
    """Measures runs on the same images and says which can be told apart, against the first one.

    Args:
        names: at least two runs: names, folders or model files.
        split: `test`, `val` or `train`; each run's look at it is logged as by `evaluate`.
        data: judge all of them by another data set.
        force: go on where images or classes differ; then nothing is tested.
        on: device.

    Raises:
        UsageError: fewer than two runs, unknown names; ModelFileError: a run without weights;
        DataError: different images or classes, or a run whose images changed or have moved.
    """
    lookup(dict.fromkeys(SPLIT_NAMES), split, "split")
    run_dirs = _open_runs(names)
    where = select_device(on)
    with quiet_mode(quiet):
        entrants = _unique_runs(run_dirs, split, data, where)
        differing = _differing(entrants)
        if differing and not force:
            raise DataError(
                differing,
                where=", ".join(run_dir.name for run_dir in run_dirs)[:200],
                fix="judge all of them by one set with --data, or --force: then nothing is tested",
            )
        measured = [_measured(entrant, split, where) for entrant in entrants]
    groups = group_by_recipe(measured)
    verdicts = compare_groups(groups, same_images=not differing)
    notes = [*_limits(entrants, differing, split), *_readings(measured, groups, verdicts)]
    data_name = " and ".join(dict.fromkeys(entrant.judged.name for entrant in entrants))
    drawn = _plots(data_name, groups, verdicts)
    return Comparison(split, data_name, groups, verdicts, notes, drawn)


def _open_runs(names: Sequence[str | Path | RunDir]) -> list[RunDir]:
    """The runs; everything that is wrong with their names at once."""
    run_dirs: dict[Path, RunDir] = {}
    wrong: list[ConvlensError] = []
    for name in names:
        try:
            run_dir = name if isinstance(name, RunDir) else run.find_run(name)
            if not run_dir.model_path.is_file():
                raise ModelFileError(
                    f"run {run_dir.name!r} has no weights yet",
                    where=str(run_dir.path),
                    fix="train it further with the same command, or leave it out",
                )
            run_dirs.setdefault(run_dir.model_path.resolve(), run_dir)
        except ConvlensError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        fixes = dict.fromkeys(error.fix for error in wrong if error.fix)
        raise UsageError("; ".join(error.what for error in wrong), fix="; ".join(fixes)[:300])
    if len(run_dirs) < 2:
        given = [run_dir.name for run_dir in run_dirs.values()]
        known = [other.name for other in run.list_runs() if other.name not in given]
        there = f"; others here: {', '.join(known[:6])}" if known else ""
        raise UsageError(
            f"comparing needs at least two different runs, got {len(run_dirs)}",
            fix=f"name another one{there}; `convlens evaluate RUN` measures one",
        )
    return list(run_dirs.values())


def _unique_runs(
    run_dirs: Sequence[RunDir], split: str, data: str | Path | None, where: str
) -> list[_OpenedRun]:
    """Each run with its images, which are opened once where several runs share them."""
    opened: dict[str, EvalSplit] = {}
    found = []
    for run_dir in run_dirs:
        loaded = run.load_model(run_dir.model_path)
        model_metadata = loaded.model_metadata
        config = serialization.recipe_from_metadata(model_metadata).data.model_dump(mode="json")
        key = json.dumps(
            [
                config,
                model_metadata["data"],
                model_metadata["classes"],
                model_metadata["preprocessing"],
            ]
        )
        if key not in opened:
            opened[key] = load_eval_split(loaded, split, data=data, on=where)
        found.append(_OpenedRun(run_dir, replace(loaded, model=nn.Identity()), opened[key]))
    pixels = len(_sizes(found)) == 1
    prints: dict[int, str] = {}
    for entrant in found:
        if id(entrant.judged) not in prints:
            prints[id(entrant.judged)] = _fingerprint(entrant, pixels)
    return [replace(entrant, images=prints[id(entrant.judged)]) for entrant in found]


def _sizes(entrants: Sequence[_OpenedRun]) -> set[str]:
    """How the models see images, e.g. `32 px, 3 channels, crop`."""
    seen = [entrant.known.preprocessing for entrant in entrants]
    return {f"{pre.image_size} px, {pre.channels} channels, {pre.fit}" for pre in seen}


def _fingerprint(entrant: _OpenedRun, pixels: bool) -> str:
    """SHA-256 over the images' ids and class names and, if all models see them alike, pixels."""
    part = entrant.judged.part
    digest = hashlib.sha256(split_hash(part, entrant.known.classes).encode())
    if pixels:
        for index in torch.arange(len(part)).split(1024):
            digest.update(part.rows.gather(index).contiguous().numpy().data)
    return digest.hexdigest()


def _differing(entrants: Sequence[_OpenedRun]) -> str:
    """What keeps the runs from being compared; empty if nothing does.

    Runs with several splits of the data (`data.seed`) are judged by as many sets of test images:
    it is enough that each recipe was judged by the same ones.
    """
    first, *others = entrants
    for other in others:
        unlike = {*first.known.classes} ^ {*other.known.classes}
        if unlike:
            return (
                f"{first.run_dir.name} and {other.run_dir.name} don't know the same classes: "
                f"{', '.join(sorted(unlike)[:6])}{' ...' * (len(unlike) > 6)}"
            )
    sets: dict[str, set[str]] = {}
    for entrant in entrants:
        sets.setdefault(entrant.seedless, set()).add(entrant.images)
    one = len(sets) == 1 and len(sets[first.seedless]) > 1
    if one or len({frozenset(images) for images in sets.values()}) > 1:
        told = dict.fromkeys(
            f"{e.judged.name} ({len(e.judged.part):,} images, {e.images[:8]})" for e in entrants
        )
        return f"the runs are not judged by the same images: {' and '.join([*told][:3])}"
    return ""


def _measured(entrant: _OpenedRun, split: str, where: str) -> Candidate:
    run_dir = entrant.run_dir
    loaded = run.load_model(run_dir.model_path)
    print_status(f"evaluating [bold]{escape(run_dir.name)}[/]")
    result = evaluate_split(run_dir, loaded, entrant.judged, split, where, draw=False)
    pre = loaded.preprocessing
    shape = (pre.channels, pre.image_size, pre.image_size)
    return Candidate(
        name=run_dir.name,
        recipe=serialization.recipe_from_metadata(loaded.model_metadata),
        evaluation=result.evaluation,
        images=entrant.images,
        right=result.scores.argmax(1) == result.labels,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        flops=inference.flops(loaded.model, shape, where),
        file_bytes=run_dir.model_path.stat().st_size,
        facts=run_dir.metadata(),
        epochs=run_dir.metrics(),
    )


def _limits(entrants: Sequence[_OpenedRun], differing: str, split: str) -> list[str]:
    """What is wrong with comparing these runs by these images."""
    notes = []
    if differing:
        notes.append(f"{differing}; so nothing is tested")
    elif len(_sizes(entrants)) > 1:
        notes.append(
            f"the models see the images differently ({'; '.join(sorted(_sizes(entrants)))}): that "
            "they are the same goes by their names and labels"
        )
    facts = {entrant.run_dir.name: entrant.run_dir.metadata() for entrant in entrants}
    half = [name for name, its in facts.items() if its and its.get("status") != "finished"]
    if half:
        notes.append(f"not trained to the end: {', '.join(half)}")
    if split != "test":
        why = "chose the epoch" if split == "val" else "were learned from"
        notes.append(f"the {split} images {why}: the accuracies are flattering")
    return notes


def _readings(
    measured: Sequence[Candidate], groups: Sequence[Group], verdicts: Sequence[Verdict]
) -> list[str]:
    """What the verdicts mean and what they don't."""
    notes = []
    seeds = {candidate.seeds for candidate in measured}
    one = len({without_seeds(candidate.recipe) for candidate in measured}) == 1
    if one and len(seeds) == len(measured):
        mean, sd = metrics.mean_sd([candidate.evaluation.accuracy for candidate in measured])
        assert sd is not None
        notes.append(
            f"one recipe with {len(seeds)} seeds: accuracy {100 * mean:.2f} ± {100 * sd:.2f} % "
            "(mean ± sd)"
        )
    elif any(verdict.test == "images" for verdict in verdicts):
        notes.append(
            "McNemar's test compares two trained models; another seed may turn a small difference "
            "round: compare several seeds (train --seeds 5) to compare recipes"
        )
    if len(verdicts) > 1:
        notes.append("each interval is 95% by itself; p values are corrected for their number")
    return notes


def _plots(title: str, groups: Sequence[Group], verdicts: Sequence[Verdict]) -> list[Path]:
    names = [member.name for group in groups for member in group.members]
    folder = f"compare-{'-'.join(names[:MAX_NAMED])}"
    if len(names) > MAX_NAMED:  # a name of its own for each set of runs, of bounded length
        others = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:6]
        folder = f"compare-{names[0]}-and-{len(names) - 1}-others-{others}"
    return run_plots.plot_comparison(
        run.PLOTS_DIR / run.safe_name(folder),
        title,
        {group.name: [m.epochs for m in group.members if m.epochs] for group in groups},
        {v.name: (v.difference, v.interval95, bool(v.differs)) for v in verdicts},
        groups[0].name,
    )

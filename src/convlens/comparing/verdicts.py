"""What is said when runs are compared: which is more accurate, by how much, how surely.

`comparison.py` measures the runs; here they are grouped by recipe and set against each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from convlens import metrics
from convlens.comparing import differences
from convlens.evaluation import Evaluation
from convlens.recipe import Recipe

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


def seedless(recipe: Recipe) -> str:
    """The digest of all but the seeds, and the memory format, which is chosen by timing."""
    plain = {"train.seed": 0, "data.seed": 0, "train.memory_format": "auto"}
    return recipe.replace(**plain).digest()


def grouped(candidates: Sequence[Candidate]) -> list[Group]:
    """Runs whose recipes are the same but for `train.seed` and `data.seed` belong together.

    If all of them do, each is a group of its own: then it is the runs that are compared.
    """
    same: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        same.setdefault(seedless(candidate.recipe), []).append(candidate)
    if len(same) == 1:
        return [Group(candidate.name, [candidate]) for candidate in candidates]
    groups: list[Group] = []
    taken = [members[0].name for members in same.values() if len(members) == 1]
    for members in same.values():
        name = members[0].name
        if len(members) > 1:
            # The seed 0 of `train --seeds` has the recipe's name, without a hash or seed.
            called = min(members, key=lambda m: m.seeds).recipe.name
            name = called if called not in taken else name
            taken.append(name)
            name = f"{name} ({len(members)} seeds)"
        groups.append(Group(name, members))
    return groups


def judged(groups: Sequence[Group], *, same_images: bool) -> list[Verdict]:
    """Each group against the first, by the best test there is.

    Over seeds where both have several: as pairs if the seeds are the same, as two means
    otherwise. On the images where there is one run on either side: then it is two models that
    are compared, and not what their recipes would give with other seeds.
    """
    first, *others = groups
    found = [_against(first, other, same_images) for other in others]
    corrected = differences.holm([verdict.p for verdict in found])
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
        found = differences.paired_by_seed(before, after)
        test, details = "seeds", {"seeds": len(after)}
    else:
        found = differences.welch(reference.accuracies, group.accuracies)
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
    found = differences.on_images(both, only_its, only_mine, neither)
    details = {"n": len(mine), "both": both, "only_this": only_mine,
               "only_reference": only_its, "neither": neither}  # fmt: skip
    return Verdict(candidate.name, reference.name, "images", *found, details)


def _p(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.2g}"


def _ends(interval: tuple[float, float] | None) -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return "unknown"
    low, high = interval
    return f"{100 * low:.2f} to {100 * high:.2f}"

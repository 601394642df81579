"""What several runs reached, side by side: means, deviations, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from convlens import metrics
from convlens.evaluation import Evaluation
from convlens.recipe import Recipe
from convlens.run import RunFolder

Row = dict[str, float]


@dataclass(frozen=True)
class Planned:
    """A run to be trained: its recipe, named after the run, and what it differs in."""

    recipe: Recipe
    plain: bool
    variant: str | None
    data_seed: int
    seed: int
    fold: int | None


@dataclass(frozen=True)
class Outcome:
    """A trained run and one look at a split.

    `chooser` is the run that found the number of epochs: the run itself unless it is a refit.
    """

    planned: Planned
    place: RunFolder
    chooser: RunFolder
    looked: Evaluation

    @cached_property
    def facts(self) -> dict[str, Any]:
        return self.place.facts()

    @cached_property
    def history(self) -> list[Row]:
        """The epochs in which validation was looked at."""
        return self.chooser.metrics()

    @property
    def epochs(self) -> tuple[int, int]:
        """The epoch that was chosen, and how many were run to choose it."""
        facts = self.chooser.facts()
        return int(facts["kept_epoch"]), int(facts["epochs"])

    @property
    def val_accuracy(self) -> float | None:
        """That of the chosen epoch; None without a validation split."""
        value = next(r["val_accuracy"] for r in self.history if r["epoch"] == self.epochs[0])
        return None if math.isnan(value) else value

    def total(self, key: str) -> float | None:
        """Seconds of the run, and of its chooser where that is another one."""
        places = [self.place] if self.chooser is self.place else [self.place, self.chooser]
        return added([place.facts().get(key) for place in places])

    def to_dict(self) -> dict[str, Any]:
        kept, epochs = self.epochs
        return {
            "run": self.place.name,
            "path": str(self.place.path),
            "chosen_by": self.chooser.name,
            "data_seed": self.planned.data_seed,
            "seed": self.planned.seed,
            "fold": self.planned.fold,
            "accuracy": self.looked.accuracy,
            "interval95": list(self.looked.interval95),
            "n": self.looked.n,
            "correct": self.looked.correct,
            "loss": self.looked.loss,
            "val_accuracy": self.val_accuracy,
            "kept_epoch": kept,
            "epochs": epochs,
            "parameters": self.facts["parameters"],
            "trainable_parameters": trainable(self.facts),
            "training_seconds": self.total("training_seconds"),
            "cpu_seconds": self.total("cpu_seconds"),
        }


@dataclass(frozen=True)
class Repeat:
    """One split and seed: a run, or the K runs of a cross-validation.

    Of these each image is judged once, by the model that didn't train on it, so they count as
    one look at all of them.
    """

    outcomes: Sequence[Outcome]

    @property
    def n(self) -> int:
        return sum(o.looked.n for o in self.outcomes)

    @property
    def correct(self) -> int:
        return sum(o.looked.correct for o in self.outcomes)

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def loss(self) -> float:
        return sum(o.looked.loss * o.looked.n for o in self.outcomes) / self.n

    def total(self, key: str) -> float | None:
        return added([o.total(key) for o in self.outcomes])


@dataclass(frozen=True)
class Summary:
    """What one variant reached; accuracies are shares from 0 to 1.

    `sd` is the sample deviation (n - 1) over all splits and seeds.
    """

    variant: str | None
    outcomes: Sequence[Outcome]

    @property
    def repeats(self) -> list[Repeat]:
        cells = dict.fromkeys((o.planned.data_seed, o.planned.seed) for o in self.outcomes)
        return [
            Repeat([o for o in self.outcomes if (o.planned.data_seed, o.planned.seed) == cell])
            for cell in cells
        ]

    @property
    def n(self) -> int:
        """How many images a split and seed is judged by."""
        return self.repeats[0].n

    @property
    def accuracies(self) -> list[float]:
        """One a split and seed; of a cross-validation over all its out-of-fold images."""
        return [repeat.accuracy for repeat in self.repeats]

    @property
    def mean(self) -> float:
        return metrics.mean_sd(self.accuracies)[0]

    @property
    def sd(self) -> float | None:
        return metrics.mean_sd(self.accuracies)[1]

    @property
    def interval95(self) -> tuple[float, float] | None:
        """Wilson's, where there is one split and seed: several are no single draw of images."""
        (first, *more) = self.repeats
        return None if more else metrics.wilson_interval(first.correct, first.n)

    @property
    def parts(self) -> tuple[float, float] | None:
        """The deviation between splits and that between seeds, where there are several of both."""
        of: dict[int, list[float]] = {}
        for repeat in self.repeats:
            of.setdefault(repeat.outcomes[0].planned.data_seed, []).append(repeat.accuracy)
        if len(of) < 2 or min(map(len, of.values())) < 2:
            return None
        return metrics.variance_parts(list(of.values()))

    @property
    def val_accuracy(self) -> tuple[float, float | None] | None:
        """Mean and deviation of the chosen epochs' validation accuracy."""
        values = [o.val_accuracy for o in self.outcomes]
        known = [value for value in values if value is not None]
        return metrics.mean_sd(known) if len(known) == len(values) else None

    def over(self, other: Summary) -> tuple[float, float | None]:
        """Mean and sample deviation of how much more accurate this is than `other`.

        Both are differences within a split and seed, which two variants have in common: what a
        lucky split or seed gives to both falls out.
        """
        pairs = zip(self.accuracies, other.accuracies, strict=True)
        return metrics.mean_sd([mine - its for mine, its in pairs])

    def mean_of(self, key: str) -> float | None:
        """Mean over splits and seeds of `training_seconds` or `cpu_seconds`."""
        spent = added([repeat.total(key) for repeat in self.repeats])
        return None if spent is None else spent / len(self.repeats)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; lists have one entry for each split and seed, `runs` one a run."""
        repeats, parts = self.repeats, self.parts
        firsts = [repeat.outcomes[0] for repeat in repeats]
        validated = self.val_accuracy
        return {
            "variant": self.variant,
            "mean": self.mean,
            "sd": self.sd,
            "sd_between_splits": parts[0] if parts else None,
            "sd_between_seeds": parts[1] if parts else None,
            "interval95": list(self.interval95) if self.interval95 else None,
            "n": self.n,
            "accuracies": self.accuracies,
            "losses": [repeat.loss for repeat in repeats],
            "data_seeds": [o.planned.data_seed for o in firsts],
            "seeds": [o.planned.seed for o in firsts],
            "val_accuracy": validated[0] if validated else None,
            "val_accuracy_sd": validated[1] if validated else None,
            "parameters": firsts[0].facts["parameters"],
            "trainable_parameters": trainable(firsts[0].facts),
            "training_seconds": [repeat.total("training_seconds") for repeat in repeats],
            "cpu_seconds": [repeat.total("cpu_seconds") for repeat in repeats],
            "runs": [outcome.to_dict() for outcome in self.outcomes],
        }


@dataclass(frozen=True)
class Table:
    """Several runs side by side; `split` is the one that the accuracies are of."""

    name: str
    split: str
    repeat_splits: int
    seeds: int
    folds: int | None
    refit: bool
    outcomes: Sequence[Outcome]
    plot: Path

    @property
    def summaries(self) -> list[Summary]:
        """One a variant, in their order."""
        names = dict.fromkeys(o.planned.variant for o in self.outcomes)
        return [
            Summary(name, [o for o in self.outcomes if o.planned.variant == name]) for name in names
        ]

    @property
    def flattered(self) -> bool:
        """Whether the images that the accuracies are of have chosen the epoch, too."""
        kept = {o.planned.recipe.train.keep for o in self.outcomes}
        return self.split == "val" and "best" in kept

    def gains(self) -> list[tuple[float, float | None]]:
        """For each variant, how much more accurate it is than the first (`Summary.over`)."""
        first, *others = self.summaries
        return [(0.0, None), *(summary.over(first) for summary in others)]

    def histories(self) -> dict[str, list[list[Row]]]:
        """The epochs of every run by variant."""
        return {s.variant or "": [o.history for o in s.outcomes] for s in self.summaries}

    def repeats_in_words(self) -> str:
        """What means and deviations are over, e.g. `2 splits x 3 seeds`; empty if nothing."""
        counts = {"split": self.repeat_splits, "seed": self.seeds, "fold": self.folds or 1}
        return " × ".join(f"{n} {what}s" for what, n in counts.items() if n > 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "split": self.split,
            "repeat_splits": self.repeat_splits,
            "seeds": self.seeds,
            "folds": self.folds,
            "refit": self.refit,
            "flattered": self.flattered,
            "plot": str(self.plot),
            "variants": [
                summary.to_dict() | {"over_first": gain, "over_first_sd": sd}
                for summary, (gain, sd) in zip(self.summaries, self.gains(), strict=True)
            ],
        }


def added(values: Sequence[float | None]) -> float | None:
    """Their sum; None if one of them isn't known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def trainable(facts: dict[str, Any]) -> int:
    """How many weights were trained; all of them in runs that don't say."""
    return int(facts.get("trainable_parameters", facts["parameters"]))

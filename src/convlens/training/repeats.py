"""Several runs of one recipe side by side: its variants, splits of the data, seeds, folds.

`expand` lists the runs and `train_many` trains them and puts them in one table. Each is an ordinary
run: the same command finds or continues it. A single run is a single sample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from convlens import distributed, evaluation, metrics, run, run_plots
from convlens.data.sources import find_source
from convlens.data.splits import is_drawn_split
from convlens.errors import UsageError
from convlens.evaluation import Evaluation
from convlens.recipe import Recipe
from convlens.run import RunDir
from convlens.training.resolve import ResolvedRecipe, validate_recipe
from convlens.training.train import train
from convlens.utils.console import print_status, quiet_mode

MAX_RUNS = 10_000  # runs of one command


def expand_runs(
    asked: Mapping[str | None, ResolvedRecipe],
    *,
    repeat_splits: int = 1,
    seeds: int = 1,
    folds: int | None = None,
    name: str | None = None,
) -> list[PlannedRun]:
    """Every variant x split x seed x fold as a run with a name of its own.

    Splits count from the recipe's `data.seed`, seeds from its `train.seed`. A run's name says
    only what it differs in: `x` for the recipe's own split and seed, `x-seed1`, `x-a-split2`.
    """
    several = len(asked) * repeat_splits * seeds * (folds or 1)
    if several > MAX_RUNS:
        raise UsageError(f"that would be {several:,} runs; {MAX_RUNS:,} at most go together")
    plans = []
    for variant, each in asked.items():
        data_seed, seed = each.recipe.data.seed, each.recipe.train.seed
        run_name = "-".join([name or each.recipe.name, *([variant] if variant else [])])
        cells = [
            (data_seed + split, seed + number, fold)
            for split in range(repeat_splits)
            for number in range(seeds)
            for fold in (range(folds) if folds else [None])
        ]
        for its_split, its_seed, fold in cells:
            changes: dict[str, Any] = {"data.seed": its_split, "train.seed": its_seed}
            its_name = run_name
            if its_split != data_seed:
                its_name += f"-split{its_split}"
            if its_seed != seed:
                its_name += f"-seed{its_seed}"
            if fold is not None:
                changes |= {"data.folds": folds, "data.fold": fold}
                its_name += f"-fold{fold}"
            recipe = each.recipe.replace(**changes).model_copy(update={"name": its_name})
            plain = each.plain or name is not None
            plans.append(PlannedRun(recipe, plain, variant, its_split, its_seed, fold))
    return plans


def train_many(
    asked: Mapping[str | None, ResolvedRecipe],
    *,
    repeat_splits: int = 1,
    seeds: int = 1,
    folds: int | None = None,
    refit: bool = False,
    name: str | None = None,
    fresh: bool = False,
    test: bool = True,
    on: str | None = None,
    quiet: bool = False,
) -> RunResults:
    """Trains every variant with every split, seed and fold, and puts them side by side.

    Args:
        asked: recipes by variant; a recipe without variants stands under None.
        repeat_splits: number of random splits of the data (`data.seed`, `data.seed` + 1, ...).
        seeds: different initial weights, order, augmentation and dropout (`train.seed`, ...).
        folds: K-fold cross-validation on all images but the test split, which stays sealed.
        refit: each run only finds the number of epochs; then one on training and validation
            images together trains for that many and is tested.
        name: stands for the recipe's name in those of the runs.
        test: the table is about the test split, else about validation.
        fresh, on, quiet: as in `training.train`.

    Raises:
        UsageError: before anything is trained, if a recipe or the combination can't be.
    """
    plans = expand_runs(asked, repeat_splits=repeat_splits, seeds=seeds, folds=folds, name=name)
    _check_plan(plans, repeat_splits=repeat_splits, folds=folds, refit=refit, test=test)
    test = test and folds is None
    outcomes = []
    with quiet_mode(quiet):
        for number, planned in enumerate(plans, 1):
            print_status(f"[bold]{planned.recipe.name}[/], {number} of {len(plans)}")
            run_dir = chooser = _train(planned.recipe, planned, fresh, on, quiet)
            if refit:
                run_dir = _train(
                    refit_on_all(planned.recipe.name, chooser), planned, fresh, on, quiet
                )
            looked = evaluation.evaluate(run_dir, "test" if test else "val", device=on, quiet=quiet)
            if len(plans) > 1:  # one run alone has its result in the table's last line
                print_status(evaluation.sentence({**looked.to_dict(), "own": True}))
            outcomes.append(RunOutcome(planned, run_dir, chooser, looked))
    first = next(iter(asked.values()))
    kinds = {"variants": len(asked) > 1, "splits": repeat_splits > 1, "seeds": seeds > 1}
    kinds |= {"folds": folds is not None, "refit": refit}
    run_name = name or first.recipe.name
    plot = _plot_folder(run_name, [kind for kind, there in kinds.items() if there], asked, plans)
    table = RunResults(
        name=run.safe_name(run_name),
        split="test" if test else "val",
        repeat_splits=repeat_splits,
        seeds=seeds,
        folds=folds,
        refit=refit,
        outcomes=outcomes,
        plot=plot / "curves.png",
    )
    if distributed.init_process_group().is_main_process:
        run_plots.plot_several(table.plot, table.histories(), run_name, table.repeats_in_words())
    return table


def refit_on_all(name: str, chooser: RunDir) -> Recipe:
    """The recipe of the run that trains on all that `chooser` had, for the epochs it chose."""
    resolved = chooser.recipe()
    changed = resolved.replace(
        **{
            "data.val_fraction": 0,
            "data.folds": None,
            "data.fold": 0,
            "train.epochs": int(chooser.metadata()["kept_epoch"]),
            "train.patience": None,
            "train.keep": "last",
        }
    )
    return changed.model_copy(update={"name": f"{name}-refit"})


def _train(recipe: Recipe, planned: PlannedRun, fresh: bool, on: str | None, quiet: bool) -> RunDir:
    return train(recipe, plain=planned.plain, fresh=fresh, test=False, on=on, quiet=quiet)


def _check_plan(
    plans: list[PlannedRun], *, repeat_splits: int, folds: int | None, refit: bool, test: bool
) -> None:
    """Refuses what would only turn out after hours of training."""
    if refit and folds is not None:
        raise UsageError(
            "--refit tests a model once, --folds keeps the test split sealed: one of them",
            fix="choose by --folds first, then --refit what was chosen",
        )
    if refit and not test:
        raise UsageError(
            "--refit leaves no validation split, so without the test split there is no number",
            fix="drop --no-test, or drop --refit",
        )
    for planned in plans:
        validate_recipe(planned.recipe)
        data = planned.recipe.data
        if not data.validates and (refit or not test):
            what = "--refit chooses epochs" if refit else "--no-test measures"
            raise UsageError(
                f"{what} by validation, but data.val_fraction=0",
                where=planned.recipe.name,
                fix="set data.val_fraction=0.15",
            )
        if refit and data.per_class is not None:
            raise UsageError(
                f"--refit adds the validation images, but data.per_class={data.per_class} would "
                "take as many as before",
                where=planned.recipe.name,
                fix="data.total_per_class counts training and validation images together",
            )
    data = plans[0].recipe.data
    if repeat_splits > 1:
        size = None if data.image_size == "auto" else int(data.image_size)
        source = find_source(data.name, count=data.count, image_size=size, group=data.group)
        if not is_drawn_split(data, source):
            raise UsageError(
                f"--repeat-splits {repeat_splits} would repeat one split: {data.name!r} comes "
                "with all its splits",
                fix="use --seeds, or draw training images with data.total_per_class",
            )


def _plot_folder(
    run_name: str,
    kinds: list[str],
    asked: Mapping[str | None, ResolvedRecipe],
    plans: list[PlannedRun],
) -> Path:
    """As for runs: a recipe that isn't as published gets six digits of its hash."""
    named = "-".join([run.safe_name(run_name), *kinds])
    if not plans[0].plain:
        digests = "".join(each.recipe.digest() for each in asked.values())
        named += f"-{hashlib.sha256(digests.encode()).hexdigest()[:6]}"
    return run.PLOTS_DIR / named


# ---- tabling ----------------------------------------
# What several runs reached, side by side: means, deviations, and where they come from.

MetricsRow = dict[str, float]


@dataclass(frozen=True)
class PlannedRun:
    """A run to be trained: its recipe, named after the run, and what it differs in."""

    recipe: Recipe
    plain: bool
    variant: str | None
    data_seed: int
    seed: int
    fold: int | None


@dataclass(frozen=True)
class RunOutcome:
    """A trained run and one look at a split.

    `chooser` is the run that found the number of epochs: the run itself unless it is a refit.
    """

    planned: PlannedRun
    run_dir: RunDir
    chooser: RunDir
    looked: Evaluation

    @cached_property
    def facts(self) -> dict[str, Any]:
        return self.run_dir.metadata()

    @cached_property
    def history(self) -> list[MetricsRow]:
        """The epochs in which validation was looked at."""
        return self.chooser.metrics()

    @property
    def epochs(self) -> tuple[int, int]:
        """The epoch that was chosen, and how many were run to choose it."""
        facts = self.chooser.metadata()
        return int(facts["kept_epoch"]), int(facts["epochs"])

    @property
    def val_accuracy(self) -> float | None:
        """That of the chosen epoch; None without a validation split."""
        value = next(r["val_accuracy"] for r in self.history if r["epoch"] == self.epochs[0])
        return None if math.isnan(value) else value

    def total(self, key: str) -> float | None:
        """Seconds of the run, and of its chooser where that is another one."""
        run_dirs = [self.run_dir] if self.chooser is self.run_dir else [self.run_dir, self.chooser]
        return add_fold_results([run_dir.metadata().get(key) for run_dir in run_dirs])

    def to_dict(self) -> dict[str, Any]:
        kept, epochs = self.epochs
        return {
            "run": self.run_dir.name,
            "path": str(self.run_dir.path),
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
            "trainable_parameters": trainable_parameters(self.facts),
            "training_seconds": self.total("training_seconds"),
            "cpu_seconds": self.total("cpu_seconds"),
        }


@dataclass(frozen=True)
class RepeatResult:
    """One split and seed: a run, or the K runs of a cross-validation.

    Of these each image is judged once, by the model that didn't train on it, so they count as
    one look at all of them.
    """

    outcomes: Sequence[RunOutcome]

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
        return add_fold_results([o.total(key) for o in self.outcomes])


@dataclass(frozen=True)
class VariantSummary:
    """What one variant reached; accuracies are shares from 0 to 1.

    `sd` is the sample deviation (n - 1) over all splits and seeds.
    """

    variant: str | None
    outcomes: Sequence[RunOutcome]

    @property
    def repeats(self) -> list[RepeatResult]:
        cells = dict.fromkeys((o.planned.data_seed, o.planned.seed) for o in self.outcomes)
        return [
            RepeatResult(
                [o for o in self.outcomes if (o.planned.data_seed, o.planned.seed) == cell]
            )
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
        return metrics.variance_components(list(of.values()))

    @property
    def val_accuracy(self) -> tuple[float, float | None] | None:
        """Mean and deviation of the chosen epochs' validation accuracy."""
        values = [o.val_accuracy for o in self.outcomes]
        known = [value for value in values if value is not None]
        return metrics.mean_sd(known) if len(known) == len(values) else None

    def over(self, other: VariantSummary) -> tuple[float, float | None]:
        """Mean and sample deviation of how much more accurate this is than `other`.

        Both are differences within a split and seed, which two variants have in common: what a
        lucky split or seed gives to both falls out.
        """
        pairs = zip(self.accuracies, other.accuracies, strict=True)
        return metrics.mean_sd([mine - its for mine, its in pairs])

    def mean_of(self, key: str) -> float | None:
        """Mean over splits and seeds of `training_seconds` or `cpu_seconds`."""
        spent = add_fold_results([repeat.total(key) for repeat in self.repeats])
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
            "trainable_parameters": trainable_parameters(firsts[0].facts),
            "training_seconds": [repeat.total("training_seconds") for repeat in repeats],
            "cpu_seconds": [repeat.total("cpu_seconds") for repeat in repeats],
            "runs": [outcome.to_dict() for outcome in self.outcomes],
        }


@dataclass(frozen=True)
class RunResults:
    """Several runs side by side; `split` is the one that the accuracies are of."""

    name: str
    split: str
    repeat_splits: int
    seeds: int
    folds: int | None
    refit: bool
    outcomes: Sequence[RunOutcome]
    plot: Path

    @property
    def summaries(self) -> list[VariantSummary]:
        """One a variant, in their order."""
        names = dict.fromkeys(o.planned.variant for o in self.outcomes)
        return [
            VariantSummary(name, [o for o in self.outcomes if o.planned.variant == name])
            for name in names
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

    def histories(self) -> dict[str, list[list[MetricsRow]]]:
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


def add_fold_results(values: Sequence[float | None]) -> float | None:
    """Their sum; None if one of them isn't known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def trainable_parameters(facts: dict[str, Any]) -> int:
    """How many weights were trained; all of them in runs that don't say."""
    return int(facts.get("trainable_parameters", facts["parameters"]))

"""Train a recipe several times: its variants, random splits of the data, seeds and folds.

`expand_runs` lists the runs, `train_many` trains them and summarizes them with means and standard
deviations. Each run is an ordinary one, which the same command finds or resumes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convlens import distributed, evaluation, metrics, run, run_plots
from convlens.data.sources import find_configured_source
from convlens.data.splits import is_drawn_split
from convlens.errors import UsageError, check_count
from convlens.evaluation import Evaluation
from convlens.recipe import Recipe
from convlens.run import RunDir, check_run_name
from convlens.training.resolve import ResolvedRecipe, validate_recipe
from convlens.training.train import train
from convlens.utils.console import message_scope, print_status, quiet_mode

MAX_RUNS = 10_000  # runs of one command


def expand_runs(
    recipes: Mapping[str | None, ResolvedRecipe],
    *,
    repeat_splits: int = 1,
    seeds: int = 1,
    folds: int | None = None,
    name: str | None = None,
) -> list[PlannedRun]:
    """Return a run for every combination of variant, split, seed and fold.

    Splits count from the `data.seed` of the recipe, seeds from its `train.seed`. The name of a run
    says only what differs: `x` for the recipe's own split and seed, `x-seed1`, `x-a-split2`.
    """
    count = len(recipes) * repeat_splits * seeds * (folds or 1)
    if count > MAX_RUNS:
        raise UsageError(f"{count:,} runs are too many for one command; the limit is {MAX_RUNS:,}")
    plans = []
    for variant, resolved in recipes.items():
        data_seed, seed = resolved.recipe.data.seed, resolved.recipe.train.seed
        base_name = "-".join([name or resolved.recipe.name, *([variant] if variant else [])])
        combinations = [
            (data_seed + split_offset, seed + seed_offset, fold)
            for split_offset in range(repeat_splits)
            for seed_offset in range(seeds)
            for fold in (range(folds) if folds else [None])
        ]
        for run_data_seed, run_seed, fold in combinations:
            changes: dict[str, Any] = {"data.seed": run_data_seed, "train.seed": run_seed}
            run_name = base_name
            if run_data_seed != data_seed:
                run_name += f"-split{run_data_seed}"
            if run_seed != seed:
                run_name += f"-seed{run_seed}"
            if fold is not None:
                changes |= {"data.folds": folds, "data.fold": fold}
                run_name += f"-fold{fold}"
            recipe = resolved.recipe.replace(**changes).model_copy(update={"name": run_name})
            plain_name = resolved.is_unmodified or name is not None
            plans.append(PlannedRun(recipe, plain_name, variant, run_data_seed, run_seed, fold))
    return plans


@message_scope()
def train_many(
    recipes: Mapping[str | None, ResolvedRecipe],
    *,
    repeat_splits: int = 1,
    seeds: int = 1,
    folds: int | None = None,
    refit: bool = False,
    name: str | None = None,
    fresh: bool = False,
    test: bool = True,
    device: str | None = None,
    quiet: bool = False,
) -> RunResults:
    """Train every variant with every split, seed and fold, and summarize the results.

    Args:
        recipes: by name of the variant; None for the recipe itself.
        repeat_splits: number of random splits of the data (`data.seed`, `data.seed` + 1, ...).
        seeds: different initial weights, order, augmentation and dropout (`train.seed`, ...).
        folds: K-fold cross-validation on all images but the test split, which stays sealed.
        refit: each run only selects the number of epochs; a second run trains on training and
            validation images together for that many epochs and is tested.
        name: replaces the name of the recipe in the names of the runs.
        test: report accuracies on the test split; otherwise on validation.
        fresh, device, quiet: as in `train`.

    Raises:
        UsageError: a recipe is wrong, or the options cannot be combined. Checked before training.
    """
    check_run_name(name)
    repeat_splits = check_count("repeat_splits", repeat_splits)
    seeds = check_count("seeds", seeds)
    folds = None if folds is None else check_count("folds", folds, minimum=2)
    plans = expand_runs(recipes, repeat_splits=repeat_splits, seeds=seeds, folds=folds, name=name)
    _check_plan(plans, repeat_splits=repeat_splits, folds=folds, refit=refit, test=test)
    test = test and folds is None
    outcomes = []
    with quiet_mode(quiet):
        for number, planned in enumerate(plans, 1):
            print_status(f"[bold]{planned.recipe.name}[/], {number} of {len(plans)}")
            run_dir = epoch_selection_run = _train(planned, planned.recipe, fresh, device, quiet)
            if refit:
                refit_recipe = refit_on_all(planned.recipe, epoch_selection_run)
                run_dir = _train(planned, refit_recipe, fresh, device, quiet)
            result = evaluation.evaluate(
                run_dir, "test" if test else "val", device=device, quiet=quiet
            )
            if len(plans) > 1:  # the result of a single run is the last line of the table
                print_status(evaluation.sentence(result.to_dict()))
            outcomes.append(RunOutcome(planned, run_dir, epoch_selection_run, result))
    first = next(iter(recipes.values()))
    repeated = {
        "variants": len(recipes) > 1,
        "splits": repeat_splits > 1,
        "seeds": seeds > 1,
        "folds": folds is not None,
        "refit": refit,
    }
    base_name = name or first.recipe.name
    plot = _plot_folder(
        base_name, [kind for kind, is_on in repeated.items() if is_on], recipes, plans
    )
    results = RunResults(
        name=run.safe_name(base_name),
        split="test" if test else "val",
        repeat_splits=repeat_splits,
        seeds=seeds,
        folds=folds,
        refit=refit,
        outcomes=outcomes,
        plot=plot / "curves.png",
    )
    if distributed.init_process_group().is_main_process:
        run_plots.plot_several(
            results.plot, results.histories(), base_name, results.repeats_in_words()
        )
    return results


def refit_on_all(planned: Recipe, epoch_selection_run: RunDir) -> Recipe:
    """Return the recipe that trains on training and validation images for the selected epochs."""
    changed = epoch_selection_run.recipe().replace(
        **{
            "data.name": planned.data.name,  # the data set may have moved since that run
            "data.val_fraction": 0,
            "data.folds": None,
            "data.fold": 0,
            "train.epochs": int(epoch_selection_run.metadata()["kept_epoch"]),
            "train.patience": None,
            "train.keep": "last",
        }
    )
    return changed.model_copy(update={"name": f"{planned.name}-refit"})


def _train(
    planned: PlannedRun, recipe: Recipe, fresh: bool, device: str | None, quiet: bool
) -> RunDir:
    return train(
        recipe,
        is_unmodified_recipe=planned.plain_name,
        fresh=fresh,
        test=False,
        device=device,
        quiet=quiet,
    )


def _check_plan(
    plans: list[PlannedRun], *, repeat_splits: int, folds: int | None, refit: bool, test: bool
) -> None:
    """Refuse combinations that would otherwise fail after hours of training."""
    if refit and folds is not None:
        raise UsageError(
            "--refit evaluates the test split, --folds keeps it sealed: they cannot be combined",
            fix="select a recipe by --folds first, then use --refit on it",
        )
    if refit and not test:
        raise UsageError(
            "--refit leaves no validation split, so --no-test leaves nothing to report",
            fix="drop --no-test, or drop --refit",
        )
    for planned in plans:
        validate_recipe(planned.recipe)
        data = planned.recipe.data
        if not data.validates and (refit or not test):
            what = "--refit selects epochs" if refit else "--no-test measures accuracy"
            raise UsageError(
                f"{what} on the validation split, but data.val_fraction=0",
                where=planned.recipe.name,
                fix="set data.val_fraction=0.15",
            )
        if refit and data.per_class is not None:
            raise UsageError(
                f"--refit adds the validation images, but data.per_class={data.per_class} limits "
                "the training images to the same number",
                where=planned.recipe.name,
                fix="use data.total_per_class, which counts training and validation images",
            )
    data = plans[0].recipe.data
    if repeat_splits > 1:
        source = find_configured_source(data)
        if not is_drawn_split(data, source):
            raise UsageError(
                f"--repeat-splits {repeat_splits} would repeat the same split: {data.name!r} comes "
                "with fixed splits",
                fix="use --seeds, or draw training images with data.total_per_class",
            )


def _plot_folder(
    base_name: str,
    repeated: list[str],
    recipes: Mapping[str | None, ResolvedRecipe],
    plans: list[PlannedRun],
) -> Path:
    """Return the folder of the plots; like a run, a modified recipe gets six digits of a hash."""
    folder = "-".join([run.safe_name(base_name), *repeated])
    if not plans[0].plain_name:
        digests = "".join(resolved.recipe.digest() for resolved in recipes.values())
        folder += f"-{hashlib.sha256(digests.encode()).hexdigest()[:6]}"
    return run.PLOTS_DIR / folder


MetricsRow = dict[str, float]


@dataclass(frozen=True)
class PlannedRun:
    """A run to be trained.

    Attributes:
        recipe: its name is that of the run.
        plain_name: the run takes that name without six digits of a hash.
    """

    recipe: Recipe
    plain_name: bool
    variant: str | None
    data_seed: int
    seed: int
    fold: int | None


@dataclass(frozen=True)
class RunOutcome:
    """A trained run and its evaluation.

    Attributes:
        epoch_selection_run: the run that selected the number of epochs; the run itself unless it
            is a refit.
    """

    planned: PlannedRun
    run_dir: RunDir
    epoch_selection_run: RunDir
    evaluation: Evaluation

    @cached_property
    def metadata(self) -> dict[str, Any]:
        return self.run_dir.metadata()

    @cached_property
    def history(self) -> list[MetricsRow]:
        """The metrics of the epochs among which the number of epochs was selected."""
        return self.epoch_selection_run.metrics()

    @property
    def epochs(self) -> tuple[int, int]:
        """The selected epoch, and the number of epochs trained to select it."""
        metadata = self.epoch_selection_run.metadata()
        return int(metadata["kept_epoch"]), int(metadata["epochs"])

    @property
    def val_accuracy(self) -> float | None:
        """Validation accuracy of the selected epoch; None without a validation split."""
        selected = self.epochs[0]
        value = next(row["val_accuracy"] for row in self.history if row["epoch"] == selected)
        return None if math.isnan(value) else value

    def total(self, key: str) -> float | None:
        """Return the seconds of the run, plus those of the run that selected its epochs."""
        run_dirs = {id(each): each for each in (self.run_dir, self.epoch_selection_run)}
        return sum_or_none([run_dir.metadata().get(key) for run_dir in run_dirs.values()])

    def to_dict(self) -> dict[str, Any]:
        kept, epochs = self.epochs
        return {
            "run": self.run_dir.name,
            "path": str(self.run_dir.path),
            "chosen_by": self.epoch_selection_run.name,
            "data_seed": self.planned.data_seed,
            "seed": self.planned.seed,
            "fold": self.planned.fold,
            "accuracy": self.evaluation.accuracy,
            "interval95": list(self.evaluation.interval95),
            "n": self.evaluation.n,
            "correct": self.evaluation.correct,
            "macro_f1": self.evaluation.macro_f1,
            "balanced_accuracy": self.evaluation.balanced_accuracy,
            "loss": self.evaluation.loss,
            "val_accuracy": self.val_accuracy,
            "kept_epoch": kept,
            "epochs": epochs,
            "parameters": self.metadata["parameters"],
            "trainable_parameters": trainable_parameters(self.metadata),
            "training_seconds": self.total("training_seconds"),
            "cpu_seconds": self.total("cpu_seconds"),
        }


@dataclass(frozen=True)
class RepeatResult:
    """The result of one split and seed: of one run, or of the K runs of a cross-validation.

    In a cross-validation each image is classified once, by the model that was not trained on it, so
    the K results are pooled.
    """

    outcomes: Sequence[RunOutcome]

    @property
    def n(self) -> int:
        return sum(o.evaluation.n for o in self.outcomes)

    @property
    def correct(self) -> int:
        return sum(o.evaluation.correct for o in self.outcomes)

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def class_means(self) -> metrics.ClassMeans:
        """Macro F1 and balanced accuracy, from the sum of the confusion matrices."""
        return metrics.class_means(np.sum([o.evaluation.confusion for o in self.outcomes], axis=0))

    @property
    def loss(self) -> float:
        return sum(o.evaluation.loss * o.evaluation.n for o in self.outcomes) / self.n

    def total(self, key: str) -> float | None:
        return sum_or_none([o.total(key) for o in self.outcomes])


@dataclass(frozen=True)
class VariantSummary:
    """Results of one variant over all splits and seeds. Accuracies are in [0, 1].

    `sd` is the sample standard deviation (n - 1).
    """

    variant: str | None
    outcomes: Sequence[RunOutcome]

    @property
    def repeats(self) -> list[RepeatResult]:
        by_seeds: dict[tuple[int, int], list[RunOutcome]] = {}
        for outcome in self.outcomes:
            key = (outcome.planned.data_seed, outcome.planned.seed)
            by_seeds.setdefault(key, []).append(outcome)
        return [RepeatResult(outcomes) for outcomes in by_seeds.values()]

    @property
    def n(self) -> int:
        """Number of images that each accuracy is measured on."""
        return self.repeats[0].n

    @property
    def accuracies(self) -> list[float]:
        """One accuracy per split and seed; of a cross-validation, over all out-of-fold images."""
        return [repeat.accuracy for repeat in self.repeats]

    @property
    def mean(self) -> float:
        return metrics.mean_sd(self.accuracies)[0]

    @property
    def sd(self) -> float | None:
        return metrics.mean_sd(self.accuracies)[1]

    @property
    def interval95(self) -> tuple[float, float] | None:
        """Wilson interval; None for several splits or seeds, which are not one sample of images."""
        (first, *more) = self.repeats
        return None if more else metrics.wilson_interval(first.correct, first.n)

    @property
    def parts(self) -> tuple[float, float] | None:
        """Standard deviations between splits and between seeds; None without several of both."""
        by_split: dict[int, list[float]] = {}
        for repeat in self.repeats:
            by_split.setdefault(repeat.outcomes[0].planned.data_seed, []).append(repeat.accuracy)
        if len(by_split) < 2 or min(map(len, by_split.values())) < 2:
            return None
        return metrics.variance_components(list(by_split.values()))

    @property
    def val_accuracy(self) -> tuple[float, float | None] | None:
        """Mean and standard deviation of the validation accuracy of the selected epochs."""
        values = [o.val_accuracy for o in self.outcomes]
        known = [value for value in values if value is not None]
        return metrics.mean_sd(known) if len(known) == len(values) else None

    @property
    def class_means(self) -> list[metrics.ClassMeans]:
        """Macro F1 and balanced accuracy, one pair per split and seed."""
        return [repeat.class_means for repeat in self.repeats]

    def over(self, other: VariantSummary) -> tuple[float, float | None]:
        """Return mean and standard deviation of the difference in accuracy to `other`.

        Differences are taken within each split and seed, so that the effect of a lucky split or
        seed on both variants cancels.
        """
        pairs = zip(self.accuracies, other.accuracies, strict=True)
        return metrics.mean_sd([accuracy - reference for accuracy, reference in pairs])

    def mean_of(self, key: str) -> float | None:
        """Return the mean of `training_seconds` or `cpu_seconds` over splits and seeds."""
        total = sum_or_none([repeat.total(key) for repeat in self.repeats])
        return None if total is None else total / len(self.repeats)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values. Lists have one entry per split and seed, `runs` one per run."""
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
            "macro_f1": [means.macro_f1 for means in self.class_means],
            "balanced_accuracy": [means.balanced_accuracy for means in self.class_means],
            "losses": [repeat.loss for repeat in repeats],
            "data_seeds": [o.planned.data_seed for o in firsts],
            "seeds": [o.planned.seed for o in firsts],
            "val_accuracy": validated[0] if validated else None,
            "val_accuracy_sd": validated[1] if validated else None,
            "parameters": firsts[0].metadata["parameters"],
            "trainable_parameters": trainable_parameters(firsts[0].metadata),
            "training_seconds": [repeat.total("training_seconds") for repeat in repeats],
            "cpu_seconds": [repeat.total("cpu_seconds") for repeat in repeats],
            "runs": [outcome.to_dict() for outcome in self.outcomes],
        }


@dataclass(frozen=True)
class RunResults:
    """The results of several runs. `split` is the split that accuracies are measured on."""

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
        """One summary per variant, in their order."""
        names = dict.fromkeys(o.planned.variant for o in self.outcomes)
        return [
            VariantSummary(name, [o for o in self.outcomes if o.planned.variant == name])
            for name in names
        ]

    @property
    def is_optimistic(self) -> bool:
        """Whether the images that accuracies are measured on also selected the epoch."""
        kept = {o.planned.recipe.train.keep for o in self.outcomes}
        return self.split == "val" and "best" in kept

    def gains(self) -> list[tuple[float, float | None]]:
        """Return for each variant its difference to the first one (`VariantSummary.over`)."""
        first, *others = self.summaries
        return [(0.0, None), *(summary.over(first) for summary in others)]

    def histories(self) -> dict[str, list[list[MetricsRow]]]:
        """Return the metrics of every run, by variant."""
        return {s.variant or "": [o.history for o in s.outcomes] for s in self.summaries}

    def repeats_in_words(self) -> str:
        """Return what is repeated, e.g. `2 splits × 3 seeds`; empty for a single run."""
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
            "flattered": self.is_optimistic,
            "plot": str(self.plot),
            "variants": [
                summary.to_dict() | {"over_first": gain, "over_first_sd": sd}
                for summary, (gain, sd) in zip(self.summaries, self.gains(), strict=True)
            ],
        }


def sum_or_none(values: Sequence[float | None]) -> float | None:
    """Return the sum of the values; None if one of them is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def trainable_parameters(metadata: dict[str, Any]) -> int:
    """Return the number of trainable parameters of a run; old runs record only all parameters."""
    return int(metadata.get("trainable_parameters", metadata["parameters"]))

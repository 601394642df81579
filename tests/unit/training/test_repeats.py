"""Repeated runs over variants, splits, seeds and folds, and their summary statistics."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

import convlens
from convlens import Run
from convlens.errors import UsageError
from convlens.metrics import mean_sd, variance_components, wilson_interval
from convlens.recipe import load_recipe
from convlens.run import RunDir
from convlens.training import resolve
from convlens.training.repeats import (
    PlannedRun,
    RunOutcome,
    VariantSummary,
    expand_runs,
    sum_or_none,
    train_many,
)
from helpers.commands import DIGITS, here, pictures, refused, weights
from helpers.support import TINY, tiny

SETTINGS = """
base: digits
data: {per_class: 8}
augment: []
model: {widths: [4], depth: 1}
train: {epochs: 2, batch_size: 16}
variants:
  slow: {optim: {lr: 0.0001}}
  wide: {model.widths: [8]}
"""


def variants_file(name: str = "few.yaml") -> Path:
    path = Path(name)
    path.write_text(SETTINGS)
    return path


def trained(*arguments: str | Path) -> Any:
    done = here("train", *arguments, "--json")
    assert done.code == 0, done.err
    return done.json


# Planned runs


def test_each_combination_is_a_run_with_a_unique_name() -> None:
    resolved = resolve.resolve_variants(variants_file(), "all", overrides=["data.seed=3"])
    plans = expand_runs(resolved, repeat_splits=2, seeds=2, name="x")
    assert [p.recipe.name for p in plans] == [
        "x-slow",
        "x-slow-seed1",
        "x-slow-split4",
        "x-slow-split4-seed1",
        "x-wide",
        "x-wide-seed1",
        "x-wide-split4",
        "x-wide-split4-seed1",
    ]
    assert [(p.variant, p.data_seed, p.seed) for p in plans[:4]] == [
        ("slow", 3, 0),
        ("slow", 3, 1),
        ("slow", 4, 0),
        ("slow", 4, 1),
    ]
    for plan in plans:
        assert (plan.recipe.data.seed, plan.recipe.train.seed) == (plan.data_seed, plan.seed)
        assert plan.recipe.optim.lr == (0.0001 if plan.variant == "slow" else 0.012)
    assert len({p.recipe.digest() for p in plans}) == 8
    # The first split and seed are those of the recipe, so it is the run of a single training.
    alone = load_recipe("few.yaml", ["data.seed=3"], "slow")
    assert plans[0].recipe.digest() == alone.digest()


def test_folds_are_runs_whose_recipes_name_the_fold() -> None:
    plans = expand_runs({None: resolve.resolve_recipe(TINY)}, seeds=2, folds=3)
    assert [p.recipe.name for p in plans] == [
        "tiny-fold0",
        "tiny-fold1",
        "tiny-fold2",
        "tiny-seed1-fold0",
        "tiny-seed1-fold1",
        "tiny-seed1-fold2",
    ]
    assert [p.recipe.data.fold for p in plans] == [0, 1, 2, 0, 1, 2]
    assert {p.recipe.data.folds for p in plans} == {3}


# Summary statistics


class FakeEvaluation:
    """An evaluation of `n` images of which `correct` are classified correctly."""

    def __init__(self, correct: int, n: int, loss: float = 0.5) -> None:
        self.correct, self.n, self.accuracy, self.loss = correct, n, correct / n, loss


def summary(*cells: tuple[int, int, int | None, FakeEvaluation]) -> VariantSummary:
    """Return a summary of runs, given as (split, seed, fold, evaluation)."""
    run_dir = RunDir(Path("models/x"))
    outcomes = [
        RunOutcome(PlannedRun(tiny(), True, None, split, seed, fold), run_dir, run_dir, evaluation)  # type: ignore[arg-type]
        for split, seed, fold, evaluation in cells
    ]
    return VariantSummary(None, outcomes)


def test_one_run_has_an_interval_and_no_standard_deviation() -> None:
    one = summary((0, 0, None, FakeEvaluation(90, 100)))
    assert (one.mean, one.sd, one.parts) == (0.9, None, None)
    assert one.interval95 == wilson_interval(90, 100)


def test_splits_and_seeds_have_separate_standard_deviations() -> None:
    # By hand: 60 70 | 80 90 %: within each split variance 50, means 65 and 85 of variance 200;
    # between splits 200 - 50 / 2 = 175. All four: mean 75, variance (225 + 25 + 25 + 225) / 3.
    variant = summary(
        (0, 0, None, FakeEvaluation(60, 100)),
        (0, 1, None, FakeEvaluation(70, 100)),
        (1, 0, None, FakeEvaluation(80, 100)),
        (1, 1, None, FakeEvaluation(90, 100)),
    )
    assert variant.interval95 is None
    assert variant.mean == pytest.approx(0.75)
    assert variant.sd == pytest.approx(math.sqrt(500 / 3) / 100)
    assert variant.parts == pytest.approx((math.sqrt(175) / 100, math.sqrt(50) / 100))


def test_folds_are_pooled_over_their_images() -> None:
    # Folds of unequal size: 9 of 10 and 10 of 20 are 19 of 30, not the mean of 90% and 50%.
    one = summary(
        (0, 0, 0, FakeEvaluation(9, 10, loss=0.1)), (0, 0, 1, FakeEvaluation(10, 20, loss=0.4))
    )
    assert one.accuracies == [19 / 30]
    assert (one.n, one.sd) == (30, None)
    assert one.interval95 == wilson_interval(19, 30)
    assert one.repeats[0].loss == pytest.approx((10 * 0.1 + 20 * 0.4) / 30)
    # Two seeds are evaluated on the same images, so there is no interval of 60 images.
    two = summary(
        (0, 0, 0, FakeEvaluation(9, 10)),
        (0, 0, 1, FakeEvaluation(10, 20)),
        (0, 1, 0, FakeEvaluation(9, 10)),
        (0, 1, 1, FakeEvaluation(16, 20)),
    )
    assert two.accuracies == [19 / 30, 25 / 30]
    assert two.interval95 is None
    assert two.sd == pytest.approx((6 / 30) / math.sqrt(2))


def test_variants_are_compared_within_splits_and_seeds() -> None:
    # By hand: gains of 2, 4 and 6 points have mean 4 and sample deviation 2.
    first = summary(
        *((0, seed, None, FakeEvaluation(n, 100)) for seed, n in enumerate((50, 70, 60)))
    )
    other = summary(
        *((0, seed, None, FakeEvaluation(n, 100)) for seed, n in enumerate((52, 74, 66)))
    )
    assert other.over(first) == pytest.approx((0.04, 0.02))
    assert first.over(other) == pytest.approx((-0.04, 0.02))
    assert summary((0, 0, None, FakeEvaluation(9, 10))).over(
        summary((0, 0, None, FakeEvaluation(8, 10)))
    ) == (
        pytest.approx(0.1),
        None,
    )


def test_a_sum_with_an_unknown_term_is_unknown() -> None:
    assert sum_or_none([1.0, 2.5]) == 3.5
    assert sum_or_none([1.0, None]) is None


# Seeds


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_seeds_are_summarized_and_finished_ones_are_not_trained_again() -> None:
    result = trained(*DIGITS, "--seeds", "2", "--name", "pair")
    assert (result["name"], result["split"], result["seeds"], result["folds"]) == (
        "pair",
        "test",
        2,
        None,
    )
    (variant,) = result["variants"]
    assert [entry["run"] for entry in variant["runs"]] == ["pair", "pair-seed1"]
    assert variant["seeds"] == [0, 1]
    one, two = variant["accuracies"]
    assert variant["mean"] == pytest.approx((one + two) / 2)
    # The sample deviation of two numbers is their distance over the root of two.
    assert variant["sd"] == pytest.approx(abs(one - two) / math.sqrt(2))
    for entry in variant["runs"]:
        run = Run.load(entry["run"])
        assert run.recipe.train.seed == entry["seed"]
        (evaluation,) = run.results
        assert (evaluation["accuracy"], evaluation["loss"]) == (entry["accuracy"], entry["loss"])
        metadata = json.loads((run.path / "run.json").read_text())
        assert entry["training_seconds"] == metadata["training_seconds"] > 0
        assert entry["cpu_seconds"] == metadata["cpu_seconds"] > 0
        kept = next(row for row in run.metrics if row["epoch"] == entry["kept_epoch"])
        assert entry["val_accuracy"] == kept["val_accuracy"]
    assert Path(result["plot"]).is_file()
    first, second = (weights(Path("models") / entry["run"]) for entry in variant["runs"])
    assert any(not bool((first[key] == second[key]).all()) for key in first)
    # The split of the data stays the same.
    texts = {(Path("models") / e["run"] / "split.csv").read_text() for e in variant["runs"]}
    assert len(texts) == 1
    # Finished seeds are found, not trained again.
    runs = {p.name: (p / "model.safetensors").stat().st_mtime_ns for p in Path("models").iterdir()}
    done = here("train", *DIGITS, "--seeds", "3", "--name", "pair")
    assert done.code == 0, done.err
    assert done.err.count("is already trained") == 2
    after = {p.name: (p / "model.safetensors").stat().st_mtime_ns for p in Path("models").iterdir()}
    assert {name: after[name] for name in runs} == runs
    assert set(after) - set(runs) == {"pair-seed2"}
    third = Run.load("pair-seed2").results[-1]["accuracy"]
    mean, sd = mean_sd([one, two, third])
    assert sd is not None
    assert f"test accuracy {100 * mean:.2f} ± {100 * sd:.2f} % (mean ± sd of 3 seeds)" in done.out
    assert all(f"{100 * accuracy:.2f}" in done.out for accuracy in (one, two, third))


def test_seeds_start_at_the_seed_of_the_recipe() -> None:
    resolved = resolve.resolve_recipe(
        "digits", overrides=[*DIGITS[1:], "train.seed=5", "train.epochs=1"]
    )
    (variant,) = train_many({None: resolved}, test=False, quiet=True).summaries
    assert [o.planned.seed for o in variant.outcomes] == [5]
    assert variant.sd is None


# Variants


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_all_variants_are_trained_by_one_command() -> None:
    variants_file()
    done = here("train", "few.yaml", "train.epochs=1", "--variants", "all", "--json")
    assert done.code == 0, done.err
    slow, wide = done.json["variants"]
    assert (slow["variant"], wide["variant"]) == ("slow", "wide")
    for entry, lr, widths in ((slow, 0.0001, [4]), (wide, 0.012, [8])):
        assert entry["runs"][0]["run"].startswith(f"few-{entry['variant']}-")
        recipe = Run.load(entry["runs"][0]["run"]).recipe
        assert (recipe.optim.lr, recipe.model.options["widths"]) == (lr, widths)
        assert recipe.train.epochs == 1  # the command line overrides the variant
        assert entry["interval95"] == entry["runs"][0]["interval95"]
        assert "variants" not in (Path(entry["runs"][0]["path"]) / "recipe.yaml").read_text()
    assert slow["parameters"] < wide["parameters"]
    assert (slow["over_first"], slow["over_first_sd"]) == (0, None)
    assert wide["over_first"] == pytest.approx(wide["mean"] - slow["mean"])
    assert slow["trainable_parameters"] == slow["parameters"]
    assert Path(done.json["plot"]).is_file()
    assert done.json["plot"].startswith("plots/few-variants-")


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_selected_variants_are_listed_in_the_given_order() -> None:
    path = variants_file()
    done = here("train", path, "--variants", "wide,slow", "--no-test")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert next(line.split()[0] for line in lines if line.strip()) == "variant"
    assert [name for line in lines for name in line.split()[:1] if name in ("slow", "wide")] == [
        "wide",
        "slow",
    ]
    assert "over wide" in lines[1] + lines[0]
    assert sorted(p.name for p in Path("models").iterdir()) == ["few-slow", "few-wide"]
    assert done.out.splitlines()[-1] == "plot   plots/few-variants/curves.png"
    # Without --variants only the recipe itself is trained.
    assert trained(path, "--no-test")["run"] == "few"
    assert Run.load("few").recipe.digest() not in {
        Run.load(name).recipe.digest() for name in ("few-slow", "few-wide")
    }


def test_unknown_variants_are_refused() -> None:
    path = variants_file()
    refused(here("train", path, "--variants", "slwo"), 2, "unknown variant 'slwo'", "slow")
    refused(here("train", "digits", "--variants", "all"), 2, "'digits' has no variants")
    refused(here("train", "digits", "--data", "shapes", "--variants", "x"), 2, "no variants")
    refused(here("train", path, "--variants", "all", "optim.name=adamm"), 2, "adamm")
    assert not Path("models").exists()


# Splits


def test_repeated_splits_hold_out_different_images() -> None:
    short = [*DIGITS, "train.epochs=1", "--repeat-splits", "2", "--seeds", "2", "--no-test"]
    done = here("train", *short, "--name", "x")
    assert done.code == 0, done.err
    names = ["x", "x-seed1", "x-split1", "x-split1-seed1"]
    texts = [(Path("models") / name / "split.csv").read_text() for name in names]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    accuracies = [Run.load(name).results[0]["accuracy"] for name in names]
    mean, sd = mean_sd(accuracies)
    between, within = variance_components([accuracies[:2], accuracies[2:]])
    assert sd is not None
    assert f"{100 * mean:.2f} ± {100 * sd:.2f} % (mean ± sd of 2 splits × 2 seeds)" in done.out
    assert f"sd {100 * between:.2f} points between splits, {100 * within:.2f} between" in done.out
    assert "the same images chose the epoch" in done.err


def test_repeated_splits_of_data_with_fixed_splits_are_refused() -> None:
    for split in ("train", "val", "test"):
        pictures(Path("photos") / split, {"red": 3, "green": 3})
    refused(
        here("train", "photos", "--repeat-splits", "2"),
        2,
        "--repeat-splits 2",
        "comes with fixed splits",
    )


# Folds


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_each_image_is_evaluated_in_exactly_one_fold() -> None:
    done = here("train", *DIGITS, "train.epochs=1", "--folds", "2", "--name", "x")
    assert done.code == 0, done.err
    val_ids: list[str] = []
    correct = 0
    for number in range(2):
        run = Run.load(f"x-fold{number}")
        assert (run.recipe.data.folds, run.recipe.data.fold) == (2, number)
        rows = list(csv.DictReader((run.path / "split.csv").open()))
        fold_ids = [row["id"] for row in rows if row["split"] == "val"]
        (evaluation,) = run.results
        assert (evaluation["split"], evaluation["n"]) == ("val", len(fold_ids))
        val_ids += fold_ids
        correct += evaluation["correct"]
    assert len(val_ids) == len(set(val_ids)) == 1797 - 270
    low, high = wilson_interval(correct, 1527)
    assert (
        f"out-of-fold accuracy {correct / 1527:.2%} "
        f"(95% interval {low:.2%} to {high:.2%}, n = 1,527)" in done.out
    )
    assert Path("plots/x-folds/curves.png").is_file()


# Refit


def test_a_refit_trains_on_all_images_for_the_chosen_number_of_epochs() -> None:
    arguments = [*DIGITS, "data.per_class=null", "data.total_per_class=9", "train.epochs=4"]
    done = here("train", *arguments, "--refit", "--name", "x", "--json")
    assert done.code == 0, done.err
    (entry,) = done.json["variants"][0]["runs"]
    assert (entry["run"], entry["chosen_by"]) == ("x-refit", "x")
    first_run, refit = Run.load("x"), Run.load("x-refit")
    assert first_run.results == []  # the test split was opened for the refit alone
    assert [evaluation["split"] for evaluation in refit.results] == ["test"]
    kept = json.loads((first_run.path / "run.json").read_text())["kept_epoch"]
    assert entry["kept_epoch"] == kept == refit.recipe.train.epochs == len(refit.metrics)
    assert (refit.recipe.data.val_fraction, refit.recipe.train.keep) == (0, "last")
    first_split = list(csv.DictReader((first_run.path / "split.csv").open()))
    refit_split = list(csv.DictReader((refit.path / "split.csv").open()))
    assert refit_split == [row for row in first_split if row["split"] == "test"]
    metadata = [json.loads((r.path / "run.json").read_text()) for r in (first_run, refit)]
    assert entry["training_seconds"] == pytest.approx(sum(f["training_seconds"] for f in metadata))
    assert [
        f["data"]["splits"]["train"][: len(prefix)]
        for f, prefix in zip(metadata, ("76 of 90", "90 images"), strict=True)
    ] == ["76 of 90", "90 images"]


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_a_refit_from_python() -> None:
    run_table = convlens.train_many(
        variants_file(),
        {"data.per_class": None, "data.total_per_class": 9, "train.epochs": 1},
        variants=["wide"],
        refit=True,
        quiet=True,
    )
    (run,) = run_table.runs
    assert run.name.startswith("few-wide-refit-")
    assert run.recipe.data.val_fraction == 0
    assert [s.variant for s in run_table.summaries] == ["wide"]
    assert run_table.plot.is_file()
    assert repr(run_table) == "RunTable('few', 1 runs)"
    assert run_table.to_dict()["refit"] is True


# Invalid options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--refit", "--folds", "3"], "--refit evaluates"),
        (["--refit", "--no-test"], "--refit leaves no validation split"),
        (["--refit", "data.per_class=9"], "data.total_per_class"),
        (["--refit", "data.val_fraction=0", "train.keep=last"], "data.val_fraction=0"),
        (["--seeds", "2", "--no-test", "data.val_fraction=0", "train.keep=last"], "--no-test"),
        (["--folds", "3", "data.val_fraction=0"], "a fold is a validation split"),
        (["--folds", "2000"], "data.folds=2000"),
        (["data.fold=1"], "data.fold=1 without data.folds"),
        (["data.folds=3", "data.fold=3"], "counted from 0"),
        (["data.val_fraction=0", "train.patience=3"], "train.keep=best and train.patience=3"),
        (["data.total_per_class=500"], "at most data.total_per_class="),
    ],
)
def test_invalid_combinations_are_refused_before_training(
    arguments: list[str], message: str
) -> None:
    done = here("train", "digits", *arguments)
    assert done.code in (2, 3)
    refused(done, done.code, message)
    assert not list(Path().glob("models/*/run.json"))


def test_invalid_numbers_of_runs_are_refused() -> None:
    for option in ("--seeds=0", "--repeat-splits=0", "--folds=1"):
        assert here("train", "digits", option).code == 2


def test_an_invalid_recipe_is_refused_before_the_first_run() -> None:
    resolved = resolve.resolve_recipe("digits", overrides=["optim.name=adamm"])
    with pytest.raises(UsageError, match="adamm"):
        train_many({None: resolved}, seeds=2)
    assert not Path("models").exists()

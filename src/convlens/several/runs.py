"""Several runs of one recipe side by side: its variants, splits of the data, seeds, folds.

`expand` lists the runs and `train_many` trains them and puts them in one table. Each is an ordinary
run: the same command finds or continues it. A single run is a single sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convlens import evaluation, picturing, run, training
from convlens.data.opening import is_drawn
from convlens.data.sources import find
from convlens.distributed import processes
from convlens.errors import UsageError
from convlens.recipe import Recipe
from convlens.run import RunFolder
from convlens.several.tabling import Outcome, Planned, Table
from convlens.starting.asking import Asked
from convlens.starting.checking import check
from convlens.system.console import print_status, quieted

MOST = 10_000  # runs of one command


def expand(
    asked: Mapping[str | None, Asked],
    *,
    repeat_splits: int = 1,
    seeds: int = 1,
    folds: int | None = None,
    name: str | None = None,
) -> list[Planned]:
    """Every variant x split x seed x fold as a run with a name of its own.

    Splits count from the recipe's `data.seed`, seeds from its `train.seed`. A run's name says
    only what it differs in: `x` for the recipe's own split and seed, `x-seed1`, `x-a-split2`.
    """
    several = len(asked) * repeat_splits * seeds * (folds or 1)
    if several > MOST:
        raise UsageError(f"that would be {several:,} runs; {MOST:,} at most go together")
    plans = []
    for variant, each in asked.items():
        data_seed, seed = each.recipe.data.seed, each.recipe.train.seed
        called = "-".join([name or each.recipe.name, *([variant] if variant else [])])
        cells = [
            (data_seed + split, seed + number, fold)
            for split in range(repeat_splits)
            for number in range(seeds)
            for fold in (range(folds) if folds else [None])
        ]
        for its_split, its_seed, fold in cells:
            changes: dict[str, Any] = {"data.seed": its_split, "train.seed": its_seed}
            its_name = called
            if its_split != data_seed:
                its_name += f"-split{its_split}"
            if its_seed != seed:
                its_name += f"-seed{its_seed}"
            if fold is not None:
                changes |= {"data.folds": folds, "data.fold": fold}
                its_name += f"-fold{fold}"
            recipe = each.recipe.replace(**changes).model_copy(update={"name": its_name})
            plain = each.plain or name is not None
            plans.append(Planned(recipe, plain, variant, its_split, its_seed, fold))
    return plans


def train_many(
    asked: Mapping[str | None, Asked],
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
) -> Table:
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
    plans = expand(asked, repeat_splits=repeat_splits, seeds=seeds, folds=folds, name=name)
    _check(plans, repeat_splits=repeat_splits, folds=folds, refit=refit, test=test)
    test = test and folds is None
    outcomes = []
    with quieted(quiet):
        for number, planned in enumerate(plans, 1):
            print_status(f"[bold]{planned.recipe.name}[/], {number} of {len(plans)}")
            place = chooser = _train(planned.recipe, planned, fresh, on, quiet)
            if refit:
                place = _train(refitted(planned.recipe.name, chooser), planned, fresh, on, quiet)
            looked = evaluation.evaluate(place, "test" if test else "val", on=on, quiet=quiet)
            if len(plans) > 1:  # one run alone has its result in the table's last line
                print_status(evaluation.sentence({**looked.to_dict(), "own": True}))
            outcomes.append(Outcome(planned, place, chooser, looked))
    first = next(iter(asked.values()))
    kinds = {"variants": len(asked) > 1, "splits": repeat_splits > 1, "seeds": seeds > 1}
    kinds |= {"folds": folds is not None, "refit": refit}
    called = name or first.recipe.name
    plot = _plot_folder(called, [kind for kind, there in kinds.items() if there], asked, plans)
    table = Table(
        name=run.safe(called),
        split="test" if test else "val",
        repeat_splits=repeat_splits,
        seeds=seeds,
        folds=folds,
        refit=refit,
        outcomes=outcomes,
        plot=plot / "curves.png",
    )
    if processes.init_process_group().is_main_process:
        picturing.several_plot(table.plot, table.histories(), called, table.repeats_in_words())
    return table


def refitted(name: str, chooser: RunFolder) -> Recipe:
    """The recipe of the run that trains on all that `chooser` had, for the epochs it chose."""
    resolved = chooser.recipe()
    changed = resolved.replace(
        **{
            "data.val_fraction": 0,
            "data.folds": None,
            "data.fold": 0,
            "train.epochs": int(chooser.facts()["kept_epoch"]),
            "train.patience": None,
            "train.keep": "last",
        }
    )
    return changed.model_copy(update={"name": f"{name}-refit"})


def _train(recipe: Recipe, planned: Planned, fresh: bool, on: str | None, quiet: bool) -> RunFolder:
    return training.train(recipe, plain=planned.plain, fresh=fresh, test=False, on=on, quiet=quiet)


def _check(
    plans: list[Planned], *, repeat_splits: int, folds: int | None, refit: bool, test: bool
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
        check(planned.recipe)
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
        source = find(data.name, count=data.count, image_size=size, group=data.group)
        if not is_drawn(data, source):
            raise UsageError(
                f"--repeat-splits {repeat_splits} would repeat one split: {data.name!r} comes "
                "with all its splits",
                fix="use --seeds, or draw training images with data.total_per_class",
            )


def _plot_folder(
    called: str, kinds: list[str], asked: Mapping[str | None, Asked], plans: list[Planned]
) -> Path:
    """As for runs: a recipe that isn't as published gets six digits of its hash."""
    named = "-".join([run.safe(called), *kinds])
    if not plans[0].plain:
        digests = "".join(each.recipe.digest() for each in asked.values())
        named += f"-{hashlib.sha256(digests.encode()).hexdigest()[:6]}"
    return run.PLOTS / named

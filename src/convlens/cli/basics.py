"""Commands for models and data: `train evaluate predict export audit augment shard recipes`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convlens.cli.shared import (
    DATA_HELP,
    Command,
    DataSet,
    Device,
    Figures,
    Json,
    Overrides,
    RunName,
    Split,
    Tta,
    app,
    listed,
    print_json,
)
from convlens.system.console import print_status

if TYPE_CHECKING:
    from convlens.data.audit import Audit


@app.command(cls=Command)
def train(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|FILE.yaml|DATA",
            help="Recipe to train, or a data set for the default recipe.",
        ),
    ],
    overrides: Overrides = None,
    data: DataSet = None,
    variants: Annotated[
        str | None, typer.Option(metavar="all|NAME,...", help="Train these variants of the recipe.")
    ] = None,
    repeat_splits: Annotated[
        int, typer.Option(min=1, metavar="N", help="Repeat over N random data splits.")
    ] = 1,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Repeat with N seeds.")] = 1,
    folds: Annotated[
        int | None,
        typer.Option(min=2, metavar="K", help="K-fold cross-validation; the test set is not used."),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="Choose the number of epochs on validation, then retrain on train+val and test "
            "that model.",
        ),
    ] = False,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again in a new folder.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Continue a finished run that has fewer epochs.")
    ] = False,
    no_test: Annotated[bool, typer.Option("--no-test", help="Do not use the test set.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Use deterministic algorithms only.")
    ] = False,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Train a recipe, or the default recipe on your own images, and test the model once.

    The same command again continues a stopped run, or finds the finished one.

    Examples:
        convlens train mnist
        convlens train photos/ data.image_size=96
        convlens train digits --seeds 5
        convlens train digits --folds 5
        convlens train resnet18-pretrained --variants all
        convlens train digits train.epochs=60 --extend
    """
    from convlens import training
    from convlens.errors import UsageError
    from convlens.several import runs as several
    from convlens.showing.results import finished
    from convlens.showing.runs import run_table
    from convlens.starting import asking

    changes = [*(overrides or []), *(["train.deterministic=true"] if deterministic else [])]
    options: dict[str, Any] = {"name": name, "fresh": fresh, "test": not no_test, "on": device}
    if variants is not None or repeat_splits > 1 or seeds > 1 or folds is not None or refit:
        if extend:
            raise UsageError("--extend needs a single run", fix="extend the runs one by one")
        resolved = asking.read_variants(what, variants, data=data, overrides=changes)
        options |= {"repeat_splits": repeat_splits, "seeds": seeds, "folds": folds, "refit": refit}
        table = several.train_many(resolved, **options)
        if not as_json:
            run_table(table)
        print_json(as_json, table.to_dict())
        return
    asked = asking.read(what, data=data, overrides=changes)
    place = training.train(asked.recipe, plain=asked.plain, extend=extend, **options)
    if not as_json:
        finished(place)
    last = {} if no_test else _last(place.results())
    print_json(as_json, {"run": place.name, "path": str(place.path), **last})


@app.command(cls=Command)
def evaluate(
    run: RunName,
    split: Split = "test",
    data: DataSet = None,
    tta: Tta = None,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Evaluate a trained model on one of its splits or on another data set.

    Examples:
        convlens evaluate digits
        convlens evaluate digits --split val
        convlens evaluate digits --tta flip
        convlens evaluate digits --data more-digits/
    """
    from convlens import evaluation, run as runs
    from convlens.showing.results import evaluated

    place = runs.find(run)
    result = evaluation.evaluate(place, split, data=data, tta=tta, on=device)
    if not as_json:
        evaluated(result, place, own=data is None)
    print_json(as_json, result.to_dict())


@app.command(cls=Command)
def predict(
    run: RunName,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]...", help="Files, folders, globs, or - for stdin."),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", "-k", min=1, metavar="K", help="Number of classes to show.")
    ] = 1,
    output: Annotated[
        str, typer.Option("--format", "-f", metavar="table|csv|json", help="Output format.")
    ] = "table",
    tta: Tta = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
) -> None:
    """Classify image files and print file name, label and probability.

    Examples:
        convlens predict digits a.png b.png
        convlens predict digits new/ -k 3 --format csv
        convlens predict models/digits/model.onnx a.png
        find . -name '*.png' | convlens predict digits -
    """
    from convlens import exported, prediction, run as runs, views
    from convlens.errors import DataError
    from convlens.names import pick
    from convlens.showing.results import WRITERS

    write = pick(WRITERS, "json" if as_json else output, "format")
    views.chosen(tta)  # report a typo before anything is read or written
    loaded = exported.open_model(runs.find(run).model_path)
    asked = paths or ["-"]
    named = [line.strip() for line in sys.stdin if line.strip()] if "-" in asked else []
    files = prediction.expand([*(path for path in asked if path != "-"), *named])
    if not files:
        print_status("nothing to predict: stdin named no files")
    answers = prediction.predict(loaded, files, top_k=top, tta=tta, on=device)
    failed = write(answers, top, tta is not None)
    if failed:
        raise DataError(
            f"{failed} of {len(files)} files could not be read; the others were classified",
            fix="see the reason beside each file name",
        )


@app.command(cls=Command)
def export(
    run: RunName,
    to: Annotated[
        list[str] | None, typer.Option(metavar="onnx|torch", help="Formats, separated by commas.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Output file.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images for the numerical check; by default the run's validation images.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a model for other programs and check on real images that the outputs agree.

    The exported model takes a batch of uint8 images of any size N, normalizes them itself and
    returns logits and probabilities. A file that does not agree with convlens is deleted.

    Examples:
        convlens export digits
        convlens export digits --to onnx,torch
        convlens predict models/digits/model.onnx a.png
    """
    from convlens import run as runs
    from convlens.exporting import making
    from convlens.showing.results import exported

    formats = listed(",".join(to or ["onnx"]))
    place = runs.find(run)
    made = making.export(place, formats, output=output, data=data)
    if not as_json:
        exported(made)
    print_json(as_json, {"run": place.name, "exports": [each.to_dict() for each in made]})


@app.command(cls=Command)
def audit(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    overrides: Overrides = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Exit with code 3 if files are unreadable, if copies are in several splits or "
            "under two labels, or if training would refuse the data set.",
        ),
    ] = False,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Check a data set before training: counts, sizes, unreadable files, duplicates.

    Examples:
        convlens audit photos/
        convlens audit photos/ val_fraction=0.2
        convlens audit photos/ --strict
    """
    from convlens import picturing
    from convlens.data import audit as auditing
    from convlens.showing.results import audited
    from convlens.starting import asking

    report = auditing.audit(asking.read_data(data, overrides or []))
    sheet = picturing.data_sheet(report)
    if not as_json:
        audited(report, sheet)
    print_json(as_json, {**report.to_dict(), "contact_sheet": str(sheet)})
    if strict:
        _raise_if_flawed(report)


@app.command(cls=Command)
def augment(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|FILE.yaml", help="Recipe whose augmentation to draw.")
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    overrides: Overrides = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Draw a batch of training images before and after a recipe's augmentation.

    Examples:
        convlens augment tiny-cpu cifar10
        convlens augment mine.yaml photos/
    """
    from convlens import picturing
    from convlens.showing.results import drawn
    from convlens.starting import asking

    resolved = asking.read_on(recipe, data, overrides or [])
    batch = picturing.augmented_sheet(resolved)
    if not as_json:
        drawn(batch)
    print_json(as_json, {"data": data, "recipe": resolved.name, "augmented_batch": str(batch)})


@app.command(cls=Command)
def shard(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder for the shards.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write a data set as shards (tar files in WebDataset format).

    Examples:
        convlens shard photos/ photos-shards
        convlens train photos-shards
    """
    from convlens.data import sharding
    from convlens.showing.results import sharded
    from convlens.starting import asking

    written = sharding.to_shards(asking.read_data(data, overrides or []), out)
    if not as_json:
        sharded(written)
    print_json(as_json, written.to_dict())


@app.command(cls=Command)
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Recipe to print.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one as a file that can be trained.

    Examples:
        convlens recipes
        convlens recipes mnist > mine.yaml
        convlens recipes mnist --json
    """
    from convlens import recipe as store
    from convlens.showing.results import recipe_table

    if name is not None:
        text = store.text(name)
        if as_json:
            found = store.variants(name)
            content = store.load(name).model_dump(mode="json")
            print_json(True, content | ({"variants": found} if found else {}))
        else:
            sys.stdout.write(text)
        return
    every = {each: store.load(each) for each in store.names()}
    if as_json:
        print_json(True, {each: recipe.about for each, recipe in every.items()})
    else:
        recipe_table(every, {each: list(store.variants(each)) for each in every})


def _raise_if_flawed(report: Audit) -> None:
    """Raise the error with which `--strict` ends, if the audit found problems."""
    from convlens.errors import DataError

    counts = {
        "unreadable files": len(report.unreadable),
        "copies across splits": report.duplicates.across_splits,
        "copies under two labels": report.duplicates.two_labels,
        "problems that training refuses": len(report.problems),
    }
    found = [f"{count:,} {what}" for what, count in counts.items() if count]
    if found:
        raise DataError(", ".join(found), where=report.name, fix="fix the problems listed above")


def _last(results: list[dict[str, Any]]) -> dict[str, Any]:
    return results[-1] if results else {}

"""Training and using models: `train evaluate predict export audit augment shard
recipes`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convlens.cli.shared import (
    DATA_HELP,
    DataSet,
    Device,
    Figures,
    Json,
    Overrides,
    RunName,
    Tta,
    app,
    listed,
    print_json,
)
from convlens.system.console import say

if TYPE_CHECKING:
    from convlens.data.audit import Audit


@app.command()
def train(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|FILE.yaml|DATA", help="What to train, on what.")
    ],
    overrides: Overrides = None,
    data: DataSet = None,
    variants: Annotated[
        str | None, typer.Option(metavar="all|NAME,...", help="Train these variants of the recipe.")
    ] = None,
    repeat_splits: Annotated[
        int, typer.Option(min=1, help="Repeat over N random data splits.")
    ] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Train with that many seeds.")] = 1,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Cross-validate in that many folds; no test.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Find the epochs, train anew on all images, test that.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew in a new folder.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on from a finished run with fewer epochs.")
    ] = False,
    no_test: Annotated[bool, typer.Option("--no-test", help="Keep the test split sealed.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only operations that repeat bit for bit.")
    ] = False,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Train a recipe, or the default one on your own images, and test it once.

    [dim]convlens train mnist · convlens train photos/ data.image_size=96 · convlens train digits
    --seeds 5 · convlens train digits --folds 5 · convlens train digits train.epochs=60 --extend[/]
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
            raise UsageError("--extend is for a single run", fix="extend them one by one")
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


@app.command()
def evaluate(
    run: RunName,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    data: DataSet = None,
    tta: Tta = None,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Measure a trained model on one of its splits, or on another data set."""
    from convlens import evaluation, run as runs
    from convlens.showing.results import evaluated

    place = runs.find(run)
    result = evaluation.evaluate(place, split, data=data, tta=tta, on=device)
    if not as_json:
        evaluated(result, place, own=data is None)
    print_json(as_json, result.to_dict())


@app.command()
def predict(
    run: RunName,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Files, folders, globs, - (stdin)."),
    ] = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Classes to name.")] = 1,
    output: Annotated[str, typer.Option("--format", "-f", help="table, csv or json.")] = "table",
    tta: Tta = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Classify image files: a table, CSV or JSON of filename, label and probability."""
    from convlens import exported, prediction, run as runs, views
    from convlens.errors import DataError
    from convlens.names import pick
    from convlens.showing.results import WRITERS

    write = pick(WRITERS, "json" if as_json else output, "format")
    views.chosen(tta)  # a typo is told before anything is read or written
    loaded = exported.open_model(runs.find(run).model_path)
    asked = paths or ["-"]
    named = [line.strip() for line in sys.stdin if line.strip()] if "-" in asked else []
    files = prediction.expand([*(path for path in asked if path != "-"), *named])
    if not files:
        say("nothing to predict: no file was named on stdin")
    answers = prediction.predict(loaded, files, top_k=top, tta=tta, on=device)
    failed = write(answers, top, tta is not None)
    if failed:
        raise DataError(
            f"{failed} of {len(files)} files could not be read; the others are done",
            fix="the reasons stand beside their names",
        )


@app.command()
def export(
    run: RunName,
    to: Annotated[
        list[str] | None, typer.Option(metavar="onnx|torch", help="One or several formats.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images to compare answers on; by default the run's validation images.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for other programs, and prove on real images that it answers the same.

    The file takes uint8 images, any number at once, normalises them itself and gives logits and
    probabilities; what doesn't agree with convlens is not kept.

    [dim]convlens export digits · convlens export digits --to onnx,torch · convlens predict
    models/digits/model.onnx a.png[/]
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


@app.command()
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
    """Check a data set before training: counts, sizes, unreadable files, duplicates."""
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


@app.command()
def augment(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|FILE.yaml", help="Recipe whose augmentation to draw.")
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    overrides: Overrides = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Draw a batch of training images before and after a recipe's augmentation."""
    from convlens import picturing
    from convlens.showing.results import drawn
    from convlens.starting import asking

    resolved = asking.read_on(recipe, data, overrides or [])
    batch = picturing.augmented_sheet(resolved)
    if not as_json:
        drawn(batch)
    print_json(as_json, {"data": data, "recipe": resolved.name, "augmented_batch": str(batch)})


@app.command()
def shard(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder for the shards.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write a data set as shards (tar files in WebDataset format)."""
    from convlens.data import sharding
    from convlens.showing.results import sharded
    from convlens.starting import asking

    written = sharding.to_shards(asking.read_data(data, overrides or []), out)
    if not as_json:
        sharded(written)
    print_json(as_json, written.to_dict())


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One recipe.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one as a file that trains as it stands."""
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

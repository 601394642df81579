"""Commands for models and data: `train evaluate predict export audit augment shard`.

Also the table of several runs (variants, splits, seeds, folds) that `train` prints.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table as RichTable

from convlens.cli import completion
from convlens.cli.common import (
    DATA_HELP,
    DEVICE_HELP,
    Command,
    ConfidenceOption,
    DataKeysArgument,
    DataOption,
    DataOverridesArgument,
    DeviceOption,
    Figures,
    JsonOption,
    MaxPixelsOption,
    MinAccuracyOption,
    OverridesArgument,
    PredictionSetOption,
    RunArgument,
    Split,
    TrustCode,
    TtaOption,
    app,
    parse_data,
    parse_share_option,
    print_json,
    split_commas,
)
from convlens.cli.results import make_table, stdout_console
from convlens.utils.console import print_status
from convlens.utils.process import process_age

if TYPE_CHECKING:  # these import torch, which `--help` must not wait for
    from convlens.data.audit import Audit
    from convlens.training.repeats import RunOutcome, RunResults, VariantSummary

Row = dict[str, str]
# Titles of the panels of options of `train`.
THIS_RUN, EARLIER_RUNS, SEVERAL_RUNS = "This run", "Earlier runs", "Several runs"
PREDICT_EXAMPLE = (
    "name files or folders: convlens predict digits a.png new/; or pipe an image or names"
)
SPLIT_NAMES = {"test": "test", "val": "validation"}
# Columns of the table of runs that a narrow terminal leaves out, the least important first.
OPTIONAL_COLUMNS = (
    "CPU s",
    "weights",
    "trained",
    "95% interval",
    "s",
    "epoch",
    "balanced %",
    "macro F1 %",
)
CLASS_MEANS_COLUMNS = ("macro F1 %", "balanced %")


@app.command(cls=Command)
def train(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATA|RECIPE|FILE.yaml",
            help="Your images (a folder with one sub-folder per class, a list, shards), a built-in "
            "set (digits, mnist, cifar10 ...), a recipe (`convlens recipes`) or a recipe file.",
            autocompletion=completion.complete_training,
        ),
    ],
    overrides: OverridesArgument = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Train the recipe on these images instead of its own.",
            autocompletion=completion.complete_data,
            rich_help_panel=THIS_RUN,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the run. Default: that of the recipe or data set.",
            rich_help_panel=THIS_RUN,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help=DEVICE_HELP, rich_help_panel=THIS_RUN),
    ] = None,
    no_test: Annotated[
        bool,
        typer.Option(
            "--no-test",
            help="Do not use the test images now; `convlens evaluate` does so later.",
            rich_help_panel=THIS_RUN,
        ),
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Use deterministic algorithms only: exactly repeatable on this machine, somewhat "
            "slower.",
            rich_help_panel=THIS_RUN,
        ),
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Start over in a new run, instead of resuming or reusing the old one.",
            rich_help_panel=EARLIER_RUNS,
        ),
    ] = False,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Continue a finished run for more epochs; train.epochs is the new total.",
            rich_help_panel=EARLIER_RUNS,
        ),
    ] = False,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Repeat with N random seeds, for mean ± sd: 3 to 5 tell progress from luck.",
            rich_help_panel=SEVERAL_RUNS,
        ),
    ] = 1,
    repeat_splits: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Repeat with N random divisions into train, validation and test, for mean ± sd.",
            rich_help_panel=SEVERAL_RUNS,
        ),
    ] = 1,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="K",
            help="K-fold cross-validation; the test images are not used.",
            rich_help_panel=SEVERAL_RUNS,
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="Choose the number of epochs on validation, then train again on training and "
            "validation images together, and test that model.",
            rich_help_panel=SEVERAL_RUNS,
        ),
    ] = False,
    variants: Annotated[
        str | None,
        typer.Option(
            metavar="all|NAME,...",
            help="Train named variants of the recipe and compare them.",
            rich_help_panel=SEVERAL_RUNS,
        ),
    ] = None,
    trust_code: TrustCode = False,
    figures: Figures = None,
    as_json: JsonOption = False,
) -> None:
    """Train a classifier on a folder of images (one sub-folder per class), or a ready-made recipe.

    The model is tested once, on images that it never saw. The same command resumes a stopped run,
    and shows the result of a finished one again; any change starts a new run.

    Examples:
        convlens train photos/
        convlens train photos/ train.minutes=10 data.fit=pad
        convlens train mnist train.epochs=15
        convlens train digits --seeds 5
        convlens train digits --folds 5
        convlens train resnet18-pretrained --variants all
        convlens train digits train.epochs=60 --extend
    """
    from convlens import user_code
    from convlens.cli.results import print_run_summary
    from convlens.errors import UsageError
    from convlens.training import resolve, train as training_train
    from convlens.training.repeats import train_many

    changes = [*(overrides or []), *(["train.deterministic=true"] if deterministic else [])]
    options: dict[str, Any] = {"name": name, "fresh": fresh, "test": not no_test, "device": device}
    if variants is not None or repeat_splits > 1 or seeds > 1 or folds is not None or refit:
        if extend:
            raise UsageError("--extend needs a single run", fix="extend the runs one by one")
        resolved_variants = resolve.resolve_variants(source, variants, data=data, overrides=changes)
        options |= {"repeat_splits": repeat_splits, "seeds": seeds, "folds": folds, "refit": refit}
        recipes = [each.recipe for each in resolved_variants.values()]
        with user_code.trust(resolve.named_code(recipes, [source, data, *changes])):
            results = train_many(resolved_variants, **options)
        if not as_json:
            print_run_table(results)
        print_json(as_json, results.to_dict())
        return
    resolved = resolve.resolve_recipe(source, data=data, overrides=changes)
    with user_code.trust(resolve.named_code([resolved.recipe], [source, data, *changes])):
        run_dir = training_train.train(
            resolved.recipe,
            is_unmodified_recipe=resolved.is_unmodified,
            extend=extend,
            started=time.monotonic() - process_age(),
            **options,
        )
    if not as_json:
        print_run_summary(run_dir)
    evaluations = [] if no_test else run_dir.evaluations()
    last = evaluations[-1] if evaluations else {}
    print_json(as_json, {"run": run_dir.name, "path": str(run_dir.path), **last})


@app.command(cls=Command)
def evaluate(
    run: RunArgument,
    keys: DataKeysArgument = None,
    split: Split = None,
    data: DataOption = None,
    tta: TtaOption = None,
    min_accuracy: MinAccuracyOption = None,
    confidence: ConfidenceOption = "95%",
    prediction_set: PredictionSetOption = None,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
    figures: Figures = None,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, scores of each class and confusions on the test images, or on other images.

    Each command that shows something of a run's test images is logged as one use of them: the more
    often they are used for decisions, the less their accuracy means. DATA with the images of the
    run itself, which may have moved, is recognized.

    Examples:
        convlens evaluate digits
        convlens evaluate digits --split val
        convlens evaluate digits --tta flip
        convlens evaluate digits --data more-digits/
        convlens evaluate flowers --data new.csv data.images=photos
        convlens evaluate digits --min-accuracy 95% --prediction-set 90%
    """
    from convlens import evaluation
    from convlens.cli.results import print_evaluation
    from convlens.run import find_run

    run_dir = find_run(run)
    result = evaluation.evaluate(
        run_dir,
        split,
        data=parse_data(data, keys),
        tta=tta,
        min_accuracy=parse_share_option("--min-accuracy", min_accuracy),
        confidence=parse_share_option("--confidence", confidence) or 0.95,
        prediction_set=parse_share_option("--prediction-set", prediction_set),
        device=device,
        quiet=False,
    )
    if not as_json:
        print_evaluation(result, run_dir)
    print_json(as_json, result.to_dict())


@app.command(cls=Command)
def predict(
    run: RunArgument,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="Images: files, folders, globs, or - for standard input (an image, or names, one "
            "per line).",
            autocompletion=completion.complete_image,
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", "-k", min=1, metavar="K", help="Number of classes to print.")
    ] = 1,
    output: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="table|csv|json",
            help="Output format.",
            autocompletion=lambda incomplete: completion.one_of(incomplete, "table", "csv", "json"),
        ),
    ] = "table",
    tta: TtaOption = None,
    min_accuracy: MinAccuracyOption = None,
    confidence: ConfidenceOption = "95%",
    prediction_set: PredictionSetOption = None,
    value_range: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="LOW,HIGH",
            help="Values of 16-bit, 32-bit and float images that become black and white. Default: "
            "those of the training.",
        ),
    ] = None,
    max_pixels: MaxPixelsOption = None,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Same as --format json.", hidden=True)
    ] = False,
) -> None:
    """Classify images: prints file name, label and probability of each one.

    Examples:
        convlens predict digits a.png b.png
        convlens predict digits new/*.png -k 3
        convlens predict digits new/ --format csv > answers.csv
        convlens predict models/digits/model.onnx a.png
        convlens predict digits new/ --min-accuracy 95%
        find . -name '*.png' | convlens predict digits -
        curl -s https://example.org/a.png | convlens predict digits -
    """
    from convlens.errors import DataError, UsageError, lookup

    if not paths and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError("no image was named", fix=PREDICT_EXAMPLE)
    from convlens import onnx_model, prediction
    from convlens.cli.results import WRITERS
    from convlens.data.input_images import collect_inputs, inputs_from_stdin
    from convlens.engine import inference
    from convlens.run import find_run
    from convlens.uncertainty.promises import Promises

    write = lookup(WRITERS, "json" if as_json else output, "format")
    inference.select_views(tta)  # report a typo before anything is read or written
    loaded = onnx_model.load_model_or_onnx(find_run(run).model_path)
    loaded.select_device(device)  # likewise
    reader = prediction.ImageReader(
        loaded.preprocessing.conversion,
        value_range=None if value_range is None else value_range.strip("[]() ").split(","),
        max_pixels=max_pixels,
    )
    named = [path for path in paths or () if path != "-"]
    from_stdin = inputs_from_stdin(_read_stdin()) if not paths or "-" in paths else []
    inputs = collect_inputs([*named, *from_stdin])
    if not inputs:
        raise UsageError("no image was named: standard input is empty", fix=PREDICT_EXAMPLE)
    promises = Promises.of(
        loaded.calibration,
        parse_share_option("--min-accuracy", min_accuracy),
        parse_share_option("--confidence", confidence) or 0.95,
        parse_share_option("--prediction-set", prediction_set),
    )
    if promises.answer_from == math.inf:
        print_status("no confidence keeps this promise on the held-out images: all are unsure")
    predictions = prediction.iter_predictions(
        loaded, inputs, top_k=top, tta=tta, promises=promises, reader=reader, device=device
    )
    columns = prediction.PredictionColumns(
        top,
        tta=tta is not None,
        unsure=promises.min_accuracy is not None,
        sets=promises.coverage is not None,
        unlike=loaded.calibration.detector is not None,
    )
    failed = write(predictions, columns)
    for note in reader.notes("--range LOW,HIGH gives the values that become black and white"):
        print_status(escape(note))
    if failed:
        others = "; the others were classified" if failed < len(inputs) else ""
        raise DataError(
            f"{failed} of {len(inputs)} files could not be read{others}",
            fix="see the reason beside each file name",
        )


def _read_stdin() -> bytes:
    """Return what standard input holds, up to a little more than the largest image."""
    from convlens.data.decode import MAX_BYTES

    if sys.stdin is None:  # a program without a console on Windows
        return b""
    if hasattr(sys.stdin, "buffer"):
        content: bytes = sys.stdin.buffer.read(MAX_BYTES + 1)
        return content
    return sys.stdin.read().encode("utf-8", "surrogateescape")  # replaced by text in memory


@app.command(cls=Command)
def export(
    run: RunArgument,
    keys: DataKeysArgument = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="onnx|torch",
            help="Formats, separated by commas. Default: onnx.",
            autocompletion=lambda incomplete: completion.list_of(incomplete, "onnx", "torch"),
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="File to write. Default: in the run."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images for the check. Default: validation images of the run.",
            autocompletion=completion.complete_data,
        ),
    ] = None,
    as_json: JsonOption = False,
    trust_code: TrustCode = False,
) -> None:
    """Write ONNX or PyTorch files for other programs, checked on real images to answer the same.

    The exported model takes uint8 images [N, C, H, W] with any N, normalizes them itself and
    returns logits and probabilities. If its answers differ from those of convlens, no file is
    written.

    Examples:
        convlens export digits
        convlens export digits --to onnx,torch
        convlens export digits --data new.csv data.images=photos
        convlens predict models/digits/model.onnx a.png
    """
    from convlens import model_export
    from convlens.cli.results import print_exports
    from convlens.run import find_run

    formats = split_commas(",".join(to or ["onnx"]))
    run_dir = find_run(run)
    exports = model_export.export(
        run_dir, formats, output=output, data=parse_data(data, keys), quiet=False
    )
    if not as_json:
        print_exports(exports)
    print_json(as_json, {"run": run_dir.name, "exports": [each.to_dict() for each in exports]})


@app.command(cls=Command)
def audit(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help=DATA_HELP, autocompletion=completion.complete_data)
    ],
    overrides: DataOverridesArgument = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Exit with code 3 if anything is wrong, for scripts: unreadable files, copies in "
            "several splits or under two labels, or a set that training would refuse.",
        ),
    ] = False,
    figures: Figures = None,
    trust_code: TrustCode = False,
    as_json: JsonOption = False,
) -> None:
    """Check a data set before training: counts, unreadable files, duplicates, leaks.

    Draws a contact sheet. Nothing is changed.

    Examples:
        convlens audit photos/
        convlens audit photos/ val_fraction=0.2
        convlens audit photos/ --strict
    """
    from convlens import run_plots
    from convlens.cli.results import print_audit
    from convlens.data import audit as data_audit
    from convlens.training import resolve

    report = data_audit.audit(resolve.resolve_data_config(data, overrides or []))
    sheet = run_plots.plot_data_sheet(report)
    if not as_json:
        print_audit(report, sheet)
    print_json(as_json, {**report.to_dict(), "contact_sheet": str(sheet)})
    if strict:
        _raise_if_flawed(report)


@app.command(cls=Command)
def augment(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|FILE.yaml",
            help="Recipe with the augmentation.",
            autocompletion=completion.complete_recipe,
        ),
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help=DATA_HELP, autocompletion=completion.complete_data)
    ],
    overrides: DataOverridesArgument = None,
    figures: Figures = None,
    as_json: JsonOption = False,
    trust_code: TrustCode = False,
) -> None:
    """Draw training images before and after the augmentation of a recipe.

    Examples:
        convlens augment tiny-cpu cifar10
        convlens augment mine.yaml photos/
    """
    from convlens import run_plots
    from convlens.cli.results import print_augmented_sheet
    from convlens.training import resolve, setup

    requested = resolve.recipe_for_dataset(recipe, data, overrides or [])
    run_plots.check_augmentation(requested)
    resolved, images = setup.load_for_training(requested)
    images.print_notes()
    sheet = run_plots.plot_augmented_sheet(resolved, images)
    if not as_json:
        print_augmented_sheet(sheet)
    print_json(as_json, {"data": data, "recipe": resolved.name, "augmented_batch": str(sheet)})


@app.command(cls=Command)
def shard(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help=DATA_HELP, autocompletion=completion.complete_data)
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to create.")],
    overrides: DataOverridesArgument = None,
    trust_code: TrustCode = False,
    as_json: JsonOption = False,
) -> None:
    """Write a data set as shards, which are read faster if there are very many images.

    Shards are tar files in the format of WebDataset.

    Examples:
        convlens shard photos/ photos-shards
        convlens train photos-shards
    """
    from convlens.cli.results import print_shards
    from convlens.data import shard_writer
    from convlens.training import resolve

    written = shard_writer.export_shards(resolve.resolve_data_config(data, overrides or []), out)
    if not as_json:
        print_shards(written)
    print_json(as_json, written.to_dict())


def _raise_if_flawed(report: Audit) -> None:
    """Raise the error of `--strict` if the audit found problems."""
    from convlens.errors import DataError

    counts = {
        "unreadable files": len(report.unreadable),
        "copies across splits": report.duplicates.across_splits,
        "copies under two labels": report.duplicates.two_labels,
        "problems that training refuses": len(report.problems),
    }
    problems = [f"{count:,} {kind}" for kind, count in counts.items() if count]
    if problems:
        raise DataError(", ".join(problems), where=report.name, fix="fix the problems listed above")


def print_run_table(result: RunResults) -> None:
    """Print a row for each run of one variant, or for each of several variants; then a summary."""
    out, summaries = stdout_console(), result.summaries
    rows = _variant_rows(result) if len(summaries) > 1 else _run_rows(result)
    out.print(_fit_table(rows, out.width))
    repeats = result.repeats_in_words()
    if len(summaries) == 1:
        out.print(_summary_sentence(result, summaries[0], repeats))
    elif repeats:
        out.print(f"accuracies are mean ± sd of {repeats}")
    for summary in summaries:
        if summary.parts:
            between, within = map(_percent, summary.parts)
            name = f"{escape(summary.variant)}: " if summary.variant else ""
            out.print(f"{name}sd {between} points between splits, {within} between seeds")
    if result.is_optimistic:
        print_status(
            "[dim]slightly optimistic: the same images chose the epoch "
            "(not with train.keep=last)[/]"
        )
    if result.plot.exists():
        out.print(escape(f"plot   {result.plot}"))


def _summary_sentence(result: RunResults, summary: VariantSummary, repeats: str) -> str:
    accuracy = "out-of-fold accuracy" if result.folds else f"{SPLIT_NAMES[result.split]} accuracy"
    if summary.interval95 is None:
        mean_sd = _mean_sd(summary.mean, summary.sd)
        return f"{accuracy} [bold]{mean_sd} %[/] (mean ± sd of {repeats})"
    low, high = summary.interval95
    return (
        f"{accuracy} [bold]{summary.mean:.2%}[/] "
        f"(95% interval {low:.2%} to {high:.2%}, n = {summary.n:,})"
    )


def _variant_rows(result: RunResults) -> list[Row]:
    """Return a row for each variant, with its gain over the first one."""
    from convlens.metrics import mean_sd
    from convlens.training.repeats import trainable_parameters

    rows = []
    first = result.summaries[0].variant
    for number, summary in enumerate(result.summaries):
        facts, val_accuracy = summary.outcomes[0].metadata, summary.val_accuracy
        accuracy = _mean_sd(summary.mean, summary.sd)
        if summary.interval95 is not None:
            accuracy += f" ({_interval(summary.interval95)})"
        row = {"variant": summary.variant or "", f"{SPLIT_NAMES[result.split]} %": accuracy}
        for name, values in zip(
            CLASS_MEANS_COLUMNS, zip(*summary.class_means, strict=True), strict=True
        ):
            row[name] = _mean_sd(*mean_sd(values))
        gain, sd = result.gains()[number]
        row[f"over {first}"] = _mean_sd(gain, sd, sign="+") if number else "-"
        if result.split == "test":
            row["validation %"] = _mean_sd(*val_accuracy) if val_accuracy else "-"
        row |= {
            "epoch": _epochs(summary.outcomes),
            "trained": f"{trainable_parameters(facts):,}",
            "weights": f"{facts['parameters']:,}",
            "s": _seconds(summary.mean_of("training_seconds")),
            "CPU s": _seconds(summary.mean_of("cpu_seconds")),
        }
        rows.append(row)
    return rows


def _run_rows(result: RunResults) -> list[Row]:
    """Return a row for each run; splits, seeds and folds have a column if there are several."""
    has_column = {
        "split": result.repeat_splits > 1,
        "seed": result.seeds > 1,
        "fold": bool(result.folds),
    }
    rows = []
    for outcome in result.outcomes:
        planned, evaluation = outcome.planned, outcome.evaluation
        cells = {"split": planned.data_seed, "seed": planned.seed, "fold": planned.fold}
        row = {"run": outcome.run_dir.name}
        row |= {name: str(cells[name]) for name, several in has_column.items() if several}
        row[f"{SPLIT_NAMES[result.split]} %"] = _percent(evaluation.accuracy)
        row["95% interval"] = _interval(evaluation.interval95)
        class_means = (evaluation.macro_f1, evaluation.balanced_accuracy)
        row |= zip(CLASS_MEANS_COLUMNS, map(_percent, class_means), strict=True)
        if result.split == "test":
            val_accuracy = outcome.val_accuracy
            row["validation %"] = "-" if val_accuracy is None else _percent(val_accuracy)
        row |= {
            "epoch": _epochs([outcome]),
            "s": _seconds(outcome.total("training_seconds")),
            "CPU s": _seconds(outcome.total("cpu_seconds")),
        }
        rows.append(row)
    return rows


def _fit_table(rows: list[Row], max_width: int) -> RichTable:
    """Build the table; the least important columns are left out in a narrow terminal."""
    columns = list(rows[0])
    widths = {c: 3 + max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    for column in OPTIONAL_COLUMNS:
        if sum(widths[c] for c in columns) + 2 > max_width and column in columns:
            columns.remove(column)
    table = make_table(*columns)
    for table_column in table.columns:
        table_column.no_wrap = table_column is not table.columns[0]
        table_column.overflow = "fold"
    for row in rows:
        table.add_row(*(escape(row[c]) for c in columns))
    return table


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f}"


def _interval(interval95: tuple[float, float]) -> str:
    low, high = interval95
    return f"{100 * low:.1f}-{100 * high:.1f}"


def _mean_sd(mean: float, sd: float | None, sign: str = "") -> str:
    return f"{100 * mean:{sign}.2f}" + ("" if sd is None else f" ± {_percent(sd)}")


def _epochs(outcomes: Sequence[RunOutcome]) -> str:
    """Format the chosen epoch and the number of epochs, e.g. `12/30`, or their ranges."""
    ranges = []
    for values in zip(*(outcome.epochs for outcome in outcomes), strict=True):
        low, high = min(values), max(values)
        ranges.append(str(low) if low == high else f"{low}-{high}")
    return "/".join(ranges)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"

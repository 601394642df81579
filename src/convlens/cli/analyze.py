"""Commands that analyze runs, data and parts: `compare diagnose labels report check`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from convlens.cli import completion
from convlens.cli.common import (
    Command,
    DataOption,
    DeviceOption,
    Figures,
    JsonOption,
    OverridesArgument,
    RunArgument,
    Split,
    TrustCode,
    app,
    parse_data,
    print_json,
    split_data_keys,
)
from convlens.cli.results import make_table, stdout_console
from convlens.utils.console import print_status

if TYPE_CHECKING:  # these import torch, which `--help` must not wait for
    from convlens.analysis.compare import Comparison, Group
    from convlens.analysis.diagnosis import Diagnosis, Finding
    from convlens.analysis.label_errors import JudgedImage, LabelReport
    from convlens.analysis.part_check import PartCheck

COMPARISON_COLUMNS = (
    "run",
    "accuracy %",
    "macro F1 %",
    "balanced %",
    "loss",
    "ECE",
    "weights",
    "MFLOPs",
    "trained s",
    "images/s",
    "MB",
)
EVIDENCE_SHOWN = 12  # entries of a table in the evidence of a finding
SUSPECTS_SHOWN = 20  # suspects in the table; the CSV file has all of them
PAIRS_SHOWN = 8
LOW_AGREEMENT = 0.8  # agreement below which most suspects are mistakes of the models
# `benchmarks/labels.py`, symmetric and asymmetric errors.
PLANTED_ERRORS = (
    "With 5% of the labels changed on purpose, 96 to 97 of the first 100 suspects were wrong on "
    "digits (models agreed with 94% of the labels), 86 to 94 on MNIST (90%), 13 on CIFAR-10 (50%)."
)
LOW_AGREEMENT_WARNING = (
    "The models agree with so few labels that most suspects are probably mistakes of the models: "
    "check only the first ones, or use a better recipe."
)


@app.command(cls=Command)
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN... [KEY=VALUE]...",
            help="Trained models: the first one, and those that are compared with it; then how to "
            "read DATA.",
            autocompletion=completion.complete_run,
        ),
    ],
    split: Split = None,
    data: DataOption = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Compare although images or classes differ, then without a test.",
        ),
    ] = False,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
    figures: Figures = None,
    as_json: JsonOption = False,
) -> None:
    """Find out whether one model is really better: runs on the same images, with a test.

    Each run is compared with the first one. Runs that differ only in their seeds form one group. A
    comparison on test images is logged as a use of them, for each run.

    Examples:
        convlens compare resnet18 resnet18-noaug
        convlens compare resnet18 resnet18-noaug --split val
        convlens compare resnet18 resnet18-noaug --data new.csv data.images=photos
    """
    from convlens.analysis import compare as analysis_compare

    names, keys = split_data_keys(runs)
    result = analysis_compare.compare(
        *names,
        split=split,
        data=parse_data(data, keys),
        force=force,
        device=device,
        quiet=False,
    )
    if not as_json:
        print_comparison(result)
    print_json(as_json, result.to_dict())


@app.command(cls=Command)
def diagnose(
    run: RunArgument,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
    as_json: JsonOption = False,
) -> None:
    """Find out what went wrong in a training, and what to change.

    Looks for overfitting, underfitting, a wrong learning rate, dead layers, unequal classes, slow
    loading and more in the learning curves and on some training and validation images. The test
    images are not used.

    Examples:
        convlens diagnose mnist
    """
    from convlens.analysis import diagnosis

    result = diagnosis.diagnose(run, device=device, quiet=False)
    if not as_json:
        print_diagnosis(result)
    print_json(as_json, result.to_dict())


@app.command(cls=Command)
def labels(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATA|RUN|RECIPE",
            help="Images, or a run or recipe that uses them.",
            autocompletion=completion.complete_source,
        ),
    ],
    overrides: OverridesArgument = None,
    data: DataOption = None,
    folds: Annotated[
        int,
        typer.Option(
            min=2, metavar="K", help="Number of models to train; each checks a share of the images."
        ),
    ] = 5,
    test: Annotated[
        bool,
        typer.Option("--test", help="Also check the labels of test images (logged as a use)."),
    ] = False,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the runs.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the models again.")] = False,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
    figures: Figures = None,
    as_json: JsonOption = False,
) -> None:
    """Find labels that are probably wrong: a sheet of images and a CSV file to correct.

    Trains 5 models, so it takes 5 times as long as one training (--folds 3: 3 times). Each image
    is judged by a model that was not trained on it. `convlens explore` then corrects them by
    keyboard.

    Examples:
        convlens labels photos/
        convlens labels photos/ train.epochs=10 --folds 3
    """
    from convlens.analysis.label_errors import find_label_errors

    report = find_label_errors(
        source,
        overrides or [],
        data=data,
        folds=folds,
        test=test,
        name=name,
        fresh=fresh,
        device=device,
    )
    if not as_json:
        print_label_report(report)
    print_json(as_json, report.to_dict())


@app.command(cls=Command)
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Trained models; several are compared.",
            autocompletion=completion.complete_run,
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File to write. Default: plots/RUN/report.html."
        ),
    ] = None,
    audit: Annotated[
        bool | None,
        typer.Option(
            "--audit/--no-audit",
            help="Check every image of the data set, too. Default: for small sets.",
        ),
    ] = None,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page about a model: verdict, curves, confusions, examples, what it sees.

    The page is a single file without requests to other hosts. It shows test results only if the
    test images were used before; then each page is logged as one more use.

    Examples:
        convlens report resnet18
        convlens report resnet18 resnet18-noaug -o comparison.html
    """
    from convlens.cli.results import print_report
    from convlens.reports import build

    page = build.report(*runs, output=output, audit=audit, device=device, quiet=False)
    if not as_json:
        print_report(page)
    print_json(as_json, page.to_dict())


@app.command(cls=Command)
def check(
    part: Annotated[
        str, typer.Argument(metavar="PART", help="FILE.py:NAME or package.module:NAME.")
    ],
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options of the part, e.g. width=64."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="network|loss|optimizer|augmentation|dataset",
            help="What the part is, if it cannot be recognized.",
        ),
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=8, metavar="N", help="Size of the images for a network.")
    ] = 32,
    as_json: JsonOption = False,
) -> None:
    """Import a network, loss, optimizer, augmentation or data set of yours, and check it.

    The checks are those that the package's own parts have to pass. The exit code is 1 if one
    fails.

    Examples:
        convlens check ./mynet.py:Net
        convlens check ./mynet.py:Net width=64 --image-size 64
        convlens train flowers model.name=./mynet.py:Net model.width=64
    """
    from convlens.analysis.part_check import check_part
    from convlens.recipe import parse_values

    result = check_part(part, parse_values(values or []), kind=kind, image_size=image_size)
    if not as_json:
        print_part_check(result)
    print_json(as_json, result.to_dict())
    if not result.passed:
        raise typer.Exit(1)


def print_part_check(result: PartCheck) -> None:
    """Print a table of the checks, and what to do about those that failed."""
    out = stdout_console()
    table = make_table("check", "", "found", title=f"{result.part} ({result.kind})")
    for each in result.results:
        mark = "[green]ok[/]" if each.passed else "[bold red]fails[/]"
        table.add_row(each.name, mark, escape(each.found))
    out.print(table)
    failed = [each for each in result.results if not each.passed]
    for each in failed:
        out.print(f"{each.name}: {escape(each.found)}\n  do: {escape(each.fix)}", soft_wrap=True)
    out.print(f"{len(result.results) - len(failed)} of {len(result.results)} checks passed")


def print_comparison(result: Comparison) -> None:
    """Print the table, a sentence for each verdict, notes and the paths of the plots."""
    out = stdout_console()
    table = make_table(*COMPARISON_COLUMNS)
    for column in table.columns:
        column.no_wrap = column is not table.columns[0]
        column.overflow = "fold"
    for group in result.groups:
        table.add_row(escape(group.name), *_comparison_cells(group))
    out.print(table)
    n = sorted({member.evaluation.n for group in result.groups for member in group.members})
    counts = " or ".join(f"{count:,}" for count in n)
    images = "all images" if result.split == "all" else f"{result.split} split"
    out.print(
        f"{images} of {escape(result.data)}, {counts} images; MFLOPs for one image (a "
        "multiply-add counts as two); images/s of inference on this machine; trained s depends on "
        "what else the machine did"
    )
    for verdict in result.verdicts:
        style = "bold" if verdict.differs else "not bold"
        out.print(f"[{style}]{escape(verdict.sentence)}[/]")
        if verdict.class_means:
            out.print(escape(verdict.class_means_sentence))
    for note in result.notes:
        print_status(f"[dim]{escape(note)}[/]")
    for path in result.plots:
        out.print(escape(f"plot   {path}"))


def _comparison_cells(group: Group) -> list[str]:
    from convlens import metrics

    mean, sd = metrics.mean_sd(group.accuracies)
    accuracy = f"{100 * mean:.2f}"
    if group.interval95 is not None:
        low, high = group.interval95
        accuracy += f" ({100 * low:.1f}-{100 * high:.1f})"
    elif sd is not None:
        accuracy += f" ± {100 * sd:.2f}"
    seconds = group.mean_of("training_seconds")
    return [
        accuracy,
        _format_number(group, "macro_f1", "{:.2f}", 0.01),
        _format_number(group, "balanced_accuracy", "{:.2f}", 0.01),
        _format_number(group, "loss", "{:.4f}"),
        _format_number(group, "ece", "{:.3f}"),
        _format_number(group, "parameters", "{:,.0f}"),
        _format_number(group, "flops", "{:,.1f}", 1e6),
        "-" if seconds is None else f"{seconds:,.1f}",
        _format_number(group, "images_per_second", "{:,.0f}"),
        _format_number(group, "file_bytes", "{:,.1f}", 1e6),
    ]


def _format_number(group: Group, key: str, form: str, unit: float = 1.0) -> str:
    value = group.mean_of(key)
    return "-" if value is None else form.format(value / unit)


def print_diagnosis(result: Diagnosis) -> None:
    """Print the findings with evidence and remedy, then the healthy and the undecided rules."""
    out = stdout_console()
    out.print(
        f"[bold]{escape(result.run)}[/]: {result.status}, {result.epochs:,} epochs in metrics.csv"
    )
    for finding in result.findings:
        out.print(f"\n[bold red]{finding.rule}[/]: {escape(finding.what)}")
        out.print(escape(f"  numbers    {format_evidence(finding)}"))
        out.print(escape(f"  threshold  {finding.threshold}"))
        out.print(escape(f"  do         {finding.do}"))
        if finding.overrides:
            out.print(escape(f"  try        {' '.join(map(shlex.quote, finding.overrides))}"))
    if result.findings:
        out.print()
    if result.healthy:
        begin = "no sign of" if result.findings else "nothing found: no sign of"
        out.print(f"{begin} {', '.join(result.healthy)}")
    for rule, reason in result.untold.items():
        out.print(f"[dim]cannot tell: {rule}: {escape(reason)}[/]")


def format_evidence(finding: Finding) -> str:
    """Return the evidence in one line; long tables are shortened."""
    return ", ".join(f"{key} {_evidence_text(value)}" for key, value in finding.evidence.items())


def _evidence_text(value: Any) -> str:
    if isinstance(value, dict):
        entries = [f"{key} {_evidence_text(inner)}" for key, inner in value.items()]
        hidden = len(entries) - EVIDENCE_SHOWN
        more = f" and {hidden} more" if hidden > 0 else ""
        return f"({', '.join(entries[:EVIDENCE_SHOWN])}{more})"
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_label_report(report: LabelReport) -> None:
    """Print the most certain suspects, the most common confusions and the paths of the files."""
    out, suspects = stdout_console(), report.suspects
    if suspects:
        table = make_table("image", "#", "given", "suggested", "p(given)", "p(suggested)")
        for number, suspect in enumerate(suspects[:SUSPECTS_SHOWN], 1):
            table.add_row(
                escape(_name_with_copies(suspect)),
                str(number),
                escape(suspect.label),
                escape(suspect.suggested),
                f"{suspect.score:.1%}",
                f"{suspect.top[0][1]:.1%}",
            )
        table.columns[0].overflow = "fold"
        out.print(table)
        if len(suspects) > SUSPECTS_SHOWN:
            out.print(f"({SUSPECTS_SHOWN} of {len(suspects):,} suspects; the CSV lists all)")
    if report.pairs:
        pairs = make_table(
            "labeled", "probably", "images", title="estimated, by confident learning"
        )
        for pair in report.pairs[:PAIRS_SHOWN]:
            pairs.add_row(escape(pair.label), escape(pair.likely), f"{pair.images:,}")
        out.print(pairs)
    for line in label_conclusion(report):
        prefix = "[yellow]warning[/]  " if line == LOW_AGREEMENT_WARNING else ""
        out.print(prefix + escape(line))
    for path in report.sheets:
        out.print(escape(f"sheet  {path}"))
    out.print(escape(f"CSV    {report.table}"))
    if report.trainable and suspects:
        print_status("next: correct `label` in a copy of the CSV, then convlens train COPY.csv")
    elif suspects:
        print_status("[dim]the images are not files, so the CSV cannot be used for training[/]")


def label_conclusion(report: LabelReport) -> list[str]:
    """Return the findings as sentences that claim no more than the data support."""
    n, k = len(report.images), len(report.suspects)
    images = "images (including the test split)" if report.tested else "images"
    # First, so that nobody takes the estimate for a fact.
    lines = [LOW_AGREEMENT_WARNING] if k and report.accuracy < LOW_AGREEMENT else []
    lines += [
        f"{k:,} of {n:,} labels are suspected ({k / n:.1%}); {report.noise:.1%} of all are "
        f"estimated to be wrong. {report.folds} models agree with {report.accuracy:.1%} of the "
        f"labels of {images} that they were not trained on."
    ]
    if k:
        lines.append(
            "Suspected, not proven: a hard or unusual image looks the same to a model. "
            + PLANTED_ERRORS
        )
    if report.disputed:
        lines.append(
            f"{report.disputed:,} pairs of copies under two labels are not included: "
            "`convlens audit` lists copies."
        )
    return lines


def _name_with_copies(suspect: JudgedImage) -> str:
    """Return the id of an image; exact copies follow after `=`, similar images after `~`."""
    mark = " (test)" if suspect.split == "test" else ""
    copies = "; ".join(f"{'=' if t.exact else '~'} {t.id} ({t.label})" for t in suspect.twins)
    return suspect.id + mark + (f"  {copies}" if copies else "")

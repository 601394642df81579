"""Print results as text: tables on stdout, status messages on stderr."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.control import strip_control_codes
from rich.markup import escape
from rich.table import Table

from convlens.cli.common import write_utf8
from convlens.utils.console import print_status

if TYPE_CHECKING:  # these import torch, which `convlens recipes` must not wait for
    from convlens.data.audit import Audit
    from convlens.data.duplicates import Duplicates
    from convlens.data.shard_writer import WrittenShards
    from convlens.evaluation import Evaluation
    from convlens.model_export import Export
    from convlens.prediction import Prediction, PredictionColumns
    from convlens.reports.build import Report
    from convlens.run import RunDir

CLASSES_SHOWN = 40
DUPLICATES_SHOWN = 8  # groups
COPIES_SHOWN = 4  # images of a group
FILE_COLUMNS = 200  # width of tables that are not printed on a terminal


def stdout_console() -> Console:
    """Return the console for results: as wide as the terminal, or 200 columns in a file."""
    terminal = sys.stdout.isatty()
    width = None if terminal else FILE_COLUMNS
    return Console(highlight=False, emoji=False, soft_wrap=not terminal, width=width)


def make_table(*columns: str, title: str = "") -> Table:
    """Return an empty table; its first column is left-aligned, the others right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def print_run_summary(run_dir: RunDir) -> None:
    """Print the result of a training, the paths of its files and commands to try next."""
    from convlens import evaluation  # imports torch, which `convlens recipes` must not wait for

    metadata = run_dir.metadata()
    test_results = [
        entry for entry in run_dir.evaluations() if entry["split"] == "test" and entry["own"]
    ]
    out = stdout_console()
    out.print(f"[bold]{escape(run_dir.name)}[/]: weights of epoch {metadata['kept_epoch']}", end="")
    out.print(f" of {metadata['epochs']}, {metadata['training_seconds']:.1f} s of training")
    if test_results:
        out.print(evaluation.sentence(test_results[-1]))
    out.print(escape(f"model  {run_dir.model_path}"))
    _print_plots_folder(out, run_dir)
    print_status(f"next: {_next_commands(run_dir, is_tested=bool(test_results))}")


def _next_commands(run_dir: RunDir, *, is_tested: bool) -> str:
    """Return the commands that are most useful after a training, one per line."""
    run = shlex.quote(run_dir.name)
    commands = {
        f"convlens report {run}": "one page: verdict, curves, confusions, examples",
        f"convlens look {run} --why": "heat maps of what decides",
        f"convlens predict {run} IMAGE...": "classify new images",
    }
    if not is_tested:
        commands = {f"convlens evaluate {run}": "use the test images"} | commands
    shown = list(commands.items())[:3]
    width = max(len(command) for command, _ in shown)
    lines = (f"[bold]{escape(command):<{width}}[/]  [dim]{words}[/]" for command, words in shown)
    return "\n      ".join(lines)


def print_evaluation(result: Evaluation, run_dir: RunDir) -> None:
    """Print a table with a row for each class, then the accuracy.

    Many classes are sorted by F1, the worst first.
    """
    from convlens import evaluation

    table = make_table("class", "n", "precision", "recall", "F1", title="")
    scores = list(result.per_class.items())
    if len(scores) > CLASSES_SHOWN:
        scores.sort(key=lambda item: item[1]["f1"] if item[1]["f1"] is not None else 2.0)
    for name, score in scores[:CLASSES_SHOWN]:
        table.add_row(
            escape(name),
            f"{score['n']:,}",
            *(_percent(score[key]) for key in ("precision", "recall", "f1")),
        )
    out = stdout_console()
    out.print(table)
    if len(scores) > CLASSES_SHOWN:
        out.print(f"({CLASSES_SHOWN} of {len(scores)} classes, the worst; --json lists all)")
    out.print(evaluation.sentence(result.to_dict()))
    if result.tta is not None:
        out.print(result.tta_sentence())
    for sentence in (result.selective_sentence, result.sets_sentence, result.unlike_sentence):
        if line := sentence():
            out.print(line)
    _print_plots_folder(out, run_dir)


def _print_plots_folder(out: Console, run_dir: RunDir) -> None:
    if run_dir.plots.is_dir():  # it does not exist with `--figures none`
        out.print(escape(f"plots  {run_dir.plots}"))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def print_audit(report: Audit, sheet: Path) -> None:
    """Print counts, sizes and problems of a data set."""
    out = stdout_console()
    out.print(f"[bold]{escape(report.name)}[/]: {escape(report.summary)}")
    splits = list(report.how)
    table = make_table("class", *splits)
    for name, counts in list(report.counts.items())[:CLASSES_SHOWN]:
        table.add_row(escape(name), *(f"{counts.get(split, 0):,}" for split in splits))
    out.print(table)
    if len(report.counts) > CLASSES_SHOWN:
        out.print(f"({CLASSES_SHOWN} of {len(report.counts)} classes; --json lists all)")
    for split, how in report.how.items():
        out.print(f"{split:<10} {escape(how)}")
    width, height = report.width, report.height
    out.print(f"{'images':<10} {report.images:,} readable, {len(report.unreadable):,} unreadable")
    out.print(
        f"{'size':<10} width {width[0]}-{width[2]} (median {width[1]:g}), height "
        f"{height[0]}-{height[2]} (median {height[1]:g}), {report.sizes:,} different"
    )
    modes = ", ".join(f"{mode} {count:,}" for mode, count in report.modes.items())
    out.print(f"{'modes':<10} {modes}; {report.channels} channel(s)")
    means = " ".join(f"{mean:.4f}" for mean in report.mean)
    deviations = " ".join(f"{std:.4f}" for std in report.std)
    out.print(f"{'channels':<10} mean {means}, deviation {deviations} (training images, 0..1)")
    for note in report.notes:
        is_warning = note.startswith("warning:")
        out.print(escape(note) if is_warning else f"{'note':<10} {escape(note)}")
    for problem in report.problems:
        out.print(f"[red]{'problem':<10}[/] {escape(problem)}")
    for bad in report.unreadable:
        out.print(f"[red]{'unreadable':<10}[/] {escape(bad.id)}: {escape(bad.reason)}")
    _print_duplicates(out, "identical images", report.duplicates)
    _print_duplicates(out, "similar images", report.near_duplicates)
    out.print(f"contact sheet  {sheet}")


def print_augmented_sheet(sheet: Path) -> None:
    """Print the path of the figure of an augmented batch."""
    stdout_console().print(f"augmented batch  {sheet}")


def print_exports(exports: Sequence[Export]) -> None:
    """Print the paths of exported files, their inputs and outputs, and the result of the check."""
    out = stdout_console()
    for each in exports:
        mb = each.bytes / 1e6
        out.print(f"[bold]{each.format}[/]  {escape(each.path)}  ({mb:.1f} MB)", soft_wrap=True)
        out.print(escape(f"  takes  {each.input}\n  gives  {each.outputs}"))
        out.print(escape(f"  proof  {each.proof.sentence()}"))
        if each.script is not None:
            out.print(escape(f"  script {each.script.path}"), soft_wrap=True)
            out.print(escape(f"         {each.script.sentence()}"))


def print_shards(written: WrittenShards) -> None:
    """Print the number of images and shards, and their folder."""
    images = ", ".join(f"{count:,} {split}" for split, count in written.images.items())
    shards = f"{written.shards:,} shard{'s' * (written.shards != 1)}"
    stdout_console().print(f"{images} images of {escape(written.data)} in {shards}")
    stdout_console().print(f"shards  {escape(written.folder)}")


def print_report(page: Report) -> None:
    """Print the verdict of a page, its missing parts and its path."""
    out = stdout_console()
    out.print(escape(page.verdict))
    for line in page.missing:
        print_status(f"[yellow]not on the page:[/] {escape(line)}")
    mb = max(page.bytes / 1e6, 0.1)
    out.print(f"report  {escape(str(page.path))}  ({mb:.1f} MB)")


def _print_duplicates(out: Console, kind: str, duplicates: Duplicates) -> None:
    """Print a warning and the worst groups of duplicates; nothing if there are none."""
    if not duplicates.groups:
        return
    out.print(
        f"[yellow]warning[/]    {kind}: {duplicates.groups:,} groups, "
        f"{duplicates.across_splits:,} of them across splits, {duplicates.two_labels:,} under two "
        "labels"
    )
    for group in duplicates.listed[:DUPLICATES_SHOWN]:
        images = list(zip(group.ids, group.splits, group.labels, strict=True))
        shown = images[:COPIES_SHOWN]
        names = " = ".join(f"{escape(i)} ({split}, {escape(c)})" for i, split, c in shown)
        more = f" and {len(images) - len(shown):,} more" if len(images) > len(shown) else ""
        out.print(f"           {names}{more}")
    hidden = duplicates.groups - DUPLICATES_SHOWN
    if hidden > 0:
        out.print(f"           ... and {hidden:,} more (--json lists the worst 100)")


def _write_table(predictions: Iterable[Prediction], columns: PredictionColumns) -> int:
    out, failed = stdout_console(), 0
    # For a file rich is not used: it takes longer to print a line than to decode a small image.
    terminal = out.is_terminal
    bold, red, end = ("[bold]", "[red]", "[/]") if terminal else ("", "", "")
    text = escape if terminal else strip_control_codes

    def write(line: str) -> None:
        if terminal:
            out.print(line)
        else:
            sys.stdout.write(line + "\n")

    for prediction in predictions:
        name = text(prediction.filename)
        if prediction.error is not None:
            failed += 1
            write(f"{name}  {red}unreadable: {text(prediction.error)}{end}")
            continue
        classes = "  ".join(
            f"{text(label)} {prob:.1%}"
            for label, prob in (prediction.tta_top if columns.tta else prediction.top)
        )
        if prediction.unsure:
            classes = f"unsure ({classes})"
        notes = ""
        if columns.tta and prediction.tta_label != prediction.label and not prediction.unsure:
            notes += f"  (without TTA: {text(str(prediction.label))} {prediction.prob:.1%})"
        if prediction.prediction_set is not None:
            notes += f"  {{{', '.join(map(text, prediction.prediction_set))}}}"
        if prediction.unlike:
            notes += "  (unlike the training images)"
        write(f"{name}  {bold}{classes}{end}{notes}")
    return failed


def _write_csv(predictions: Iterable[Prediction], columns: PredictionColumns) -> int:
    write_utf8()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    top = columns.top
    ranks = ["", *range(2, top + 1)]
    names = [f"{kind}{rank}" for rank in ranks for kind in ("label", "prob")]
    tta_names = [f"tta_{name}" for name in names] if columns.tta else []
    flags = [name for name in ("unsure", "unlike") if getattr(columns, name)]
    extra = [*flags, *(["prediction_set"] if columns.sets else [])]
    writer.writerow(["filename", *names, *tta_names, *extra, "error"])
    failed = 0
    for prediction in predictions:
        failed += prediction.error is not None
        # The cells of an unsure prediction are empty, so that nobody reads them as an answer.
        cells = _csv_cells(() if prediction.unsure else prediction.top, top)
        if columns.tta:
            cells += _csv_cells(() if prediction.unsure else prediction.tta_top, top)
        for flag in flags:
            value = getattr(prediction, flag)
            cells.append("" if value is None or prediction.error else str(int(value)))
        if columns.sets:
            cells.append("|".join(prediction.prediction_set or ()))
        writer.writerow([prediction.filename, *cells, prediction.error or ""])
    return failed


def _csv_cells(classes: Sequence[tuple[str, float]], top: int) -> list[str]:
    """Return labels and probabilities, padded to `top` pairs."""
    cells = [cell for label, prob in classes for cell in (label, f"{prob:.6f}")]
    return cells + [""] * (2 * top - len(cells))


def _write_json(predictions: Iterable[Prediction], columns: PredictionColumns) -> int:
    write_utf8()
    entries = [columns.to_dict(prediction) for prediction in predictions]
    sys.stdout.write(json.dumps({"predictions": entries}, ensure_ascii=False) + "\n")
    return sum("error" in entry for entry in entries)


# Output formats of `predict`. A writer gets an iterable of predictions and what to print of each.
# It returns the number of unreadable files.
WRITERS: dict[str, Callable[[Iterable[Prediction], PredictionColumns], int]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
}

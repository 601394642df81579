"""Results as people read them: tables on stdout, advice on stderr."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from convlens.console import say

if TYPE_CHECKING:  # `convlens recipes` must not wait for torch
    from convlens.data.audit import Audit
    from convlens.data.similar import Repeats
    from convlens.evaluation import Evaluation
    from convlens.prediction import Prediction
    from convlens.recipe import Recipe
    from convlens.run import RunFolder
    from convlens.seeds import SeedTable

CLASSES_SHOWN = 40


def _out() -> Console:
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def _table(*columns: str, title: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def finished(place: RunFolder) -> None:
    """What a training left behind, and what to do next."""
    facts = place.facts()
    results = [entry for entry in place.results() if entry["split"] == "test" and entry["own"]]
    out = _out()
    out.print(f"[bold]{escape(place.name)}[/]: weights of epoch {facts['kept_epoch']}", end="")
    out.print(f" of {facts['epochs']}, {facts['training_seconds']:.1f} s of training")
    if results:
        last = results[-1]
        low, high = last["interval95"]
        times = f"looked at {last['looks']} time{'s' if last['looks'] > 1 else ''}"
        out.print(
            f"test accuracy [bold]{last['accuracy']:.2%}[/] "
            f"(95% interval {low:.2%} to {high:.2%}, n = {last['n']:,}; {times})"
        )
    out.print(escape(f"model  {place.model_path}\nplots  {place.plots}"))
    say(f"next: [bold]convlens predict {place.name} IMAGE...[/]")


def evaluated(result: Evaluation, place: RunFolder) -> None:
    """Per-class numbers below the accuracy; the worst classes first where there are many."""
    table = _table("class", "n", "precision", "recall", "F1", title="")
    scores = list(result.per_class.items())
    if len(scores) > CLASSES_SHOWN:
        scores.sort(key=lambda item: item[1]["f1"] if item[1]["f1"] is not None else 2.0)
    for name, score in scores[:CLASSES_SHOWN]:
        table.add_row(
            escape(name),
            f"{score['n']:,}" if score["n"] else "0 samples",
            *(_share(score[key]) for key in ("precision", "recall", "f1")),
        )
    out = _out()
    out.print(table)
    if len(scores) > CLASSES_SHOWN:
        out.print(f"({CLASSES_SHOWN} worst of {len(scores)} classes; --json has them all)")
    low, high = result.interval95
    out.print(
        f"{result.split} accuracy [bold]{result.accuracy:.2%}[/] "
        f"(95% interval {low:.2%} to {high:.2%}), n = {result.n:,}, loss {result.loss:.4f}, "
        f"calibration error {result.ece:.3f}"
    )
    if result.tta is not None:
        out.print(result.tta_sentence())
    out.print(escape(f"plots  {place.plots}"))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def seed_table(result: SeedTable) -> None:
    """A line for each seed, then mean and deviation."""
    table = _table("run", "seed", f"{result.split} accuracy", "loss", "training s")
    columns = (result.runs, result.seeds, result.accuracies, result.losses, result.seconds)
    for place, seed, accuracy, loss, seconds in zip(*columns, strict=True):
        table.add_row(place.name, str(seed), f"{accuracy:.2%}", f"{loss:.4f}", f"{seconds:.1f}")
    spread = "" if result.sd is None else f" ± {100 * result.sd:.2f}"
    out = _out()
    out.print(table)
    out.print(
        f"{result.split} accuracy [bold]{100 * result.mean:.2f}{spread} %[/] "
        f"(mean ± sd of {len(result.seeds)} seeds)"
    )
    out.print(f"plot   {result.to_dict()['plot']}")


def recipe_table(recipes: Mapping[str, Recipe]) -> None:
    """Name and purpose of every recipe."""
    table = _table("recipe", "data")
    table.add_column("what it is", justify="left")
    for name, recipe in recipes.items():
        table.add_row(name, recipe.data.name, escape(recipe.about))
    _out().print(table)
    say("[dim]convlens recipes NAME prints one; convlens train NAME trains it[/]")


def audited(report: Audit, sheet: Path) -> None:
    """Counts, sizes and everything suspicious about a data set."""
    out = _out()
    splits = list(report.how)
    table = _table("class", *splits)
    for name, counts in list(report.counts.items())[:CLASSES_SHOWN]:
        table.add_row(escape(name), *(f"{counts.get(split, 0):,}" for split in splits))
    out.print(table)
    if len(report.counts) > CLASSES_SHOWN:
        out.print(f"({CLASSES_SHOWN} of {len(report.counts)} classes; --json has them all)")
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
        out.print(f"{'note':<10} {escape(note)}")
    for problem in report.problems:
        out.print(f"[red]{'problem':<10}[/] {escape(problem)}")
    for bad in report.unreadable:
        out.print(f"[red]{'unreadable':<10}[/] {escape(bad.id)}: {escape(bad.reason)}")
    _repeats(out, "the same picture", report.duplicates)
    _repeats(out, "looks the same", report.near_duplicates)
    out.print(f"contact sheet  {sheet}")


def drawn(sheet: Path) -> None:
    """Where an augmented batch was drawn."""
    _out().print(f"augmented batch  {sheet}")


def _repeats(out: Console, what: str, repeats: Repeats, shown: int = 8) -> None:
    if not repeats.groups:
        return
    out.print(
        f"[yellow]warning[/]    {what}: {repeats.groups:,} groups, {repeats.across_splits:,} of "
        f"them across splits, {repeats.two_labels:,} under two labels"
    )
    for group in repeats.listed[:shown]:
        named = zip(group.ids, group.splits, group.labels, strict=True)
        out.print(
            "           " + " = ".join(f"{escape(i)} ({s}, {escape(c)})" for i, s, c in named)
        )
    if repeats.groups > shown:
        out.print(
            f"           ... and {repeats.groups - shown:,} more (--json lists the worst 100)"
        )


def _write_table(answers: Iterable[Prediction], top: int, tta: bool) -> int:
    out, failed = _out(), 0
    for answer in answers:
        if answer.error is not None:
            failed += 1
            out.print(f"{escape(answer.filename)}  [red]unreadable: {escape(answer.error)}[/]")
            continue
        shown = answer.tta_top if tta else answer.top
        named = "  ".join(f"{escape(label)} {prob:.1%}" for label, prob in shown)
        differs = tta and answer.tta_label != answer.label
        plain = f"  (plain: {escape(str(answer.label))} {answer.prob:.1%})" if differs else ""
        out.print(f"{escape(answer.filename)}  [bold]{named}[/]{plain}")
    return failed


def _write_csv(answers: Iterable[Prediction], top: int, tta: bool) -> int:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranks = ["", *range(2, top + 1)]
    names = [f"{kind}{rank}" for rank in ranks for kind in ("label", "prob")]
    beside = [f"tta_{name}" for name in names] if tta else []
    writer.writerow(["filename", *names, *beside, "error"])
    failed = 0
    for answer in answers:
        failed += answer.error is not None
        cells = _cells(answer.top, top) + (_cells(answer.tta_top, top) if tta else [])
        writer.writerow([answer.filename, *cells, answer.error or ""])
    return failed


def _cells(named: Sequence[tuple[str, float]], top: int) -> list[str]:
    cells = [cell for label, prob in named for cell in (label, f"{prob:.6f}")]
    return cells + [""] * (2 * top - len(cells))


def _write_json(answers: Iterable[Prediction], top: int, tta: bool) -> int:
    listed: list[dict[str, Any]] = []
    for answer in answers:
        entry: dict[str, Any] = {"filename": answer.filename}
        if answer.error is not None:
            entry["error"] = answer.error
        else:
            entry |= {"label": answer.label, "prob": answer.prob}
            entry["top"] = [{"label": label, "prob": prob} for label, prob in answer.top]
            if tta:
                entry |= {"tta_label": answer.tta_label, "tta_prob": answer.tta_prob}
                entry["tta_top"] = [{"label": name, "prob": prob} for name, prob in answer.tta_top]
        listed.append(entry)
    sys.stdout.write(json.dumps({"predictions": listed}, ensure_ascii=False) + "\n")
    return sum("error" in entry for entry in listed)


# How `predict` prints; each takes the answers as they come, how many classes to name and whether
# there are answers of test-time augmentation; it returns how many files failed.
WRITERS: dict[str, Callable[[Iterable[Prediction], int, bool], int]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
}

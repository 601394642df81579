"""Print several runs as one table on stdout, with a line or two below it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table as RichTable

from convlens.several.tabling import Outcome, Summary, Table, trainable
from convlens.showing.results import stdout, table_of
from convlens.system.console import print_status

Row = dict[str, str]
WORDS = {"test": "test", "val": "validation"}
SPARE = ("CPU s", "weights", "trained", "95% interval", "s", "epoch")  # least needed first


def run_table(result: Table) -> None:
    """Print a row for each run of one variant, or for each variant; then the conclusion."""
    out, summaries = stdout(), result.summaries
    rows = _variants(result) if len(summaries) > 1 else _runs(result)
    out.print(_fitted(rows, out.width))
    over = result.repeats_in_words()
    if len(summaries) == 1:
        out.print(_conclusion(result, summaries[0], over))
    elif over:
        out.print(f"accuracies are mean ± sd of {over}")
    for summary in summaries:
        if summary.parts:
            between, within = map(_percent, summary.parts)
            named = f"{escape(summary.variant)}: " if summary.variant else ""
            out.print(f"{named}sd {between} points between splits, {within} between seeds")
    if result.flattered:
        print_status(
            "[dim]slightly optimistic: the same images chose the epoch "
            "(not with train.keep=last)[/]"
        )
    if result.plot.exists():
        out.print(escape(f"plot   {result.plot}"))


def _conclusion(result: Table, summary: Summary, over: str) -> str:
    what = "out-of-fold accuracy" if result.folds else f"{WORDS[result.split]} accuracy"
    if summary.interval95 is None:
        return f"{what} [bold]{_mean_sd(summary.mean, summary.sd)} %[/] (mean ± sd of {over})"
    low, high = summary.interval95
    return (
        f"{what} [bold]{summary.mean:.2%}[/] "
        f"(95% interval {low:.2%} to {high:.2%}, n = {summary.n:,})"
    )


def _variants(result: Table) -> list[Row]:
    rows = []
    first = result.summaries[0].variant
    for number, summary in enumerate(result.summaries):
        facts, validated = summary.outcomes[0].facts, summary.val_accuracy
        accuracy = _mean_sd(summary.mean, summary.sd)
        if summary.interval95 is not None:
            accuracy += f" ({_interval(summary.interval95)})"
        row = {"variant": summary.variant or "", f"{WORDS[result.split]} %": accuracy}
        gain, sd = result.gains()[number]
        row[f"over {first}"] = _mean_sd(gain, sd, sign="+") if number else "-"
        if result.split == "test":
            row["validation %"] = _mean_sd(*validated) if validated else "-"
        row |= {
            "epoch": _epochs(summary.outcomes),
            "trained": f"{trainable(facts):,}",
            "weights": f"{facts['parameters']:,}",
            "s": _seconds(summary.mean_of("training_seconds")),
            "CPU s": _seconds(summary.mean_of("cpu_seconds")),
        }
        rows.append(row)
    return rows


def _runs(result: Table) -> list[Row]:
    """Return a row for each run; splits, seeds and folds have a column if there are several."""
    several = {
        "split": result.repeat_splits > 1,
        "seed": result.seeds > 1,
        "fold": bool(result.folds),
    }
    rows = []
    for outcome in result.outcomes:
        planned, looked = outcome.planned, outcome.looked
        cells = {"split": planned.data_seed, "seed": planned.seed, "fold": planned.fold}
        row = {"run": outcome.place.name}
        row |= {what: str(cells[what]) for what, there in several.items() if there}
        row[f"{WORDS[result.split]} %"] = _percent(looked.accuracy)
        row["95% interval"] = _interval(looked.interval95)
        if result.split == "test":
            validated = outcome.val_accuracy
            row["validation %"] = "-" if validated is None else _percent(validated)
        row |= {
            "epoch": _epochs([outcome]),
            "s": _seconds(outcome.total("training_seconds")),
            "CPU s": _seconds(outcome.total("cpu_seconds")),
        }
        rows.append(row)
    return rows


def _fitted(rows: list[Row], room: int) -> RichTable:
    """Build the table; in a narrow terminal the least important columns are left out."""
    columns = list(rows[0])
    widths = {c: 3 + max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    for spare in SPARE:
        if sum(widths[c] for c in columns) + 2 > room and spare in columns:
            columns.remove(spare)
    table = table_of(*columns)
    for column in table.columns:
        column.no_wrap = column is not table.columns[0]
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(escape(row[c]) for c in columns))
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _interval(ends: tuple[float, float]) -> str:
    low, high = ends
    return f"{100 * low:.1f}-{100 * high:.1f}"


def _mean_sd(mean: float, sd: float | None, sign: str = "") -> str:
    return f"{100 * mean:{sign}.2f}" + ("" if sd is None else f" ± {_percent(sd)}")


def _epochs(outcomes: Sequence[Outcome]) -> str:
    """Format the chosen epoch and the number of epochs, e.g. `12/30`, or their ranges."""
    ranges = []
    for values in zip(*(outcome.epochs for outcome in outcomes), strict=True):
        low, high = min(values), max(values)
        ranges.append(str(low) if low == high else f"{low}-{high}")
    return "/".join(ranges)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"

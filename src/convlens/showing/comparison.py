"""Print a comparison: one table, then a sentence for each verdict."""

from __future__ import annotations

from rich.markup import escape

from convlens import metrics
from convlens.comparing.comparison import Comparison
from convlens.comparing.verdicts import Group
from convlens.showing.results import stdout, table_of
from convlens.system.console import print_status

COLUMNS = (
    "run", "accuracy %", "loss", "ECE", "weights", "MFLOPs", "trained s", "images/s", "MB",
)  # fmt: skip


def compared(result: Comparison) -> None:
    """Print the table, the verdicts, notes and the paths of the plots."""
    out = stdout()
    table = table_of(*COLUMNS)
    for column in table.columns:
        column.no_wrap = column is not table.columns[0]
        column.overflow = "fold"
    for group in result.groups:
        table.add_row(escape(group.name), *_cells(group))
    out.print(table)
    n = sorted({member.evaluation.n for group in result.groups for member in group.members})
    counts = " or ".join(f"{count:,}" for count in n)
    out.print(
        f"{result.split} split of {escape(result.data)}, {counts} images; MFLOPs for one image (a "
        "multiply-add counts as two); images/s for inference on this machine"
    )
    for verdict in result.verdicts:
        style = "bold" if verdict.differs else "not bold"
        out.print(f"[{style}]{escape(verdict.sentence)}[/]")
    for note in result.notes:
        print_status(f"[dim]{escape(note)}[/]")
    for path in result.plots:
        out.print(escape(f"plot   {path}"))


def _cells(group: Group) -> list[str]:
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
        _number(group, "loss", "{:.4f}"),
        _number(group, "ece", "{:.3f}"),
        _number(group, "parameters", "{:,.0f}"),
        _number(group, "flops", "{:,.1f}", 1e6),
        "-" if seconds is None else f"{seconds:,.1f}",
        _number(group, "images_per_second", "{:,.0f}"),
        _number(group, "file_bytes", "{:,.1f}", 1e6),
    ]


def _number(group: Group, key: str, form: str, unit: float = 1.0) -> str:
    value = group.mean_of(key)
    return "-" if value is None else form.format(value / unit)

"""Suspected labels as people read them: the surest ones, and what is taken for what."""

from __future__ import annotations

from rich.markup import escape

from convlens.labelling.suspects import LabelReport, Suspect
from convlens.showing.results import stdout, table_of
from convlens.system.console import say

SHOWN = 20  # suspects in the table; the CSV has all
PAIRS = 8
POOR = 0.8  # agreement below which most suspicions are the models' own mistakes
# `benchmarks/labels.py`, symmetric and asymmetric errors.
PLANTED = (
    "Where 5% of the labels had been made wrong, 96 to 97 of 100 named were wrong ones on digits "
    "(models agreed with 94% of the labels), 86 to 94 on MNIST (90%), 13 on CIFAR-10 (50%)."
)
DOUBT = (
    "These models agree with so few labels that most suspicions, and most of the estimate, "
    "will be their own mistakes: go by the first of them, or by a better recipe."
)


def suspected(report: LabelReport) -> None:
    """The first suspects, the commonest mix-ups, and where sheet and CSV are."""
    out, suspects = stdout(), report.suspects
    if suspects:
        table = table_of("image", "#", "given", "suggested", "p(given)", "p(suggested)")
        for number, suspect in enumerate(suspects[:SHOWN], 1):
            table.add_row(
                escape(_named(suspect)),
                str(number),
                escape(suspect.label),
                escape(suspect.suggested),
                f"{suspect.score:.1%}",
                f"{suspect.top[0][1]:.1%}",
            )
        table.columns[0].overflow = "fold"
        out.print(table)
        if len(suspects) > SHOWN:
            out.print(f"({SHOWN} of {len(suspects):,}; the CSV has all)")
    if report.pairs:
        pairs = table_of("labelled", "probably", "images", title="estimated, by confident learning")
        for pair in report.pairs[:PAIRS]:
            pairs.add_row(escape(pair.label), escape(pair.likely), f"{pair.images:,}")
        out.print(pairs)
    for line in conclusion(report):
        mark = "[yellow]warning[/]  " if line == DOUBT else ""
        out.print(mark + escape(line))
    for path in report.sheets:
        out.print(escape(f"sheet  {path}"))
    out.print(escape(f"CSV    {report.table}"))
    if report.trainable and suspects:
        say(escape("next: correct `label` in a copy of it, then convlens train COPY.csv"))
    elif suspects:
        say("[dim]these images are no files, so the CSV can only be read, not trained on[/]")


def conclusion(report: LabelReport) -> list[str]:
    """What was found, in sentences that claim no more than is known."""
    n, k = len(report.ids), len(report.suspects)
    what = "images" + (", the test split among them" if report.tested else "")
    lines = [
        f"{k:,} of {n:,} labels are suspected ({k / n:.1%}); {report.noise:.1%} of all are "
        f"estimated to be wrong. {report.folds} models agree with {report.accuracy:.1%} of the "
        f"labels of {what} that they didn't train on."
    ]
    if k:
        lines.append(
            "Suspected, not proven: a hard or unusual image looks the same to a model. " + PLANTED
        )
    if k and report.accuracy < POOR:
        lines.append(DOUBT)
    if report.disputed:
        lines.append(
            f"{report.disputed:,} pairs of copies under two labels aren't among them: "
            "`convlens audit` lists copies."
        )
    return lines


def _named(suspect: Suspect) -> str:
    mark = " (test)" if suspect.split == "test" else ""
    copies = "; ".join(f"{'=' if t.exact else '~'} {t.id} ({t.label})" for t in suspect.twins)
    return suspect.id + mark + (f"  {copies}" if copies else "")

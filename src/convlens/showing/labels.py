"""Print suspected label errors: the most certain ones and the most common confusions."""

from __future__ import annotations

from rich.markup import escape

from convlens.labelling.suspects import LabelReport, Suspect
from convlens.showing.results import stdout, table_of
from convlens.system.console import print_status

SHOWN = 20  # suspects in the table; the CSV has all
PAIRS = 8
POOR = 0.8  # agreement below which most suspicions are the models' own mistakes
# `benchmarks/labels.py`, symmetric and asymmetric errors.
PLANTED = (
    "With 5% of the labels changed on purpose, 96 to 97 of the first 100 suspects were wrong on "
    "digits (models agreed with 94% of the labels), 86 to 94 on MNIST (90%), 13 on CIFAR-10 (50%)."
)
DOUBT = (
    "The models agree with so few labels that most suspects are probably mistakes of the models: "
    "check only the first ones, or use a better recipe."
)


def suspected(report: LabelReport) -> None:
    """Print the first suspects, the most common confusions and the paths of sheet and CSV."""
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
            out.print(f"({SHOWN} of {len(suspects):,} suspects; the CSV lists all)")
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
        print_status(escape("next: correct `label` in a copy of it, then convlens train COPY.csv"))
    elif suspects:
        print_status("[dim]the images are not files, so the CSV cannot be used for training[/]")


def conclusion(report: LabelReport) -> list[str]:
    """Return the findings as sentences that claim no more than is known."""
    n, k = len(report.ids), len(report.suspects)
    what = "images" + (", the test split among them" if report.tested else "")
    lines = [
        f"{k:,} of {n:,} labels are suspected ({k / n:.1%}); {report.noise:.1%} of all are "
        f"estimated to be wrong. {report.folds} models agree with {report.accuracy:.1%} of the "
        f"labels of {what} that they were not trained on."
    ]
    if k:
        lines.append(
            "Suspected, not proven: to a model, a hard or unusual image looks the same. " + PLANTED
        )
    if k and report.accuracy < POOR:
        lines.append(DOUBT)
    if report.disputed:
        lines.append(
            f"{report.disputed:,} pairs of copies under two labels are not included: "
            "`convlens audit` lists copies."
        )
    return lines


def _named(suspect: Suspect) -> str:
    mark = " (test)" if suspect.split == "test" else ""
    copies = "; ".join(f"{'=' if t.exact else '~'} {t.id} ({t.label})" for t in suspect.twins)
    return suspect.id + mark + (f"  {copies}" if copies else "")

"""The page of several runs: one table, curves overlaid, differences on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from convlens.metrics import difference_on_images, holm_adjust
from convlens.reports import html, sections
from convlens.reports.contents import ReportContents
from convlens.reports.html import (
    ChartLine,
    PageSection,
    format_count,
    format_number,
    format_seconds,
    format_share,
    render_page,
)
from convlens.reports.sections import CALIBRATION_WORDS, calibration

COMPARE_LOOKS = 7  # lines that can be told apart


class PairedDifference(NamedTuple):
    """Another run against the first one on the same images, as `convlens compare` has it.

    `points` is the difference of accuracy, other minus first, with its 95% interval (Newcombe's);
    `p` is McNemar's exact one, corrected for the number of comparisons (Holm).
    """

    name: str
    points: float
    interval: tuple[float, float]
    gained: int
    lost: int
    p: float

    @property
    def says(self) -> str:
        """What the first run is, compared with this one."""
        if self.p >= 0.05:
            return "not distinguishable from"
        return "less accurate than" if self.points > 0 else "more accurate than"


@dataclass(frozen=True)
class ComparedRuns:
    """Runs side by side; `alike` says whether all were judged by the same images.

    `first` is what the others are compared with: the first run named, since choosing the best by
    the very answers that are tested would make p values too small.
    """

    runs: list[ReportContents]
    alike: bool
    first: ReportContents | None
    differences: list[PairedDifference]
    verdict: str

    @property
    def names(self) -> list[str]:
        return [found.name for found in self.runs]

    @property
    def split(self) -> str:
        return self.runs[0].split if len({found.split for found in self.runs}) == 1 else "mixed"


def gather_runs(runs: Sequence[ReportContents]) -> ComparedRuns:
    """Whether the other runs can be told from the first."""
    judged = [found for found in runs if found.summary is not None]
    alike = len(judged) == len(runs) and len({_image_count(found) for found in runs}) == 1
    if not judged:
        return ComparedRuns(list(runs), False, None, [], "None of these runs was judged yet.")
    if not alike:
        said = (
            "These runs were not all judged by the same images, so their accuracies can't be "
            "compared; each stands for itself."
        )
        return ComparedRuns(list(runs), False, None, [], said)
    first, *others = runs
    found = compare_page(first, others)
    return ComparedRuns(list(runs), True, first, found, _compare_verdict(first, found, len(others)))


def compare_page(first: ReportContents, others: Sequence[ReportContents]) -> list[PairedDifference]:
    """Each other run against the first, where the answers to single images were kept."""
    gains = []
    for other in others:
        if first.answers is None or other.answers is None:
            continue
        labels = first.answers.labels
        its, mine = (
            each.answers.logits.argmax(axis=1) == labels  # type: ignore[union-attr]
            for each in (first, other)
        )
        lost, gained = int((its & ~mine).sum()), int((mine & ~its).sum())
        both, neither = int((its & mine).sum()), int((~its & ~mine).sum())
        gains.append((other.name, gained, lost, difference_on_images(both, lost, gained, neither)))
    corrected = holm_adjust([gain.p for *_, gain in gains])
    return [
        PairedDifference(name, gain.value, gain.interval95 or (gain.value,) * 2, gained, lost, p)
        for (name, gained, lost, gain), p in zip(gains, corrected, strict=True)
        if p is not None
    ]


def _compare_verdict(first: ReportContents, found: Sequence[PairedDifference], others: int) -> str:
    assert first.summary is not None
    n, what = first.summary["n"], CALIBRATION_WORDS[first.split]
    said = f"{first.name}: {_accuracy_cell(first):.1%} of {n:,} {what} images"
    if len(found) < others:
        return f"{said}. Whether the others differ can't be said without their single answers."
    parts = [
        f"{words} {_listed_names([each.name for each in found if each.says == words])}"
        for words in ("less accurate than", "more accurate than", "not distinguishable from")
        if any(each.says == words for each in found)
    ]
    return f"{said}; {', '.join(parts)} (McNemar's exact test)."


def _listed_names(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), names[-1]])


def _accuracy_cell(found: ReportContents) -> float:
    assert found.summary is not None
    return float(found.summary["accuracy"])


def _image_count(found: ReportContents) -> tuple[Any, ...]:
    """What says which images a run was judged by: the split's own hash, else all data's."""
    if found.answers is not None:
        return found.split, found.answers.images, found.classes
    return found.split, found.model_metadata.get("data", {}).get("fingerprint"), found.classes


def compare_head(both: ComparedRuns) -> Markup:
    missing = list(dict.fromkeys(f"{f.name}: {line}" for f in both.runs for line in f.missing))
    return render_page("compare-head.html", both=both, missing=missing)


def compare_table(both: ComparedRuns) -> Markup | None:
    """A column for each run: what it reached, how, and what it cost."""
    columns = [_facts(found) for found in both.runs]
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    return render_page("compare-table.html", runs=both.runs, rows=rows, alike=both.alike)


def _facts(found: ReportContents) -> dict[str, str]:
    """What is stated about a run, as text."""
    facts, s = found.facts, found.summary
    look: dict[str, Any] = next((x for x in reversed(found.looks) if x["split"] == found.split), {})
    trained, judged = found.trained_accuracy(), calibration(found)
    path = found.run_dir.model_path
    low, high = s["interval95"] if s else (None, None)
    error = "–" if s is None else format_number(s["ece"], 3)
    epoch = f"{facts['kept_epoch']} of {facts['epochs']}" if "epochs" in facts else "–"
    return {
        "judged by": "not judged"
        if s is None
        else f"{s['n']:,} {CALIBRATION_WORDS[found.split]} images",
        "accuracy": "–" if s is None else format_share(s["accuracy"], 2),
        "95% interval": "–" if s is None else f"{format_share(low, 2)} to {format_share(high, 2)}",
        "loss": "–" if s is None else format_number(s["loss"], 3),
        "calibration error": error + (f" ({judged.words})" if judged else ""),
        "training accuracy": "–" if trained is None else format_share(trained[0], 2),
        "network": "–" if found.recipe is None else found.recipe.model.name,
        "weights": format_count(facts.get("parameters")),
        "epoch kept": epoch,
        "training time": format_seconds(facts.get("training_seconds")),
        "images/s when tested": format_count(look.get("images_per_second")),
        "model file": f"{path.stat().st_size / 1e6:,.1f} MB" if path.exists() else "–",
    }


def compare_curves(both: ComparedRuns) -> Markup | None:
    """Validation curves overlaid; training curves where there was no validation."""
    runs = [found for found in both.runs if found.rows][:COMPARE_LOOKS]
    if not runs:
        return None
    validated = all(any(math.isfinite(r["val_loss"]) for r in f.rows) for f in runs)
    part = "val" if validated else "train"
    longest = max((f.rows for f in runs), key=len)
    x = [row["epoch"] for row in longest]
    charts = []
    for key, label, percent in (("loss", "loss (nats)", False), ("accuracy", "accuracy", True)):
        lines = [
            ChartLine(found.name, f"c{number}", [row[f"{part}_{key}"] for row in found.rows])
            for number, found in enumerate(runs)
        ]
        title = f"{CALIBRATION_WORDS[part].capitalize()} {label}"
        legend = [(html.color_swatch(line.look), line.name) for line in lines]
        svg = html.line_chart(x, lines, title, percent=percent)
        charts.append({"title": title, "svg": svg, "legend": legend})
    return render_page("compare-curves.html", charts=charts, left=len(both.runs) - len(runs))


def compare_paired(both: ComparedRuns) -> Markup | None:
    """Each run against the first, image by image."""
    if not both.differences or both.first is None:
        return None
    return render_page(
        "compare-paired.html",
        first=both.first.name,
        rows=both.differences,
        several=len(both.differences) > 1,
    )


def compare_classes(both: ComparedRuns) -> Markup | None:
    """Recall of each class, run by run."""
    if not both.alike or any(not (f.summary or {}).get("per_class") for f in both.runs):
        return None
    rows = []
    for name in both.runs[0].classes:
        scores = [f.summary["per_class"][name] for f in both.runs]  # type: ignore[index]
        recalls = [each["recall"] for each in scores]
        known = [r for r in recalls if r is not None]
        best = max(known) if known and min(known) < max(known) else None
        rows.append({"name": name, "n": scores[0]["n"], "recalls": recalls, "best": best})
    return render_page("compare-classes.html", rows=rows, names=both.names)


def compare_recipes(both: ComparedRuns) -> Markup | None:
    """The keys in which the recipes differ."""
    flat = [
        {} if f.recipe is None else sections.flatten_recipe(f.recipe.model_dump(mode="json"))
        for f in both.runs
    ]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = []
    for key in keys:
        values = [each.get(key, "–") for each in flat]
        if len(set(values)) > 1 and key not in ("name", "about"):
            rows.append((key, values))
    return render_page("compare-recipes.html", rows=rows, names=both.names)


COMPARE_SECTIONS: dict[str, PageSection] = {
    "runs": ("Side by side", compare_table),
    "differences": ("Differences", compare_paired),
    "curves": ("Curves", compare_curves),
    "classes": ("Classes", compare_classes),
    "recipes": ("What differs in the recipes", compare_recipes),
}

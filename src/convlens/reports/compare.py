"""Page of several runs: one table, overlaid curves, differences on the same images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from convlens.metrics import (
    AccuracyDifference,
    class_means_difference,
    difference_on_images,
    holm_adjust,
)
from convlens.reports.contents import MetricsRow, ReportContents
from convlens.reports.html import (
    ChartLine,
    PageSection,
    color_swatch,
    format_count,
    format_number,
    format_seconds,
    format_share,
    line_chart,
    render_template,
)
from convlens.reports.sections import SPLIT_WORDS, flatten_recipe, measure_calibration

MAX_CURVES = 7  # distinguishable lines in a chart
SIGNIFICANCE_LEVEL = 0.05
LESS, MORE, SAME = "less accurate than", "more accurate than", "not distinguishable from"


class PairedDifference(NamedTuple):
    """Another run compared with the first one on the same images, as by `convlens compare`.

    Attributes:
        points: the difference of accuracy, other minus first, as a share.
        interval: its 95% interval (Newcombe's).
        gained, lost: the number of images that only the other run, or only the first, gets right.
        p: of McNemar's exact test, corrected for the number of comparisons (Holm).
        class_means: differences of macro F1 and balanced accuracy, with bootstrap intervals.
    """

    name: str
    points: float
    interval: tuple[float, float]
    gained: int
    lost: int
    p: float
    class_means: Mapping[str, AccuracyDifference]

    @property
    def relation(self) -> str:
        """The first run compared with this one, e.g. `more accurate than`."""
        if self.p >= SIGNIFICANCE_LEVEL:
            return SAME
        return LESS if self.points > 0 else MORE


@dataclass(frozen=True)
class ComparedRuns:
    """Runs side by side.

    Attributes:
        comparable: whether all were evaluated on the same images.
        first: the reference: the first run that was named. Choosing the best by the very
            predictions that are tested would make p values too small.
    """

    runs: list[ReportContents]
    comparable: bool
    first: ReportContents | None
    differences: list[PairedDifference]
    verdict: str

    @property
    def names(self) -> list[str]:
        return [contents.name for contents in self.runs]

    @property
    def split(self) -> str:
        return self.runs[0].split if len({run.split for run in self.runs}) == 1 else "mixed"


def gather_runs(runs: Sequence[ReportContents]) -> ComparedRuns:
    """Compare the other runs with the first where all were evaluated on the same images."""
    evaluated = [contents for contents in runs if contents.summary is not None]
    same_images = len({_images_key(contents) for contents in runs}) == 1
    if not evaluated:
        verdict = "None of these runs has been evaluated yet."
        return ComparedRuns(list(runs), False, None, [], verdict)
    if len(evaluated) < len(runs) or not same_images:
        verdict = (
            "These runs were not all evaluated on the same images, so their accuracies cannot be "
            "compared."
        )
        return ComparedRuns(list(runs), False, None, [], verdict)
    first, *others = runs
    differences = compare_with_first(first, others)
    verdict = _comparison_verdict(first, differences, len(others))
    return ComparedRuns(list(runs), True, first, differences, verdict)


def _images_key(contents: ReportContents) -> tuple[Any, ...]:
    """Return a key of the evaluated images: the hash of the split, else that of all data."""
    if contents.predictions is not None:
        return contents.split, contents.predictions.images, contents.classes
    fingerprint = contents.model_metadata.get("data", {}).get("fingerprint")
    return contents.split, fingerprint, contents.classes


def compare_with_first(
    first: ReportContents, others: Sequence[ReportContents]
) -> list[PairedDifference]:
    """Compare each other run with the first; runs without cached predictions are left out."""
    counts, tests, class_means = [], [], []
    for other in others:
        if first.predictions is None or other.predictions is None:
            continue
        targets = first.predictions.labels
        first_preds = first.predictions.logits.argmax(axis=1)
        other_preds = other.predictions.logits.argmax(axis=1)
        first_correct, other_correct = first_preds == targets, other_preds == targets
        lost = int((first_correct & ~other_correct).sum())
        gained = int((other_correct & ~first_correct).sum())
        both = int((first_correct & other_correct).sum())
        neither = int((~first_correct & ~other_correct).sum())
        counts.append((other.name, gained, lost))
        class_means.append(
            class_means_difference(targets, first_preds, other_preds, len(first.classes))
        )
        tests.append(difference_on_images(both, lost, gained, neither))
    corrected = holm_adjust([test.p for test in tests])
    return [
        PairedDifference(
            name, test.value, test.interval95 or (test.value,) * 2, gained, lost, p, means
        )
        for (name, gained, lost), test, p, means in zip(
            counts, tests, corrected, class_means, strict=True
        )
        if p is not None
    ]


def _comparison_verdict(
    first: ReportContents, differences: Sequence[PairedDifference], others: int
) -> str:
    assert first.summary is not None
    n, split = first.summary["n"], SPLIT_WORDS[first.split]
    accuracy = f"{first.name}: {first.summary['accuracy']:.1%} of {n:,} {split} images"
    if len(differences) < others:
        return (
            f"{accuracy}. Differences from the other runs cannot be tested: predictions for single "
            "images are missing."
        )
    parts = []
    for relation in (LESS, MORE, SAME):
        names = [other.name for other in differences if other.relation == relation]
        if names:
            parts.append(f"{relation} {_join_names(names)}")
    return f"{accuracy}; {', '.join(parts)} (McNemar's exact test)."


def _join_names(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), names[-1]])


def comparison_head(comparison: ComparedRuns) -> Markup:
    """Render names, verdict and the notes on missing parts."""
    missing = [f"{run.name}: {line}" for run in comparison.runs for line in run.missing]
    return render_template(
        "compare-head.html",
        comparison=comparison,
        missing=list(dict.fromkeys(missing)),
        validation_chose_epoch=any(run.validation_chose_epoch for run in comparison.runs),
    )


def compare_table(comparison: ComparedRuns) -> Markup | None:
    """Render a column for each run: its results, its recipe in short, and its cost."""
    columns = [_run_facts(contents) for contents in comparison.runs]
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    return render_template(
        "compare-table.html",
        runs=comparison.runs,
        rows=rows,
        comparable=comparison.comparable,
    )


def _run_facts(contents: ReportContents) -> dict[str, str]:
    """Return the rows of a run's column as text."""
    metadata, summary = contents.metadata, contents.summary
    evaluations = (e for e in reversed(contents.evaluations) if e["split"] == contents.split)
    latest: dict[str, Any] = next(evaluations, {})
    train_accuracy, calibration = contents.train_accuracy, measure_calibration(contents)
    model_path = contents.run_dir.model_path
    split = accuracy = interval = loss = calibration_error = "–"
    class_means = dict.fromkeys(("macro_f1", "balanced_accuracy"), "–")
    if summary is not None:
        split = f"{summary['n']:,} {SPLIT_WORDS[contents.split]} images"
        accuracy = format_share(summary["accuracy"], 2)
        interval = " to ".join(format_share(end, 2) for end in summary["interval95"])
        for key in class_means:
            if summary.get(key) is not None:  # not in results of earlier versions
                class_means[key] = format_share(summary[key], 2)
        loss = format_number(summary["loss"], 3)
        calibration_error = format_number(summary["ece"], 3)
    if calibration is not None:
        calibration_error += f" ({calibration.label})"
    epoch = f"{metadata['kept_epoch']} of {metadata['epochs']}" if "epochs" in metadata else "–"
    return {
        "evaluated on": split,
        "accuracy": accuracy,
        "95% interval": interval,
        "macro F1": class_means["macro_f1"],
        "balanced accuracy": class_means["balanced_accuracy"],
        "loss": loss,
        "calibration error": calibration_error,
        "training accuracy": "–"
        if train_accuracy is None
        else format_share(train_accuracy.share, 2),
        "network": "–" if contents.recipe is None else contents.recipe.model.name,
        "weights": format_count(metadata.get("parameters")),
        "epoch kept": epoch,
        "training time": format_seconds(metadata.get("training_seconds")),
        "images/s when tested": format_count(latest.get("images_per_second")),
        "model file": f"{model_path.stat().st_size / 1e6:,.1f} MB" if model_path.exists() else "–",
    }


def compare_paired(comparison: ComparedRuns) -> Markup | None:
    """Render the differences of each run from the first, image by image."""
    if not comparison.differences or comparison.first is None:
        return None
    return render_template(
        "compare-paired.html",
        first=comparison.first.name,
        rows=comparison.differences,
        several=len(comparison.differences) > 1,
    )


def compare_curves(comparison: ComparedRuns) -> Markup | None:
    """Render overlaid validation curves, or training curves if a run was not validated."""
    runs = [(each.name, each.rows) for each in comparison.runs if each.rows][:MAX_CURVES]
    if not runs:
        return None
    omitted = len(comparison.runs) - len(runs)
    return render_template("compare-curves.html", charts=overlaid_curves(runs), omitted=omitted)


def overlaid_curves(runs: Sequence[tuple[str, Sequence[MetricsRow]]]) -> list[dict[str, Any]]:
    """Return charts of the validation loss and accuracy of runs, or of training without any.

    Args:
        runs: names and rows of `metrics.csv`; at most `MAX_CURVES`, none of them empty.
    """
    validated = all(any(math.isfinite(row["val_loss"]) for row in rows) for _, rows in runs)
    split = "val" if validated else "train"
    epochs = [row["epoch"] for row in max((rows for _, rows in runs), key=len)]
    charts = []
    for key, label, percent in (("loss", "loss (nats)", False), ("accuracy", "accuracy", True)):
        lines = [
            ChartLine(name, f"c{number}", [row[f"{split}_{key}"] for row in rows])
            for number, (name, rows) in enumerate(runs)
        ]
        title = f"{SPLIT_WORDS[split].capitalize()} {label}"
        legend = [(color_swatch(line.css_class), line.name) for line in lines]
        svg = line_chart(epochs, lines, title, percent=percent)
        charts.append({"title": title, "svg": svg, "legend": legend})
    return charts


def compare_classes(comparison: ComparedRuns) -> Markup | None:
    """Render the recall of each class, run by run."""
    summaries = [contents.summary or {} for contents in comparison.runs]
    if not comparison.comparable or not all(s.get("per_class") for s in summaries):
        return None
    rows = []
    for name in comparison.runs[0].classes:
        scores = [summary["per_class"][name] for summary in summaries]
        recalls = [score["recall"] for score in scores]
        known = [recall for recall in recalls if recall is not None]
        best = max(known) if known and min(known) < max(known) else None
        rows.append({"name": name, "n": scores[0]["n"], "recalls": recalls, "best": best})
    return render_template("compare-classes.html", rows=rows, names=comparison.names)


def compare_recipes(comparison: ComparedRuns) -> Markup | None:
    """Render the keys in which the recipes differ."""
    recipes = [
        {} if run.recipe is None else flatten_recipe(run.recipe.model_dump(mode="json"))
        for run in comparison.runs
    ]
    rows = []
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = [recipe.get(key, "–") for recipe in recipes]
        if len(set(values)) > 1 and key not in ("name", "about"):
            rows.append((key, values))
    return render_template("compare-recipes.html", rows=rows, names=comparison.names)


COMPARE_SECTIONS: dict[str, PageSection] = {
    "runs": ("Side by side", compare_table),
    "differences": ("Differences", compare_paired),
    "curves": ("Curves", compare_curves),
    "classes": ("Classes", compare_classes),
    "recipes": ("Differences in the recipes", compare_recipes),
}

"""The page of several runs: one table, curves overlaid, differences on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from convlens import metrics
from convlens.reporting import drawing, origin
from convlens.reporting.contents import Contents
from convlens.reporting.drawing import Line
from convlens.reporting.page import Section, count, number, render, seconds, share
from convlens.reporting.verdict import WORDS, calibration

LOOKS = 7  # lines that can be told apart


class Difference(NamedTuple):
    """Another run against the best one on the same images.

    `points` is the difference of accuracy, other minus best, with its 95% interval (Wald's, for
    paired shares); `p` is McNemar's exact one times the number of comparisons (Bonferroni).
    """

    name: str
    points: float
    interval: tuple[float, float]
    gained: int
    lost: int
    p: float

    @property
    def distinguishable(self) -> bool:
        return self.p < 0.05


@dataclass(frozen=True)
class Several:
    """Runs side by side; `alike` says whether all were judged by the same images."""

    runs: list[Contents]
    alike: bool
    best: Contents | None
    differences: list[Difference]
    verdict: str

    @property
    def names(self) -> list[str]:
        return [found.name for found in self.runs]

    @property
    def split(self) -> str:
        return self.runs[0].split if len({found.split for found in self.runs}) == 1 else "mixed"


def side_by_side(runs: Sequence[Contents]) -> Several:
    """Which run is best, and whether the others can be told from it."""
    judged = [found for found in runs if found.summary is not None]
    alike = len(judged) == len(runs) and len({_images(found) for found in runs}) == 1
    if not judged:
        return Several(list(runs), False, None, [], "None of these runs was judged yet.")
    best = max(judged, key=_accuracy)
    if not alike:
        said = (
            "These runs were not all judged by the same images, so their accuracies can't be "
            "compared; each stands for itself."
        )
        return Several(list(runs), False, best, [], said)
    found = differences(best, [each for each in runs if each is not best])
    return Several(list(runs), True, best, found, _verdict(best, found, len(runs) - 1))


def differences(best: Contents, others: Sequence[Contents]) -> list[Difference]:
    """Each other run against the best, where the answers to single images were kept."""
    found = []
    for other in others:
        if best.answers is None or other.answers is None:
            continue
        labels = best.answers.labels
        first, second = (each.answers.logits.argmax(axis=1) for each in (best, other))  # type: ignore[union-attr]
        gained, lost, p = metrics.paired(labels, first, second)
        n = len(labels)
        points = (gained - lost) / n
        half = 1.96 * math.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0)) / n
        found.append(
            Difference(
                other.name, points, (points - half, points + half), gained, lost,
                min(1.0, p * len(others)),
            )
        )  # fmt: skip
    return found


def _verdict(best: Contents, found: Sequence[Difference], others: int) -> str:
    assert best.summary is not None
    n, what = best.summary["n"], WORDS[best.split]
    said = f"{best.name} is best: {_accuracy(best):.1%} of {n:,} {what} images"
    if len(found) < others:
        return f"{said}. Whether the others differ can't be said without their single answers."
    near = [each.name for each in found if not each.distinguishable]
    if not near:
        rest = "the others" if others > 1 else found[0].name
        return f"{said}, and distinguishable from {rest} (McNemar's exact test)."
    return f"{said}, but not distinguishable from {', '.join(near)} (McNemar's exact test)."


def _accuracy(found: Contents) -> float:
    assert found.summary is not None
    return float(found.summary["accuracy"])


def _images(found: Contents) -> tuple[Any, ...]:
    """What says which images a run was judged by: the split's own hash, else all data's."""
    if found.answers is not None:
        return found.split, found.answers.images, found.classes
    return found.split, found.card.get("data", {}).get("fingerprint"), found.classes


def head(both: Several) -> Markup:
    missing = list(dict.fromkeys(f"{f.name}: {line}" for f in both.runs for line in f.missing))
    return render("compare-head.html", both=both, missing=missing)


def table(both: Several) -> Markup | None:
    """A column for each run: what it reached, how, and what it cost."""
    columns = [_facts(found) for found in both.runs]
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    best = both.runs.index(both.best) if both.alike and both.best is not None else -1
    return render(
        "compare-table.html", runs=both.runs, rows=rows, alike=both.alike, best=best
    )  # fmt: skip


def _facts(found: Contents) -> dict[str, str]:
    """What is stated about a run, as text."""
    facts, s = found.facts, found.summary
    look: dict[str, Any] = next((x for x in reversed(found.looks) if x["split"] == found.split), {})
    trained, judged = found.trained_accuracy(), calibration(found)
    path = found.place.model_path
    low, high = s["interval95"] if s else (None, None)
    error = "–" if s is None else number(s["ece"], 3)
    epoch = f"{facts['kept_epoch']} of {facts['epochs']}" if "epochs" in facts else "–"
    return {
        "judged by": "not judged" if s is None else f"{s['n']:,} {WORDS[found.split]} images",
        "accuracy": "–" if s is None else share(s["accuracy"], 2),
        "95% interval": "–" if s is None else f"{share(low, 2)} to {share(high, 2)}",
        "loss": "–" if s is None else number(s["loss"], 3),
        "calibration error": error + (f" ({judged.words})" if judged else ""),
        "training accuracy": "–" if trained is None else share(trained[0], 2),
        "network": "–" if found.recipe is None else found.recipe.model.name,
        "weights": count(facts.get("parameters")),
        "epoch kept": epoch,
        "training time": seconds(facts.get("training_seconds")),
        "images/s when tested": count(look.get("images_per_second")),
        "model file": f"{path.stat().st_size / 1e6:,.1f} MB" if path.exists() else "–",
    }


def curves(both: Several) -> Markup | None:
    """Validation curves overlaid; training curves where there was no validation."""
    runs = [found for found in both.runs if found.rows][:LOOKS]
    if not runs:
        return None
    validated = all(any(math.isfinite(r["val_loss"]) for r in f.rows) for f in runs)
    part = "val" if validated else "train"
    longest = max((f.rows for f in runs), key=len)
    x = [row["epoch"] for row in longest]
    charts = []
    for key, label, percent in (("loss", "loss (nats)", False), ("accuracy", "accuracy", True)):
        lines = [
            Line(found.name, f"c{number}", [row[f"{part}_{key}"] for row in found.rows])
            for number, found in enumerate(runs)
        ]
        title = f"{WORDS[part].capitalize()} {label}"
        legend = [(drawing.swatch(line.look), line.name) for line in lines]
        svg = drawing.chart(x, lines, title, percent=percent)
        charts.append({"title": title, "svg": svg, "legend": legend})
    return render("compare-curves.html", charts=charts, left=len(both.runs) - len(runs))


def paired(both: Several) -> Markup | None:
    """Each run against the best, image by image."""
    if not both.differences or both.best is None:
        return None
    return render("compare-paired.html", best=both.best.name, rows=both.differences,
                  several=len(both.differences) > 1)  # fmt: skip


def classes(both: Several) -> Markup | None:
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
    return render("compare-classes.html", rows=rows, names=both.names)


def recipes(both: Several) -> Markup | None:
    """The keys in which the recipes differ."""
    flat = [
        {} if f.recipe is None else origin.flat(f.recipe.model_dump(mode="json"))
        for f in both.runs
    ]  # fmt: skip
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = []
    for key in keys:
        values = [each.get(key, "–") for each in flat]
        if len(set(values)) > 1 and key not in ("name", "about"):
            rows.append((key, values))
    return render("compare-recipes.html", rows=rows, names=both.names)


SECTIONS: dict[str, Section] = {
    "runs": ("Side by side", table),
    "differences": ("Differences", paired),
    "curves": ("Curves", curves),
    "classes": ("Classes", classes),
    "recipes": ("What differs in the recipes", recipes),
}

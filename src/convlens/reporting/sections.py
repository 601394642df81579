"""The parts of a run's page, in their order: a function each, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from convlens import metrics, picturing
from convlens.errors import ConvlensError
from convlens.reporting import confusing, drawing, insides, origin, thumbnails
from convlens.reporting.contents import Contents
from convlens.reporting.drawing import Line
from convlens.reporting.page import Figure, Section, figures, render, share
from convlens.reporting.verdict import WORDS, calibration, commonest, verdict

SHOWN = 24  # of the worst mistakes
EPOCHS = 1000  # rows of the table of epochs, at most
PARTS = (("train", "training"), ("val", "validation"))


def head(found: Contents) -> Markup:
    """Name, verdict and the numbers that everybody asks for."""
    summary = found.summary
    trained = found.trained_accuracy()
    looks = 0
    if found.split == "test":
        sha = found.card.get("sha256")
        log = found.place.log()
        same = [x for x in log if x["split"] == "test" and x["model_sha256"] == sha]
        looks = len([x for x in same if x.get("own")])
    floor = bar = None
    common = commonest(found)
    if summary is not None and common is not None:
        floor = common[1]
        low, high = summary["interval95"]
        said = f"accuracy {share(summary['accuracy'])}, interval {share(low)} to {share(high)}"
        bar = drawing.interval(low, high, summary["accuracy"], floor, said)
    return render(
        "head.html", found=found, verdict=verdict(found), summary=summary, trained=trained,
        calibration=calibration(found), looks=looks, floor=floor, bar=bar,
        what=WORDS[found.split],
    )  # fmt: skip


def curves(found: Contents) -> Markup | None:
    """Loss and accuracy over epochs, with the kept epoch marked, and the numbers as a table."""
    if not found.rows:
        return None
    x = [row["epoch"] for row in found.rows]
    charts = []
    for key, label, percent in (("loss", "Loss (nats)", False), ("accuracy", "Accuracy", True)):
        lines = [
            Line(words, part, [row[f"{part}_{key}"] for row in found.rows])
            for part, words in PARTS
        ]  # fmt: skip
        lines = [line for line in lines if any(map(math.isfinite, line.values))]
        svg = drawing.chart(x, lines, label, percent=percent, mark=found.kept_epoch)
        legend = [(drawing.swatch(line.look), line.name) for line in lines]
        charts.append({"title": label, "svg": svg, "legend": legend})
    return render(
        "curves.html", charts=charts, rows=found.rows[:EPOCHS], gaps=gaps(found.rows),
        kept=found.kept_epoch, more=max(0, len(found.rows) - EPOCHS),
        validated=any(math.isfinite(row["val_loss"]) for row in found.rows),
    )  # fmt: skip


def gaps(rows: Sequence[dict[str, float]]) -> str:
    """The epochs whose training loss is not a number, in words; empty if there are none."""
    bad = [int(row["epoch"]) for row in rows if not math.isfinite(row["train_loss"])]
    if not bad:
        return ""
    listed = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" * (len(bad) > 8))
    return f"The training loss was not a number in epoch {listed}: the training diverged there."


def classes(found: Contents) -> Markup | None:
    """How each class fares, sortable; with what it is most often taken for."""
    if found.summary is None or not found.summary.get("per_class"):
        return None
    table = np.asarray(found.summary["confusion"], dtype=np.int64)
    rows = []
    for index, (name, scores) in enumerate(found.summary["per_class"].items()):
        others = table[index].copy()
        others[index] = 0
        most = int(others.argmax())
        hits = int(table[index, index])
        rows.append({
            "name": name, **scores, "order": index,
            "interval": metrics.wilson_interval(hits, scores["n"]) if scores["n"] else None,
            "taken": (found.classes[most], int(others[most])) if others[most] else None,
        })  # fmt: skip
    return render("classes.html", rows=rows, what=WORDS[found.split])


def reliability(found: Contents) -> Markup | None:
    """Whether the stated probabilities can be taken at their word."""
    judged = calibration(found)
    if found.answers is None or judged is None:
        return None
    confidence, right, count = (
        array.tolist() for array in metrics.reliability(found.answers.chances, found.answers.labels)
    )
    bins = [
        {"from": i / len(count), "to": (i + 1) / len(count), "n": n, "sure": c, "right": r}
        for i, (c, r, n) in enumerate(zip(confidence, right, count, strict=True))
        if n
    ]
    svg = drawing.reliability(confidence, right, count)
    return render("calibration.html", svg=svg, bins=bins, judged=judged)


def mistakes(found: Contents) -> Markup | None:
    """The wrong answers that were least likely to the truth."""
    if found.answers is None or found.images is None:
        return None
    chances, labels = found.answers.chances, found.answers.labels
    worst = picturing.worst_of(chances, labels)
    shown = worst[:SHOWN].tolist()
    pictures = []
    for i, source in zip(shown, thumbnails.thumbnails(found.images, shown), strict=True):
        said = int(chances[i].argmax())
        pictures.append({
            "source": source, "id": str(found.images.ids[i]), "sure": float(chances[i, said]),
            "said": found.classes[said], "truth": found.classes[labels[i]],
            "of_truth": float(chances[i, labels[i]]),
        })  # fmt: skip
    return render("mistakes.html", pictures=pictures, wrong=len(worst), n=len(labels))


# Ways of looking inside, by name: each returns finished pictures, or none where there is nothing
# to show. They become sections of their own.
Looking = Callable[[Contents], Sequence[Figure]]
LOOKS: dict[str, tuple[str, str, Looking]] = {
    "activations": ("Activations", "What each stage gives for some images.", insides.activations),
    "attributions": (
        "Evidence",
        "Which pixels speak for what the model says.",
        insides.attributions,
    ),
    "stages": ("What each stage knows", "Measured on held-out images.", insides.stages),
}


def looked(name: str) -> Callable[[Contents], Markup | None]:
    """The section of an entry of `LOOKS`; what can't be drawn is said and left out."""

    def draw(found: Contents) -> Markup | None:
        _, lead, look = LOOKS[name]
        try:
            return figures(look(found), lead)
        except ConvlensError as error:
            found.missing.append(f"{LOOKS[name][0]}: {error.what}.")
            return None

    return draw


def data(found: Contents) -> Markup | None:
    """Where the splits come from, and what an audit of every image found."""
    about: dict[str, Any] = dict(found.facts.get("data") or found.card.get("data") or {})
    if not about:
        return None
    report = found.audit
    sizes = None
    if report is not None:
        sizes = [report.width, report.height]
    return render("data.html", about=about, report=report, sizes=sizes, name=found.name)


SECTIONS: dict[str, Section] = {
    "curves": ("Curves", curves),
    "confusion": ("Confusion", confusing.confusion),
    "classes": ("Classes", classes),
    "calibration": ("Calibration", reliability),
    "mistakes": ("Worst mistakes", mistakes),
    **{name: (LOOKS[name][0], looked(name)) for name in LOOKS},
    "data": ("Data", data),
    "recipe": ("Recipe", origin.recipe),
    "environment": ("Environment", origin.environment),
    "reproduce": ("How to reproduce", origin.reproduce),
}

"""The page of several runs: one table, curves overlaid, differences on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from convlens.comparing.differences import holm, on_images
from convlens.reporting import drawing, origin
from convlens.reporting.contents import Contents
from convlens.reporting.drawing import Line
from convlens.reporting.page import Section, count, number, render, seconds, share
from convlens.reporting.verdict import WORDS, calibration

LOOKS = 7  # lines that can be told apart


class Difference(NamedTuple):
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
class Several:
    """Runs side by side; `alike` says whether all were judged by the same images.

    `first` is what the others are compared with: the first run named, since choosing the best by
    the very answers that are tested would make p values too small.
    """

    runs: list[Contents]
    alike: bool
    first: Contents | None
    differences: list[Difference]
    verdict: str

    @property
    def names(self) -> list[str]:
        return [found.name for found in self.runs]

    @property
    def split(self) -> str:
        return self.runs[0].split if len({found.split for found in self.runs}) == 1 else "mixed"


def side_by_side(runs: Sequence[Contents]) -> Several:
    """Whether the other runs can be told from the first."""
    judged = [found for found in runs if found.summary is not None]
    alike = len(judged) == len(runs) and len({_images(found) for found in runs}) == 1
    if not judged:
        return Several(list(runs), False, None, [], "None of these runs was judged yet.")
    if not alike:
        said = (
            "These runs were not all judged by the same images, so their accuracies can't be "
            "compared; each stands for itself."
        )
        return Several(list(runs), False, None, [], said)
    first, *others = runs
    found = compared(first, others)
    return Several(list(runs), True, first, found, _verdict(first, found, len(others)))


def compared(first: Contents, others: Sequence[Contents]) -> list[Difference]:
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
        gains.append((other.name, gained, lost, on_images(both, lost, gained, neither)))
    corrected = holm([gain.p for *_, gain in gains])
    return [
        Difference(name, gain.value, gain.interval95 or (gain.value,) * 2, gained, lost, p)
        for (name, gained, lost, gain), p in zip(gains, corrected, strict=True)
        if p is not None
    ]


def _verdict(first: Contents, found: Sequence[Difference], others: int) -> str:
    assert first.summary is not None
    n, what = first.summary["n"], WORDS[first.split]
    said = f"{first.name}: {_accuracy(first):.1%} of {n:,} {what} images"
    if len(found) < others:
        return f"{said}. Whether the others differ can't be said without their single answers."
    parts = [
        f"{words} {_listed([each.name for each in found if each.says == words])}"
        for words in ("less accurate than", "more accurate than", "not distinguishable from")
        if any(each.says == words for each in found)
    ]
    return f"{said}; {', '.join(parts)} (McNemar's exact test)."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), names[-1]])


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
    return render("compare-table.html", runs=both.runs, rows=rows, alike=both.alike)


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
    """Each run against the first, image by image."""
    if not both.differences or both.first is None:
        return None
    return render("compare-paired.html", first=both.first.name, rows=both.differences,
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

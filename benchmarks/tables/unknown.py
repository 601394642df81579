"""Table of images of unknown classes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tables.words import sd, where

SCORES = {"neighbors": "nearest neighbors", "energy": "energy", "confidence": "confidence"}


def unknown_images(r: dict[str, Any]) -> str:
    lines = [
        "## Images of unknown classes (`predict` marks them)",
        "",
        "Trained without some classes; scored are test images of the known classes, of those that "
        "were left out, and of other sets. AUROC: the probability that an unknown image has a "
        "higher score than a known one (50% is chance). FPR95: the share of unknown images that "
        "pass if 95% of the known ones do. Marked: above the stored threshold, which about 5% of "
        "known images should be. Confidence is the baseline. Mean ± sample deviation over draws.",
        "",
        "| known | accuracy | unknown | score | AUROC | FPR95 | marked | known marked |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in r["sets"].items():
        draws = case["draws"]
        count = len(draws[0]["unknown"])
        known = f"{name} without {count} class{'es' * (count != 1)}"
        known += f", {len(draws)} draw{'s' * (len(draws) != 1)}"
        accuracy = _mean([draw["accuracy"] for draw in draws])
        for group in draws[0]["groups"]:
            for score, title in SCORES.items():
                cells = [draw["groups"][group][score] for draw in draws]
                marked = known_marked = "–"
                if "marked" in cells[0]:
                    marked = _mean([cell["marked"] for cell in cells])
                    known_marked = _mean([draw["known_marked"][score] for draw in draws])
                auroc, fpr95 = (_mean([cell[key] for cell in cells]) for key in ("auroc", "fpr95"))
                lines.append(
                    f"| {known} | {accuracy} | {group} | {title} | **{auroc}** | {fpr95} | "
                    f"{marked} | {known_marked} |"
                )
    return "\n".join([*lines, "", where(r), ""])


def _mean(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return f"{100 * statistics.fmean(values):.1f}{sd(spread)}%"

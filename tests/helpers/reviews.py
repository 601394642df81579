"""A list of suspected labels as `convlens labels` writes it, without training models."""

from __future__ import annotations

import csv
from pathlib import Path

from helpers.commands import picture

HOSTILE = "<img src=x onerror=alert(1)>"
COLUMNS = ("path", "label", "split", "suspect", "suggested", "score", "p_suggested", "copies")


def review_table(folder: Path, suspects: int = 3, clean: int = 2, size: int = 12) -> Path:
    """Write images with hostile names and `plots/labels-photos/labels.csv` about them."""
    classes = ("blue", "green", HOSTILE)
    colors = ((40, 60, 220), (40, 200, 60), (220, 50, 40))
    rows: list[tuple[object, ...]] = []
    for number in range(suspects + clean):
        name = f"<b>{number}<b>.png" if number % 2 else f"photo {number}.png"
        label = number % 3
        path = picture(folder / "photos" / name, colors[(label + 1) % 3], size=size, seed=number)
        suggested = classes[(label + 1) % 3]
        facts = (number + 1, suggested, "0.0200", "0.9300") if number < suspects else ("",) * 4
        rows.append((path, classes[label], "train", *facts, ""))
    table = folder / "plots" / "labels-photos" / "labels.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return table

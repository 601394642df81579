"""What a person reviews suspected labels by: a ranked sheet of pictures, and a CSV to correct.

The CSV lists all images of the set with `path`, `label` and `split`, the suspected ones first:
correct `label`, and `convlens train` takes the file as it is. Images that were held out for testing
stay so by their `split`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convlens.data import Data
from convlens.data.decode import UnreadableImage, decode, fit_images
from convlens.data.encoded import Files, Paths
from convlens.data.parts import Part, Source
from convlens.data.sources import find
from convlens.data.tables import guarded
from convlens.labelling.suspects import LabelReport, Suspect
from convlens.schema import DataConfig
from convlens.system import files
from convlens.system.console import print_status

PAGE = 48  # pictures on a page of the sheet
PAGES = 10  # at most; the CSV has all
SIDE = 120


def written(report: LabelReport, config: DataConfig, data: Data, folder: Path) -> LabelReport:
    """Writes sheet and CSV into `folder`; the report with their paths.

    An older CSV in the folder, which somebody may have corrected, stays: the new one is then
    called `labels-2.csv`, and so on.

    Args:
        config: where the images come from.
        data: the set with what was held out for testing, and what can't be read.
    """
    size = None if config.image_size == "auto" else int(config.image_size)
    source = find(config.name, count=config.count, image_size=size, group=config.group)
    trainable = isinstance(source.parts["train"].images, Paths)
    text = _table(report, source, config.group, data)
    path = _unused(folder, text)
    files.write_atomic(path, text)
    sheets = _sheets(report, source, data.channels, folder)
    return replace(report, sheets=sheets, table=path, trainable=trainable)


# The CSV


def _table(report: LabelReport, source: Source, group: str | None, data: Data) -> str:
    """The suspected images in their order, then the others in the source's."""
    places = {identity: n for n, identity in enumerate(report.ids)}
    rank = {suspect.id: n for n, suspect in enumerate(report.suspects, 1)}
    held, skipped = set(data.held_out.get("test", ())), set(data.skipped)
    rows, lost = [], 0
    for split, part in source.parts.items():
        for number, identity in enumerate(part.ids):
            if identity in skipped:
                continue
            path = part.images[number] if isinstance(part.images, Paths) else None
            if path is not None and not _is_text(path):
                lost += 1
                continue
            row: dict[str, Any] = {"id": identity} if path is None else {"path": path}
            row["label"] = source.classes[part.labels[number]]
            row["split"] = "test" if split == "train" and identity in held else split
            place = places.get(identity)
            row |= _opinion(report, place, rank.get(identity))
            if group is not None and part.groups is not None:
                row.setdefault(group, part.groups[number])
            rows.append(row)
    if lost:
        print_status(
            f"{lost} files have names that are no text: the CSV lacks them until they are renamed"
        )
    rows.sort(key=lambda row: row["suspect"] or math.inf)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: guarded(v) if isinstance(v, str) else v for k, v in row.items()})
    return text.getvalue()


def _opinion(report: LabelReport, place: int | None, rank: int | None) -> dict[str, Any]:
    """The columns beside path, label and split; empty for images that nobody judged."""
    empty = dict.fromkeys(("suspect", "suggested", "score", "p_suggested", "copies"), "")
    if place is None:
        return empty
    chances = report.chances[place]
    best = int(chances.argmax())
    twins = report.suspects[rank - 1].twins if rank else []
    return {
        "suspect": rank or "",
        "suggested": report.classes[best],
        "score": f"{report.scores[place]:.4f}",
        "p_suggested": f"{chances[best]:.4f}",
        "copies": "; ".join(f"{twin.label}: {twin.id}" for twin in twins),
    }


def _is_text(path: str) -> bool:
    """Whether a file name can stand in a UTF-8 file."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unused(folder: Path, text: str) -> Path:
    """`labels.csv`, or the first of its kind that isn't there with other content."""
    number, path = 1, folder / "labels.csv"
    while path.exists() and path.read_bytes() != text.encode():
        number += 1
        path = folder / f"labels-{number}.csv"
    return path


# The sheet


def _sheets(report: LabelReport, source: Source, channels: int, folder: Path) -> list[Path]:
    """`review.png`, `review-2.png`, ...: `PAGE` pictures each."""
    from convlens import plots

    for old in folder.glob("review*.png"):
        old.unlink()
    shown = report.suspects[: PAGE * PAGES]
    pages = [shown[start : start + PAGE] for start in range(0, len(shown), PAGE)]
    paths = []
    for number, page in enumerate(pages, 1):
        title = f"{report.name}: suspected labels, the surest first"
        if len(pages) > 1:
            title += f", page {number} of {len(pages)}"
        title += " (above: given label, below: suggested)"
        figure = plots.label_review(
            _pictures(page, source, channels),
            [suspect.label for suspect in page],
            [suspect.suggested for suspect in page],
            [suspect.top[0][1] for suspect in page],
            title,
            first=(number - 1) * PAGE + 1,
            copied=[bool(suspect.twins) for suspect in page],
        )
        paths.append(folder / ("review.png" if number == 1 else f"review-{number}.png"))
        plots.save(figure, paths[-1])
    return paths


def _pictures(suspects: Sequence[Suspect], source: Source, channels: int) -> np.ndarray:
    """uint8 `[n, C, S, S]` from the source itself: a network's small view is hard to judge."""
    wanted = {suspect.id for suspect in suspects}
    at = {
        identity: (part, number)
        for part in source.parts.values()
        for number, identity in enumerate(part.ids)
        if identity in wanted
    }
    return np.stack([_picture(*at[suspect.id], channels) for suspect in suspects])


def _picture(part: Part, number: int, channels: int) -> np.ndarray:
    if isinstance(part.images, Files):
        try:
            content, name = part.images.read(number), part.images.name(number)
            return decode(content, size=SIDE, channels=channels, fit="pad", name=name)
        except UnreadableImage:  # gone since it was judged
            return np.full((channels, SIDE, SIDE), 255, np.uint8)
    pixels = part.images[np.array([number])]
    size = min(SIDE, max(pixels.shape[2:]))
    shown: np.ndarray = fit_images(pixels, size=size, channels=channels, fit="pad")[0]
    return shown

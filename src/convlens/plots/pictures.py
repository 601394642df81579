"""Figures made of pictures: contact sheets, augmented batches, mistakes.

A sheet is one image that fills the figure, put together pixel by pixel: at the usual 150 dpi
every pixel of a small picture is a square of exactly the same size, which axes laid out by
matplotlib can't promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from convlens.errors import UsageError
from convlens.plots.style import DPI, GREY, fit, styled

Images = npt.NDArray[np.uint8]
Caption = Sequence[tuple[str, str, str]]  # lines of (before, name, after); only names are cut

SIDE = 120  # pictures are enlarged to about this many pixels
GAP = 10
POINTS = 7  # of captions
TITLE_POINTS = 9


@styled
def contact_sheet(
    images: Images, titles: Sequence[str], title: str = "", columns: int = 8
) -> Figure:
    """Pictures uint8 [N, C, H, W] in rows, each with its title above."""
    return _sheet(images, [[("", name, "")] for name in titles], title, columns)


@styled
def augmented_batch(
    before: Images,
    after: Images,
    title: str = "",
    columns: int = 8,
    labels: Sequence[str] = (),
    mixed: Sequence[Sequence[tuple[str, float]]] = (),
) -> Figure:
    """Pictures uint8 [N, C, H, W] in rows, and below each row the same pictures augmented.

    `labels` stand above the originals; `mixed`, above the others, are classes and their shares.
    """
    if before.shape != after.shape:
        raise UsageError(f"pictures of shape {before.shape} before and {after.shape} after")
    plain: list[Caption] = [[]] * len(before)
    titles: list[Caption] = [[("", name, "")] for name in labels] or plain
    shares: list[Caption] = [[(f"{s:.0%} ", name, "") for name, s in parts] for parts in mixed]
    shares = shares or plain
    columns = max(1, min(columns, len(before)))
    starts = range(0, len(before), columns)
    order = [part[start : start + columns] for start in starts for part in (before, after)]
    images = np.concatenate(order) if order else before
    captions: list[Caption] = []
    for start in starts:
        captions += titles[start : start + columns] + shares[start : start + columns]
    sides = ["original", "augmented"] * len(starts)
    return _sheet(images, captions, title, columns, sides, [len(row) for row in order])


@styled
def worst_mistakes(
    images: Images,
    truths: Sequence[str],
    predictions: Sequence[str],
    confidences: Sequence[float],
    title: str = "",
    columns: int = 8,
) -> Figure:
    """Pictures uint8 [N, C, H, W] in the order given, with what was said, and what it is."""
    judged = zip(truths, predictions, confidences, strict=True)
    captions = [[(f"{sure:.0%} ", guess, ""), ("is ", truth, "")] for truth, guess, sure in judged]
    return _sheet(images, captions, title, columns)


@styled
def neighbours(
    images: Images,
    captions: Sequence[Sequence[str]],
    rows: int,
    title: str = "",
) -> Figure:
    """Pictures uint8 [N, C, H, W] in rows, each with lines of its own above: what is at the left
    is asked about, what follows in its row is near it.
    """
    columns = len(images) // rows if rows else 0
    lines: list[Caption] = [[("", line, "") for line in caption] for caption in captions]
    return _sheet(images, lines, title, columns)


@styled
def label_review(
    images: Images,
    labels: Sequence[str],
    suggestions: Sequence[str],
    chances: Sequence[float],
    title: str = "",
    columns: int = 8,
    first: int = 1,
    copied: Sequence[bool] = (),
) -> Figure:
    """Pictures uint8 [N, C, H, W] with the label that was given and the one that is suggested.

    `chances` are the probabilities of the suggestions; the first picture has number `first`.
    `copied` marks pictures of which there is a copy under another label.
    """
    marks = [" (copy)" if mark else "" for mark in copied] or [""] * len(images)
    sure = [" >99%" if chance > 0.99 else f" {chance:.0%}" for chance in chances]
    judged = zip(labels, suggestions, sure, marks, strict=True)
    captions = [
        [(f"#{number} ", label, mark), ("→ ", suggestion, chance)]
        for number, (label, suggestion, chance, mark) in enumerate(judged, first)
    ]
    return _sheet(images, captions, title, columns)


def _sheet(
    images: Images,
    captions: Sequence[Caption],
    title: str,
    columns: int,
    sides: Sequence[str] = (),
    rows: Sequence[int] | None = None,
) -> Figure:
    """`rows` are the pictures in each row (default: full rows), `sides` the words beside them."""
    if len(captions) != len(images):
        raise UsageError(f"{len(captions)} titles for {len(images)} pictures")
    tiles = tiles_of(images)
    columns = max(1, min(columns, len(tiles)))
    rows = rows if rows is not None else [columns] * math.ceil(len(tiles) / columns)
    high, wide = tiles.shape[1:3]
    line = round(POINTS * DPI / 72 * 1.3)
    text = line * max(map(len, captions), default=0)
    top = GAP + (round(TITLE_POINTS * DPI / 72 * 1.7) if title else 0)
    left = GAP + (line if sides else 0)
    size_x = max(left + columns * (wide + GAP), 420)
    size_y = top + len(rows) * (text + high + GAP) if len(tiles) else top + 60
    canvas = np.full((size_y, size_x, 3), 255, dtype=np.uint8)
    # matplotlib cuts the size in pixels to whole ones: 1023.9999 must not become 1023.
    figure = Figure(figsize=((size_x + 1e-4) / DPI, (size_y + 1e-4) / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    if title:
        room = (size_x - 2 * GAP) * 72 / DPI / TITLE_POINTS
        axes.text(GAP, GAP, fit(title, room), fontsize=TITLE_POINTS, va="top")
    if not len(tiles):
        axes.text(GAP, top, "none", fontsize=TITLE_POINTS, va="top", color=GREY)
    room = wide * 72 / DPI / POINTS
    for index, (row, column) in enumerate(_places(rows, len(tiles))):
        x, y = left + column * (wide + GAP), top + row * (text + high + GAP) + text
        canvas[y : y + high, x : x + wide] = tiles[index]
        for number, (before, name, after) in enumerate(captions[index]):
            base = y - (len(captions[index]) - number - 0.75) * line
            words = fit(name, room, before=before, after=after)
            axes.text(x, base, words, fontsize=POINTS, va="baseline")
    for row, words in enumerate(sides):
        middle = top + row * (text + high + GAP) + text + high / 2
        look: dict[str, Any] = {"rotation": 90, "va": "center", "ha": "center", "color": GREY}
        axes.text(left - line / 2 - 3, middle, words, fontsize=POINTS, **look)
    axes.imshow(canvas, interpolation="nearest", extent=(0, size_x, size_y, 0), aspect="auto")
    return figure


def _places(rows: Sequence[int], count: int) -> Iterable[tuple[int, int]]:
    places = [(row, column) for row, length in enumerate(rows) for column in range(length)]
    return places[:count]


def tiles_of(images: Images) -> Images:
    """RGB tiles uint8 [N, h, w, 3]: small pictures in whole multiples, large ones averaged."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(
            f"pictures must be uint8 [N, 1 or 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    tiles = np.moveaxis(images, 1, 3)
    if tiles.shape[3] == 1:
        tiles = tiles.repeat(3, axis=3)
    n, high, wide = tiles.shape[:3]
    longest = max(high, wide, 1)
    if longest <= SIDE * 1.5:
        times = max(1, round(SIDE / longest))
        return tiles.repeat(times, axis=1).repeat(times, axis=2)
    block = min(round(longest / SIDE), high, wide)
    high, wide = high // block, wide // block
    blocks = tiles[:, : high * block, : wide * block].reshape(n, high, block, wide, block, 3)
    small: Images = blocks.mean(axis=(2, 4)).round().astype(np.uint8)
    return small

"""Figures of what a layer's channels look for: its kernels, the images that excite them most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from convlens.plots.page import (
    BROKEN,
    GAP,
    LARGE,
    Maps,
    Page,
    Pixels,
    line,
    mosaic,
    rgb,
    scale_bar,
    tiles,
    wrapped,
)
from convlens.plots.style import GREY, styled

WIDTH = 1050  # pixels: 7 inches, a page's width
FILTER, KERNEL = 60, 18  # pixels of a tile
PICTURE, MADE = 50, 96
LONG = 20  # rows beside each other beyond that


class Mark(NamedTuple):
    """A rectangle in an image, as shares of its sides: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float


@styled
def colour_filters(
    filters: Maps, names: Sequence[str], limit: float, title: str = "", note: str = ""
) -> Figure:
    """Kernels float32 `[n, 3, h, w]` as colours: grey is 0, `limit` full colour (or black).

    `names` stand below, e.g. the numbers of the channels.
    """
    shades = 0.5 + filters / (2 * limit if limit > 0 else 1)
    colours = (np.clip(np.nan_to_num(shades), 0, 1) * 255).round().astype(np.uint8)
    blocks = [rgb(each, FILTER, exact=False) for each in colours]
    return _captioned(blocks, [(name,) for name in names], title, note)


@styled
def made_inputs(
    images: npt.NDArray[np.uint8],
    captions: Sequence[Sequence[str]],
    title: str = "",
    note: str = "",
) -> Figure:
    """Pictures uint8 `[n, C, H, W]` made to excite a channel, captions below each."""
    return _captioned([rgb(each, MADE) for each in images], captions, title, note)


@styled
def kernels(
    rows: Maps, names: Sequence[str], limit: float, title: str = "", note: str = ""
) -> Figure:
    """Kernels float32 `[n, k, h, w]`: a row for each channel, with some of its inputs.

    Colours diverge from 0 to plus and minus `limit`.
    """
    page, label = Page(), 52
    count, inputs = rows.shape[:2]
    limits = (-limit, limit)
    strips = [mosaic(tiles(each, limits, KERNEL), inputs, gap=4) for each in rows]
    wide, high = strips[0].shape[1] + label + GAP, strips[0].shape[0] + 4
    columns = max(1, min(-(-count // 4), (WIDTH - GAP) // wide))
    width = max(columns * wide + GAP, 420)
    top = _head(page, width, title, note)
    page_scale(page, GAP, top, limit)
    top += line() + 8
    high_of = -(-count // columns)
    for number, strip in enumerate(strips):
        x = GAP + (number // high_of) * wide
        y = top + (number % high_of) * high
        page.write(x, y + strip.shape[0] / 2 + 5, names[number], label, color=GREY)
        page.put(x + label, y, strip)
    return page.figure(width)


@styled
def top_images(
    images: Sequence[npt.NDArray[np.uint8]],
    marks: Sequence[Sequence[Mark | None]],
    names: Sequence[tuple[str, str]],
    title: str = "",
    note: str = "",
) -> Figure:
    """For each channel the images uint8 `[k, C, H, W]` that excite it most, best first.

    Args:
        marks: for each of these images where it does, or None where that is everywhere.
        names: two lines beside each row.
    """
    page, label = Page(), 110
    most = max(map(len, images), default=1)
    strips = []
    for row, places in zip(images, marks, strict=True):
        drawn = [_marked(rgb(i, PICTURE), m) for i, m in zip(row, places, strict=True)]
        strips.append(mosaic(drawn, most, gap=3))
    wide = max((strip.shape[1] for strip in strips), default=0) + label + 2 * GAP
    columns = 2 if len(strips) > LONG else 1
    width = max(columns * wide + GAP, 420)
    top = _head(page, width, title, note)
    high_of = -(-len(strips) // columns)
    for number, strip in enumerate(strips):
        x = GAP + (number // high_of) * wide
        y = top + (number % high_of) * (strip.shape[0] + 6)
        first, second = names[number]
        page.write(x, y + strip.shape[0] / 2 - 2, first, label, weight="bold")
        page.write(x, y + strip.shape[0] / 2 + line() - 2, second, label, color=GREY)
        page.put(x + label, y, strip)
    return page.figure(width)


def _marked(picture: Pixels, mark: Mark | None) -> Pixels:
    """The picture with a frame: vermilion, with white around it so that it shows on any ground."""
    if mark is None:
        return picture
    high, wide = picture.shape[:2]
    left, right = round(mark.left * wide), round(mark.right * wide)
    top, bottom = round(mark.top * high), round(mark.bottom * high)
    found = picture.copy()
    for grow, colour in ((2, (255, 255, 255)), (1, BROKEN), (0, BROKEN)):
        x0, x1 = max(0, left - grow), min(wide - 1, right + grow - 1)
        y0, y1 = max(0, top - grow), min(high - 1, bottom + grow - 1)
        found[[y0, y1], x0 : x1 + 1] = colour
        found[y0 : y1 + 1, [x0, x1]] = colour
    return found


def _captioned(
    blocks: Sequence[Pixels], captions: Sequence[Sequence[str]], title: str, note: str
) -> Figure:
    page = Page()
    high, wide = blocks[0].shape[:2] if blocks else (1, 1)
    lines = max((len(each) for each in captions), default=0)
    cell = wide + GAP
    columns = max(1, min(len(blocks), (WIDTH - GAP) // cell))
    width = max(columns * cell + GAP, 420)
    top = _head(page, width, title, note)
    step = high + lines * line() + GAP
    for number, block in enumerate(blocks):
        x, y = GAP + (number % columns) * cell, top + (number // columns) * step
        page.put(x, y, block)
        for place, words in enumerate(captions[number]):
            plain = place == 0 and lines > 1
            look: dict[str, Any] = {} if plain else {"color": GREY}
            page.write(x, y + high + (place + 1) * line() - 3, words, cell, **look)
    return page.figure(width)


def _head(page: Page, width: int, title: str, note: str) -> int:
    """Title, and a note below it that may run over several lines; returns the y behind them."""
    y = GAP + line(LARGE)
    page.write(GAP, y - 5, title, width - 2 * GAP, LARGE)
    for words in wrapped(note, width - 2 * GAP):
        y += line()
        page.write(GAP, y - 4, words, color=GREY)
    return y + GAP


def page_scale(page: Page, x: int, y: int, limit: float) -> None:
    """The bar of diverging colours with its numbers."""
    scale_bar(page, x, y, (-1.0, 1.0), (f"−{limit:.3g} ", f"{limit:.3g}"))

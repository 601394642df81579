"""Figures of a layer's channels: what they give for a picture, one network or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from convlens.plots.page import (
    GAP,
    LARGE,
    SMALL,
    Maps,
    Page,
    Pixels,
    crossed,
    line,
    mosaic,
    rgb,
    scale_bar,
    tile_size,
    tiles,
    wrapped,
)
from convlens.plots.style import GREY, styled

PANEL = 220  # pixels: the side of a square panel, the width of a long one
LEAST = 9  # pixels of a tile
WIDE = 4  # how much wider than high a long panel is


@dataclass(frozen=True)
class Panel:
    """What is shown of one layer.

    `maps` float32 `[n, h, w]` are the channels chosen, in their order; `limits` the values of the
    first and the last colour; `blank` and `broken` bool `[n]` mark channels that show nothing, or
    NaN. `name` and `note` stand above.
    """

    name: str
    note: str
    maps: Maps
    limits: tuple[float, float]
    blank: npt.NDArray[np.bool_]
    broken: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Column:
    """One network beside others: its name, what it says of the picture, its layers."""

    name: str
    answer: str
    panels: Sequence[Panel]


@styled
def activations(
    picture: Pixels, panels: Sequence[Panel], title: str = "", words: str = "", scale: str = ""
) -> Figure:
    """A picture uint8 `[C, H, W]` and a mosaic of channels for each layer of one network.

    Args:
        words: below the title, e.g. truth and answer.
        scale: what the last colour means.
    """
    drawn = [_drawn(panel, square=True) for panel in panels]
    cell = max([PANEL, *(mosaic.shape[1] for mosaic in drawn)])
    columns = _columns(len(panels) + 1) if cell <= 2 * PANEL else 2
    page, head = Page(), 2 * line() + 4
    page.write(GAP, GAP + line(LARGE) - 5, title, columns * (cell + 2 * GAP), LARGE)
    page.write(GAP, GAP + line(LARGE) + line() - 4, words, columns * (cell + 2 * GAP), color=GREY)
    top = 2 * GAP + line(LARGE) + line()
    cells = [rgb(picture, PANEL), *drawn]
    names = [("input", "as the network sees it"), *((p.name, p.note) for p in panels)]
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        for place, block in enumerate(row):
            x = GAP + place * (cell + 2 * GAP)
            name, note = names[start + place]
            page.write(x, top + line() - 6, name, cell, weight="bold")
            page.write(x, top + 2 * line() - 7, note, cell + GAP, color=GREY)
            page.put(x, top + head, block)
        top += head + max(block.shape[0] for block in row) + GAP
    width = columns * (cell + 2 * GAP)
    _legend(page, top, panels, scale, width)
    return page.figure(width)


@styled
def activations_side_by_side(
    picture: Pixels, columns: Sequence[Column], title: str = "", words: str = "", scale: str = ""
) -> Figure:
    """The layers of several networks for one picture: rows are layers, columns networks.

    Layers stand beside each other by their place in the network; the first column's names need
    not be the others'.
    """
    every = [panel for column in columns for panel in column.panels]
    drawn = [[_drawn(panel, square=False) for panel in column.panels] for column in columns]
    cell = max([round(PANEL * 1.6), *(block.shape[1] for each in drawn for block in each)])
    width = len(columns) * (cell + 2 * GAP)
    page, small = Page(), rgb(picture, 96)
    page.put(GAP, GAP, small)
    x, y = 2 * GAP + small.shape[1], GAP + line(LARGE)
    page.write(x, y, title, width - x, LARGE)
    page.write(x, y + line() + 4, words, width - x, color=GREY)
    top = 2 * GAP + small.shape[0]
    for number, column in enumerate(columns):
        left = GAP + number * (cell + 2 * GAP)
        page.write(left, top + line(), column.name, cell - 2 * GAP, weight="bold")
        page.write(left, top + 2 * line(), column.answer, cell, color=GREY)
    top += 2 * line() + GAP
    head = line() + 4
    for row in range(max(len(column.panels) for column in columns)):
        below = top
        for number, column in enumerate(columns):
            if row < len(column.panels):
                panel, block = column.panels[row], drawn[number][row]
                left = GAP + number * (cell + 2 * GAP)
                words_ = f"{panel.name}, {panel.note}"
                page.write(left, top + line() - 5, words_, cell + GAP)
                page.put(left, top + head, block)
                below = max(below, top + head + block.shape[0])
        top = below + GAP
    _legend(page, top, every, scale, width)
    return page.figure(width)


def _drawn(panel: Panel, *, square: bool) -> Pixels:
    """The mosaic of a layer, in a square or a long one."""
    count = max(1, len(panel.maps))
    wide = PANEL if square else round(PANEL * 1.6)
    high, broad = tile_size(panel.maps.shape, 100)
    # So many columns that the mosaic has the shape asked for, whatever the shape of a map.
    ratio = (1 if square else WIDE) * high / broad
    columns = max(1, min(count, math.ceil(math.sqrt(count * ratio))))
    side = max(LEAST, (wide + 1) // columns - 1)
    side = min(side, PANEL // 2) if square else min(side, wide // WIDE)
    if broad < high:
        side = round(side * high / broad)
    shown = tiles(panel.maps, panel.limits, side)
    for number in np.flatnonzero(panel.blank | panel.broken):
        shown[number] = crossed(shown.shape[1], shown.shape[2], bool(panel.broken[number]))
    return mosaic(shown, columns)


def _columns(cells: int) -> int:
    """Five cells a row at most, and as few empty ones as can be."""
    if cells <= 3:
        return cells
    return min((5, 4, 3), key=lambda columns: -cells % columns)


def _legend(page: Page, top: int, panels: Sequence[Panel], scale: str, width: int) -> None:
    kinds = {panel.limits[0] < 0: panel.limits for panel in panels}
    x, y = GAP, top + 4
    for signed in sorted(kinds):
        limits = (-1.0, 1.0) if signed else (0.0, 1.0)
        ends = ("−max ", "max") if signed else ("0 ", "max")
        x = scale_bar(page, x, y, limits, ends)
    blank = any(panel.blank.any() for panel in panels)
    broken = any(panel.broken.any() for panel in panels)
    for there, tile, words in (
        (blank, crossed(13, 13), "blank channel"),
        (broken, crossed(13, 13, True), "NaN or infinite"),
    ):
        if there:
            page.put(x, y - 2, tile)
            page.write(x + 19, y + 8, words, color=GREY)
            x += 19 + round(len(words) * SMALL * 1.35) + GAP
    for number, words in enumerate(wrapped(scale, width - 2 * GAP), 1):
        page.write(GAP, y + 9 + number * line(), words, color=GREY)

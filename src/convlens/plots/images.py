"""Figures made of pictures: contact sheets, augmented batches, mistakes.

A sheet is one image that fills the figure, put together pixel by pixel: at the usual 150 dpi
every pixel of a small picture is a square of exactly the same size, which axes laid out by
matplotlib can't promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from convlens.errors import UsageError
from convlens.plots.style import (
    BROKEN,
    DPI,
    GAP,
    GREY,
    LARGE,
    SMALL,
    Maps,
    Page,
    Pixels,
    cross_out,
    fit_text,
    mosaic,
    rgb,
    scale_bar,
    text_line,
    tile_size,
    tiles,
    use_style,
    wrap_text,
)

Images = npt.NDArray[np.uint8]
Caption = Sequence[tuple[str, str, str]]  # lines of (before, name, after); only names are cut

SIDE = 120  # pictures are enlarged to about this many pixels
SHEET_GAP = 10
POINTS = 7  # of captions
TITLE_POINTS = 9


@use_style
def contact_sheet(
    images: Images, titles: Sequence[str], title: str = "", columns: int = 8
) -> Figure:
    """Pictures uint8 [N, C, H, W] in rows, each with its title above."""
    return _sheet(images, [[("", name, "")] for name in titles], title, columns)


@use_style
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


@use_style
def worst_mistakes(
    images: Images,
    targets: Sequence[str],
    predictions: Sequence[str],
    confidences: Sequence[float],
    title: str = "",
    columns: int = 8,
) -> Figure:
    """Pictures uint8 [N, C, H, W] in the order given, with what was said, and what it is."""
    judged = zip(targets, predictions, confidences, strict=True)
    captions = [[(f"{sure:.0%} ", guess, ""), ("is ", truth, "")] for truth, guess, sure in judged]
    return _sheet(images, captions, title, columns)


@use_style
def neighbors_sheet(
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


@use_style
def label_review(
    images: Images,
    labels: Sequence[str],
    suggestions: Sequence[str],
    probs: Sequence[float],
    title: str = "",
    columns: int = 8,
    first: int = 1,
    copied: Sequence[bool] = (),
) -> Figure:
    """Pictures uint8 [N, C, H, W] with the label that was given and the one that is suggested.

    `probs` are the probabilities of the suggestions; the first picture has number `first`.
    `copied` marks pictures of which there is a copy under another label.
    """
    marks = [" (copy)" if mark else "" for mark in copied] or [""] * len(images)
    sure = [" >99%" if chance > 0.99 else f" {chance:.0%}" for chance in probs]
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
    top = SHEET_GAP + (round(TITLE_POINTS * DPI / 72 * 1.7) if title else 0)
    left = SHEET_GAP + (line if sides else 0)
    size_x = max(left + columns * (wide + SHEET_GAP), 420)
    size_y = top + len(rows) * (text + high + SHEET_GAP) if len(tiles) else top + 60
    canvas = np.full((size_y, size_x, 3), 255, dtype=np.uint8)
    # matplotlib cuts the size in pixels to whole ones: 1023.9999 must not become 1023.
    figure = Figure(figsize=((size_x + 1e-4) / DPI, (size_y + 1e-4) / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    if title:
        room = (size_x - 2 * SHEET_GAP) * 72 / DPI / TITLE_POINTS
        axes.text(SHEET_GAP, SHEET_GAP, fit_text(title, room), fontsize=TITLE_POINTS, va="top")
    if not len(tiles):
        axes.text(SHEET_GAP, top, "none", fontsize=TITLE_POINTS, va="top", color=GREY)
    room = wide * 72 / DPI / POINTS
    for index, (row, column) in enumerate(_places(rows, len(tiles))):
        x, y = left + column * (wide + SHEET_GAP), top + row * (text + high + SHEET_GAP) + text
        canvas[y : y + high, x : x + wide] = tiles[index]
        for number, (before, name, after) in enumerate(captions[index]):
            base = y - (len(captions[index]) - number - 0.75) * line
            words = fit_text(name, room, before=before, after=after)
            axes.text(x, base, words, fontsize=POINTS, va="baseline")
    for row, words in enumerate(sides):
        middle = top + row * (text + high + SHEET_GAP) + text + high / 2
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


# ---- kernels ----------------------------------------
# Figures of what a layer's channels look for: its kernels, the images that excite them most.

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


@use_style
def color_filters(
    filters: Maps, names: Sequence[str], limit: float, title: str = "", note: str = ""
) -> Figure:
    """Kernels float32 `[n, 3, h, w]` as colours: grey is 0, `limit` full colour (or black).

    `names` stand below, e.g. the numbers of the channels.
    """
    shades = 0.5 + filters / (2 * limit if limit > 0 else 1)
    colors = (np.clip(np.nan_to_num(shades), 0, 1) * 255).round().astype(np.uint8)
    blocks = [rgb(each, FILTER, exact=False) for each in colors]
    return _captioned(blocks, [(name,) for name in names], title, note)


@use_style
def made_inputs(
    images: npt.NDArray[np.uint8],
    captions: Sequence[Sequence[str]],
    title: str = "",
    note: str = "",
) -> Figure:
    """Pictures uint8 `[n, C, H, W]` made to excite a channel, captions below each."""
    return _captioned([rgb(each, MADE) for each in images], captions, title, note)


@use_style
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
    top += text_line() + 8
    high_of = -(-count // columns)
    for number, strip in enumerate(strips):
        x = GAP + (number // high_of) * wide
        y = top + (number % high_of) * high
        page.write(x, y + strip.shape[0] / 2 + 5, names[number], label, color=GREY)
        page.put(x + label, y, strip)
    return page.figure(width)


@use_style
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
        page.write(x, y + strip.shape[0] / 2 + text_line() - 2, second, label, color=GREY)
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
    for grow, color in ((2, (255, 255, 255)), (1, BROKEN), (0, BROKEN)):
        x0, x1 = max(0, left - grow), min(wide - 1, right + grow - 1)
        y0, y1 = max(0, top - grow), min(high - 1, bottom + grow - 1)
        found[[y0, y1], x0 : x1 + 1] = color
        found[y0 : y1 + 1, [x0, x1]] = color
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
    step = high + lines * text_line() + GAP
    for number, block in enumerate(blocks):
        x, y = GAP + (number % columns) * cell, top + (number // columns) * step
        page.put(x, y, block)
        for place, words in enumerate(captions[number]):
            plain = place == 0 and lines > 1
            look: dict[str, Any] = {} if plain else {"color": GREY}
            page.write(x, y + high + (place + 1) * text_line() - 3, words, cell, **look)
    return page.figure(width)


def _head(page: Page, width: int, title: str, note: str) -> int:
    """Title, and a note below it that may run over several lines; returns the y behind them."""
    y = GAP + text_line(LARGE)
    page.write(GAP, y - 5, title, width - 2 * GAP, LARGE)
    for words in wrap_text(note, width - 2 * GAP):
        y += text_line()
        page.write(GAP, y - 4, words, color=GREY)
    return y + GAP


def page_scale(page: Page, x: int, y: int, limit: float) -> None:
    """The bar of diverging colours with its numbers."""
    scale_bar(page, x, y, (-1.0, 1.0), (f"−{limit:.3g} ", f"{limit:.3g}"))


# ---- channels ----------------------------------------
# Figures of a layer's channels: what they give for a picture, one network or several.

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


@use_style
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
    page, head = Page(), 2 * text_line() + 4
    page.write(GAP, GAP + text_line(LARGE) - 5, title, columns * (cell + 2 * GAP), LARGE)
    page.write(
        GAP, GAP + text_line(LARGE) + text_line() - 4, words, columns * (cell + 2 * GAP), color=GREY
    )
    top = 2 * GAP + text_line(LARGE) + text_line()
    cells = [rgb(picture, PANEL), *drawn]
    names = [("input", "as the network sees it"), *((p.name, p.note) for p in panels)]
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        for place, block in enumerate(row):
            x = GAP + place * (cell + 2 * GAP)
            name, note = names[start + place]
            page.write(x, top + text_line() - 6, name, cell, weight="bold")
            page.write(x, top + 2 * text_line() - 7, note, cell + GAP, color=GREY)
            page.put(x, top + head, block)
        top += head + max(block.shape[0] for block in row) + GAP
    width = columns * (cell + 2 * GAP)
    _legend(page, top, panels, scale, width)
    return page.figure(width)


@use_style
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
    x, y = 2 * GAP + small.shape[1], GAP + text_line(LARGE)
    page.write(x, y, title, width - x, LARGE)
    page.write(x, y + text_line() + 4, words, width - x, color=GREY)
    top = 2 * GAP + small.shape[0]
    for number, column in enumerate(columns):
        left = GAP + number * (cell + 2 * GAP)
        page.write(left, top + text_line(), column.name, cell - 2 * GAP, weight="bold")
        page.write(left, top + 2 * text_line(), column.answer, cell, color=GREY)
    top += 2 * text_line() + GAP
    head = text_line() + 4
    for row in range(max(len(column.panels) for column in columns)):
        below = top
        for number, column in enumerate(columns):
            if row < len(column.panels):
                panel, block = column.panels[row], drawn[number][row]
                left = GAP + number * (cell + 2 * GAP)
                words_ = f"{panel.name}, {panel.note}"
                page.write(left, top + text_line() - 5, words_, cell + GAP)
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
        shown[number] = cross_out(shown.shape[1], shown.shape[2], bool(panel.broken[number]))
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
        (blank, cross_out(13, 13), "blank channel"),
        (broken, cross_out(13, 13, True), "NaN or infinite"),
    ):
        if there:
            page.put(x, y - 2, tile)
            page.write(x + 19, y + 8, words, color=GREY)
            x += 19 + round(len(words) * SMALL * 1.35) + GAP
    for number, words in enumerate(wrap_text(scale, width - 2 * GAP), 1):
        page.write(GAP, y + 9 + number * text_line(), words, color=GREY)

"""Figures made of images: contact sheets, augmented batches, mistakes, kernels, activations.

Each figure is a `Page`: one image put together pixel by pixel. At the usual 150 dpi every pixel of
a small image is a square of exactly the same size, which a layout of matplotlib axes cannot
guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    GRAY,
    LARGE_POINTS,
    SMALL_POINTS,
    Maps,
    Page,
    Pixels,
    crossed_tile,
    draw_scale_bar,
    line_height,
    map_tiles,
    mosaic,
    resize_image,
    tile_size,
    use_style,
    wrap_text,
)

Images = npt.NDArray[np.uint8]
Caption = Sequence[tuple[str, str, str]]  # lines of (before, name, after); only names are cut

# Sizes in pixels.
IMAGE_SIDE = 120  # images of a sheet are enlarged to about this
MIN_WIDTH = 420  # of a page, so that titles have space
MAX_WIDTH = 1050  # of a page of kernels: 7 inches
FILTER_SIDE, KERNEL_SIDE = 60, 18  # a tile of a color filter, of one input channel of a kernel
TOP_IMAGE_SIDE, INPUT_SIDE = 50, 96  # the most activating images, optimized inputs
PANEL_SIDE = 220  # of a square panel of activations
LONG_PANEL_WIDTH = 352  # of a panel beside those of other networks
LONG_PANEL_RATIO = 4  # width over height of a long panel
MIN_TILE_SIDE = 9  # of one channel in a panel

MAX_ROWS = 20  # channels below each other; more are split into two columns


class Mark(NamedTuple):
    """A rectangle in an image, as shares of its sides."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Panel:
    """The channels of one layer, as a figure of activations shows them.

    Attributes:
        name, note: the two lines above the panel.
        maps: float32 `[n, h, w]`, the chosen channels in their order.
        limits: the values of the first and the last color.
        blank, broken: bool `[n]`, channels that are blank, or hold NaN or infinity.
    """

    name: str
    note: str
    maps: Maps
    limits: tuple[float, float]
    blank: npt.NDArray[np.bool_]
    broken: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Column:
    """One of several networks in a figure: its name, its prediction for the image, its layers."""

    name: str
    prediction: str
    panels: Sequence[Panel]


@use_style
def contact_sheet(
    images: Images, titles: Sequence[str], title: str = "", columns: int = 8
) -> Figure:
    """Images uint8 [N, C, H, W] in rows, each below its title."""
    return _draw_sheet(images, [[("", name, "")] for name in titles], title, columns)


@use_style
def augmented_batch(
    before: Images,
    after: Images,
    title: str = "",
    columns: int = 8,
    labels: Sequence[str] = (),
    mixed: Sequence[Sequence[tuple[str, float]]] = (),
) -> Figure:
    """Images uint8 [N, C, H, W] in rows, and below each row the same images augmented.

    Args:
        labels: the captions of the originals.
        mixed: for each augmented image its classes and their shares.
    """
    if before.shape != after.shape:
        raise UsageError(f"images of shape {before.shape} before and {after.shape} after")
    no_captions: list[Caption] = [[]] * len(before)
    names: list[Caption] = [[("", name, "")] for name in labels] or no_captions
    shares: list[Caption] = [[(f"{s:.0%} ", name, "") for name, s in parts] for parts in mixed]
    shares = shares or no_captions
    columns = max(1, min(columns, len(before)))
    starts = range(0, len(before), columns)
    rows = [part[start : start + columns] for start in starts for part in (before, after)]
    images = np.concatenate(rows) if rows else before
    captions: list[Caption] = []
    for start in starts:
        captions += names[start : start + columns] + shares[start : start + columns]
    row_titles = ["original", "augmented"] * len(starts)
    return _draw_sheet(images, captions, title, columns, row_titles, [len(row) for row in rows])


@use_style
def worst_mistakes(
    images: Images,
    targets: Sequence[str],
    predictions: Sequence[str],
    confidences: Sequence[float],
    title: str = "",
    columns: int = 8,
) -> Figure:
    """Images uint8 [N, C, H, W] in the given order, with the predicted and the true class."""
    rows = zip(targets, predictions, confidences, strict=True)
    captions = [
        [(f"{confidence:.0%} ", predicted, ""), ("is ", target, "")]
        for target, predicted, confidence in rows
    ]
    return _draw_sheet(images, captions, title, columns)


@use_style
def neighbors_sheet(
    images: Images,
    captions: Sequence[Sequence[str]],
    rows: int,
    title: str = "",
) -> Figure:
    """Query images at the left, each followed in its row by its nearest neighbors.

    Args:
        images: uint8 [N, C, H, W], row by row.
        captions: the lines above each image.
    """
    columns = len(images) // rows if rows else 0
    lines: list[Caption] = [[("", line, "") for line in caption] for caption in captions]
    return _draw_sheet(images, lines, title, columns)


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
    """Images uint8 [N, C, H, W] with their given and their suggested label.

    Args:
        probs: the probabilities of the suggestions.
        first: the number of the first image.
        copied: whether an image has a copy under another label.
    """
    marks = [" (copy)" if copy else "" for copy in copied] or [""] * len(images)
    shares = [" >99%" if prob > 0.99 else f" {prob:.0%}" for prob in probs]
    rows = zip(labels, suggestions, shares, marks, strict=True)
    captions = [
        [(f"#{number} ", label, mark), ("→ ", suggestion, share)]
        for number, (label, suggestion, share, mark) in enumerate(rows, first)
    ]
    return _draw_sheet(images, captions, title, columns)


def _draw_sheet(
    images: Images,
    captions: Sequence[Caption],
    title: str,
    columns: int,
    row_titles: Sequence[str] = (),
    row_lengths: Sequence[int] | None = None,
) -> Figure:
    """Draw images in rows with captions above them and, where given, titles beside the rows."""
    if len(captions) != len(images):
        raise UsageError(f"{len(captions)} titles for {len(images)} images")
    tiles = image_tiles(images)
    columns = max(1, min(columns, len(tiles)))
    if row_lengths is None:
        row_lengths = [columns] * math.ceil(len(tiles) / columns)
    height, width = tiles.shape[1:3]
    line = line_height()
    caption_height = line * max(map(len, captions), default=0)
    row_height = caption_height + height + GAP
    top = GAP + (round(LARGE_POINTS * DPI / 72 * 1.7) if title else 0)
    left = GAP + (line if row_titles else 0)
    page_width = max(left + columns * (width + GAP), MIN_WIDTH)
    page_height = top + len(row_lengths) * row_height if len(tiles) else top + 60

    page = Page()
    if title:
        page.write(GAP, GAP, title, page_width - 2 * GAP, LARGE_POINTS, va="top")
    if not len(tiles):
        page.write(GAP, top, "none", points=LARGE_POINTS, va="top", color=GRAY)
    cells = _grid_cells(row_lengths)
    for tile, caption, (row, column) in zip(tiles, captions, cells, strict=False):
        x, y = left + column * (width + GAP), top + row * row_height + caption_height
        page.put(x, y, tile)
        for number, (before, name, after) in enumerate(caption):
            baseline = y - (len(caption) - number - 0.75) * line
            page.write(x, baseline, name, width, before=before, after=after)
    for row, text in enumerate(row_titles):
        middle = top + row * row_height + caption_height + height / 2
        page.write(
            left - line / 2 - 3, middle, text, rotation=90, va="center", ha="center", color=GRAY
        )
    return page.to_figure(page_width, page_height)


def _grid_cells(row_lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((row, column) for row, length in enumerate(row_lengths) for column in range(length))


def image_tiles(images: Images) -> Images:
    """Return images uint8 [N, C, H, W] as RGB tiles uint8 [N, h, w, 3] of about `IMAGE_SIDE`.

    Small images are enlarged by an integer factor, large ones averaged over blocks.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(
            f"images must be uint8 [N, 1 or 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    tiles = np.moveaxis(images, 1, 3)
    if tiles.shape[3] == 1:
        tiles = tiles.repeat(3, axis=3)
    n, height, width = tiles.shape[:3]
    longest = max(height, width, 1)
    if longest <= IMAGE_SIDE * 1.5:
        factor = max(1, round(IMAGE_SIDE / longest))
        return tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    block = min(round(longest / IMAGE_SIDE), height, width)
    height, width = height // block, width // block
    blocks = tiles[:, : height * block, : width * block].reshape(n, height, block, width, block, 3)
    averaged: Images = blocks.mean(axis=(2, 4)).round().astype(np.uint8)
    return averaged


@use_style
def color_filters(
    filters: Maps, names: Sequence[str], limit: float, title: str = "", note: str = ""
) -> Figure:
    """Kernels of the first layer as colors: 0 is gray, plus and minus `limit` full color and black.

    Args:
        filters: float32 `[n, 3, h, w]`.
        names: captions, e.g. the numbers of the channels.
    """
    shades = 0.5 + filters / (2 * limit if limit > 0 else 1)
    colors = (np.clip(np.nan_to_num(shades), 0, 1) * 255).round().astype(np.uint8)
    tiles = [resize_image(pixels, FILTER_SIDE) for pixels in colors]
    return _draw_captioned(tiles, [(name,) for name in names], title, note)


@use_style
def made_inputs(
    images: Images,
    captions: Sequence[Sequence[str]],
    title: str = "",
    note: str = "",
) -> Figure:
    """Images uint8 `[n, C, H, W]` optimized to activate a channel, with captions below."""
    tiles = [resize_image(pixels, INPUT_SIDE) for pixels in images]
    return _draw_captioned(tiles, captions, title, note)


@use_style
def kernels(
    rows: Maps, names: Sequence[str], limit: float, title: str = "", note: str = ""
) -> Figure:
    """Kernels float32 `[n, k, h, w]`: a row for each output channel, with `k` of its inputs.

    The colors diverge from 0 to plus and minus `limit`.
    """
    page, label_width = Page(), 52
    count, inputs = rows.shape[:2]
    strips = [mosaic(map_tiles(row, (-limit, limit), KERNEL_SIDE), inputs, gap=4) for row in rows]
    cell_width, cell_height = strips[0].shape[1] + label_width + GAP, strips[0].shape[0] + 4
    columns = max(1, min(-(-count // 4), (MAX_WIDTH - GAP) // cell_width))
    width = max(columns * cell_width + GAP, MIN_WIDTH)
    top = _write_title(page, width, title, note)
    draw_scale_bar(page, GAP, top, (-1.0, 1.0), (f"−{limit:.3g} ", f"{limit:.3g}"))
    top += line_height() + 8
    column_length = -(-count // columns)
    for number, strip in enumerate(strips):
        x = GAP + (number // column_length) * cell_width
        y = top + (number % column_length) * cell_height
        page.write(x, y + strip.shape[0] / 2 + 5, names[number], label_width, color=GRAY)
        page.put(x + label_width, y, strip)
    return page.to_figure(width)


@use_style
def top_images(
    images: Sequence[Images],
    marks: Sequence[Sequence[Mark | None]],
    names: Sequence[tuple[str, str]],
    title: str = "",
    note: str = "",
) -> Figure:
    """For each channel the images uint8 `[k, C, H, W]` that activate it most, strongest first.

    Args:
        marks: for each image the region that activates the channel, or None for all of it.
        names: two lines beside each row.
    """
    page, label_width = Page(), 110
    columns_of_images = max(map(len, images), default=1)
    strips = []
    for row, row_marks in zip(images, marks, strict=True):
        tiles = [
            _draw_mark(resize_image(image, TOP_IMAGE_SIDE), mark)
            for image, mark in zip(row, row_marks, strict=True)
        ]
        strips.append(mosaic(tiles, columns_of_images, gap=3))
    strip_width = max((strip.shape[1] for strip in strips), default=0) + label_width + 2 * GAP
    columns = 2 if len(strips) > MAX_ROWS else 1
    width = max(columns * strip_width + GAP, MIN_WIDTH)
    top = _write_title(page, width, title, note)
    column_length = -(-len(strips) // columns)
    for number, strip in enumerate(strips):
        x = GAP + (number // column_length) * strip_width
        y = top + (number % column_length) * (strip.shape[0] + 6)
        first, second = names[number]
        baseline = y + strip.shape[0] / 2 - 2
        page.write(x, baseline, first, label_width, weight="bold")
        page.write(x, baseline + line_height(), second, label_width, color=GRAY)
        page.put(x + label_width, y, strip)
    return page.to_figure(width)


def _draw_mark(image: Pixels, mark: Mark | None) -> Pixels:
    """Return the image with a vermilion frame, in white so that it shows on any background."""
    if mark is None:
        return image
    height, width = image.shape[:2]
    left, right = round(mark.left * width), round(mark.right * width)
    top, bottom = round(mark.top * height), round(mark.bottom * height)
    marked = image.copy()
    for grow, color in ((2, (255, 255, 255)), (1, BROKEN), (0, BROKEN)):
        x0, x1 = max(0, left - grow), min(width - 1, right + grow - 1)
        y0, y1 = max(0, top - grow), min(height - 1, bottom + grow - 1)
        marked[[y0, y1], x0 : x1 + 1] = color
        marked[y0 : y1 + 1, [x0, x1]] = color
    return marked


def _draw_captioned(
    tiles: Sequence[Pixels], captions: Sequence[Sequence[str]], title: str, note: str
) -> Figure:
    """Draw tiles in rows with their captions below; the first of several lines is black."""
    page = Page()
    height, width = tiles[0].shape[:2] if tiles else (1, 1)
    lines = max(map(len, captions), default=0)
    cell_width = width + GAP
    columns = max(1, min(len(tiles), (MAX_WIDTH - GAP) // cell_width))
    page_width = max(columns * cell_width + GAP, MIN_WIDTH)
    top = _write_title(page, page_width, title, note)
    row_height = height + lines * line_height() + GAP
    for number, tile in enumerate(tiles):
        x, y = GAP + (number % columns) * cell_width, top + (number // columns) * row_height
        page.put(x, y, tile)
        for index, text in enumerate(captions[number]):
            style: dict[str, Any] = {} if index == 0 and lines > 1 else {"color": GRAY}
            baseline = y + height + (index + 1) * line_height() - 3
            page.write(x, baseline, text, cell_width, **style)
    return page.to_figure(page_width)


def _write_title(page: Page, width: int, title: str, note: str) -> int:
    """Write a title and a note of any number of lines below it; return the y below them."""
    y = GAP + line_height(LARGE_POINTS)
    page.write(GAP, y - 5, title, width - 2 * GAP, LARGE_POINTS)
    for line in wrap_text(note, width - 2 * GAP):
        y += line_height()
        page.write(GAP, y - 4, line, color=GRAY)
    return y + GAP


@use_style
def activations(
    image: Pixels, panels: Sequence[Panel], title: str = "", subtitle: str = "", scale: str = ""
) -> Figure:
    """An image uint8 `[C, H, W]` and a mosaic of channels for each layer of one network.

    Args:
        subtitle: the line below the title, e.g. the true and the predicted class.
        scale: the meaning of the last color.
    """
    mosaics = [_draw_panel(panel, square=True) for panel in panels]
    cell = max([PANEL_SIDE, *(pixels.shape[1] for pixels in mosaics)])
    columns = _choose_columns(len(panels) + 1) if cell <= 2 * PANEL_SIDE else 2
    width = columns * (cell + 2 * GAP)
    page, head = Page(), 2 * line_height() + 4
    page.write(GAP, GAP + line_height(LARGE_POINTS) - 5, title, width, LARGE_POINTS)
    top = GAP + line_height(LARGE_POINTS) + line_height()
    page.write(GAP, top - 4, subtitle, width, color=GRAY)
    top += GAP
    cells = [resize_image(image, PANEL_SIDE), *mosaics]
    names = [("input", "as the network sees it"), *((p.name, p.note) for p in panels)]
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        for column, pixels in enumerate(row):
            x = GAP + column * (cell + 2 * GAP)
            name, note = names[start + column]
            page.write(x, top + line_height() - 6, name, cell, weight="bold")
            page.write(x, top + 2 * line_height() - 7, note, cell + GAP, color=GRAY)
            page.put(x, top + head, pixels)
        top += head + max(pixels.shape[0] for pixels in row) + GAP
    _draw_legend(page, top, panels, scale, width)
    return page.to_figure(width)


@use_style
def activations_side_by_side(
    image: Pixels, columns: Sequence[Column], title: str = "", subtitle: str = "", scale: str = ""
) -> Figure:
    """The layers of several networks for one image: rows are layers, columns are networks.

    Layers are matched by their position in the network, whatever their names.
    """
    mosaics = [[_draw_panel(panel, square=False) for panel in column.panels] for column in columns]
    cell = max([LONG_PANEL_WIDTH, *(pixels.shape[1] for row in mosaics for pixels in row)])
    width = len(columns) * (cell + 2 * GAP)
    page, thumbnail = Page(), resize_image(image, INPUT_SIDE)
    page.put(GAP, GAP, thumbnail)
    x, y = 2 * GAP + thumbnail.shape[1], GAP + line_height(LARGE_POINTS)
    page.write(x, y, title, width - x, LARGE_POINTS)
    page.write(x, y + line_height() + 4, subtitle, width - x, color=GRAY)
    top = 2 * GAP + thumbnail.shape[0]
    for number, column in enumerate(columns):
        left = GAP + number * (cell + 2 * GAP)
        page.write(left, top + line_height(), column.name, cell - 2 * GAP, weight="bold")
        page.write(left, top + 2 * line_height(), column.prediction, cell, color=GRAY)
    top += 2 * line_height() + GAP
    head = line_height() + 4
    for row in range(max(len(column.panels) for column in columns)):
        bottom = top
        for number, column in enumerate(columns):
            if row < len(column.panels):
                panel, pixels = column.panels[row], mosaics[number][row]
                left = GAP + number * (cell + 2 * GAP)
                caption = f"{panel.name}, {panel.note}"
                page.write(left, top + line_height() - 5, caption, cell + GAP)
                page.put(left, top + head, pixels)
                bottom = max(bottom, top + head + pixels.shape[0])
        top = bottom + GAP
    panels = [panel for column in columns for panel in column.panels]
    _draw_legend(page, top, panels, scale, width)
    return page.to_figure(width)


def _draw_panel(panel: Panel, *, square: bool) -> Pixels:
    """Return the mosaic of a layer's channels, in a square or a long shape."""
    count = max(1, len(panel.maps))
    panel_width = PANEL_SIDE if square else LONG_PANEL_WIDTH
    height, width = tile_size(panel.maps.shape, 100)
    # The number of columns that gives the mosaic its shape, whatever the shape of a map.
    ratio = (1 if square else LONG_PANEL_RATIO) * height / width
    columns = max(1, min(count, math.ceil(math.sqrt(count * ratio))))
    side = max(MIN_TILE_SIDE, (panel_width + 1) // columns - 1)
    side = min(side, PANEL_SIDE // 2 if square else panel_width // LONG_PANEL_RATIO)
    if width < height:
        side = round(side * height / width)
    tiles = map_tiles(panel.maps, panel.limits, side)
    for number in np.flatnonzero(panel.blank | panel.broken):
        tiles[number] = crossed_tile(tiles.shape[1], tiles.shape[2], bool(panel.broken[number]))
    return mosaic(tiles, columns)


def _choose_columns(cells: int) -> int:
    """Return at most five columns, with as few empty cells as possible."""
    if cells <= 3:
        return cells
    return min((5, 4, 3), key=lambda columns: -cells % columns)


def _draw_legend(page: Page, top: int, panels: Sequence[Panel], scale: str, width: int) -> None:
    """Draw a bar for each kind of color scale, and the tiles of blank and broken channels."""
    x, y = GAP, top + 4
    for signed in sorted({panel.limits[0] < 0 for panel in panels}):
        limits = (-1.0, 1.0) if signed else (0.0, 1.0)
        ends = ("−max ", "max") if signed else ("0 ", "max")
        x = draw_scale_bar(page, x, y, limits, ends)
    any_blank = any(panel.blank.any() for panel in panels)
    any_broken = any(panel.broken.any() for panel in panels)
    for shown, tile, text in (
        (any_blank, crossed_tile(13, 13), "blank channel"),
        (any_broken, crossed_tile(13, 13, broken=True), "NaN or infinite"),
    ):
        if shown:
            page.put(x, y - 2, tile)
            page.write(x + 19, y + 8, text, color=GRAY)
            x += 19 + round(len(text) * SMALL_POINTS * 1.35) + GAP
    for number, line in enumerate(wrap_text(scale, width - 2 * GAP), 1):
        page.write(GAP, y + 9 + number * line_height(), line, color=GRAY)

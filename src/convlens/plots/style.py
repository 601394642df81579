"""The style of every figure, writing figures to files, and pages drawn at exact pixels.

The colors are from Okabe and Ito, "Color Universal Design" (2008), and are distinguishable with
color blindness. pyplot is never used, so there is no global state and no window.

A `Page` puts small images and text at exact pixel positions: at the usual 150 dpi every value is a
square of whole pixels, and thousands of tiles are drawn as one image. Hundreds of matplotlib axes
would take seconds.
"""

from __future__ import annotations

import functools
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from rich.markup import escape

from convlens.errors import UsageError
from convlens.utils import options
from convlens.utils.console import is_first_time, print_status
from convlens.utils.files import write_atomic

P = ParamSpec("P")
Pixels = npt.NDArray[np.uint8]  # RGB [h, w, 3] unless stated otherwise
Maps = npt.NDArray[np.float32]

DPI = 150
BLUE, VERMILION, GRAY, PALE = "#0072B2", "#D55E00", "#595959", "#E6E6E6"
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0.0,
    "figure.dpi": DPI,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
}
# DejaVu Sans comes with matplotlib but lacks these scripts. Installed fallbacks are used.
FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Arial Unicode MS",
)
MISSING_LETTER = r"Glyph (\d+) .*missing from"  # matplotlib's warning
# Fonts that draw a box for every letter there is.
PLACEHOLDER_FONTS = re.compile(r"last ?resort|adobe blank|fallback", re.IGNORECASE)
MAX_LETTERS_SHOWN = 12
# Metadata by file format. matplotlib's own (version, date) would make equal figures differ.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
# A fixed salt makes SVG reproducible. Type 42 keeps the text of a PDF as text, as journals require.
VECTOR_STYLE: Any = {"svg.hashsalt": "convlens", "pdf.fonttype": 42}

GAP = 10  # pixels between the parts of a page
SMALL_POINTS, LARGE_POINTS = 7, 9
BLANK_GRAY, CROSS_GRAY = 225, 150  # background and cross of the tile of a blank channel
BROKEN = (213, 94, 0)  # vermilion: values that are NaN or infinite
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
SCALE_BAR_WIDTH, SCALE_BAR_HEIGHT = 110, 9  # pixels


def use_style(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a drawing function use the style of convlens, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _style_context():
            return draw(*args, **kwargs)

    return wrapper


def _style_context() -> AbstractContextManager[None]:
    families = list(_font_families())
    return matplotlib.style.context(["default", STYLE, {"font.family": families}])


@functools.cache
def _font_families() -> tuple[str, ...]:
    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed))


def save_figure(figure: Figure, path: Path | str, dpi: int = DPI) -> None:
    """Write a figure as PNG, SVG or PDF, chosen by the suffix of `path`.

    Missing folders are created. The same figure always gives the same bytes. `--figures` on the
    command line or `$CONVLENS_FIGURES` (`svg` or `pdf`) writes every figure in that format as well,
    for papers. With `none`, explicitly requested figures are still written as PNG; `run_plots`
    leaves out the others.

    Raises:
        UsageError: unknown suffix.
        ResourceError: the folder is not writable or the disk is full; an old file stays intact.
    """
    path = Path(path)
    extra = options.figures()
    for target in [path] if extra in (None, "none") else [path, path.with_suffix(f".{extra}")]:
        write_atomic(target, encode_png(figure, target.suffix.lower().removeprefix("."), dpi))


def encode_png(figure: Figure, kind: str = "png", dpi: int = DPI) -> bytes:
    """Return a figure as the bytes of a PNG, SVG or PDF; the same figure gives the same bytes."""
    if kind not in FORMATS:
        raise UsageError(f"unknown figure format {kind!r}", fix=f"use one of {', '.join(FORMATS)}")
    content, reported = _draw(figure, kind, dpi)
    if not reported:
        return content
    families = _font_families()
    found = _fonts_with(_letters_without_font(figure, families) or reported)
    if found:
        families = (*families, *found)
        for text in figure.findobj(Text):
            text.set_fontfamily(list(families))
        content, reported = _draw(figure, kind, dpi)
    if reported:
        missing = _letters_without_font(figure, families) or reported
        letters = "".join(map(chr, sorted(missing)))
        if is_first_time("letters without a font"):
            print_status(
                f"note: no installed font has {escape(letters[:MAX_LETTERS_SHOWN])}; figures show "
                "placeholders, and the HTML page the right names (install e.g. Noto Sans CJK)"
            )
    return content


def _letters_without_font(figure: Figure, families: Sequence[str]) -> frozenset[int]:
    """Return the code points in the texts of a figure that none of the font families has.

    matplotlib's warning names the first letter of a cluster only, e.g. the space that is drawn
    together with a combining mark.
    """
    letters = {ord(c) for text in figure.findobj(Text) for c in text.get_text() if not c.isspace()}
    for family in families:
        letters -= font_manager.get_font(font_manager.findfont(family)).get_charmap().keys()
    return frozenset(letters)


def _draw(figure: Figure, kind: str, dpi: int) -> tuple[bytes, frozenset[int]]:
    """Return a figure as a file, and the code points that matplotlib reports as without a glyph."""
    buffer = io.BytesIO()
    # matplotlib creates ticks only while it draws, so the style has to be active here as well.
    with (
        _style_context(),
        matplotlib.rc_context(VECTOR_STYLE),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.filterwarnings("always", message=MISSING_LETTER)
        FigureCanvasAgg(figure)
        layout = figure.get_layout_engine()
        if layout is not None and kind == "png":
            # Otherwise savefig would draw the whole figure once more just for the layout.
            layout.execute(figure)
            figure.set_layout_engine("none")
        # zlib level 4 takes half the time of level 6, and compression dominates large figures.
        png_options: dict[str, Any] = {"pil_kwargs": {"compress_level": 4}} if kind == "png" else {}
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=FORMATS[kind], **png_options)
        if layout is not None:
            figure.set_layout_engine(layout)  # another format needs a layout of its own
    letters = set[int]()
    for warning in caught:
        match = re.match(MISSING_LETTER, str(warning.message))
        if match:
            letters.add(int(match[1]))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return buffer.getvalue(), frozenset(letters)


@functools.cache
def _fonts_with(letters: frozenset[int]) -> tuple[str, ...]:
    """Return names of installed fonts that together have as many of the letters as possible."""
    found, missing = list[str](), set(letters)
    for entry in font_manager.fontManager.ttflist:
        if PLACEHOLDER_FONTS.search(entry.name):
            continue
        try:
            font = font_manager.get_font(entry.fname)
        except (OSError, RuntimeError):  # damaged, or a font of colored bitmaps
            continue
        has = missing.intersection(font.get_charmap()) if font.scalable else set[int]()
        if has:
            found.append(entry.name)
            missing -= has
        if not missing:
            break
    return tuple(found)


def text_width(text: str) -> float:
    """Estimate the width of a text in units of its font size, rather too wide than too narrow."""
    return sum(map(_letter_width, text))


def _letter_width(letter: str) -> float:
    if unicodedata.east_asian_width(letter) in "WF" or letter in "mwMWQ%@…→":
        return 1.0
    if letter in "ijl.,:;'|! ":
        return 0.33
    if letter in "frtI()[]-":
        return 0.42
    return 0.75 if letter.isupper() else 0.64


def fit_text(name: str, max_width: float, *, before: str = "", after: str = "") -> str:
    """Return `before + name + after` as literal text, with the name cut to fit `max_width`.

    Names come from users and folders: `$` would start math text, and control characters or lone
    surrogates (bytes that are not UTF-8) cannot be drawn.

    Args:
        max_width: of the whole text, in units of the font size.
    """
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    available = max_width - text_width(before) - text_width(after)
    if text_width(name) > available:
        while name and text_width(name) + 1 > available:
            name = name[:-1]
        name = name.rstrip() + "…"
    return (before + name + after).replace("$", r"\$")


class Page:
    """Images and lines of text at pixel positions from the top left; `to_figure` draws them."""

    def __init__(self) -> None:
        self._images: list[tuple[int, int, Pixels]] = []
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []

    def put(self, x: int, y: int, pixels: Pixels) -> None:
        """Add an image RGB `[h, w, 3]` with its upper left corner at `x, y`."""
        self._images.append((x, y, pixels))

    def write(
        self,
        x: float,
        y: float,
        text: str,
        max_width: float = math.inf,
        points: float = SMALL_POINTS,
        *,
        before: str = "",
        after: str = "",
        **text_style: Any,
    ) -> None:
        """Add a line of text with its baseline at `y`.

        Args:
            max_width: in pixels; `text` is cut to fit, `before` and `after` are not.
            text_style: keywords of `Axes.text`.
        """
        line = fit_text(text, max_width * 72 / DPI / points, before=before, after=after)
        self._texts.append((x, y, line, {"fontsize": points, "va": "baseline", **text_style}))

    def to_figure(self, width: int, height: int | None = None) -> Figure:
        """Draw the page, `width` pixels wide and by default as high as its contents."""
        if height is None:
            ends = [y + pixels.shape[0] for _, y, pixels in self._images]
            height = math.ceil(max([*ends, *(y for _, y, _, _ in self._texts)], default=0)) + GAP
        canvas = np.full((height, width, 3), 255, dtype=np.uint8)
        for x, y, pixels in self._images:
            canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        # matplotlib truncates the size in pixels: 1023.9999 must not become 1023.
        figure = Figure(figsize=((width + 1e-4) / DPI, (height + 1e-4) / DPI), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(canvas, interpolation="nearest", extent=(0, width, height, 0), aspect="auto")
        for left, baseline, line, text_style in self._texts:
            axes.text(left, baseline, line, **text_style)
        return figure


def wrap_text(text: str, max_width: float) -> list[str]:
    """Break a text into lines of at most `max_width` pixels at the small font size."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}") <= max_width * 72 / DPI / SMALL_POINTS:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def line_height(points: float = SMALL_POINTS) -> int:
    """Return the height of a line of text in pixels."""
    return round(points * DPI / 72 * 1.3)


def apply_colormap(values: Maps, limits: tuple[float, float]) -> Pixels:
    """Return values of any shape as RGB colors, with the channels in a last dimension.

    Limits from 0 use a sequential colormap; symmetric limits a diverging one, with 0 white.
    """
    low, high = limits
    colormap = matplotlib.colormaps[SEQUENTIAL if low == 0 else DIVERGING]
    table = (colormap(np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    shares = (values - low) / (high - low if high > low else 1)
    colors: Pixels = table[(np.clip(shares, 0, 1) * 255).round().astype(np.uint8)]
    return colors


def resize_image(image: Pixels, side: int) -> Pixels:
    """Return an image uint8 `[1 or 3, H, W]` as RGB `[h, w, 3]`, the longer side about `side`.

    Small images are enlarged by an integer factor, so that all their pixels stay squares of one
    size. Large ones are averaged to exactly `side` pixels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UsageError(
            f"an image must be uint8 [1 or 3, H, W], got {image.dtype} {list(image.shape)}"
        )
    pixels = np.moveaxis(image, 0, 2)
    pixels = pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        factor = max(1, round(scale))
        return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def tile_size(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Return height and width of the tile of a map `[..., h, w]` whose longer side is `side`."""
    height, width = shape[-2:]
    scale = side / max(height, width)
    return max(3, round(height * scale)), max(3, round(width * scale))


def map_tiles(maps: Maps, limits: tuple[float, float], side: int) -> Pixels:
    """Return maps `[n, h, w]` as colored tiles `[n, H, W, 3]`.

    Maps larger than their tile are averaged; the values of smaller ones become squares.
    """
    height, width = tile_size(maps.shape, side)
    finite = np.nan_to_num(maps, nan=0, posinf=0, neginf=0).astype(np.float32)
    resized = [Image.fromarray(m).resize((width, height), Image.Resampling.BOX) for m in finite]
    stack = np.stack([np.asarray(m) for m in resized]) if resized else np.empty((0, height, width))
    return apply_colormap(stack.astype(np.float32), limits)


def crossed_tile(height: int, width: int, broken: bool = False) -> Pixels:
    """Return the tile of a blank channel (gray), or of one whose values are not finite."""
    tile = np.full((height, width, 3), BROKEN if broken else BLANK_GRAY, dtype=np.uint8)
    steps = np.arange(max(height, width) * 2)
    rows = (steps * height // len(steps)).clip(0, height - 1)
    columns = (steps * width // len(steps)).clip(0, width - 1)
    ink = 255 if broken else CROSS_GRAY
    tile[rows, columns] = ink
    tile[rows, width - 1 - columns] = ink
    return tile


def mosaic(tiles: Sequence[Pixels] | Pixels, columns: int, gap: int = 2) -> Pixels:
    """Return tiles of one size `[h, w, 3]` side by side in rows, on white."""
    if not len(tiles):
        return np.full((3, 3, 3), 255, dtype=np.uint8)
    height, width = tiles[0].shape[:2]
    columns = max(1, min(columns, len(tiles)))
    rows = -(-len(tiles) // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        y, x = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[y : y + height, x : x + width] = tile
    return canvas


def draw_scale_bar(
    page: Page, x: int, y: int, limits: tuple[float, float], ends: tuple[str, str]
) -> int:
    """Draw a bar of the colors with a label at each end, and return the x behind it."""
    ramp = np.linspace(*limits, SCALE_BAR_WIDTH, dtype=np.float32)[None]
    bar = apply_colormap(ramp.repeat(SCALE_BAR_HEIGHT, axis=0), limits)
    font_pixels = SMALL_POINTS * DPI / 72
    left = x + round(text_width(ends[0]) * font_pixels) + 2
    right = left + SCALE_BAR_WIDTH + 6
    page.write(x, y + 8, ends[0], color=GRAY)
    page.put(left, y, bar)
    page.write(right, y + 8, ends[1], color=GRAY)
    return right + round(text_width(ends[1]) * font_pixels) + 2 * GAP

"""One look for every figure, names that are drawn as they are written, and the file.

The colours are of Okabe and Ito 2008 (Color Universal Design): colour-blind people can tell them
apart. pyplot is never used: nothing is global, nothing opens a window.
"""

from __future__ import annotations

import functools
import io
import math
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
from PIL import Image

from convlens.errors import UsageError
from convlens.utils import options
from convlens.utils.files import write_atomic

P = ParamSpec("P")

DPI = 150
BLUE, VERMILION, GREY, PALE = "#0072B2", "#D55E00", "#595959", "#E6E6E6"
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0.0,
    "figure.dpi": DPI,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
}
# DejaVu Sans comes with matplotlib but lacks these scripts: used where they are installed.
FALLBACKS = (
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


@functools.cache
def _families() -> tuple[str, ...]:
    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(name for name in FALLBACKS if name in installed))


def _our_style() -> AbstractContextManager[None]:
    families = list(_families())
    return matplotlib.style.context(["default", STYLE, {"font.family": families}])


def use_style(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Makes a drawing function use our style, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _our_style():
            return draw(*args, **kwargs)

    return wrapper


# By the ending of the file. What matplotlib would add of itself (version, date) makes equal
# pictures differ; PDF text stays text (TrueType), as journals ask.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
VECTOR: Any = {"svg.hashsalt": "convlens", "pdf.fonttype": 42}


def save_figure(figure: Figure, path: Path | str, dpi: int = DPI) -> None:
    """Writes a figure as PNG, SVG or PDF by the name's ending; missing folders are made.

    The same figure gives the same bytes. `--figures` on the command line or `$CONVLENS_FIGURES`
    (`svg` or `pdf`) writes every figure in that format as well, for papers. With `none` the figures
    that were asked for are still written as PNG; `picturing` leaves out the others.

    Raises:
        UsageError: another ending.
        ResourceError: the folder can't be written or the disk is full; an old file is intact.
    """
    path = Path(path)
    extra = options.figures()
    for target in [path] if extra in (None, "none") else [path, path.with_suffix(f".{extra}")]:
        write_atomic(target, encode_png(figure, target.suffix.lower().removeprefix("."), dpi))


def encode_png(figure: Figure, kind: str = "png", dpi: int = DPI) -> bytes:
    """A figure as the bytes of a PNG, SVG or PDF; the same figure gives the same bytes."""
    if kind not in FORMATS:
        raise UsageError(f"no figures of format {kind!r}", fix=f"one of {', '.join(FORMATS)}")
    buffer = io.BytesIO()
    # matplotlib makes ticks only when it draws, so the style has to hold here as well.
    with _our_style(), matplotlib.rc_context(VECTOR), warnings.catch_warnings():
        # A class name in a script that no font has is drawn as boxes: no reason to complain.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        FigureCanvasAgg(figure)
        layout = figure.get_layout_engine()
        if layout is not None and kind == "png":
            # matplotlib would draw the whole figure once in vain to have this done.
            layout.execute(figure)
            figure.set_layout_engine("none")
        # zlib's level 4 takes half the time of 6, and large figures are mostly compressing.
        options: dict[str, Any] = {"pil_kwargs": {"compress_level": 4}} if kind == "png" else {}
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=FORMATS[kind], **options)
        if layout is not None:
            figure.set_layout_engine(layout)  # a page of another format is laid out anew
    return buffer.getvalue()


def text_width(text: str) -> float:
    """The rough width of a text in units of its font size; errs on the wide side."""
    return sum(map(_letter, text))


def _letter(letter: str) -> float:
    if unicodedata.east_asian_width(letter) in "WF" or letter in "mwMWQ%@…→":
        return 1.0
    if letter in "ijl.,:;'|! ":
        return 0.33
    if letter in "frtI()[]-":
        return 0.42
    return 0.75 if letter.isupper() else 0.64


def fit_text(name: str, room: float, *, before: str = "", after: str = "") -> str:
    """`before + name + after` as literal text, the name cut to fit `room` font sizes.

    Names come from users and folders: `$` would start mathematics, and control characters or
    bytes that are no UTF-8 (lone surrogates) can't be drawn.
    """
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    left = room - text_width(before) - text_width(after)
    if text_width(name) > left:
        while name and text_width(name) + 1 > left:
            name = name[:-1]
        name = name.rstrip() + "…"
    return (before + name + after).replace("$", r"\$")


# ---- page ----------------------------------------
# A page of small pictures and words at exact pixels, and mosaics of a layer's channels.
#
# At the usual 150 dpi every value is a square of whole pixels, and a page of thousands of tiles is
# one image to draw: hundreds of axes would take matplotlib seconds.

Pixels = npt.NDArray[np.uint8]  # RGB [h, w, 3] here
Maps = npt.NDArray[np.float32]

GAP = 10
SMALL, LARGE = 7, 9  # points
PAPER, CROSS = 225, 150  # greys of a tile for a blank channel
BROKEN = (213, 94, 0)  # vermilion: values that are NaN or infinite
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"


class Page:
    """Pictures and words, gathered by pixel positions from the top left; `figure` draws them."""

    def __init__(self) -> None:
        self._pictures: list[tuple[int, int, Pixels]] = []
        self._words: list[tuple[float, float, str, dict[str, Any]]] = []

    def put(self, x: int, y: int, pixels: Pixels) -> None:
        self._pictures.append((x, y, pixels))

    def write(
        self,
        x: float,
        y: float,
        words: str,
        room: float = math.inf,
        size: float = SMALL,
        **look: Any,
    ) -> None:
        """One line with its baseline at `y`, cut to `room` pixels."""
        ems = room * 72 / DPI / size
        self._words.append(
            (x, y, fit_text(words, ems), {"fontsize": size, "va": "baseline", **look})
        )

    def figure(self, wide: int) -> Figure:
        """The page, `wide` pixels wide and as high as what is on it."""
        ends = [y + pixels.shape[0] for _, y, pixels in self._pictures]
        height = math.ceil(max([*ends, *(y for _, y, _, _ in self._words)], default=0)) + GAP
        canvas = np.full((height, wide, 3), 255, dtype=np.uint8)
        for x, y, pixels in self._pictures:
            canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        # matplotlib cuts the size in pixels to whole ones: 1023.9999 must not become 1023.
        figure = Figure(figsize=((wide + 1e-4) / DPI, (height + 1e-4) / DPI), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        extent = (0, wide, height, 0)
        axes.imshow(canvas, interpolation="nearest", extent=extent, aspect="auto")
        for across, down, words, look in self._words:
            axes.text(across, down, words, **look)
        return figure


def wrap_text(text: str, room: float) -> list[str]:
    """The words in lines of at most `room` pixels, at the small size."""
    rows: list[str] = []
    for word in text.split():
        if rows and text_width(f"{rows[-1]} {word}") <= room * 72 / DPI / SMALL:
            rows[-1] += f" {word}"
        else:
            rows.append(word)
    return rows


def text_line(points: float = SMALL) -> int:
    """The height of a line of text, in pixels."""
    return round(points * DPI / 72 * 1.3)


def colored(values: Maps, limits: tuple[float, float]) -> Pixels:
    """Values of any shape as colours, RGB in a last dimension.

    Limits from 0 are a sequence of colours; symmetric ones diverge, with 0 white.
    """
    low, high = limits
    table = matplotlib.colormaps[SEQUENTIAL if low == 0 else DIVERGING]
    colors = (table(np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    share = (values - low) / (high - low if high > low else 1)
    found: Pixels = colors[(np.clip(share, 0, 1) * 255).round().astype(np.uint8)]
    return found


def rgb(image: Pixels, side: int, *, exact: bool = False) -> Pixels:
    """A picture uint8 `[1 or 3, H, W]` with its longer side about `side` (or just so) pixels.

    Small ones grow by a whole factor, so that their pixels stay squares of one size.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UsageError(f"no picture uint8 [1 or 3, H, W]: {image.dtype} {list(image.shape)}")
    found = np.moveaxis(image, 0, 2)
    found = found.repeat(3, axis=2) if found.shape[2] == 1 else np.ascontiguousarray(found)
    high, wide = found.shape[:2]
    scale = side / max(high, wide)
    if not exact and scale >= 1:
        whole = max(1, round(scale))
        return found.repeat(whole, axis=0).repeat(whole, axis=1)
    size = (max(1, round(wide * scale)), max(1, round(high * scale)))
    return np.asarray(Image.fromarray(found).resize(size, Image.Resampling.BOX))


def tile_size(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Height and width of a tile for maps of that height and width, `side` at the longer."""
    high, wide = shape[-2:]
    scale = side / max(high, wide)
    return max(3, round(high * scale)), max(3, round(wide * scale))


def tiles(maps: Maps, limits: tuple[float, float], side: int) -> Pixels:
    """Maps `[n, h, w]` as coloured tiles `[n, H, W, 3]`: means where shrunk, squares where not."""
    high, wide = tile_size(maps.shape, side)
    safe = np.nan_to_num(maps, nan=0, posinf=0, neginf=0).astype(np.float32)
    sized = [Image.fromarray(m).resize((wide, high), Image.Resampling.BOX) for m in safe]
    stack = np.stack([np.asarray(each) for each in sized]) if sized else np.empty((0, high, wide))
    return colored(stack.astype(np.float32), limits)


def cross_out(high: int, wide: int, broken: bool = False) -> Pixels:
    """The tile of a channel that shows nothing (grey) or whose values are not finite."""
    found = np.full((high, wide, 3), BROKEN if broken else PAPER, dtype=np.uint8)
    steps = np.arange(max(high, wide) * 2)
    rows = (steps * high // len(steps)).clip(0, high - 1)
    columns = (steps * wide // len(steps)).clip(0, wide - 1)
    ink = 255 if broken else CROSS
    found[rows, columns] = ink
    found[rows, wide - 1 - columns] = ink
    return found


def mosaic(pictures: Sequence[Pixels] | Pixels, columns: int, gap: int = 2) -> Pixels:
    """Tiles of one size `[h, w, 3]` side by side in rows, on white."""
    if not len(pictures):
        return np.full((3, 3, 3), 255, dtype=np.uint8)
    high, wide = pictures[0].shape[:2]
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    shape = (rows * (high + gap) - gap, columns * (wide + gap) - gap, 3)
    found = np.full(shape, 255, dtype=np.uint8)
    for number, picture in enumerate(pictures):
        y, x = (number // columns) * (high + gap), (number % columns) * (wide + gap)
        found[y : y + high, x : x + wide] = picture
    return found


def scale_bar(
    page: Page, x: int, y: int, limits: tuple[float, float], ends: tuple[str, str]
) -> int:
    """A bar of the colours with a word at each end; returns the x behind it."""
    bar = colored(np.linspace(*limits, 110, dtype=np.float32)[None].repeat(9, axis=0), limits)
    em = SMALL * DPI / 72
    left = x + round(text_width(ends[0]) * em) + 2
    page.write(x, y + 8, ends[0], color=GREY)
    page.put(left, y, bar)
    page.write(left + 116, y + 8, ends[1], color=GREY)
    return left + 116 + round(text_width(ends[1]) * em) + 2 * GAP

"""One look for every figure, names that are drawn as they are written, and the file.

The colours are of Okabe and Ito 2008 (Color Universal Design): colour-blind people can tell them
apart. pyplot is never used: nothing is global, nothing opens a window.
"""

from __future__ import annotations

import functools
import io
import unicodedata
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convlens.errors import UsageError
from convlens.system import options
from convlens.system.files import write_atomic

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
    "Noto Sans CJK SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Arabic",
    "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Arial Unicode MS",
)  # fmt: skip


@functools.cache
def _families() -> tuple[str, ...]:
    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(name for name in FALLBACKS if name in installed))


def _our_style() -> AbstractContextManager[None]:
    families = list(_families())
    return matplotlib.style.context(["default", STYLE, {"font.family": families}])


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
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


def save(figure: Figure, path: Path | str, dpi: int = DPI) -> None:
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
        write_atomic(target, encoded(figure, target.suffix.lower().removeprefix("."), dpi))


def encoded(figure: Figure, kind: str = "png", dpi: int = DPI) -> bytes:
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


def width(text: str) -> float:
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


def fit(name: str, room: float, *, before: str = "", after: str = "") -> str:
    """`before + name + after` as literal text, the name cut to fit `room` font sizes.

    Names come from users and folders: `$` would start mathematics, and control characters or
    bytes that are no UTF-8 (lone surrogates) can't be drawn.
    """
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    left = room - width(before) - width(after)
    if width(name) > left:
        while name and width(name) + 1 > left:
            name = name[:-1]
        name = name.rstrip() + "…"
    return (before + name + after).replace("$", r"\$")

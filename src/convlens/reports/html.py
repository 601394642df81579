"""From named parts to one HTML file that needs nothing else: no network, no second file.

Everything that is filled in is escaped (Jinja's autoescape is on for every template). Names of
classes and files come from users and folders, so JSON within a script is escaped, too: a class
called `</script>` must stay a class.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from markupsafe import Markup, escape
from PIL import Image, features

from convlens.data.dataset import Split
from convlens.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment


# A part of the page: its heading, and what draws it from what was gathered. Where there is nothing
# to show it returns None, and the part is left out.
PageSection = tuple[str, Callable[[Any], Markup | None]]


@dataclass(frozen=True)
class PageFigure:
    """A picture that is ready: PNG, WebP, JPEG or SVG bytes, what it shows, and words below it."""

    content: bytes
    alt: str
    caption: str = ""

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return data_uri(self.content, _media_type(self.content))


def figures_of(pictures: Sequence[PageFigure], lead: str = "") -> Markup | None:
    """A section of finished pictures, each on white paper; None if there are none."""
    return render_page("figures.html", pictures=pictures, lead=lead) if pictures else None


def compose_page(
    title: str, head: Callable[[], Markup], sections: Mapping[str, PageSection], found: object
) -> str:
    """The whole file: the head of the page, then every section that has something to show.

    `head` is drawn last: it says, too, what the sections found missing.
    """
    parts = []
    for name, (heading, draw) in sections.items():
        html = draw(found)
        if html is not None:
            parts.append({"id": name, "title": heading, "html": html})
    return str(
        render_page("page.html", title=title, head=head(), sections=parts, version=__version__)
    )


def render_page(template: str, **values: Any) -> Markup:
    """A template with its values, all of them escaped unless they are `Markup`."""
    return Markup(_environment().get_template(template).render(**values))


def embed_image(content: object) -> Markup:
    """JSON that can stand inside `<script type="application/json">`, whatever strings it holds."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&'":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("convlens.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": format_share,
        "number": format_number,
        "count": format_count,
        "points": format_points,
        "seconds": format_seconds,
        "embedded": embed_image,
    }
    environment.globals |= {"asset": _asset}
    return environment


def _asset(name: str) -> Markup:
    """Our own script or style, as it stands."""
    return Markup((resources.files("convlens.reports") / "templates" / name).read_text("utf-8"))


def format_share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}%}"


def format_number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def format_count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def format_points(value: float) -> str:
    """A difference of shares, e.g. `+1.3 points`."""
    return f"{100 * value:+.1f} points".replace("-", "−")


def format_seconds(value: float | None) -> str:
    """Time as people say it."""
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.1f} s"
    minutes = value / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _media_type(content: bytes) -> str:
    if content.startswith(b"\x89PNG"):
        return "image/png"
    if content.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if content[8:12] == b"WEBP":
        return "image/webp"
    if b"<svg" in content[:2000]:
        return "image/svg+xml"
    raise ValueError("a figure is PNG, JPEG, WebP or SVG")


# ---- thumbnails ----------------------------------------
# Small pictures as data URIs, and how many of them a page can carry.

THUMBNAIL_SIDE = 96  # pixels: larger images are reduced
EXACT_SIDE = 40  # up to this size the pixels are kept as they are
MAX_THUMBNAILS = (20, 12, 8, 4, 2, 1)  # images of one cell, the first that fits
THUMBNAIL_BUDGET = 7 << 20  # bytes of all of them; base64 adds a third

Pixels = npt.NDArray[np.uint8]


def thumbnail(pixels: Pixels) -> str:
    """uint8 `[C, H, W]`, C = 1 or 3, as a data URI: WebP, lossless where it is small.

    PNG where Pillow was built without WebP.
    """
    grey = pixels.shape[0] == 1
    image = Image.fromarray(pixels[0] if grey else np.ascontiguousarray(np.moveaxis(pixels, 0, 2)))
    exact = max(image.size) <= EXACT_SIDE
    if max(image.size) > THUMBNAIL_SIDE:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if features.check("webp"):
        kind = "webp"
        image.convert("RGB").save(buffer, "WEBP", lossless=exact, quality=80, method=4)
    else:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), f"image/{kind}")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def cell_thumbnails(images: Split, cells: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Thumbnails of the first images of each cell, as many as the page can carry.

    Args:
        cells: positions in the split by the name of their cell, in the order they are shown.
    """
    for cap in MAX_THUMBNAILS:
        found: dict[str, list[str]] = {}
        size = 0
        for name, where in cells.items():
            found[name] = thumbnails(images, where[:cap])
            size += sum(map(len, found[name]))
            if size > THUMBNAIL_BUDGET * 4 // 3 and cap > MAX_THUMBNAILS[-1]:
                break
        else:
            return found
    return found


def thumbnails(images: Split, where: Sequence[int]) -> list[str]:
    """The images of a split at these positions."""
    if not len(where):
        return []
    pixels = images.rows.gather(torch.as_tensor(list(where), dtype=torch.int64)).cpu().numpy()
    return [thumbnail(each) for each in pixels]


# ---- drawing ----------------------------------------
# Charts as inline SVG: colours are CSS variables, so that they follow light, dark and print.
#
# matplotlib's SVG would bring its own colours and 50 kB a figure. Every chart has a text that says
# what it shows, and the page gives its numbers as a table beside it.

WIDE, HIGH = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 36


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart; `look` is a CSS class of it (`train`, `val`, `c0` to `c6`)."""

    name: str
    look: str
    values: Sequence[float]


@dataclass(frozen=True)
class AxisScale:
    """From values to pixels, along one axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def line_chart(
    x: Sequence[float],
    lines: Sequence[ChartLine],
    label: str,
    *,
    percent: bool = False,
    mark: float | None = None,
    along: str = "epoch",
) -> Markup:
    """Lines over epochs; gaps where a value is not finite, a dot where it stands alone.

    Args:
        label: what the values are, with their unit.
        mark: an epoch that gets a dotted line: the one whose weights were kept.
    """
    finite = [v for line in lines for v in line.values if math.isfinite(v)]
    if not finite or not x:
        return Markup("")
    across = _axis_scale(min(x), max(x), LEFT, WIDE - RIGHT)
    ticks = _ticks(min(finite), max(finite), 5)
    up = _axis_scale(min(*finite, ticks[0]), max(*finite, ticks[-1]), HIGH - BOTTOM, TOP)
    parts = [_x_axis(across, x), _y_axis(up, ticks, percent)]
    if mark is not None and min(x) <= mark <= max(x):
        at = across(mark)
        parts.append(
            Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                _format_coordinate(at), TOP, HIGH - BOTTOM
            )
        )
    for line in lines:
        parts += _path(across, up, x, line)
    parts.append(_axis_name(along))
    ends = "; ".join(_line_end(line, percent) for line in lines)
    look = "chart fine" if len(x) > 120 else "chart"  # dashes of a jagged line are no dashes
    return _svg(Markup("").join(parts), f"{label} over {along}s. {ends}", look)


def reliability_chart(
    confidence: Sequence[float], right: Sequence[float], count: Sequence[int]
) -> Markup:
    """Bars of accuracy against the confidence of each bin, and the diagonal of honesty."""
    bins = len(count)
    across = AxisScale(0, 1, LEFT, WIDE - RIGHT)
    up = AxisScale(0, 1, HIGH - BOTTOM, TOP)
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    parts = [_y_axis(up, ticks, True)]
    parts += [_tick(across(tick), f"{tick:.0%}") for tick in ticks]
    total = sum(count)
    for number in range(bins):
        if not count[number]:
            continue
        x0, x1 = across(number / bins) + 1, across((number + 1) / bins) - 1
        top, base = up(right[number]), up(0)
        shade = 0.3 + 0.7 * math.sqrt(count[number] / max(count))
        parts.append(
            Markup(
                '<rect class="bar" x="{}" y="{}" width="{}" height="{}" opacity="{}">'
                "<title>{}</title></rect>"
            ).format(
                _format_coordinate(x0),
                _format_coordinate(top),
                _format_coordinate(x1 - x0),
                _format_coordinate(max(base - top, 0.5)),
                f"{shade:.2f}",
                f"{count[number]:,} of {total:,} images, on average {confidence[number]:.1%} sure: "
                f"{right[number]:.1%} right",
            )
        )
        parts.append(
            Markup('<circle class="dot" cx="{}" cy="{}" r="3"/>').format(
                _format_coordinate(across(confidence[number])), _format_coordinate(top)
            )
        )
    parts.append(
        Markup('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            _format_coordinate(across(0)),
            _format_coordinate(up(0)),
            _format_coordinate(across(1)),
            _format_coordinate(up(1)),
        )
    )
    parts.append(_axis_name("how sure the model is"))
    worst = max((abs(c - r), c, r) for c, r, n in zip(confidence, right, count, strict=True) if n)
    said = (
        f"Share of right answers against confidence in {bins} bins; the largest gap is "
        f"{100 * worst[0]:.0f} points, at {worst[1]:.0%} sure and {worst[2]:.0%} right."
    )
    return _svg(Markup("").join(parts), said)


def interval_chart(
    low: float, high: float, at: float, floor: float | None, everything: str
) -> Markup:
    """A share with its interval on the line from 0 to 100%; `floor` is what guessing reaches."""
    scale = AxisScale(0, 1, 4, 296)
    tick = Markup("")
    if floor is not None:
        tick = Markup('<line class="ideal" x1="{0}" x2="{0}" y1="2" y2="22"/>').format(
            _format_coordinate(scale(floor))
        )
    width = max(scale(high) - scale(low), 2)
    return Markup(
        '<svg class="interval" viewBox="0 0 300 24" role="img" aria-label="{}">'
        '<rect class="rail" x="4" y="10" width="292" height="4" rx="2"/>'
        '<rect class="fill" x="4" y="10" width="{}" height="4" rx="2"/>{}'
        '<rect class="span" x="{}" y="5" width="{}" height="14" rx="2"/></svg>'
    ).format(
        everything,
        _format_coordinate(scale(at) - 4),
        tick,
        _format_coordinate(scale(low)),
        _format_coordinate(width),
    )


def _svg(inside: Markup, said: str, look: str = "chart") -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        look, WIDE, HIGH, said, inside
    )


def _axis_scale(low: float, high: float, start: float, end: float) -> AxisScale:
    if low == high:  # a single epoch, or a flat line, in the middle
        low, high = low - 0.5, high + 0.5
    return AxisScale(low, high, start, end)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers around [low, high], about `wanted` of them."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _x_axis(scale: AxisScale, x: Sequence[float]) -> Markup:
    ticks = [t for t in _ticks(min(x), max(x), 6) if min(x) <= t <= max(x) and t == int(t)]
    return Markup("").join(_tick(scale(t), f"{t:,.0f}") for t in ticks or [x[0]])


def _tick(at: float, words: str) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        _format_coordinate(at), HIGH - BOTTOM + 16, words
    )


def _y_axis(scale: AxisScale, ticks: Sequence[float], percent: bool) -> Markup:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step * (100 if percent else 1)) + 1e-9))
    parts = []
    for tick in ticks:
        words = f"{100 * tick:.{digits}f}%" if percent else f"{tick:,.{digits}f}"
        y = scale(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(
                LEFT,
                WIDE - RIGHT,
                _format_coordinate(y),
                _format_coordinate(y),
                LEFT - 7,
                _format_coordinate(y + 4),
                words,
            )
        )
    return Markup("").join(parts)


def _axis_name(words: str) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        WIDE - RIGHT, HIGH - 4, words
    )


def _path(across: AxisScale, up: AxisScale, x: Sequence[float], line: ChartLine) -> list[Markup]:
    """The pieces between gaps as one path, and a dot for each point without neighbours."""
    values = np.asarray(line.values, dtype=np.float64)
    good = np.isfinite(values)
    steps, dots = [], []
    for i in np.flatnonzero(good).tolist():
        before = i > 0 and good[i - 1]
        after = i + 1 < len(values) and good[i + 1]
        px, py = _format_coordinate(across(x[i])), _format_coordinate(up(values[i]))
        if before or after:
            steps.append(f"{'L' if before else 'M'}{px} {py}")
        else:
            dots.append(
                Markup('<circle class="{} dot" cx="{}" cy="{}" r="3.5"/>').format(line.look, px, py)
            )
    path = Markup('<path class="line {}" d="{}"/>').format(line.look, "".join(steps))
    return [*([path] if steps else []), *dots]


def _line_end(line: ChartLine, percent: bool) -> str:
    values = [v for v in line.values if math.isfinite(v)]
    if not values:
        return f"{line.name}: none"
    first, last = (f"{v:.1%}" if percent else f"{v:.3g}" for v in (values[0], values[-1]))
    return f"{line.name} goes from {first} to {last}"


def _format_coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def color_swatch(look: str) -> Markup:
    """The piece of line that stands in a legend."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">'
        '<path class="line {}" d="M1 5L25 5"/></svg>'
    ).format(escape(look))

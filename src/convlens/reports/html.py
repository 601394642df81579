"""HTML of a report page: templates, number formats, thumbnails and inline SVG charts.

The page is one file that loads nothing, neither from the network nor from other files. All values
are escaped (Jinja's autoescape is on for every template). Names of classes and files come from
users and folders, so JSON inside a script is escaped as well: a class named `</script>` must stay
a class.

Charts are inline SVG whose colors are CSS variables, so that they follow light, dark and print
styles; matplotlib's SVG would bring its own colors and 50 kB per figure. Every chart has a text
alternative, and the page shows its numbers in a table beside it.
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

Pixels = npt.NDArray[np.uint8]
# The heading of a section, and a function that renders the section from the contents of the page.
# It returns None if there is nothing to show, and the section is left out.
PageSection = tuple[str, Callable[[Any], Markup | None]]

THUMBNAIL_SIDE = 96  # pixels: larger images are reduced
LOSSLESS_SIDE = 40  # pixels: images up to this size are stored without loss
MAX_THUMBNAILS = (20, 12, 8, 4, 2, 1)  # images of one cell: the first number that fits is used
THUMBNAIL_BUDGET_BYTES = 7 << 20  # of all thumbnails; base64 adds a third

# Pixels of a chart and the margins around its axes.
CHART_WIDTH, CHART_HEIGHT = 460, 270
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 50, 14, 14, 36


@dataclass(frozen=True)
class PageFigure:
    """A finished image on the page.

    Attributes:
        content: the bytes of a PNG, WebP, JPEG or SVG file.
        alt: the text alternative.
        caption: the text below the image.
    """

    content: bytes
    alt: str
    caption: str = ""

    @property
    def source(self) -> str:
        """The image as a data URI."""
        return data_uri(self.content, _media_type(self.content))


def _media_type(content: bytes) -> str:
    if content.startswith(b"\x89PNG"):
        return "image/png"
    if content.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if content[8:12] == b"WEBP":
        return "image/webp"
    if b"<svg" in content[:2000]:
        return "image/svg+xml"
    raise ValueError("a figure must be PNG, JPEG, WebP or SVG")


def render_figures(figures: Sequence[PageFigure], lead: str = "") -> Markup | None:
    """Render a section of finished images on a white background; None if there are none."""
    return render_template("figures.html", figures=figures, lead=lead) if figures else None


def compose_page(
    title: str,
    render_head: Callable[[], Markup],
    sections: Mapping[str, PageSection],
    contents: object,
    on_section: Callable[[], None] = lambda: None,
) -> str:
    """Return the whole file: the head of the page, then every section that has something to show.

    Args:
        render_head: called last, since the head lists what the sections found missing.
        sections: by their id.
        contents: passed to the sections.
        on_section: called after each section.
    """
    parts = []
    for name, (heading, render) in sections.items():
        html = render(contents)
        on_section()
        if html is not None:
            parts.append({"id": name, "title": heading, "html": html})
    page = render_template(
        "page.html", title=title, head=render_head(), sections=parts, version=__version__
    )
    return str(page)


def render_template(template: str, **values: Any) -> Markup:
    """Render a template; all values are escaped unless they are `Markup`."""
    return Markup(_environment().get_template(template).render(**values))


def embed_json(content: object) -> Markup:
    """Return JSON for `<script type="application/json">`, safe for any strings in it."""
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
        "embedded": embed_json,
    }
    environment.globals |= {"asset": _asset}
    return environment


def _asset(name: str) -> Markup:
    """Return the text of a script or style sheet of the page, unescaped."""
    return Markup((resources.files("convlens.reports") / "templates" / name).read_text("utf-8"))


def format_share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}%}"


def format_number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def format_count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def format_points(value: float) -> str:
    """Format a difference of shares, e.g. `+1.3 points`."""
    return f"{100 * value:+.1f} points".replace("-", "−")


def format_seconds(value: float | None) -> str:
    """Format a duration in seconds, minutes or hours."""
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.1f} s"
    minutes = value / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def thumbnail(pixels: Pixels) -> str:
    """Return an image uint8 `[C, H, W]`, C = 1 or 3, as a data URI; see `encode_image`."""
    return data_uri(*encode_image(pixels))


def encode_image(pixels: Pixels, side: int = THUMBNAIL_SIDE) -> tuple[bytes, str]:
    """Return an image uint8 `[C, H, W]`, C = 1 or 3, as a file, and its media type.

    The format is WebP, lossless for small images, or PNG if Pillow was built without WebP.

    Args:
        side: larger images are reduced to it.
    """
    gray = pixels.shape[0] == 1
    image = Image.fromarray(pixels[0] if gray else np.ascontiguousarray(np.moveaxis(pixels, 0, 2)))
    lossless = max(image.size) <= LOSSLESS_SIDE
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if features.check("webp"):
        image.convert("RGB").save(buffer, "WEBP", lossless=lossless, quality=80, method=4)
        return buffer.getvalue(), "image/webp"
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), "image/png"


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def cell_thumbnails(images: Split, cells: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Return thumbnails of the first images of each cell, as many as fit on the page.

    Args:
        cells: positions in the split by the name of their cell, in the order they are shown.
    """
    for limit in MAX_THUMBNAILS:
        sources: dict[str, list[str]] = {}
        size = 0
        for name, positions in cells.items():
            sources[name] = thumbnails(images, positions[:limit])
            size += sum(map(len, sources[name]))
            if size > THUMBNAIL_BUDGET_BYTES * 4 // 3 and limit > MAX_THUMBNAILS[-1]:
                break
        else:
            return sources
    return sources


def thumbnails(images: Split, positions: Sequence[int]) -> list[str]:
    """Return thumbnails of the images of a split at these positions."""
    if not len(positions):
        return []
    indices = torch.as_tensor(list(positions), dtype=torch.int64)
    return [thumbnail(pixels) for pixels in images.rows.gather(indices).cpu().numpy()]


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart.

    Attributes:
        css_class: its color and dashes (`train`, `val`, `c0` to `c6`).
    """

    name: str
    css_class: str
    values: Sequence[float]


@dataclass(frozen=True)
class AxisScale:
    """Map values to pixels along one axis."""

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
    unit: str = "epoch",
    over: str | None = None,
) -> Markup:
    """Draw lines over epochs, with a gap for each value that is not finite.

    Args:
        label: the quantity and its unit.
        mark: an epoch to mark with a dotted line, usually the one whose weights were kept.
        unit: of `x`.
        over: `x` in the description; by default the plural of `unit`.
    """
    finite = [v for line in lines for v in line.values if math.isfinite(v)]
    if not finite or not x:
        return Markup("")
    x_scale = _axis_scale(min(x), max(x), MARGIN_LEFT, CHART_WIDTH - MARGIN_RIGHT)
    ticks = _ticks(min(finite), max(finite), 5)
    low, high = min(*finite, ticks[0]), max(*finite, ticks[-1])
    y_scale = _axis_scale(low, high, CHART_HEIGHT - MARGIN_BOTTOM, MARGIN_TOP)
    parts = [_x_axis(x_scale, x), _y_axis(y_scale, ticks, percent)]
    if mark is not None and min(x) <= mark <= max(x):
        parts.append(
            Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                _coordinate(x_scale(mark)), MARGIN_TOP, CHART_HEIGHT - MARGIN_BOTTOM
            )
        )
    for line in lines:
        parts += _draw_line(x_scale, y_scale, x, line)
    parts.append(_axis_name(unit))
    ends = "; ".join(_describe_line(line, percent) for line in lines)
    # A dense line is drawn solid, since its dashes would not be recognizable.
    css_class = "chart fine" if len(x) > 120 else "chart"
    description = f"{label} over {over or f'{unit}s'}. {ends}"
    return _svg(Markup("").join(parts), description, css_class)


def reliability_chart(
    confidence: Sequence[float], accuracy: Sequence[float], count: Sequence[int]
) -> Markup:
    """Draw the accuracy of each confidence bin as a bar, and the diagonal of perfect calibration.

    Args:
        confidence, accuracy, count: of each bin, as `metrics.reliability_bins` returns them.
    """
    bins = len(count)
    x_scale = AxisScale(0, 1, MARGIN_LEFT, CHART_WIDTH - MARGIN_RIGHT)
    y_scale = AxisScale(0, 1, CHART_HEIGHT - MARGIN_BOTTOM, MARGIN_TOP)
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    parts = [_y_axis(y_scale, ticks, True)]
    parts += [_x_tick(x_scale(tick), f"{tick:.0%}") for tick in ticks]
    total = sum(count)
    for number in range(bins):
        if not count[number]:
            continue
        left, right = x_scale(number / bins) + 1, x_scale((number + 1) / bins) - 1
        top, bottom = y_scale(accuracy[number]), y_scale(0)
        opacity = 0.3 + 0.7 * math.sqrt(count[number] / max(count))
        parts.append(
            Markup(
                '<rect class="bar" x="{}" y="{}" width="{}" height="{}" opacity="{}">'
                "<title>{}</title></rect>"
            ).format(
                _coordinate(left),
                _coordinate(top),
                _coordinate(right - left),
                _coordinate(max(bottom - top, 0.5)),
                f"{opacity:.2f}",
                f"{count[number]:,} of {total:,} images, mean confidence "
                f"{confidence[number]:.1%}, accuracy {accuracy[number]:.1%}",
            )
        )
        parts.append(
            Markup('<circle class="dot" cx="{}" cy="{}" r="3"/>').format(
                _coordinate(x_scale(confidence[number])), _coordinate(top)
            )
        )
    parts.append(
        Markup('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            _coordinate(x_scale(0)),
            _coordinate(y_scale(0)),
            _coordinate(x_scale(1)),
            _coordinate(y_scale(1)),
        )
    )
    parts.append(_axis_name("confidence"))
    bins_by_gap = [
        (abs(c - a), c, a) for c, a, n in zip(confidence, accuracy, count, strict=True) if n
    ]
    gap, worst_confidence, worst_accuracy = max(bins_by_gap)
    description = (
        f"Accuracy against confidence in {bins} bins; the largest gap is {100 * gap:.0f} points, "
        f"at confidence {worst_confidence:.0%} and accuracy {worst_accuracy:.0%}."
    )
    return _svg(Markup("").join(parts), description)


def interval_chart(
    low: float, high: float, value: float, baseline: float | None, description: str
) -> Markup:
    """Draw a share with its interval on a line from 0 to 100%.

    Args:
        baseline: the share that a trivial classifier reaches.
        description: the text alternative.
    """
    scale = AxisScale(0, 1, 4, 296)
    tick = Markup("")
    if baseline is not None:
        tick = Markup('<line class="ideal" x1="{0}" x2="{0}" y1="2" y2="22"/>').format(
            _coordinate(scale(baseline))
        )
    width = max(scale(high) - scale(low), 2)
    return Markup(
        '<svg class="interval" viewBox="0 0 300 24" role="img" aria-label="{}">'
        '<rect class="rail" x="4" y="10" width="292" height="4" rx="2"/>'
        '<rect class="fill" x="4" y="10" width="{}" height="4" rx="2"/>{}'
        '<rect class="span" x="{}" y="5" width="{}" height="14" rx="2"/></svg>'
    ).format(
        description,
        _coordinate(scale(value) - 4),
        tick,
        _coordinate(scale(low)),
        _coordinate(width),
    )


def _svg(inside: Markup, description: str, css_class: str = "chart") -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        css_class, CHART_WIDTH, CHART_HEIGHT, description, inside
    )


def _axis_scale(low: float, high: float, start: float, end: float) -> AxisScale:
    if low == high:  # a single epoch or a flat line is drawn in the middle
        low, high = low - 0.5, high + 0.5
    return AxisScale(low, high, start, end)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers around [low, high]."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _x_axis(scale: AxisScale, x: Sequence[float]) -> Markup:
    ticks = [t for t in _ticks(min(x), max(x), 6) if min(x) <= t <= max(x) and t == int(t)]
    return Markup("").join(_x_tick(scale(t), f"{t:,.0f}") for t in ticks or [x[0]])


def _x_tick(x: float, label: str) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        _coordinate(x), CHART_HEIGHT - MARGIN_BOTTOM + 16, label
    )


def _y_axis(scale: AxisScale, ticks: Sequence[float], percent: bool) -> Markup:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step * (100 if percent else 1)) + 1e-9))
    parts = []
    for tick in ticks:
        label = f"{100 * tick:.{digits}f}%" if percent else f"{tick:,.{digits}f}"
        y = scale(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(
                MARGIN_LEFT,
                CHART_WIDTH - MARGIN_RIGHT,
                _coordinate(y),
                _coordinate(y),
                MARGIN_LEFT - 7,
                _coordinate(y + 4),
                label,
            )
        )
    return Markup("").join(parts)


def _axis_name(name: str) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        CHART_WIDTH - MARGIN_RIGHT, CHART_HEIGHT - 4, name
    )


def _draw_line(
    x_scale: AxisScale, y_scale: AxisScale, x: Sequence[float], line: ChartLine
) -> list[Markup]:
    """Draw the segments between gaps as one path, and a dot for each point without neighbors."""
    values = np.asarray(line.values, dtype=np.float64)
    finite = np.isfinite(values)
    steps, dots = [], []
    for i in np.flatnonzero(finite).tolist():
        before = i > 0 and finite[i - 1]
        after = i + 1 < len(values) and finite[i + 1]
        px, py = _coordinate(x_scale(x[i])), _coordinate(y_scale(values[i]))
        if before or after:
            steps.append(f"{'L' if before else 'M'}{px} {py}")
        else:
            dots.append(
                Markup('<circle class="{} dot" cx="{}" cy="{}" r="3.5"/>').format(
                    line.css_class, px, py
                )
            )
    path = Markup('<path class="line {}" d="{}"/>').format(line.css_class, "".join(steps))
    return [*([path] if steps else []), *dots]


def _describe_line(line: ChartLine, percent: bool) -> str:
    values = [v for v in line.values if math.isfinite(v)]
    if not values:
        return f"{line.name}: none"
    first, last = (f"{v:.1%}" if percent else f"{v:.3g}" for v in (values[0], values[-1]))
    return f"{line.name} goes from {first} to {last}"


def _coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def color_swatch(css_class: str) -> Markup:
    """Return the sample of a line for a legend."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">'
        '<path class="line {}" d="M1 5L25 5"/></svg>'
    ).format(escape(css_class))

"""Charts as inline SVG: colours are CSS variables, so that they follow light, dark and print.

matplotlib's SVG would bring its own colours and 50 kB a figure. Every chart has a text that says
what it shows, and the page gives its numbers as a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDE, HIGH = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 36


@dataclass(frozen=True)
class Line:
    """A line of a chart; `look` is a CSS class of it (`train`, `val`, `c0` to `c6`)."""

    name: str
    look: str
    values: Sequence[float]


@dataclass(frozen=True)
class Scale:
    """From values to pixels, along one axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def chart(
    x: Sequence[float], lines: Sequence[Line], label: str, *,
    percent: bool = False, mark: float | None = None, along: str = "epoch",
) -> Markup:  # fmt: skip
    """Lines over epochs; gaps where a value is not finite, a dot where it stands alone.

    Args:
        label: what the values are, with their unit.
        mark: an epoch that gets a dotted line: the one whose weights were kept.
    """
    finite = [v for line in lines for v in line.values if math.isfinite(v)]
    if not finite or not x:
        return Markup("")
    across = _scale(min(x), max(x), LEFT, WIDE - RIGHT)
    ticks = _ticks(min(finite), max(finite), 5)
    up = _scale(min(*finite, ticks[0]), max(*finite, ticks[-1]), HIGH - BOTTOM, TOP)
    parts = [_across(across, x), _up(up, ticks, percent)]
    if mark is not None and min(x) <= mark <= max(x):
        at = across(mark)
        parts.append(Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
            _n(at), TOP, HIGH - BOTTOM))  # fmt: skip
    for line in lines:
        parts += _path(across, up, x, line)
    parts.append(_axis_name(along))
    ends = "; ".join(_end(line, percent) for line in lines)
    look = "chart fine" if len(x) > 120 else "chart"  # dashes of a jagged line are no dashes
    return _svg(Markup("").join(parts), f"{label} over {along}s. {ends}", look)


def reliability(
    confidence: Sequence[float], right: Sequence[float], count: Sequence[int]
) -> Markup:
    """Bars of accuracy against the confidence of each bin, and the diagonal of honesty."""
    bins = len(count)
    across = Scale(0, 1, LEFT, WIDE - RIGHT)
    up = Scale(0, 1, HIGH - BOTTOM, TOP)
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    parts = [_up(up, ticks, True)]
    parts += [_tick(across(tick), f"{tick:.0%}") for tick in ticks]
    total = sum(count)
    for number in range(bins):
        if not count[number]:
            continue
        x0, x1 = across(number / bins) + 1, across((number + 1) / bins) - 1
        top, base = up(right[number]), up(0)
        shade = 0.3 + 0.7 * math.sqrt(count[number] / max(count))
        parts.append(Markup(
            '<rect class="bar" x="{}" y="{}" width="{}" height="{}" opacity="{}">'
            "<title>{}</title></rect>"
        ).format(
            _n(x0), _n(top), _n(x1 - x0), _n(max(base - top, 0.5)), f"{shade:.2f}",
            f"{count[number]:,} of {total:,} images, on average {confidence[number]:.1%} sure: "
            f"{right[number]:.1%} right",
        ))  # fmt: skip
        parts.append(Markup('<circle class="dot" cx="{}" cy="{}" r="3"/>').format(
            _n(across(confidence[number])), _n(top)))  # fmt: skip
    parts.append(Markup('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        _n(across(0)), _n(up(0)), _n(across(1)), _n(up(1))))  # fmt: skip
    parts.append(_axis_name("how sure the model is"))
    worst = max(
        (abs(c - r), c, r) for c, r, n in zip(confidence, right, count, strict=True) if n
    )  # fmt: skip
    said = (
        f"Share of right answers against confidence in {bins} bins; the largest gap is "
        f"{100 * worst[0]:.0f} points, at {worst[1]:.0%} sure and {worst[2]:.0%} right."
    )
    return _svg(Markup("").join(parts), said)


def interval(low: float, high: float, at: float, floor: float | None, everything: str) -> Markup:
    """A share with its interval on the line from 0 to 100%; `floor` is what guessing reaches."""
    scale = Scale(0, 1, 4, 296)
    tick = Markup("")
    if floor is not None:
        tick = Markup('<line class="ideal" x1="{0}" x2="{0}" y1="2" y2="22"/>').format(
            _n(scale(floor))
        )
    width = max(scale(high) - scale(low), 2)
    return Markup(
        '<svg class="interval" viewBox="0 0 300 24" role="img" aria-label="{}">'
        '<rect class="rail" x="4" y="10" width="292" height="4" rx="2"/>'
        '<rect class="fill" x="4" y="10" width="{}" height="4" rx="2"/>{}'
        '<rect class="span" x="{}" y="5" width="{}" height="14" rx="2"/></svg>'
    ).format(everything, _n(scale(at) - 4), tick, _n(scale(low)), _n(width))


def _svg(inside: Markup, said: str, look: str = "chart") -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        look, WIDE, HIGH, said, inside
    )


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    if low == high:  # a single epoch, or a flat line, in the middle
        low, high = low - 0.5, high + 0.5
    return Scale(low, high, start, end)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers around [low, high], about `wanted` of them."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _across(scale: Scale, x: Sequence[float]) -> Markup:
    ticks = [t for t in _ticks(min(x), max(x), 6) if min(x) <= t <= max(x) and t == int(t)]
    return Markup("").join(_tick(scale(t), f"{t:,.0f}") for t in ticks or [x[0]])


def _tick(at: float, words: str) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        _n(at), HIGH - BOTTOM + 16, words
    )


def _up(scale: Scale, ticks: Sequence[float], percent: bool) -> Markup:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step * (100 if percent else 1)) + 1e-9))
    parts = []
    for tick in ticks:
        words = f"{100 * tick:.{digits}f}%" if percent else f"{tick:,.{digits}f}"
        y = scale(tick)
        parts.append(Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
        ).format(LEFT, WIDE - RIGHT, _n(y), _n(y), LEFT - 7, _n(y + 4), words))  # fmt: skip
    return Markup("").join(parts)


def _axis_name(words: str) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        WIDE - RIGHT, HIGH - 4, words
    )


def _path(across: Scale, up: Scale, x: Sequence[float], line: Line) -> list[Markup]:
    """The pieces between gaps as one path, and a dot for each point without neighbours."""
    values = np.asarray(line.values, dtype=np.float64)
    good = np.isfinite(values)
    steps, dots = [], []
    for i in np.flatnonzero(good).tolist():
        before = i > 0 and good[i - 1]
        after = i + 1 < len(values) and good[i + 1]
        px, py = _n(across(x[i])), _n(up(values[i]))
        if before or after:
            steps.append(f"{'L' if before else 'M'}{px} {py}")
        else:
            dots.append(Markup('<circle class="{} dot" cx="{}" cy="{}" r="3.5"/>').format(
                line.look, px, py))  # fmt: skip
    path = Markup('<path class="line {}" d="{}"/>').format(line.look, "".join(steps))
    return [*([path] if steps else []), *dots]


def _end(line: Line, percent: bool) -> str:
    values = [v for v in line.values if math.isfinite(v)]
    if not values:
        return f"{line.name}: none"
    first, last = (f"{v:.1%}" if percent else f"{v:.3g}" for v in (values[0], values[-1]))
    return f"{line.name} goes from {first} to {last}"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def swatch(look: str) -> Markup:
    """The piece of line that stands in a legend."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">'
        '<path class="line {}" d="M1 5L25 5"/></svg>'
    ).format(escape(look))

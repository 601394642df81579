"""From named parts to one HTML file that needs nothing else: no network, no second file.

Everything that is filled in is escaped (Jinja's autoescape is on for every template). Names of
classes and files come from users and folders, so JSON within a script is escaped, too: a class
called `</script>` must stay a class.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from convlens.reporting.thumbnails import data_uri
from convlens.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

# A part of the page: its heading, and what draws it from what was gathered. Where there is nothing
# to show it returns None, and the part is left out.
Section = tuple[str, Callable[[Any], Markup | None]]


@dataclass(frozen=True)
class Figure:
    """A picture that is ready: PNG, WebP, JPEG or SVG bytes, what it shows, and words below it."""

    content: bytes
    alt: str
    caption: str = ""

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return data_uri(self.content, _kind(self.content))


def figures(pictures: Sequence[Figure], lead: str = "") -> Markup | None:
    """A section of finished pictures, each on white paper; None if there are none."""
    return render("figures.html", pictures=pictures, lead=lead) if pictures else None


def compose(
    title: str, head: Callable[[], Markup], sections: Mapping[str, Section], found: object
) -> str:  # fmt: skip
    """The whole file: the head of the page, then every section that has something to show.

    `head` is drawn last: it says, too, what the sections found missing.
    """
    parts = []
    for name, (heading, draw) in sections.items():
        html = draw(found)
        if html is not None:
            parts.append({"id": name, "title": heading, "html": html})
    return str(render("page.html", title=title, head=head(), sections=parts, version=__version__))


def render(template: str, **values: Any) -> Markup:
    """A template with its values, all of them escaped unless they are `Markup`."""
    return Markup(_environment().get_template(template).render(**values))


def embedded(content: object) -> Markup:
    """JSON that can stand inside `<script type="application/json">`, whatever strings it holds."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&'":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("convlens.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": share, "number": number, "count": count, "points": points, "seconds": seconds,
        "embedded": embedded,
    }  # fmt: skip
    environment.globals |= {"asset": _asset}
    return environment


def _asset(name: str) -> Markup:
    """Our own script or style, as it stands."""
    return Markup((resources.files("convlens.reporting") / "templates" / name).read_text("utf-8"))


def share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}%}"


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def points(value: float) -> str:
    """A difference of shares, e.g. `+1.3 points`."""
    return f"{100 * value:+.1f} points".replace("-", "−")


def seconds(value: float | None) -> str:
    """Time as people say it."""
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.1f} s"
    minutes = value / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _kind(content: bytes) -> str:
    if content.startswith(b"\x89PNG"):
        return "image/png"
    if content.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if content[8:12] == b"WEBP":
        return "image/webp"
    if b"<svg" in content[:2000]:
        return "image/svg+xml"
    raise ValueError("a figure is PNG, JPEG, WebP or SVG")

"""HTML for notebooks: the `_repr_html_` of results. All text is escaped, figures are embedded."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

MAX_FIGURES = 6  # shown for one result; the others are named


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of plain text."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def link(path: Path) -> str:
    """Return a link to a file. A relative path is relative to the folder of the notebook."""
    address = path.as_uri() if path.is_absolute() else quote(path.as_posix())
    return f'<p><a href="{address}" target="_blank">{html.escape(str(path))}</a></p>'


def embed_figures(paths: Iterable[Path]) -> str:
    """Return PNG files as embedded images; other files and missing ones are left out."""
    existing = [path for path in paths if path.suffix == ".png" and path.is_file()]
    images = []
    for path in existing[:MAX_FIGURES]:
        content = base64.b64encode(path.read_bytes()).decode("ascii")
        images.append(
            f'<img alt="{html.escape(path.stem)}" style="max-width: 100%" '
            f'src="data:image/png;base64,{content}">'
        )
    hidden = [str(path) for path in existing[MAX_FIGURES:]]
    return "".join(images) + "".join(paragraph(path) for path in hidden)

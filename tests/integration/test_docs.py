"""Links in the documentation lead somewhere, and its lines are short."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from helpers.paths import REPOSITORY

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
UNCHECKED = ("BENCHMARKS.md", "CHANGELOG.md", "docs/log.md", "docs/reference/")  # tables, history
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text("utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_to_a_file_and_a_heading(page: str) -> None:
    path = REPOSITORY / page
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, fragment = target.partition("#")
        linked = (path.parent / unquote(file)).resolve() if file else path
        assert linked.exists(), f"{page}: {target}"
        assert linked.is_relative_to(REPOSITORY), f"{page}: {target}"
        if fragment and linked.suffix == ".md":
            headings = [anchor(heading) for heading in HEADING.findall(prose(linked))]
            assert fragment in headings, f"{page}: {target}"


def test_links_are_found() -> None:
    found = {page: len(LINK.findall(prose(REPOSITORY / page))) for page in PAGES}
    assert found["README.md"] > 10
    assert found["docs/reliability.md"] > 60
    assert LINK.findall("a [b `c[0]`](d.md#e) ![f](g.png)") == ["d.md#e", "g.png"]


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(UNCHECKED)])
def test_lines_are_short(page: str) -> None:
    for number, line in enumerate((REPOSITORY / page).read_text("utf-8").splitlines(), 1):
        assert len(line) <= 120, f"{page}, line {number}"

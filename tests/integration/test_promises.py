"""Each guarantee of docs/reliability.md links to tests that exist."""

from __future__ import annotations

import re

from helpers.paths import REPOSITORY

TEXT = (REPOSITORY / "docs/reliability.md").read_text("utf-8")
GUARANTEES = [item for item in re.split(r"\n(?=- |\n)", TEXT) if item.startswith("- **")]
PAGES = ("design", "distributed", "glossary", "reliability", "user-code")
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./([^)]+)\)")


def test_each_guarantee_links_to_a_test() -> None:
    assert len(GUARANTEES) > 40
    for item in GUARANTEES:
        _, tests, links = item.partition("Tests:")
        assert tests, item
        assert LINK.search(links), item


def test_each_link_leads_to_the_named_test_or_file() -> None:
    links = LINK.findall(TEXT)
    assert len(links) > 60
    for words, target in links:
        path, name = REPOSITORY / target, words.split()[0]
        assert path.exists(), target
        if name.startswith("test_"):
            assert f"def {name}(" in path.read_text("utf-8"), name
        else:
            assert name == target


def test_lines_of_the_docs_are_short() -> None:
    for page in ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in PAGES)):
        for number, line in enumerate((REPOSITORY / page).read_text("utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{page}, line {number}"

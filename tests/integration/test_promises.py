"""Each promise of docs/reliability.md leads to a test that there is, and says what was seen."""

from __future__ import annotations

import re

from helpers.paths import REPOSITORY

ROOT = REPOSITORY
TEXT = (ROOT / "docs/reliability.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| promise")
]
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./([^)]+)\)")


def test_each_promise_has_a_test_and_a_figure() -> None:
    assert len(ROWS) > 40
    for row in ROWS:
        promise, test, seen = row
        assert seen, promise
        assert LINK.search(test) or test.startswith("the same"), promise


def test_each_link_leads_to_what_it_names() -> None:
    links = LINK.findall(TEXT)
    assert len(links) > 60
    for words, target in links:
        path, name = ROOT / target, words.split()[0]
        assert path.exists(), target
        if name.startswith("test_"):
            assert f"def {name}(" in path.read_text("utf-8"), name
        else:
            assert name == target

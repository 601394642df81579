"""Cells that a spreadsheet would run as formulas are escaped, and read back unchanged."""

from __future__ import annotations

import pytest

from convlens.data.image_list import escape_csv_formula, unescape_csv_formula

FORMULAS = ["=cmd|' calc'!A0", "+1", "-two", "@me", "'=x", "''=1"]
TEXTS = ["a,b", 'say "x"', "new\nline", "'quoted", "", "plain", "007", "'"]


@pytest.mark.parametrize("text", [*FORMULAS, *TEXTS])
def test_an_escaped_cell_is_not_a_formula_and_is_read_back_unchanged(text: str) -> None:
    escaped = escape_csv_formula(text)
    assert not escaped.startswith(("=", "+", "-", "@"))
    assert unescape_csv_formula(escaped) == text
    assert (escaped == text) == (text in TEXTS)

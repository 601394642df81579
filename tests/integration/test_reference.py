"""Generated files are up to date."""

from __future__ import annotations

import pytest

import reference
from helpers.paths import REPOSITORY


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_generated_file_is_up_to_date(name: str) -> None:
    path = REPOSITORY / name
    assert path.read_text("utf-8") == reference.PAGES[name](), "run `python tools/reference.py`"

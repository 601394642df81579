"""One small run on digits, and a client of the server, for all tests of `explore/`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import convlens
from helpers.exploring import Page, open_page
from helpers.support import TINY, working_in


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run `small`, whose test split is sealed."""
    root = tmp_path_factory.mktemp("explored")
    with working_in(root):
        convlens.train(TINY, name="small", test=False, quiet=True)
    return root


@pytest.fixture(scope="module")
def page(explored: Path) -> Iterator[Page]:
    """A client that has the cookie, of a server for `small`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(explored)
        with open_page() as page:
            yield page

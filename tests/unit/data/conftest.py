"""Fixtures for the tests of data sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from convlens.data import download


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root, with mirrors that refuse connections."""
    root = tmp_path / "sets"
    root.mkdir()
    monkeypatch.setenv("CONVLENS_DATA", str(root))
    monkeypatch.setattr(download, "SOCKET_TIMEOUT_S", 2.0)
    for name, dataset in download.DOWNLOADS.items():
        unreachable = replace(dataset, mirrors=("http://127.0.0.1:9/",))
        monkeypatch.setitem(download.DOWNLOADS, name, unreachable)
    return root

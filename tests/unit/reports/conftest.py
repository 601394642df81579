"""Finished runs for the tests of reports, trained once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import convlens
from convlens.reports import sections
from convlens.reports.build import Report
from helpers.commands import pictures
from helpers.reports import HOSTILE_CLASSES
from helpers.support import TINY

HOSTILE_NET = {"data.image_size": 8, "model.widths": [2, 4], "train.epochs": 2, "augment": []}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs: `small` on digits, `hostile` (with its images), `sealed`."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("CONVLENS_CACHE", str(root / "cache"))
        convlens.train(TINY, name="small", quiet=True)
        convlens.train(TINY, name="sealed", test=False, quiet=True)
        images = pictures(root / "images", dict.fromkeys(HOSTILE_CLASSES, 16))
        convlens.train(str(images), HOSTILE_NET, name="hostile", quiet=True)
    return root


@pytest.fixture
def runs(trained: Path) -> None:
    """Copies of the trained runs, which a test may change."""
    shutil.copytree(trained / "models", "models")


@pytest.fixture(scope="session")
def small_report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report of `small`, for tests that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("small"))
        patch.setenv("CONVLENS_CACHE", str(trained / "cache"))
        shutil.copytree(trained / "models", "models")
        report = convlens.report("small")
        return replace(report, path=report.path.absolute())


@pytest.fixture
def without_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the sections that look inside the network, which take most of the time."""
    kept = {k: v for k, v in sections.SECTIONS.items() if k not in sections.INSIDE_SECTIONS}
    monkeypatch.setattr(sections, "SECTIONS", kept)

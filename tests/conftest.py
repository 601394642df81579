"""Fixtures and settings of all tests: own folders, no real data, one thread, marks that skip."""

from __future__ import annotations

import gc
import io
import os
import signal
from pathlib import Path

import pytest

from convlens.utils import process

# Must be set before torch is imported, as on the command line (see `process.set_up`).
process.set_environment()
gc.set_threshold(process.GC_THRESHOLD)
# On a shared machine two threads that wait for each other are slower than one, and tiny networks
# do not profit from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Plots take three quarters of the time of the smallest trainings; tests marked `figures` draw them.
os.environ["CONVLENS_FIGURES"] = "none"

# Processes in the background of a shell ignore Ctrl-C, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: respected, not inherited
    signal.signal(signal.SIGHUP, lambda *_: None)

pytest_plugins = ["helpers.interrupted_runs"]  # for its fixture `interrupting`

REPOSITORY = Path(__file__).parent.parent
DATA = REPOSITORY / "data"
# `make demo` also writes there.
HAS_REAL_DATA = all((DATA / name).is_dir() for name in ("MNIST", "flowers"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_finish() -> None:
    # Otherwise each full garbage collection searches the million objects of torch and of the
    # collected tests, and some tests take half a second longer at random.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # some libraries warn of objects that are left at exit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    skips = {
        "data": None if HAS_REAL_DATA else "data/ has no MNIST and flowers",
        "gpu": None if torch.cuda.is_available() else "there is no CUDA device",
        "slow": None if config.getoption("--slow") else "run with --slow",
    }
    for item in items:
        for mark, reason in skips.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def own_folders(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run each test in an empty folder with its own cache and without the user's data."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("CONVLENS_CACHE", str(tmp_path / "cache"))
    if request.node.get_closest_marker("figures"):
        monkeypatch.delenv("CONVLENS_FIGURES", raising=False)
    else:
        monkeypatch.setenv("CONVLENS_FIGURES", "none")
    # What a power cut would lose does not matter here; an fsync takes milliseconds.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    data = DATA if request.node.get_closest_marker("data") else tmp_path / "no-data"
    monkeypatch.setenv("CONVLENS_DATA", str(data))


@pytest.fixture
def figures_of_one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write all figures as the same tiny image, for tests of their names and of messages.

    Rendering takes most of the time of a figure, and the tests of `plots` look at the pixels.
    """
    from PIL import Image

    from convlens.plots import style

    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    monkeypatch.setattr(style, "_draw", lambda *_: (stream.getvalue(), frozenset()))

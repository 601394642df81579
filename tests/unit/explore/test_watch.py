"""The table of runs is that of their files, curves are those of the report, and trainings stop."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from convlens.explore import watch
from convlens.explore.jobs import started_jobs
from convlens.explore.watch import RunStates
from convlens.explore.workspace import Workspace
from convlens.metrics import wilson_interval
from convlens.run import METRICS_COLUMNS, RunDir
from convlens.utils import process
from helpers.exploring import Page


def row(epoch: int, **values: float) -> dict[str, float]:
    return {**dict.fromkeys(METRICS_COLUMNS, 0.5), "epoch": epoch, **values}


@pytest.fixture
def states(explored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStates:
    """The table of a folder with the run `small` and a copy of it that is not finished."""
    shutil.copytree(explored / "models", tmp_path / "models")
    shutil.copytree(tmp_path / "models/small", tmp_path / "models/open")
    monkeypatch.chdir(tmp_path)
    unfinished = RunDir(tmp_path / "models/open")
    content = {key: v for key, v in unfinished.metadata().items() if key != "epochs"}
    content |= {"status": "training"}
    (tmp_path / "models/open/run.json").write_text(json.dumps(content))
    unfinished.write_metrics(
        [row(n, val_accuracy=0.75, seconds=4.0, images_per_second=50) for n in (1, 2)]
    )
    with started_jobs() as jobs:
        return RunStates(Workspace([], jobs))


def by_name(states: RunStates) -> dict[str, dict[str, Any]]:
    return {each["run"]: each for each in states.read()}


def test_a_finished_run_has_the_accuracy_of_its_kept_epoch(states: RunStates) -> None:
    run_dir = RunDir(Path("models/small"))
    metadata, rows = run_dir.metadata(), run_dir.metrics()
    found = by_name(states)["small"]
    accuracy = rows[metadata["kept_epoch"] - 1]["val_accuracy"]
    n = len(validation_images(run_dir))
    assert found["state"] == "finished"
    assert (found["epoch"], found["epochs"]) == (len(rows), metadata["epochs"])
    assert found["accuracy"] == accuracy
    assert found["split"] == "validation"  # the test split is sealed
    assert (found["low"], found["high"]) == wilson_interval(round(accuracy * n), n)
    assert "images_per_second" not in found


def validation_images(run_dir: RunDir) -> list[str]:
    """The images that `split.csv` lists as held out for validation."""
    lines = (run_dir.path / "split.csv").read_text().splitlines()
    return [line for line in lines if line.endswith(",val")]


def test_an_opened_test_split_replaces_validation(states: RunStates) -> None:
    result = {"split": "test", "accuracy": 0.8, "interval95": [0.7, 0.9]}
    Path("models/small/results.json").write_text(json.dumps([result]))
    found = by_name(states)["small"]
    assert (found["accuracy"], found["low"], found["high"]) == (0.8, 0.7, 0.9)
    assert found["split"] == "test"


def test_a_run_trains_while_its_process_lives(states: RunStates) -> None:
    run_dir, path = RunDir(Path("models/open")), Path("models/open/trainer.json")
    assert by_name(states)["open"]["state"] == "interrupted"
    with run_dir.recorded_trainer():
        first, _ = states.read()
        assert (first["run"], first["state"]) == ("open", "training")
        epochs = int(run_dir.recipe().train.epochs)
        assert first["seconds_left"] == 4.0 * (epochs - 2)
        assert first["images_per_second"] == 50
        run_dir.write_metrics([row(n, seconds=4.0) for n in (1, 2, 3)])
        assert by_name(states)["open"]["epoch"] == 3
    assert not path.exists()
    identity = process.identify_process()
    path.write_text(json.dumps({**identity, "started": 1}))  # a later process has its number
    assert by_name(states)["open"]["state"] == "interrupted"
    path.write_text(json.dumps({**identity, "host": "elsewhere"}))
    assert by_name(states)["open"]["state"] == "on another machine"


def test_files_are_read_again_only_if_they_change(
    states: RunStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = []
    original = watch.describe_run

    def record(run: str, run_dir: RunDir) -> dict[str, Any]:
        described.append(run)
        return original(run, run_dir)

    monkeypatch.setattr(watch, "describe_run", record)
    states.read()
    states.read()
    assert described == ["open", "small"]
    RunDir(Path("models/open")).write_metrics([row(1)])
    states.read()
    assert described == ["open", "small", "open"]


@pytest.mark.parametrize("damage", [b"\xff", b"{}", b"[1]", b'{"data": {"splits": 3}}'])
def test_a_damaged_run_does_not_hide_the_others(states: RunStates, damage: bytes) -> None:
    Path("models/open/run.json").write_bytes(damage)
    found = by_name(states)
    assert found["small"]["state"] == "finished"
    assert found["open"]["state"] in ("damaged", "interrupted")


def test_events_follow_the_files(states: RunStates) -> None:
    async def collect() -> list[list[dict[str, Any]]]:
        stopping = threading.Event()
        found = []
        async for event in watch._events(states, stopping):
            assert event.startswith("data: ")
            assert event.endswith("\n\n")
            found.append(json.loads(event.removeprefix("data: "))["runs"])
            if len(found) == 1:
                RunDir(Path("models/open")).write_metrics([row(n) for n in (1, 2, 3)])
            else:
                stopping.set()
        return found

    first, second = asyncio.run(asyncio.wait_for(collect(), 60))
    epochs = [{each["run"]: each["epoch"] for each in rows}["open"] for rows in (first, second)]
    assert epochs == [2, 3]


def test_curves_are_those_of_the_report(page: Page) -> None:
    from convlens.reports.sections import training_curves

    rows = RunDir(page.workspace.path("small")).metrics()
    kept = RunDir(page.workspace.path("small")).metadata()["kept_epoch"]
    html = page.post("/api/watch/curves", {"runs": ["small"]})["html"]
    for chart in training_curves(rows, kept):
        assert str(chart["svg"]) in html
    assert "<script" not in html
    assert page.send("/api/watch/curves", {"runs": ["../small"]}).status_code == 400
    assert page.send("/api/watch/curves", {"runs": []}).status_code == 400


def test_a_training_is_asked_to_stop(page: Page) -> None:
    refused = page.send("/api/watch/stop", {"run": "small"})
    assert refused.status_code == 400
    assert refused.json()["error"] == "the run is not being trained"
    path = page.workspace.path("small") / "trainer.json"
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        identity = process.identify_process(trainer.pid)
        path.write_text(json.dumps({**identity, "host": "elsewhere"}))
        assert (
            "on another machine (elsewhere)" in page.send("/api/watch/stop", {"run": "small"}).text
        )
        path.write_text(json.dumps(identity))
        assert page.post("/api/watch/stop", {"run": "small"}) == {"run": "small"}
        assert trainer.wait(60) == -signal.SIGTERM
    finally:
        trainer.kill()
        trainer.wait()
        path.unlink()

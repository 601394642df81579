"""Killed and resumed trainings give the same bits: one here, fifty in `make chaos`."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import selftest
from convlens import serialization
from convlens.errors import ResourceError, UsageError
from convlens.run import RunDir
from helpers.interrupted_runs import finish
from helpers.launching import wait_until
from helpers.support import begin, tiny


def test_a_killed_training_ends_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selftest.py", "--kills", "1", "--json"])
    monkeypatch.setitem(selftest.RECIPE["train"], "epochs", 10)
    assert selftest.main() == 0
    out, err = capsys.readouterr()
    score = json.loads(out)
    assert score["same"] == score["kills"] == 1
    assert "1/1 ended with the same bits" in err


@pytest.mark.slow
def test_a_training_with_one_of_two_processes_killed_ends_with_the_same_bits() -> None:
    score = selftest.kill_and_resume(1, processes=2)
    assert score.same == len(score.kills) == 1, score.to_dict()


# A stand-in for torchrun. Its worker has its own session, as torch's workers have.
STAND_IN = """
import subprocess, sys, time
def start():
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                              start_new_session=True)
    print("worker", worker.pid, flush=True)
    return worker
"""
STARTS_LATE = "time.sleep(0.5); print('ended with', start().wait(), flush=True)"
FAILS = "start().wait(); sys.exit('cannot start another worker')"
HANGS = "start().wait(); start(); print('hanging', flush=True); time.sleep(600)"


def launched(
    monkeypatch: pytest.MonkeyPatch, program: str, popen: type = subprocess.Popen
) -> selftest._Training:
    """Return a training of two processes whose command is `program`."""

    def start(training: selftest._Training) -> subprocess.Popen[bytes]:
        training.folder.mkdir(parents=True, exist_ok=True)
        with (training.folder / "log.txt").open("ab") as log:
            return popen(
                [sys.executable, "-c", STAND_IN + program],
                cwd=training.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    monkeypatch.setattr(selftest._Training, "start", start)
    return selftest._Training(Path("trial").absolute(), 2)


def workers(training: selftest._Training) -> list[int]:
    words = (training.folder / "log.txt").read_text().split()
    return [int(words[n + 1]) for n, word in enumerate(words) if word == "worker"]


def test_only_a_kill_of_a_running_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen moment may be before the process starts or after it ends."""
    training = launched(monkeypatch, STARTS_LATE)
    assert training.kill(0.0, random.Random(0))
    assert "ended with -9" in (training.folder / "log.txt").read_text()
    assert not launched(monkeypatch, "sys.exit(0)").kill(0.0, random.Random(0))
    with pytest.raises(ResourceError, match="torchrun ended with 3"):
        launched(monkeypatch, "sys.exit(3)").kill(0.0, random.Random(0))
    with pytest.raises(ResourceError, match="torchrun ended with 3"):
        launched(monkeypatch, "sys.exit(3)").kill(30.0, random.Random(0))


def test_a_torchrun_that_fails_after_the_kill_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uninterrupted = launched(monkeypatch, FAILS)
    kill = selftest._killed(Path("trial").absolute(), uninterrupted, random.Random(0), 0.0, 0.1)
    (difference,) = kill.differences
    assert difference.startswith("torchrun ended with 1\n")
    assert "cannot start another worker" in difference
    assert selftest.Score([kill], 2).same == 0


def test_a_hanging_torchrun_leaves_no_worker_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Path("trial/log.txt")

    class TimesOut(subprocess.Popen):  # type: ignore[type-arg]
        """A process whose wait with a timeout fails as soon as the program hangs."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            wait_until(lambda: "hanging" in log.read_text(), self)
            raise subprocess.TimeoutExpired("torchrun", timeout)

    training = launched(monkeypatch, HANGS, TimesOut)
    with pytest.raises(ResourceError, match="torchrun hangs"):
        training.kill(0.0, random.Random(0))
    started = workers(training)
    assert len(started) == 2
    assert not [pid for pid in started if selftest._lives(str(pid))]


def test_too_many_processes_are_refused() -> None:
    """torchrun would build a list of all of them, which exhausts memory."""
    with pytest.raises(UsageError, match="--processes 2,147,483,648: at most 64"):
        selftest.kill_and_resume(1, processes=2**31)


def test_several_processes_need_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "PROC", Path("none"))
    with pytest.raises(UsageError, match="only be seen on Linux"):
        selftest.kill_and_resume(1, processes=2)


def test_every_difference_between_runs_is_found() -> None:
    """A comparison that detects nothing would call any two runs equal."""
    one, other = finish(tiny(), "one"), finish(tiny(), "other")
    assert selftest.differences(one, other) == []
    for name, change, message in (
        ("model.safetensors", _change_last_bit, "the model: 1 of"),
        (f"state/{_state(other)}", _change_last_bit, "the state: 1 of"),
        ("metrics.csv", _change_metrics, "metrics.csv"),
        (
            "run.json",
            lambda path: RunDir(path.parent).update_metadata({"kept_epoch": 9}),
            "run.json: kept_epoch",
        ),
        ("recipe.yaml", lambda path: path.write_text(path.read_text() + "\n"), "recipe.yaml"),
    ):
        copy = RunDir(Path("copy") / "other")
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree(other.path, copy.path)
        change(copy.path / name)
        (difference,) = selftest.differences(one, copy)
        assert difference.startswith(message)


def _state(run_dir: RunDir) -> str:
    return next((run_dir.path / "state").glob("*.safetensors")).name


def _change_metrics(path: Path) -> None:
    """Change the loss of one row."""
    run_dir = RunDir(path.parent)
    rows = run_dir.metrics()
    run_dir.write_metrics([{**rows[0], "val_loss": 9.0}, *rows[1:]])


def _change_last_bit(path: Path) -> None:
    """Change the last bit of one weight and update the hash."""
    tensors, model_metadata = serialization.read_model_file(path)
    name = next(n for n, t in tensors.items() if t.ndim > 1 and t.is_floating_point())
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))
    content = {k: v for k, v in model_metadata.items() if k not in ("sha256", "format")}
    serialization.write_model_file(path, tensors, content)


@pytest.mark.slow
def test_the_recipe_stops_early() -> None:
    """Kills should not all fall into the same last epoch."""
    run_dir = finish(selftest.load_recipe(selftest.RECIPE), "x")
    assert len(run_dir.metrics()) < selftest.RECIPE["train"]["epochs"]


def test_the_recipe_uses_every_feature_that_affects_the_bits() -> None:
    job, _ = begin(selftest.load_recipe(selftest.RECIPE), "x")
    assert job.averager is not None
    assert job.recipe.train.patience
    assert any(isinstance(m, torch.nn.Dropout) for m in job.model.modules())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in job.model.modules())
    assert any(name == "MixUp" for name, _ in job.recipe.operations)

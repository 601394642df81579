"""Killed and resumed trainings end with the same bits: one here, fifty in `make chaos`."""

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
from helpers.commands import environment
from helpers.interrupted_runs import finish
from helpers.support import begin, tiny


def test_a_killed_training_ends_with_the_same_bits() -> None:
    command = [sys.executable, selftest.__file__, "--kills", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    assert score["same"] == score["kills"] == 1
    assert "1/1 ended with the same bits" in done.stderr


@pytest.mark.slow
def test_of_two_processes_one_is_killed() -> None:
    score = selftest.kill_and_resume(1, processes=2)
    assert score.same == len(score.kills) == 1, score.to_dict()


# A stand-in for torchrun: its one worker has a session of its own, as torch's have.
STAND_IN = """
import subprocess, sys, time
def start():
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"],
                              start_new_session=True)
    print("worker", worker.pid, flush=True)
    return worker
"""
LATE = "time.sleep(0.5); print('ended with', start().wait(), flush=True)"
FAILS = "start().wait(); sys.exit('no room for another one')"
HANGS = "start().wait(); start(); print('hanging', flush=True); time.sleep(30)"


def launched(monkeypatch: pytest.MonkeyPatch, program: str) -> selftest._Training:
    """A training of two processes that is this program."""

    def start(training: selftest._Training) -> subprocess.Popen[bytes]:
        training.folder.mkdir(parents=True, exist_ok=True)
        with (training.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
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


def test_only_a_real_kill_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment may come before there is anybody to kill, or after."""
    training = launched(monkeypatch, LATE)
    assert training.kill(0.0, random.Random(0))
    assert "ended with -9" in (training.folder / "log.txt").read_text()
    assert not launched(monkeypatch, "sys.exit(0)").kill(0.0, random.Random(0))
    with pytest.raises(ResourceError, match="torchrun ended with 3"):
        launched(monkeypatch, "sys.exit(3)").kill(0.0, random.Random(0))
    with pytest.raises(ResourceError, match="torchrun ended with 3"):
        launched(monkeypatch, "sys.exit(3)").kill(30.0, random.Random(0))


def test_a_torchrun_that_fails_after_the_kill_is_a_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = launched(monkeypatch, FAILS)
    kill = selftest._killed(Path("trial").absolute(), whole, random.Random(0), 0.0, 0.1)
    (difference,) = kill.differences
    assert difference.startswith("torchrun ended with 1\n")
    assert "no room for another one" in difference
    assert selftest.Score([kill], 2).same == 0


def test_a_torchrun_that_hangs_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "HANG_TIMEOUT_S", 3)
    training = launched(monkeypatch, HANGS)
    with pytest.raises(ResourceError, match="torchrun hangs"):
        training.kill(0.0, random.Random(0))
    started = workers(training)
    assert len(started) == 2
    assert not [pid for pid in started if selftest._lives(str(pid))]


def test_too_many_processes_are_refused() -> None:
    """torchrun would list them all, and take all memory for it."""
    with pytest.raises(UsageError, match="--processes 2,147,483,648: at most 64"):
        selftest.kill_and_resume(1, processes=2**31)


def test_several_processes_need_a_list_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "PROC", Path("none"))
    with pytest.raises(UsageError, match="only be seen on Linux"):
        selftest.kill_and_resume(1, processes=2)


def test_differences_are_found() -> None:
    """A comparison that sees nothing would find all equal."""
    one, other = finish(tiny(), "one"), finish(tiny(), "other")
    assert selftest.differences(one, other) == []
    for name, change, said in (
        ("model.safetensors", _nudged, "the model: 1 of"),
        (f"state/{_state(other)}", _nudged, "the state: 1 of"),
        ("metrics.csv", _other_metrics, "metrics.csv"),
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
        (found,) = selftest.differences(one, copy)
        assert found.startswith(said)


def _state(place: RunDir) -> str:
    return next((place.path / "state").glob("*.safetensors")).name


def _other_metrics(path: Path) -> None:
    """Another loss in one row."""
    place = RunDir(path.parent)
    rows = place.metrics()
    place.write_metrics([{**rows[0], "val_loss": 9.0}, *rows[1:]])


def _nudged(path: Path) -> None:
    """The file with the last bit of one weight changed, and a right hash over it."""
    tensors, model_metadata = serialization.read_model_file(path)
    name = next(n for n, t in tensors.items() if t.ndim > 1 and t.is_floating_point())
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))
    place = {k: v for k, v in model_metadata.items() if k not in ("sha256", "format")}
    serialization.write_model_file(path, tensors, place)


@pytest.mark.slow
def test_the_recipe_ends_early() -> None:
    """Not where it is killed behind its last epoch alone."""
    place = finish(selftest.load(selftest.RECIPE), "x")
    assert len(place.metrics()) < selftest.RECIPE["train"]["epochs"]


def test_the_recipe_has_everything_on() -> None:
    job, _ = begin(selftest.load(selftest.RECIPE), "x")
    assert job.averager is not None
    assert job.recipe.train.patience
    assert any(isinstance(m, torch.nn.Dropout) for m in job.model.modules())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in job.model.modules())
    assert any(name == "MixUp" for name, _ in job.recipe.operations)

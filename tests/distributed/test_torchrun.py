"""Processes under torchrun train as one does, print messages once, and do not hang."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch

from convlens.run import RunDir
from helpers.commands import Done, command, picture, pictures, weights
from helpers.launching import ended, launch, torchrun
from helpers.recipes_together import main
from helpers.support import same, tiny
from helpers.torchrun import (
    KINDS,
    PLAIN,
    SCRIPT,
    TRAIN,
    a_long_run,
    close,
    in_epoch,
    processes_of,
    written,
)

# The others notice a lost process within seconds; one that does not would wait for ten minutes.
NO_HANG_S = 120.0


def compare_with_one_process(size: int) -> Done:
    """Train all kinds of recipes with one process and with `size`, and compare the results."""
    names = written(*KINDS)
    done = torchrun(size, SCRIPT, str(size), *names)
    assert done.code == 0, done.err
    main("1", *names)
    for name in names[:-1]:
        close(name, size)
    # After one step the first batch norm has the same inputs, and the mean of the processes' means
    # is the mean over all rows. But each process normalizes its own rows, so the weights differ.
    one, other = weights(Path("models/norms-1")), weights(Path(f"models/norms-{size}"))
    first = [key for key in one if key.startswith("stage1")]
    mean, var = (next(key for key in first if key.endswith(end)) for end in ("_mean", "_var"))
    torch.testing.assert_close(one[mean], other[mean])
    torch.testing.assert_close(one[var], other[var], rtol=0.01, atol=0)
    assert not torch.allclose(one["classifier.weight"], other["classifier.weight"], atol=1e-5)
    return done


def test_two_processes_train_as_one_does() -> None:
    done = compare_with_one_process(2)
    one, two = RunDir(Path("models/clipped-1")), RunDir(Path("models/clipped-2"))
    assert (one.metadata()["world_size"], two.metadata()["world_size"]) == (1, 2)
    assert one.metadata()["kept_epoch"] == two.metadata()["kept_epoch"]
    (result_of_one,), (result_of_two,) = one.evaluations(), two.evaluations()  # logged once
    for key in ("n", "correct", "confusion", "data_fingerprint"):
        assert result_of_two[key] == result_of_one[key]
    # Only rank 0 prints.
    assert re.findall(r"^epoch +(\d)/3", done.err, re.M) == ["1", "2", "3"]
    assert done.out == ""


@pytest.mark.slow
def test_four_processes_train_as_one_does() -> None:
    compare_with_one_process(4)


def test_an_error_of_all_processes_is_printed_once() -> None:
    done = torchrun(2, "-m", "convlens", "train", "digitz")
    assert done.code != 0
    assert done.err.count("error:") == 1
    assert "Traceback (most recent call last)" not in done.err.split("error:")[0]
    # torchrun ends a process that is still starting when the first one has failed.
    assert 2 in codes(done) <= {2, 75, -signal.SIGTERM}


def codes(done: Done) -> set[int]:
    """Return the exit codes of the processes, as torchrun prints them; its own is 1."""
    return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", done.err)}


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_the_same_command_resumes() -> None:
    run_dir = a_long_run()
    agent = launch(2, *TRAIN)
    in_epoch(run_dir, agent, 3)
    os.kill(processes_of(agent)[1], signal.SIGTERM)  # not rank 0
    done = ended(agent)
    assert codes(done) <= {75, -signal.SIGTERM}, done.err
    assert 75 in codes(done)
    assert done.err.count("stopped:") == 1
    assert done.err.count("the same command resumes the training") == 1
    first = len(run_dir.metrics())
    assert run_dir.metadata()["status"] == "training"

    agent = launch(2, *TRAIN)  # resumes; now torchrun itself gets the signal
    in_epoch(run_dir, agent, first + 3)
    agent.send_signal(signal.SIGTERM)
    done = ended(agent)
    assert "continuing tiny after" in done.err
    assert run_dir.metadata()["status"] == "training"

    # With as many processes the same bits; one process can resume, too, with other dropout.
    shutil.move("models/tiny", "left")
    for size in (2, 1):
        shutil.copytree("left", "models/tiny")
        done = torchrun(size, *TRAIN)
        assert done.code == 0, done.err
        shutil.move("models/tiny", f"models/by-{size}")
    whole = torchrun(2, *TRAIN)
    assert whole.code == 0, whole.err
    same(weights(Path("models/by-2")), weights(Path("models/tiny")))
    assert RunDir(Path("models/by-1")).metadata()["world_size"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_hangs_when_one_is_killed(rank: int) -> None:
    run_dir = a_long_run()
    agent = launch(2, *TRAIN)
    in_epoch(run_dir, agent, 2)
    os.kill(processes_of(agent)[rank], signal.SIGKILL)
    done = ended(agent, timeout=NO_HANG_S)
    assert done.code != 0
    assert -signal.SIGKILL in codes(done)
    notice = f"noticed by rank {1 - rank} of 2 on {socket.gethostname()} in epoch "
    assert notice in done.err, done.err
    assert "Traceback" not in done.err.split("ChildFailedError")[0].rpartition("Traceback")[0]


# The second process has a data folder of its own, as on another machine.
DIFFERENT_SETUPS = """
import os
second = os.environ["RANK"] == "1"
os.environ["CONVLENS_DATA"] = "second" if second else "first"
from convlens import cli
from convlens import distributed
if second and os.environ["DIFFERENCE"] == "version":
    distributed.__version__ = "9.9"
cli.main(["train", "pics", "data.image_size=16", "train.epochs=1", "--device", "cpu"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "code", "message"),
    [
        ("image", 3, "process 1 of 2 has different images of 'pics' from process 0"),
        ("file", 3, "1 of 16 images can't be read"),
        ("version", 5, "process 1 of 2 has different versions from process 0"),
    ],
)
def test_processes_with_different_setups_are_refused(
    difference: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("dark", 30), ("light", 220)):
        for n in range(8):
            picture(Path(f"first/pics/{name}/{n}.png"), (value + n, value, value), size=16)
    shutil.copytree("first", "second")
    if difference == "image":
        picture(Path("second/pics/dark/3.png"), (40, 40, 40), size=16)
    if difference == "file":
        Path("second/pics/dark/3.png").write_bytes(b"none")
    Path("different_setups.py").write_text(DIFFERENT_SETUPS)
    monkeypatch.setenv("DIFFERENCE", difference)
    done = torchrun(2, "different_setups.py")
    assert done.err.count("error:") == 1, done.err
    assert message in done.err
    assert code in codes(done) <= {code, -signal.SIGTERM}
    assert not list(Path().glob("models/*/run.json"))


BUG = """
import os
from convlens import cli
from convlens.training import train
if os.environ["RANK"] == "1":
    train.load_data = lambda *_, **__: 1 / 0
cli.main(["train", "digits", "--device", "cpu"])
"""


# `train.minutes` by two processes: only rank 0 measures and looks at the clock, which would tell
# the other one something else. Each writes what it trained.
LIMITED_TIME = """
import hashlib, json, os, sys
from convlens import cli
from convlens.device import Plan
from convlens.training import time_budget, train

def refuse(*_, **__):
    raise AssertionError("only rank 0 decides")

rank, fit, fitting = os.environ["RANK"], train.fit, time_budget.epochs_that_fit
if rank == "0":
    plan = Plan("cpu", "fp32", "channels_last").to_dict()
    speed = time_budget.Speed(32, 0.2, 0.02, 0.02, plan)
    time_budget.measure_speed = lambda *_: speed
    time_budget.Deadline.left = lambda deadline: 60.0 * deadline.minutes
    time_budget.epochs_that_fit = lambda epochs, done, **_: fitting(
        epochs, done, seconds_per_epoch=10.0, seconds_left=15.0
    )
else:
    time_budget.measure_speed = time_budget.epochs_that_fit = refuse
    time_budget.Deadline.left = refuse

def fit_and_write(job, run_dir):
    result = fit(job, run_dir)
    weights = b"".join(tensor.numpy().tobytes() for tensor in job.model.state_dict().values())
    content = {
        "recipe": job.recipe.model_dump(mode="json"),
        "plan": job.plan.to_dict(),
        "shortened": job.shortened,
        "rates": [job.schedule(step / 8) for step in range(9)],
        "weights": hashlib.sha256(weights).hexdigest(),
    }
    with open(f"rank-{rank}.json", "w") as file:
        json.dump(content, file)
    return result

train.fit = fit_and_write
cli.main(["train", *sys.argv[1:], "--name", "limited", "--device", "cpu"])
"""


def test_rank_0_chooses_and_shortens_a_training_for_all_processes() -> None:
    photos = pictures(Path("photos"), {"blue": 12, "green": 12, "red": 12}, size=80)
    Path("limited.py").write_text(LIMITED_TIME)
    net = ("model.name=cnn", "model.weights=none", "model.widths=[4,8]", "train.batch_size=16")
    done = torchrun(2, "limited.py", photos, "train.minutes=1", *net)
    assert done.code == 0, done.err
    first, second = (json.loads(Path(f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    # 26 training images of 32 px take 5.9 s for an epoch, and about 55 s are left for them.
    assert first["recipe"]["data"]["image_size"] == 32
    assert first["recipe"]["train"]["epochs"] == 9
    assert first["plan"]["memory_format"] == "channels_last"
    assert first["shortened"] == [{"after": 1, "epochs": 2}]
    text = " ".join(done.err.split())
    assert "slower than expected: 2 instead of 9 epochs fit into 1 minute" in text
    assert re.findall(r"^epoch +(\d/\d)", done.err, re.M) == ["1/9", "2/2"]
    metadata = RunDir(Path("models/limited")).metadata()
    assert (metadata["world_size"], metadata["epochs"]) == (2, 2)


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all() -> None:
    Path("bug.py").write_text(BUG)
    done = ended(launch(2, "bug.py"), timeout=NO_HANG_S)
    assert done.code != 0
    assert "ZeroDivisionError" in done.err


@pytest.mark.slow
def test_a_failed_write_of_rank_0_ends_all() -> None:
    """Rank 0 cannot write while the others are in the middle of a step."""
    run_dir = a_long_run()
    agent = launch(2, *TRAIN)
    in_epoch(run_dir, agent, 2)
    shutil.move(run_dir.path, "elsewhere")
    Path("models/tiny").write_text("a file where the folder was")
    done = ended(agent, timeout=NO_HANG_S)
    assert done.err.count("error:") == 1, done.err
    assert "can't write" in done.err
    assert codes(done) <= {5, -signal.SIGTERM}


@pytest.mark.slow
def test_a_non_finite_loss_stops_all_and_keeps_the_last_finite_weights() -> None:
    Path("long.yaml").write_text(tiny(*PLAIN, "optim.lr=1e30").to_text())
    done = torchrun(2, *TRAIN)
    assert done.err.count("stopped:") == 1, done.err
    assert "the loss became NaN or infinite" in done.err
    assert 6 in codes(done) <= {6, -signal.SIGTERM}
    run_dir = RunDir(Path("models/tiny"))
    assert run_dir.metadata()["diverged"]["step"] > 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(run_dir.path).values())


@pytest.mark.slow
def test_seeds_and_evaluate_support_several_processes_and_other_commands_refuse() -> None:
    Path("long.yaml").write_text(tiny("train.epochs=2").to_text())
    done = torchrun(2, *TRAIN[:4], "--seeds", "2", "--device", "cpu", "--json")
    assert done.code == 0, done.err
    (table,) = done.json["variants"]
    assert len(table["accuracies"]) == len(table["runs"]) == 2
    run_dir = RunDir(Path("models") / table["runs"][0]["run"])
    split = ("--split", "train", "--device", "cpu", "--json")
    together = torchrun(2, "-m", "convlens", "evaluate", run_dir.name, *split)
    alone = command("evaluate", run_dir.name, *split)
    for key in ("n", "correct", "confusion", "model_sha256"):
        assert together.json[key] == alone.json[key]
    assert together.json["loss"] == pytest.approx(alone.json["loss"], rel=1e-5)
    assert (together.json["looks"], alone.json["looks"]) == (1, 2)
    refused = torchrun(2, "-m", "convlens", "recipes")
    assert "recipes does not support several processes" in refused.err
    assert 2 in codes(refused)

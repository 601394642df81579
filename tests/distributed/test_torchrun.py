"""Real torchrun: two and four processes train as one does, speak once, and don't hang."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from convlens.run import RunDir
from helpers.commands import Done, command, picture, weights
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


def as_one_does(size: int) -> Done:
    """Trains all kinds by one process and by `size`; what those said."""
    names = written(*KINDS)
    done = torchrun(size, SCRIPT, str(size), *names)
    assert done.code == 0, done.err
    main("1", *names)
    for name in names[:-1]:
        close(name, size)
    # After one step the first norm has seen the same, and the mean over the processes of their
    # means is the mean over all; but each normed its own rows, so what was learned is different.
    one, other = weights(Path("models/norms-1")), weights(Path(f"models/norms-{size}"))
    first = [key for key in one if key.startswith("stage1")]
    mean, var = (next(key for key in first if key.endswith(end)) for end in ("_mean", "_var"))
    torch.testing.assert_close(one[mean], other[mean])
    torch.testing.assert_close(one[var], other[var], rtol=0.01, atol=0)
    assert not torch.allclose(one["classifier.weight"], other["classifier.weight"], atol=1e-5)
    return done


def test_two_processes_train_as_one_does() -> None:
    done = as_one_does(2)
    one, two = RunDir(Path("models/clipped-1")), RunDir(Path("models/clipped-2"))
    assert (one.metadata()["world_size"], two.metadata()["world_size"]) == (1, 2)
    assert one.metadata()["kept_epoch"] == two.metadata()["kept_epoch"]
    (result,), (its_result,) = one.evaluations(), two.evaluations()  # one look, whoever looked
    for key in ("n", "correct", "confusion", "data_fingerprint"):
        assert its_result[key] == result[key]
    # The first one alone spoke.
    assert re.findall(r"^epoch +(\d)/3", done.err, re.M) == ["1", "2", "3"]
    assert done.out == ""


@pytest.mark.slow
def test_four_processes_train_as_one_does() -> None:
    as_one_does(4)


def test_an_error_of_all_is_told_once() -> None:
    done = torchrun(2, "-m", "convlens", "train", "digitz")
    assert done.code != 0
    assert done.err.count("error:") == 1
    assert "Traceback (most recent call last)" not in done.err.split("error:")[0]
    # torchrun ends a process that is still starting when the first one has failed.
    assert 2 in codes(done) <= {2, 75, -signal.SIGTERM}


def codes(done: Done) -> set[int]:
    """The exit codes of the processes, of which torchrun tells; its own is 1."""
    return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", done.err)}


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_the_same_command_goes_on() -> None:
    place = a_long_run()
    agent = launch(2, *TRAIN)
    in_epoch(place, agent, 3)
    os.kill(processes_of(agent)[1], signal.SIGTERM)  # not to the one that leads
    done = ended(agent)
    assert codes(done) <= {75, -signal.SIGTERM}, done.err
    assert 75 in codes(done)
    assert done.err.count("stopped:") == 1
    assert done.err.count("the same command resumes the training") == 1
    first = len(place.metrics())
    assert place.metadata()["status"] == "training"

    agent = launch(2, *TRAIN)  # goes on; now torchrun itself is asked to stop
    in_epoch(place, agent, first + 3)
    agent.send_signal(signal.SIGTERM)
    done = ended(agent)
    assert "continuing tiny after" in done.err
    assert place.metadata()["status"] == "training"

    # By as many processes the same bits; by one another dropout, and a training all the same.
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
def test_none_hangs_when_one_is_killed(rank: int) -> None:
    place = a_long_run()
    agent = launch(2, *TRAIN)
    in_epoch(place, agent, 2)
    os.kill(processes_of(agent)[rank], signal.SIGKILL)
    begun = time.monotonic()
    done = ended(agent, timeout=60)
    assert time.monotonic() - begun < 30
    assert done.code != 0
    assert -signal.SIGKILL in codes(done)
    other = f"noticed by rank {1 - rank} of 2 on {socket.gethostname()} in epoch "
    assert other in done.err, done.err
    assert "Traceback" not in done.err.split("ChildFailedError")[0].rpartition("Traceback")[0]


# The second process has another folder of data, as another machine has.
APART = """
import os
second = os.environ["RANK"] == "1"
os.environ["CONVLENS_DATA"] = "second" if second else "first"
from convlens import cli, distributed
if second and os.environ["OTHER"] == "version":
    distributed.__version__ = "9.9"
cli.main(["train", "pics", "data.image_size=16", "train.epochs=1", "--device", "cpu"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "code", "said"),
    [
        ("image", 3, "process 1 of 2 has other images of 'pics' than process 0"),
        ("file", 3, "1 of 16 images can't be read"),
        ("version", 5, "process 1 of 2 has other versions than process 0"),
    ],
)
def test_what_one_has_otherwise_is_refused(
    other: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("dark", 30), ("light", 220)):
        for n in range(8):
            picture(Path(f"first/pics/{name}/{n}.png"), (value + n, value, value), size=16)
    shutil.copytree("first", "second")
    if other == "image":
        picture(Path("second/pics/dark/3.png"), (40, 40, 40), size=16)
    if other == "file":
        Path("second/pics/dark/3.png").write_bytes(b"none")
    Path("apart.py").write_text(APART)
    monkeypatch.setenv("OTHER", other)
    done = torchrun(2, "apart.py")
    assert done.err.count("error:") == 1, done.err
    assert said in done.err
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


@pytest.mark.slow
def test_a_bug_in_one_hangs_nobody() -> None:
    Path("bug.py").write_text(BUG)
    begun = time.monotonic()
    done = torchrun(2, "bug.py")
    assert time.monotonic() - begun < 60
    assert done.code != 0
    assert "ZeroDivisionError" in done.err


@pytest.mark.slow
def test_what_fails_in_one_ends_all() -> None:
    """The one that writes can't: the others are in the middle of a step then."""
    place = a_long_run()
    agent = launch(2, *TRAIN)
    in_epoch(place, agent, 2)
    shutil.move(place.path, "elsewhere")
    Path("models/tiny").write_text("a file where the folder was")
    done = ended(agent, timeout=60)
    assert done.err.count("error:") == 1, done.err
    assert "can't write" in done.err
    assert codes(done) <= {5, -signal.SIGTERM}


@pytest.mark.slow
def test_a_loss_that_is_none_stops_all_with_the_last_good_weights() -> None:
    Path("long.yaml").write_text(tiny(*PLAIN, "optim.lr=1e30").to_text())
    done = torchrun(2, *TRAIN)
    assert done.err.count("stopped:") == 1, done.err
    assert "the loss became NaN or infinite" in done.err
    assert 6 in codes(done) <= {6, -signal.SIGTERM}
    place = RunDir(Path("models/tiny"))
    assert place.metadata()["diverged"]["step"] > 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(place.path).values())


@pytest.mark.slow
def test_seeds_and_evaluate_work_together_and_the_rest_is_refused() -> None:
    Path("long.yaml").write_text(tiny("train.epochs=2").to_text())
    done = torchrun(2, *TRAIN[:4], "--seeds", "2", "--device", "cpu", "--json")
    assert done.code == 0, done.err
    (table,) = done.json["variants"]
    assert len(table["accuracies"]) == len(table["runs"]) == 2
    place = RunDir(Path("models") / table["runs"][0]["run"])
    split = ("--split", "train", "--device", "cpu", "--json")
    together = torchrun(2, "-m", "convlens", "evaluate", place.name, *split)
    alone = command("evaluate", place.name, *split)
    for key in ("n", "correct", "confusion", "model_sha256"):
        assert together.json[key] == alone.json[key]
    assert together.json["loss"] == pytest.approx(alone.json["loss"], rel=1e-5)
    assert (together.json["looks"], alone.json["looks"]) == (1, 2)
    refused = torchrun(2, "-m", "convlens", "recipes")
    assert "recipes does not support several processes" in refused.err
    assert 2 in codes(refused)

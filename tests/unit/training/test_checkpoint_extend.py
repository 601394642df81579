"""Finished runs are extended by more epochs, and some cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from convlens.errors import ModelFileError, UsageError
from convlens.recipe import Recipe
from convlens.run import RunDir
from convlens.training import train as training_train
from helpers.commands import DIGITS, here, refused
from helpers.support import tiny
from selftest import differences

CONSTANT = (
    'augment=[{"RandomAffine": {"degrees": 20}}, {"CutMix": {"p": 0.5}}]',
    "model.dropout=0.3",
    "optim.ema=0.9",
    "optim.clip_norm=1",
)


def train(recipe: Recipe, name: str, *, extend: bool = False) -> RunDir:
    return training_train.train(
        recipe, name=name, extend=extend, test=False, device="cpu", quiet=True
    )


@pytest.mark.parametrize("keep", ["best", "last"])
def test_at_a_constant_learning_rate_an_extended_run_equals_the_longer_run(keep: str) -> None:
    options = (*CONSTANT, f"train.keep={keep}")
    train(tiny(*options), "short")
    longer = tiny(*options, "train.epochs=5")
    extended = train(longer, "extended", extend=True)
    extends = extended.metadata()["extends"]
    assert extends == {"run": "short", "epochs": 3, "exact": True}
    longer_run = train(longer, "whole")
    assert differences(longer_run, extended) == []
    assert RunDir(Path("models/short")).metadata()["epochs"] == 3  # unchanged


def test_an_extended_run_continues_with_the_schedule_of_the_longer_run() -> None:
    options = ("optim.schedule=cosine", "train.keep=last")
    short = train(tiny(*options), "short")
    extended = train(tiny(*options, "train.epochs=6"), "extended", extend=True)
    assert extended.metadata()["extends"]["exact"] is False
    rates = [row["lr"] for row in extended.metrics()]
    longer_run = train(tiny(*options, "train.epochs=6"), "whole")
    assert rates[:3] == [row["lr"] for row in short.metrics()]
    assert rates[3:] == [row["lr"] for row in longer_run.metrics()][3:]


def test_patience_starts_from_zero_in_an_extended_run() -> None:
    options = ("optim.lr=0.0000001", "train.patience=1", "train.monitor=val_accuracy")
    short = train(tiny(*options, "train.epochs=4"), "short")
    done = len(short.metrics())
    assert done < 4
    extended = train(tiny(*options, "train.epochs=9"), "extended", extend=True)
    assert extended.metadata()["extends"] == {"run": "short", "epochs": done, "exact": False}
    assert len(extended.metrics()) > done


def test_the_longest_run_is_extended_and_the_extended_run_is_found_again() -> None:
    train(tiny(), "three")
    train(tiny("train.epochs=4"), "four")
    extended = train(tiny("train.epochs=6"), "six", extend=True)
    assert extended.metadata()["extends"]["run"] == "four"
    again = train(tiny("train.epochs=6"), "six", extend=True)
    assert again.path == extended.path


def test_runs_that_cannot_be_extended_are_refused() -> None:
    with pytest.raises(UsageError, match="no finished run of this recipe with fewer than 5"):
        train(tiny("train.epochs=5"), "a", extend=True)
    short = train(tiny(), "short")
    with pytest.raises(UsageError, match="no finished run"):
        train(tiny("train.epochs=2"), "b", extend=True)
    with pytest.raises(UsageError, match="no finished run"):
        train(tiny("train.epochs=5", "optim.lr=0.02"), "c", extend=True)
    state = next((short.path / "state").glob("*.safetensors"))
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="can't be extended: the checkpoint of epoch 4, s"):
        train(tiny("train.epochs=5"), "d", extend=True)
    state.unlink()
    with pytest.raises(ModelFileError, match="can't be extended"):
        train(tiny("train.epochs=5"), "d", extend=True)
    assert not (Path("models/d") / "run.json").exists()


def test_the_extend_option_of_the_train_command() -> None:
    assert here("train", *DIGITS, "--no-test").code == 0
    longer = (*DIGITS[:-1], "train.epochs=3", "--no-test")
    done = here("train", *longer, "--extend", "--json")
    assert done.code == 0, done.err
    assert "from 2 epochs: the same bits as 3 epochs" not in done.err  # digits: one-cycle
    assert "the result differs from 3 epochs from scratch" in done.err
    assert "resuming" in done.err
    assert len(RunDir(Path(done.json["path"])).metrics()) == 3
    refused(here("train", *longer, "--extend", "--seeds", "2"), 2, "--extend needs a single run")

"""Several seeds of one recipe: what varies, what stays, and the arithmetic of the table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from commands import DIGITS, here, weights
from convlens import Run, asking
from convlens.errors import UsageError
from convlens.metrics import mean_sd
from convlens.seeds import train_seeds


def test_two_seeds_side_by_side() -> None:
    done = here("train", *DIGITS, "--seeds", "2", "--name", "pair", "--json")
    assert done.code == 0, done.err
    got = done.json
    assert (got["name"], got["split"]) == ("pair", "test")
    assert (got["runs"], got["seeds"]) == (["pair", "pair-seed1"], [0, 1])
    one, two = got["accuracies"]
    assert got["mean"] == pytest.approx((one + two) / 2)
    # The sample deviation of two numbers is their distance over the root of two.
    assert got["sd"] == pytest.approx(abs(one - two) / math.sqrt(2))
    for name, accuracy, loss, seed in zip(
        got["runs"], got["accuracies"], got["losses"], got["seeds"], strict=True
    ):
        run = Run.load(name)
        assert run.recipe.train.seed == seed
        (look,) = run.results
        assert (look["accuracy"], look["loss"]) == (accuracy, loss)
    assert Path(got["plot"]).is_file()
    first, second = (weights(Path("models") / name) for name in got["runs"])
    assert any(not bool((first[key] == second[key]).all()) for key in first)
    # The split of the data stays the same.
    splits = {(Path("models") / name / "split.csv").read_text() for name in got["runs"]}
    assert len(splits) == 1


def test_finished_seeds_are_not_trained_again_and_more_can_be_added() -> None:
    short = [*DIGITS, "train.epochs=1", "--no-test"]
    assert here("train", *short, "--seeds", "2").code == 0
    runs = {p.name: (p / "model.safetensors").stat().st_mtime_ns for p in Path("models").iterdir()}
    done = here("train", *short, "--seeds", "3", "--json")
    assert done.err.count("is trained already") == 2
    after = {p.name: (p / "model.safetensors").stat().st_mtime_ns for p in Path("models").iterdir()}
    assert {name: after[name] for name in runs} == runs
    assert len(after) == 3
    assert done.json["split"] == "val"
    assert [r["split"] for r in Run.load(done.json["runs"][0]).results] == ["val", "val"]


def test_the_table_says_mean_and_deviation() -> None:
    done = here("train", *DIGITS, "train.epochs=1", "--seeds", "2", "--name", "pair")
    assert done.code == 0, done.err
    looks = [
        json.loads((Path("models") / n / "results.json").read_text())[-1]["accuracy"]
        for n in ("pair", "pair-seed1")
    ]
    mean, sd = mean_sd(looks)
    assert sd is not None
    assert f"test accuracy {100 * mean:.2f} ± {100 * sd:.2f} %" in done.out
    assert "mean ± sd of 2 seeds" in done.out


def test_seeds_begin_at_the_recipes_own() -> None:
    table = train_seeds(
        asking.read("digits", overrides=[*DIGITS[1:], "train.seed=5", "train.epochs=1"]),
        1, test=False, quiet=True,
    )  # fmt: skip
    assert (table.seeds, table.sd, table.split) == ([5], None, "val")
    assert table.mean == table.accuracies[0]


def test_wrong_recipes_stop_before_the_first_seed() -> None:
    asked = asking.read("digits", overrides=["optim.name=adamm"])
    with pytest.raises(UsageError, match="adamm"):
        train_seeds(asked, 2)
    assert not Path("models").exists()

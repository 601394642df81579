"""What a command makes its user wait for: nothing that it has no use for is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from convlens import models, optim, recipe
from convlens.data import sources
from convlens.optim import optimizers
from convlens.recipe import OptimConfig
from convlens.training import train as training_train
from convlens.version import __version__
from helpers.commands import DIGITS, environment, picture
from helpers.support import tiny

# Each of these takes from half a second to about as long as torch itself.
SLOW = ("torch._dynamo", "torch._inductor", "sympy", "sklearn", "scipy", "pandas", "torchvision")
SCRIPT = """
import json, sys
from convlens import cli
for arguments in json.loads(sys.argv[1]):
    try:
        cli.main(arguments)
    except SystemExit as end:
        assert end.code == 0, end.code
print(json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""


def test_training_testing_and_predicting_import_nothing_slow_beside_torch() -> None:
    train = ["train", *DIGITS, "--name", "small"]
    image = str(picture(Path("a.png"), (90,), size=8))
    # The second time it is found and tested again.
    commands = [train, train, ["predict", "small", image]]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps(SLOW)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


# Optimisers


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_our_optimisers_are_torchs_to_the_bit(name: str, fused: bool) -> None:
    options = {"lr": 0.1, "weight_decay": 0.01, "fused": fused}
    options |= {"momentum": 0.9} if name == "SGD" else {}
    mine, theirs = network(), network()
    one = getattr(optimizers, name)(mine.parameters(), **options)
    two = getattr(torch.optim, name)(theirs.parameters(), **options)
    images = torch.randn(6, 1, 4, 4)
    for turn in range(6):
        for model, optimizer in ((mine, one), (theirs, two)):
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            model(images).square().mean().backward()
            optimizer.step()
        if turn == 2:  # what a run saves, taken up by the other's optimiser
            saved = one.state_dict()
            assert saved["param_groups"] == two.state_dict()["param_groups"]
            one.load_state_dict(two.state_dict())
            two.load_state_dict(saved)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad


def test_every_optimiser_of_a_recipe_is_one_of_them() -> None:
    for name in optim.OPTIMIZERS:
        assert isinstance(
            optim.build_optimizer(network(), OptimConfig(name=name)), optimizers.Eager
        ), name


# Trying a network out


@pytest.mark.parametrize("name", ["cnn", "fastnet", "wrn", "resnet18"])
def test_trying_a_network_runs_it_and_leaves_the_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    model = models.try_out(name, 3, 32, {"dropout": 0.5} if name == "cnn" else {})
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


# Digits


def test_the_digits_are_the_same_without_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    images = sources.find_source("digits").parts["train"].images
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    other = sources.find_source("digits").parts["train"]
    index = np.arange(1797)
    assert not isinstance(images, list)
    assert not isinstance(other.images, list)
    np.testing.assert_array_equal(images[index], other.images[index])


# Twice the same command


def test_a_finished_run_is_found_before_its_recipe_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = tiny("train.epochs=1")
    place = training_train.train(asked, is_unmodified_recipe=True, test=False, quiet=True)

    def check(tried: recipe.Recipe) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr(training_train, "validate_recipe", check)
    assert (
        training_train.train(asked, is_unmodified_recipe=True, test=False, quiet=True).path
        == place.path
    )
    with pytest.raises(AssertionError, match="tried again"):
        training_train.train(
            tiny("train.epochs=2"), is_unmodified_recipe=True, test=False, quiet=True
        )


ENDING = """
import atexit, os, sys, threading, time
from convlens import cli
atexit.register(print, "handler")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
class Taken:
    def __del__(self, write=os.write):
        write(2, b"taken apart")
kept = Taken()
cli.run()
"""


@pytest.mark.parametrize(("typed", "code"), [("--version", 0), ("trian", 2)])
def test_a_command_ends_in_order_and_takes_nothing_apart(typed: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING, typed], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    version = [f"convlens {__version__}"] * (code == 0)
    assert done.stdout.splitlines() == [*version, "thread", "handler"]
    assert "taken apart" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that Linux has")
def test_a_stream_that_is_full_is_no_success() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "convlens", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode != 0
    assert "No space left on device" in done.stderr

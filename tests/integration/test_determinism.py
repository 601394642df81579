"""The same command gives the same bits in two processes."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import pytest
import torch

from convlens.run import RunDir
from helpers.commands import command, here, weights
from helpers.interrupted_runs import EVERYTHING

CLOCK = ("seconds", "cpu_seconds", "data_seconds", "images_per_second")
SMALL = ("data.per_class=16", "model.widths=[8,16]", "train.epochs=3", "train.batch_size=32")
ALL_ON = [each for each in EVERYTHING if not each.startswith("train.")]


def weights_and_metrics_hash(run_dir: Path) -> str:
    """Return a hash of names and bits of all weights and of all metrics except times."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights(run_dir).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for row in RunDir(run_dir).metrics():
        digest.update(repr([(k, v) for k, v in row.items() if k not in CLOCK]).encode())
    return digest.hexdigest()


def test_two_processes_give_the_same_bits() -> None:
    line = ("train", "digits", *SMALL, *ALL_ON, "--deterministic", "--no-test", "--name")
    for name, run in (("first", here), ("second", partial(command, PYTHONHASHSEED="7"))):
        done = run(*line, name)
        assert done.code == 0, done.err
    first, second = Path("models/first"), Path("models/second")
    assert weights_and_metrics_hash(first) == weights_and_metrics_hash(second)
    metadata = RunDir(first).metadata()
    assert metadata["timings"] == {}  # the autotuner did not run
    assert metadata["plan"]["deterministic"] is True


@pytest.mark.slow
@pytest.mark.parametrize("network", ["cnn", "resnet18", "fastnet"])
def test_every_network_gives_the_same_bits_again(network: str) -> None:
    options = {
        "cnn": (),
        "resnet18": ("model.name=resnet18", "data.image_size=16", "data.channels=3"),
        "fastnet": ("model.name=fastnet", "data.image_size=32", "data.channels=3"),
    }[network]
    drop = [] if network == "cnn" else ["model.widths"]
    small = [each for each in SMALL if not any(each.startswith(key) for key in drop)]
    hashes = set()
    for name in ("first", "second"):
        line = ("train", "digits", *small, *options, "train.epochs=2", "--deterministic")
        done = command(*line, "--no-test", "--name", name)
        assert done.code == 0, done.err
        hashes.add(weights_and_metrics_hash(Path("models") / name))
    assert len(hashes) == 1


@pytest.mark.gpu
def test_two_processes_give_the_same_bits_on_a_gpu() -> None:
    hashes = set()
    for name in ("first", "second"):
        line = ("train", "digits", *SMALL, *ALL_ON, "--deterministic", "--device", "cuda")
        done = command(*line, "--name", name)
        assert done.code == 0, done.err
        hashes.add(weights_and_metrics_hash(Path("models") / name))
    assert len(hashes) == 1
    assert torch.cuda.is_available()

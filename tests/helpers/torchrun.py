"""Shared by the tests of torchrun and others."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import torch

from convlens.run import RunDir
from helpers.commands import weights
from helpers.paths import HELPERS
from helpers.support import tiny

SCRIPT = HELPERS / "recipes_together.py"


PLAIN = ("model.batch_norm=false", "optim.name=sgd", "optim.lr=0.05", "data.seed=4")


# Each stands for something that could go differently. 81 images in batches of 16 leave one over,
# which joins the last; in batches of 13 they leave three, of which one process has all.
KINDS: dict[str, tuple[str, ...]] = {
    "clipped": (
        *PLAIN,
        "optim.clip_norm=0.5",
        "optim.ema=0.9",
        "optim.label_smoothing=0.1",
        "train.memory_format=channels_last",
    ),
    "mixed": (*PLAIN, "train.batch_size=13", "augment=[{TrivialAugmentWide: {}}, {MixUp: {}}]"),
    "adamw": (
        "model.batch_norm=false",
        "optim.lr=0.003",
        "train.keep=last",
        "augment=[{RandomAffine: {degrees: 10}}, {RandomCrop: {padding: 1}}]",
    ),
    "windows": (
        "model.batch_norm=false",
        "optim.name=muon",
        "optim.lr=0.02",
        "optim.momentum=0.6",
        "optim.head_first=0.25",
        "optim.lookahead={every: 2, decay: 0.9, power: 1}",
    ),
    "trunk": (
        *PLAIN,
        "model.trainable=head",
        "augment=[{RandomCrop: {padding: 1}}]",
        "train.views=2",
    ),
    "norms": ("optim.name=sgd", "optim.lr=0.05", "train.epochs=1", "train.batch_size=128"),
}


def written(*names: str) -> tuple[str, ...]:
    for name in names:
        asked = tiny(*KINDS[name], "data.total_per_class=10", "data.per_class=null")
        Path(f"{name}.yaml").write_text(asked.to_text())
    return names


def close(name: str, size: int, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """Weights and epochs' numbers of one and of `size` processes within float tolerance."""
    one, other = (Path("models") / f"{name}-{count}" for count in (1, size))
    tensors, others = weights(one), weights(other)
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(others[key], tensor, rtol=rtol, atol=atol, msg=key)
    rows, its_rows = RunDir(one).metrics(), RunDir(other).metrics()
    assert len(rows) == 3
    for row, its in zip(rows, its_rows, strict=True):
        for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr"):
            assert its[key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), key


LONG = (*PLAIN, "model.dropout=0.3", "optim.ema=0.9", "train.epochs=80", "train.keep=last")


def a_long_run() -> RunDir:
    Path("long.yaml").write_text(tiny(*LONG).to_text())
    return RunDir(Path("models/tiny"))


TRAIN = ("-m", "convlens", "train", "long.yaml", "--no-test", "--device", "cpu")


def processes_of(agent: subprocess.Popen[str]) -> list[int]:
    """The processes that a torchrun has started, by rank."""
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    found = {}
    for pid in pids:
        try:
            told = dict(
                each.split("=", 1)
                for each in Path(f"/proc/{pid}/environ").read_text().split("\0")
                if "=" in each
            )
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, UnicodeDecodeError):
            continue
        if parent == agent.pid and "LOCAL_RANK" in told:
            found[int(told["RANK"])] = pid
    return [found[rank] for rank in sorted(found)]


def in_epoch(place: RunDir, agent: subprocess.Popen[str], epoch: int) -> None:
    """Waits until a run has finished that many epochs."""
    for _ in range(24_000):
        if len(place.metrics()) >= epoch:
            return
        assert agent.poll() is None, agent.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("it does not train")

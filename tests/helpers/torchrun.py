"""Recipes for the tests under torchrun, and the processes that a torchrun has started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from convlens.run import VALIDATION_COLUMNS, RunDir
from helpers.commands import weights
from helpers.launching import wait_until
from helpers.paths import HELPERS
from helpers.support import tiny

SCRIPT = HELPERS / "recipes_together.py"
PLAIN = ("model.batch_norm=false", "optim.name=sgd", "optim.lr=0.05", "data.seed=4")

# Each recipe tests something that could differ between one and several processes. 81 images in
# batches of 16 leave one image, which joins the last batch; in batches of 13 they leave three,
# all of which one process gets.
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
    "unequal": (
        *PLAIN,
        "train.batch_size=13",
        "augment=[{MixUp: {}}]",
        "data.balance=sqrt",
        "optim.class_weights={0: 5, 7: 0.2}",
        "optim.loss=focal",
        "optim.label_smoothing=0.1",
        "train.monitor=val_macro_f1",
    ),
    "norms": ("optim.name=sgd", "optim.lr=0.05", "train.epochs=1", "train.batch_size=128"),
}


def written(*names: str) -> tuple[str, ...]:
    """Write the named recipes to files."""
    for name in names:
        recipe = tiny(*KINDS[name], "data.total_per_class=10", "data.per_class=null")
        Path(f"{name}.yaml").write_text(recipe.to_text())
    return names


def close(name: str, size: int, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """Assert that one and `size` processes give close weights and metrics."""
    one, other = (Path("models") / f"{name}-{count}" for count in (1, size))
    tensors, others = weights(one), weights(other)
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(others[key], tensor, rtol=rtol, atol=atol, msg=key)
    rows, other_rows = RunDir(one).metrics(), RunDir(other).metrics()
    assert len(rows) == 3
    for row, other_row in zip(rows, other_rows, strict=True):
        for key in ("train_loss", "train_accuracy", *VALIDATION_COLUMNS, "lr"):
            assert other_row[key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), key


LONG = (*PLAIN, "model.dropout=0.3", "optim.ema=0.9", "train.epochs=80", "train.keep=last")


def a_long_run() -> RunDir:
    """Write the recipe of `TRAIN`, a training of 80 epochs, and return its run directory."""
    Path("long.yaml").write_text(tiny(*LONG).to_text())
    return RunDir(Path("models/tiny"))


TRAIN = ("-m", "convlens", "train", "long.yaml", "--no-test", "--device", "cpu")


def processes_of(agent: subprocess.Popen[str]) -> list[int]:
    """Return the IDs of the processes that a torchrun has started, by rank."""
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    by_rank = {}
    for pid in pids:
        try:
            variables = dict(
                each.split("=", 1)
                for each in Path(f"/proc/{pid}/environ").read_text().split("\0")
                if "=" in each
            )
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, UnicodeDecodeError):
            continue
        if parent == agent.pid and "LOCAL_RANK" in variables:
            by_rank[int(variables["RANK"])] = pid
    return [by_rank[rank] for rank in sorted(by_rank)]


def in_epoch(run_dir: RunDir, agent: subprocess.Popen[str], epoch: int) -> None:
    """Wait until a run has finished that many epochs."""
    wait_until(lambda: len(run_dir.metrics()) >= epoch, agent)

"""Time of saving a checkpoint, and its share of the minute between two checkpoints.

Each network is trained for a step, so that the optimizer has its state, and then saved several
times to this disk: the checkpoint alone, as in the middle of an epoch, and in turn also the model
file, as after the best epoch so far.

    python benchmarks/saving.py [--repeats 5] [--folder .]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from convlens.runtime import RuntimeContext
from convlens.training.train import run_train_loop

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import torch

from convlens import recipe
from convlens.data.dataset import load_data
from convlens.run import METRICS_COLUMNS, RunDir
from convlens.training.checkpoint import SAVE_INTERVAL_S, CheckpointManager, model_snapshot
from convlens.training.setup import build_training_job

DATA = {"name": "digits", "per_class": 10, "image_size": 32, "channels": 3}
PLAIN = {"memory_format": "contiguous", "precision": "fp32"}
NETWORKS: dict[str, dict[str, object]] = {
    "cnn 32-64, adamw": {"model": {"name": "cnn", "widths": [32, 64], "depth": 2}},
    "wrn, sgd, ema": {"model": {"name": "wrn"}, "optim": {"name": "sgd", "ema": 0.99}},
    "resnet18, sgd": {"model": {"name": "resnet18"}, "optim": {"name": "sgd"}},
    "resnet18, adamw": {"model": {"name": "resnet18"}},
    "resnet50, sgd": {"model": {"name": "resnet50"}, "optim": {"name": "sgd"}},
}


def measured(changes: dict[str, object], folder: Path, repeats: int) -> dict[str, float]:
    """Measure sizes of checkpoint and model file, and median seconds of writing one and both."""
    tree = recipe.load_recipe({"name": "saving", "data": DATA, "train": PLAIN, **changes})
    job = build_training_job(
        tree, load_data(tree.data, memory_budget=1 << 30), RuntimeContext("cpu", quiet=True)
    )
    next(iter(run_train_loop(job, job.process_group)))
    run_dir = RunDir(folder / "run")
    run_dir.create(job.recipe, {"digests": []})
    checkpoints = CheckpointManager(job, run_dir)
    state, both = Spent(), Spent()
    for epoch in range(1, repeats + 2):
        row = {"epoch": float(epoch), **dict.fromkeys(METRICS_COLUMNS[1:], 1.0)}
        for better, spent in ((False, state), (True, both)):
            if better:
                checkpoints._pending = model_snapshot(job, run_dir.name, row)
            job.state.step += 1
            spent.add(checkpoints.save)
    size = max((run_dir.path / "state").glob("*.safetensors")).stat().st_size
    return {
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "state_mb": round(size / 2**20, 2),
        "model_mb": round(run_dir.model_path.stat().st_size / 2**20, 2),
        "state_seconds": state.wall(),
        "state_share": round(state.wall() / SAVE_INTERVAL_S, 5),
        "seconds": both.wall(),
        "cpu_seconds": both.cpu(),
        "share": round(both.wall() / SAVE_INTERVAL_S, 5),
    }


class Spent:
    """Wall and CPU seconds of repeated calls; the first call is not counted."""

    def __init__(self) -> None:
        self._all: list[tuple[float, float]] = []

    def add(self, job: Callable[[], None]) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        job()
        self._all.append((time.perf_counter() - start, time.process_time() - cpu))

    def wall(self) -> float:
        return round(statistics.median(wall for wall, _ in self._all[1:]), 4)

    def cpu(self) -> float:
        return round(statistics.median(cpu for _, cpu in self._all[1:]), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=".", help="folder on the disk to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, changes in NETWORKS.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows[name] = measured(changes, Path(folder), options.repeats)
    figures = {"repeats": options.repeats, "save_seconds": SAVE_INTERVAL_S, "networks": rows}
    print(json.dumps(record("saving", figures)))


if __name__ == "__main__":
    main()

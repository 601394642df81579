"""Time of a training step in one process with the whole batch, and in several that share it.

Starts itself under torchrun. In turn, rank 0 trains alone with all cores, alone with one thread,
and all ranks train together with their part of the cores; ratios are medians over the pairs. (On a
shared machine threads that wait for each other at every layer lose far more time than processes
that do so once per step; then one thread can be faster than two.) `sum_ms` is the time of an
all-reduce of as many numbers as there are weights. Prints one JSON object.

    python benchmarks/processes.py [--processes 2] [--rounds 11]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import torch
from torch import nn

from convlens import device, distributed, models, optim, recipe
from convlens.data.cache import ArrayRows
from convlens.data.dataset import Split
from convlens.data.loader import Batches, Normalize
from convlens.distributed import SINGLE_PROCESS, ProcessGroup
from convlens.engine.data_parallel import DataParallel
from convlens.engine.loop import Step, TrainLoop
from convlens.utils import process

# Recipe of the network, batch, channels, image size, steps per window.
CASES = (
    ("mnist-fast", 256, 1, 28, 10),
    ("cifar10-cpu", 64, 3, 32, 1),
    ("resnet18", 128, 3, 32, 1),
)


def network(name: str, channels: int, size: int) -> nn.Module:
    torch.manual_seed(0)
    config = recipe.load_recipe(name).model
    return models.build_model(config.name, 10, channels, size, config.options)


def steps_of(
    process_group: ProcessGroup, name: str, batch: int, channels: int, size: int
) -> Callable[[], Step]:
    """Return a training step without augmentation, as `train` runs it, on this process's rows."""
    model = network(name, channels, size)
    pixels = torch.randint(0, 256, (4 * batch, channels, size, size), dtype=torch.uint8)
    labels = torch.randint(0, 10, (4 * batch,))
    plan = device.Plan("cpu", "fp32", "contiguous")
    batches = Batches(
        Split(ArrayRows(pixels), labels, [str(i) for i in range(len(labels))]),
        batch_size=batch,
        normalize=Normalize([0.5] * channels, [0.25] * channels),
        plan=plan,
        seed=0,
        process_group=process_group,
    )
    loop = TrainLoop(
        model,
        optim.build_optimizer(model, recipe.OptimConfig(name="adam", lr=1e-4)),
        nn.CrossEntropyLoss(),
        plan,
        data_parallel=DataParallel(process_group, batches.sizes)
        if process_group.size > 1
        else None,
    )
    records = loop.run(batches, lambda progress: 1.0, epochs=10**6, seed=0)

    def step() -> Step:
        for event in records:
            if isinstance(event, Step):
                return event
        raise AssertionError

    return step


def timed(step: Callable[[], object], steps: int, threads: int) -> float:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def compare(
    process_group: ProcessGroup, rounds: int, case: tuple[str, int, int, int, int]
) -> dict[str, Any]:
    """Measure steps alone and together with the same batch; all processes call this."""
    name, batch, channels, size, steps = case
    cores = device.usable_cores()
    alone = steps_of(SINGLE_PROCESS, name, batch, channels, size)
    together = steps_of(process_group, name, batch, channels, size)
    weights = sum(p.numel() for p in network(name, channels, size).parameters())
    numbers = torch.zeros(weights)
    spent: dict[str, list[float]] = {"alone": [], "one_thread": [], "together": [], "sum": []}
    for turn in range(rounds + 1):
        process_group.barrier()
        once = timed(alone, steps, cores) if process_group.is_main_process else 0.0
        single = timed(alone, steps, 1) if process_group.is_main_process else 0.0
        process_group.barrier()
        both = timed(together, steps, max(1, cores // process_group.size))
        summed = timed(lambda: process_group.all_reduce_(numbers), 5, 1)
        if turn:
            for times, seconds in zip(spent.values(), (once, single, both, summed), strict=True):
                times.append(seconds)
    if not process_group.is_main_process:
        return {}
    ratios = [a / b for a, b in zip(spent["alone"], spent["together"], strict=True)]
    singles = [a / b for a, b in zip(spent["one_thread"], spent["together"], strict=True)]
    return {
        "batch": batch,
        "weights": weights,
        "alone_ms": round(1000 * statistics.median(spent["alone"]), 2),
        "one_thread_ms": round(1000 * statistics.median(spent["one_thread"]), 2),
        "together_ms": round(1000 * statistics.median(spent["together"]), 2),
        "sum_ms": round(1000 * statistics.median(spent["sum"]), 2),
        "together_images_per_second": round(batch / statistics.median(spent["together"])),
        "faster_by": round(statistics.median(ratios), 3),
        "faster_than_one_thread_by": round(statistics.median(singles), 3),
        "faster_by_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if process.world_size() == 1:
        line = ["--standalone", "--nproc-per-node", str(options.processes), *sys.argv]
        # Set explicitly, since torchrun would set one thread and print a warning.
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *line], env=env)
        sys.exit(done.returncode)
    process_group = distributed.init_process_group()
    process.keep_freed_memory()
    figures = {case[0]: compare(process_group, options.rounds, case) for case in CASES}
    if process_group.is_main_process:
        cores = device.usable_cores()
        about = {"processes": process_group.size, "cores": cores, "rounds": options.rounds}
        print(json.dumps(record("processes", about | {"cases": figures})))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()

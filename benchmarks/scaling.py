"""Cost against work: images, classes and pixels from small to large, each beside the others.

Time an image (training step, evaluation, opening the set) should not depend on how many there
are; memory is bounded by the budget for images, whatever the set. Every size is measured in a
process of its own (peak memory), on one thread, in turn, several times. The images are 64 drawn
shapes again and again, so that what is measured is convlens and not the drawing.

python benchmarks/scaling.py [--rounds 3] [--budget 64MB] [--images 1000,10000,...]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# First: it sets what libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
import torch
from torch import nn

import convlens.data.dataset as data
from convlens import device, metrics, models, optim
from convlens.data import sources
from convlens.data.loader import Batches, Normalize, epoch_order
from convlens.data.sources import DrawnShapes
from convlens.data.types import DataSource, NumberedStrings, Part
from convlens.engine import inference
from convlens.engine.loop import Step, TrainLoop
from convlens.recipe import DataConfig, load_recipe
from convlens.run import RunDir
from convlens.utils import process

IMAGES, CLASSES, SIDES = (1_000, 10_000, 100_000, 1_000_000), (10, 100, 1_000), (32, 64, 128, 224)
FIRST = 10, 32  # classes and side where these aren't what changes
OF_CLASSES = 20_000  # images where classes change: each of 1,000 needs some to be split
EVALUATED = 3 << 10  # images of 32 px that the network answers, as many pixels of another size
OF_SIDES = 4_000  # images where the side changes: more than the largest batch
BATCH = 64
PIXELS = 16 * 224 * 224  # of a batch where the side changes: the same working set for each
NET = {"widths": [32, 64], "depth": 1, "head": "avg"}
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "scaling.svg"
Case = tuple[int, int, int]  # images, classes, side


class Repeated:
    """`count` images, drawn shapes again and again: read in no time, in little memory."""

    def __init__(self, count: int, side: int) -> None:
        self.shape: tuple[int, ...] = (count, 3, side, side)
        self._pool = DrawnShapes(64, side)[np.arange(64)]

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray:
        return self._pool[index % len(self._pool)]


# One size, in this process


def measure(count: int, classes: int, side: int, batch: int, budget: int) -> dict[str, float]:
    """CPU and wall seconds an image of training and evaluating, those of a start, peak bytes."""

    def source() -> DataSource:
        images, labels = Repeated(count, side), np.arange(count) % classes
        names = tuple(f"class {k:04}" for k in range(classes))
        return DataSource(
            "repeated", names, {"train": Part(images, labels, NumberedStrings("repeated", count))}
        )

    sources.SOURCES["repeated"] = source
    process.keep_freed_memory()
    device.prepare(deterministic=False)
    model = models.build_model("cnn", classes, 3, side, NET)
    figures = {}
    config = DataConfig(name="repeated", image_size=side)

    def opening() -> data.Data:
        found = data.load(config, memory_budget=budget)
        data.channel_stats(found.train)
        epoch_order(len(found.train), 0, 1)
        with tempfile.TemporaryDirectory() as folder:
            RunDir(Path(folder)).write_split(found.held_out)
        return found

    loaded, figures["open_cpu"], figures["open_wall"] = timed(opening)
    figures["train_cpu"], figures["train_wall"] = trained(model, loaded, batch)
    figures["evaluate_cpu"], figures["evaluate_wall"] = evaluated(model, loaded)
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)  # not ru_maxrss: that begins with the parent's
    figures["peak"] = int(peak[1]) * 1024 if peak else 0
    return figures


def timed(job: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a job gives, its CPU seconds (all threads) and its seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = job()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def trained(model: nn.Module, loaded: data.Data, batch: int) -> tuple[float, float]:
    """CPU and wall seconds an image over some batches, gathering and optimiser included."""
    plan = device.Plan("cpu", "fp32", "contiguous")
    batches = Batches(
        loaded.train,
        batch_size=batch,
        normalize=Normalize([0.5] * 3, [0.25] * 3),
        plan=plan,
        seed=0,
    )
    config = load_recipe("folder").optim
    loop = TrainLoop(model, optim.build_optimizer(model, config), nn.CrossEntropyLoss(), plan)
    records = loop.run(batches, optim.build_schedule(config), epochs=10**6, seed=0)
    if len(loaded.train) < batch:
        raise SystemExit(f"{len(loaded.train)} images are no batch of {batch}")
    steps = (r for r in records if isinstance(r, Step))
    rounds = []
    few = max(1, 8 * BATCH * 32 * 32 // (batch * loaded.image_size**2))
    for turn in range(5):

        def some() -> int:
            # The last batch of an epoch is smaller: it costs less, and counts for less.
            return sum(next(steps).images for _ in range(few))

        images, cpu, wall = timed(some)
        if turn:  # the first warms up
            rounds.append((cpu / images, wall / images))
    return median(rounds)


def evaluated(model: nn.Module, loaded: data.Data) -> tuple[float, float]:
    """CPU and wall seconds an image: answers of the network, then all of their numbers."""
    plan = device.Plan("cpu", "fp32", "contiguous")
    # As many from every set, and full batches, whose buffers are a good part of the memory: the
    # smallest set's are taken several times.
    count = EVALUATED * 32 * 32 // loaded.image_size**2
    # Neighbours differ, since equal ones are quicker: what branches a pooling takes is then known.
    step = max(1, len(loaded.val) // count - 1) | 1
    index = torch.arange(count) * step % len(loaded.val)
    part = data.Split(loaded.val.rows.take(index), loaded.val.labels[index], [""] * count)

    def some() -> None:
        normalize = Normalize([0.5] * 3, [0.25] * 3)
        logits, labels = inference.split_logits(model, part, normalize, plan)
        metrics.summarize(logits.numpy(), labels.numpy(), loaded.classes)

    some()
    rounds = [tuple(seconds / count for seconds in timed(some)[1:]) for _ in range(3)]
    return median(rounds)


def median(rounds: list[Any]) -> tuple[float, float]:
    cpu, wall = (statistics.median(values) for values in zip(*rounds, strict=True))
    return cpu, wall


# All sizes, each in a process of its own


def cases(
    images: tuple[int, ...], classes: tuple[int, ...], sides: tuple[int, ...]
) -> Iterator[tuple[str, Case, int]]:
    """What changes, the case, and its batch."""
    few, small = FIRST
    yield from (("images", (n, few, small), BATCH) for n in images)
    yield from (("classes", (OF_CLASSES, k, small), BATCH) for k in classes)
    yield from (("side", (OF_SIDES, few, s), PIXELS // s**2) for s in sides)


def in_a_process(case: Case, batch: int, budget: int) -> dict[str, float]:
    arguments = ["--one", *map(str, (*case, batch, budget))]
    # One thread: what threads use while they wait for each other is CPU time, too, and noise.
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def summed_up(rounds: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, and of the ratios to the first case of the same round."""
    figures: dict[str, Any] = {}
    for key in rounds[0]:
        figures[key] = statistics.median(r[key] for r in rounds)
        ratios = [r[key] / f[key] for r, f in zip(rounds, first, strict=True)]
        figures[f"{key}_ratio"] = round(statistics.median(ratios), 4)
        figures[f"{key}_ratios"] = [round(ratio, 3) for ratio in ratios]
    return figures


def plot(series: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.figure import Figure

    from convlens.plots.style import BLUE, GRAY, VERMILION, save_figure, use_style

    @use_style
    def drawing() -> Figure:
        figure = Figure(figsize=(8.4, 2.6), layout="constrained")
        names = {"images": "images", "classes": "classes", "side": "pixels a side"}
        for axes, (name, rows) in zip(figure.subplots(1, 3), series.items(), strict=True):
            x = [row[name] for row in rows]
            for key, color, label in (
                ("train_cpu", BLUE, "training"),
                ("evaluate_cpu", VERMILION, "evaluating"),
            ):
                ratios = [row[f"{key}_ratio"] for row in rows]
                axes.plot(x, ratios, "o-", color=color, label=label)
            axes.axhspan(0.9, 1.1, color=GRAY, alpha=0.12, linewidth=0)
            axes.set(
                xscale="log",
                ylim=(0.5, 1.5),
                xlabel=names[name],
                xticks=x,
                xticklabels=[f"{v:,}" for v in x],
            )
            axes.minorticks_off()
            axes.set_title(f"CPU time {'a pixel' if name == 'side' else 'an image'}")
        axes.legend(loc="lower left")
        return figure

    save_figure(drawing(), FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", default="64MB", help="bytes of images in memory")
    for name, values in (("images", IMAGES), ("classes", CLASSES), ("sides", SIDES)):
        parser.add_argument(f"--{name}", default=",".join(map(str, values)))
    parser.add_argument("--one", nargs=5, type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(*asked.one)))
        return
    os.environ["CONVLENS_MEMORY"] = asked.budget
    budget = device.memory_budget("cpu")
    sizes = [tuple(map(int, getattr(asked, n).split(","))) for n in ("images", "classes", "sides")]
    every = list(cases(*sizes))
    found: list[list[dict[str, float]]] = [[] for _ in every]
    for turn in range(asked.rounds):
        for number, (name, case, batch) in enumerate(every):
            figures = in_a_process(case, batch, budget)
            if name == "side":  # a pixel instead of an image
                for key in figures:
                    figures[key] /= 1 if key == "peak" else case[2] ** 2
            found[number].append(figures)
            print(turn, name, case, {k: f"{v:.3g}" for k, v in figures.items()}, file=sys.stderr)
    series: dict[str, list[dict[str, Any]]] = {"images": [], "classes": [], "side": []}
    for number, (name, (images, classes, side), batch) in enumerate(every):
        first = next(n for n, (other, _, _) in enumerate(every) if other == name)
        series[name].append(
            {
                "images": images,
                "classes": classes,
                "side": side,
                "batch": batch,
                **summed_up(found[number], found[first]),
            }
        )
    plot(series)
    print(
        json.dumps(
            record(
                "scaling",
                {
                    "budget": budget,
                    "rounds": asked.rounds,
                    "threads": 1,
                    "network": NET,
                    "series": series,
                },
            )
        )
    )


if __name__ == "__main__":
    main()

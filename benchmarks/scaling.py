"""Time and memory for increasing numbers of images, classes and pixels.

The time per image (training step, evaluation, opening the set) should not depend on the number of
images, and memory is bounded by the budget for images. Every size is measured in its own process
(for the peak memory), on one thread, several times in turn. The images repeat 64 drawn shapes, so
that the drawing takes no time.

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

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
import torch
from torch import nn

from convlens import device, metrics, models, optim
from convlens.data import dataset, sources
from convlens.data.loader import Batches, Normalize, epoch_order
from convlens.data.sources import DrawnShapes
from convlens.data.types import DataSource, NumberedStrings, Part
from convlens.engine import inference
from convlens.engine.loop import Step, TrainLoop
from convlens.recipe import DataConfig, load_recipe
from convlens.run import RunDir
from convlens.utils import process

IMAGES, CLASSES, SIDES = (1_000, 10_000, 100_000, 1_000_000), (10, 100, 1_000), (32, 64, 128, 224)
DEFAULT_CLASSES, DEFAULT_SIDE = 10, 32  # in the series where they do not change
OF_CLASSES = 20_000  # images of the series of classes: each of 1,000 classes needs some per split
EVALUATED = 3 << 10  # images of 32 px to evaluate; of other sizes as many pixels
OF_SIDES = 4_000  # images of the series of sides: more than the largest batch
BATCH = 64
PIXELS = 16 * 224 * 224  # of a batch in the series of sides, so that the working set stays the same
NET = {"widths": [32, 64], "depth": 1, "head": "avg"}
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "scaling.svg"
Case = tuple[int, int, int]  # images, classes, side


class Repeated:
    """`count` images that repeat a few drawn shapes: fast to read, small in memory."""

    def __init__(self, count: int, side: int) -> None:
        self.shape: tuple[int, ...] = (count, 3, side, side)
        self._pool = DrawnShapes(64, side)[np.arange(64)]

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray:
        return self._pool[index % len(self._pool)]


# Measuring one size, in this process


def measure(count: int, classes: int, side: int, batch: int, budget: int) -> dict[str, float]:
    """Return seconds of opening, seconds per image of training and evaluation, and peak bytes."""

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

    def opening() -> dataset.Data:
        found = dataset.load_data(config, memory_budget=budget)
        dataset.channel_stats(found.train)
        epoch_order(len(found.train), 0, 1)
        with tempfile.TemporaryDirectory() as folder:
            RunDir(Path(folder)).write_split(found.held_out)
        return found

    loaded, figures["open_cpu"], figures["open_wall"] = timed(opening)
    figures["train_cpu"], figures["train_wall"] = trained(model, loaded, batch)
    figures["evaluate_cpu"], figures["evaluate_wall"] = evaluated(model, loaded)
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)  # not ru_maxrss, which starts with the parent's
    figures["peak"] = int(peak[1]) * 1024 if peak else 0
    return figures


def timed(job: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of a job, its CPU seconds (all threads) and its wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = job()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def trained(model: nn.Module, loaded: dataset.Data, batch: int) -> tuple[float, float]:
    """Return CPU and wall seconds per image of training, with gathering and optimizer."""
    plan = device.Plan("cpu", "fp32", "contiguous")
    batches = Batches(
        loaded.train,
        batch_size=batch,
        normalize=Normalize([0.5] * 3, [0.25] * 3),
        plan=plan,
        seed=0,
    )
    config = load_recipe("folder", ["optim.lr=0.003", "optim.layer_decay=1"]).optim
    loop = TrainLoop(model, optim.build_optimizer(model, config), nn.CrossEntropyLoss(), plan)
    records = loop.run(batches, optim.build_schedule(config), epochs=10**6, seed=0)
    if len(loaded.train) < batch:
        raise SystemExit(f"{len(loaded.train)} images are fewer than a batch of {batch}")
    steps = (r for r in records if isinstance(r, Step))
    rounds = []
    few = max(1, 8 * BATCH * 32 * 32 // (batch * loaded.image_size**2))
    for turn in range(5):

        def train_some() -> int:
            # The last batch of an epoch is smaller and counts for less.
            return sum(next(steps).images for _ in range(few))

        images, cpu, wall = timed(train_some)
        if turn:  # the first round warms up
            rounds.append((cpu / images, wall / images))
    return median(rounds)


def evaluated(model: nn.Module, loaded: dataset.Data) -> tuple[float, float]:
    """Return CPU and wall seconds per image of evaluation: logits, then metrics."""
    plan = device.Plan("cpu", "fp32", "contiguous")
    # Equally many images from every set, in full batches, whose buffers take much of the memory;
    # those of the smallest set repeat.
    count = EVALUATED * 32 * 32 // loaded.image_size**2
    # Adjacent images differ: equal ones are faster, since the branches of pooling are predicted.
    step = max(1, len(loaded.val) // count - 1) | 1
    index = torch.arange(count) * step % len(loaded.val)
    part = dataset.Split(loaded.val.rows.subset(index), loaded.val.labels[index], [""] * count)

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


# Measuring all sizes, each in its own process


def cases(
    images: tuple[int, ...], classes: tuple[int, ...], sides: tuple[int, ...]
) -> Iterator[tuple[str, Case, int]]:
    """Yield the name of the series, the case, and its batch size."""
    few, small = DEFAULT_CLASSES, DEFAULT_SIDE
    yield from (("images", (n, few, small), BATCH) for n in images)
    yield from (("classes", (OF_CLASSES, k, small), BATCH) for k in classes)
    yield from (("side", (OF_SIDES, few, s), PIXELS // s**2) for s in sides)


def measure_in_process(case: Case, batch: int, budget: int) -> dict[str, float]:
    arguments = ["--one", *map(str, (*case, batch, budget))]
    # One thread: threads that wait for each other also use CPU time.
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


def summarize(rounds: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians over the rounds, and of the ratios to the first case of the same round."""
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
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    os.environ["CONVLENS_MEMORY"] = options.budget
    budget = device.memory_budget("cpu")
    sizes = [
        tuple(map(int, getattr(options, n).split(","))) for n in ("images", "classes", "sides")
    ]
    every = list(cases(*sizes))
    found: list[list[dict[str, float]]] = [[] for _ in every]
    for turn in range(options.rounds):
        for number, (name, case, batch) in enumerate(every):
            figures = measure_in_process(case, batch, budget)
            if name == "side":  # per pixel instead of per image
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
                **summarize(found[number], found[first]),
            }
        )
    plot(series)
    print(
        json.dumps(
            record(
                "scaling",
                {
                    "budget": budget,
                    "rounds": options.rounds,
                    "threads": 1,
                    "network": NET,
                    "series": series,
                },
            )
        )
    )


if __name__ == "__main__":
    main()

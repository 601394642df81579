"""Share of the device's peak rate that the training of each recipe uses, and cost of the loop.

    python benchmarks/roofline.py [--recipes NAMES] [--seconds 3] [--device cpu]

The rate of the device is that of products of large square matrices, in bf16 on a GPU (fp16 where
it has no bf16), in fp32 on a CPU. The rate of a recipe is the number of floating-point operations
of a forward and backward pass for one image (`torch.utils.flop_counter`: convolutions and matrix
products), times the images per second of the real loop with augmentation on resident random images.
The bare step repeats forward, backward and optimizer on one resident batch, compiled as in the
plan; the ratio is the cost of order, augmentation, finite check and Python.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convlens import device, models, optim, recipe
from convlens.data.cache import ArrayRows
from convlens.data.dataset import Split
from convlens.data.loader import Batches, Normalize
from convlens.data.transforms import pipeline
from convlens.device import Plan
from convlens.engine.loop import Step, TrainLoop
from convlens.engine.numerics import make_grad_scaler
from convlens.models import stages
from convlens.recipe import Recipe
from convlens.training.autotune import WARMUP_STEPS
from convlens.utils import process

RECIPES = (
    "mnist",
    "mnist-fast",
    "mnist-best",
    "cifar10-fast",
    "resnet18",
    "resnet18-best",
    "resnet18-tiny",
    "pretrain",
    "tiny-best",
)
GREY = ("mnist", "digits")


def matmul_rate(device_name: str, size: int, seconds: float) -> dict[str, Any]:
    """Return the FLOP/s of the best of several windows of square matrix products."""
    half = device.half_precision(device_name) if device_name.startswith("cuda") else None
    dtype = device.HALF_DTYPES[half] if half else torch.float32
    a, b = (torch.randn(size, size, device=device_name).to(dtype) for _ in range(2))
    a @ b
    device.synchronize(device_name)
    rates = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        device.synchronize(device_name)
        rates.append(5 * 2 * size**3 / (time.perf_counter() - start))
    return {"size": size, "precision": half or "fp32", "flops_a_second": max(rates)}


class Case:
    """Network and batches of a recipe on random images, with the plan of a long run."""

    def __init__(
        self, name: str, device_name: str, step: str, batch: int | None, layout: str
    ) -> None:
        self.recipe: Recipe = recipe.load_recipe(name)
        size = self.recipe.data.image_size
        self.size = size if isinstance(size, int) else 28 if self._grey else 32
        self.channels = 1 if self._grey else 3
        self.batch = batch or self.recipe.train.batch_size
        options = self.recipe.train
        self.plan: Plan = device.candidate_plans(
            device_name, options.precision, options.memory_format, False
        )[0]
        self.plan = replace(
            self.plan, step_mode=step, memory_format=layout or self.plan.memory_format
        )

    @property
    def _grey(self) -> bool:
        return self.recipe.data.name in GREY

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        net = self.recipe.model
        model = models.build_model(net.name, 10, self.channels, self.size, net.options)
        stages.freeze(model, net.trainable)
        stages.set_train_mode(self.plan.prepare_model(model))
        return model

    def images(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (count, self.channels, self.size, self.size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return images, torch.arange(count) % 10

    def flops(self) -> float:
        """Return the operations of forward and backward pass for one image."""
        model, count = self.model(), 2
        images, labels = self.images(count)
        ready = self._normalize(images.to(self.plan.device), self.plan)
        with FlopCounterMode(display=False) as counter:
            loss = nn.functional.cross_entropy(model(ready).float(), labels.to(self.plan.device))
            loss.backward()
        return counter.get_total_flops() / count

    @property
    def _normalize(self) -> Normalize:
        return Normalize([0.5] * self.channels, [0.25] * self.channels)

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        return self._normalize(images.to(self.plan.device), self.plan)

    def loop(self) -> Callable[[], None]:
        """Return one step of a full batch of the engine, as `train` runs it."""
        config, model = self.recipe, self.model()
        operations = pipeline.build_pipeline(
            config.operations, image_size=self.size, channels=self.channels, classes=10
        )
        images, labels = self.images(8 * self.batch)
        feed = Batches(
            Split(ArrayRows(images), labels, [str(i) for i in range(len(labels))]),
            batch_size=self.batch,
            normalize=self._normalize,
            plan=self.plan,
            seed=0,
            augment=operations if config.operations else None,
        )
        optimizer = optim.build_optimizer(model, config.optim)
        loop = self._train_loop(
            model, optimizer, optim.build_averager(model, config.optim, steps=10**6)
        )
        records = loop.run(feed, lambda progress: 1e-4, epochs=10**6, seed=0)
        steps = (r for r in records if isinstance(r, Step))
        return lambda: self._take(steps)

    def bare(self) -> Callable[[], None]:
        """Return the same step on one normalized batch, without order, augmentation or averages."""
        config, model = self.recipe, self.model()
        optimizer = optim.build_optimizer(model, config.optim)
        for group in optimizer.param_groups:
            group["lr"] *= 1e-4
        images, labels = self.images(self.batch)
        ready, targets = self._prepare(images), labels.to(self.plan.device)
        loop = self._train_loop(model, optimizer, None)
        return lambda: self._take(iter([loop.train_step(ready, targets)]))

    def _train_loop(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averager: optim.WeightAverage | None,
    ) -> TrainLoop:
        config = self.recipe.optim
        scaler = make_grad_scaler(self.plan.device) if self.plan.precision == "fp16" else None
        return TrainLoop(
            model,
            optimizer,
            self._objective,
            self.plan,
            clip_value=config.clip_value,
            clip_norm=config.clip_norm,
            averager=averager,
            scaler=scaler,
        )

    @property
    def _objective(self) -> nn.Module:
        return nn.CrossEntropyLoss(label_smoothing=self.recipe.optim.label_smoothing)

    @staticmethod
    def _take(steps: Iterator[object]) -> None:
        next(steps)


def windows(case: Case, seconds: float) -> dict[str, Any]:
    """Measure images per second of both loops in turn, in windows of a twentieth of the time."""
    loops = {"loop": case.loop(), "bare": case.bare()}
    for step in loops.values():  # choice of algorithms, compilation
        for _ in range(WARMUP_STEPS + 1):
            step()
        device.synchronize(case.plan.device)
    start = time.perf_counter()
    loops["bare"]()
    device.synchronize(case.plan.device)
    count = max(2, round(seconds / 20 / (time.perf_counter() - start)))
    rates: dict[str, list[float]] = {name: [] for name in loops}
    until = time.perf_counter() + seconds
    for turn in itertools.count():
        for name in (list(loops), list(loops)[::-1])[turn % 2]:
            start = time.perf_counter()
            for _ in range(count):
                loops[name]()
            device.synchronize(case.plan.device)
            rates[name].append(count * case.batch / (time.perf_counter() - start))
        if turn >= 2 and time.perf_counter() > until:
            break
    ratios = [a / b for a, b in zip(rates["loop"], rates["bare"], strict=True)]
    return {
        "images_a_second": round(statistics.median(rates["loop"]), 1),
        "bare_images_a_second": round(statistics.median(rates["bare"]), 1),
        "loop_over_bare": round(statistics.median(ratios), 4),
        "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--steps", nargs="*", default=None, help="eager reduce-overhead compiled")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--batch", type=int, help="instead of the recipe's")
    parser.add_argument("--layout", default="", help="memory format instead of the plan's")
    parser.add_argument("--size", type=int, help="of the square matrices")
    options = parser.parse_args()
    device_name = device.select_device(options.device)
    process.keep_freed_memory()
    device.prepare(deterministic=False)
    on_gpu = device_name.startswith("cuda")
    rate = matmul_rate(device_name, options.size or (8192 if on_gpu else 2048), options.seconds)
    print(f"{rate['flops_a_second'] / 1e12:.2f} TFLOP/s in {rate['precision']}", file=sys.stderr)
    rows = []
    for name in options.recipes:
        modes = ["eager", "reduce-overhead", "compiled"] if on_gpu else ["eager"]
        for step in options.steps or modes:
            case = Case(name, device_name, step, options.batch, options.layout)
            row: dict[str, Any] = {"recipe": name, "plan": str(case.plan), "batch": case.batch}
            try:
                row["flops_an_image"] = case.flops()
                row |= windows(case, options.seconds)
                used = row["flops_an_image"] * row["images_a_second"]
                row |= {"flops_a_second": used, "share": round(used / rate["flops_a_second"], 4)}
            except Exception as error:  # a failing recipe must not prevent the table
                row["failed"] = (str(error).splitlines() or [repr(error)])[0][:200]
            rows.append(row)
            print(row, file=sys.stderr)
    name = "roofline" if on_gpu else "roofline-cpu"
    print(json.dumps(record(name, {"matmul": rate, "rows": rows})))


if __name__ == "__main__":
    main()

"""How much of the device's rate each recipe's training uses, and what the loop itself costs.

    python benchmarks/roofline.py [--recipes NAMES] [--seconds 3] [--device cpu]

The device's rate is measured: products of large square matrices, in bf16 on a GPU (fp16 where it
has no bf16), in fp32 on a CPU. A recipe's is the floating-point operations of forward and backward
pass for one image (`torch.utils.flop_counter`: convolutions and matrix products) times the images
a second of the real loop, augmentation included, on a resident set of random images. Beside it
the same step bare: forward, backward, optimiser again and again on one batch that is there,
compiled or recorded as the plan says; the ratio is what order, augmentation, guard and Python cost.
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

# First: it sets what libgomp reads when torch is imported.
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


def matmul_rate(where: str, size: int, seconds: float) -> dict[str, Any]:
    """FLOP/s of the best of several windows of square products."""
    half = device.half_precision(where) if where.startswith("cuda") else None
    dtype = device.HALF_DTYPES[half] if half else torch.float32
    a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    a @ b
    device.synchronize(where)
    rates = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        device.synchronize(where)
        rates.append(5 * 2 * size**3 / (time.perf_counter() - start))
    return {"size": size, "precision": half or "fp32", "flops_a_second": max(rates)}


class Case:
    """A recipe's network and batches on random images, by the plan that a long run would take."""

    def __init__(self, name: str, where: str, step: str, batch: int | None, layout: str) -> None:
        self.recipe: Recipe = recipe.load_recipe(name)
        size = self.recipe.data.image_size
        self.size = size if isinstance(size, int) else 28 if self._grey else 32
        self.channels = 1 if self._grey else 3
        self.batch = batch or self.recipe.train.batch_size
        options = self.recipe.train
        self.plan: Plan = device.candidate_plans(
            where, options.precision, options.memory_format, False
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
        """Of forward and backward pass, for one image."""
        model, count = self.model(), 2
        images, labels = self.images(count)
        ready = self._normalise(images.to(self.plan.device), self.plan)
        with FlopCounterMode(display=False) as counter:
            loss = nn.functional.cross_entropy(model(ready).float(), labels.to(self.plan.device))
            loss.backward()
        return counter.get_total_flops() / count

    @property
    def _normalise(self) -> Normalize:
        return Normalize([0.5] * self.channels, [0.25] * self.channels)

    def _whole(self, images: torch.Tensor) -> torch.Tensor:
        return self._normalise(images.to(self.plan.device), self.plan)

    def loop(self) -> Callable[[], None]:
        """The engine as `train` runs it; a call is one step of a full batch."""
        asked, model = self.recipe, self.model()
        operations = pipeline.build_pipeline(
            asked.operations, image_size=self.size, channels=self.channels, classes=10
        )
        images, labels = self.images(8 * self.batch)
        feed = Batches(
            Split(ArrayRows(images), labels, [str(i) for i in range(len(labels))]),
            batch_size=self.batch,
            normalize=self._normalise,
            plan=self.plan,
            seed=0,
            augment=operations if asked.operations else None,
        )
        optimizer = optim.build_optimizer(model, asked.optim)
        loop = self._train_loop(
            model, optimizer, optim.build_averager(model, asked.optim, steps=10**6)
        )
        records = loop.run(feed, lambda progress: 1e-4, epochs=10**6, seed=0)
        steps = (r for r in records if isinstance(r, Step))
        return lambda: self._take(steps)

    def bare(self) -> Callable[[], None]:
        """The same step on one normalised batch: no order, augmentation or average."""
        asked, model = self.recipe, self.model()
        optimizer = optim.build_optimizer(model, asked.optim)
        for group in optimizer.param_groups:
            group["lr"] *= 1e-4
        images, labels = self.images(self.batch)
        ready, answers = self._whole(images), labels.to(self.plan.device)
        loop = self._train_loop(model, optimizer, None)
        return lambda: self._take(iter([loop.train_step(ready, answers)]))

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
    """Images a second of both loops in turn, in windows of about a tenth of the time."""
    loops = {"loop": case.loop(), "bare": case.bare()}
    for step in loops.values():  # algorithms, capture, compiler
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
    parser.add_argument("--batch", type=int, help="instead of each recipe's own (rehearsals)")
    parser.add_argument("--layout", default="", help="instead of the plan's own")
    parser.add_argument("--size", type=int, help="of the matrices")
    asked = parser.parse_args()
    where = device.select_device(asked.device)
    process.keep_freed_memory()
    device.prepare(deterministic=False)
    on_gpu = where.startswith("cuda")
    rate = matmul_rate(where, asked.size or (8192 if on_gpu else 2048), asked.seconds)
    print(f"{rate['flops_a_second'] / 1e12:.2f} TFLOP/s in {rate['precision']}", file=sys.stderr)
    rows = []
    for name in asked.recipes:
        modes = ["eager", "reduce-overhead", "compiled"] if on_gpu else ["eager"]
        for step in asked.steps or modes:
            case = Case(name, where, step, asked.batch, asked.layout)
            row: dict[str, Any] = {"recipe": name, "plan": str(case.plan), "batch": case.batch}
            try:
                row["flops_an_image"] = case.flops()
                row |= windows(case, asked.seconds)
                used = row["flops_an_image"] * row["images_a_second"]
                row |= {"flops_a_second": used, "share": round(used / rate["flops_a_second"], 4)}
            except Exception as error:  # one that fails must not cost the table
                row["failed"] = (str(error).splitlines() or [repr(error)])[0][:200]
            rows.append(row)
            print(row, file=sys.stderr)
    name = "roofline" if on_gpu else "roofline-cpu"
    print(json.dumps(record(name, {"matmul": rate, "rows": rows})))


if __name__ == "__main__":
    main()

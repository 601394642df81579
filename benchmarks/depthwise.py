"""Time of a training step with torch's and with convlens' gradients of depthwise convolutions.

    python benchmarks/depthwise.py [--network tf_efficientnet_lite0] [--size 160] [--rounds 7]

Both are timed in turns, in bfloat16 and channels_last on the CPU, and torch's in float32 as well:
batches of 32 random images, trained from each of some stages on. The result is
`benchmarks/results/depthwise.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import torch
from torch.nn import functional as F

from convlens import models
from convlens.device import Plan
from convlens.engine.depthwise import depthwise_gradients
from convlens.models import stages

BATCH = 32


def make_step(name: str, size: int, first: str, precision: str, fast: bool) -> Callable[[], None]:
    """Return a function that does a forward and backward pass in train mode."""
    torch.manual_seed(0)
    model = models.build_model(name, 10, 3, size, {})
    stages.freeze(model, "all" if first == "all" else f"{first}+")
    plan = Plan("cpu", precision, "channels_last")
    plan.prepare_model(model)
    stages.set_train_mode(model)
    context = depthwise_gradients(model, plan) if fast else contextlib.nullcontext()
    images = torch.randn(BATCH, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))

    def step() -> None:
        with plan.autocast(), context:
            logits = model(images)
        model.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--stages", nargs="*", default=["all", "blocks.2", "blocks.3", "blocks.5"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    kinds = {"float32": ("fp32", False), "bfloat16": ("bf16", False), "convlens": ("bf16", True)}
    rows = {}
    for first in options.stages:
        steps = {k: make_step(options.network, options.size, first, *v) for k, v in kinds.items()}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(options.rounds + 1):
            for kind, step in steps.items():
                start = time.perf_counter()
                step()
                if turn:  # the first turn warms up
                    times[kind].append(time.perf_counter() - start)
        ours = times["convlens"]
        rows[first] = {
            kind: {
                "ms_an_image": round(1000 * statistics.median(spent) / BATCH, 2),
                "over_convlens": round(
                    statistics.median(a / b for a, b in zip(spent, ours, strict=True)), 2
                ),
            }
            for kind, spent in times.items()
        }
        print(first, rows[first], flush=True)
    figures = {"network": options.network, "size": options.size, "batch": BATCH, "stages": rows}
    print(json.dumps(record("depthwise", figures)))


if __name__ == "__main__":
    main()

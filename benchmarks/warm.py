"""Warm training time by the rules of the CIFAR-10 records.

    python benchmarks/warm.py mnist-fast [--seeds 10] [--steps eager] [--change key=value ...]

After a run that warms up (choice of kernels, compilation), the initial weights of each seed are
copied into the same network and trained in the same process. The time includes whitening (if the
network has it), training and the predictions for the test set, with the device synchronized at both
ends. Loading, upload and initialization are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from convlens.runtime import RuntimeContext


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the runs, and mean and sample deviation of their numbers."""
    figures: dict[str, Any] = {"runs": list(runs)}
    for key in ("seconds", "tta", "plain"):
        values = [run[key] for run in runs]
        if values:
            figures[key] = statistics.fmean(values)
            figures[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return figures


def warm(
    name: str, changes: Sequence[str], *, seeds: int, step: str, on: str, tta: str | None
) -> dict[str, Any]:
    """Train a recipe `seeds` times after a warm-up run, with steps of mode `step`."""
    import torch

    from convlens import device, models, optim
    from convlens.data.cache import ArrayRows
    from convlens.data.dataset import load_data, load_external_data
    from convlens.engine import inference
    from convlens.engine.loop import TrainLoop
    from convlens.recipe import load_recipe
    from convlens.training.setup import _sample_images, build_training_job
    from convlens.utils import process

    process.keep_freed_memory()
    device.prepare(deterministic=False)
    recipe = load_recipe(name, ["train.compile=false", *changes])
    data = load_data(recipe.data, memory_budget=device.memory_budget(on))
    test, *_ = load_external_data(
        recipe.data.name,
        "test",
        conversion=data.conversion,
        memory_budget=1 << 31,
    )
    images = test.rows.in_memory_tensor()
    assert images is not None
    test = replace(test, rows=ArrayRows(images.to(on)))  # no upload is counted
    net: torch.nn.Module | None = None
    runs = []
    for seed in range(seeds + 1):
        job = build_training_job(
            recipe.replace(**{"train.seed": seed}), data, RuntimeContext(on, quiet=True)
        )
        plan = replace(job.plan, step_mode=step)
        if net is None:
            net = job.model
        else:
            net.load_state_dict(job.model.state_dict())
            for p, q in zip(net.parameters(), job.model.parameters(), strict=True):
                p.requires_grad_(q.requires_grad)
        few = _sample_images(data.train, job.preprocessing, on)
        optimizer = optim.build_optimizer(net, recipe.optim)
        device.synchronize(on)
        start = time.perf_counter()
        if isinstance(net, models.DataInitialized):
            net.initialize(few)
        steps = len(job.inputs.batches) * job.epochs
        loop = TrainLoop(
            net,
            optimizer,
            job.criterion,
            plan,
            averager=optim.build_averager(net, recipe.optim, steps),
        )
        for _ in loop.run(job.inputs.batches, job.schedule, epochs=job.epochs, seed=seed):
            pass
        trained = time.perf_counter()  # the last record has synchronized the device
        exact = replace(plan, precision="fp32", step_mode="eager")
        normalize = job.preprocessing.normalize
        answers, labels = inference.split_outputs(
            net, test, normalize, exact, inference.select_views(tta)
        )
        found = answers.logits if answers.tta_logits is None else answers.tta_logits
        accuracy = float((found.argmax(1) == labels).float().mean())  # synchronizes
        seconds = time.perf_counter() - start
        plain = float((answers.logits.argmax(1) == labels).float().mean())
        result = {
            "run": seed,
            "tta": accuracy,
            "plain": plain,
            "seconds": seconds,
            "training": trained - start,
        }
        print(f"{name}, {step}{' (warm-up)' if not seed else ''}: {result}", file=sys.stderr)
        runs += [result] if seed else []
    torch._dynamo.reset()
    return {**summary(runs), "plan": str(plan)}


def main() -> None:
    from convlens import device
    from recording import record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="mnist-fast")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", nargs="*", default=["eager", "reduce-overhead", "compiled"])
    parser.add_argument(
        "--change", nargs="*", default=[], help="overrides of the recipe, key=value"
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--dry", action="store_true", help="record nothing")
    options = parser.parse_args()
    on = device.select_device(options.device)
    figures: dict[str, Any] = {"recipe": options.recipe, "changes": options.change, "on": on}
    for step in options.steps:
        try:
            figures[step] = warm(
                options.recipe, options.change, seeds=options.seeds, step=step, on=on, tta=None
            )
        except Exception as error:  # a failing mode must not prevent the others
            figures[step] = {"failed": (str(error).splitlines() or [repr(error)])[0][:200]}
    print(json.dumps(figures if options.dry else record(f"warm-{options.recipe}", figures)))


if __name__ == "__main__":
    main()

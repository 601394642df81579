"""Training time by the rule of the CIFAR-10 records: warm, from weights to the last test answer.

    python benchmarks/warm.py mnist-fast [--seeds 10] [--steps eager] [--change key=value ...]

In one process, after a run that warms everything up (kernels chosen, steps recorded or compiled),
each seed's new weights are put into the same network and trained; the clock runs from whitening
(where the network has it) over training to the answers for the test set, and waits for the device
at both ends. Loading, upload and initial weights are not counted.
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


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample deviation of what the runs have, and the runs."""
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
    """`seeds` runs of a recipe after one that isn't counted, steps taken as `step` says."""
    import torch

    from convlens import device, models, optim
    from convlens.data.cache import ArrayRows
    from convlens.data.dataset import load_data, load_external_data
    from convlens.engine import inference
    from convlens.engine.loop import TrainLoop
    from convlens.recipe import load_recipe
    from convlens.training.setup import _some_images, build_training_job
    from convlens.utils import process

    process.keep_freed_memory()
    device.prepare(deterministic=False)
    asked = load_recipe(name, ["train.compile=false", *changes])
    data = load_data(asked.data, memory_budget=device.memory_budget(on))
    test, _, _, _ = load_external_data(
        asked.data.name,
        "test",
        image_size=data.image_size,
        channels=data.channels,
        fit=data.fit,
        memory_budget=1 << 31,
    )
    held = test.rows.in_memory_tensor()
    assert held is not None
    test = replace(test, rows=ArrayRows(held.to(on)))  # no upload is counted
    net: torch.nn.Module | None = None
    runs = []
    for seed in range(seeds + 1):
        job = build_training_job(asked.replace(**{"train.seed": seed}), data, on)
        plan = replace(job.plan, step_mode=step)
        if net is None:
            net = job.model
        else:
            net.load_state_dict(job.model.state_dict())
            for p, q in zip(net.parameters(), job.model.parameters(), strict=True):
                p.requires_grad_(q.requires_grad)
        few = _some_images(data.train, job.preprocessing, on)
        optimizer = optim.build_optimizer(net, asked.optim)
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
            averager=optim.build_averager(net, asked.optim, steps),
        )
        for _ in loop.run(job.inputs.batches, job.schedule, epochs=job.epochs, seed=seed):
            pass
        trained = time.perf_counter()  # the last record waited for the device
        exact = replace(plan, precision="fp32", step_mode="eager")
        normalize = job.preprocessing.normalize
        answers, labels = inference.split_outputs(
            net, test, normalize, exact, inference.select_views(tta)
        )
        found = answers.logits if answers.tta_logits is None else answers.tta_logits
        accuracy = float((found.argmax(1) == labels).float().mean())  # waits for all of it
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
    parser.add_argument("--change", nargs="*", default=[], help="of the recipe, key=value")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dry", action="store_true", help="keeps nothing")
    asked = parser.parse_args()
    on = device.select_device(asked.device)
    figures: dict[str, Any] = {"recipe": asked.recipe, "changes": asked.change, "on": on}
    for step in asked.steps:
        try:
            figures[step] = warm(
                asked.recipe, asked.change, seeds=asked.seeds, step=step, on=on, tta=None
            )
        except Exception as error:  # a way that fails must not cost the others
            figures[step] = {"failed": (str(error).splitlines() or [repr(error)])[0][:200]}
    print(json.dumps(figures if asked.dry else record(f"warm-{asked.recipe}", figures)))


if __name__ == "__main__":
    main()

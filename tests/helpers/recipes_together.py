"""Train recipe files one after the other; tests run this script under torchrun.

The first recipe is trained as a user does, with plots and test; the others are only trained.
"""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

from convlens import device, distributed, run
from convlens.data.dataset import load_data
from convlens.recipe import Recipe, load_recipe
from convlens.run import RunDir
from convlens.runtime import RuntimeContext
from convlens.training import train
from convlens.training.setup import build_training_job


def train_only(recipe: Recipe, name: str) -> None:
    context = RuntimeContext("cpu", distributed.init_process_group(), quiet=True)
    run_dir = run.shared_run_dir(context.process_group, lambda: RunDir(Path("models") / name))
    device.prepare(recipe.train.deterministic)
    data = load_data(recipe.data, memory_budget=1 << 30)
    job = build_training_job(recipe, data, context)
    run_dir.create(job.recipe, {})
    train.fit(job, run_dir)
    state = job.model.state_dict().items()
    tensors = {name: tensor.double().flatten().tolist() for name, tensor in state}
    assert context.broadcast(lambda: tensors) == tensors  # all processes hold the same bits


def main(suffix: str, first: str, *others: str) -> None:
    train.train(load_recipe(f"{first}.yaml"), name=f"{first}-{suffix}", device="cpu")
    for name in others:
        train_only(load_recipe(f"{name}.yaml"), f"{name}-{suffix}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    # The command line ends in the same way, without tearing down the interpreter.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

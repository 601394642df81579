"""Train the named recipe files one after another; runs under torchrun.

The first one is trained and tested as by the command; the others are only trained, which is faster.
"""

from __future__ import annotations

import sys
from pathlib import Path

from convlens import device, distributed, recipe, run
from convlens.data.dataset import load_data
from convlens.recipe import Recipe
from convlens.run import RunDir
from convlens.training import train
from convlens.training.setup import build_training_job


def train_only(options: Recipe, name: str) -> None:
    group = distributed.init_process_group()
    run_dir = run.shared_run_dir(group, lambda: RunDir(Path("models") / name))
    device.prepare(options.train.deterministic)
    setup = build_training_job(
        options, load_data(options.data, memory_budget=1 << 30), "cpu", world=group
    )
    run_dir.create(setup.recipe, {})
    train.fit(setup, run_dir, quiet=True)
    state = setup.trained.state_dict().items()
    values = {name: tensor.double().flatten().tolist() for name, tensor in state}
    assert group.broadcast(lambda: values) == values  # all processes have the same bits


def main(suffix: str, first: str, *others: str) -> None:
    train.train(recipe.load_recipe(f"{first}.yaml"), name=f"{first}-{suffix}", on="cpu")
    for name in others:
        train_only(recipe.load_recipe(f"{name}.yaml"), f"{name}-{suffix}")


if __name__ == "__main__":
    main(*sys.argv[1:])

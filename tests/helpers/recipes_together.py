"""Trains the recipe files that are named, one after the other: what tests run under torchrun.

The first one as a user does, with plots and test; the others are only trained, which is quicker.
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


def train_only(asked: Recipe, name: str) -> None:
    world = distributed.init_process_group()
    place = run.shared_run_dir(world, lambda: RunDir(Path("models") / name))
    device.prepare(asked.train.deterministic)
    setup = build_training_job(
        asked, load_data(asked.data, memory_budget=1 << 30), "cpu", world=world
    )
    place.create(setup.recipe, {})
    train.fit(setup, place, quiet=True)
    state = setup.trained.state_dict().items()
    found = {name: tensor.double().flatten().tolist() for name, tensor in state}
    assert world.broadcast(lambda: found) == found  # all processes hold the same bits


def main(suffix: str, first: str, *others: str) -> None:
    train.train(recipe.load_recipe(f"{first}.yaml"), name=f"{first}-{suffix}", on="cpu")
    for name in others:
        train_only(recipe.load_recipe(f"{name}.yaml"), f"{name}-{suffix}")


if __name__ == "__main__":
    main(*sys.argv[1:])

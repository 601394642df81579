"""Trains the recipe files that are named, one after the other: what tests run under torchrun.

The first one as a user does, with plots and test; the others are only trained, which is quicker.
"""

from __future__ import annotations

import sys
from pathlib import Path

from convlens import device, onlooker, recipe, training
from convlens.data import load
from convlens.distributed import processes
from convlens.recipe import Recipe
from convlens.run import RunFolder
from convlens.starting.preparing import prepare


def train_only(asked: Recipe, name: str) -> None:
    world = processes.init_process_group()
    place = onlooker.shared_run_dir(world, lambda: RunFolder(Path("models") / name))
    device.prepare(asked.train.deterministic)
    setup = prepare(asked, load(asked.data, memory_budget=1 << 30), "cpu", world=world)
    place.create(setup.recipe, {})
    training.run_to_end(setup, place, quiet=True)
    state = setup.trained.state_dict().items()
    found = {name: tensor.double().flatten().tolist() for name, tensor in state}
    assert world.broadcast(lambda: found) == found  # all processes hold the same bits


def main(suffix: str, first: str, *others: str) -> None:
    training.train(recipe.load(f"{first}.yaml"), name=f"{first}-{suffix}", on="cpu")
    for name in others:
        train_only(recipe.load(f"{name}.yaml"), f"{name}-{suffix}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""From a recipe and loaded images to everything a run needs: resolved, built, on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from convlens import auto, beginning, device, engine, feeding, models, optim, planning
from convlens.beginning import Begun
from convlens.data import Data, augment
from convlens.data.batches import Batches
from convlens.errors import DataError
from convlens.recipe import Recipe
from convlens.run import Preprocessing


@dataclass
class Setup:
    """A run, ready to train: nothing in `recipe` is `auto` any more.

    `trained` is the whole network; `feed` says which part of it the engine trains, and on what.
    """

    recipe: Recipe
    data: Data
    plan: device.Plan
    timings: dict[str, float]  # of the plans that were candidates, milliseconds a step
    trained: nn.Module
    feed: feeding.Feed
    augment: augment.Pipeline | None
    optimiser: torch.optim.Optimizer
    schedule: optim.Schedule
    objective: engine.Objective
    averager: optim.Average | None
    preprocessing: Preprocessing
    weights: dict[str, Any] | None = None  # what `weights.record` says of those it began with
    position: engine.Position = field(default_factory=engine.Position)

    @property
    def epochs(self) -> int:
        return int(self.recipe.train.epochs)

    def fit(self) -> engine.Records:
        """The engine's records for this run, from `position` on."""
        optim_config = self.recipe.optim
        return engine.fit(
            compiled(self.feed.model) if self.recipe.train.compile else self.feed.model,
            feeding.Timed(self.feed.batches, self.position),
            self.optimiser,
            self.schedule,
            epochs=self.epochs,
            objective=self.objective,
            plan=self.plan,
            seed=self.recipe.train.seed,
            position=self.position,
            clip_value=optim_config.clip_value,
            clip_norm=optim_config.clip_norm,
            averager=self.averager,
        )


def prepare(
    asked: Recipe,
    data: Data,
    where: str,
    plan: device.Plan | None = None,
    begun: Begun | None = None,
) -> Setup:
    """Builds the run that `asked` describes on `data`.

    Args:
        where: device name.
        plan: the plan of an unfinished run, to be used again; else the fastest is chosen.
        begun: what an unfinished run has, whose pretrained weights are then not needed again.
    """
    images = int(data.train.labels.numel())
    if images < 2:
        raise DataError(f"{images} training image: at least 2 are needed", where=data.name)
    recipe = auto.resolve(asked, images=images, image_size=data.image_size, channels=data.channels)
    operations = augment.build(
        recipe.operations,
        image_size=data.image_size,
        channels=data.channels,
        classes=len(data.classes),
    )
    net = recipe.model
    if asked.data.image_size == "auto":  # `check` couldn't know it yet
        models.try_out(
            net.name, data.channels, data.image_size, net.options, recipe.train.batch_size
        )
    model, preprocessing, record = beginning.network(recipe, data, begun)
    objective = nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing)

    def batches_for(chosen: device.Plan) -> Batches:
        return Batches(
            data.train,
            batch_size=recipe.train.batch_size,
            normalise=preprocessing.normalise,
            plan=chosen,
            seed=recipe.train.seed,
            augment=operations if recipe.operations else None,
        )

    choice = planning.Choice(plan, {}) if plan else None
    choice = choice or planning.choose(recipe, where, model, batches_for, objective)
    choice.plan.place(model)
    batches = batches_for(choice.plan)
    return Setup(
        recipe=recipe,
        data=data,
        plan=choice.plan,
        timings=choice.milliseconds,
        trained=model,
        feed=feeding.feed(recipe, data, model, batches),
        augment=operations if recipe.operations else None,
        optimiser=optim.build(model, recipe.optim),
        schedule=optim.schedule(recipe.optim),
        objective=objective,
        averager=optim.averager(model, recipe.optim, steps=len(batches) * int(recipe.train.epochs)),
        preprocessing=preprocessing,
        weights=record,
    )


def compiled(model: nn.Module) -> nn.Module:
    """`torch.compile`d: opt-in, since on a CPU it rarely pays within a few minutes."""
    return cast(nn.Module, torch.compile(model))

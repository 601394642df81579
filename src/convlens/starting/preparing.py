"""From a recipe and loaded images to everything a run needs: resolved, built, on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from convlens import device, engine, models, optim
from convlens.data import Data, augment
from convlens.data.batches import Batches
from convlens.distributed.processes import SINGLE_PROCESS, ProcessGroup
from convlens.errors import DataError, UsageError
from convlens.recipe import Recipe
from convlens.run import Preprocessing
from convlens.starting import auto, beginning, feeding, planning
from convlens.starting.beginning import Begun
from convlens.stepping.data_parallel import DataParallel, convert_sync_batchnorm
from convlens.stepping.guarding import make_grad_scaler


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
    criterion: engine.Criterion
    averager: optim.Average | None
    preprocessing: Preprocessing
    scaler: torch.amp.GradScaler | None = None  # where the plan is fp16
    weights: dict[str, Any] | None = None  # what `weights.record` says of those it began with
    state: engine.TrainState = field(default_factory=engine.TrainState)
    world: ProcessGroup = SINGLE_PROCESS

    @property
    def epochs(self) -> int:
        return int(self.recipe.train.epochs)

    def fit(self) -> engine.Records:
        """The engine's records for this run, from `state` on."""
        optim_config, feed = self.recipe.optim, self.feed
        data_parallel = None
        if self.world.size > 1:
            data_parallel = DataParallel(self.world, feed.batches.sizes)
        loop = engine.TrainLoop(
            feed.model,
            self.optimiser,
            self.criterion,
            self.plan,
            clip_value=optim_config.clip_value,
            clip_norm=optim_config.clip_norm,
            averager=self.averager,
            scaler=self.scaler,
            data_parallel=data_parallel,
        )
        return loop.run(
            feeding.Timed(feed.batches, self.state),
            self.schedule,
            epochs=self.epochs,
            seed=self.recipe.train.seed,
            state=self.state,
        )


def prepare(
    asked: Recipe,
    data: Data,
    where: str,
    plan: device.Plan | None = None,
    begun: Begun | None = None,
    world: ProcessGroup = SINGLE_PROCESS,
) -> Setup:
    """Builds the run that `asked` describes on `data`.

    Args:
        where: device name.
        plan: the plan of an unfinished run, to be used again; else the fastest is chosen.
        begun: what an unfinished run has, whose pretrained weights are then not needed again.
        world: the processes that train it, all of which call this.
    """
    recipe = _resolved(asked, data)
    operations = augment.build(
        recipe.operations,
        image_size=data.image_size,
        channels=data.channels,
        classes=len(data.classes),
    )
    _check_shares(recipe, world)
    model, preprocessing, record = beginning.network(recipe, data, begun, where)
    world.broadcast_tensors_(list(model.state_dict().values()))
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing)

    def batches_for(chosen: device.Plan) -> Batches:
        return Batches(
            data.train,
            batch_size=recipe.train.batch_size,
            normalise=preprocessing.normalise,
            plan=chosen,
            seed=recipe.train.seed,
            augment=operations if recipe.operations else None,
            mixes=bool(operations.mixes),
            world=world,
            shards=data.train.shards,
        )

    tuned = planning.TunedPlan(plan, {}) if plan else None
    if tuned is None:
        tuned = planning.Autotuner(recipe, where, model, batches_for, criterion, world).best()
    plan = tuned.plan
    if recipe.train.sync_batch_norm:
        model = convert_sync_batchnorm(model, world, where)
    plan.prepare_model(model)
    batches = batches_for(plan)
    optimiser = optim.build(model, recipe.optim)
    return Setup(
        recipe=recipe,
        data=data,
        plan=plan,
        timings=tuned.milliseconds,
        trained=model,
        feed=feeding.feed(recipe, data, model, batches),
        augment=operations if recipe.operations else None,
        optimiser=optimiser,
        schedule=optim.schedule(recipe.optim),
        criterion=criterion,
        averager=optim.averager(model, recipe.optim, steps=len(batches) * int(recipe.train.epochs)),
        preprocessing=preprocessing,
        scaler=make_grad_scaler(plan.device) if plan.precision == "fp16" else None,
        weights=record,
        world=world,
    )


def _resolved(asked: Recipe, data: Data) -> Recipe:
    """The recipe with every `auto` replaced; refuses data that it can't be trained on."""
    images = int(data.train.labels.numel())
    if images < 2:
        raise DataError(f"{images} training image: at least 2 are needed", where=data.name)
    recipe = auto.resolve(asked, images=images, image_size=data.image_size, channels=data.channels)
    net = recipe.model
    if asked.data.image_size == "auto":  # `check` couldn't know it yet
        models.try_out(
            net.name, data.channels, data.image_size, net.options, recipe.train.batch_size
        )
    return recipe


def _check_shares(recipe: Recipe, world: ProcessGroup) -> None:
    size = recipe.train.batch_size
    if size < 2 * world.size > 2:
        raise UsageError(
            f"train.batch_size={size} is the batch of all {world.size} processes together, and "
            "leaves less than two images for each",
            fix=f"train.batch_size={2 * world.size} or more, or fewer processes",
        )

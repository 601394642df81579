"""From a recipe and loaded images to everything a run needs: resolved, built, on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import cast

import torch
from torch import nn

from convlens import auto, device, engine, models, optim
from convlens.data import Data, augment, channel_stats, opening
from convlens.data.batches import Batches
from convlens.errors import DataError, UsageError
from convlens.recipe import Recipe
from convlens.run import Preprocessing

# Choosing layout and precision by timing costs some steps; shorter runs can't earn it back.
STEPS_WORTH_TIMING = 400


@dataclass
class Setup:
    """A run, ready to train: nothing in `recipe` is `auto` any more."""

    recipe: Recipe
    data: Data
    plan: device.Plan
    model: nn.Module
    batches: Batches
    optimiser: torch.optim.Optimizer
    schedule: optim.Schedule
    objective: engine.Objective
    averager: optim.Averager | None
    preprocessing: Preprocessing
    position: engine.Position = field(default_factory=engine.Position)

    @property
    def epochs(self) -> int:
        return int(self.recipe.train.epochs)

    @property
    def trained(self) -> nn.Module:
        """The network without `torch.compile`'s wrapper, whose names must not reach a file."""
        return getattr(self.model, "_orig_mod", self.model)

    def fit(self) -> engine.Records:
        """The engine's records for this run, from `position` on."""
        optim_config = self.recipe.optim
        return engine.fit(
            self.model,
            self.batches,
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


def check(recipe: Recipe) -> None:
    """Tries every name and option of a recipe before any image is read.

    Raises:
        UsageError: all that is wrong at once.
    """
    size = recipe.data.image_size if recipe.data.image_size != "auto" else 224
    channels = recipe.data.channels if recipe.data.channels != "auto" else 3

    def build_model() -> None:
        with torch.device("meta"):  # shapes only: nothing is allocated or drawn
            models.build(recipe.model.name, 2, channels, size, recipe.model.options)

    tries: list[Callable[[], object]] = [
        lambda: opening.check(recipe.data),
        lambda: _check_choice(recipe),
        build_model,
        lambda: augment.build(recipe.operations),
        lambda: optim.build(nn.Linear(1, 1), recipe.optim),
        lambda: optim.schedule(recipe.optim),
    ]
    found: list[UsageError] = []
    for attempt in tries:
        try:
            attempt()
        except UsageError as error:
            found.append(error)
    if found:
        fix = "; ".join(error.fix for error in found if error.fix)
        raise UsageError("; ".join(error.what for error in found), where=recipe.name, fix=fix)


def _check_choice(recipe: Recipe) -> None:
    """Without a validation split there is nothing to choose an epoch by."""
    wrong = [f"train.keep={recipe.train.keep}"] if recipe.train.keep != "last" else []
    if recipe.train.patience is not None:
        wrong.append(f"train.patience={recipe.train.patience}")
    if wrong and not recipe.data.validates:
        raise UsageError(
            f"data.val_fraction=0 leaves no validation split, but {' and '.join(wrong)} needs one",
            fix="set train.keep=last train.patience=null, or let --refit find the epochs first",
        )


def prepare(asked: Recipe, data: Data, where: str, plan: device.Plan | None = None) -> Setup:
    """Builds the run that `asked` describes on `data`.

    Args:
        where: device name.
        plan: the plan of an unfinished run, to be used again; else the fastest is chosen.
    """
    images = int(data.train.labels.numel())
    if images < 2:
        raise DataError(f"{images} training image: at least 2 are needed", where=data.name)
    recipe = auto.resolve(asked, images=images, image_size=data.image_size, channels=data.channels)
    mean, std = channel_stats(data.train)
    preprocessing = Preprocessing(data.image_size, data.channels, data.fit, mean, std)
    operations = augment.build(
        recipe.operations, image_size=data.image_size, channels=data.channels
    )
    torch.manual_seed(device.seed_of(recipe.train.seed))
    model = models.build(
        recipe.model.name, len(data.classes), data.channels, data.image_size, recipe.model.options
    )
    objective = nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing)

    def batches_for(chosen: device.Plan) -> Batches:
        return Batches(
            data.train,
            batch_size=recipe.train.batch_size,
            normalise=preprocessing.normalise,
            plan=chosen,
            seed=recipe.train.seed,
            augment=operations,
        )

    # The first optimiser step would import torch's compiler: seconds that are no training time.
    import_module("torch._dynamo")
    plan = plan or _choose_plan(recipe, where, model, batches_for, objective)
    plan.place(model)
    return Setup(
        recipe=recipe,
        data=data,
        plan=plan,
        model=compiled(model) if recipe.train.compile else model,
        batches=batches_for(plan),
        optimiser=optim.build(model, recipe.optim),
        schedule=optim.schedule(recipe.optim),
        objective=objective,
        averager=optim.Averager(model, recipe.optim.ema) if recipe.optim.ema else None,
        preprocessing=preprocessing,
    )


def compiled(model: nn.Module) -> nn.Module:
    """`torch.compile`d: opt-in, since on a CPU it rarely pays within a few minutes."""
    return cast(nn.Module, torch.compile(model))


def _choose_plan(
    recipe: Recipe,
    where: str,
    model: nn.Module,
    batches_for: Callable[[device.Plan], Batches],
    objective: engine.Objective,
) -> device.Plan:
    """The fastest plan that the recipe allows, by timing real steps on copies of the network."""
    options = recipe.train
    candidates = device.plans(
        where, options.precision, options.memory_format, options.deterministic
    )
    batches = batches_for(candidates[0])
    if len(candidates) == 1 or len(batches) * int(options.epochs) < STEPS_WORTH_TIMING:
        return candidates[0]
    images, labels = next(batches.epoch(0))

    def trial(plan: device.Plan) -> Callable[[], None]:
        twin = plan.place(copy.deepcopy(model)).train()
        optimiser = optim.build(twin, recipe.optim)
        batch = images.contiguous(memory_format=plan.layout)

        def step() -> None:
            engine.step(twin, batch, labels, objective, optimiser, plan, lambda: None)

        return step

    return device.fastest(candidates, trial)

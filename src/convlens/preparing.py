"""From a recipe and loaded images to everything a run needs: resolved, built, on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

import torch
from rich.markup import escape
from torch import Tensor, nn

from convlens import auto, device, engine, feeding, models, optim, weights
from convlens.console import say
from convlens.data import Data, augment, channel_stats
from convlens.data.batches import Batches
from convlens.errors import DataError, UsageError
from convlens.models import freezing
from convlens.recipe import Recipe
from convlens.run import Preprocessing

# Choosing layout and precision by timing costs some steps; shorter runs can't earn it back.
STEPS_WORTH_TIMING = 400


@dataclass(frozen=True)
class Begun:
    """What an unfinished run that began with pretrained weights has instead of their source.

    The network must be whole before anything is computed with it: a frozen trunk's activations are.
    """

    network: dict[str, Tensor]
    weights: dict[str, Any]  # as `weights.record` made it


@dataclass
class Setup:
    """A run, ready to train: nothing in `recipe` is `auto` any more.

    `trained` is the whole network; `feed` says which part of it the engine trains, and on what.
    """

    recipe: Recipe
    data: Data
    plan: device.Plan
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
            self.feed.batches,
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

    built: list[nn.Module] = []

    def build_model() -> None:
        with torch.device("meta"):  # shapes only: nothing is allocated or drawn
            model = models.build(recipe.model.name, 2, channels, size, recipe.model.options)
        freezing.freeze(model, recipe.model.trainable)
        built.append(model)

    def check_optimiser() -> None:
        if built:
            optim.check(built[0], recipe.optim)
        else:  # what doesn't depend on the network can still be told
            rest = {"groups": [], "layer_decay": 1.0, "head_first": 0.0}
            optim.check(nn.Linear(1, 1), recipe.optim.model_copy(update=rest))

    tries: list[Callable[[], object]] = [
        build_model,
        lambda: weights.check(recipe.model),
        lambda: augment.build(recipe.operations),
        check_optimiser,
        lambda: optim.schedule(recipe.optim),
        lambda: optim.averager(nn.Module(), recipe.optim, steps=1),
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
    torch.manual_seed(device.seed_of(recipe.train.seed))
    model = models.build(
        recipe.model.name, len(data.classes), data.channels, data.image_size, recipe.model.options
    )
    freezing.freeze(model, recipe.model.trainable)
    record = _begin(recipe, data, model, begun) if recipe.model.weights != "none" else None
    preprocessing = _preprocessing(data, record)
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

    # The first optimiser step would import torch's compiler: seconds that are no training time.
    import_module("torch._dynamo")
    plan = plan or _choose_plan(recipe, where, model, batches_for, objective)
    plan.place(model)
    batches = batches_for(plan)
    return Setup(
        recipe=recipe,
        data=data,
        plan=plan,
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


def _begin(recipe: Recipe, data: Data, model: nn.Module, begun: Begun | None) -> dict[str, Any]:
    """Fills `model` with the pretrained weights asked for, says how, returns the record."""
    if begun is not None:
        model.load_state_dict(begun.network)
        return begun.weights
    source = weights.find(recipe.model)
    fitted = weights.start(source, model, data.classes)
    say(f"weights of [bold]{escape(source.origin)}[/]")
    for line in fitted.lines():
        say(f"  {escape(line)}")
    return weights.record(source, fitted)


def _preprocessing(data: Data, record: dict[str, Any] | None) -> Preprocessing:
    """As the pretrained weights were trained, where that is known: a frozen trunk expects it."""
    told = weights.normalisation(record, data.channels) if record else None
    mean, std = told or channel_stats(data.train)
    return Preprocessing(data.image_size, data.channels, data.fit, mean, std)


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

"""From a recipe and loaded images to everything a run needs: resolved, built, on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor, nn

from convlens import models, optim
from convlens.data.dataset import Data, Split, channel_stats
from convlens.data.loader import Batches
from convlens.data.transforms import pipeline
from convlens.device import Plan, derive_seed
from convlens.distributed import SINGLE_PROCESS, ProcessGroup
from convlens.engine.data_parallel import DataParallel, convert_sync_batchnorm
from convlens.engine.loop import Criterion, Records, TrainLoop, TrainState
from convlens.engine.numerics import make_grad_scaler
from convlens.errors import DataError, UsageError
from convlens.models import stages
from convlens.recipe import Recipe, resolve_auto
from convlens.run import Preprocessing
from convlens.training import autotune, feature_cache, pretrained
from convlens.utils.console import print_status


@dataclass
class TrainingJob:
    """A run, ready to train: nothing in `recipe` is `auto` any more.

    `trained` is the whole network; `feed` says which part of it the engine trains, and on what.
    """

    recipe: Recipe
    data: Data
    plan: Plan
    timings: dict[str, float]  # of the plans that were candidates, milliseconds a step
    trained: nn.Module
    feed: feature_cache.TrainInputs
    augment: pipeline.Pipeline | None
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    criterion: Criterion
    averager: optim.WeightAverage | None
    preprocessing: Preprocessing
    scaler: torch.amp.GradScaler | None = None  # where the plan is fp16
    weights: dict[str, Any] | None = None  # what `weights.record` says of those it began with
    state: TrainState = field(default_factory=TrainState)
    world: ProcessGroup = SINGLE_PROCESS

    @property
    def epochs(self) -> int:
        return int(self.recipe.train.epochs)

    def fit(self) -> Records:
        """The engine's records for this run, from `state` on."""
        optim_config, feed = self.recipe.optim, self.feed
        data_parallel = None
        if self.world.size > 1:
            data_parallel = DataParallel(self.world, feed.batches.sizes)
        loop = TrainLoop(
            feed.model,
            self.optimizer,
            self.criterion,
            self.plan,
            clip_value=optim_config.clip_value,
            clip_norm=optim_config.clip_norm,
            averager=self.averager,
            scaler=self.scaler,
            data_parallel=data_parallel,
        )
        return loop.run(
            feature_cache.TimedBatches(feed.batches, self.state),
            self.schedule,
            epochs=self.epochs,
            seed=self.recipe.train.seed,
            state=self.state,
        )


def build_training_job(
    asked: Recipe,
    data: Data,
    where: str,
    plan: Plan | None = None,
    begun: InitialState | None = None,
    world: ProcessGroup = SINGLE_PROCESS,
) -> TrainingJob:
    """Builds the run that `asked` describes on `data`.

    Args:
        where: device name.
        plan: the plan of an unfinished run, to be used again; else the fastest is chosen.
        begun: what an unfinished run has, whose pretrained weights are then not needed again.
        world: the processes that train it, all of which call this.
    """
    recipe = _resolve_recipe(asked, data)
    operations = pipeline.build_pipeline(
        recipe.operations,
        image_size=data.image_size,
        channels=data.channels,
        classes=len(data.classes),
    )
    _check_batch_size(recipe, world)
    model, preprocessing, record = build_network(recipe, data, begun, where)
    world.broadcast_tensors_(list(model.state_dict().values()))
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing)

    def batches_for(chosen: Plan) -> Batches:
        return Batches(
            data.train,
            batch_size=recipe.train.batch_size,
            normalize=preprocessing.normalize,
            plan=chosen,
            seed=recipe.train.seed,
            augment=operations if recipe.operations else None,
            mixes=bool(operations.mixes),
            world=world,
            shards=data.train.shards,
        )

    tuned = autotune.TunedPlan(plan, {}) if plan else None
    if tuned is None:
        tuned = autotune.Autotuner(recipe, where, model, batches_for, criterion, world).best()
    plan = tuned.plan
    if recipe.train.sync_batch_norm:
        model = convert_sync_batchnorm(model, world, where)
    plan.prepare_model(model)
    batches = batches_for(plan)
    optimizer = optim.build_optimizer(model, recipe.optim)
    return TrainingJob(
        recipe=recipe,
        data=data,
        plan=plan,
        timings=tuned.milliseconds,
        trained=model,
        feed=feature_cache.choose_train_inputs(recipe, data, model, batches),
        augment=operations if recipe.operations else None,
        optimizer=optimizer,
        schedule=optim.build_schedule(recipe.optim),
        criterion=criterion,
        averager=optim.build_averager(
            model, recipe.optim, steps=len(batches) * int(recipe.train.epochs)
        ),
        preprocessing=preprocessing,
        scaler=make_grad_scaler(plan.device) if plan.precision == "fp16" else None,
        weights=record,
        world=world,
    )


def _resolve_recipe(asked: Recipe, data: Data) -> Recipe:
    """The recipe with every `auto` replaced; refuses data that it can't be trained on."""
    images = int(data.train.labels.numel())
    if images < 2:
        raise DataError(f"{images} training image: at least 2 are needed", where=data.name)
    recipe = resolve_auto(asked, images=images, image_size=data.image_size, channels=data.channels)
    net = recipe.model
    if asked.data.image_size == "auto":  # `check` couldn't know it yet
        models.try_out(
            net.name, data.channels, data.image_size, net.options, recipe.train.batch_size
        )
    return recipe


def _check_batch_size(recipe: Recipe, world: ProcessGroup) -> None:
    size = recipe.train.batch_size
    if size < 2 * world.size > 2:
        raise UsageError(
            f"train.batch_size={size} is the batch of all {world.size} processes together, and "
            "leaves less than two images for each",
            fix=f"train.batch_size={2 * world.size} or more, or fewer processes",
        )


# ---- beginning ----------------------------------------
# The network a training begins with: built, filled with pretrained weights, frozen as asked.


@dataclass(frozen=True)
class InitialState:
    """What an unfinished run that began with pretrained weights has instead of their source.

    The network must be whole before anything is computed with it: a frozen trunk's activations are.
    """

    network: dict[str, Tensor]
    weights: dict[str, Any]  # as `weights.record` made it


def build_network(
    recipe: Recipe, data: Data, begun: InitialState | None, where: str = "cpu"
) -> tuple[nn.Module, Preprocessing, dict[str, Any] | None]:
    """The network, the preprocessing its input needs, and the record of its pretrained weights.

    Args:
        recipe: resolved.
        begun: what an unfinished run has, whose pretrained weights are then not needed again.
        where: the device on which something is computed from the training images, if anything is.
    """
    net = recipe.model
    torch.manual_seed(derive_seed(recipe.train.seed))
    model = models.build_model(
        net.name, len(data.classes), data.channels, data.image_size, net.options
    )
    record = _load_pretrained(recipe, data, model, begun) if net.weights != "none" else None
    preprocessing = _preprocessing(data, record)
    if record is None and isinstance(model, models.DataInitialized):
        model.initialize(_some_images(data.train, preprocessing, where))
    stages.freeze(model, net.trainable)
    return model, preprocessing, record


def _load_pretrained(
    recipe: Recipe, data: Data, model: nn.Module, begun: InitialState | None
) -> dict[str, Any]:
    """Fills `model` with the pretrained weights asked for, says how, returns the record."""
    if begun is not None:
        models.load_weights(model, begun.network)
        return begun.weights
    source = pretrained.find_weights(recipe.model)
    fitted = pretrained.load_pretrained(source, model, data.classes)
    print_status(f"weights of [bold]{escape(source.origin)}[/]")
    for line in fitted.lines():
        print_status(f"  {escape(line)}")
    return pretrained.weights_record(source, fitted)


def _preprocessing(data: Data, record: dict[str, Any] | None) -> Preprocessing:
    """As the pretrained weights were trained, where that is known: a frozen trunk expects it."""
    told = pretrained.pretrained_normalization(record, data.channels) if record else None
    mean, std = told or channel_stats(data.train)
    return Preprocessing(data.image_size, data.channels, data.fit, mean, std)


def _some_images(split: Split, preprocessing: Preprocessing, where: str = "cpu") -> Tensor:
    """Up to 5,000 training images, evenly spaced, without augmentation: normalised float32.

    Of larger images fewer are taken, so that they never need more than 64 MB. On `where` if that
    is a GPU of NVIDIA's, else on the CPU: what is computed from them wants double precision.
    """
    count, *shape = split.rows.shape
    wanted = max(1, min(count, 5_000, (1 << 24) // math.prod(shape)))
    chosen = torch.linspace(0, count - 1, wanted, dtype=torch.float64).round().long()
    plan = Plan(where if where.startswith("cuda") else "cpu", "fp32", "contiguous")
    return preprocessing.normalize(split.rows.gather(chosen).to(plan.device), plan)

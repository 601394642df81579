"""Build everything a training needs from a recipe and loaded images.

The recipe is resolved, the network is built, filled with pretrained weights and frozen as the
recipe says, and the plan (precision, memory format, micro-batches) is chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor, nn

from convlens import models, optim
from convlens.data.dataset import Data, Split, channel_stats, load_data
from convlens.data.loader import Batches, class_frequencies
from convlens.data.transforms import pipeline
from convlens.device import Plan, derive_seed, memory_budget
from convlens.distributed import ProcessGroup
from convlens.engine.data_parallel import convert_sync_batchnorm
from convlens.engine.loop import Criterion, TrainState
from convlens.engine.losses import (
    LossInputs,
    balanced_weights,
    build_loss,
    normalized_weights,
)
from convlens.engine.numerics import make_grad_scaler
from convlens.errors import DataError, UsageError, closest_match, did_you_mean
from convlens.models import stages, zoo
from convlens.recipe import Recipe, resolve_auto
from convlens.run import Preprocessing
from convlens.runtime import RuntimeContext
from convlens.training import feature_cache, pretrained, time_budget, transfer
from convlens.training.autotune import Autotuner, TunedPlan
from convlens.training.resolve import validate_recipe
from convlens.utils.console import print_status

VALIDATION_COST = 1 / 3  # of a training step on as many images: it has no backward pass


@dataclass
class TrainingJob:
    """A run that is ready to train. No value of `recipe` is `auto` any more.

    Attributes:
        timings: milliseconds per step of the plans that were candidates.
        model: the whole network.
        inputs: the part of the network that is trained, and the batches it is trained on.
        averager: moving average of the weights.
        scaler: loss scaling, where the plan is fp16.
        initial_weights: the record of the pretrained weights it starts with
            (`pretrained.weights_record`); None if the network starts from scratch.
        step_seconds: time of a step of the plan, if it was timed.
        found_range: the value range was found on the training images, not requested.
        start_reason: which network and weights `auto` chose and why; empty if it chose nothing.
        time_choice: what `train.minutes` chose, in one line; empty if it chose nothing.
        deadline: the end of the time; None if the training may not be shortened.
        end_seconds: the predicted time after the last epoch.
        shortened: the epochs after which the rest was shortened because the training was too slow,
            with the new number of epochs each (`{"after": 2, "epochs": 4}`).
    """

    recipe: Recipe
    data: Data
    context: RuntimeContext
    plan: Plan
    timings: dict[str, float]
    model: nn.Module
    inputs: feature_cache.TrainInputs
    augment: pipeline.Pipeline | None
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    criterion: Criterion
    averager: optim.WeightAverage | None
    preprocessing: Preprocessing
    scaler: torch.amp.GradScaler | None = None
    initial_weights: dict[str, Any] | None = None
    step_seconds: float | None = None
    found_range: bool = False
    start_reason: str = ""
    time_choice: str = ""
    deadline: time_budget.Deadline | None = None
    end_seconds: float = 0.0
    shortened: list[dict[str, int]] = field(default_factory=list)
    state: TrainState = field(default_factory=TrainState)

    @property
    def epochs(self) -> int:
        """The number of epochs to train."""
        return self.shortened[-1]["epochs"] if self.shortened else int(self.recipe.train.epochs)

    def shorten(self, after: int, epochs: int) -> None:
        """Train `epochs` epochs in total; the learning rates after epoch `after` are adapted."""
        self.schedule = time_budget.shorten_schedule(
            self.schedule,
            steps=len(self.inputs.batches),
            planned=self.epochs,
            done=after,
            epochs=epochs,
        )
        self.shortened.append({"after": after, "epochs": epochs})

    @property
    def validation_work(self) -> float:
        """The time of one validation, in training steps."""
        return VALIDATION_COST * len(self.data.val) / self.recipe.train.batch_size

    @property
    def expected_seconds(self) -> float | None:
        """An estimate of the time of the training, from timed steps; None if it is unknown."""
        # Other things count as well: the share of a batch, cached features, reading from disk.
        is_unlike_timed = (
            self.process_group.size > 1
            or self.inputs.cached_bytes > 0
            or self.data.train.rows.in_memory_tensor() is None
        )
        if self.step_seconds is None or is_unlike_timed:
            return None
        steps = len(self.inputs.batches) + self.validation_work
        return self.epochs * steps * self.step_seconds

    @property
    def process_group(self) -> ProcessGroup:
        return self.context.process_group


def build_training_job(
    requested: Recipe,
    data: Data,
    context: RuntimeContext,
    *,
    plan: Plan | None = None,
    initial_state: InitialState | None = None,
    budget: time_budget.TimeBudget | None = None,
) -> TrainingJob:
    """Build the training that `requested` describes on `data`. Every rank calls this.

    Args:
        plan: the plan of an interrupted run, to be used again. Default: the fastest one.
        initial_state: what an interrupted run saved of its pretrained weights.
        budget: the time that a new run has, if `train.minutes` leaves anything open.
    """
    group = context.process_group
    backbones = context.broadcast(lambda: transfer.backbones_for(requested))
    start = transfer.choose_start(requested, data.native, backbones)
    fitted = None
    if budget is not None:
        fitted = time_budget.choose_training(requested, start.recipe, data, budget, context)
        start, plan = replace(start, recipe=fitted.recipe), fitted.plan
    recipe = _resolve_recipe(start, data)
    operations = pipeline.build_pipeline(
        recipe.operations,
        image_size=data.image_size,
        channels=data.channels,
        classes=len(data.classes),
    )
    augment = operations if recipe.operations else None
    _check_batch_size(recipe, group)
    model, preprocessing, weights_record = build_network(
        recipe, data, initial_state, context.device
    )
    group.broadcast_tensors_(list(model.state_dict().values()))
    criterion = build_criterion(recipe, data).to(context.device)

    def make_batches(plan: Plan) -> Batches:
        return Batches(
            data.train,
            batch_size=recipe.train.batch_size,
            normalize=preprocessing.normalize,
            plan=plan,
            seed=recipe.train.seed,
            augment=augment,
            mixes=bool(operations.mixes),
            process_group=group,
            shards=data.train.shards,
            balance=recipe.data.balance,
        )

    if plan is None:
        tuned = Autotuner(recipe, model, make_batches, criterion, context).best()
    else:
        tuned = TunedPlan(plan, {})
    if recipe.train.sync_batch_norm:
        model = convert_sync_batchnorm(model, group, context.device)
    tuned.plan.prepare_model(model)
    batches = make_batches(tuned.plan)
    inputs = feature_cache.choose_train_inputs(recipe, data, model, batches)
    return TrainingJob(
        recipe=recipe,
        data=data,
        context=context,
        plan=tuned.plan,
        timings=tuned.milliseconds,
        model=model,
        inputs=inputs,
        augment=augment,
        optimizer=optim.build_optimizer(model, recipe.optim),
        schedule=optim.build_schedule(recipe.optim),
        criterion=criterion,
        averager=optim.build_averager(
            model,
            recipe.optim,
            steps=len(batches) * int(recipe.train.epochs),
            trained=inputs.model,
        ),
        preprocessing=preprocessing,
        scaler=make_grad_scaler(tuned.plan.device) if tuned.plan.precision == "fp16" else None,
        initial_weights=weights_record,
        step_seconds=tuned.step_seconds,
        found_range=requested.data.range == "auto" and data.conversion.value_range is not None,
        start_reason=start.reason,
        time_choice=fitted.line if fitted else "",
        deadline=budget.deadline if budget and fitted and fitted.may_be_shortened else None,
        end_seconds=fitted.end_seconds if fitted else 0.0,
    )


def load_for_training(requested: Recipe) -> tuple[Recipe, Data]:
    """Return the recipe and the images that a training of `requested` would have.

    The recipe has no `auto` any more. No weights are read.
    """
    backbones = transfer.backbones_for(requested)
    data = load_data(
        requested.data,
        memory_budget=memory_budget("cpu"),
        choose_size=partial(transfer.choose_image_size, requested, backbones),
    )
    return _resolve_recipe(transfer.choose_start(requested, data.native, backbones), data), data


def _resolve_recipe(start: transfer.Start, data: Data) -> Recipe:
    """Return the recipe with every `auto` replaced; refuse data that cannot be trained on."""
    requested = start.recipe
    images = int(data.train.labels.numel())
    if images < 2:
        raise DataError(
            f"{images} training image{'s' * (images != 1)}: at least 2 are needed", where=data.name
        )
    conversion = data.conversion
    recipe = resolve_auto(
        requested,
        images=images,
        image_size=conversion.size,
        channels=conversion.channels,
        fit=conversion.fit,
        value_range=conversion.value_range,
        background=conversion.background,
        crop_size=transfer.crop_size(requested, conversion.size),
    )
    config = recipe.model
    if start.reason and config.weights != "none":  # the network was not known before
        validate_recipe(recipe)
    elif requested.data.image_size == "auto":  # `validate_recipe` could not know the size
        models.try_out(
            config.name, data.channels, data.image_size, config.options, recipe.train.batch_size
        )
    return recipe


def build_criterion(recipe: Recipe, data: Data) -> nn.Module:
    """Return the loss that a recipe describes; class weights are those of the training split.

    Raises:
        UsageError: `optim.class_weights` names a class that the data set does not have, or an
            option does not suit the loss.
    """
    labels = data.train.labels.cpu()
    counts = torch.bincount(labels, minlength=len(data.classes))
    # With `data.balance` an epoch draws other images than those of the training split. What the
    # loss does about unequal classes corrects only what the sampling leaves.
    frequencies = class_frequencies(counts, recipe.data.balance)
    weights = _class_weights(recipe, data, frequencies.tolist())
    drawn = (frequencies * len(labels)).tolist()
    return build_loss(LossInputs(recipe.optim, counts=drawn, class_weights=weights))


def _class_weights(recipe: Recipe, data: Data, frequencies: list[float]) -> list[float] | None:
    """Return the requested class weights with a mean of 1 over the images of an epoch."""
    requested = recipe.optim.class_weights
    if requested == "none":
        return None
    if isinstance(requested, str):
        weights = balanced_weights(frequencies)
    else:
        unknown = [name for name in requested if name not in data.classes]
        if unknown:
            close = [match for name in unknown if (match := closest_match(name, data.classes))]
            raise UsageError(
                f"optim.class_weights names classes that {data.name!r} does not have: "
                f"{', '.join(unknown[:6])}",
                fix=did_you_mean(close) or f"its classes are: {', '.join(data.classes[:12])}",
            )
        weights = [requested.get(name, 1.0) for name in data.classes]
        weights = normalized_weights(weights, frequencies)
    low, high = (pick(range(len(weights)), key=weights.__getitem__) for pick in (min, max))
    print_status(
        f"class weights from {weights[low]:.2f} ({escape(data.classes[low])}) to "
        f"{weights[high]:.2f} ({escape(data.classes[high])})"
    )
    return weights


def _check_batch_size(recipe: Recipe, group: ProcessGroup) -> None:
    size = recipe.train.batch_size
    if size < 2 * group.size > 2:
        raise UsageError(
            f"train.batch_size={size} is the batch of all {group.size} processes together, and "
            "leaves fewer than two images for each",
            fix=f"train.batch_size={2 * group.size} or more, or fewer processes",
        )


@dataclass(frozen=True)
class InitialState:
    """The network of an interrupted run that started with pretrained weights.

    It replaces the source of those weights, which may be gone. The network must be complete before
    anything is computed with it, because the outputs of a frozen backbone are cached.
    """

    network: dict[str, Tensor]
    weights: dict[str, Any]  # made by `pretrained.weights_record`


def build_network(
    recipe: Recipe, data: Data, initial_state: InitialState | None, device: str = "cpu"
) -> tuple[nn.Module, Preprocessing, dict[str, Any] | None]:
    """Return the network, the preprocessing of its input, and the record of pretrained weights.

    Args:
        recipe: a resolved recipe.
        initial_state: of an interrupted run, whose pretrained weights are not needed again.
        device: used for computations on training images, if the network needs any (whitening).
    """
    config = recipe.model
    torch.manual_seed(derive_seed(recipe.train.seed))
    model = models.build_model(
        config.name, len(data.classes), data.channels, data.image_size, config.options
    )
    record = None
    if config.weights != "none":
        record = _load_pretrained(recipe, data, model, initial_state)
    preprocessing = _preprocessing(data, record)
    if record is None and models.initializes_from_data(model):
        model.initialize(_sample_images(data.train, preprocessing, device))
    stages.freeze(model, config.trainable)
    if config.freeze_batch_norm:
        stages.freeze_batch_norm(model)
    return model, preprocessing, record


def _load_pretrained(
    recipe: Recipe, data: Data, model: nn.Module, initial_state: InitialState | None
) -> dict[str, Any]:
    """Load the requested pretrained weights, print how they fit, and return their record."""
    if initial_state is not None:
        models.load_weights(model, initial_state.network)
        return initial_state.weights
    source = pretrained.find_weights(recipe.model)
    fitted = pretrained.load_pretrained(source, model, data.classes)
    head = models.model_parts(model).head
    if zoo.timm_name(recipe.model.name) is not None and f"{head}.weight" in fitted.new:
        # timm draws the weights of some heads from ±1/sqrt(classes): with few classes the first
        # logits are so wrong that their gradients damage the pretrained features (docs/log.md).
        for parameter in model.get_submodule(head).parameters():
            nn.init.zeros_(parameter)
    licence = f"; licence: {source.licence}" if source.licence else ""
    print_status(f"weights of [bold]{escape(source.origin)}[/]{escape(licence)}")
    for line in fitted.lines():
        print_status(f"  {escape(line)}")
    return pretrained.weights_record(source, fitted)


def _preprocessing(data: Data, record: dict[str, Any] | None) -> Preprocessing:
    """Return the preprocessing of the pretrained weights, or that of the training images.

    A frozen backbone expects the mean and deviation that it was trained with.
    """
    known = pretrained.pretrained_normalization(record, data.channels) if record else None
    mean, std = known or channel_stats(data.train)
    return Preprocessing.of(data.conversion, mean, std)


def _sample_images(split: Split, preprocessing: Preprocessing, device: str = "cpu") -> Tensor:
    """Return up to 5,000 evenly spaced training images, not augmented, normalized, float32.

    Fewer of larger images, so that they take at most 64 MB. On CUDA if that is the device, else on
    the CPU: what is computed from them needs double precision, which MPS lacks.
    """
    count, *shape = split.rows.shape
    wanted = max(1, min(count, 5_000, (1 << 24) // math.prod(shape)))
    indices = torch.linspace(0, count - 1, wanted, dtype=torch.float64).round().long()
    plan = Plan(device if device.startswith("cuda") else "cpu", "fp32", "contiguous")
    return preprocessing.normalize(split.rows.gather(indices).to(plan.device), plan)

"""`train.minutes`: the best training that fits into a given time.

The time counts from the start of the process (in Python: of the call) to the tested result. What
the recipe leaves at `auto` is chosen: image size, trainable stages and epochs. Rank 0 times some
steps on random images; `choose` is a pure function of these times, the numbers of images and the
seconds left. It is called twice: before the images are decoded, for their size, and after that,
when their exact numbers and the time left are known, for the rest.

Larger images are worth more than further epochs only if most of the usual epochs fit
(`MIN_SHARES`). If not even a few epochs fit, the backbone stays frozen: its features are computed
once, for the largest images for which there is time, and only the head is trained.

If the training is slower than expected, the remaining epochs are reduced, and the learning rate
falls to its end within them (`epochs_that_fit`, `shorten_schedule`). So a training takes at most
about one epoch longer than it should.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from convlens import models, optim
from convlens.data.conversion import STANDARD_SIZES, NativeImages
from convlens.data.dataset import Data
from convlens.device import Plan, candidate_plans, synchronize, usable_cores
from convlens.engine.loop import TrainLoop
from convlens.models import stages
from convlens.models.stages import set_train_mode
from convlens.recipe import FINE_TUNING_IMAGES_TO_SEE, Recipe, auto_epochs
from convlens.runtime import RuntimeContext
from convlens.training import transfer
from convlens.training.autotune import fastest
from convlens.training.transfer import BackboneNames
from convlens.uncertainty.outliers import MAX_VECTORS
from convlens.utils.console import format_duration

# Image sizes of a fine-tuning, and which share of the usual epochs must fit for each. With less
# time, smaller images and more epochs are better, and below the smallest of these shares a head on
# the features of larger images (docs/log.md).
MIN_SHARES: Mapping[int, float] = {128: 0.4, 160: 2 / 3, 192: 2 / 3, 224: 1.0}
# The same for any size above the smallest in a training from scratch.
MIN_SCRATCH_SIZE, MIN_SCRATCH_SHARE = 32, 0.5
HEAD_EPOCHS = 30  # of a training on features, where an epoch takes a fraction of a second
REFERENCE_SHARE = 0.05  # of the time, at most, for the features that are stored in the model file
MIN_REFERENCES = 200
# Measured: figures, loading the model again, writing the results. And a margin for everything.
END_SECONDS, MARGIN = 5.0, 1.1
# Of decoding an image on one core: a constant part, and one per pixel of a typical photograph.
DECODE_SECONDS, DECODE_SECONDS_PER_PIXEL = 1.5e-3, 4e-9
TIMED_SIZE = 96  # pixels of the random images that are timed, where the recipe names no size
TIMED_IMAGES, TIMED_PIXELS = 16, 32 * 128 * 128  # of a batch of them, at most
TIMED_ROUNDS = 2


@dataclass(frozen=True)
class Deadline:
    """The end of the time that `train.minutes` allows.

    Attributes:
        started: when the command started, as `time.monotonic`.
    """

    minutes: float
    started: float

    def __str__(self) -> str:
        return f"{self.minutes:g} minute{'s' * (self.minutes != 1)}"

    def left(self) -> float:
        """Return the seconds that are left; negative after the end."""
        return self.started + 60 * self.minutes - time.monotonic()


@dataclass(frozen=True)
class Speed:
    """Seconds per image on this machine, for images of `size` pixels.

    Attributes:
        train: of a training step with the stages that a fine-tuning trains.
        features: of a forward pass in the precision of the training.
        inference: of a forward pass in float32, as in validation and test.
        plan: the plan with the fastest training step (`Plan.to_dict`).
    """

    size: int
    train: float
    features: float
    inference: float
    plan: dict[str, Any] = field(default_factory=dict)

    def scale(self, size: int) -> float:
        """Return the factor on the times for images of another size: the time is per pixel."""
        return (size / self.size) ** 2


@dataclass(frozen=True)
class ImageCounts:
    """Numbers of images of the splits."""

    train: int
    val: int
    test: int


@dataclass(frozen=True)
class Option:
    """A training that may fit.

    Attributes:
        crop_size: size of the images that it is trained on, if they are smaller crops.
        head_only: the backbone is frozen, and its features are computed once.
        min_share: the share of the usual epochs that must fit.
    """

    image_size: int
    crop_size: int | None = None
    head_only: bool = False
    min_share: float = 0.0

    def epoch_seconds(self, images: ImageCounts, speed: Speed) -> float:
        """Return the seconds of an epoch with its validation."""
        if self.head_only:  # small beside computing the features
            return 0.002 * images.train * speed.features * speed.scale(self.image_size)
        train = images.train * speed.train * speed.scale(self.crop_size or self.image_size)
        return MARGIN * train + images.val * speed.inference * speed.scale(self.image_size)

    def other_seconds(self, images: ImageCounts, speed: Speed, references: int) -> float:
        """Return the seconds before the first and after the last epoch."""
        scale = speed.scale(self.image_size)
        count = images.val + images.test + min(references, images.train)
        features = 0.0
        if self.head_only:
            features = images.train * speed.features + images.val * speed.inference
        return END_SECONDS + MARGIN * scale * (features + count * speed.inference)


@dataclass(frozen=True)
class Choice:
    """The training that fits best.

    Attributes:
        references: number of training images whose features are stored.
        seconds: predicted, from now to the end of the command.
        end_seconds: those of them after the last epoch.
        fits: whether there is enough time. If not, it is the cheapest option.
    """

    option: Option
    epochs: int
    references: int
    seconds: float
    end_seconds: float
    fits: bool


@dataclass(frozen=True)
class FittedTraining:
    """The recipe and the plan of a training that fits into the time.

    Attributes:
        plan: None: it is still to be chosen.
        line: the choice in one line.
        end_seconds: predicted, after the last epoch.
        may_be_shortened: whether fewer epochs would save time worth mentioning.
    """

    recipe: Recipe
    plan: Plan | None
    line: str
    end_seconds: float
    may_be_shortened: bool


def choose(
    options: Sequence[Option],
    images: ImageCounts,
    speed: Speed,
    seconds: float,
    *,
    usual_epochs: int,
    fixed_epochs: int | None = None,
    enough_epochs: float = 0.0,
) -> Choice:
    """Return the best of the options that fit into the time, with its number of epochs.

    Args:
        options: the cheapest one first, the best one last.
        seconds: the time that is left.
        usual_epochs: the number without a limit of time, which is not exceeded.
        fixed_epochs: the number that the recipe sets.
        enough_epochs: the number for which the training sees as many images as for a large set.
            With few images it is above `usual_epochs`: then a head on larger images is better than
            a training on smaller ones.
    """
    can_freeze = options[0].head_only
    for option in reversed(options):
        references = reference_images(option, speed, seconds)
        other = option.other_seconds(images, speed, references)
        per_epoch = option.epoch_seconds(images, speed)
        affordable = math.floor((seconds - other) / per_epoch)
        is_cheapest = option == options[0]
        is_reduced = can_freeze and option.min_share < 1 and not option.head_only
        full_epochs = max(usual_epochs, enough_epochs) if is_reduced else usual_epochs
        if fixed_epochs is not None:
            needed = epochs = fixed_epochs
        elif option.head_only:
            needed = epochs = HEAD_EPOCHS
        else:
            needed = 1 if is_cheapest else max(1, math.ceil(option.min_share * full_epochs))
            epochs = max(1, min(affordable, usual_epochs))
        fits = affordable >= needed and (option.head_only or epochs >= needed)
        if fits or is_cheapest:
            total = other + epochs * per_epoch
            end = replace(option, head_only=False).other_seconds(images, speed, references)
            return Choice(option, epochs, references, total, end, fits)
    raise ValueError("no options")


def reference_images(option: Option, speed: Speed, seconds: float) -> int:
    """Return for how many images computing the stored features takes a small share of the time."""
    per_image = speed.inference * speed.scale(option.image_size)
    affordable = int(REFERENCE_SHARE * max(0.0, seconds) / per_image)
    return min(max(affordable, MIN_REFERENCES), MAX_VECTORS)


def options_for(
    requested: Recipe, start: Recipe, native: NativeImages, default_size: int, decoded: int | None
) -> list[Option]:
    """Return the trainings that the recipe allows, the cheapest one first.

    Args:
        start: the recipe without `auto` in the section `model`.
        default_size: the image size without a limit of time.
        decoded: the size of the images, if they are decoded already.
    """
    is_pretrained = start.model.weights != "none"
    sizes = {default_size: 0.0}
    if decoded is not None:
        sizes = {decoded: 0.0}
    elif requested.data.image_size != "auto":
        sizes = {int(requested.data.image_size): 0.0}
    elif is_pretrained and start.model.name in transfer.ANY_SIZE:
        largest = max(default_size, native.side)
        sizes = {size: share for size, share in MIN_SHARES.items() if size <= largest}
    elif not is_pretrained:
        smaller = [s for s in STANDARD_SIZES if MIN_SCRATCH_SIZE <= s < default_size]
        sizes = dict.fromkeys([*smaller, default_size], MIN_SCRATCH_SHARE)
    options = [
        Option(size, transfer.crop_size(start, size) if _may_crop(requested) else None, False, each)
        for size, each in sizes.items()
    ]
    if is_pretrained and _may_freeze(requested):
        if decoded is not None:
            share = MIN_SHARES[min(MIN_SHARES)]
            options = [Option(each.image_size, each.crop_size, False, share) for each in options]
        return [*(Option(size, head_only=True) for size in sizes), *options]
    return options


def _may_crop(requested: Recipe) -> bool:
    return requested.augment == "auto"


def _may_freeze(requested: Recipe) -> bool:
    """Return whether the recipe leaves open what a training of the head alone needs."""
    options = requested.train
    is_open = requested.model.trainable == "auto" and requested.augment == "auto"
    return is_open and options.epochs == "auto" and options.cache_trunk and not options.views


def is_open(requested: Recipe) -> bool:
    """Return whether `train.minutes` is set and leaves anything to choose."""
    chosen = (requested.data.image_size, requested.model.trainable, requested.train.epochs)
    return requested.train.minutes is not None and "auto" in chosen


# ---- times of this machine ---------------------------------------------------------------


class TimeBudget:
    """The time that a new run has, and the speed of the networks that it may start with.

    Rank 0 measures; every rank creates this. A single process measures a network when it is asked
    for. Several ones cannot, since they load the images one after another: they measure every
    network that the recipe may stand for at once.

    Args:
        requested: the recipe, with `train.minutes`.
        started: when the time began, as `time.monotonic`.
    """

    def __init__(
        self,
        requested: Recipe,
        backbones: Sequence[BackboneNames],
        started: float,
        context: RuntimeContext,
    ) -> None:
        self.deadline = Deadline(requested.train.minutes or 0.0, started)
        self._context = context
        self._speeds: dict[str, Speed] = {}
        self._seconds_left: float | None = None
        self.cores = usable_cores()  # that decode the images
        if context.process_group.size > 1:
            self._measure_all(requested, backbones)

    def _measure_all(self, requested: Recipe, backbones: Sequence[BackboneNames]) -> None:
        """Measure the networks for photographs and for images that are unlike them."""
        examples = NativeImages(224, 3), NativeImages(224, 1)
        starts = [transfer.choose_start(requested, each, backbones).recipe for each in examples]

        def measure() -> dict[str, Any]:
            return {_network_key(each): asdict(self.speed(each)) for each in starts}

        measured = self._context.broadcast(measure)
        self._speeds = {key: Speed(**each) for key, each in measured.items()}
        self._seconds_left = self._context.broadcast(self.deadline.left)
        self.cores = self._context.broadcast(usable_cores)

    def speed(self, start: Recipe) -> Speed:
        """Return the speed of the network of a recipe without `auto` in the section `model`."""
        key = _network_key(start)
        if key not in self._speeds:
            self._speeds[key] = measure_speed(start, self._context)
        return self._speeds[key]

    def seconds_before_decoding(self) -> float:
        """Return the seconds that are left; with several processes, the same on every rank."""
        return self.deadline.left() if self._seconds_left is None else self._seconds_left


def _network_key(start: Recipe) -> str:
    return f"{start.model.name} {start.model.weights}"


def measure_speed(start: Recipe, context: RuntimeContext) -> Speed:
    """Time some steps and forward passes on random images.

    Args:
        start: a recipe without `auto` in the section `model`.
    """
    config, options = start.model, start.train
    requested = start.data.image_size
    any_size = config.weights == "none" or config.name in transfer.ANY_SIZE
    default = TIMED_SIZE if any_size else transfer.FINE_TUNING_SIZE
    size = default if requested == "auto" else int(requested)
    channels = 3 if start.data.channels == "auto" else int(start.data.channels)
    count = max(2, min(options.batch_size, TIMED_IMAGES, TIMED_PIXELS // size**2))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, size, size, generator=generator).to(context.device)
    labels = (torch.arange(count) % 2).to(context.device)
    model = models.build_model(config.name, 2, channels, size, config.options)
    stages.freeze(model, config.trainable)
    if config.freeze_batch_norm is True:
        stages.freeze_batch_norm(model)
    candidates = candidate_plans(
        context.device, options.precision, options.memory_format, options.deterministic
    )
    # The safest plan, and the one that is fastest on hardware with half precision.
    plans = list(dict.fromkeys([candidates[0], candidates[-1]]))

    def make_step(plan: Plan) -> Callable[[], Tensor]:
        trained = plan.prepare_model(copy.deepcopy(model))
        set_train_mode(trained)
        optimizer = optim.build_optimizer(trained, start.optim)
        loop = TrainLoop(trained, optimizer, nn.CrossEntropyLoss(), plan)
        inputs = images.to(memory_format=plan.torch_memory_format)
        return lambda: loop.train_step(inputs, labels).loss

    plan, times = fastest(plans, make_step, TIMED_ROUNDS)
    plan.prepare_model(model).eval()
    inputs = images.to(memory_format=plan.torch_memory_format)
    float32 = Plan(plan.device, "fp32", plan.memory_format)
    features, inference = (_forward_seconds(model, inputs, each) for each in (plan, float32))
    processes = count * context.process_group.size
    return Speed(
        size,
        times[plans.index(plan)] / processes,
        features / count,
        inference / count,
        plan.to_dict(),
    )


@torch.no_grad()
def _forward_seconds(model: nn.Module, images: Tensor, plan: Plan) -> float:
    seconds = []
    for _ in range(TIMED_ROUNDS + 1):  # the first one warms up
        synchronize(plan.device)
        start = time.perf_counter()
        with plan.autocast():
            model(images)
        synchronize(plan.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


# ---- the choice for a recipe -------------------------------------------------------------


def image_size_that_fits(
    requested: Recipe,
    backbones: Sequence[BackboneNames],
    budget: TimeBudget,
    native: NativeImages,
) -> int | None:
    """Return the image size, before the images are decoded; as `transfer.choose_image_size`."""
    default = transfer.choose_image_size(requested, backbones, native)
    start = transfer.choose_start(requested, native, backbones).recipe
    speed = budget.speed(start)
    size = default or max((s for s in STANDARD_SIZES if s <= native.side), default=native.side)
    held_out = requested.data.val_fraction, requested.data.test_fraction
    val, test = (round(share * native.count) for share in held_out)
    images = ImageCounts(max(2, native.count - val - test), val, test)
    decoding = DECODE_SECONDS + DECODE_SECONDS_PER_PIXEL * native.side**2
    seconds = budget.seconds_before_decoding() - decoding * native.count / budget.cores
    options = options_for(requested, start, native, size, None)
    return _choose_for(requested, start, options, images, speed, seconds).option.image_size


def choose_for_images(
    requested: Recipe,
    start: Recipe,
    data: Data,
    speed: Speed,
    seconds: float,
) -> Choice:
    """Return the choice for decoded images.

    Args:
        start: the recipe without `auto` in the sections `model` and `optim`.
        seconds: the time that is left.
    """
    images = ImageCounts(len(data.train), len(data.val), data.summary.splits["test"])
    options = options_for(requested, start, data.native, data.image_size, data.image_size)
    return _choose_for(requested, start, options, images, speed, seconds)


def _choose_for(
    requested: Recipe,
    start: Recipe,
    options: Sequence[Option],
    images: ImageCounts,
    speed: Speed,
    seconds: float,
) -> Choice:
    """Return the choice with the numbers of epochs of a recipe."""
    return choose(
        options,
        images,
        speed,
        seconds,
        usual_epochs=auto_epochs(images.train, is_pretrained=start.model.weights != "none"),
        fixed_epochs=_fixed_epochs(requested),
        enough_epochs=FINE_TUNING_IMAGES_TO_SEE / images.train,
    )


def choose_training(
    requested: Recipe, start: Recipe, data: Data, budget: TimeBudget, context: RuntimeContext
) -> FittedTraining:
    """Choose what the recipe leaves open; rank 0 decides for all. Every rank calls this.

    Args:
        start: the recipe without `auto` in the sections `model` and `optim`.
    """

    def decide() -> dict[str, Any]:
        speed = budget.speed(start)
        left = budget.deadline.left()
        choice = choose_for_images(requested, start, data, speed, left)
        recipe = recipe_with_choice(requested, start, choice)
        return {
            "recipe": recipe.model_dump(mode="json"),
            "plan": speed.plan,
            "line": describe_choice(recipe, choice, budget.deadline, left),
            "end_seconds": choice.end_seconds,
            "may_be_shortened": not choice.option.head_only and _fixed_epochs(requested) is None,
        }

    decided = context.broadcast(decide)
    plan = replace(Plan.from_dict(decided["plan"]), device=context.device)
    # A compiled plan is made by the autotuner.
    is_eager = start.train.compile in ("auto", False)
    return FittedTraining(
        Recipe.model_validate(decided["recipe"]),
        plan if is_eager else None,
        decided["line"],
        decided["end_seconds"],
        decided["may_be_shortened"],
    )


def recipe_with_choice(requested: Recipe, start: Recipe, choice: Choice) -> Recipe:
    """Return the recipe `start` with the chosen values."""
    changes: dict[str, Any] = {"train.epochs": choice.epochs}
    if choice.option.head_only:
        changes |= {"model.trainable": "head", "augment": []}
    if requested.train.calibrate is True and requested.train.reference_images is None:
        changes["train.reference_images"] = choice.references
    return start.replace(**changes)


def describe_choice(recipe: Recipe, choice: Choice, deadline: Deadline, left: float) -> str:
    """Return the choice in one line.

    Args:
        recipe: with the chosen values.
        left: seconds that were left at the time of the choice.
    """
    total = 60 * deadline.minutes - left + choice.seconds
    trained = "the whole network" if recipe.model.trainable == "all" else recipe.model.trainable
    if choice.option.head_only:
        trained = "only the head"
    epochs = f"{choice.epochs} epoch{'s' * (choice.epochs != 1)}"
    line = (
        f"{deadline}: {choice.option.image_size} px, {trained} trained, {epochs}; "
        f"about {format_duration(total)} in total"
    )
    return line if choice.fits else f"{line}: the time is too short, this is the shortest training"


def _fixed_epochs(requested: Recipe) -> int | None:
    epochs = requested.train.epochs
    return None if epochs == "auto" else int(epochs)


# ---- a training that is slower than expected ---------------------------------------------


def epochs_that_fit(
    epochs: int, done: int, *, seconds_per_epoch: float, seconds_left: float
) -> int:
    """Return the number of epochs to train: fewer than `epochs` if they would take too long.

    At least one more epoch is trained, because the weights are poor at a high learning rate.

    Args:
        done: number of finished epochs.
        seconds_left: without what is needed after the last epoch.
    """
    affordable = math.floor(seconds_left / seconds_per_epoch)
    return max(min(epochs, done + affordable), min(epochs, done + 1))


def shorten_schedule(
    schedule: optim.Schedule, *, steps: int, planned: int, done: int, epochs: int
) -> optim.Schedule:
    """Return a schedule over fewer epochs, which ends as the planned one would have.

    Up to epoch `done` it is the planned one, bit for bit; the rest of that is compressed into the
    remaining epochs.

    Args:
        steps: of an epoch.
        planned: number of epochs of `schedule`.
        epochs: number of epochs of the new schedule, more than `done`.
    """

    def factor(progress: float) -> float:
        step = round(progress * epochs * steps)
        if step < done * steps:
            return schedule(step / (planned * steps))
        share = (step - done * steps) / ((epochs - done) * steps)
        return schedule(done / planned + (1 - done / planned) * share)

    return factor

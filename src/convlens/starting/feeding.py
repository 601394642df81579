"""What a training reads: augmented images, or the activations of a trunk that doesn't learn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlens import device
from convlens.data import Data, Split
from convlens.data.augment import MIXES
from convlens.data.batches import Batches, Labelled, Prepare, to_unit
from convlens.data.draws import Place
from convlens.device import Plan, seed_of
from convlens.distributed.processes import ProcessGroup
from convlens.engine import EpochBatches, TrainState
from convlens.errors import ResourceError, UsageError
from convlens.inference import split_logits
from convlens.models import freezing
from convlens.recipe import Recipe
from convlens.starting import trunk
from convlens.stepping.data_parallel import distributed_map
from convlens.system.console import print_status, progress

Logits = Callable[[Callable[[int], None]], tuple[Tensor, Tensor]]
VIEW = 4  # tells the generators of fixed views from those of order, augmentation and dropout


@dataclass(frozen=True)
class Feed:
    """The part of the network that the engine trains, what it trains on, and how it is tested.

    Attributes:
        model: the network, or what is behind its cached trunk; the weights are shared.
        batches: what `engine.TrainLoop.run` reads.
        validate: logits float32 `[N, K]` and labels `[N]` of the validation split; told of each
            batch, what it is given may raise.
        cached_bytes: size of the trunk's activations; 0 where images are read.
    """

    model: nn.Module
    batches: Batches | trunk.ViewBatches
    validate: Logits
    cached_bytes: int = 0


class Timed:
    """Batches that add the time spent waiting for them to the state's `data_seconds`.

    On a CPU that is reading, augmenting and normalising; on a GPU, which is only told what to
    augment, it is the time in which the host could tell it nothing else.
    """

    def __init__(self, batches: EpochBatches, state: TrainState) -> None:
        self._batches, self._state = batches, state

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self._batches.epoch(epoch, start))
        while True:
            start_time = time.perf_counter()
            batch = next(batches, None)
            self._state.data_seconds += time.perf_counter() - start_time
            if batch is None:
                return
            yield batch


def feed(recipe: Recipe, data: Data, model: nn.Module, images: Batches) -> Feed:
    """Chooses between images and cached activations, and computes the latter.

    The trunk is cached where it is frozen, the images are the same in every epoch (no
    augmentation, or `train.views` fixed draws of it) and its activations fit into memory.

    Args:
        model: on its device, frozen as the recipe says.
        images: the training split's batches.
    """
    options = recipe.train
    plan, normalise = images.plan, images.normalise

    def validate(advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        return _logits(images.world, model, data.val, normalise, plan, advance)

    plain = Feed(model, images, validate)
    if options.views:
        _check_views(recipe, freezing.frozen_prefix(model))
    prefix = trunk_of(recipe, model)
    if not prefix:
        return plain
    few = data.train.rows.gather(torch.arange(min(8, len(data.train)))).to(plan.device)
    sample = normalise(few, plan)
    if trunk.fits_together(model, prefix, sample):
        return _cached(recipe, data, model, images, prefix, sample) or plain
    if options.views:
        raise UsageError(
            f"train.views={options.views} keeps the activations of frozen layers, but here "
            f"later layers read more than the output of {prefix[-1]}",
            fix="leave out train.views, or freeze up to another layer with model.trainable",
        )
    return plain


def trunk_of(recipe: Recipe, model: nn.Module) -> list[str]:
    """Modules of the trunk that may be computed once; none where it learns or images change."""
    fixed = bool(recipe.train.views) or not recipe.operations
    return freezing.frozen_prefix(model) if fixed and recipe.train.cache_trunk else []


def _check_views(recipe: Recipe, prefix: list[str]) -> None:
    mixes = [name for name, _ in recipe.operations if name in MIXES]
    reason = "the first layer of this network learns" * (not prefix)
    reason = reason or "there is no augmentation" * (not recipe.operations)
    reason = reason or f"{' and '.join(mixes)} mixes labels anew in each batch" * bool(mixes)
    reason = reason or "train.cache_trunk=false computes them anew" * (not recipe.train.cache_trunk)
    if reason:
        raise UsageError(
            f"train.views={recipe.train.views} is for augmented images before a frozen trunk, "
            f"and {reason}",
            fix="leave out train.views, or set model.trainable, e.g. last:2",
        )


def _cached(
    recipe: Recipe, data: Data, model: nn.Module, images: Batches, prefix: list[str], sample: Tensor
) -> Feed | None:
    """Everything computed once; None where it does not fit into memory."""
    plan, views = images.plan, recipe.train.views or 1
    each = trunk.image_bytes(model, prefix, sample, plan)
    size = each * len(data.train) * views + 2 * each * len(data.val)
    budget = images.world.all_reduce_min(device.memory_budget(plan.device))
    if size > budget:
        told = f"{size / 2**20:,.0f} MiB of activations, and {budget / 2**20:,.0f} MiB are free"
        if recipe.train.views:
            raise ResourceError(
                f"train.views={views} needs {told}", fix="fewer views, or leave out train.views"
            )
        print_status(
            f"the frozen layers are computed in every epoch: keeping them would take {told}"
        )
        return None
    print_status(f"the frozen layers ({prefix[0]} to {prefix[-1]}) are computed once")
    exact = Plan(plan.device, "fp32", plan.memory_format)
    total = views * len(data.train) + len(data.val)
    with progress("frozen layers", total) as bar:
        parts = []
        for view in range(views):
            read = _images(data.train, images, view if recipe.train.views else None)
            found = trunk.compute(model, prefix, read, data.train.labels, plan, bar.advance)
            parts.append(_batches(recipe, found, images))
        read = _images(data.val, images, None)
        val = trunk.compute(model, prefix, read, data.val.labels, exact, bar.advance)
    rest = trunk.tail(model, prefix)

    def validate(advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        return _logits(images.world, rest, val, trunk.as_they_are, plan, advance)

    batches = trunk.ViewBatches(parts) if len(parts) > 1 else parts[0]
    return Feed(rest, batches, validate, size)


def _logits(
    world: ProcessGroup, model: nn.Module, split: Labelled, prepare: Prepare, plan: Plan,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits and labels of a split, of which each process computes its part."""

    def ask(part: Labelled) -> tuple[Tensor]:
        return (split_logits(model, part, prepare, plan, advance=advance)[0],)

    (logits,) = distributed_map(world, split, ask)
    assert logits is not None
    return logits, split.labels.to(plan.device)


def _batches(recipe: Recipe, features: trunk.Features, like: Batches) -> Batches:
    return Batches(
        features,
        batch_size=recipe.train.batch_size,
        normalise=trunk.as_they_are,
        plan=like.plan,
        seed=recipe.train.seed,
        world=like.world,
    )


def _images(split: Split, like: Batches, view: int | None) -> Iterator[Tensor]:
    """All images of a split in order, normalised; with `view`, that draw of the augmentation."""
    generator = torch.Generator(like.plan.device)
    for chunk, index in enumerate(torch.arange(len(split)).split(trunk.CHUNK)):
        images = split.rows.gather(index).to(like.plan.device)
        if view is not None and like.augment is not None:
            generator.manual_seed(seed_of(like.seed, view, chunk, VIEW))
            place = Place(index.to(like.plan.device), view + 1, like.seed)
            labels = split.labels[index].to(like.plan.device)
            images, _ = like.augment(to_unit(images), labels, place, generator)
        yield like.normalise(images, like.plan)

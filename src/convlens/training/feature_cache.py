"""Inputs of the training loop: augmented images, or cached outputs of a frozen backbone.

Frozen layers compute the same outputs for the same image in every epoch. `compute_features` runs
them once over a split and keeps the outputs; `trainable_head` is the rest of the network, which is
then trained on them. Both share the weights of the network, so training the head also trains the
network. An epoch costs no more than the trainable part.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlens.data.dataset import Data, Split
from convlens.data.loader import Batches, Labelled, Prepare, to_unit
from convlens.data.transforms.pipeline import mixes_labels
from convlens.data.transforms.random import SampleInfo
from convlens.device import Plan, derive_seed, memory_budget
from convlens.distributed import ProcessGroup
from convlens.engine.data_parallel import distributed_map
from convlens.engine.inference import split_logits
from convlens.engine.loop import EpochBatches, TrainState
from convlens.errors import ResourceError, UsageError
from convlens.models import stages
from convlens.recipe import Recipe
from convlens.utils.console import print_status, progress_bar

CHUNK_IMAGES = 256  # images for which the frozen backbone is computed at once
# Separates the random generators of fixed views from those of order, augmentation and dropout.
VIEW_SEED = 4

# Takes a function that is called after each batch; returns logits `[N, K]` and targets `[N]`.
ValidateFunction = Callable[[Callable[[int], None]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Features:
    """Outputs of the frozen backbone for a split, `[N, ...]` on the device, in place of images."""

    values: Tensor
    labels: Tensor

    @property
    def rows(self) -> Features:
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, c, h, w = (*self.values.shape, 1, 1)[:4]  # after global pooling there are no maps
        return n, c, h, w

    def gather(self, index: Tensor) -> Tensor:
        return self.values.index_select(0, index.to(self.values.device))

    def in_memory_tensor(self) -> Tensor:
        return self.values


class ViewBatches:
    """Batches of several fixed augmented views of the same images, one view per epoch in turn.

    Args:
        views: batches of the same images, in the same order and of the same sizes.
    """

    def __init__(self, views: Sequence[Batches]) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views[0])

    @property
    def sizes(self) -> list[int]:
        return self.views[0].sizes

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch (from 1), starting with number `start`."""
        return self.views[(epoch - 1) % len(self.views)].epoch(epoch, start)

    def sample_indices(self, epoch: int, step: int) -> list[int]:
        """Return the indices of the images in a batch, as `Batches.sample_indices`."""
        return self.views[0].sample_indices(epoch, step)


def trainable_head(model: nn.Module, prefix: Sequence[str]) -> nn.Module:
    """Return the network without its frozen backbone, sharing parameters and buffers with `model`.

    Args:
        prefix: names of the modules of the backbone.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    head = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name in prefix:
        head.set_submodule(name, nn.Identity())
    return head


def is_sequential_split(model: nn.Module, prefix: Sequence[str], images: Tensor) -> bool:
    """Return whether backbone and trainable head in sequence compute the same as the network.

    They do not if a connection skips from one to the other. Both are run on normalized `images`
    `[B, C, H, W]` in eval mode.
    """
    with torch.no_grad():
        expected = model.eval()(images)
        features = _backbone_output(model, prefix[-1], images)
        try:
            actual = trainable_head(model, prefix).eval()(features)
        except Exception:
            return False
    return expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-3, atol=1e-4)


def compute_features(
    model: nn.Module,
    prefix: Sequence[str],
    batches: Iterable[Tensor],
    labels: Tensor,
    plan: Plan,
    advance: Callable[[int], None] = lambda count: None,
) -> Features:
    """Compute the outputs of the frozen backbone for a split, in the plan's precision.

    Args:
        batches: normalized images, float32 `[B, C, H, W]` on the device, in the order of the split.
        labels: int64 `[N]`.
        advance: called with the number of images of each batch.
    """
    kept: Tensor | None = None
    done = 0
    for images in batches:
        with torch.no_grad(), plan.autocast():
            values = _backbone_output(model, prefix[-1], images)
        if kept is None:
            kept = values.new_empty((len(labels), *values.shape[1:]))
        kept[done : done + len(values)] = values
        done += len(values)
        advance(len(values))
    assert kept is not None
    return Features(kept, labels.to(plan.device))


def feature_bytes(model: nn.Module, prefix: Sequence[str], images: Tensor, plan: Plan) -> int:
    """Return the bytes that the features of one image take, measured on normalized `images`."""
    with torch.no_grad(), plan.autocast():
        values = _backbone_output(model, prefix[-1], images)
    return values[0].numel() * values.element_size()


def identity(features: Tensor, plan: Plan) -> Tensor:
    """Copy features into the plan's memory format; used in place of `Normalize`.

    Always a copy: the trainable head may start with an in-place operation, and features are used
    again in the next epoch.
    """
    return features.clone(
        memory_format=plan.torch_memory_format if features.ndim == 4 else torch.preserve_format
    )


class _StopForward(Exception):  # noqa: N818 (control flow)
    """Raised by a hook to end a forward pass early, with the output of a module."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


def _backbone_output(model: nn.Module, last: str, images: Tensor) -> Tensor:
    """Return the output of module `last` for `images` in eval mode; compute nothing after it."""

    def stop(module: nn.Module, inputs: object, output: Tensor) -> None:
        raise _StopForward(output)

    hook = model.get_submodule(last).register_forward_hook(stop)
    model.eval()
    try:
        model(images)
    except _StopForward as reached:
        return reached.values
    finally:
        hook.remove()
    raise RuntimeError(f"{last} is not used in the forward pass")


@dataclass(frozen=True)
class TrainInputs:
    """The part of the network that is trained, the batches it is trained on, and its validation.

    Attributes:
        model: the network, or its trainable head if the frozen backbone is cached. Weights are
            shared with the network.
        batches: read by `TrainLoop.run`.
        validate: returns logits and targets of the validation split. The function it is called
            with may raise to interrupt it.
        cached_bytes: size of the cached features; 0 if images are read.
    """

    model: nn.Module
    batches: Batches | ViewBatches
    validate: ValidateFunction
    cached_bytes: int = 0


class TimedBatches:
    """Add the time spent waiting for batches to the `data_seconds` of a training state.

    On a CPU this is the time to read, augment and normalize. On a GPU, where these operations are
    only enqueued, it is the time in which the host enqueues nothing else.
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


def choose_train_inputs(
    recipe: Recipe, data: Data, model: nn.Module, images: Batches
) -> TrainInputs:
    """Choose between images and cached features as the input of the training.

    Features are cached if the backbone is frozen, the images are the same in every epoch (no
    augmentation, or `train.views` fixed views) and the features fit into memory.

    Args:
        model: on its device, frozen as the recipe says.
        images: the batches of the training split.

    Raises:
        UsageError: `train.views` is set, and features cannot be cached.
        ResourceError: `train.views` is set, and the features do not fit into memory.
    """
    options = recipe.train
    plan, normalize = images.plan, images.normalize

    def validate(advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        return _split_logits(images.process_group, model, data.val, normalize, plan, advance)

    without_cache = TrainInputs(model, images, validate)
    if options.views:
        _check_views(recipe, stages.frozen_prefix(model))
    prefix = cacheable_backbone(recipe, model)
    if not prefix:
        return without_cache
    pixels = data.train.rows.gather(torch.arange(min(8, len(data.train)))).to(plan.device)
    sample = normalize(pixels, plan)
    if is_sequential_split(model, prefix, sample):
        return _cache_features(recipe, data, model, images, prefix, sample) or without_cache
    if options.views:
        raise UsageError(
            f"train.views={options.views} caches the outputs of frozen layers, but in this network "
            f"later layers read more than the output of {prefix[-1]}",
            fix="leave out train.views, or freeze up to another layer with model.trainable",
        )
    return without_cache


def cacheable_backbone(recipe: Recipe, model: nn.Module) -> list[str]:
    """Return the names of the frozen modules that can be computed once; none if images change."""
    images_are_fixed = bool(recipe.train.views) or not recipe.operations
    can_cache = images_are_fixed and recipe.train.cache_trunk
    return stages.frozen_prefix(model) if can_cache else []


def _check_views(recipe: Recipe, prefix: list[str]) -> None:
    mixes = mixes_labels(recipe.operations)
    if not prefix:
        reason = "the first layer of this network is trainable"
    elif not recipe.operations:
        reason = "there is no augmentation"
    elif mixes:
        reason = f"{' and '.join(mixes)} mixes the labels of each batch"
    elif not recipe.train.cache_trunk:
        reason = "train.cache_trunk=false disables the cache"
    else:
        return
    raise UsageError(
        f"train.views={recipe.train.views} is for augmented images and a frozen backbone, but "
        f"{reason}",
        fix="leave out train.views, or set model.trainable, e.g. last:2",
    )


def _cache_features(
    recipe: Recipe, data: Data, model: nn.Module, images: Batches, prefix: list[str], sample: Tensor
) -> TrainInputs | None:
    """Compute the features of all training and validation images; None if they do not fit."""
    plan, views = images.plan, recipe.train.views or 1
    bytes_per_image = feature_bytes(model, prefix, sample, plan)
    size = bytes_per_image * (len(data.train) * views + 2 * len(data.val))
    budget = images.process_group.all_reduce_min(memory_budget(plan.device))
    if size > budget:
        needed = f"{size / 2**20:,.0f} MiB of features, and {budget / 2**20:,.0f} MiB are free"
        if recipe.train.views:
            raise ResourceError(
                f"train.views={views} needs {needed}",
                fix="use fewer views, or leave out train.views",
            )
        print_status(f"the frozen layers are computed in every epoch: a cache needs {needed}")
        return None
    print_status(f"the frozen layers ({prefix[0]} to {prefix[-1]}) are computed once")
    float32_plan = Plan(plan.device, "fp32", plan.memory_format)  # as in every validation
    total = views * len(data.train) + len(data.val)
    with progress_bar("frozen layers", total) as bar:
        batches_of_views = []
        for view in range(views):
            pixels = _normalized_images(data.train, images, view if recipe.train.views else None)
            train = compute_features(model, prefix, pixels, data.train.labels, plan, bar.advance)
            batches_of_views.append(_feature_batches(recipe, train, images))
        pixels = _normalized_images(data.val, images, None)
        val = compute_features(model, prefix, pixels, data.val.labels, float32_plan, bar.advance)
    head = trainable_head(model, prefix)

    def validate(advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        return _split_logits(images.process_group, head, val, identity, plan, advance)

    batches = ViewBatches(batches_of_views) if views > 1 else batches_of_views[0]
    return TrainInputs(head, batches, validate, size)


def _split_logits(
    process_group: ProcessGroup,
    model: nn.Module,
    split: Labelled,
    prepare: Prepare,
    plan: Plan,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Return logits and labels of a split; every process computes a part of it."""

    def compute(part: Labelled) -> tuple[Tensor]:
        return (split_logits(model, part, prepare, plan, advance=advance)[0],)

    (logits,) = distributed_map(process_group, split, compute)
    assert logits is not None
    return logits, split.labels.to(plan.device)


def _feature_batches(recipe: Recipe, features: Features, like: Batches) -> Batches:
    return Batches(
        features,
        batch_size=recipe.train.batch_size,
        normalize=identity,
        plan=like.plan,
        seed=recipe.train.seed,
        process_group=like.process_group,
        balance=recipe.data.balance,
    )


def _normalized_images(split: Split, like: Batches, view: int | None) -> Iterator[Tensor]:
    """Yield all images of a split in order, normalized; with `view`, augmented for that view."""
    generator = torch.Generator(like.plan.device)
    for chunk, index in enumerate(torch.arange(len(split)).split(CHUNK_IMAGES)):
        images = split.rows.gather(index).to(like.plan.device)
        if view is not None and like.augment is not None:
            generator.manual_seed(derive_seed(like.seed, view, chunk, VIEW_SEED))
            sample_info = SampleInfo(index.to(like.plan.device), view + 1, like.seed)
            labels = split.labels[index].to(like.plan.device)
            images, _ = like.augment(to_unit(images), labels, sample_info, generator)
        yield like.normalize(images, like.plan)

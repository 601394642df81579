"""What a training reads: augmented images, or the activations of a trunk that doesn't learn."""

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
from convlens.data.transforms.pipeline import MIXES
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

# ---- trunk ----------------------------------------
# The frozen beginning of a network, computed once instead of in every epoch.
#
# Where the first layers don't learn, they give the same numbers for the same image in every epoch.
# `compute` runs them once over a split and keeps what they give; `tail` is the rest of the network,
# which then trains on that. The weights of both are the network's own, so that whoever holds the
# network sees it learn. An epoch then costs no more than the part that learns.

CHUNK_IMAGES = 256
Images = Iterable[Tensor]


@dataclass(frozen=True)
class Features:
    """What the trunk gives for a split: `[N, ...]` on the device. Takes the place of its images."""

    values: Tensor
    labels: Tensor

    @property
    def rows(self) -> Features:
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, c, h, w = (*self.values.shape, 1, 1)[:4]  # behind the last pooling there are no maps
        return n, c, h, w

    def gather(self, index: Tensor) -> Tensor:
        return self.values.index_select(0, index.to(self.values.device))

    def in_memory_tensor(self) -> Tensor:
        return self.values


class ViewBatches:
    """Epoch after epoch the next of several fixed views of the same images, then the first again.

    Args:
        views: batches of the same images in the same order of the same sizes.
    """

    def __init__(self, views: Sequence[Batches]) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views[0])

    @property
    def sizes(self) -> list[int]:
        return self.views[0].sizes

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from number `start` on; epochs count from 1."""
        return self.views[(epoch - 1) % len(self.views)].epoch(epoch, start)

    def sample_indices(self, epoch: int, step: int) -> list[int]:
        """As `Batches.sample_indices`."""
        return self.views[0].sample_indices(epoch, step)


def trainable_head(model: nn.Module, prefix: Sequence[str]) -> nn.Module:
    """The network without its trunk, sharing every weight and statistic with `model`."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    rest = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name in prefix:
        rest.set_submodule(name, nn.Identity())
    return rest


def is_sequential_split(model: nn.Module, prefix: Sequence[str], images: Tensor) -> bool:
    """Whether trunk and tail in a row are the network: not so where it skips from one to the other.

    Tried on normalised `images` `[B, C, H, W]` in eval mode.
    """
    with torch.no_grad():
        whole = model.eval()(images)
        reached = _backbone_output(model, prefix[-1], images)
        try:
            parts = trainable_head(model, prefix).eval()(reached)
        except Exception:
            return False
    return whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-3, atol=1e-4)


def compute_features(
    model: nn.Module,
    prefix: Sequence[str],
    batches: Images,
    labels: Tensor,
    plan: Plan,
    advance: Callable[[int], None] = lambda count: None,
) -> Features:
    """The trunk's activations for normalised images, batch by batch, in the plan's precision.

    Args:
        batches: float32 `[B, C, H, W]` on the device, all images of the split in order.
        labels: int64 `[N]`.
        advance: is told how many images are done.
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
    """Bytes that the activations of one image take; tried on `images`, normalised."""
    with torch.no_grad(), plan.autocast():
        values = _backbone_output(model, prefix[-1], images)
    return values[0].numel() * values.element_size()


def identity(features: Tensor, plan: Plan) -> Tensor:
    """Takes the place of `Normalize`: activations need none, only the plan's memory format.

    Always a copy: a network may begin with an in-place operation, and these are used again.
    """
    return features.clone(
        memory_format=plan.torch_memory_format if features.ndim == 4 else torch.preserve_format
    )


class _StopForward(Exception):  # noqa: N818 (control flow, no error)
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


def _backbone_output(model: nn.Module, last: str, images: Tensor) -> Tensor:
    """What the module `last` gives for `images` in eval mode; nothing behind it is computed."""

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
    raise RuntimeError(f"{last} takes no part in the forward pass")


ValidateFunction = Callable[[Callable[[int], None]], tuple[Tensor, Tensor]]
VIEW_SEED = 4  # tells the generators of fixed views from those of order, augmentation and dropout


@dataclass(frozen=True)
class TrainInputs:
    """The part of the network that the engine trains, what it trains on, and how it is tested.

    Attributes:
        model: the network, or what is behind its cached trunk; the weights are shared.
        batches: what `engine.TrainLoop.run` reads.
        validate: logits float32 `[N, K]` and labels `[N]` of the validation split; told of each
            batch, what it is given may raise.
        cached_bytes: size of the trunk's activations; 0 where images are read.
    """

    model: nn.Module
    batches: Batches | ViewBatches
    validate: ValidateFunction
    cached_bytes: int = 0


class TimedBatches:
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


def choose_train_inputs(
    recipe: Recipe, data: Data, model: nn.Module, images: Batches
) -> TrainInputs:
    """Chooses between images and cached activations, and computes the latter.

    The trunk is cached where it is frozen, the images are the same in every epoch (no
    augmentation, or `train.views` fixed draws of it) and its activations fit into memory.

    Args:
        model: on its device, frozen as the recipe says.
        images: the training split's batches.
    """
    options = recipe.train
    plan, normalize = images.plan, images.normalize

    def validate(advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        return _split_logits(images.world, model, data.val, normalize, plan, advance)

    plain = TrainInputs(model, images, validate)
    if options.views:
        _check_views(recipe, stages.frozen_prefix(model))
    prefix = cacheable_backbone(recipe, model)
    if not prefix:
        return plain
    few = data.train.rows.gather(torch.arange(min(8, len(data.train)))).to(plan.device)
    sample = normalize(few, plan)
    if is_sequential_split(model, prefix, sample):
        return _cache_features(recipe, data, model, images, prefix, sample) or plain
    if options.views:
        raise UsageError(
            f"train.views={options.views} keeps the activations of frozen layers, but here "
            f"later layers read more than the output of {prefix[-1]}",
            fix="leave out train.views, or freeze up to another layer with model.trainable",
        )
    return plain


def cacheable_backbone(recipe: Recipe, model: nn.Module) -> list[str]:
    """Modules of the trunk that may be computed once; none where it learns or images change."""
    fixed = bool(recipe.train.views) or not recipe.operations
    return stages.frozen_prefix(model) if fixed and recipe.train.cache_trunk else []


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


def _cache_features(
    recipe: Recipe, data: Data, model: nn.Module, images: Batches, prefix: list[str], sample: Tensor
) -> TrainInputs | None:
    """Everything computed once; None where it does not fit into memory."""
    plan, views = images.plan, recipe.train.views or 1
    each = feature_bytes(model, prefix, sample, plan)
    size = each * len(data.train) * views + 2 * each * len(data.val)
    budget = images.world.all_reduce_min(memory_budget(plan.device))
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
    with progress_bar("frozen layers", total) as bar:
        parts = []
        for view in range(views):
            read = _normalized_images(data.train, images, view if recipe.train.views else None)
            found = compute_features(model, prefix, read, data.train.labels, plan, bar.advance)
            parts.append(_feature_batches(recipe, found, images))
        read = _normalized_images(data.val, images, None)
        val = compute_features(model, prefix, read, data.val.labels, exact, bar.advance)
    rest = trainable_head(model, prefix)

    def validate(advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        return _split_logits(images.world, rest, val, identity, plan, advance)

    batches = ViewBatches(parts) if len(parts) > 1 else parts[0]
    return TrainInputs(rest, batches, validate, size)


def _split_logits(
    world: ProcessGroup,
    model: nn.Module,
    split: Labelled,
    prepare: Prepare,
    plan: Plan,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Logits and labels of a split, of which each process computes its part."""

    def ask(part: Labelled) -> tuple[Tensor]:
        return (split_logits(model, part, prepare, plan, advance=advance)[0],)

    (logits,) = distributed_map(world, split, ask)
    assert logits is not None
    return logits, split.labels.to(plan.device)


def _feature_batches(recipe: Recipe, features: Features, like: Batches) -> Batches:
    return Batches(
        features,
        batch_size=recipe.train.batch_size,
        normalize=identity,
        plan=like.plan,
        seed=recipe.train.seed,
        world=like.world,
    )


def _normalized_images(split: Split, like: Batches, view: int | None) -> Iterator[Tensor]:
    """All images of a split in order, normalised; with `view`, that draw of the augmentation."""
    generator = torch.Generator(like.plan.device)
    for chunk, index in enumerate(torch.arange(len(split)).split(CHUNK_IMAGES)):
        images = split.rows.gather(index).to(like.plan.device)
        if view is not None and like.augment is not None:
            generator.manual_seed(derive_seed(like.seed, view, chunk, VIEW_SEED))
            run_dir = SampleInfo(index.to(like.plan.device), view + 1, like.seed)
            labels = split.labels[index].to(like.plan.device)
            images, _ = like.augment(to_unit(images), labels, run_dir, generator)
        yield like.normalize(images, like.plan)

"""Training jobs are built from recipes: resolved settings, networks, preprocessing, checks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convlens.data.dataset import Data, load_data
from convlens.data.transforms.pipeline import build_pipeline
from convlens.data.transforms.random import SampleInfo
from convlens.distributed import SINGLE_PROCESS, ProcessGroup
from convlens.engine.losses import ClassificationLoss
from convlens.errors import DataError, UsageError
from convlens.models.stages import set_train_mode
from convlens.recipe import Recipe, load_recipe, resolve_auto
from convlens.run import Preprocessing
from convlens.runtime import RuntimeContext
from convlens.training import transfer
from convlens.training.setup import (
    InitialState,
    _check_batch_size,
    _sample_images,
    build_criterion,
    build_network,
    build_training_job,
    load_for_training,
)
from helpers.commands import pictures as class_folders
from helpers.support import Memory, Split, begin, images_of, pictures, same, tiny


def initial_weights(*overrides: str) -> dict[str, Tensor]:
    """Return the weights that a run of the tiny recipe starts with."""
    recipe = tiny(*overrides)
    data = images_of(recipe)
    resolved = resolve_auto(
        recipe, images=len(data.train), image_size=data.image_size, channels=data.channels
    )
    return dict(build_network(resolved, data, None)[0].state_dict())


# Recipes


def unequal(*overrides: str) -> tuple[Recipe, Data]:
    """Return a recipe and 80 digits; six labels of `8` were changed to 0, 1, ..., 5."""
    recipe = tiny(*overrides)
    data = images_of(tiny())
    labels = data.train.labels.clone()
    rare = (labels == 8).nonzero().flatten()[:6]
    labels[rare] = torch.arange(6)
    return recipe, replace(data, train=replace(data.train, labels=labels))


def test_what_is_drawn_of_an_augmentation_is_what_is_trained(tmp_path: Path) -> None:
    """A fine-tuning chooses the size of the images, and trains on smaller crops."""
    root = class_folders(tmp_path / "photos", {"red": 6, "green": 6}, size=70)
    start = [f"data.name={root}", "model.name=resnet18", "model.stem=imagenet"]
    recipe, data = load_for_training(load_recipe("folder", [*start, "model.weights=default"]))
    assert data.image_size == transfer.SMALL_FINE_TUNING_SIZE
    crop = 96  # 160 / 224 of 128, as a multiple of 16
    assert dict(recipe.operations)["RandomResizedCrop"]["size"] == crop
    augment = build_pipeline(recipe.operations, image_size=data.image_size, channels=3, classes=2)
    after, _ = augment(
        torch.zeros(2, 3, data.image_size, data.image_size),
        torch.zeros(2, dtype=torch.int64),
        SampleInfo(torch.arange(2), epoch=1, seed=0),
        torch.Generator().manual_seed(0),
    )
    assert after.shape == (2, 3, crop, crop)

    recipe, data = load_for_training(load_recipe("folder", [*start, "model.weights=none"]))
    assert "size" not in dict(recipe.operations)["RandomResizedCrop"]


def test_automatic_class_weights_by_hand() -> None:
    recipe, data = unequal("optim.class_weights=auto")
    counts = [9, 9, 9, 9, 9, 9, 8, 8, 2, 8]
    assert torch.bincount(data.train.labels).tolist() == counts
    loss = build_criterion(recipe, data)
    assert loss.weights.tolist() == pytest.approx([80 / (10 * n) for n in counts])
    # n / (K n_c) of the images that an epoch draws.
    roots = [math.sqrt(n) for n in counts]
    loss = build_criterion(recipe.replace(**{"data.balance": "sqrt"}), data)
    assert loss.weights.tolist() == pytest.approx([sum(roots) / (10 * root) for root in roots])
    loss = build_criterion(recipe.replace(**{"data.balance": "full"}), data)
    assert loss.weights.tolist() == pytest.approx([1.0] * 10)


def test_named_class_weights_have_a_mean_of_one_over_the_training_images() -> None:
    recipe, data = unequal("optim.class_weights={8: 4, '0': 0.5}")
    loss = build_criterion(recipe, data)
    mean = (9 * 0.5 + 2 * 4 + 69) / 80
    assert loss.weights.tolist() == pytest.approx([0.5 / mean, *[1 / mean] * 7, 4 / mean, 1 / mean])


def test_the_validation_and_test_images_do_not_change_the_class_weights() -> None:
    recipe, data = unequal("optim.class_weights=auto")
    expected = build_criterion(recipe, data).weights
    val = replace(data.val, labels=torch.zeros_like(data.val.labels))
    sealed = replace(data, val=val, _test=lambda: pytest.fail("the test split was opened"))
    assert torch.equal(build_criterion(recipe, sealed).weights, expected)


def test_unknown_classes_of_weights_are_refused_with_close_matches() -> None:
    recipe, data = unequal("optim.class_weights={glas: 2}")
    named = replace(data, classes=("glass", *map(str, range(9))))
    with pytest.raises(UsageError, match="classes that 'digits' does not have: glas") as caught:
        build_criterion(recipe, named)
    assert caught.value.fix == "did you mean glass?"
    with pytest.raises(UsageError) as caught:
        build_criterion(recipe, data)
    assert caught.value.fix.startswith("its classes are: 0, 1, 2")


def test_recipes_without_the_options_keep_the_loss_of_torch() -> None:
    loss = build_criterion(*unequal("optim.label_smoothing=0.1"))
    assert type(loss) is torch.nn.CrossEntropyLoss
    assert loss.label_smoothing == 0.1
    focal = build_criterion(*unequal("optim.loss=focal", "optim.focal_gamma=1.5"))
    assert isinstance(focal, ClassificationLoss)
    assert (focal.gamma, focal.weights) == (1.5, None)


def test_auto_values_are_resolved() -> None:
    recipe = load_recipe("folder", ["data.name=digits", "data.per_class=5"])
    job = build_training_job(recipe, images_of(recipe), RuntimeContext("cpu", quiet=True))
    assert "auto" not in (job.recipe.augment, job.recipe.train.epochs)
    assert (job.recipe.data.image_size, job.recipe.data.channels) == (8, 1)
    assert job.recipe.train.epochs == job.epochs == 60


def test_a_single_training_image_is_refused() -> None:
    recipe = tiny()
    data = images_of(recipe)
    train = replace(data.train, labels=data.train.labels[:1])
    with pytest.raises(DataError, match="1 training image: at least 2 are needed"):
        build_training_job(recipe, replace(data, train=train), RuntimeContext("cpu", quiet=True))


def test_a_batch_too_small_for_the_processes_is_refused() -> None:
    _check_batch_size(tiny("train.batch_size=8"), ProcessGroup(0, 4))
    _check_batch_size(tiny("train.batch_size=1"), SINGLE_PROCESS)
    with pytest.raises(UsageError, match="leaves fewer than two images for each") as caught:
        _check_batch_size(tiny("train.batch_size=7"), ProcessGroup(0, 4))
    assert "train.batch_size=8 or more" in caught.value.fix


# Networks


def test_the_network_depends_on_the_seed_only() -> None:
    first = initial_weights("train.seed=3")
    torch.manual_seed(99)  # the state of the global generator does not matter
    same(first, initial_weights("train.seed=3"))
    same(first, initial_weights("train.seed=3", "data.per_class=6", "optim.lr=0.5"))
    another = initial_weights("train.seed=4")
    assert not torch.equal(first["stage1.0.weight"], another["stage1.0.weight"])


def test_a_network_with_an_initial_state_needs_no_source() -> None:
    recipe = tiny("model.weights=missing.pth")
    weights = initial_weights("train.seed=5")
    record = {"mean": [0.25], "std": [0.5]}
    model, preprocessing, returned = build_network(
        recipe, images_of(recipe), InitialState(weights, record)
    )
    same(dict(model.state_dict()), weights)
    assert returned is record
    assert (preprocessing.mean, preprocessing.std) == ([0.25], [0.5])


def test_layers_are_frozen_as_the_recipe_says() -> None:
    job, _ = begin(tiny("model.trainable=head"), "frozen")
    trainable = {name for name, p in job.model.named_parameters() if p.requires_grad}
    assert trainable == {"classifier.weight", "classifier.bias"}


# Preprocessing


def test_normalization_is_measured_on_the_training_images_only() -> None:
    data = images_of(tiny())
    job, _ = begin(tiny(), "x")
    pixels = data.train.rows.gather(torch.arange(80)).numpy().astype(np.float64) / 255
    assert job.preprocessing.mean == pytest.approx([pixels.mean()])
    assert job.preprocessing.std == pytest.approx([pixels.std()])


class Recorded(Memory):
    """Images of one value, of which only the shape is stored; `indices` are those last read."""

    def __init__(self, count: int, channels: int, size: int) -> None:
        super().__init__(torch.zeros(1, channels, size, size, dtype=torch.uint8))
        self.shape = (count, channels, size, size)
        self.indices = torch.empty(0)

    def gather(self, index: Tensor) -> Tensor:
        self.indices = index
        return self.images.expand(len(index), -1, -1, -1)


def sample(count: int, channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the sampled images and their indices."""
    rows = Recorded(count, channels, size)
    preprocessing = Preprocessing(size, channels, "stretch", [0.5] * channels, [0.25] * channels)
    return _sample_images(Split(rows, torch.zeros(count)), preprocessing), rows.indices


@pytest.mark.parametrize(
    ("count", "channels", "size", "expected"),
    [
        (1, 1, 8, 1),
        (100, 3, 8, 100),
        (5_001, 1, 8, 5_000),
        (60_000, 1, 28, 5_000),
        (900, 3, 256, 85),
    ],
)
def test_sampled_images_are_evenly_spaced_and_limited_in_number_and_size(
    count: int, channels: int, size: int, expected: int
) -> None:
    images, indices = sample(count, channels, size)
    assert images.shape == (expected, channels, size, size)
    assert images.dtype == torch.float32
    assert images.numel() * images.element_size() <= 64 * 2**20
    assert indices[0] == 0
    assert indices[-1] == count - 1
    if expected > 1:
        distances = indices.diff()
        assert distances.min() >= 1
        assert distances.max() - distances.min() <= 1


def test_an_image_larger_than_the_limit_is_sampled_alone() -> None:
    images, indices = sample(7, 3, 2_400)
    assert math.prod(images.shape[1:]) > 1 << 24
    assert indices.tolist() == [0]


def test_sampled_images_are_normalized() -> None:
    images = pictures(10)
    preprocessing = Preprocessing(8, 1, "stretch", [0.5], [0.25])
    sampled = _sample_images(Split(Memory(images), torch.zeros(10)), preprocessing)
    torch.testing.assert_close(sampled, (images / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("weights", ["auto", "lite0"])
def test_photographs_start_with_the_weights_of_the_package(weights: str) -> None:
    """The package is part of the test environment; its head is replaced by zeros."""
    class_folders(Path("photos"), {"red": 4, "green": 4}, size=64)
    requested = load_recipe("folder", ["data.name=photos", f"model.weights={weights}"])
    data = load_data(
        requested.data,
        memory_budget=1 << 30,
        choose_size=partial(
            transfer.choose_image_size, requested, transfer.backbones_for(requested)
        ),
    )
    assert data.image_size == transfer.SMALL_FINE_TUNING_SIZE
    job = build_training_job(requested, data, RuntimeContext("cpu", quiet=True))
    model = job.recipe.model
    assert model.name == "tf_efficientnet_lite0"
    assert model.trainable == "blocks.2+"
    assert job.initial_weights is not None
    assert job.initial_weights["licence"].startswith("Apache-2.0")
    assert job.preprocessing.mean == [127 / 255] * 3
    head = job.model.get_submodule("classifier")
    assert head.weight.shape == (2, 1280)
    assert not head.weight.any()
    assert not head.bias.any()
    set_train_mode(job.model)
    norms = [m for m in job.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert job.recipe.train.epochs == 20
    assert ("RandomResizedCrop", 96) in [(n, a.get("size")) for n, a in job.recipe.operations]
    images, _ = next(job.inputs.batches.epoch(1))
    assert images.shape[1:] == (3, 96, 96)
    assert (job.start_reason == "") == (weights == "lite0")

"""Test-time augmentation: views and their mean, by hand and against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from convlens.data.loader import Normalize
from convlens.device import Plan
from convlens.engine import inference
from convlens.engine.inference import (
    VIEWS,
    average_views,
    batch_logits,
    batch_outputs,
    flip_shift_views,
    flip_views,
    select_views,
    split_logits,
    split_outputs,
    translation_pixels,
)
from helpers.support import PLAN, Memory, Split, Streamed, pictures

NORMALIZE = Normalize([0.4], [0.25])
each_name = pytest.mark.parametrize("name", list(VIEWS))


# Views


def test_flip_views_by_hand() -> None:
    image = torch.tensor([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    (first_weight, first), (second_weight, mirrored) = flip_views(image)
    assert (first_weight, second_weight) == (0.5, 0.5)
    assert torch.equal(first, image)
    assert mirrored[0, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]


def test_flip_shift_views_by_hand() -> None:
    image = torch.tensor([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    found = list(flip_shift_views(image))
    assert [weight for weight, _ in found] == [0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    views = [view[0, 0].tolist() for _, view in found]
    assert views[0] == image[0, 0].tolist()
    # One pixel up-left: the last row and column are reflections about the pixels of the edge.
    assert views[2] == [[5, 6, 5], [8, 9, 8], [5, 6, 5]]
    assert views[4] == [[5, 4, 5], [2, 1, 2], [5, 4, 5]]
    for view, mirrored in zip(views[::2], views[1::2], strict=True):
        assert mirrored == [row[::-1] for row in view]


def reflected(position: int, size: int) -> int:
    """Reflect a position outside of 0 .. size - 1 about the edge pixel, which is not repeated."""
    position = abs(position)
    return 2 * (size - 1) - position if position >= size else position


def slow_views(images: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """`flip_shift_views`, pixel by pixel."""
    size = images.shape[-1]
    shift = max(1, math.floor(size / 32 + 0.5))
    views = []
    for weight, offset in ((0.25, 0), (0.125, shift), (0.125, -shift)):
        translated = np.empty_like(images)
        for y in range(size):
            for x in range(size):
                source = reflected(y + offset, size), reflected(x + offset, size)
                translated[..., y, x] = images[..., source[0], source[1]]
        views += [(weight, translated), (weight, translated[..., ::-1])]
    return views


@pytest.mark.parametrize("size", [8, 16, 32, 48, 70])
def test_views_equal_a_slow_reference(size: int) -> None:
    images = np.random.default_rng(size).normal(size=(2, 3, size, size)).astype(np.float32)
    found = list(flip_shift_views(torch.from_numpy(images)))
    for (weight, view), (expected_weight, expected) in zip(found, slow_views(images), strict=True):
        assert weight == expected_weight
        np.testing.assert_array_equal(view.numpy(), expected)


def test_the_translation_grows_with_the_image() -> None:
    sizes = [8, 28, 32, 47, 48, 64, 79, 80, 96, 224, 1024]
    assert [translation_pixels(size) for size in sizes] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 7, 32]


@each_name
def test_weights_add_up_to_one_and_the_first_view_is_the_image(name: str) -> None:
    images = torch.randn(2, 3, 9, 9)
    views = list(VIEWS[name](images))
    assert sum(weight for weight, _ in views) == 1
    assert views[0][1] is images
    assert {view.shape for _, view in views} == {images.shape}


# The mean over views


def test_the_mean_of_a_linear_model_by_hand() -> None:
    """The logits are the pixels (0, 0) and (0, 2) of a view."""
    image = torch.tensor([[[[1.0, 2, 4], [0, 8, 16], [0, 0, 32]]]])

    def corners(view: torch.Tensor) -> torch.Tensor:
        return view[:, 0, 0, ::2]

    logits, mean = average_views(corners, image, VIEWS["flip"])
    assert logits.tolist() == [[1, 4]]
    assert mean.tolist() == [[2.5, 2.5]]
    # The first rows of the translated views: 8 16 8 (up-left) and 8 0 8 (down-right).
    logits, mean = average_views(corners, image, VIEWS["flip+shifts"])
    assert logits.tolist() == [[1, 4]]
    expected = 0.25 * 1 + 0.25 * 4 + 4 * 0.125 * 8
    assert mean.tolist() == [[expected, expected]]


def test_the_mean_of_logits_is_the_geometric_mean_of_probabilities() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images = torch.randn(4, 1, 8, 8)
    _, mean = average_views(model, images, flip_views)
    one, two = model(images).softmax(1), model(images.flip(-1)).softmax(1)
    geometric = (one * two).sqrt()
    expected = geometric / geometric.sum(1, keepdim=True)
    assert torch.allclose(mean.softmax(1), expected, atol=1e-6)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


@each_name
def test_outputs_of_a_network_in_training_mode_are_those_in_eval_mode(name: str) -> None:
    model, images = network().train(), pictures(5)
    outputs = batch_outputs(model, images, NORMALIZE, PLAN, VIEWS[name])
    assert torch.equal(outputs.logits, batch_logits(model, images, NORMALIZE, PLAN))
    assert model.training
    assert outputs.tta_logits is not None
    with torch.no_grad():
        inputs = NORMALIZE(images, PLAN)
        model.eval()
        expected = sum(weight * model(view) for weight, view in VIEWS[name](inputs))
    assert torch.allclose(outputs.tta_logits, expected, atol=1e-6)


@each_name
@pytest.mark.parametrize("rows", [Memory, Streamed])
def test_the_mean_does_not_depend_on_the_batch_size(
    name: str, rows: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split(rows(pictures(50)), torch.arange(50) % 3)
    model = network()
    counts: list[int] = []
    monkeypatch.setattr(inference, "MAX_BATCH", 16)
    found, labels = split_outputs(model, split, NORMALIZE, PLAN, VIEWS[name], advance=counts.append)
    logits, _ = split_logits(model, split, NORMALIZE, PLAN)
    assert torch.equal(found.logits, logits)
    assert torch.equal(labels, split.labels)
    assert counts == [16, 16, 16, 2]
    assert found.tta_logits is not None
    for size in (7, 50):
        monkeypatch.setattr(inference, "MAX_BATCH", size)
        again, _ = split_outputs(model, split, NORMALIZE, PLAN, VIEWS[name])
        assert again.tta_logits is not None
        assert torch.allclose(again.tta_logits, found.tta_logits, atol=1e-5)


def test_each_view_costs_one_pass_and_the_image_none_besides() -> None:
    passes: list[int] = []
    model = nn.Flatten()
    model.register_forward_hook(lambda module, inputs, out: passes.append(len(out)))
    for name, count in ((None, 1), ("flip", 2), ("flip+shifts", 6)):
        passes.clear()
        batch_outputs(model, pictures(3), NORMALIZE, PLAN, select_views(name))
        assert passes == [3] * count


@pytest.mark.gpu
@each_name
def test_views_on_a_gpu_equal_those_on_a_cpu(name: str) -> None:
    images = pictures(5)
    cpu = batch_outputs(network(), images, NORMALIZE, PLAN, VIEWS[name])
    plan = Plan("cuda", "fp32", "contiguous")
    gpu = batch_outputs(network().cuda(), images, NORMALIZE, plan, VIEWS[name])
    assert cpu.tta_logits is not None
    assert gpu.tta_logits is not None
    assert torch.allclose(gpu.tta_logits.cpu(), cpu.tta_logits, atol=1e-3)

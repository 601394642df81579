"""The views of test-time augmentation and their mean, by hand and against slow references."""

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
    shift_images,
    split_logits,
    split_outputs,
)
from convlens.errors import UsageError
from convlens.metrics import paired_counts
from helpers.support import PLAN, Memory, Split, Streamed, pictures

NORMALISE = Normalize([0.4], [0.25])
every = pytest.mark.parametrize("name", list(VIEWS))


# The views


def test_the_mirror_image_by_hand() -> None:
    image = torch.tensor([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    (half, plain), (other, mirrored) = flip_views(image)
    assert (half, other) == (0.5, 0.5)
    assert torch.equal(plain, image)
    assert mirrored[0, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]


def test_translations_by_hand() -> None:
    image = torch.tensor([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    found = list(flip_shift_views(image))
    assert [weight for weight, _ in found] == [0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    views = [view[0, 0].tolist() for _, view in found]
    assert views[0] == image[0, 0].tolist()
    # One pixel up-left: the last row and column are reflected about the edge's own pixels.
    assert views[2] == [[5, 6, 5], [8, 9, 8], [5, 6, 5]]
    assert views[4] == [[5, 4, 5], [2, 1, 2], [5, 4, 5]]
    for straight, mirrored in zip(views[::2], views[1::2], strict=True):
        assert mirrored == [row[::-1] for row in straight]


def reflected(position: int, size: int) -> int:
    """The pixel that stands for `position` outside of 0 .. size - 1; edges are not repeated."""
    position = abs(position)
    return 2 * (size - 1) - position if position >= size else position


def slow_views(images: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Pixel by pixel."""
    size = images.shape[-1]
    by = max(1, math.floor(size / 32 + 0.5))
    views = []
    for weight, offset in ((0.25, 0), (0.125, by), (0.125, -by)):
        moved = np.empty_like(images)
        for y in range(size):
            for x in range(size):
                source = reflected(y + offset, size), reflected(x + offset, size)
                moved[..., y, x] = images[..., source[0], source[1]]
        views += [(weight, moved), (weight, moved[..., ::-1])]
    return views


@pytest.mark.parametrize("size", [8, 16, 32, 48, 70])
def test_views_equal_a_slow_reference(size: int) -> None:
    images = np.random.default_rng(size).normal(size=(2, 3, size, size)).astype(np.float32)
    found = list(flip_shift_views(torch.from_numpy(images)))
    for (weight, view), (its, slow) in zip(found, slow_views(images), strict=True):
        assert weight == its
        np.testing.assert_array_equal(view.numpy(), slow)


def test_the_shift_grows_with_the_image() -> None:
    sizes = [8, 28, 32, 47, 48, 64, 79, 80, 96, 224, 1024]
    assert [shift_images(size) for size in sizes] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 7, 32]


@every
def test_weights_add_up_and_the_first_view_is_the_image(name: str) -> None:
    images = torch.randn(2, 3, 9, 9)
    views = list(VIEWS[name](images))
    assert sum(weight for weight, _ in views) == 1
    assert views[0][1] is images
    assert {view.shape for _, view in views} == {images.shape}


# Their mean


def test_a_linear_model_by_hand() -> None:
    """Logits are the corners (0, 0) and (0, 2), so each view's can be read off the image."""
    image = torch.tensor([[[[1.0, 2, 4], [0, 8, 16], [0, 0, 32]]]])

    def corners(view: torch.Tensor) -> torch.Tensor:
        return view[:, 0, 0, ::2]

    plain, mean = average_views(corners, image, VIEWS["flip"])
    assert plain.tolist() == [[1, 4]]
    assert mean.tolist() == [[2.5, 2.5]]
    # The first rows of the translated views: 8 16 8 (up-left) and 8 0 8 (down-right).
    plain, mean = average_views(corners, image, VIEWS["flip+shifts"])
    assert plain.tolist() == [[1, 4]]
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


@every
def test_a_normalised_batch_of_a_network_in_training_mode(name: str) -> None:
    model, images = network().train(), pictures(5)
    answers = batch_outputs(model, images, NORMALISE, PLAN, VIEWS[name])
    assert torch.equal(answers.plain, batch_logits(model, images, NORMALISE, PLAN))
    assert model.training
    assert answers.tta is not None
    with torch.no_grad():
        ready = NORMALISE(images, PLAN)
        model.eval()
        expected = sum(weight * model(view) for weight, view in VIEWS[name](ready))
    assert torch.allclose(answers.tta, expected, atol=1e-6)


@every
@pytest.mark.parametrize("rows", [Memory, Streamed])
def test_one_loop_serves_both_whatever_the_batch(
    name: str, rows: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split(rows(pictures(50)), torch.arange(50) % 3)
    model = network()
    told: list[int] = []
    monkeypatch.setattr(inference, "MAX_BATCH", 16)
    found, labels = split_outputs(model, split, NORMALISE, PLAN, VIEWS[name], advance=told.append)
    plain, _ = split_logits(model, split, NORMALISE, PLAN)
    assert torch.equal(found.plain, plain)
    assert torch.equal(labels, split.labels)
    assert told == [16, 16, 16, 2]
    assert found.tta is not None
    for size in (7, 50):
        monkeypatch.setattr(inference, "MAX_BATCH", size)
        other, _ = split_outputs(model, split, NORMALISE, PLAN, VIEWS[name])
        assert other.tta is not None
        assert torch.allclose(other.tta, found.tta, atol=1e-5)


def test_no_view_costs_a_pass_of_its_own() -> None:
    passes: list[int] = []
    model = nn.Flatten()
    model.register_forward_hook(lambda module, given, out: passes.append(len(out)))
    for name, count in ((None, 1), ("flip", 2), ("flip+shifts", 6)):
        passes.clear()
        batch_outputs(model, pictures(3), NORMALISE, PLAN, select_views(name))
        assert passes == [3] * count


@pytest.mark.gpu
@every
def test_views_on_a_gpu_are_those_on_a_cpu(name: str) -> None:
    images = pictures(5)
    cpu = batch_outputs(network(), images, NORMALISE, PLAN, VIEWS[name])
    plan = Plan("cuda", "fp32", "contiguous")
    there = batch_outputs(network().cuda(), images, NORMALISE, plan, VIEWS[name])
    assert cpu.tta is not None
    assert there.tta is not None
    assert torch.allclose(there.tta.cpu(), cpu.tta, atol=1e-3)


def test_the_paired_test_by_hand() -> None:
    truth = [0, 0, 0, 0, 1, 1, 1, 1]
    before = [0, 1, 1, 1, 1, 1, 0, 2]
    after = [0, 0, 0, 0, 0, 1, 2, 1]
    # Four gained, one lost; 0 -> 2 is wrong both times. P(at most 1 of 5) twice: 2 * 6 / 32.
    assert paired_counts(truth, before, after) == (4, 1, pytest.approx(12 / 32))
    assert paired_counts(truth, after, before) == (1, 4, pytest.approx(12 / 32))
    assert paired_counts(truth, before, before) == (0, 0, 1.0)
    with pytest.raises(UsageError, match="don't belong together"):
        paired_counts(truth, before, after[:-1])

"""Each measure on activations for which its value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import NearestCentroid
from torch import Tensor
from torch.nn import functional as F

from convlens.interpret.stage_metrics import (
    MAX_FEATURES,
    MEASURES,
    PICTURE_SIDE,
    MetricValue,
    StageBatch,
)

CLASSES = 3


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def value_of(
    name: str,
    maps: Tensor,
    images: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    learned: int = 0,
    size: int = 1000,
) -> MetricValue:
    """The value on `maps`, after fitting to the first `learned` of them if it requires that."""
    images = pictures(len(maps)) if images is None else images
    targets = labels(len(maps)) if targets is None else targets
    measure = MEASURES[name](CLASSES)
    parts = zip(maps.split(size), images.split(size), targets.split(size), strict=True)
    batches = [StageBatch(*part) for part in parts]
    seen = 0
    for batch in batches:
        if seen < learned and measure.requires_fit:
            measure.fit(batch)
        else:
            measure.update(batch)
        seen += len(batch.maps)
    return measure.compute()


# The contract of every measure

every = pytest.mark.parametrize("name", list(MEASURES))
SHAPES = {"maps": (4, 6, 6), "vector": (12, 1, 1), "tokens": (5, 1, 17), "odd": (3, 7, 5)}


@every
def test_measure_has_a_title_definition_and_scale(name: str) -> None:
    measure = MEASURES[name]
    assert measure.title
    assert "interval" in measure.definition
    assert measure.scale in ("percent", "number", "log")


@every
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_of_any_stage_does_not_depend_on_the_batches(
    name: str, shape: tuple[int, ...]
) -> None:
    maps = draws(120, *shape).relu() + 0.1 * labels(120)[:, None, None, None]
    whole = value_of(name, maps, learned=60, size=60)
    if name == "fineness" and min(shape[1:]) < 3:
        assert whole.value is None
        return
    assert whole.value is not None
    assert math.isfinite(whole.value)
    if whole.interval95 is not None:
        low, high = whole.interval95
        assert low <= whole.value <= high
    pieces = value_of(name, maps, learned=60, size=6)
    assert pieces.value == pytest.approx(whole.value, abs=1e-6)
    if whole.interval95 is not None:
        assert pieces.interval95 == pytest.approx(whole.interval95, abs=1e-6)


@every
def test_thousands_of_channels_are_reduced_to_a_bounded_size(name: str) -> None:
    value = value_of(name, draws(40, 4096, 3, 3).relu(), learned=20, size=20)
    assert value.value is not None
    if name == "picture":
        assert value.details["features"] == MAX_FEATURES


@every
def test_constant_stages_and_single_images_have_no_misleading_values(name: str) -> None:
    expected = {
        "dead": 1.0,
        "sparsity": 0.0,
        "blank": 0.0,
        "rank": 1.0,
        "fineness": None,
        "picture": 0.0,
        "probe": 1 / 3,
        "separability": 1 / 3,
    }
    flat = torch.full((90, 4, 4, 4), 0.3)
    # The mean images of the training and evaluation images differ slightly.
    assert value_of(name, flat, learned=45, size=45).value == pytest.approx(
        expected[name], abs=0.05
    )
    learned = 45 if MEASURES[name].requires_fit else 0
    one = value_of(name, draws(learned + 1, 4, 4, 4), learned=learned, size=45)
    assert (one.interval95 is not None) == (name in ("probe", "separability"))


def test_single_class_has_no_accuracy() -> None:
    same = torch.zeros(40, dtype=torch.int64)
    for name in ("probe", "separability"):
        assert value_of(name, draws(40, 4, 4, 4), targets=same, learned=20, size=20).value is None
    assert (
        value_of("picture", draws(40, 4, 4, 4), targets=same, learned=20, size=20).value is not None
    )


# Values


def test_dead_and_nearly_dead_channels_are_counted() -> None:
    maps = draws(200, 6, 4, 4).abs()
    maps[:, 0] = 0  # never above 0
    maps[:, 1] = torch.arange(16.0).reshape(4, 4)  # the same map for every image
    maps[:, 2] = 0
    maps[7, 2, 1, 3] = 5  # one image of 200: 0.5%
    maps[:, 3] = 0
    maps[:3, 3, 0, 0] = 5  # three of 200: alive
    value = value_of("dead", maps, size=30)
    assert value.value == 3 / 6
    assert value.details == {"dead": 2, "nearly_dead": 1, "channels": 6, "rectified": True}


def test_channels_with_negative_values_are_dead_by_their_deviation() -> None:
    maps = F.gelu(draws(200, 5, 4, 4))
    maps[:, 0] = F.gelu(draws(200, 4, 4) - 12)  # never active: tiny and not quite constant
    maps[:, 1] *= 0.005
    maps[:, 2] = -0.1
    value = value_of("dead", maps)
    assert value.details == {"dead": 2, "nearly_dead": 1, "channels": 5, "rectified": False}


def test_sparsity_is_the_share_of_activations_at_or_below_zero() -> None:
    maps = torch.ones(50, 2, 2, 2)
    maps[:, 0] = 0
    maps[:25, 1, 0, 0] = -1
    value = value_of("sparsity", maps)
    assert value.value == pytest.approx((0.625 + 0.5) / 2)
    half = 1.96 * 0.0625 * math.sqrt(50 / 49) / math.sqrt(50)
    assert value.interval95 == pytest.approx((0.5625 - half, 0.5625 + half))


def test_blank_is_the_share_of_channels_without_positive_values_on_an_image() -> None:
    maps = torch.zeros(20, 4, 3, 3)
    maps[:, 0, 1, 1] = 1
    maps[::2, 1, 2, 2] = 1
    maps[:, 2] = -1
    assert value_of("blank", maps).value == pytest.approx((0.75 + 0.5) / 2)


def test_effective_rank_is_that_of_the_channel_means() -> None:
    directions = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, -1]])
    signs = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).repeat(25, 1)
    maps = (signs @ directions)[:, :, None, None] + F.layer_norm(draws(100, 4, 5, 5), (5, 5))
    value = value_of("rank", maps)
    assert value.value == pytest.approx(2, abs=1e-4)
    assert value.details == {"channels": 4}


def test_probe_is_a_ridge_classifier_with_an_interval() -> None:
    targets = labels(400)
    means = draws(CLASSES, 6, seed=5)
    maps = (means[targets] + draws(400, 6))[:, :, None, None]
    value = value_of("probe", maps, targets=targets, learned=300, size=100)
    x, y = maps[:, :, 0, 0].double().numpy(), targets.numpy()
    probe = MEASURES["probe"](CLASSES)
    probe.fit(StageBatch(maps[:300], pictures(300), targets[:300]))
    penalty = probe.linear.penalty * ((x[:300] - x[:300].mean(0)) ** 2).sum() / 6  # type: ignore[attr-defined]
    theirs = RidgeClassifier(alpha=penalty).fit(x[:300], y[:300])
    correct = int((theirs.predict(x[300:]) == y[300:]).sum())
    assert value.details == {"n": 100, "correct": correct}
    assert 0.4 < correct / 100 < 0.95
    assert value.interval95 is not None
    assert value.interval95[0] < correct / 100 < value.interval95[1]


def test_probe_sees_positions_on_a_grid_of_two_by_two() -> None:
    maps = torch.zeros(90, 1, 4, 4)
    targets = labels(90)
    for number, (row, column) in enumerate([(0, 0), (0, 3), (3, 0)]):
        maps[targets == number, 0, row, column] = 1
    assert value_of("probe", maps, targets=targets, learned=45, size=45).value == 1


def test_separability_is_the_nearest_centroid_classifier() -> None:
    targets = labels(400)
    maps = (draws(CLASSES, 6, seed=5)[targets] + draws(400, 6))[:, :, None, None]
    value = value_of("separability", maps, targets=targets, learned=300, size=100)
    x, y = maps[:, :, 0, 0].numpy(), targets.numpy()
    theirs = NearestCentroid().fit(x[:300], y[:300])
    assert value.value == pytest.approx(theirs.score(x[300:], y[300:]))


def test_class_without_training_images_is_never_predicted() -> None:
    targets = torch.cat([torch.arange(40) % 2, torch.full((10,), 2)])
    maps = draws(50, 4, 1, 1)
    assert value_of("separability", maps, targets=targets, learned=40, size=10).value == 0


@pytest.mark.parametrize("side", [2, 4, 16])
def test_rotated_image_is_reconstructed_completely(side: int) -> None:
    images = pictures(600, PICTURE_SIDE)
    patches = F.unfold(images.double() / 255, PICTURE_SIDE // side, stride=PICTURE_SIDE // side)
    turn = torch.linalg.qr(draws(patches.shape[1], patches.shape[1], seed=1)).Q.double()
    maps = (turn @ patches).reshape(600, -1, side, side).float()
    value = value_of("picture", maps, images, learned=400, size=100)
    assert value.value == pytest.approx(1, abs=1e-4)


def test_one_of_three_channels_reconstructs_a_third_of_the_variance() -> None:
    images = pictures(400, PICTURE_SIDE)
    maps = images.float()[:, :1] / 255  # one of three channels with equal variance
    value = value_of("picture", maps, images, learned=200, size=100)
    assert value.value == pytest.approx(1 / 3, abs=0.01)
    assert value.interval95 is not None
    assert value.interval95[0] < 1 / 3 < value.interval95[1]


def test_noise_and_other_images_reconstruct_nothing() -> None:
    images = pictures(400, PICTURE_SIDE)
    for maps in (draws(400, 8, 4, 4), pictures(400, PICTURE_SIDE, seed=9).float()):
        value = value_of("picture", maps, images, learned=200, size=200)
        assert value.value == pytest.approx(0, abs=0.01)


def test_fineness_of_noise_ramps_and_checkerboards() -> None:
    value = value_of("fineness", draws(100, 4, 8, 8))
    assert value.value == pytest.approx(1, abs=0.03)
    ramp = torch.arange(8.0).expand(20, 2, 8, 8)
    # Differences 1 across and 0 down; the variance of 0..7, each 8 times, is 5.25 x 64/63.
    assert value_of("fineness", ramp).value == pytest.approx(0.5 / (2 * 5.25 * 64 / 63))
    check = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    value = value_of("fineness", check.float().expand(20, 2, 8, 8))
    assert value.value == pytest.approx(1 / (2 * 0.25 * 64 / 63))
    smooth = F.interpolate(draws(50, 4, 3, 3), (12, 12), mode="bilinear")
    assert value_of("fineness", smooth).value < 0.2  # type: ignore[operator]
    scaled = smooth * 100 + torch.from_numpy(np.arange(4.0, dtype=np.float32))[:, None, None]
    assert value_of("fineness", scaled).value == pytest.approx(value_of("fineness", smooth).value)

"""Each measurement on activations that were made so that the answer is known."""

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


def found(
    name: str,
    maps: Tensor,
    images: Tensor | None = None,
    truth: Tensor | None = None,
    *,
    learned: int = 0,
    size: int = 1000,
) -> MetricValue:
    """The measure on maps, after learning (if it does) from the first `learned` of them."""
    images = pictures(len(maps)) if images is None else images
    truth = labels(len(maps)) if truth is None else truth
    measure = MEASURES[name](CLASSES)
    parts = zip(maps.split(size), images.split(size), truth.split(size), strict=True)
    batches = [StageBatch(*part) for part in parts]
    seen = 0
    for batch in batches:
        if seen < learned and measure.learns:
            measure.learn(batch)
        else:
            measure.see(batch)
        seen += len(batch.maps)
    return measure.value()


# The contract, for every line of the table

every = pytest.mark.parametrize("name", list(MEASURES))
SHAPES = {"maps": (4, 6, 6), "vector": (12, 1, 1), "tokens": (5, 1, 17), "odd": (3, 7, 5)}


@every
def test_a_measure_says_what_it_is(name: str) -> None:
    measure = MEASURES[name]
    assert measure.title
    assert "interval" in measure.about
    assert measure.scale in ("percent", "number", "log")


@every
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_stage_has_a_value_that_does_not_depend_on_batches(
    name: str, shape: tuple[int, ...]
) -> None:
    maps = draws(120, *shape).relu() + 0.1 * labels(120)[:, None, None, None]
    whole = found(name, maps, learned=60, size=60)
    if name == "fineness" and min(shape[1:]) < 3:
        assert whole.value is None
        return
    assert whole.value is not None
    assert math.isfinite(whole.value)
    if whole.interval95 is not None:
        low, high = whole.interval95
        assert low <= whole.value <= high
    pieces = found(name, maps, learned=60, size=6)
    assert pieces.value == pytest.approx(whole.value, abs=1e-6)
    if whole.interval95 is not None:
        assert pieces.interval95 == pytest.approx(whole.interval95, abs=1e-6)


@every
def test_thousands_of_channels_are_measured_in_bounded_size(name: str) -> None:
    value = found(name, draws(40, 4096, 3, 3).relu(), learned=20, size=20)
    assert value.value is not None
    if name == "picture":
        assert value.details["features"] == MAX_FEATURES


@every
def test_constant_stages_and_single_images_have_no_false_numbers(name: str) -> None:
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
    # The picture's mean over training and other images differs a little, as it should.
    assert found(name, flat, learned=45, size=45).value == pytest.approx(expected[name], abs=0.05)
    learned = 45 if MEASURES[name].learns else 0
    one = found(name, draws(learned + 1, 4, 4, 4), learned=learned, size=45)
    assert (one.interval95 is not None) == (name in ("probe", "separability"))


def test_one_class_can_not_be_told_apart() -> None:
    same = torch.zeros(40, dtype=torch.int64)
    for name in ("probe", "separability"):
        assert found(name, draws(40, 4, 4, 4), truth=same, learned=20, size=20).value is None
    assert found("picture", draws(40, 4, 4, 4), truth=same, learned=20, size=20).value is not None


# Numbers


def test_dead_channels_by_construction() -> None:
    maps = draws(200, 6, 4, 4).abs()
    maps[:, 0] = 0  # never above 0
    maps[:, 1] = torch.arange(16.0).reshape(4, 4)  # one picture whatever the image
    maps[:, 2] = 0
    maps[7, 2, 1, 3] = 5  # one image of 200: 0.5%
    maps[:, 3] = 0
    maps[:3, 3, 0, 0] = 5  # three of 200: alive
    value = found("dead", maps, size=30)
    assert value.value == 3 / 6
    assert value.details == {"dead": 2, "nearly_dead": 1, "channels": 6, "rectified": True}


def test_channels_below_zero_are_judged_by_their_deviation() -> None:
    maps = F.gelu(draws(200, 5, 4, 4))
    maps[:, 0] = F.gelu(draws(200, 4, 4) - 12)  # never active: tiny and not quite constant
    maps[:, 1] *= 0.005
    maps[:, 2] = -0.1
    value = found("dead", maps)
    assert value.details == {"dead": 2, "nearly_dead": 1, "channels": 5, "rectified": False}


def test_sparsity_is_the_share_of_silence() -> None:
    maps = torch.ones(50, 2, 2, 2)
    maps[:, 0] = 0
    maps[:25, 1, 0, 0] = -1
    value = found("sparsity", maps)
    assert value.value == pytest.approx((0.625 + 0.5) / 2)
    half = 1.96 * 0.0625 * math.sqrt(50 / 49) / math.sqrt(50)
    assert value.interval95 == pytest.approx((0.5625 - half, 0.5625 + half))


def test_blank_is_the_share_of_channels_without_anything_on_an_image() -> None:
    maps = torch.zeros(20, 4, 3, 3)
    maps[:, 0, 1, 1] = 1
    maps[::2, 1, 2, 2] = 1
    maps[:, 2] = -1
    assert found("blank", maps).value == pytest.approx((0.75 + 0.5) / 2)


def test_the_rank_is_of_the_channels_means() -> None:
    directions = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, -1]])
    signs = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).repeat(25, 1)
    maps = (signs @ directions)[:, :, None, None] + F.layer_norm(draws(100, 4, 5, 5), (5, 5))
    value = found("rank", maps)
    assert value.value == pytest.approx(2, abs=1e-4)
    assert value.details == {"channels": 4}


def test_the_probe_is_a_ridge_classifier_with_an_interval() -> None:
    truth = labels(400)
    means = draws(CLASSES, 6, seed=5)
    maps = (means[truth] + draws(400, 6))[:, :, None, None]
    value = found("probe", maps, truth=truth, learned=300, size=100)
    x, y = maps[:, :, 0, 0].double().numpy(), truth.numpy()
    probe = MEASURES["probe"](CLASSES)
    probe.learn(StageBatch(maps[:300], pictures(300), truth[:300]))
    penalty = probe.linear.penalty * ((x[:300] - x[:300].mean(0)) ** 2).sum() / 6  # type: ignore[attr-defined]
    theirs = RidgeClassifier(alpha=penalty).fit(x[:300], y[:300])
    correct = int((theirs.predict(x[300:]) == y[300:]).sum())
    assert value.details == {"n": 100, "correct": correct}
    assert 0.4 < correct / 100 < 0.95
    assert value.interval95 is not None
    assert value.interval95[0] < correct / 100 < value.interval95[1]


def test_the_probe_sees_where_something_is_on_a_grid_of_two() -> None:
    maps = torch.zeros(90, 1, 4, 4)
    truth = labels(90)
    for number, (row, column) in enumerate([(0, 0), (0, 3), (3, 0)]):
        maps[truth == number, 0, row, column] = 1
    assert found("probe", maps, truth=truth, learned=45, size=45).value == 1


def test_separability_is_the_nearest_centroid() -> None:
    truth = labels(400)
    maps = (draws(CLASSES, 6, seed=5)[truth] + draws(400, 6))[:, :, None, None]
    value = found("separability", maps, truth=truth, learned=300, size=100)
    x, y = maps[:, :, 0, 0].numpy(), truth.numpy()
    theirs = NearestCentroid().fit(x[:300], y[:300])
    assert value.value == pytest.approx(theirs.score(x[300:], y[300:]))


def test_a_class_without_training_images_is_never_said() -> None:
    truth = torch.cat([torch.arange(40) % 2, torch.full((10,), 2)])
    maps = draws(50, 4, 1, 1)
    assert found("separability", maps, truth=truth, learned=40, size=10).value == 0


@pytest.mark.parametrize("side", [2, 4, 16])
def test_a_rotation_keeps_the_whole_picture(side: int) -> None:
    images = pictures(600, PICTURE_SIDE)
    patches = F.unfold(images.double() / 255, PICTURE_SIDE // side, stride=PICTURE_SIDE // side)
    turn = torch.linalg.qr(draws(patches.shape[1], patches.shape[1], seed=1)).Q.double()
    maps = (turn @ patches).reshape(600, -1, side, side).float()
    value = found("picture", maps, images, learned=400, size=100)
    assert value.value == pytest.approx(1, abs=1e-4)


def test_half_of_the_picture_is_half_of_the_variance() -> None:
    images = pictures(400, PICTURE_SIDE)
    maps = images.float()[:, :1] / 255  # of three channels that are as varied, one
    value = found("picture", maps, images, learned=200, size=100)
    assert value.value == pytest.approx(1 / 3, abs=0.01)
    assert value.interval95 is not None
    assert value.interval95[0] < 1 / 3 < value.interval95[1]


def test_noise_and_another_picture_hold_nothing() -> None:
    images = pictures(400, PICTURE_SIDE)
    for maps in (draws(400, 8, 4, 4), pictures(400, PICTURE_SIDE, seed=9).float()):
        value = found("picture", maps, images, learned=200, size=200)
        assert value.value == pytest.approx(0, abs=0.01)


def test_fineness_of_noise_ramps_and_checks() -> None:
    value = found("fineness", draws(100, 4, 8, 8))
    assert value.value == pytest.approx(1, abs=0.03)
    ramp = torch.arange(8.0).expand(20, 2, 8, 8)
    # Differences 1 across and 0 down; the variance of 0..7, each 8 times, is 5.25 x 64/63.
    assert found("fineness", ramp).value == pytest.approx(0.5 / (2 * 5.25 * 64 / 63))
    check = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    value = found("fineness", check.float().expand(20, 2, 8, 8))
    assert value.value == pytest.approx(1 / (2 * 0.25 * 64 / 63))
    smooth = F.interpolate(draws(50, 4, 3, 3), (12, 12), mode="bilinear")
    assert found("fineness", smooth).value < 0.2  # type: ignore[operator]
    scaled = smooth * 100 + torch.from_numpy(np.arange(4.0, dtype=np.float32))[:, None, None]
    assert found("fineness", scaled).value == pytest.approx(found("fineness", smooth).value)

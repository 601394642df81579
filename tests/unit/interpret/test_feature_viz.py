"""Optimized inputs, top images and kernels of networks with known weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from convlens import models
from convlens.data.dataset import Split
from convlens.errors import UsageError
from convlens.interpret import feature_viz
from helpers.activation_networks import conv, images, network, subject
from helpers.support import Memory, Streamed


def colors() -> nn.Module:
    """A network whose channels respond to white, to black, and to red without green."""
    weights = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [-1 / 3, -1 / 3, -1 / 3], [1.0, -1.0, 0.0]])
    return network(conv(weights[:, :, None, None], [0.0, 1.0, 0.0]))


def test_optimized_input_maximizes_the_channel() -> None:
    one = subject(colors(), size=16)
    pixels = torch.full((4, 3, 16, 16), 128, dtype=torch.uint8)
    pixels[1] = 140
    split = Split(Memory(pixels), torch.zeros(4, dtype=torch.int64), list("abcd"))
    reference = feature_viz.top_activating(one, split, "relu", "val")
    made = feature_viz.make_inputs(one, "relu", [0, 1, 2], reference=reference, steps=60)
    assert made.images.shape == (3, 3, 16, 16)
    middle = made.images[:, :, 4:12, 4:12].mean((2, 3))
    assert middle[0].min() > 180
    assert middle[1].max() < 75
    whole = made.images[2].mean((1, 2))
    assert whole[0] - whole[1] > 15  # where green dominates, the ReLU has no gradient
    assert made.means[2] > 0.25
    assert made.best is not None
    assert made.best[0] == pytest.approx(140 / 255)
    assert made.peaks[0] > made.best[0]
    # The reported values are those of the image rounded to bytes.
    with torch.no_grad():
        maps = one.model.relu(one.model.first(one.prepared(torch.from_numpy(made.images[:1]))))
    assert made.peaks[0] == pytest.approx(float(maps[0, 0].max()))
    assert made.means[0] == pytest.approx(float(maps[0, 0].mean()), rel=1e-5)
    result = made.to_dict()
    assert result["made"][0]["best_image"] == pytest.approx(140 / 255)
    assert result["split"] == "4 val images"


def test_optimized_input_depends_only_on_the_seed_and_the_channel() -> None:
    one = subject(colors(), size=8)
    for parameter in one.model.first.parameters():
        parameter.requires_grad_(False)
    before = [each.requires_grad for each in one.model.parameters()]
    first = feature_viz.make_inputs(one, "relu", [2, 0], steps=10)
    again = feature_viz.make_inputs(one, "relu", [0], steps=10)
    assert np.abs(first.images[1].astype(int) - again.images[0].astype(int)).max() <= 1
    np.testing.assert_array_equal(
        first.images, feature_viz.make_inputs(one, "relu", [2, 0], steps=10).images
    )
    other = feature_viz.make_inputs(one, "relu", [0], steps=10, seed=1)
    assert not np.array_equal(again.images, other.images)
    assert [each.requires_grad for each in one.model.parameters()] == before
    assert all(each.grad is None for each in one.model.parameters())
    assert not any(module._forward_hooks for module in one.model.modules())


def test_inputs_of_grey_images_and_of_channels_that_never_change() -> None:
    weights = torch.tensor([[[[1.0]]], [[[0.0]]]])
    one = subject(network(conv(weights)), size=9, channels=1)
    made = feature_viz.make_inputs(one, "relu", steps=20)
    assert made.channels == [0, 1]
    assert made.images.shape == (2, 1, 9, 9)
    assert made.means[0] > 0.6
    assert made.peaks[1] == 0
    assert made.best is None
    assert made.to_dict()["made"][0]["best_image"] is None
    broken = subject(network(conv(weights * float("nan"))), size=9, channels=1)
    assert np.isnan(feature_viz.make_inputs(broken, "relu", [0], steps=2).peaks).all()


def test_dream_option_is_parsed_and_unknown_channels_are_refused() -> None:
    assert feature_viz.parse_dream("layer4.1:17, 33") == ("layer4.1", [17, 33])
    assert feature_viz.parse_dream("fc") == ("fc", [])
    with pytest.raises(UsageError, match="not a channel: x"):
        feature_viz.parse_dream("fc:1,x")
    one = subject(colors(), size=8)
    with pytest.raises(UsageError, match="first has no channel 3, 8") as caught:
        feature_viz.make_inputs(one, "first", [0, 3, 8])
    assert "0 to 2" in caught.value.fix
    with pytest.raises(UsageError, match="did you mean relu"):
        feature_viz.make_inputs(one, "rel")


def test_most_selective_channels_are_optimized_by_default() -> None:
    one = subject(colors(), size=4)
    pixels = images(30)
    split = Split(Memory(pixels), torch.zeros(30, dtype=torch.int64), list(map(str, range(30))))
    reference = feature_viz.top_activating(one, split, "relu", "val")
    made = feature_viz.make_inputs(one, "relu", reference=reference, steps=2)
    assert made.channels == reference.shown(8)


def test_filters_are_ordered_by_energy() -> None:
    weights = torch.zeros(3, 3, 2, 2)
    weights[0, 0], weights[1, 2], weights[2, 1] = 1.0, -3.0, 2.0
    found = feature_viz.read_filters(subject(network(conv(weights))))
    assert (found.layer, found.colored) == ("first", True)
    assert found.order.tolist() == [1, 2, 0]
    assert found.energy == pytest.approx([2, 6, 4])
    assert found.inputs(1).tolist() == [2, 0, 1]
    deep = subject(models.build_model("resnet18", 2, 3, 32, {}), 32)
    inside = feature_viz.read_filters(deep, "layer2.0")
    assert inside.layer == "layer2.0.conv1"
    assert inside.weights.shape == (128, 64, 3, 3)
    with pytest.raises(UsageError, match="did you mean layer2"):
        feature_viz.read_filters(deep, "layr2")
    with pytest.raises(UsageError, match="layer fc of net has no convolution"):
        feature_viz.read_filters(deep, "fc")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(UsageError, match="net has no convolution") as caught:
        feature_viz.read_filters(subject(plain))
    assert caught.value.fix == "leave --filters out"


def test_top_images_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one = subject(network(conv(torch.randn(6, 3, 2, 2))))
    pixels = images(100)
    monkeypatch.setattr(feature_viz, "MAX_BATCH", 7)
    rows = Streamed(pixels)
    split = Split(rows, torch.arange(100) % 2, [str(i) for i in range(100)])
    found = feature_viz.top_activating(one, split, "relu", "test", count=5)
    with torch.no_grad():
        maps = one.model.relu(one.model.first(one.prepared(pixels)))
    for channel in range(6):
        peaks = maps[:, channel].flatten(1).max(1).values.double()
        best = sorted(range(100), key=lambda i: (-float(peaks[i]), i))[:5]
        assert found.images[channel].tolist() == best
        np.testing.assert_allclose(found.peaks[channel], peaks[best])
        for rank, image in enumerate(best):
            row, column = found.positions[channel, rank]
            assert float(maps[image, channel, row, column]) == float(peaks[image])
        wanted = (peaks[best].mean() - peaks.mean()) / peaks.std(correction=0)
        assert found.selectivity[channel] == pytest.approx(float(wanted), rel=1e-6)
    assert max(map(len, rows.reads)) == 7, "never more than a batch"
    assert [i for batch in rows.reads for i in batch] == list(range(100)), "each image once"


def test_silent_and_broken_channels_are_not_shown_and_the_earlier_of_equal_images_wins() -> None:
    weights = torch.stack([torch.full((3, 1, 1), w) for w in (0.0, float("nan"), 1.0)])
    pixels = torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
    pixels[[3, 11, 12]] = 200
    split = Split(Memory(pixels), torch.zeros(20, dtype=torch.int64), list(map(str, range(20))))
    found = feature_viz.top_activating(
        subject(network(conv(weights))), split, "relu", "test", count=4
    )
    assert (found.silent, found.broken, found.shown(9)) == (1, 1, [2])
    assert found.images[2].tolist() == [3, 11, 12, 0]
    assert found.most_common_class(2) == ("a", 4)
    result = found.to_dict(9)
    assert result["top"][0]["images"][0] == "test:3"
    assert result["top"][0]["classes"] == ["a"] * 4


def test_channels_that_share_images_come_after_the_others() -> None:
    weights = torch.zeros(3, 3, 1, 1)
    weights[0, 0], weights[1, 0], weights[2, 1] = 1.0, 2.0, 1.0  # red, red again, green
    pixels = images(50)
    split = Split(Memory(pixels), torch.zeros(50, dtype=torch.int64), list(map(str, range(50))))
    found = feature_viz.top_activating(subject(network(conv(weights))), split, "relu", "test")
    assert set(found.shown(2)) in ({0, 2}, {1, 2})
    assert sorted(found.shown(3)) == [0, 1, 2]

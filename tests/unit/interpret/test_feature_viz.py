"""Made inputs: they reach what is known to be reachable, and are the same each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from convlens.data.dataset import Split
from convlens.errors import UsageError
from convlens.interpret import feature_viz
from helpers.activation_networks import conv, images, network, subject
from helpers.support import Memory


def colors() -> nn.Module:
    """Channels that like white, black (as far as it goes), and red without green."""
    weights = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [-1 / 3, -1 / 3, -1 / 3], [1.0, -1.0, 0.0]])
    return network(conv(weights[:, :, None, None], [0.0, 1.0, 0.0]))


def test_the_picture_is_the_one_that_excites_the_channel() -> None:
    one = subject(colors(), size=16)
    pixels = torch.full((4, 3, 16, 16), 128, dtype=torch.uint8)
    pixels[1] = 140
    split = Split(Memory(pixels), torch.zeros(4, dtype=torch.int64), list("abcd"))
    known = feature_viz.top_activating(one, split, "relu", "val")
    made = feature_viz.make_inputs(one, "relu", [0, 1, 2], known=known, steps=60)
    assert made.images.shape == (3, 3, 16, 16)
    middle = made.images[:, :, 4:12, 4:12].mean((2, 3))
    assert middle[0].min() > 180
    assert middle[1].max() < 75
    whole = made.images[2].mean((1, 2))
    assert whole[0] - whole[1] > 15  # where green prevails the ReLU gives no gradient
    assert made.means[2] > 0.25
    assert made.best is not None
    assert made.best[0] == pytest.approx(140 / 255)
    assert made.peaks[0] > made.best[0]
    # What is stated is of the picture as it can be saved.
    with torch.no_grad():
        given = one.model.relu(one.model.first(one.prepared(torch.from_numpy(made.images[:1]))))
    assert made.peaks[0] == pytest.approx(float(given[0, 0].max()))
    assert made.means[0] == pytest.approx(float(given[0, 0].mean()), rel=1e-5)
    told = made.to_dict()
    assert told["made"][0]["best_image"] == pytest.approx(140 / 255)
    assert told["split"] == "4 val images"


def test_the_same_each_time_and_whatever_else_is_made() -> None:
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


def test_grey_images_and_channels_that_never_answer() -> None:
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


def test_what_is_asked_for() -> None:
    assert feature_viz.parse_dream("layer4.1:17, 33") == ("layer4.1", [17, 33])
    assert feature_viz.parse_dream("fc") == ("fc", [])
    with pytest.raises(UsageError, match="no channels x"):
        feature_viz.parse_dream("fc:1,x")
    one = subject(colors(), size=8)
    with pytest.raises(UsageError, match="first has no channel 3, 8") as caught:
        feature_viz.make_inputs(one, "first", [0, 3, 8])
    assert "0 to 2" in caught.value.fix
    with pytest.raises(UsageError, match="did you mean relu"):
        feature_viz.make_inputs(one, "rel")


def test_most_selective_channels_are_made_by_default() -> None:
    one = subject(colors(), size=4)
    pixels = images(30)
    split = Split(Memory(pixels), torch.zeros(30, dtype=torch.int64), list(map(str, range(30))))
    known = feature_viz.top_activating(one, split, "relu", "val")
    made = feature_viz.make_inputs(one, "relu", known=known, steps=2)
    assert made.channels == known.shown(8)

"""Activations of networks with known weights: statistics, channel order and color scale."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from convlens import models
from convlens.errors import UsageError
from convlens.interpret import activations
from convlens.interpret.inputs import Picture
from helpers.activation_networks import conv, network, subject


def picture(value: int = 255, size: int = 4) -> Picture:
    pixels = torch.full((3, size, size), value, dtype=torch.uint8)
    pixels[:, 0, 0] = 0  # one black corner
    return Picture("test:0", pixels, 1)


def test_blank_and_broken_channels_order_and_limits_match_hand_computed_ones() -> None:
    maps = np.zeros((5, 2, 2), np.float32)
    maps[1] = 3  # constant
    maps[2] = [[0, 1], [0, 0]]
    maps[3] = [[-8, 0], [0, 0]]
    maps[4] = [[np.nan, 1], [1, 1]]
    assert activations.blank_channels(maps).tolist() == [True, True, False, False, False]
    assert activations.broken_channels(maps).tolist() == [False, False, False, False, True]
    assert activations.blank_channels(np.float32([[[0]], [[3]]])).tolist() == [True, False]
    # By mean absolute value 0, 3, 0.25, 2; the channel with NaN comes first.
    assert activations.channel_order(maps, "active").tolist() == [4, 1, 3, 2, 0]
    assert activations.channel_order(maps, "index").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="unknown order 'actve'"):
        activations.channel_order(maps, "actve")
    ramp = np.arange(1001, dtype=np.float32).reshape(1, 1, -1)
    assert activations.channel_limits([ramp]) == (0.0, 995.0)
    assert activations.channel_limits([-ramp, np.float32([[[np.inf]]])]) == (-995.0, 995.0)
    sparse = np.zeros((1, 100, 100), np.float32)
    sparse[0, 0, 0] = 7  # the percentile is 0, so the maximum is used
    assert activations.channel_limits([sparse]) == (0.0, 7.0)
    assert activations.channel_limits([np.full((1, 2, 2), np.nan, np.float32)]) == (0.0, 0.0)


def test_statistics_of_a_network_with_known_weights() -> None:
    # Channels: the mean color; its negative (dead after the ReLU); a constant.
    weights = torch.stack([torch.full((3, 1, 1), w) for w in (1 / 3, -1 / 3, 0.0)])
    seen = activations.compute_activity(
        subject(network(conv(weights, [0, 0, 0.5]))), picture(), ("first", "relu")
    )
    first, relu = seen.numbers()
    np.testing.assert_allclose(seen.maps["first"][1], -seen.maps["first"][0], atol=1e-6)
    assert (first.channels, first.height, first.width, first.blank) == (3, 4, 4, 1)
    assert (relu.blank, relu.broken) == (2, 0)
    assert relu.mean == pytest.approx((15 / 16 + 0 + 0.5) / 3)
    assert relu.active == pytest.approx((15 / 16 + 0 + 1) / 3)
    assert seen.logits == pytest.approx([15 / 16 + 0.5, 0])
    label, probability = seen.prediction
    assert (label, seen.truth) == ("a", "b")
    assert probability == pytest.approx(1 / (1 + np.exp(-(15 / 16 + 0.5))))


def test_nan_is_counted_and_excluded_from_the_mean() -> None:
    weights = torch.stack([torch.full((3, 1, 1), w) for w in (1 / 3, float("nan"))])
    seen = activations.compute_activity(subject(network(conv(weights))), picture(), ("first",))
    (layer,) = seen.numbers()
    assert (layer.broken, layer.blank) == (1, 0)
    assert layer.mean == pytest.approx(15 / 16)
    assert seen.prediction == (None, None)
    assert seen.to_dict()["label"] is None


def test_each_network_gets_the_requested_layers_that_it_has() -> None:
    res = subject(models.build_model("resnet18", 2, 3, 32, {}), 32)
    cnn = subject(models.build_model("cnn", 2, 3, 32, {"widths": [4]}), 32)
    assert activations.check_layers([cnn], []) == [("stage1",)]
    both = activations.check_layers([res, cnn], ["layer1.0", "stage1", "layer1.0"])
    assert both == [("layer1.0",), ("stage1",)]
    with pytest.raises(UsageError, match=r"layr1\.0.*did you mean layer1\.0"):
        activations.check_layers([res, cnn], ["layr1.0", "stage1"])
    with pytest.raises(UsageError, match="no layer 'layer1'"):
        activations.check_layers([res, cnn], ["layer1"])  # the second has none of them


def test_activations_are_not_changed_by_in_place_operations() -> None:
    model = models.build_model("resnet18", 2, 3, 16, {})
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    names = ["bn1", "layer1.0.bn1", "layer2.0.bn2", "layer2.0"]
    expected = {}
    for name in names:
        reference.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: expected.update({name: output[0].clone()})
        )
    one = subject(model, 16)
    shown = Picture("x", torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), None)
    with torch.no_grad():
        logits = reference.eval()(one.prepared(shown.pixels[None]))
    seen = activations.compute_activity(one, shown, names)
    for name in names:
        np.testing.assert_array_equal(seen.maps[name], expected[name].numpy())
    np.testing.assert_array_equal(seen.logits, logits[0].numpy())
    assert seen.maps["bn1"].min() < 0

"""What layers give for a picture: their numbers, order and scale, from networks with known ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from convlens import models
from convlens.data.dataset import Split
from convlens.errors import UsageError
from convlens.interpret import activations, feature_viz
from convlens.interpret.inputs import Picture
from helpers.activation_networks import conv, images, network, subject
from helpers.support import Memory, Streamed


def picture(value: int = 255, size: int = 4) -> Picture:
    pixels = torch.full((3, size, size), value, dtype=torch.uint8)
    pixels[:, 0, 0] = 0  # one black corner
    return Picture("test:0", pixels, 1)


def test_blank_broken_order_and_scale_by_hand() -> None:
    maps = np.zeros((5, 2, 2), np.float32)
    maps[1] = 3  # the same everywhere
    maps[2] = [[0, 1], [0, 0]]
    maps[3] = [[-8, 0], [0, 0]]
    maps[4] = [[np.nan, 1], [1, 1]]
    assert activations.blank_channels(maps).tolist() == [True, True, False, False, False]
    assert activations.broken_channels(maps).tolist() == [False, False, False, False, True]
    assert activations.blank_channels(np.float32([[[0]], [[3]]])).tolist() == [True, False]
    # By the mean of absolute values 0, 3, 0.25, 2; what is NaN comes first, to be seen.
    assert activations.channel_order(maps, "active").tolist() == [4, 1, 3, 2, 0]
    assert activations.channel_order(maps, "index").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="unknown order 'actve'"):
        activations.channel_order(maps, "actve")
    ramp = np.arange(1001, dtype=np.float32).reshape(1, 1, -1)
    assert activations.channel_limits([ramp]) == (0.0, 995.0)
    assert activations.channel_limits([-ramp, np.float32([[[np.inf]]])]) == (-995.0, 995.0)
    sparse = np.zeros((1, 100, 100), np.float32)
    sparse[0, 0, 0] = 7  # the percentile is 0, so the greatest value stands in for it
    assert activations.channel_limits([sparse]) == (0.0, 7.0)
    assert activations.channel_limits([np.full((1, 2, 2), np.nan, np.float32)]) == (0.0, 0.0)


def test_the_numbers_of_a_known_network() -> None:
    # Channels: the mean of the colours; minus that (dead behind the ReLU); a constant.
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
    label, probability = seen.answer
    assert (label, seen.truth) == ("a", "b")
    assert probability == pytest.approx(1 / (1 + np.exp(-(15 / 16 + 0.5))))


def test_nan_is_counted_and_left_out() -> None:
    weights = torch.stack([torch.full((3, 1, 1), w) for w in (1 / 3, float("nan"))])
    seen = activations.compute_activity(subject(network(conv(weights))), picture(), ("first",))
    (numbers,) = seen.numbers()
    assert (numbers.broken, numbers.blank) == (1, 0)
    assert numbers.mean == pytest.approx(15 / 16)
    assert seen.answer == (None, None)
    assert seen.to_dict()["label"] is None


def test_layers_of_several_networks() -> None:
    res = subject(models.build_model("resnet18", 2, 3, 32, {}), 32)
    cnn = subject(models.build_model("cnn", 2, 3, 32, {"widths": [4]}), 32)
    assert activations.check_layers([cnn], []) == [("stage1",)]
    both = activations.check_layers([res, cnn], ["layer1.0", "stage1", "layer1.0"])
    assert both == [("layer1.0",), ("stage1",)]
    with pytest.raises(UsageError, match=r"layr1\.0.*did you mean layer1\.0"):
        activations.check_layers([res, cnn], ["layr1.0", "stage1"])
    with pytest.raises(UsageError, match="no layer 'layer1'"):
        activations.check_layers([res, cnn], ["layer1"])  # the second has none of them


def test_filters_are_read_in_the_order_of_their_energy() -> None:
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
    assert "there is none" in caught.value.fix


def test_strongest_images_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one = subject(network(conv(torch.randn(6, 3, 2, 2))))
    pixels = images(100)
    monkeypatch.setattr(feature_viz, "BATCH", 7)
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
            row, column = found.places[channel, rank]
            assert float(maps[image, channel, row, column]) == float(peaks[image])
        wanted = (peaks[best].mean() - peaks.mean()) / peaks.std(correction=0)
        assert found.selectivity[channel] == pytest.approx(float(wanted), rel=1e-6)
    assert max(map(len, rows.asked)) == 7, "never more than a batch"
    assert [i for batch in rows.asked for i in batch] == list(range(100)), "each image once"


def test_silent_and_broken_channels_are_not_shown_and_ties_go_to_the_earlier() -> None:
    weights = torch.stack([torch.full((3, 1, 1), w) for w in (0.0, float("nan"), 1.0)])
    pixels = torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
    pixels[[3, 11, 12]] = 200
    split = Split(Memory(pixels), torch.zeros(20, dtype=torch.int64), list(map(str, range(20))))
    found = feature_viz.top_activating(
        subject(network(conv(weights))), split, "relu", "test", count=4
    )
    assert (found.silent, found.broken, found.shown(9)) == (1, 1, [2])
    assert found.images[2].tolist() == [3, 11, 12, 0]
    assert found.commonest(2) == ("a", 4)
    told = found.to_dict(9)
    assert told["top"][0]["images"][0] == "test:3"
    assert told["top"][0]["classes"] == ["a"] * 4


def test_channels_with_the_same_images_wait_behind_others() -> None:
    weights = torch.zeros(3, 3, 1, 1)
    weights[0, 0], weights[1, 0], weights[2, 1] = 1.0, 2.0, 1.0  # red, red again, green
    pixels = images(50)
    split = Split(Memory(pixels), torch.zeros(50, dtype=torch.int64), list(map(str, range(50))))
    found = feature_viz.top_activating(subject(network(conv(weights))), split, "relu", "test")
    assert set(found.shown(2)) in ({0, 2}, {1, 2})
    assert sorted(found.shown(3)) == [0, 1, 2]


def test_in_place_operations_do_not_reach_what_is_seen() -> None:
    model = models.build_model("resnet18", 2, 3, 16, {})
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    names = ["bn1", "layer1.0.bn1", "layer2.0.bn2", "layer2.0"]
    kept = {}
    for name in names:
        plain.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: kept.update({name: output[0].clone()})
        )
    one = subject(model, 16)
    shown = Picture("x", torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), None)
    with torch.no_grad():
        logits = plain.eval()(one.prepared(shown.pixels[None]))
    seen = activations.compute_activity(one, shown, names)
    for name in names:
        np.testing.assert_array_equal(seen.maps[name], kept[name].numpy())
    np.testing.assert_array_equal(seen.logits, logits[0].numpy())
    assert seen.maps["bn1"].min() < 0

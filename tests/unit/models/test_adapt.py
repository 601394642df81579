"""Loading weights of another origin: which tensors are copied, adapted, left or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import models
from convlens.errors import ModelFileError
from convlens.models.adapt import FittedWeights, adapt_input, describe_tensors, fit_weights
from helpers.support import same


def cnn(classes: int = 5, channels: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return models.build_model("cnn", classes, channels, 16, {"widths": [6, 8], **options})


def resnet(name: str, classes: int = 10, channels: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return models.build_model(name, classes, channels, 32, options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_equal_networks_have_the_same_bits_afterwards() -> None:
    source, target = cnn(seed=0), cnn(seed=1)
    source(torch.randn(4, 3, 16, 16))  # updates the statistics of norms
    fitted = fit_weights(target, state(source))
    same(state(target), state(source))
    assert fitted.matched == list(source.state_dict())
    assert (fitted.adapted, fitted.left, fitted.new) == ({}, [], [])
    assert fitted.lines() == ["14 tensors loaded; head of 5 classes included"]


def test_another_number_of_classes_leaves_the_head_unchanged() -> None:
    source, target = cnn(classes=7), cnn(classes=5, seed=1)
    before = state(target)
    fitted = fit_weights(target, state(source))
    assert fitted.new == fitted.left == ["classifier.weight", "classifier.bias"]
    after, theirs = state(target), state(source)
    for name in after:
        assert torch.equal(after[name], (before if name in fitted.new else theirs)[name]), name
    assert fitted.lines()[0] == (
        "12 tensors loaded; the head is new (5 classes: 5x8; that of the file is 7x8)"
    )


def test_a_head_of_other_classes_is_not_loaded() -> None:
    source, target = cnn(), cnn(seed=1)
    before = state(target)
    fitted = fit_weights(target, state(source), keep_head=False)
    assert "the file has other classes" in fitted.head
    assert torch.equal(state(target)["classifier.weight"], before["classifier.weight"])
    assert not torch.equal(before["classifier.weight"], state(source)["classifier.weight"])


def test_a_head_of_another_name_is_not_used() -> None:
    theirs = state(cnn(classes=7))
    renamed = {name.replace("classifier", "fc.1"): tensor for name, tensor in theirs.items()}
    fitted = fit_weights(cnn(seed=1), renamed)
    assert fitted.new == ["classifier.weight", "classifier.bias"]
    assert fitted.left == ["fc.1.weight", "fc.1.bias"]
    assert fitted.lines() == [
        "12 tensors loaded; the head is new (5 classes; the file has no head of this name)",
        "not in the file, newly initialized: classifier.weight, classifier.bias",
        "in the file, not used: fc.1.weight, fc.1.bias",
    ]


def test_counters_of_batch_norms_may_be_missing() -> None:
    theirs = {n: t for n, t in state(cnn()).items() if not n.endswith("num_batches_tracked")}
    fitted = fit_weights(cnn(seed=1), theirs)
    assert (len(fitted.matched), fitted.new) == (12, [])


def test_half_precision_is_converted_to_float32() -> None:
    source, target = cnn(), cnn(seed=1)
    fit_weights(
        target, {n: t.half() if t.is_floating_point() else t for n, t in state(source).items()}
    )
    weight = state(target)["stage1.0.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state(source)["stage1.0.weight"].half().float())


# Wrappers


def lightning(model: nn.Module) -> dict[str, Tensor]:
    inner = {f"model.{name}": tensor for name, tensor in state(model).items()}
    return {**inner, "criterion.weight": torch.ones(5)}


def two_copies(model: nn.Module) -> dict[str, Tensor]:
    """The teacher lacks a tensor, so the student has to be selected."""
    teacher = {f"encoder.{n}": torch.zeros_like(t) for n, t in list(state(model).items())[1:]}
    return {**teacher, **{f"backbone.{n}": t for n, t in state(model).items()}}


def compiled_stage(model: nn.Module) -> dict[str, Tensor]:
    twin: Any = copy.deepcopy(model)
    twin.stage2 = torch.compile(twin.stage2)
    return state(twin)


WRAPPED: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "parallel": lambda model: state(nn.DataParallel(model)),
    "compiled": lambda model: state(torch.compile(model)),  # type: ignore[arg-type]
    "both": lambda model: state(nn.DataParallel(torch.compile(model))),  # type: ignore[arg-type]
    "stage": compiled_stage,
    "lightning": lightning,
    "copies": two_copies,
}


@pytest.mark.parametrize("name", list(WRAPPED))
def test_prefixes_of_wrappers_are_stripped(name: str) -> None:
    source, target = cnn(), cnn(seed=1)
    wrapped = WRAPPED[name](source)
    assert wrapped.keys() != source.state_dict().keys()
    fitted = fit_weights(target, wrapped)
    same(state(target), state(source))
    extra = {"lightning": ["criterion.weight"], "copies": list(wrapped)[:13]}
    assert fitted.left == extra.get(name, [])


def test_names_of_a_network_may_begin_like_a_wrapper() -> None:
    class WithEncoder(nn.Module):
        head = "fc"

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.fc = nn.Linear(4, 2)

    source, target = WithEncoder(), WithEncoder()
    assert fit_weights(target, state(nn.DataParallel(source))).left == []
    same(state(target), state(source))


# The first convolution


def test_a_grey_image_gives_the_response_of_its_rgb_copy() -> None:
    grey = torch.randn(2, 1, 16, 16)
    color = grey.expand(-1, 3, -1, -1)
    for theirs, ours, inputs in [(3, 1, (color, grey)), (1, 3, (grey, color))]:
        source = cnn(channels=theirs).eval()
        target = cnn(channels=ours, seed=1).eval()
        fitted = fit_weights(target, state(source))
        assert list(fitted.adapted) == ["stage1.0.weight"]
        assert torch.allclose(source(inputs[0]), target(inputs[1]), atol=1e-6)
    assert fitted.lines()[1] == (
        "adapted stage1.0.weight: 6x1x3x3 -> 6x3x3x3; a third for each channel"
    )


def test_a_kernel_resampled_by_area_equals_values_computed_by_hand() -> None:
    # Taps 1 2 3 4 5 on [0, 5] summed over three windows of 5/3: 1 + 2 * 2/3, and so on.
    row = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    expected = torch.tensor([1 + 2 * 2 / 3, 2 / 3 + 3 + 4 / 3, 4 * 2 / 3 + 5])
    result, change = adapt_input((row[:, None] * row).reshape(1, 1, 5, 5), (1, 1, 3, 3))
    assert torch.allclose(result[0, 0], expected[:, None] * expected, atol=1e-5)
    assert change.startswith("1x1x5x5 -> 1x1x3x3; kernel resampled by area")
    # From 1 to 3, each tap is a third in each direction.
    result, _ = adapt_input(torch.full((1, 1, 1, 1), 9.0), (1, 1, 3, 3))
    assert torch.allclose(result, torch.ones(1, 1, 3, 3))


@pytest.mark.parametrize(("old", "new"), [(7, 3), (3, 7), (5, 3), (3, 5), (7, 1), (4, 3)])
def test_resampling_keeps_the_response_to_a_constant_image(old: int, new: int) -> None:
    kernel = torch.randn(8, 3, old, old)
    result, _ = adapt_input(kernel, (8, 3, new, new))
    assert result.shape == (8, 3, new, new)
    assert torch.allclose(result.sum((2, 3)), kernel.sum((2, 3)), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_torchvisions_resnet_fit_a_smaller_stem(channels: int) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    source = resnet18()
    target = resnet("resnet18", channels=channels, stem="cifar")
    fitted = fit_weights(target, state(source))
    assert list(fitted.adapted) == ["conv1.weight"]
    assert fitted.new == fitted.left == ["fc.weight", "fc.bias"]
    assert len(fitted.matched) == len(source.state_dict()) - 3
    theirs, ours = state(source), state(target)
    assert torch.allclose(
        ours["conv1.weight"].sum((1, 2, 3)), theirs["conv1.weight"].sum((1, 2, 3)), atol=1e-4
    )
    assert torch.equal(ours["layer4.1.conv2.weight"], theirs["layer4.1.conv2.weight"])


# Errors


def test_weights_with_nan_or_infinity_are_refused_and_change_nothing() -> None:
    for value in (float("nan"), float("inf")):
        theirs = state(cnn())
        theirs["stage2.0.weight"][0, 0, 0, 0] = value
        target = cnn(seed=1)
        before = state(target)
        with pytest.raises(ModelFileError, match=r"NaN or infinity in 1 .*: stage2.0.weight"):
            fit_weights(target, theirs, where="x.pth")
        same(state(target), before)
    # NaN in a tensor that is not used is allowed.
    theirs["unused"] = theirs.pop("stage2.0.weight").clone()
    fit_weights(cnn(seed=1), {**theirs, "stage2.0.weight": torch.zeros(8, 6, 3, 3)})


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (
            "resnet18",
            "resnet50",
            ["56%", "26%", "layer1.0.conv3.weight 256x64x1x1", "ResNet of 50"],
        ),
        ("resnet18", "resnet34", ["100% of the network", "layer1.2.conv1.weight", "ResNet of 34"]),
        ("resnet34", "resnet18", ["52% of the network", "layer1.2.conv1.weight", "ResNet of 18"]),
        ("cnn", "resnet18", ["stage1.0.weight 6x3x3x3", "conv1.weight", "ResNet of 18"]),
        ("resnet18", "cnn", ["conv1.weight 64x3x3x3", "14 tensors", "such as stage1.0.weight"]),
    ],
)
def test_weights_of_another_architecture_are_refused(
    ours: str, theirs: str, expected: list[str]
) -> None:
    def build(name: str) -> nn.Module:
        return cnn() if name == "cnn" else resnet(name)

    target = build(ours)
    before = state(target)
    with pytest.raises(ModelFileError, match="another architecture") as caught:
        fit_weights(target, build(theirs).state_dict(), where="x.pth")
    same(state(target), before)
    message = str(caught.value)
    assert all(text in message for text in expected), message
    assert "model.name" in caught.value.fix
    assert caught.value.where == "x.pth"


def test_integer_weights_are_refused() -> None:
    with pytest.raises(ModelFileError, match="another architecture"):
        fit_weights(cnn(), {name: tensor.to(torch.int8) for name, tensor in state(cnn()).items()})


def test_a_file_without_tensors_is_refused() -> None:
    with pytest.raises(ModelFileError) as caught:
        fit_weights(cnn(), {})
    assert "0% of the network" in caught.value.what
    assert "no tensors" in caught.value.fix


def test_long_lists_of_names_are_abbreviated() -> None:
    names = [f"layer{i}" for i in range(9)]
    lines = FittedWeights([], {}, names, [], "head").lines()
    assert lines[1] == "in the file, not used: layer0, layer1, layer2 and 6 more"
    assert "such as" in describe_tensors({"a": torch.zeros(3)})

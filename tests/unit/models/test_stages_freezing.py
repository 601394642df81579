"""Freezing: the parameters that `model.trainable` selects, and the modules before them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from convlens import models
from convlens.errors import UsageError
from convlens.models.stages import freeze, frozen_prefix, set_train_mode
from convlens.recipe import load_recipe
from convlens.training import resolve

RESNET = (
    "conv1",
    "bn1",
    "relu",
    "maxpool",
    "layer1",
    "layer2",
    "layer3",
    "layer4",
    "avgpool",
    "fc",
)


def resnet(trainable: str = "all") -> nn.Module:
    torch.manual_seed(0)
    model = models.build_model("resnet18", 4, 3, 32, {"stem": "imagenet"})
    freeze(model, trainable)
    return model


def trained_children(model: nn.Module) -> list[str]:
    """Top-level children with a trainable parameter."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


# Selecting parameters


@pytest.mark.parametrize(
    ("trainable", "children"),
    [
        ("all", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]),
        ("head", ["fc"]),
        ("stages", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
        ("last:1", ["fc"]),
        ("last:2", ["fc"]),  # avgpool has no parameters
        ("last:4", ["layer3", "layer4", "fc"]),
        ("last:5", ["layer2", "layer3", "layer4", "fc"]),
        ("last:6", ["layer1", "layer2", "layer3", "layer4", "fc"]),
        ("last:10", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]),
        ("layer3+", ["layer3", "layer4", "fc"]),
        ("avgpool+", ["fc"]),
        ("layer4,fc", ["layer4", "fc"]),
        ("layer4, fc", ["layer4", "fc"]),
        ("bn1", ["bn1"]),
    ],
)
def test_trainable_selects_children(trainable: str, children: list[str]) -> None:
    assert tuple(name for name, _ in resnet().named_children()) == RESNET
    assert trained_children(resnet(trainable)) == children


def test_trainable_can_start_at_a_block_inside_a_stage() -> None:
    model = resnet("layer4.1+")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names[0] == "layer4.1.conv1.weight"
    assert names[-1] == "fc.bias"
    assert not any(name.startswith("layer4.0") for name in names)


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("last:0", "10 children"),
        ("last:11", "10 children"),
        ("last:x", "10 children"),
        ("layer5+", "did you mean"),
        ("layr4,fc", "did you mean layer4"),
        ("relu", "leaves nothing to train"),
        ("", "no module"),
    ],
)
def test_an_invalid_trainable_is_a_usage_error(trainable: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resnet(trainable)
    assert "layer4" in caught.value.fix


def test_an_invalid_trainable_is_reported_before_any_image_is_read() -> None:
    recipe = load_recipe("resnet18", ["model.trainable=layer9+", "data.name=no-such-folder"])
    with pytest.raises(UsageError, match="layer9"):
        resolve.validate_recipe(recipe)


# Frozen modules


def test_frozen_norms_keep_their_statistics_and_frozen_dropout_is_inactive() -> None:
    model = models.build_model("resnet18", 4, 3, 32, {"stem": "half", "dropout": 0.5})
    freeze(model, "last:4")
    set_train_mode(model)
    before = copy.deepcopy(model.state_dict())
    outputs: dict[str, list[torch.Tensor]] = {"layer2": [], "layer3": []}
    for name, recorded in outputs.items():
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda _, inputs, out, recorded=recorded: recorded.append(out.clone())
        )
    for _ in range(2):
        model(torch.ones(4, 3, 32, 32))
    assert torch.equal(*outputs["layer2"])
    assert not torch.equal(*outputs["layer3"])  # dropout
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert {name.partition(".")[0] for name in changed} == {"layer3", "layer4"}


def test_the_frozen_prefix_is_everything_before_the_first_trained_layer() -> None:
    assert frozen_prefix(resnet("last:4")) == list(RESNET[:6])
    assert frozen_prefix(resnet("head")) == list(RESNET[:9])
    assert frozen_prefix(resnet("all")) == []
    assert frozen_prefix(resnet("bn1+")) == ["conv1"]
    inside_stage = resnet("layer4.1+")
    assert frozen_prefix(inside_stage) == [*RESNET[:7], "layer4.0"]


def test_a_dropout_right_before_the_classifier_is_not_frozen() -> None:
    model = models.build_model(
        "cnn", 4, 3, 16, {"widths": [4, 8], "dropout": 0.5, "stage_dropout": 0.5}
    )
    freeze(model, "head")
    assert frozen_prefix(model) == ["stage1", "stage2", "pool"]
    set_train_mode(model)
    modes = {name: module.training for name, module in model.named_children()}
    assert modes == {
        "stage1": False,
        "stage2": False,
        "pool": False,
        "dense": True,
        "classifier": True,
    }

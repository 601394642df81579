"""Stages of parameters, parts of foreign networks, and modes of modules where some are frozen."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from convlens import models
from convlens.models.cnn import CNN
from convlens.models.stages import (
    ModelParts,
    freeze_batch_norm,
    name_parts,
    set_train_mode,
    stage_of,
)


class Nested(nn.Module):
    """As in torchvision: features in one Sequential, stages that end inside it."""

    stages: Sequence[str] = ("features.1", "features.2")
    head = "classifier.1"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 1)),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
            nn.Conv2d(4, 8, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 2))


class Stem(nn.Module):
    """As a ResNet: the stage of the stem ends with a pooling without parameters."""

    stages = ("maxpool", "layer1", "layer2")
    head = "fc"

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2))
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2))
        self.fc = nn.Linear(4, 2)


def test_a_stage_contains_everything_up_to_its_last_module() -> None:
    assert stage_of(Stem()) == {
        "conv1.weight": "maxpool",
        "conv1.bias": "maxpool",
        "bn1.weight": "maxpool",
        "bn1.bias": "maxpool",
        "layer1.0.weight": "layer1",
        "layer1.0.bias": "layer1",
        "layer1.1.weight": "layer1",
        "layer1.1.bias": "layer1",
        "layer2.0.weight": "layer2",
        "layer2.0.bias": "layer2",
        "layer2.1.weight": "layer2",
        "layer2.1.bias": "layer2",
        "fc.weight": "fc",
        "fc.bias": "fc",
    }


def test_stages_may_be_inside_other_modules() -> None:
    assert stage_of(Nested()) == {
        "scale": "features.1",
        "features.0.weight": "features.1",
        "features.0.bias": "features.1",
        "features.1.0.weight": "features.1",
        "features.1.0.bias": "features.1",
        "features.1.2.weight": "features.1",
        "features.1.2.bias": "features.1",
        "features.2.0.weight": "features.2",
        "features.2.0.bias": "features.2",
        "features.2.1.weight": "features.2",
        "features.2.1.bias": "features.2",
        "features.3.weight": "classifier.1",
        "features.3.bias": "classifier.1",
        "classifier.1.weight": "classifier.1",
        "classifier.1.bias": "classifier.1",
    }


def test_stage1_and_stage10_are_distinguished() -> None:
    stages = stage_of(CNN(2, 1, 8, widths=[2] * 11, pool="none", hidden=3))
    assert stages["stage1.0.weight"] == "stage1"
    assert stages["stage10.0.weight"] == "stage10"
    assert stages["stage2.0.weight"] == "stage2"
    assert stages["dense.hidden.bias"] == stages["classifier.weight"] == "classifier"


# Parts of networks of other libraries


def test_parts_of_a_network_with_submodules_of_these_names() -> None:
    with torch.device("meta"):
        swin = models.build_model("swin_t", 3, 3, 32, {})
    assert isinstance(swin.head, nn.Linear)  # a sub-module of torchvision's network
    assert models.model_parts(swin).head == "head"
    assert swin.stages == models.model_parts(swin).stages
    cnn = models.build_model("cnn", 3, 3, 32, {})
    assert models.model_parts(cnn) == ModelParts(("stage1", "stage2", "stage3"), "classifier")


def test_parts_of_chains_and_containers() -> None:
    layer = nn.Conv2d(1, 1, 1)
    model = nn.Module()
    model.stem = nn.Conv2d(1, 1, 1)
    model.pool = nn.MaxPool2d(2)
    model.features = nn.Sequential(layer, nn.ReLU(), nn.AvgPool2d(2), nn.Sequential(layer))
    model.unused = nn.ModuleList([layer])  # not callable
    model.end = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1, 2))
    model.after_head = nn.Sequential(layer)
    name_parts(model, "classifier.1")
    assert models.model_parts(model) == ModelParts(
        ("pool", "features.2", "features.3"), "classifier.1"
    )


# Modes


def test_frozen_statistics_do_not_change_and_weights_do() -> None:
    """`freeze_batch_norm` keeps running means and variances; weight and bias get gradients."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    freeze_batch_norm(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    copied = copy.deepcopy(model)
    for each in (model, copied):
        set_train_mode(each)
        assert each.training
        assert not each[1].training
        each(torch.randn(4, 1, 2, 2)).sum().backward()
        assert each[1].weight.grad is not None
        assert all(torch.equal(value, before[name]) for name, value in each.named_buffers())


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules() if name}


def test_without_frozen_parameters_everything_is_in_train_mode() -> None:
    model = Stem().eval()
    set_train_mode(model)
    assert all(modes(model).values())
    assert model.training


def test_a_frozen_backbone_is_in_eval_mode() -> None:
    model = Stem()
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    set_train_mode(model)
    assert [name for name, training in modes(model).items() if training] == [
        "layer2",
        "layer2.0",
        "layer2.1",
        "layer2.2",
        "fc",
    ]


def test_a_frozen_part_between_trained_ones_is_in_eval_mode() -> None:
    """Its norm keeps its statistics; pooling and dropout outside it are in train mode."""
    model = Stem()
    model.layer1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    set_train_mode(model)
    frozen = {"bn1", "layer1", "layer1.0", "layer1.1", "layer1.2"}
    assert {name for name, training in modes(model).items() if not training} == frozen
    before = model.bn1.running_mean.clone()
    model.bn1(torch.randn(4, 4, 5, 5) + 3)
    assert torch.equal(model.bn1.running_mean, before)


def test_a_module_with_one_trained_parameter_is_in_train_mode() -> None:
    model = Stem()
    model.bn1.weight.requires_grad_(False)  # only the bias is trained, as in fastnet
    set_train_mode(model)
    assert all(modes(model).values())


def test_unfreezing_restores_train_mode_in_nested_and_compiled_networks() -> None:
    model = Nested()
    model.features.requires_grad_(False)
    model.scale.requires_grad_(False)
    compiled = torch.compile(model)
    set_train_mode(compiled)
    assert {name for name, training in modes(model).items() if training} == {
        "classifier",
        "classifier.0",
        "classifier.1",
    }
    model.features.requires_grad_(True)
    set_train_mode(compiled)
    assert all(modes(model).values())

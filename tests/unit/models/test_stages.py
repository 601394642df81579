"""Which stage a parameter belongs to, and what stays in eval mode when parts are frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from convlens.models.cnn import CNN
from convlens.models.stages import set_train_mode, stage_of


class Nested(nn.Module):
    """As torchvision's nets: features in one Sequential, stages that end within it."""

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
    """As a ResNet: the stem's stage ends with a pooling that has no parameters."""

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


def test_a_stage_is_all_up_to_its_last_module() -> None:
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


def test_names_that_begin_alike_are_kept_apart() -> None:
    """`stage1` and `stage10`."""
    found = stage_of(CNN(2, 1, 8, widths=[2] * 11, pool="none", hidden=3))
    assert found["stage1.0.weight"] == "stage1"
    assert found["stage10.0.weight"] == "stage10"
    assert found["stage2.0.weight"] == "stage2"
    assert found["dense.hidden.bias"] == found["classifier.weight"] == "classifier"


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules() if name}


def test_nothing_frozen_is_plain_train_mode() -> None:
    model = Stem().eval()
    set_train_mode(model)
    assert all(modes(model).values())
    assert model.training


def test_a_frozen_trunk_stays_as_it_is() -> None:
    model = Stem()
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    set_train_mode(model)
    its = modes(model)
    assert [name for name, trains in its.items() if trains] == [
        "layer2",
        "layer2.0",
        "layer2.1",
        "layer2.2",
        "fc",
    ]


def test_a_frozen_part_between_trained_ones_stays_as_it_is() -> None:
    """Its norm keeps its statistics; a pooling or dropout outside it is as in training."""
    model = Stem()
    model.layer1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    set_train_mode(model)
    frozen = {"bn1", "layer1", "layer1.0", "layer1.1", "layer1.2"}
    assert {name for name, trains in modes(model).items() if not trains} == frozen
    before = model.bn1.running_mean.clone()
    model.bn1(torch.randn(4, 4, 5, 5) + 3)
    assert torch.equal(model.bn1.running_mean, before)


def test_a_part_with_one_trained_parameter_trains() -> None:
    model = Stem()
    model.bn1.weight.requires_grad_(False)  # the bias alone is trained, as in the fast nets
    set_train_mode(model)
    assert all(modes(model).values())


def test_unfreezing_brings_train_mode_back_in_nested_and_compiled_networks() -> None:
    model = Nested()
    model.features.requires_grad_(False)
    model.scale.requires_grad_(False)
    compiled = torch.compile(model)
    set_train_mode(compiled)
    assert {name for name, trains in modes(model).items() if trains} == {
        "classifier",
        "classifier.0",
        "classifier.1",
    }
    model.features.requires_grad_(True)
    set_train_mode(compiled)
    assert all(modes(model).values())

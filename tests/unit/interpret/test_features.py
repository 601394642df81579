"""Which layers are looked at, and that what they gave is shown and not what became of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from convlens import models
from convlens.errors import UsageError
from convlens.interpret import features


def network(name: str, size: int = 32, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return models.build_model(name, 4, 3, size, options)


def test_the_stem_and_each_block_are_the_stages() -> None:
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert features.stage_names(network("resnet18", stem="imagenet")) == ("maxpool", *blocks)
    assert features.stage_names(network("cnn", widths=[4, 8])) == ("stage1", "stage2")
    assert features.stage_names(network("fastnet", widths=[4, 8])) == ("whiten", "block1", "block2")


def test_names_are_checked_all_at_once_with_near_misses() -> None:
    model = network("resnet18")
    assert features.find_layers(model, []) == features.stage_names(model)
    assert features.find_layers(model, ["layer2", "layer1.0.conv1", "layer2"]) == (
        "layer2",
        "layer1.0.conv1",
    )
    with pytest.raises(UsageError, match=r"'layr1' \(did you mean layer1.*'nothing'") as caught:
        features.find_layers(model, ["layr1", "layer2", "nothing"])
    assert "layer4.1" in caught.value.fix


def test_in_place_operations_do_not_reach_what_is_shown() -> None:
    model = network("resnet18").eval()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    images = torch.randn(2, 3, 32, 32)
    asked = ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.conv1", *features.stage_names(model)]
    found = features.layer_activations(model, images, asked)
    kept = {}  # copies, since torchvision's blocks also do `out += identity` on bn2's output
    for name in asked:
        plain.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: kept.update({name: output.clone()})
        )
    with torch.no_grad():
        plain(images)
    assert list(found) == asked
    for name in asked:
        torch.testing.assert_close(found[name], kept[name], rtol=0, atol=0, msg=name)
    assert found["bn1"].min() < 0 <= found["maxpool"].min()


def test_modes_hooks_and_shapes_are_left_as_they_were() -> None:
    model = network("cnn", widths=[4, 8]).train()
    model.stage1.eval()
    found = features.layer_activations(model, torch.randn(3, 3, 32, 32), ["stage2", "classifier"])
    assert found["classifier"].shape == (3, 4, 1, 1)
    assert not model.stage1.training
    assert model.stage2.training
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens_become_maps_and_what_takes_no_part_is_said() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.unused = nn.Conv2d(3, 6, 2, 2), nn.ReLU()
            self.flat = nn.Flatten(2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.flat(self.proj(images)).transpose(1, 2)

    model = nn.Sequential(Tokens())
    found = features.layer_activations(model, torch.randn(2, 3, 4, 4), ["0", "0.proj"])
    assert found["0"].shape == (2, 6, 1, 4)
    torch.testing.assert_close(found["0"].flatten(), found["0.proj"].flatten())
    with pytest.raises(UsageError, match=r"0\.unused: takes no part"):
        features.layer_activations(model, torch.randn(2, 3, 4, 4), ["0.unused"])

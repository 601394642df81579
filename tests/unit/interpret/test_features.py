"""Stages, layers and their recorded outputs, which later in-place operations must not change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import convlens
from convlens import models
from convlens.errors import UsageError
from convlens.interpret import features
from convlens.interpret.inputs import InspectedModel, open_inspected_model
from helpers.support import TINY


@pytest.fixture
def run() -> InspectedModel:
    convlens.train(TINY, name="small", quiet=True, test=False)
    return open_inspected_model("small", device="cpu")


def network(name: str, size: int = 32, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return models.build_model(name, 4, 3, size, options)


def test_stages_are_the_stem_and_each_block() -> None:
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert features.stage_names(network("resnet18", stem="imagenet")) == ("maxpool", *blocks)
    assert features.stage_names(network("cnn", widths=[4, 8])) == ("stage1", "stage2")
    assert features.stage_names(network("fastnet", widths=[4, 8])) == ("whiten", "block1", "block2")


def test_unknown_layers_are_refused_all_at_once_with_close_matches() -> None:
    model = network("resnet18")
    assert features.find_layers(model, []) == features.stage_names(model)
    assert features.find_layers(model, ["layer2", "layer1.0.conv1", "layer2"]) == (
        "layer2",
        "layer1.0.conv1",
    )
    with pytest.raises(UsageError, match=r"'layr1' \(did you mean layer1.*'nothing'") as caught:
        features.find_layers(model, ["layr1", "layer2", "nothing"])
    assert "layer4.1" in caught.value.fix


def test_outputs_are_not_changed_by_in_place_operations() -> None:
    model = network("resnet18").eval()
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    images = torch.randn(2, 3, 32, 32)
    names = ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.conv1", *features.stage_names(model)]
    found = features.layer_activations(model, images, names)
    expected = {}  # copies, since torchvision's blocks also do `out += identity` on bn2's output
    for name in names:
        reference.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: expected.update({name: output.clone()})
        )
    with torch.no_grad():
        reference(images)
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    assert found["bn1"].min() < 0 <= found["maxpool"].min()


def test_train_mode_and_hooks_of_the_network_are_restored() -> None:
    model = network("cnn", widths=[4, 8]).train()
    model.stage1.eval()
    found = features.layer_activations(model, torch.randn(3, 3, 32, 32), ["stage2", "classifier"])
    assert found["classifier"].shape == (3, 4, 1, 1)
    assert not model.stage1.training
    assert model.stage2.training
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens_become_maps_and_unused_layers_are_refused() -> None:
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
    with pytest.raises(UsageError, match=r"0\.unused: not used in the forward pass"):
        features.layer_activations(model, torch.randn(2, 3, 4, 4), ["0.unused"])


def test_penultimate_features_are_the_input_of_the_head(run: InspectedModel) -> None:
    images = run.split("val").rows.gather(torch.arange(10))
    outputs = list(features.penultimate_features(run, images.split(4)))
    inputs, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    head = run.model.classifier
    torch.testing.assert_close(head(inputs), logits)
    with torch.inference_mode():
        torch.testing.assert_close(logits, run.model(run.prepared(images)))
    assert not head._forward_pre_hooks
    # The maps before a convolutional head are averaged.
    squeeze = open_inspected_model("squeezenet1_1:none", device="cpu")
    (found,) = features.penultimate_features(
        squeeze, [torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]
    )
    assert (found.features.shape, found.logits.shape) == ((1, 512), (1, 1000))

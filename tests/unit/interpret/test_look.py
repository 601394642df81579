"""Views of `look`: activations, filters, top images and optimized inputs of networks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens.errors import UsageError
from convlens.interpret import features
from convlens.interpret.attribution_sanity import MIN_IMAGES_FOR_INTERVAL
from convlens.interpret.inputs import (
    EXAMPLES,
    EXAMPLES_FOR_CHECKS,
    LookInputs,
    Picture,
    open_inspected_model,
    pick_examples,
)
from convlens.interpret.look import LookOptions, look
from convlens.run import RunDir
from helpers.activation_networks import subject
from helpers.commands import brightness_model, here, picture, refused
from helpers.support import TINY

RESNET = {
    **TINY,
    "name": "res",
    "data": {"name": "digits", "per_class": 4, "image_size": 16},
    "model": {"name": "resnet18"},
    "train": {**TINY["train"], "epochs": 1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs on digits: `small` (a CNN, 8 px) and `res` (ResNet-18, 16 px)."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CONVLENS_CACHE", str(folder / "cache"))
        convlens.train(TINY, name="small", quiet=True, test=False)
        convlens.train(RESNET, name="res", quiet=True, test=False)
    return folder


@pytest.fixture
def runs(trained: Path) -> None:
    """The runs in the test's own folder."""
    shutil.copytree(trained / "models", "models")


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.usefixtures("runs", "figures_of_one_pixel")
def test_examples_are_shown_if_no_images_are_given() -> None:
    done = here("look", "small")
    assert done.code == 0, done.err
    assert "no images given" in done.err
    assert "stage1" in done.out
    result = here("look", "small", "--json").json
    correct = [each for each in result["images"] if each["truth"] == each["runs"]["small"]["label"]]
    assert len({each["truth"] for each in correct}) == len(correct) <= EXAMPLES
    assert len(result["images"]) - len(correct) <= 1, "and the worst mistake"
    assert result["folder"] == "plots/small/look"
    for file in result["files"]:
        assert Path(file).exists()
    stages = result["images"][0]["runs"]["small"]["stages"]
    assert [(each["layer"], each["channels"]) for each in stages] == [("stage1", 4), ("stage2", 8)]


def test_checks_of_maps_get_enough_examples_for_an_interval() -> None:
    assert LookOptions().num_examples == EXAMPLES
    assert LookOptions(measure=["dead"]).num_examples == 0
    why = LookOptions().with_views(["why"])
    assert (why.attribution, why.sanity) == (("all",), True)
    assert why.num_examples == EXAMPLES_FOR_CHECKS > MIN_IMAGES_FOR_INTERVAL
    with pytest.raises(UsageError, match="unknown view 'wy'"):
        LookOptions().with_views(["wy"])


def test_examples_repeat_the_classes_only_on_request() -> None:
    """Two classes; images 0, 2, 3, 5 and 6 are correct, and image 4 is the worse mistake."""
    targets = np.array([0, 0, 1, 0, 1, 1, 0])
    of_class_0 = np.array([0.9, 0.4, 0.2, 0.8, 0.99, 0.3, 0.7])
    probs = np.stack([of_class_0, 1 - of_class_0], axis=1)
    assert pick_examples(probs, targets, 4) == [0, 2, 4]
    assert pick_examples(probs, targets, 4, repeat_classes=True) == [0, 2, 3, 5, 4]
    assert pick_examples(probs, targets, 9, repeat_classes=True) == [0, 2, 3, 5, 6, 4]


@pytest.mark.usefixtures("figures_of_one_pixel")
def test_training_images_are_the_examples_of_a_run_without_validation_images() -> None:
    recipe = {**TINY, "data": {**TINY["data"], "val_fraction": 0}}
    recipe["train"] = {**TINY["train"], "keep": "last"}
    convlens.train(recipe, name="all", quiet=True, test=False)
    for options in ([], ["--top-images", "stage2"], ["--embedding", "pca"]):
        assert here("look", "all", *options).code == 0
    images = here("look", "all", "--json").json["images"]
    assert {each["name"].split(":")[0] for each in images} == {"train"}
    assert RunDir(Path("models/all")).evaluation_log() == []


@pytest.mark.usefixtures("runs")
def test_arrays_equal_those_of_a_network_without_in_place_operations() -> None:
    names = ("bn1", "layer1.0.bn2", "layer2.0")
    (image,) = here("look", "res", "test:3", "--layers", ",".join(names), "--json").json["images"]
    stored = np.load("plots/res/look/test-3-activations.npz")
    model = open_inspected_model("res", device="cpu")
    expected: dict[str, torch.Tensor] = {}
    for module in model.model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    for name in names:
        model.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: expected.update({name: output[0].clone()})
        )
    rows = model.split("test").rows.gather(torch.tensor([3]))
    with torch.no_grad():
        logits = model.model(model.prepared(rows))[0]
    for name, value in expected.items():
        np.testing.assert_array_equal(stored[name], value.numpy())
        assert stored[name].dtype == np.float32
        strength = np.abs(value.numpy()).mean((1, 2))
        assert (np.diff(strength[stored[f"order:{name}"]]) <= 1e-6).all()
    np.testing.assert_array_equal(stored["image:pixels"], rows[0].numpy())
    np.testing.assert_allclose(stored["image:logits"], logits.numpy(), rtol=1e-6)
    assert stored["image:classes"].tolist() == list(model.classes)
    assert image["runs"]["res"]["prob"] == pytest.approx(float(logits.softmax(0).max()), rel=1e-5)
    assert stored["bn1"].min() < 0


@pytest.mark.usefixtures("runs", "figures_of_one_pixel")
def test_several_networks_side_by_side_with_files_of_any_size_and_mode() -> None:
    picture(Path("a/one.png"), (200,), size=31)
    picture(Path("b/one.png"), (200, 10, 10), size=7)
    result = here("look", "small", "res", "a/one.png", "b/one.png", "test:1", "--json").json
    assert result["folder"] == "plots/look-small-res"
    names = [each["name"] for each in result["images"]]
    assert names == ["one.png", "one.png", "test:1"]
    assert [each["truth"] for each in result["images"]][:2] == [None, None]
    assert result["images"][2]["truth"] is not None
    files = sorted(Path(each).name for each in result["files"])
    assert len(files) == len(set(files)) == 3 * 5
    assert {"one-2-activations.png", "test-1-activations-res.npz"} <= set(files)
    # The second network sees the first one's test image, in its own size.
    small, res = (
        np.load(f"plots/look-small-res/test-1-activations-{n}.npz") for n in ("small", "res")
    )
    assert small["image:pixels"].shape == (1, 8, 8)
    assert res["image:pixels"].shape == (1, 16, 16)
    twice = here("look", "small", "small", "test:1", "--json").json
    assert twice["runs"] == ["small", "small-2"]
    first, second = twice["images"][0]["runs"].values()
    assert first == second


@pytest.mark.usefixtures("runs")
def test_networks_with_different_classes_predict_their_own() -> None:
    brightness_model(Path("models/light"))
    picture(Path("white.png"), (255,))
    result = here("look", "light", "small", "white.png", "--json").json
    assert result["images"][0]["runs"]["light"]["label"] == "light"
    assert result["images"][0]["runs"]["small"]["label"] in "0123456789"
    # The first run's data are not those it was made with.
    refused(here("look", "light", "small", "test:0", "--json"), 3, "changed")
    (image,) = here("look", "small", "light", "test:0", "--json").json["images"]
    assert image["truth"] in "0123456789"


@pytest.mark.usefixtures("runs", "figures_of_one_pixel")
def test_filters_top_images_and_optimized_inputs_need_no_images() -> None:
    options = ["--filters", "first,stage2", "--top-images", "stage2", "--dream", "stage1:2"]
    result = here("look", "small", *options, "--split", "train", "--channels", "3", "--json").json
    assert result["images"] == []
    assert [each["layer"] for each in result["filters"]] == ["stage1.0", "stage2.0"]
    (top,) = result["top_images"]
    assert top["split"] == "train"
    assert 0 < len(top["top"]) <= 3
    assert all(each.startswith("train:") for row in top["top"] for each in row["images"])
    (dream,) = result["made"]
    assert [each["channel"] for each in dream["made"]] == [2]
    assert dream["made"][0]["best_image"] is not None
    assert {Path(each).name for each in result["files"]} == {
        f"{name}.{kind}"
        for kind in ("png", "npz")
        for name in ("filters-stage1.0", "filters-stage2.0", "top-images-stage2", "made-stage1")
    }
    done = here("look", "small", "--dream", "stage1:2", "--split", "val")
    assert "stage1 channel 2: made input" in done.out


@pytest.mark.usefixtures("runs")
def test_dream_is_compared_with_the_top_images_of_the_same_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from convlens.interpret import feature_viz

    layers: list[str] = []
    original = feature_viz.top_activating

    def top_activating(*arguments: Any) -> feature_viz.TopImages:
        layers.append(arguments[2])
        return original(*arguments)

    monkeypatch.setattr(feature_viz, "top_activating", top_activating)
    result = convlens.look("small", top_images="stage2", dream=["stage2:1", "stage1:0"])
    assert layers == ["stage2", "stage1"], "each layer is computed once"
    assert result.made[0].best == [float(result.top_images[0].peaks[1, 0])]
    assert result.made[1].best is not None


def make_activations_infinite(folder: Path) -> None:
    """Change the weights of a model file so that activations overflow, with NaN after them."""
    from convlens import serialization

    tensors, model_metadata = serialization.read_model_file(folder / "model.safetensors")
    for name in ("stage1.0.weight", "stage2.0.weight"):
        tensors[name] = torch.full_like(tensors[name], 3e38)
        tensors[name][1::2] *= -1
    model_metadata.pop("sha256")
    serialization.write_model_file(folder / "model.safetensors", tensors, model_metadata)


@pytest.mark.usefixtures("runs")
def test_activations_that_are_not_finite_are_marked_and_reported() -> None:
    from convlens.plots.style import BROKEN

    make_activations_infinite(Path("models/small"))
    done = here("look", "small", "test:0")
    assert done.code == 0, done.err
    assert "none (NaN)" in done.out
    assert "NaN or infinite" in done.err
    drawn = pixels("plots/small/look/test-0-activations.png").reshape(-1, 3)
    assert (drawn == BROKEN).all(1).sum() > 200
    image = here("look", "small", "test:0", "--json").json["images"][0]["runs"]["small"]
    assert image["label"] is None
    assert image["stages"][1]["broken"] > 0


def test_run_whose_data_moved_still_shows_files() -> None:
    for name, color in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        for number in range(6):
            picture(Path("data") / name / f"{number}.png", color, seed=number)
    recipe: dict[str, Any] = {**TINY, "data": {"name": "data", "image_size": 8}}
    convlens.train(recipe, name="mine", quiet=True, test=False)
    Path("data").rename("elsewhere")
    (image,) = here("look", "mine", "elsewhere/red/0.png", "--json").json["images"]
    assert image["runs"]["mine"]["label"] in ("blue", "red")
    for images in (["test:0"], []):
        refused(here("look", "mine", *images), 3, "'mine' was trained on does not exist")


def test_layer_of_4096_channels_in_a_network_without_convolutions() -> None:
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 16, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 2)
    )
    net.add_module("4", torch.nn.Identity())
    net.stages, net.head = ("2",), "3"  # type: ignore[assignment]
    shown = Picture("x", torch.full((3, 4, 4), 99, dtype=torch.uint8), None)
    opened = LookInputs([subject(net)], [(shown,)], Path("out"), ["net"], ["net"])
    assert features.stage_names(net) == ("2",)
    sizes = []
    for channels in (None, 4096):
        result = look(opened, LookOptions(channels=channels))
        assert result.seen[0][0].numbers()[0].channels == 4096
        sizes.append(pixels("out/x-activations.png").shape)
    assert max(sizes[0]) < 700
    assert 700 < max(sizes[1]) < 1700
    with pytest.raises(UsageError, match="net has no convolution"):
        look(opened, LookOptions(filters=["first"]))


def test_options_determine_which_views_are_drawn() -> None:
    assert LookOptions().activations
    assert LookOptions().needs_images
    assert LookOptions(layers=["stage1"], measure=["rank"]).activations
    for options in (LookOptions(filters=["first"]), LookOptions(measure=["rank"])):
        assert not options.needs_images
    assert not LookOptions(attribution=["grad-cam"]).activations
    assert LookOptions(measure=["rank", "all"]).measures == ()
    with pytest.raises(UsageError, match="channels=0: must be at least 1"):
        LookOptions(channels=0).check()

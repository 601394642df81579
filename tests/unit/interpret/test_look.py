"""`convlens look` as a person uses it: tables, figures, arrays; and what can be wrong."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens.cli.common import print_json
from convlens.errors import UsageError
from convlens.interpret import features
from convlens.interpret.inputs import EXAMPLES, LookInputs, Picture, _is_image, open_inspected_model
from convlens.run import RunDir
from helpers.commands import Done, brightness_model, command, here, picture, refused
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
    """The runs in this test's own folder."""
    shutil.copytree(trained / "models", "models")


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.usefixtures("runs")
def test_without_images_some_are_chosen_and_said() -> None:
    done = here("look", "small")
    assert done.code == 0, done.err
    assert "no images named" in done.err
    assert "stage1" in done.out
    seen = here("look", "small", "--json").json
    right = [each for each in seen["images"] if each["truth"] == each["runs"]["small"]["label"]]
    assert len({each["truth"] for each in right}) == len(right) <= EXAMPLES
    assert len(seen["images"]) - len(right) <= 1, "and the surest mistake"
    assert seen["folder"] == "plots/small/look"
    for file in seen["files"]:
        assert Path(file).exists()
    stages = seen["images"][0]["runs"]["small"]["stages"]
    assert [(each["layer"], each["channels"]) for each in stages] == [("stage1", 4), ("stage2", 8)]


@pytest.mark.usefixtures("runs")
def test_arrays_are_what_a_network_without_in_place_operations_gives() -> None:
    (seen,) = here("look", "res", "test:3", "--layers", "bn1,layer1.0.bn2,layer2.0", "--json").json[
        "images"
    ]
    stored = np.load("plots/res/look/test-3-activations.npz")
    one = open_inspected_model("res", on="cpu")
    kept: dict[str, torch.Tensor] = {}
    for module in one.model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    for name in ("bn1", "layer1.0.bn2", "layer2.0"):
        one.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: kept.update({name: output[0].clone()})
        )
    image = one.split("test").rows.gather(torch.tensor([3]))
    with torch.no_grad():
        logits = one.model(one.prepared(image))[0]
    for name, value in kept.items():
        np.testing.assert_array_equal(stored[name], value.numpy())
        assert stored[name].dtype == np.float32
        strength = np.abs(value.numpy()).mean((1, 2))
        assert (np.diff(strength[stored[f"order:{name}"]]) <= 1e-6).all()
    np.testing.assert_array_equal(stored["image:pixels"], image[0].numpy())
    np.testing.assert_allclose(stored["image:logits"], logits.numpy(), rtol=1e-6)
    assert stored["image:classes"].tolist() == list(one.classes)
    assert seen["runs"]["res"]["prob"] == pytest.approx(float(logits.softmax(0).max()), rel=1e-5)
    assert stored["bn1"].min() < 0


@pytest.mark.usefixtures("runs")
def test_several_networks_side_by_side_and_files_of_any_size_and_mode() -> None:
    picture(Path("a/one.png"), (200,), size=31)
    picture(Path("b/one.png"), (200, 10, 10), size=7)
    made = here("look", "small", "res", "a/one.png", "b/one.png", "test:1", "--json").json
    assert made["folder"] == "plots/look-small-res"
    names = [each["name"] for each in made["images"]]
    assert names == ["one.png", "one.png", "test:1"]
    assert [each["truth"] for each in made["images"]][:2] == [None, None]
    assert made["images"][2]["truth"] is not None
    files = sorted(Path(each).name for each in made["files"])
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
def test_networks_with_other_classes_say_their_own() -> None:
    brightness_model(Path("models/light"))
    picture(Path("white.png"), (255,))
    made = here("look", "light", "small", "white.png", "--json").json
    assert made["images"][0]["runs"]["light"]["label"] == "light"
    assert made["images"][0]["runs"]["small"]["label"] in "0123456789"
    told = here("look", "light", "small", "test:0", "--json")
    refused(told, 3, "changed")  # the first run's own images are others than it was made with
    (seen,) = here("look", "small", "light", "test:0", "--json").json["images"]
    assert seen["truth"] in "0123456789"


@pytest.mark.usefixtures("runs")
def test_filters_strongest_images_and_made_inputs_without_images() -> None:
    done = here(
        "look",
        "small",
        "--filters",
        "first,stage2",
        "--top-images",
        "stage2",
        "--dream",
        "stage1:2",
        "--split",
        "train",
        "--channels",
        "3",
        "--json",
    )
    made = done.json
    assert made["images"] == []
    assert [each["layer"] for each in made["filters"]] == ["stage1.0", "stage2.0"]
    (top,) = made["top_images"]
    assert top["split"] == "train"
    assert 0 < len(top["top"]) <= 3
    assert all(each.startswith("train:") for row in top["top"] for each in row["images"])
    (dream,) = made["made"]
    assert [each["channel"] for each in dream["made"]] == [2]
    assert dream["made"][0]["best_image"] is not None
    files = {Path(each).name for each in made["files"]}
    assert files == {
        f"{name}.{kind}"
        for kind in ("png", "npz")
        for name in ("filters-stage1.0", "filters-stage2.0", "top-images-stage2", "made-stage1")
    }
    told = here("look", "small", "--dream", "stage1:2", "--split", "val")
    assert "stage1 channel 2: made input" in told.out


@pytest.mark.usefixtures("runs")
def test_vector_figures_and_the_same_bytes_each_time() -> None:
    png = Path("plots/small/look/test-0-activations.png")
    for kind, begins in (("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert here("--figures", kind, "look", "small", "test:0").code == 0
        beside = png.with_suffix(f".{kind}")
        written = {path: path.read_bytes() for path in (png, beside)}
        assert written[beside].startswith(begins)
        here("--figures", kind, "look", "small", "test:0")
        assert written == {path: path.read_bytes() for path in written}
    refused(here("--figures", "gif", "look", "small"), 2, "unknown format of figures")


@pytest.mark.usefixtures("runs")
def test_the_command_in_a_process_of_its_own_and_in_python() -> None:
    picture(Path("cat.png"), (200, 10, 10))
    done = command("look", "small", "cat.png")
    assert done.code == 0, done.err
    assert "cat.png" in done.out
    assert "2 files" in done.out
    assert Path("plots/small/look/cat-activations.png").exists()
    found = convlens.look("small", "cat.png", layers="stage2", order="index", channels=2)
    assert found.seen[0][0].maps["stage2"].shape == (8, 2, 2)
    assert convlens.look(convlens.Run.load("small"), filters="first").seen == []
    with pytest.raises(UsageError, match=r"look: .*chanels") as caught:
        convlens.look("small", chanels=3)
    assert "channels" in caught.value.fix


def blow_up(folder: Path) -> None:
    """A model file whose activations overflow: infinity, and NaN behind it."""
    from convlens import serialization

    tensors, model_metadata = serialization.read_model_file(folder / "model.safetensors")
    for name in ("stage1.0.weight", "stage2.0.weight"):
        tensors[name] = torch.full_like(tensors[name], 3e38)
        tensors[name][1::2] *= -1
    model_metadata.pop("sha256")
    serialization.write_model_file(folder / "model.safetensors", tensors, model_metadata)


@pytest.mark.usefixtures("runs")
def test_activations_that_are_not_finite_are_marked_and_said() -> None:
    blow_up(Path("models/small"))
    done = here("look", "small", "test:0")
    assert done.code == 0, done.err
    assert "none (NaN)" in done.out
    assert "NaN or infinite" in done.err
    from convlens.plots.style import BROKEN

    drawn = pixels("plots/small/look/test-0-activations.png").reshape(-1, 3)
    assert (drawn == BROKEN).all(1).sum() > 200
    seen = here("look", "small", "test:0", "--json").json["images"][0]["runs"]["small"]
    assert seen["label"] is None
    assert seen["stages"][1]["broken"] > 0


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["small", "test:0", "--layers", "stage3,stage2"], 2, "'stage3' (did you mean stage"),
        (["smal", "test:0"], 2, "did you mean small"),
        (["cat.png"], 2, "no run to look into, only images: cat.png"),
        (["small", "missing.png"], 3, "there is no such file"),
        (["small", "broken.png"], 3, "can't be read"),
        (["small", "test:9999"], 2, "test:9999 isn't there"),
        (["small", "class:cow:1"], 2, "unknown class 'cow'"),
        (["small", "--order", "size"], 2, "unknown order"),
        (["small", "--filters", "classifier"], 2, "classifier of small has no convolution"),
        (["small", "--top-images", "stagge1"], 2, "did you mean stage1"),
        (["small", "--dream", "stage1:99"], 2, "no channel 99"),
        (["small", "--dream", "stage1:x"], 2, "no channels x"),
        (["begun", "test:0"], 4, "no weights yet"),
        (["squeezenet1_1:none", "test:0"], 2, "no run of convlens"),
        (["squeezenet1_1:none"], 2, "no run of convlens"),
    ],
)
def test_what_can_not_be_is_said(arguments: list[str], code: int, said: str) -> None:
    Path("models/begun/state").mkdir(parents=True)
    picture(Path("cat.png"), (1, 2, 3))
    Path("broken.png").write_bytes(b"nothing")
    refused(here("look", *arguments), code, said)


def test_a_run_whose_data_has_moved_still_shows_files(tmp_path: Path) -> None:
    for name, color in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        for number in range(6):
            picture(Path("data") / name / f"{number}.png", color, seed=number)
    recipe: dict[str, Any] = {**TINY, "data": {"name": "data", "image_size": 8}}
    convlens.train(recipe, name="mine", quiet=True, test=False)
    Path("data").rename("elsewhere")
    (seen,) = here("look", "mine", "elsewhere/red/0.png", "--json").json["images"]
    assert seen["runs"]["mine"]["label"] in ("blue", "red")
    for images in (["test:0"], []):
        refused(here("look", "mine", *images), 3, "the images of mine can't be found")


def test_a_layer_of_4096_channels_and_a_network_without_convolutions() -> None:
    from convlens.interpret.look import LookOptions, look
    from helpers.activation_networks import subject

    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 16, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 2)
    )
    net.add_module("4", torch.nn.Identity())
    net.stages, net.head = ("2",), "3"  # type: ignore[assignment]
    one = subject(net)
    shown = Picture("x", torch.full((3, 4, 4), 99, dtype=torch.uint8), None)
    opened = LookInputs([one], [(shown,)], Path("out"), ["net"], ["net"])
    assert features.stage_names(net) == ("2",)
    sizes = []
    for channels in (None, 4096):
        found = look(opened, LookOptions(channels=channels))
        assert found.seen[0][0].numbers()[0].channels == 4096
        sizes.append(pixels("out/x-activations.png").shape)
    assert max(sizes[0]) < 700
    assert 700 < max(sizes[1]) < 1700
    with pytest.raises(UsageError, match="net has no convolution"):
        look(opened, LookOptions(filters=["first"]))


def test_arguments_are_told_apart() -> None:
    Path("models/x").mkdir(parents=True)
    Path("photos").mkdir()
    picture(Path("photos/a.png"), (1, 2, 3))
    Path("class:cat").write_text("")
    runs = ["x", "models/x", "resnet18:none", "timm/resnet18", "unknown", "a.safetensors"]
    for text in runs:
        assert not _is_image(text), text
    for text in ("photos", "photos/*.png", "none.png", "test:1", "worst:3", "class:cat:3"):
        assert _is_image(text), text


def test_help_names_the_arguments() -> None:
    done: Done = here("look", "--help")
    assert done.code == 0
    assert "RUN... [IMAGE]..." in done.out


@pytest.mark.usefixtures("runs")
def test_the_test_split_is_opened_by_who_names_it_and_each_look_is_logged() -> None:
    log = RunDir(Path("models/small")).log
    for asked in (
        [],
        ["val:1"],
        ["--top-images", "stage2"],
        ["--dream", "stage1:0"],
        ["--measure", "dead"],
        ["--embedding", "pca"],
    ):
        done = here("look", "small", *asked, "--json")
        assert done.code == 0, done.err
        assert log() == [], asked
    for number, asked in enumerate(
        (["test:1", "worst:1"], ["--embedding", "pca", "--split", "test"])
    ):
        done = here("look", "small", *asked, "--json")
        assert f"test set used {('once', '2 times')[number]} (logged)" in " ".join(done.err.split())
        assert [(e["split"], e["looks"], e["by"]) for e in log()] == [
            ("test", n + 1, "look") for n in range(number + 1)
        ]
    # They are no measurements, but count.
    assert RunDir(Path("models/small")).evaluations() == []
    assert here("evaluate", "small", "--json").json["looks"] == 3


def test_without_validation_images_training_images_are_the_examples() -> None:
    all_of_it = {**TINY, "data": {**TINY["data"], "val_fraction": 0}}
    all_of_it["train"] = {**TINY["train"], "keep": "last"}
    convlens.train(all_of_it, name="all", quiet=True, test=False)
    for asked in ([], ["--top-images", "stage2"], ["--embedding", "pca"]):
        assert here("look", "all", *asked).code == 0
    seen = here("look", "all", "--json").json["images"]
    assert {each["name"].split(":")[0] for each in seen} == {"train"}
    assert RunDir(Path("models/all")).evaluation_log() == []


def test_options_that_would_do_nothing_are_refused() -> None:
    for option in (["--split", "val"], ["--data", "digits"]):
        refused(here("look", "small", *option), 2, "is about something else")


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(True, {"a": [math.nan, 1.5, (math.inf, None)], "b": np.float64("nan")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, [None, None]], "b": None}

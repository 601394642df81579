"""Attribution of one or several networks: values, files, printed tables and refused arguments."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import convlens
from convlens import device, models
from convlens.cli.look import print_attributions
from convlens.errors import ModelFileError, UsageError
from convlens.interpret.attribution import Attributions, attribute
from convlens.interpret.attribution_methods import METHODS
from convlens.interpret.inputs import InspectedModel, Picture, open_inspected_model, select_pictures
from convlens.run import LoadedModel, Preprocessing
from helpers.commands import brightness_model
from helpers.support import TINY

CLASSES = ("cat", "dog", "cow")


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run `small`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convlens.train(TINY, name="small", quiet=True, test=False)
    return folder / "models" / "small"


@pytest.fixture
def run(run_path: Path) -> InspectedModel:
    return open_inspected_model(str(run_path), device="cpu")


def subject(
    model: nn.Module, channels: int = 3, size: int = 12, name: str = "net"
) -> InspectedModel:
    pre = Preprocessing(size, channels, "stretch", [0.5] * channels, [0.25] * channels)
    plan = device.Plan("cpu", "fp32", "contiguous")
    return InspectedModel(name, LoadedModel(model.eval(), CLASSES, pre, {}), plan)


def network(channels: int = 3, size: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return models.build_model("cnn", 3, channels, size, {"widths": [4, 8]})


def pictures(count: int = 2, channels: int = 3, size: int = 12) -> list[Picture]:
    shape = (count, channels, size, size)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return [Picture(f"test:{i}", each, i % 3) for i, each in enumerate(pixels)]


def shown(found: Attributions) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_attributions(found)
    return out.getvalue()


def test_attribution_of_a_run_writes_maps_figure_and_arrays(run: InspectedModel) -> None:
    chosen = select_pictures(run, ["test:3", "class:7:2"])
    found = attribute([run], [chosen], ["all"], sanity=True, folder=Path("out"), quiet=True)
    (model,) = found.to_dict()["models"]
    assert (model["model"], model["layer"], model["layer_size"]) == ("small", "stage1", 4)
    logits = run.model(run.prepared(torch.stack([each.pixels for each in chosen]))).detach()
    preds = logits.argmax(1).tolist()
    for row, pred, each in zip(model["images"], preds, chosen, strict=True):
        assert row["predicted"] == row["class"] == run.classes[pred]
        assert row["truth"] == run.classes[each.label]
        assert row["probability"] == row["predicted_probability"]
        sums = row["completeness"]["integrated-gradients"]
        assert sums["sum"] == pytest.approx(sums["expected"], rel=0.06)
        for name, method in METHODS.items():
            low, high = row["ranges"][name]
            assert low <= high
            assert method.signed or low >= 0
    with np.load(found.arrays) as arrays:
        assert arrays["small/grad-cam"].shape == (3, 4, 4)
        assert arrays["small/occlusion"].shape == (3, 8, 8)
        assert arrays["small/images"].tolist() == [each.name for each in chosen]
        assert arrays["small/classes"].tolist() == [run.classes[pred] for pred in preds]
        assert (arrays["small/pixels"][0] == chosen[0].pixels.numpy()).all()
    files = {str(path) for path in Path("out").iterdir()}
    assert files == {str(found.figure), str(found.arrays), "out/attribution-sanity-small.png"}
    assert model["sanity"]["methods"]["occlusion"]["areas"]["deletion"]["n"] == 3
    printed = shown(found)
    assert "Grad-CAM in stage1, 4x4" in printed
    assert "random order" in printed
    assert "Occlusion: " in printed
    again = attribute([run], [chosen], ["all"], sanity=True, folder=Path("out2"), quiet=True)
    assert again.figure.read_bytes() == found.figure.read_bytes()


def test_requested_class_is_attributed_instead_of_the_predicted_one() -> None:
    """The logits are (0, 8 (mean - 1/2)): maps of `light` add up to the second, of `dark` to 0."""
    brightness_model(Path("models/bright"))
    run = open_inspected_model("bright", device="cpu")
    bright = [Picture("bright", torch.full((3, 8, 8), 230, dtype=torch.uint8), 1)]
    folder = Path("out")
    sums = {}
    for target in ("dark", "light", None):
        found = attribute(
            [run], [bright], ["integrated-gradients"], target=target, folder=folder, quiet=True
        ).to_dict()["models"][0]["images"][0]
        assert found["predicted"] == "light"
        assert found["class"] == (target or "light")
        sums[target] = found["completeness"]["integrated-gradients"]["sum"]
    assert sums["light"] == sums[None] == pytest.approx(8 * 230 / 255, rel=1e-4)
    assert sums["dark"] == 0
    with pytest.raises(UsageError, match="unknown class 'lihgt'") as caught:
        attribute([run], [bright], ["occlusion"], target="lihgt", folder=folder)
    assert (caught.value.where, caught.value.fix) == ("bright", "did you mean light?")


def test_networks_of_different_sizes_and_channels_side_by_side() -> None:
    subjects = [subject(network(), name="one"), subject(network(1, 28), 1, 28, name="two")]
    chosen = [pictures(), pictures(channels=1, size=28)]
    found = attribute(
        subjects, chosen, ["grad-cam", "occlusion"], target="cow", folder=Path("out"), quiet=True
    )
    models_ = found.to_dict()["models"]
    assert [(m["model"], m["layer"], m["layer_size"]) for m in models_] == [
        ("one", "stage2", 3),
        ("two", "stage2", 7),
    ]
    assert {row["class"] for m in models_ for row in m["images"]} == {"cow"}
    assert found.figure.is_file()
    assert shown(found).count("maps of") == 2


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        (
            {"methods": ["grad-cam", "oclusion"]},
            "unknown attribution method",
            "did you mean occlusion?",
        ),
        ({"layer": "stge1"}, "'stge1' .did you mean stage1", "its stages are: stage1, stage2"),
        ({"layer": "classifier"}, "layer 'classifier' is 3, not channels", "occlusion"),
        ({"target": "dgo"}, "unknown class 'dgo'", "did you mean dog?"),
        ({"pictures": [[]]}, "no images", "test:17"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, object], message: str, fix: str) -> None:
    arguments: dict[str, object] = {"methods": ["grad-cam"], "pictures": [pictures()]} | options
    with pytest.raises(UsageError, match=message) as caught:
        attribute([subject(network())], folder=Path("out"), **arguments)  # type: ignore[arg-type]
    assert fix in caught.value.fix
    assert not Path("out").exists()


def test_network_without_convolutions_is_refused_with_the_methods_that_work() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    with pytest.raises(UsageError, match="no stage with maps larger than 1x1") as caught:
        attribute([subject(linear)], [pictures()], ["all"], folder=Path("out"))
    assert "integrated-gradients, occlusion" in caught.value.fix
    found = attribute(
        [subject(linear)],
        [pictures()],
        ["integrated-gradients", "occlusion"],
        folder=Path("out"),
        quiet=True,
    )
    assert found.to_dict()["models"][0]["layer"] is None


def test_diverged_networks_are_refused() -> None:
    broken = network()
    with torch.no_grad():
        broken.get_parameter("classifier.bias")[0] = float("nan")
    with pytest.raises(ModelFileError, match="not finite for 2 of 2 images"):
        attribute([subject(broken)], [pictures()], ["grad-cam"], folder=Path("out"))


def test_map_that_is_zero_everywhere_is_drawn_and_reported() -> None:
    blank = network()
    with torch.no_grad():
        blank.get_parameter("classifier.weight").zero_()
    found = attribute(
        [subject(blank)], [pictures()], ["all"], sanity=True, folder=Path("out"), quiet=True
    )
    (model,) = found.to_dict()["models"]
    assert model["images"][0]["ranges"]["grad-cam"] == [0, 0]
    assert "the maps are constant" in model["sanity"]["methods"]["grad-cam"]["verdict"][0]


def test_networks_of_the_same_name_have_separate_files(run: InspectedModel) -> None:
    shown_ = select_pictures(run, ["val:3"])
    found = attribute(
        [run, run], [shown_, shown_], ["grad-cam"], sanity=True, folder=Path("out"), quiet=True
    )
    assert [path.name for path in found.sanity_figures] == [
        "attribution-sanity-small.png",
        "attribution-sanity-small-2.png",
    ]
    with np.load(found.arrays) as arrays:
        assert {"small/grad-cam", "small-2/grad-cam"} <= {*arrays}

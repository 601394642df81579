"""The command `convlens look`: options, exit codes, output, and the log of the test split."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import convlens
from convlens.cli.common import print_json
from convlens.errors import UsageError
from convlens.interpret.attribution_methods import METHODS
from convlens.interpret.measure import NAMES
from convlens.run import RunDir
from helpers.commands import Done, command, here, picture, refused
from helpers.support import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of one recipe and different seeds, whose test splits are sealed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CONVLENS_CACHE", str(folder / "cache"))
        for seed, name in enumerate(("one", "two")):
            convlens.train(TINY, {"train.seed": seed}, name=name, quiet=True, test=False)
    return folder


@pytest.fixture(autouse=True)
def runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs in the test's own folder."""
    monkeypatch.setenv("CONVLENS_CACHE", str(trained / "cache"))
    shutil.copytree(trained / "models", "models")


# Output


@pytest.mark.usefixtures("figures_of_one_pixel")
def test_attribution_of_a_requested_class() -> None:
    maps = ("--attribution", "grad-cam,occlusion", "--class", "7")
    done = here("look", "one", "two", "val:0", *maps, "--json")
    assert done.code == 0, done.err
    result = done.json["attribution"]
    assert [model["model"] for model in result["models"]] == ["one", "two"]
    for model in result["models"]:
        (image,) = model["images"]
        assert (image["image"], image["class"]) == ("val:0", "7")
        assert set(image["ranges"]) == {"grad-cam", "occlusion"}
    assert done.json["images"] == [], "activations are only drawn on request beside attribution"
    assert result["figure"] in done.json["files"]
    with np.load(result["arrays"]) as arrays:
        assert all(
            np.isfinite(arrays[key]).all() for key in arrays if arrays[key].dtype.kind == "f"
        )


@pytest.mark.usefixtures("figures_of_one_pixel")
def test_measurements_embeddings_and_neighbors_in_one_command() -> None:
    options = [
        "--measure",
        "probe,rank",
        "--embedding",
        "pca",
        "--split",
        "val",
        "--nearest",
        "2",
        "--json",
    ]
    done = here("look", "one", "val:1", *options)
    assert done.code == 0, done.err
    (network,) = done.json["measures"]["networks"]
    assert set(network["stages"]) == {"stage1", "stage2"}
    assert set(network["stages"]["stage2"]) == {"probe", "rank"}
    assert [each["method"] for each in done.json["embeddings"]] == ["pca"]
    (near,) = done.json["neighbours"]
    assert len(near["images"][0]["neighbours"]) == 2
    files = [Path(file) for file in done.json["files"]]
    assert {file.name for file in files} >= {"measures.png", "embedding-pca.png", "nearest.png"}
    assert all(file.is_file() for file in files)


@pytest.mark.usefixtures("figures_of_one_pixel")
def test_text_output_has_a_section_for_each_view() -> None:
    done = here("look", "one", "val:1", "--attribution", "grad-cam", "--nearest", "1")
    assert done.code == 0, done.err
    assert "Grad-CAM" in done.out
    assert "nearest" in done.out
    assert done.out.splitlines()[-1].endswith("plots/one/look")


def test_image_named_twice_is_shown_once() -> None:
    done = here("look", "one", "val:2", "val:1", "val:2", "--json")
    assert [each["name"] for each in done.json["images"]] == ["val:2", "val:1"]


def test_subprocess_and_python_api_give_the_same_views() -> None:
    picture(Path("cat.png"), (200, 10, 10))
    done = command("look", "one", "cat.png")
    assert done.code == 0, done.err
    assert "cat.png" in done.out
    assert "2 files" in done.out
    assert Path("plots/one/look/cat-activations.png").exists()
    result = convlens.look("one", "cat.png", layers="stage2", order="index", channels=2)
    assert result.seen[0][0].maps["stage2"].shape == (8, 2, 2)
    assert convlens.look(convlens.Run.load("one"), filters="first").seen == []
    with pytest.raises(UsageError, match=r"look: .*chanels") as caught:
        convlens.look("one", chanels=3)
    assert "channels" in caught.value.fix


def test_vector_figures_have_the_same_bytes_each_time() -> None:
    png = Path("plots/one/look/val-0-activations.png")
    for kind, magic in (("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert here("--figures", kind, "look", "one", "val:0").code == 0
        vector = png.with_suffix(f".{kind}")
        written = {path: path.read_bytes() for path in (png, vector)}
        assert written[vector].startswith(magic)
        here("--figures", kind, "look", "one", "val:0")
        assert written == {path: path.read_bytes() for path in written}
    refused(here("--figures", "gif", "look", "one"), 2, "unknown format of figures")


def test_json_replaces_nan_by_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(True, {"a": [math.nan, 1.5, (math.inf, None)], "b": np.float64("nan")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, [None, None]], "b": None}


def test_help_names_the_arguments() -> None:
    done: Done = here("look", "--help")
    assert done.code == 0
    assert "RUN... [IMAGE]..." in done.out


@pytest.mark.usefixtures("figures_of_one_pixel")
def test_ready_made_views_stand_for_options() -> None:
    inside = here("look", "one", "val:0", "--inside", "--json").json
    assert [each["name"] for each in inside["images"]] == ["val:0"]
    assert [each["layer"] for each in inside["filters"]] == ["stage1.0"]
    assert inside["attribution"] is inside["measures"] is None
    both = here("look", "one", "val:0", "--why", "--knows", "--measure", "dead,rank", "--json").json
    (image,) = both["attribution"]["models"][0]["images"]
    assert set(image["ranges"]) == {*METHODS}
    assert both["attribution"]["models"][0]["sanity"] is not None
    assert set(both["measures"]["measures"]) == {"dead", "rank"}, "options that are set are kept"
    assert both["images"] == both["filters"] == []


def test_help_names_all_methods_and_measurements() -> None:
    out = here("look", "--help").out
    for name in (*METHODS, *NAMES):
        assert name in out
    assert out.index("Ready-made views") < out.index("Fine control: layers")


# The sealed test split


@pytest.mark.usefixtures("figures_of_one_pixel")
def test_test_split_is_used_only_on_request_and_each_use_is_logged() -> None:
    log = RunDir(Path("models/one")).evaluation_log
    for arguments in (
        [],
        ["val:1"],
        ["--top-images", "stage2"],
        ["--dream", "stage1:0"],
        ["--measure", "dead"],
        ["--embedding", "pca"],
        ["--attribution", "grad-cam"],
    ):
        done = here("look", "one", *arguments, "--json")
        assert done.code == 0, done.err
        assert log() == [], arguments
    for number, arguments in enumerate(
        (["test:1", "worst:1"], ["--embedding", "pca", "--split", "test"])
    ):
        done = here("look", "one", *arguments, "--json")
        assert f"test set used {('once', '2 times')[number]} (logged)" in " ".join(done.err.split())
        assert [(e["split"], e["looks"], e["by"]) for e in log()] == [
            ("test", n + 1, "look") for n in range(number + 1)
        ]
    # They are not evaluations, but they count.
    assert RunDir(Path("models/one")).evaluations() == []
    assert here("evaluate", "one", "--json").json["looks"] == 3


# Usage errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["one", "test:0", "--layers", "stage3,stage2"], 2, "'stage3' (did you mean stage"),
        (["on", "test:0"], 2, "did you mean one"),
        (["cat.png"], 2, "no run given, only images: cat.png"),
        (["one", "missing.png"], 3, "there is no such file"),
        (["one", "broken.png"], 3, "can't be read"),
        (["one", "test:9999"], 2, "test:9999 does not exist"),
        (["one", "class:3"], 2, "write class:3:3"),
        (["one", "class:cow:1"], 2, "unknown class 'cow'"),
        (["one", "--order", "size"], 2, "unknown order"),
        (["one", "--filters", "classifier"], 2, "classifier of one has no convolution"),
        (["one", "--top-images", "stagge1"], 2, "did you mean stage1"),
        (["one", "--dream", "stage1:99"], 2, "no channel 99"),
        (["one", "--dream", "stage1:x"], 2, "not a channel: x"),
        (["unfinished", "test:0"], 4, "no weights yet"),
        (["squeezenet1_1:none", "test:0"], 2, "not a convlens run"),
        (["squeezenet1_1:none"], 2, "not a convlens run"),
        (["one", "--attribution", "gradcam"], 2, "did you mean grad-cam"),
        (["one", "--class", "7"], 2, "--class: no effect without --attribution"),
        (["one", "--sanity", "--cam-layer", "stage1"], 2, "--cam-layer, --sanity: no effect"),
        (["one", "--untrained"], 2, "add --measure"),
        (["one", "--measure", "prob"], 2, "did you mean probe"),
        (["one", "--embedding", "umap"], 2, "unknown embedding 'umap'"),
        (["one", "--split", "tets"], 2, "did you mean test"),
        (["one", "--split", "val"], 2, "--split: no effect without --measure"),
        (["one", "cat.png", "--data", "digits"], 2, "--data: no effect, because no image"),
        (["one", "wors:5"], 2, "did you mean worst:5?"),
        (["one", "class:3:1", "class:tre:1"], 2, "unknown class 'tre'"),
        (["one", "val:0", "--attribution", "grad-cam", "--class", "cat"], 2, "'cat'"),
    ],
)
def test_invalid_arguments_are_refused(arguments: list[str], code: int, message: str) -> None:
    Path("models/unfinished/state").mkdir(parents=True)
    picture(Path("cat.png"), (1, 2, 3))
    Path("broken.png").write_bytes(b"nothing")
    refused(here("look", *arguments), code, message)
    assert RunDir(Path("models/one")).evaluation_log() == []  # a command that fails costs no use


def test_missing_data_is_refused_before_anything_is_drawn() -> None:
    for option in (["--nearest", "2"], ["--embedding", "pca"]):
        done = here("look", "one", "squeezenet1_1:none", "val:0", *option)
        refused(done, 2, "squeezenet1_1:none is not a convlens run")
    assert not Path("plots/look-one-squeezenet1_1-none").exists()

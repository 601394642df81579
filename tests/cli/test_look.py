"""`convlens look` with evidence, measurements, maps and neighbours: one command, one result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import convlens
from helpers.commands import here, refused
from helpers.support import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of one recipe that differ in their seed, their test split sealed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CONVLENS_CACHE", str(folder / "cache"))
        for seed, name in enumerate(("one", "two")):
            convlens.train(TINY, {"train.seed": seed}, name=name, quiet=True, test=False)
    return folder


@pytest.fixture(autouse=True)
def runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("CONVLENS_CACHE", str(trained / "cache"))


def test_evidence_for_a_class_that_was_asked_for() -> None:
    maps = ("--attribution", "grad-cam,occlusion", "--class", "7")
    done = here("look", "one", "two", "val:0", *maps, "--json")
    assert done.code == 0, done.err
    found = done.json["attribution"]
    assert [model["model"] for model in found["models"]] == ["one", "two"]
    for model in found["models"]:
        (image,) = model["images"]
        assert (image["image"], image["class"]) == ("val:0", "7")
        assert set(image["ranges"]) == {"grad-cam", "occlusion"}
    assert done.json["images"] == [], "activations are not drawn unasked beside evidence"
    assert found["figure"] in done.json["files"]
    with np.load(found["arrays"]) as arrays:
        assert all(
            np.isfinite(arrays[key]).all() for key in arrays if arrays[key].dtype.kind == "f"
        )


def test_measurements_maps_and_neighbours_in_one_command() -> None:
    done = here(
        "look",
        "one",
        "val:1",
        "--measure",
        "probe,rank",
        "--embedding",
        "pca",
        "--split",
        "val",
        "--nearest",
        "2",
        "--json",
    )
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


def test_an_image_that_is_named_twice_is_shown_once() -> None:
    done = here("look", "one", "val:2", "val:1", "val:2", "--json")
    assert [each["name"] for each in done.json["images"]] == ["val:2", "val:1"]
    refused(here("look", "one", "class:3"), 2, "write class:3:3")


def test_what_people_read_has_a_part_for_each() -> None:
    done = here("look", "one", "val:1", "--attribution", "grad-cam", "--nearest", "1")
    assert done.code == 0, done.err
    assert "Grad-CAM" in done.out
    assert "nearest" in done.out
    assert done.out.splitlines()[-1].endswith("plots/one/look")


def test_a_sealed_test_split_stays_so_until_it_is_asked_for() -> None:
    for arguments in (["one"], ["one", "--measure", "rank"], ["one", "--attribution", "grad-cam"]):
        done = here("look", *arguments, "--json")
        assert done.code == 0, done.err
        assert convlens.Run.load("one").run_dir.evaluation_log() == []
    assert here("look", "two", "test:0", "--json").code == 0
    (look,) = convlens.Run.load("two").run_dir.evaluation_log()
    assert (look["split"], look["looks"], look["by"]) == ("test", 1, "look")


def test_what_needs_data_is_refused_before_anything_is_drawn() -> None:
    for option in (["--nearest", "2"], ["--embedding", "pca"]):
        done = here("look", "one", "squeezenet1_1:none", "val:0", *option)
        refused(done, 2, "squeezenet1_1:none is no run of convlens")
    assert not Path("plots/look-one-squeezenet1_1-none").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attribution", "gradcam"], "did you mean grad-cam"),
        (["--class", "7"], "--class is about something else"),
        (["--sanity", "--cam-layer", "stage1"], "--cam-layer, --sanity is about"),
        (["--untrained"], "add --measure"),
        (["--measure", "prob"], "did you mean probe"),
        (["--embedding", "umap"], "unknown embedding 'umap'"),
        (["--split", "tst"], "did you mean test"),
        (["val:0", "--attribution", "grad-cam", "--class", "cat"], "'cat'"),
    ],
)
def test_options_that_can_not_be(arguments: list[str], said: str) -> None:
    refused(here("look", "one", *arguments), 2, said)

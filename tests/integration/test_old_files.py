"""Files of earlier versions are read by this one: `files/README.md` says what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import convlens
from convlens import serialization
from convlens.run import METRICS_COLUMNS, RunDir, load_model
from helpers.commands import here, refused
from helpers.paths import TESTS

FILES = TESTS / "files"
FOLDERS = {"v1": 1}  # and the format of its model file

every = pytest.mark.parametrize("folder", FOLDERS)


def copied(folder: str) -> RunDir:
    return RunDir(Path(shutil.copytree(FILES / folder / "run", "models/run")))


def test_every_folder_is_tested_and_small() -> None:
    assert {path.name for path in FILES.iterdir() if path.is_dir()} - {"__pycache__"} == set(
        FOLDERS
    )
    assert sum(path.stat().st_size for path in FILES.rglob("*")) < 100_000 * len(FOLDERS)


def test_a_new_format_needs_a_new_folder() -> None:
    """If this fails, `files/README.md` says what to add."""
    assert set(range(1, serialization.MODEL_FORMAT + 1)) == set(FOLDERS.values())


@every
def test_the_model_is_whole_and_of_its_format(folder: str) -> None:
    place = copied(folder)
    tensors, model_metadata = serialization.read_model_file(place.model_path)
    assert model_metadata["format"] == FOLDERS[folder]
    loaded = load_model(place.model_path)
    assert loaded.classes == tuple("0123456789")
    assert set(loaded.model.state_dict()) == set(tensors)


@every
def test_it_tests_to_the_numbers_that_were_stored(folder: str) -> None:
    place = copied(folder)
    (stored,) = json.loads((place.path / "results.json").read_text())
    done = here("evaluate", "run", "--json")
    assert done.code == 0, done.err
    found = done.json
    for key in ("n", "correct", "accuracy", "interval95", "confusion", "data_fingerprint"):
        assert found[key] == stored[key], key
    assert found["model_sha256"] == stored["model_sha256"]
    assert found["loss"] == pytest.approx(stored["loss"], abs=1e-6)
    assert found["looks"] == 2
    first, second = place.evaluation_log()
    assert first == {key: value for key, value in stored.items() if key not in ("format", "sha256")}
    assert second["correct"] == stored["correct"]


@every
def test_the_same_recipe_finds_it_and_other_commands_read_it(folder: str) -> None:
    place = copied(folder)
    before = place.metadata()
    assert len(place.metrics()) == before["epochs"] == 8
    assert list(place.metrics()[0]) == list(METRICS_COLUMNS)
    run = convlens.train(convlens.Run.load("run").recipe, name="run", test=False)
    assert run.path == place.path
    assert place.metadata() == before
    for command in ("diagnose", "report"):
        done = here(command, "run")
        assert done.code == 0, done.err
    done = here("predict", "run", "--help")
    assert done.code == 0


def test_a_run_of_a_later_version_says_so() -> None:
    place = copied("v1")
    path = place.path / "recipe.yaml"
    path.write_text(path.read_text().replace("train:", "train:\n  teleport: true", 1))
    done = here("labels", place.path, "--folds", "2")
    refused(done, 2, "unknown key 'train.teleport'")  # of its own version: somebody's mistake
    place.update_metadata({"convlens": "99.1"})
    done = here("labels", place.path, "--folds", "2")
    refused(done, 4, "written by convlens 99.1, which knows more than this one", "update convlens")
    tensors, model_metadata = serialization.read_model_file(place.model_path)
    model_metadata["recipe"]["train"]["teleport"] = True
    place.save_model(tensors, {**model_metadata, "convlens": "99.1"})
    path.unlink()
    refused(here("report", "run"), 4, "written by convlens 99.1", "update convlens")
    with pytest.raises(serialization.NewerFormatError, match=r"written by convlens 99\.1"):
        _ = convlens.Run.load("run").recipe
    model_metadata["preprocessing"]["gamma"] = 2.2
    place.save_model(tensors, {**model_metadata, "convlens": "99.1"})
    refused(here("report", "run"), 4, "cannot be used by this version", "update", "convlens 99.1")


@every
def test_left_unfinished_it_goes_on(folder: str) -> None:
    place = copied(folder)
    place.update_metadata({"status": "training"})
    done = here("train", place.path / "recipe.yaml", "--name", "run", "--no-test")
    assert done.code == 0, done.err
    assert place.is_finished
    assert len(place.metrics()) == 8
    assert "sha256" not in json.loads((place.path / "run.json").read_text())

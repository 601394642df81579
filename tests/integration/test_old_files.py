"""Files of earlier versions stay readable; `files/README.md` describes them."""

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
FOLDERS = {"v1": 1}  # folder name: format of its model file

every = pytest.mark.parametrize("folder", FOLDERS)


def copied(folder: str) -> RunDir:
    return RunDir(Path(shutil.copytree(FILES / folder / "run", "models/run")))


def test_every_folder_is_tested_and_small() -> None:
    assert {path.name for path in FILES.iterdir() if path.is_dir()} - {"__pycache__"} == set(
        FOLDERS
    )
    assert sum(path.stat().st_size for path in FILES.rglob("*")) < 100_000 * len(FOLDERS)


def test_a_new_format_needs_a_new_folder() -> None:
    """If this fails, follow `files/README.md` to add files of the new format."""
    assert set(range(1, serialization.MODEL_FORMAT + 1)) == set(FOLDERS.values())


@every
def test_the_model_file_has_its_format_and_loads(folder: str) -> None:
    run_dir = copied(folder)
    tensors, model_metadata = serialization.read_model_file(run_dir.model_path)
    assert model_metadata["format"] == FOLDERS[folder]
    loaded = load_model(run_dir.model_path)
    assert loaded.classes == tuple("0123456789")
    assert set(loaded.model.state_dict()) == set(tensors)


@every
def test_evaluation_gives_the_stored_numbers(folder: str) -> None:
    run_dir = copied(folder)
    (stored,) = json.loads((run_dir.path / "results.json").read_text())
    done = here("evaluate", "run", "--json")
    assert done.code == 0, done.err
    result = done.json
    for key in ("n", "correct", "accuracy", "interval95", "confusion", "data_fingerprint"):
        assert result[key] == stored[key], key
    assert result["model_sha256"] == stored["model_sha256"]
    assert result["loss"] == pytest.approx(stored["loss"], abs=1e-6)
    assert result["looks"] == 2
    first, second = run_dir.evaluation_log()
    assert first == {key: value for key, value in stored.items() if key not in ("format", "sha256")}
    assert second["correct"] == stored["correct"]


@every
def test_the_same_recipe_finds_the_run_and_other_commands_read_it(folder: str) -> None:
    run_dir = copied(folder)
    before = run_dir.metadata()
    assert len(run_dir.metrics()) == before["epochs"] == 8
    new_columns = ("val_macro_f1", "val_balanced_accuracy") if folder == "v1" else ()
    expected = [column for column in METRICS_COLUMNS if column not in new_columns]
    assert list(run_dir.metrics()[0]) == expected
    run = convlens.train(convlens.Run.load("run").recipe, name="run", test=False)
    assert run.path == run_dir.path
    assert run_dir.metadata() == before
    for command in ("diagnose", "report"):
        done = here(command, "run")
        assert done.code == 0, done.err
    done = here("predict", "run", "--help")
    assert done.code == 0


def test_a_run_of_a_later_version_is_refused_as_such() -> None:
    run_dir = copied("v1")
    path = run_dir.path / "recipe.yaml"
    path.write_text(path.read_text().replace("train:", "train:\n  teleport: true", 1))
    done = here("labels", run_dir.path, "--folds", "2")
    refused(done, 2, "unknown key 'train.teleport'")  # same version: a wrong key
    run_dir.update_metadata({"convlens": "99.1"})
    done = here("labels", run_dir.path, "--folds", "2")
    refused(
        done, 4, "written by convlens 99.1, which is newer than this version", "update convlens"
    )
    tensors, model_metadata = serialization.read_model_file(run_dir.model_path)
    model_metadata["recipe"]["train"]["teleport"] = True
    run_dir.save_model(tensors, {**model_metadata, "convlens": "99.1"})
    path.unlink()
    refused(here("report", "run"), 4, "written by convlens 99.1", "update convlens")
    with pytest.raises(serialization.NewerFormatError, match=r"written by convlens 99\.1"):
        _ = convlens.Run.load("run").recipe
    model_metadata["preprocessing"]["gamma"] = 2.2
    run_dir.save_model(tensors, {**model_metadata, "convlens": "99.1"})
    refused(here("report", "run"), 4, "cannot be used by this version", "update", "convlens 99.1")


@every
def test_an_unfinished_run_of_an_earlier_version_resumes(folder: str) -> None:
    run_dir = copied(folder)
    run_dir.update_metadata({"status": "training"})
    done = here("train", run_dir.path / "recipe.yaml", "--name", "run", "--no-test")
    assert done.code == 0, done.err
    assert run_dir.is_finished
    assert len(run_dir.metrics()) == 8
    assert "sha256" not in json.loads((run_dir.path / "run.json").read_text())

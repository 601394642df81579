from __future__ import annotations

import os
from pathlib import Path

import pytest

from convlens.errors import ConvlensError, UsageError
from convlens.explore import workspace as explore_workspace
from convlens.explore.jobs import Jobs, started_jobs
from convlens.explore.workspace import Workspace
from helpers.commands import brightness_model, constant_model


@pytest.fixture
def jobs() -> Jobs:
    with started_jobs() as started:
        yield started


def test_runs_are_found_by_name_folder_and_file(jobs: Jobs) -> None:
    first = brightness_model(Path("models/a"))
    second = brightness_model(Path("elsewhere/a"))
    workspace = Workspace(["a", str(second.path), str(first.model_path), "models/a"], jobs)
    assert workspace.run_ids() == ["a", "a-2", "model"]
    assert workspace.path("a-2") == second.path.absolute()
    for unknown in ("b", "", "../models/a", "models/a"):
        with pytest.raises(UsageError, match="no such run"):
            workspace.path(unknown)


def test_unknown_runs_are_an_error_with_close_matches(jobs: Jobs) -> None:
    brightness_model(Path("models/brightness"))
    Path("models/brightness/run.json").write_text("{}")
    with pytest.raises(ConvlensError) as caught:
        Workspace(["brigthness"], jobs)
    assert "brightness" in caught.value.fix


def test_runs_whose_names_are_not_utf8_have_ids_that_can_be_sent(jobs: Jobs) -> None:
    Path("models/a\udcff").mkdir(parents=True)
    Path("models/a\udcff/run.json").write_text("{}")
    workspace = Workspace([], jobs)
    assert workspace.run_ids() == ["a\\udcff"]
    assert workspace.path("a\\udcff").name == "a\udcff"


def test_runs_that_start_later_appear(jobs: Jobs) -> None:
    workspace = Workspace([], jobs)
    assert workspace.run_ids() == []
    Path("models/later").mkdir(parents=True)
    Path("models/later/run.json").write_text("{}")
    assert workspace.run_ids() == ["later"]


def test_models_stay_open_until_their_file_changes(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explore_workspace, "MAX_OPEN_RUNS", 2)
    for name in "abc":
        brightness_model(Path("models") / name)
    workspace = Workspace(list("abc"), jobs, "cpu")
    first = workspace.open("a")
    workspace.open("b")
    assert workspace.open("a") is first
    workspace.open("c")  # closes b, which was used least recently
    assert workspace.open("a") is first
    constant_model(Path("models/a"), [1.0, 0.0], ["dark", "light"])
    os.utime("models/a/model.safetensors", (1, 1))
    assert workspace.open("a") is not first


def test_images_are_found_by_their_id_until_there_are_too_many(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explore_workspace, "MAX_IMAGES", 3)
    monkeypatch.setattr(explore_workspace, "MAX_IMAGE_BYTES", 100)
    workspace = Workspace([], jobs)
    first, second, third = (workspace.add_image(name, b"x") for name in "abc")
    assert workspace.image(first.id) is first  # now the one used last
    fourth = workspace.add_image("d", b"x")
    with pytest.raises(UsageError, match="no such image"):
        workspace.image(second.id)
    large = workspace.add_image("e", b"x" * 99)
    assert workspace.image(large.id).size == 99
    assert workspace.image(fourth.id).name == "d"
    for dropped in (first, third):
        with pytest.raises(UsageError):
            workspace.image(dropped.id)

"""A data set is one data set however its name is spelled, and wherever it has moved to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from convlens import evaluation
from convlens.data import image_list
from convlens.errors import DataError
from convlens.run import RunDir, list_runs
from convlens.training import resolve, train as training_train
from helpers.commands import COLORS, here, pictures

SMALL = ("model.widths=[4]", "train.epochs=1", "augment=[]", "data.image_size=8")


def train(data: str, *overrides: str, name: str | None = None, **options: Any) -> RunDir:
    resolved = resolve.resolve_recipe(data, overrides=[*SMALL, *overrides])
    options = {"test": False, "device": "cpu", "quiet": True, **options}
    return training_train.train(resolved.recipe, name=name, **options)


def test_every_spelling_of_a_folder_finds_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(Path("plain"), dict.fromkeys(COLORS, 8))
    Path("sub").mkdir()
    Path("link").symlink_to("plain")
    Path("home").mkdir()
    monkeypatch.setenv("HOME", os.getcwd())
    first = train("plain")
    for name in ("plain/", "./plain", "sub/../plain", os.path.abspath("plain"), "link", "~/plain"):
        assert train(name).path == first.path, name
    assert train("file://" + quote(os.path.abspath("plain"))).path == first.path
    # The current folder by another name.
    Path("../other-name").symlink_to(os.getcwd())
    monkeypatch.chdir("../other-name")
    assert train("plain/").path == first.path
    assert train(os.path.join(os.environ["HOME"], "../other-name/plain")).path == first.path
    assert len(list_runs()) == 1


def test_folders_of_the_same_name_have_runs_of_their_own() -> None:
    runs = []
    for number, folder in enumerate(("a/plain", "b/plain")):
        pictures(Path(folder), dict.fromkeys(COLORS, 8), first=100 * number)
        runs.append(train(folder))
    assert runs[0].path != runs[1].path
    assert train("./b/plain").path == runs[1].path


def test_runs_that_recorded_another_spelling_are_found() -> None:
    """As earlier versions did."""
    pictures(Path("plain"), dict.fromkeys(COLORS, 8))
    recipe = resolve.resolve_recipe("plain", overrides=SMALL).recipe
    old = recipe.replace(**{"data.name": "./plain/"}).model_copy(update={"name": "plain"})
    assert old.digest() != recipe.digest()
    first = training_train.train(old, test=False, device="cpu", quiet=True)
    data = {k: v for k, v in first.metadata()["data"].items() if k != "path"}
    first.update_metadata({"data": data})
    assert data["name"] == "./plain/"
    assert train("plain").path == first.path
    longer = train("plain", "train.epochs=2", extend=True)
    assert longer.metadata()["extends"]["run"] == first.name


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_finished_run_whose_data_moved_is_found_by_the_images(name: str | None) -> None:
    pictures(Path("before"), dict.fromkeys(COLORS, 8))
    first = train("before", name=name)
    shutil.move("before", "after")
    assert train("after", name=name).path == first.path
    assert first.metadata()["data"]["path"] == os.path.abspath("after")
    # From now on without comparing images.
    assert resolve.is_run_of(resolve.resolve_recipe("after", overrides=SMALL).recipe, first)
    done = here("evaluate", first.name, "--json")
    assert done.json["data"] == "after"
    longer = train("after", "train.epochs=2", extend=True)
    assert longer.metadata()["extends"]["run"] == first.name


def test_a_named_run_is_found_by_its_images_before_and_after_they_were_recognized() -> None:
    pictures(Path("before"), dict.fromkeys(COLORS, 8))
    first = train("before", name="mine")
    shutil.move("before", "after")
    assert train("after").path == first.path
    assert train("./after").path == first.path
    assert train("after", "train.seed=1").path != first.path
    shutil.copytree("after", "copy")
    assert train("copy").path != first.path


def test_an_unfinished_run_whose_data_moved_is_resumed() -> None:
    pictures(Path("before"), dict.fromkeys(COLORS, 8))
    first = train("before")
    weights = first.model_path.read_bytes()
    first.update_metadata({"status": "training"})
    shutil.move("before", "after")
    again = train("after")
    assert again.path == first.path
    assert again.is_finished
    assert again.model_path.read_bytes()[-64:] == weights[-64:]


def test_a_copy_and_other_images_get_runs_of_their_own() -> None:
    pictures(Path("before"), dict.fromkeys(COLORS, 8))
    first = train("before")
    shutil.copytree("before", "copy")
    assert train("copy").path != first.path
    shutil.rmtree("copy")
    shutil.rmtree("before")
    pictures(Path("other"), dict.fromkeys(COLORS, 8), first=50)
    assert train("other").path != first.path


def test_an_extended_run_inherits_the_uses_of_the_test_split() -> None:
    pictures(Path("plain"), dict.fromkeys(COLORS, 8))
    first = train("plain", test=True)
    assert here("evaluate", first.name).code == 0
    assert here("evaluate", first.name, "--split", "val").code == 0
    longer = train("plain", "train.epochs=2", extend=True)
    assert longer.evaluations() == []  # the accuracies are not its own
    assert [entry["looks"] for entry in longer.evaluation_log()] == [1, 2]
    assert here("evaluate", longer.name, "--json").json["looks"] == 3
    assert len(first.evaluation_log()) == 3  # unchanged


def test_a_run_that_starts_from_another_on_the_same_data_inherits_its_uses() -> None:
    pictures(Path("plain"), dict.fromkeys(COLORS, 8))
    pictures(Path("other"), dict.fromkeys(COLORS, 8), first=50)
    first = train("plain", test=True)
    larger = train("./plain", f"model.weights={first.name}", "data.image_size=16")
    assert here("evaluate", larger.name, "--json").json["looks"] == 2
    elsewhere = train("other", f"model.weights={first.name}")
    assert elsewhere.evaluation_log() == []


def test_a_moved_data_set_that_nobody_named_is_an_error() -> None:
    pictures(Path("before"), dict.fromkeys(COLORS, 8))
    train("before")
    shutil.move("before", "after")
    with pytest.raises(DataError, match="no such file or folder"):
        train("./before")


def test_a_run_of_an_earlier_version_keeps_the_order_of_its_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Classes that are numbers were sorted by name, and drawn splits depend on the order."""
    pictures(Path("numbers"), {"2": 8, "10": 8, "9": 8})
    paths = sorted(Path("numbers").glob("*/*"))
    Path("list.csv").write_text("path,label\n" + "".join(f"{p},{p.parent.name}\n" for p in paths))
    with monkeypatch.context() as patch:
        patch.setattr(image_list, "sort_classes", lambda names: tuple(sorted(names)))
        old = train("list.csv", name="old")
    assert old.metadata()["data"]["classes"] == ["10", "2", "9"]
    extended = train("list.csv", "train.epochs=2", name="long", extend=True)
    assert extended.metadata()["data"]["classes"] == ["10", "2", "9"]
    new = train("list.csv", "train.epochs=2", name="new")
    assert new.metadata()["data"]["classes"] == ["2", "9", "10"]
    assert evaluation.evaluate(old, "val", device="cpu", quiet=True).classes == ["10", "2", "9"]


def test_a_run_on_a_file_address_is_called_like_its_folder() -> None:
    pictures(Path("my plants"), dict.fromkeys(COLORS, 8))
    address = "file://" + quote(os.path.abspath("my plants"))
    recipe = resolve.resolve_recipe(address, overrides=SMALL).recipe
    assert (recipe.name, recipe.data.name) == ("my plants", "my plants")

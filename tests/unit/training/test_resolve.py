"""Names, files, data sets and overrides are resolved to recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convlens import recipe
from convlens.errors import DataError, UsageError
from convlens.training import resolve
from helpers.commands import pictures


def test_a_recipe_name_takes_precedence_over_a_data_set_and_a_folder() -> None:
    pictures(Path("digits"), {"a": 1, "b": 1})
    resolved = resolve.resolve_recipe("digits")
    assert resolved.is_unmodified
    assert resolved.recipe == recipe.load_recipe("digits")


def test_a_data_set_alone_uses_the_folder_recipe() -> None:
    resolved = resolve.resolve_recipe("shapes", overrides=["train.epochs=3"])
    assert not resolved.is_unmodified
    assert (resolved.recipe.name, resolved.recipe.data.name) == ("shapes", "shapes")
    assert resolved.recipe.train.epochs == 3
    expected = recipe.load_recipe("folder", ["data.name=shapes", "train.epochs=3"])
    assert resolved.recipe.digest() == expected.digest()


@pytest.mark.parametrize("name", ["photos", "photos/", "./photos", "fotos ö 📷", "it's [1] #a: b"])
def test_a_folder_of_any_name_is_found_and_names_the_recipe(name: str) -> None:
    folder = pictures(Path(name), {"a": 1, "b": 1})
    resolved = resolve.resolve_recipe(name)
    assert resolved.is_unmodified
    assert resolved.recipe.name == folder.name
    assert Path(resolved.recipe.data.name) == folder
    stored = Path("again.yaml")
    stored.write_text(resolved.recipe.to_text(), "utf-8")
    assert recipe.load_recipe(stored) == resolved.recipe


def test_a_csv_file_names_the_recipe() -> None:
    Path("birds.csv").write_text("path,label\n")
    assert resolve.resolve_recipe("birds.csv").recipe.name == "birds"


def test_a_folder_below_the_data_folder_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLENS_DATA", str(tmp_path / "sets"))
    pictures(tmp_path / "sets" / "birds", {"a": 1, "b": 1})
    assert resolve.resolve_recipe("birds").recipe.data.name == "birds"


def test_a_recipe_on_other_data_has_the_data_in_its_name() -> None:
    resolved = resolve.resolve_recipe("mnist-reg", data="digits")
    assert resolved.recipe.name == "mnist-reg-digits"
    assert resolved.recipe.data.name == "digits"
    assert resolved.is_unmodified


def test_a_file_a_mapping_and_a_recipe_are_equivalent() -> None:
    text = recipe.recipe_text("digits")
    Path("mine.yaml").write_text(text)
    loaded = resolve.resolve_recipe("mine.yaml").recipe
    assert loaded.name == "mine"
    assert loaded.digest() == recipe.load_recipe("digits").digest()
    assert resolve.resolve_recipe(loaded).recipe == loaded
    assert resolve.resolve_recipe(loaded.model_dump(mode="json")).recipe == loaded


def test_an_unknown_name_suggests_similar_recipes_and_data_sets() -> None:
    with pytest.raises(UsageError, match="'mnits' is neither") as error:
        resolve.resolve_recipe("mnits")
    assert "mnist" in error.value.fix
    with pytest.raises(UsageError) as error:
        resolve.resolve_recipe("cifr10")
    assert "cifar10" in error.value.fix


def test_a_mistyped_folder_is_not_taken_for_the_recipe_of_that_name() -> None:
    with pytest.raises(UsageError) as error:
        resolve.resolve_recipe("flowrs")
    assert "folder?" not in error.value.fix
    assert "`convlens recipes` lists them" in error.value.fix
    Path("flowers").mkdir()
    with pytest.raises(UsageError) as error:
        resolve.resolve_recipe("flowrs")
    assert error.value.fix == "did you mean flowers?"


def test_a_missing_path_is_a_data_error() -> None:
    from convlens.data.sources import find_source

    resolved = resolve.resolve_recipe("no/such/folder")
    with pytest.raises(DataError, match="no such file or folder"):
        find_source(resolved.recipe.data.name)


def test_two_data_sets_are_refused() -> None:
    with pytest.raises(UsageError, match="is not a recipe, and --data"):
        resolve.resolve_recipe("shapes", data="digits")


def test_all_invalid_keys_and_values_are_reported_with_suggestions() -> None:
    wrong = ["optim.lrr=1", "train.epoch=3", "train.batch_size=-4"]
    with pytest.raises(UsageError) as error:
        resolve.resolve_recipe("digits", overrides=wrong)
    for text in ("optim.lrr", "optim.lr", "train.epoch", "train.epochs", "train.batch_size=-4"):
        assert text in error.value.what


@pytest.mark.parametrize("images", [np.zeros((3, 8, 8)), [1, 2], None, 3, b"digits"])
def test_images_in_memory_are_refused_with_what_to_use(images: Any) -> None:
    for call in (
        lambda: resolve.resolve_recipe(images),
        lambda: resolve.resolve_recipe_or_run(images),
        lambda: resolve.resolve_variants(images, "all"),
        lambda: resolve.resolve_recipe("digits", data=images if images is not None else 3),
    ):
        with pytest.raises(UsageError, match="neither a recipe nor a data set") as error:
            call()
        assert "convlens.ImageClassifier().fit(images, labels)" in error.value.fix
        assert "one folder per class" in error.value.fix


def test_a_null_byte_in_a_name_is_refused() -> None:
    for call in (
        lambda: resolve.resolve_recipe("a\0*.tar"),
        lambda: resolve.resolve_recipe("digits", data="a\0b"),
        lambda: resolve.resolve_recipe_or_run("a\0b"),
    ):
        with pytest.raises(UsageError, match="null byte"):
            call()


def test_overrides_are_a_mapping_a_list_or_one_text() -> None:
    texts = ["train.epochs=1"]
    for given in ({"train.epochs": 1}, texts, tuple(texts), texts[0]):
        assert resolve.override_texts(given) == texts
    assert resolve.override_texts(()) == []
    for wrong in (np.array([0, 1]), [0, 1], None, ["a=1", 2]):
        with pytest.raises(UsageError, match="overrides must be texts") as error:
            resolve.override_texts(wrong)  # type: ignore[arg-type]
        assert "ImageClassifier" in error.value.fix


def test_data_overrides_need_no_section() -> None:
    config = resolve.resolve_data_config("shapes", ["count=40", "data.image_size=16"])
    assert (config.name, config.count, config.image_size) == ("shapes", 40, 16)


def test_python_values_become_overrides() -> None:
    values = {
        "optim.lr": np.float64(1e-5),
        "train.epochs": np.int64(3),
        "train.seed": 7,
        "model.widths": np.array([4, 8]),
        "data.name": Path("shapes"),
        "train.deterministic": True,
        "optim.clip_norm": None,
        "augment": [{"RandomHorizontalFlip": {}}],
    }
    loaded = recipe.load_recipe("digits", resolve.to_overrides(values))
    assert (loaded.optim.lr, loaded.train.epochs, loaded.train.seed) == (1e-5, 3, 7)
    assert loaded.model.options["widths"] == [4, 8]
    assert loaded.data.name == "shapes"
    assert loaded.train.deterministic
    assert loaded.optim.clip_norm is None
    assert loaded.augment == [{"RandomHorizontalFlip": {}}]


def test_a_python_value_that_is_not_a_setting_is_refused() -> None:
    with pytest.raises(UsageError, match=r"optim\.lr"):
        resolve.to_overrides({"optim.lr": object()})


def test_an_exponent_without_the_focal_loss_is_refused() -> None:
    resolve.validate_recipe(recipe.load_recipe("digits"))
    focal = ["optim.loss=focal", "optim.focal_gamma=1.5"]
    resolve.validate_recipe(recipe.load_recipe("digits", focal))
    with pytest.raises(UsageError, match=r"optim\.focal_gamma=1\.5 has no effect"):
        resolve.validate_recipe(recipe.load_recipe("digits", focal[1:]))


def test_names_of_modules_are_not_checked_before_the_network_is_known() -> None:
    """The images choose between the network of the weights on this machine and a CNN."""
    resolve.validate_recipe(recipe.load_recipe("folder", ["model.trainable=blocks.2+"]))
    groups = "optim.groups=[{params: 'blocks.*', lr: 0.1}]"
    resolve.validate_recipe(recipe.load_recipe("folder", [groups]))
    for override in ("model.trainable=blocks.2+", groups):
        with pytest.raises(UsageError, match=r"blocks"):
            resolve.validate_recipe(recipe.load_recipe("folder", ["model.name=cnn", override]))

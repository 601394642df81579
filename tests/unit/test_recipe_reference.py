"""The reference of a recipe's keys, and the JSON schema for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from convlens import models, recipe
from convlens.data.transforms.pipeline import AUGMENTS, MIXES
from convlens.engine.losses import LOSSES
from convlens.optim import OPTIMIZERS, SCHEDULES
from convlens.recipe import SECTIONS, GroupConfig, LookaheadConfig, Recipe
from convlens.recipe_reference import (
    RARE_KEYS,
    ZOO_OPTIONS,
    augmentation_rows,
    model_option_keys,
    nested_keys,
    option_descriptions,
    recipe_keys,
    recipe_schema,
    schema_reference,
    schema_text,
    value_in_yaml,
)
from convlens.utils import yaml

SCHEMA = jsonschema.Draft7Validator(recipe_schema())


def problems(text: str) -> list[str]:
    errors = SCHEMA.iter_errors(yaml.parse_yaml(text, where="test"))
    return [".".join(map(str, error.absolute_path)) for error in errors]


@pytest.mark.parametrize("kind", [Recipe, *SECTIONS.values(), GroupConfig, LookaheadConfig])
def test_every_key_is_described_in_a_sentence(kind: type[recipe.Section]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, f"{kind.__name__}.{name} has no description"
        assert field.description.endswith("."), name
        assert "`auto`" not in field.description, name
        annotation = str(field.annotation)
        if "auto" in annotation and name != "schedule":
            assert "auto: " in field.description, f"{name}: what does auto stand for?"


@pytest.mark.parametrize("name", models.MODELS)
def test_every_option_of_a_network_is_described(name: str) -> None:
    described = option_descriptions(models.model_family(name))
    assert set(models.model_options(name)) == set(described)
    for key in model_option_keys(name, {}):
        assert key.meaning.endswith("."), key
        assert key.choices, key
        assert key.value == key.default


def test_options_of_other_libraries_are_described() -> None:
    from convlens.models import zoo

    listed = {name for names in zoo.OPTIONS.values() for name in names} | set(zoo.TIMM_OPTIONS)
    assert listed == set(ZOO_OPTIONS)
    assert [key.key for key in model_option_keys("vgg11", {"dropout": 0.3})] == ["model.dropout"]
    assert model_option_keys("auto", {}) == []


def test_keys_of_a_recipe_have_their_values_and_choices() -> None:
    loaded = recipe.load_recipe("digits", ["optim.ema=0.9", "model.pool=[max, avg]"])
    keys = {key.key: key for key in recipe_keys(loaded)}
    assert [*keys][:2] == ["about", "augment"]
    ema = keys["optim.ema"]
    assert (ema.value, ema.default, ema.is_set) == (0.9, None, True)
    assert ema.choices == "number above 0, below 1, null"
    assert keys["data.image_size"].choices == "whole number from 8 to 1,024, auto"
    assert keys["data.channels"].choices == "1, 3, auto"
    assert keys["train.seed"].choices == "whole number from 0"
    assert keys["optim.betas"].choices == "[number, number]"
    assert keys["train.compile"].choices == "true, false, auto"
    assert keys["train.keep"].is_set is False
    assert keys["model.pool"].value == ["max", "avg"]
    assert keys["model.pool"].choices == "max, avg, stride, none"
    assert keys["model.padding"].meaning.startswith("same pads with zeros")


def test_every_known_key_is_listed_once() -> None:
    listed = [key.key for key in recipe_keys(recipe.load_recipe("folder"))]
    assert len(listed) == len(set(listed))
    known = {
        f"{section}.{name}" for section, kind in SECTIONS.items() for name in kind.model_fields
    }
    assert set(listed) == known | {*Recipe.model_fields} - {*SECTIONS, "name"}
    assert set(listed) >= RARE_KEYS
    nested = {key.key for key in nested_keys()}
    assert {"optim.groups[].params", "optim.lookahead.every"} <= nested


def test_choices_of_tables_are_those_of_the_tables() -> None:
    keys = {key.key: key for key in recipe_keys(recipe.load_recipe("folder"))}
    assert keys["optim.name"].choices.split(", ") == [*OPTIMIZERS]
    assert keys["optim.loss"].choices.split(", ") == [*LOSSES]
    assert keys["optim.schedule"].choices.split(", ") == [*SCHEDULES]
    assert set(keys["model.name"].choices.split(", ")) == {"auto", *models.MODELS, "..."}


def test_augmentations_are_listed_with_defaults_and_possible_values() -> None:
    rows = {name: (summary, arguments) for name, summary, arguments in augmentation_rows()}
    assert set(rows) == {*AUGMENTS, *MIXES}
    assert all(summary.endswith(".") for summary, _ in rows.values())
    assert rows["RandomErasing"][1]["p"] == (0.5, "a number from 0 to 1")
    assert rows["Cutout"][1]["size"] == (None, "a whole number >= 1 (pixels)")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1 / 3, "0.333333"),
        (0.001, "0.001"),
        ([64, 128], "[64, 128]"),
        ({"padding": 2, "p": None}, "{padding: 2, p: null}"),
    ],
)
def test_values_are_written_as_on_the_command_line(value: Any, text: str) -> None:
    assert value_in_yaml(value) == text
    assert value_in_yaml(yaml.parse_yaml(text, where="test")) == text


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_the_schema_accepts_every_recipe(name: str) -> None:
    assert problems(recipe.recipe_text(name)) == []
    assert problems(recipe.load_recipe(name).to_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "base: mnist\nvariants: {slow: {optim.lr: 0.01}}",
        "data: {range: 0..4095, lists: 2, without: 7, classes: [cat, 3]}",
        "augment: [RandomHorizontalFlip, {RandomCrop: {padding: 4}}, {MixUp: null}]",
        "model: {name: resnet18, stem: cifar}",
        "optim: {groups: [{params: head, lr: 0.1}], betas: [0.9, 0.95], class_weights: {a: 2}}",
    ],
)
def test_the_schema_accepts_what_a_file_may_hold(text: str) -> None:
    recipe.load_recipe(yaml.parse_yaml(text, where="test"))
    assert problems(text) == []


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("trian: {epochs: 3}", ""),
        ("train: {epoch: 3}", "train"),
        ("train: {epochs: 0}", "train.epochs"),
        ("train: {keep: first}", "train.keep"),
        ("optim: {name: adamm}", "optim.name"),
        ("optim: {betas: [0.9]}", "optim.betas"),
        ("optim: {groups: [{lr: 0.1}]}", "optim.groups.0"),
        ("augment: [RandomHorizontalFlop]", "augment"),
        ("augment: [{RandomCrop: {pading: 4}}]", "augment"),
        ("augment: [Cutout]", "augment"),
    ],
)
def test_the_schema_refuses_what_training_would_refuse(text: str, key: str) -> None:
    assert problems(text) == [key]


def test_the_installed_schema_is_the_current_one() -> None:
    assert json.loads(schema_text()) == recipe_schema(), "run `python tools/reference.py`"


def test_the_schema_is_named_by_its_address_or_by_a_file_beside_the_recipe() -> None:
    assert schema_reference().startswith("file://")
    Path("recipe.schema.json").write_text("{}")
    assert schema_reference() == "recipe.schema.json"

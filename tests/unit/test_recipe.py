"""Recipes: what is read is what was written, and all that is wrong is said at once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from convlens import recipe
from convlens.errors import UsageError
from convlens.recipe import SECTIONS, Recipe
from convlens.training.resolve import validate_recipe
from convlens.utils import yaml


def refused(*overrides: str, source: Any = "digits") -> str:
    with pytest.raises(UsageError) as caught:
        recipe.load_recipe(source, overrides)
    return str(caught.value)


def written(text: str, name: str = "mine.yaml") -> Path:
    path = Path(name)
    path.write_text(text, "utf-8")
    return path


# Built-in recipes and round trips


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_text_of_a_recipe_gives_an_equal_recipe(name: str) -> None:
    first = recipe.load_recipe(name)
    again = recipe.load_recipe(written(first.to_text()))
    assert again == first
    assert again.digest() == first.digest()
    assert again.name == name


@pytest.mark.parametrize(
    "text",
    ["1e-3", "1E5", "-2e3", "null", "yes", "0x1F", "1_000", "~", "12:30", "ä: ö # ü", "=", " "],
)
def test_odd_texts_survive_the_round_trip(text: str) -> None:
    odd = Recipe(name=text, about=text, data={"name": text})
    again = recipe.load_recipe(written(odd.to_text()))
    assert (again.name, again.about, again.data.name) == (text, text, text)


@settings(max_examples=40, deadline=None)
@given(about=st.text(max_size=30), lr=st.floats(1e-300, 1e300), decay=st.floats(0, 1e300))
def test_any_text_and_number_survives_the_round_trip(about: str, lr: float, decay: float) -> None:
    first = Recipe(name="x", about=about, optim={"lr": lr, "weight_decay": decay})
    again = recipe.load_recipe(written(first.to_text(), "any.yaml"))
    assert again == first
    assert again.digest() == first.digest()


def test_the_digest_is_of_what_changes_the_result_only() -> None:
    first = recipe.load_recipe("digits")
    assert first.model_copy(update={"name": "other", "about": "x"}).digest() == first.digest()
    changed = [
        recipe.load_recipe("digits", [o]) for o in ("optim.lr=0.1", "train.seed=1", "augment=[]")
    ]
    assert len({r.digest() for r in (first, *changed)}) == 4


def test_a_checked_recipe_cannot_be_changed() -> None:
    asked = recipe.load_recipe("digits")
    with pytest.raises(ValueError, match="frozen"):
        asked.optim.lr = 1.0  # type: ignore[misc]


# Values


def test_numbers_as_people_write_them() -> None:
    asked = recipe.load_recipe("digits", ["optim.lr=1e-3", "model.dropout=2e-1", "optim.ema=.5"])
    assert asked.optim.lr == 0.001
    assert asked.model.options["dropout"] == 0.2
    assert asked.optim.ema == 0.5
    assert recipe.load_recipe({"optim": {"lr": "1e-3"}}).optim.lr == 0.001


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.epochs=-1", "train.epochs=-1"),
        ("train.epochs=0", "train.epochs=0"),
        ("train.epochs=1.5", "train.epochs=1.5"),
        ("train.epochs=many", "train.epochs='many'"),
        ("optim.lr=nan", "optim.lr='nan'"),
        ("optim.lr=.nan", "optim.lr=nan"),
        ("optim.lr=.inf", "optim.lr=inf"),
        ("optim.lr=0", "optim.lr=0"),
        ("optim.lr=fast", "optim.lr='fast'"),
        ("optim.lr=", "optim.lr=None"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.betas=[0.9, 1]", "optim.betas"),
        ("data.image_size=7", "data.image_size=7"),
        ("data.image_size=1025", "data.image_size=1025"),
        ("data.channels=2", "data.channels=2"),
        ("data.val_fraction=-0.1", "data.val_fraction=-0.1"),
        ("data.folds=1", "data.folds=1"),
        ("data.fold=-1", "data.fold=-1"),
        ("data.total_per_class=0", "data.total_per_class=0"),
        ("data.val_fraction=1", "data.val_fraction=1"),
        ("data.fit=zoom", "data.fit='zoom'"),
        ("data.name=2024", "data.name=2024"),
        ("train.batch_size=0", "train.batch_size=0"),
        ("train.monitor=test_loss", "train.monitor='test_loss'"),
        ("train.seed=-1", "train.seed=-1"),
        ("optim.warmup=1", "optim.warmup=1"),
        ("data=5", "data=5"),
        ("model.weights=", "model.weights=None"),
    ],
)
def test_impossible_values_are_refused_once_with_key_and_value(override: str, key: str) -> None:
    message = refused(override)
    assert key in message
    assert message.count(key) == 1
    assert "more)" not in message


def test_a_published_tuple_and_fraction_are_kept() -> None:
    asked = recipe.load_recipe("digits", ["optim.betas=[0.8, 0.95]"])
    assert asked.optim.betas == (0.8, 0.95)
    assert asked.optim.step_size == pytest.approx(1 / 3)


# Unknown keys


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("data.nam=x", "data.name"),
        ("optim.lerning_rate=1", ""),
        ("optim.wieght_decay=1", "optim.weight_decay"),
        ("train.lr=1", "optim.lr"),  # right key, wrong section
        ("lr=1", "optim.lr"),
        ("model.epochs.x=1", ""),
        ("optim.epochs=3", "train.epochs"),
        ("foo.bar=1", ""),
        ("augment.x=1", ""),
        ("name=x", "data.name"),
        ("base=mnist", ""),
    ],
)
def test_unknown_keys_are_named_once_with_near_misses(override: str, hint: str) -> None:
    message = refused(override)
    key = override.partition("=")[0]
    assert message.startswith(f"unknown key {key!r}")
    assert message.count("unknown key") == 1
    assert hint in message


def test_all_that_is_wrong_is_said_at_once() -> None:
    message = refused("data.nam=x", "optim.lr=nan", "train.epochs=-1")
    assert "data.nam" in message
    assert "optim.lr" in message
    assert "train.epochs=-1" in message
    more = refused("data.nam=x", "optim.lr=nan", "train.epochs=-1", "foo=1", "optim.ema=2")
    assert "(and 2 more)" in more


def test_an_override_without_equals_is_explained() -> None:
    assert "write key=value" in refused("optim.lr")


def test_unknown_keys_in_a_file_and_a_mapping() -> None:
    path = written("optim: {lrr: 1}\ntrian: {epochs: 1}\n")
    message = refused(source=path)
    assert "'optim.lrr' (did you mean optim.lr" in message
    assert "'trian'" in message
    assert str(path) in message
    assert "'optim.lrr'" in refused(source={"optim": {"lrr": 1}})


# YAML


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {lr: 0.1, lr: 0.2}\n", 'duplicate key "lr"'),
        ("optim: {lr: 0.1}\noptim: {lr: 0.2}\n", 'duplicate key "optim"'),
        ("augment:\n- RandomCrop: {padding: 1, padding: 2}\n", 'duplicate key "padding"'),
        ("optim:\n\tlr: 0.1\n", "not valid YAML"),
        ("optim: {lr: 0.1\n", "not valid YAML"),
        ("- a\n- b\n", "mapping of sections"),
        ("", "mapping of sections"),
        ("just text", "mapping of sections"),
        ("optim: !!python/object/apply:os.system ['touch hacked']\n", "not valid YAML"),
        ("about: 2024-99-99\n", "not valid YAML"),
        ("? [a, b]\n: 1\n", "is not a key"),
        ("about: 0b_\n", "not valid YAML"),
        ("about: " + "[" * 3000 + "\n", "not valid YAML"),
        ("1: 2\n", "1"),
        ("optim: {1: 2}\n", "1"),
        ("name: [1]\n", "name=[1]"),
        ("--- {}\n--- {}\n", "not valid YAML"),
        ("optim:\n", "optim=None"),
    ],
)
def test_broken_files_are_usage_errors(text: str, says: str) -> None:
    assert says in refused(source=written(text))
    assert not Path("hacked").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2E5", -200000.0),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x1f", 31),
        ("010", 10),
        ("yes", True),
        ("On", True),
        ("no", False),
        ("OFF", False),
        ("y", "y"),
        ("n", "n"),
        ("'no'", "no"),
        ("12:30", "12:30"),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("1e-3x", "1e-3x"),
        ("C:\\x", "C:\\x"),
    ],
)
def test_values_of_yaml(text: str, value: Any) -> None:
    """YAML 1.2, and the booleans of 1.1; what is written is read back as the same value."""
    found = yaml.parse_yaml(text, where="")
    assert found == value
    assert type(found) is type(value)
    again = yaml.parse_yaml(yaml.dump_yaml({"a": value}), where="")
    assert again == {"a": value}
    assert yaml.parse_yaml(yaml.dump_yaml([text]), where="") == [text]


def test_errors_of_yaml_name_the_line_and_the_override() -> None:
    with pytest.raises(UsageError) as caught:
        recipe.load_recipe(written("about: x\noptim:\n  lr: [1\ntrain: {}\n", "broken.yaml"))
    assert caught.value.where == "broken.yaml, line 4"
    assert "'optim.lr=[1', line 1: not valid YAML: expected ',' or ']'" in refused("optim.lr=[1")


def test_a_file_that_is_no_text_or_not_there() -> None:
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x00\x80")
    assert "can't read the recipe" in refused(source="binary.yaml")
    assert "can't read the recipe" in refused(source="absent.yaml")
    assert "unknown recipe 'digitz'" in refused(source="digitz")
    assert "did you mean digits" in refused(source="digitz")


def test_a_file_is_named_after_itself_unless_it_says_so() -> None:
    assert recipe.load_recipe(written("about: a\n", "one.yaml")).name == "one"
    assert recipe.load_recipe(written("name: other\n", "two.yaml")).name == "other"
    assert recipe.load_recipe({}).name == "custom"


# base


def test_base_chains_merge_section_by_section() -> None:
    Path("sub").mkdir()
    written("base: mnist\noptim: {lr: 0.5}\n", "a.yaml")
    written("base: ../a.yaml\ntrain: {epochs: 7}\nmodel: {dropout: 0.3}\n", "sub/b.yaml")
    asked = recipe.load_recipe(Path("sub/b.yaml"), ["optim.momentum=0.1"])
    mnist = recipe.load_recipe("mnist")
    assert asked.name == "b"
    assert (asked.optim.lr, asked.train.epochs, asked.optim.momentum) == (0.5, 7, 0.1)
    assert asked.model.options == {**mnist.model.options, "dropout": 0.3}
    assert (asked.optim.name, asked.train.batch_size) == (mnist.optim.name, mnist.train.batch_size)
    assert asked.data == mnist.data


def test_lists_replace_those_of_the_base() -> None:
    written("base: digits\naugment: [RandomHorizontalFlip]\nmodel: {widths: [8]}\n", "c.yaml")
    asked = recipe.load_recipe("c.yaml")
    assert asked.operations == [("RandomHorizontalFlip", {})]
    assert asked.model.options["widths"] == [8]


def test_a_circle_of_bases_is_refused() -> None:
    written("base: q.yaml\n", "p.yaml")
    written("base: p.yaml\n", "q.yaml")
    assert "circular base: p.yaml -> q.yaml -> p.yaml" in refused(source="p.yaml")
    written("base: self.yaml\n", "self.yaml")
    assert "circular" in refused(source="self.yaml")


@pytest.mark.parametrize("base", ["5", "[mnist]", "{a: 1}", "true"])
def test_a_base_that_is_no_name_is_refused(base: str) -> None:
    assert "not the name or file of a recipe" in refused(source=written(f"base: {base}\n"))


def test_an_unknown_base_names_near_misses() -> None:
    assert "did you mean mnist" in refused(source=written("base: mnistt\n"))


# Settings

VARIED = """
base: mnist
optim: {lr: 0.5}
variants:
  nested: {optim: {lr: 0.1, weight_decay: 0.2}, augment: [RandomHorizontalFlip]}
  dotted: {optim.lr: 0.2, train.epochs: 3, about: other}
  family: {model.blocks: 3, model.name: other}
"""


def test_a_variant_changes_the_recipe_and_overrides_change_the_variant() -> None:
    path = written(VARIED, "varied.yaml")
    assert list(recipe.variants(path)) == ["nested", "dotted", "family"]
    plain, nested = recipe.load_recipe(path), recipe.load_recipe(path, variant="nested")
    assert (plain.optim.lr, nested.optim.lr, nested.optim.weight_decay) == (0.5, 0.1, 0.2)
    assert nested.operations == [("RandomHorizontalFlip", {})]
    assert nested.model == plain.model
    dotted = recipe.load_recipe(path, ["optim.lr=0.3"], "dotted")
    assert (dotted.optim.lr, dotted.train.epochs, dotted.about) == (0.3, 3, "other")
    assert recipe.load_recipe(path, variant="family").model.options == {"blocks": 3}
    assert nested.name == plain.name == "varied"


def test_variants_reach_neither_the_recipe_nor_its_digest() -> None:
    with_them = recipe.load_recipe(written(VARIED))
    without = recipe.load_recipe(written(VARIED[: VARIED.index("variants")]))
    assert with_them.digest() == without.digest()
    assert "variants" not in with_them.to_text()
    assert "unknown key 'variants'" in refused("variants={}")


def test_the_old_key_settings_is_refused_with_the_new_name() -> None:
    path = written("base: digits\nsettings: {a: {optim.lr: 0.1}}\n")
    with pytest.raises(UsageError, match=r"unknown key 'settings' \(did you mean variants\?\)"):
        recipe.load_recipe(path)


def test_variants_are_inherited_and_replaced_by_name() -> None:
    written(VARIED, "varied.yaml")
    path = written(
        "base: varied.yaml\ntrain: {epochs: 9}\nvariants: {dotted: {optim.lr: 7}, own: {}}\n"
    )
    assert list(recipe.variants(path)) == ["nested", "dotted", "family", "own"]
    inherited = recipe.load_recipe(path, variant="nested")
    assert (inherited.optim.lr, inherited.train.epochs) == (0.1, 9)
    replaced = recipe.load_recipe(path, variant="dotted")
    assert (replaced.optim.lr, replaced.train.epochs) == (7, 9)
    assert recipe.load_recipe(path, variant="own").digest() == recipe.load_recipe(path).digest()


def test_a_mapping_with_variants_and_what_a_file_of_them_holds() -> None:
    tree = {"optim": {"lr": 0.1}, "variants": {"a": {"optim.lr": 0.2}}}
    assert recipe.load_recipe(tree, variant="a").optim.lr == 0.2
    assert recipe.variants(tree) == {"a": {"optim.lr": 0.2}}
    assert recipe.variants("digits") == {}
    again = {**recipe.load_recipe(tree).model_dump(mode="json"), "variants": recipe.variants(tree)}
    assert recipe.load_recipe(again, variant="a") == recipe.load_recipe(tree, variant="a")


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        ("5", "variants maps names to changes"),
        ("[a, b]", "variants maps names to changes"),
        ("{a: 5}", "not a: 5"),
        ("{a: }", "not a: None"),
        ("{all: {}}", "invalid variant name 'all'"),
        ("{1: {}}", "invalid variant name 1"),
        ("{'a/b': {}}", "invalid variant name 'a/b'"),
        ("{x: {optim: {lrr: 1}}}", "'optim.lrr' (did you mean optim.lr"),
        ("{x: {optim.lrr: 1, train.epochs: 0}}", "train.epochs=0"),
        ("{x: {trian: {epochs: 1}}}", "'trian'"),
        ("{x: {name: y}}", "a variant cannot change 'name'"),
        ("{x: {base: mnist}}", "a variant cannot change 'base'"),
        ("{x: {variants: {}}}", "a variant cannot change 'variants'"),
        ("{x: {1.5: 2}}", "unknown key '1.5'"),
        ("{x: {1: 2}}", "1"),
        ("{x: {optim: 3}}", "optim=3"),
        ("{xx: {}}", "unknown variant 'x'"),
        ("{}", "has no variants"),
    ],
)
def test_variants_that_can_not_be(variants: str, says: str) -> None:
    path = written(f"base: digits\nvariants: {variants}\n")
    with pytest.raises(UsageError) as caught:
        recipe.load_recipe(path, variant="x")
    assert says in str(caught.value)


# The model's family


@pytest.mark.parametrize("order", [0, 1])
def test_another_family_drops_the_keys_of_the_former(order: int) -> None:
    overrides = ["model.name=other", "model.blocks=3"]
    if order:
        overrides.reverse()
    asked = recipe.load_recipe("digits", overrides)
    assert asked.model.name == "other"
    assert asked.model.options == {"blocks": 3}


def test_another_family_in_a_file_keeps_the_keys_beside_it() -> None:
    written("base: digits\nmodel: {blocks: 3, name: other}\n", "d.yaml")
    assert recipe.load_recipe("d.yaml").model.options == {"blocks": 3}


def test_the_same_family_named_again_keeps_its_keys() -> None:
    asked = recipe.load_recipe("digits", ["model.name=cnn"])
    assert asked == recipe.load_recipe("digits")


# Augmentation


def test_the_forms_of_augment_mean_the_same() -> None:
    long = recipe.load_recipe(
        {"augment": [{"RandomHorizontalFlip": {}}, {"RandomCrop": {"padding": 2}}]}
    )
    text = "name: custom\naugment:\n- RandomHorizontalFlip\n- RandomCrop: {padding: 2}\n"
    assert recipe.load_recipe(written(text)) == long
    empty = recipe.load_recipe(
        written("name: custom\naugment:\n- RandomHorizontalFlip:\n", "e.yaml")
    )
    assert empty.operations == [("RandomHorizontalFlip", {})]
    assert long.operations == [("RandomHorizontalFlip", {}), ("RandomCrop", {"padding": 2})]
    assert recipe.load_recipe({"augment": None}).augment == []
    assert recipe.load_recipe({"augment": "auto"}).operations == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("5", "a list of operations"),
        ("{a: 1}", "a list"),
        ("[5]", "5 is not an operation"),
        ("[[a]]", "is not an operation"),
        ("[{RandomCrop: 4}]", "augment"),
        ("later", "a list"),
    ],
)
def test_other_forms_of_augment_are_refused(value: str, says: str) -> None:
    message = refused(f"augment={value}")
    assert says in message
    assert "list[dict" not in message


# Replacing


def test_replace_checks_again() -> None:
    asked = recipe.load_recipe("digits").replace(**{"optim.lr": 0.5, "train.epochs": 2})
    assert (asked.optim.lr, asked.train.epochs) == (0.5, 2)
    with pytest.raises(UsageError, match=r"train\.epochs=0"):
        asked.replace(**{"train.epochs": 0})
    with pytest.raises(UsageError, match="unknown key"):
        asked.replace(**{"train.epoch": 1})


def test_a_mapping_given_by_the_user_is_not_changed() -> None:
    mine: dict[str, Any] = {"optim": {"lr": 0.1}}
    recipe.load_recipe(mine, ["optim.lr=0.2", "data.name=shapes"])
    assert mine == {"optim": {"lr": 0.1}}


# Anything at all

KEYS = [f"{name}.{field}" for name, kind in SECTIONS.items() for field in kind.model_fields]
KEYS += ["model.widths", "model.kernel", "model.dropout", "model.depth", "model.pool", "model.head"]
KEYS += ["model.padding", "augment", "about", "name", "model", "optim", "x.y"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4))
def test_no_value_of_any_key_raises_anything_but_a_usage_error(
    pairs: list[tuple[str, Any]],
) -> None:
    overrides = [f"{key}={json.dumps(value)}" for key, value in pairs]  # JSON is YAML
    try:
        asked = recipe.load_recipe("digits", overrides)
        validate_recipe(asked)
    except UsageError:
        return
    assert math.isfinite(asked.optim.lr)
    assert recipe.load_recipe(written(asked.to_text(), "fuzz.yaml")).digest() == asked.digest()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=3), st.sampled_from(KEYS), st.text(max_size=20))
def test_no_text_raises_anything_but_a_usage_error(texts: list[str], key: str, value: str) -> None:
    for overrides in (texts, [f"{key}={value}"]):
        try:
            assert recipe.load_recipe("digits", overrides).name == "digits"
        except UsageError as error:
            assert error.what  # noqa: PT017


def test_reading_recipes_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import convlens.recipe as r, sys; r.load_recipe('digits').digest(); print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=True,
    )
    assert run.stdout.strip() == "False"

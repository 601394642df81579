"""Recipes: loading, round trips, errors, bases, variants, and `auto`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from convlens import recipe
from convlens.errors import UsageError
from convlens.recipe import SECTIONS, Recipe
from convlens.training.resolve import validate_recipe

FROM_SCRATCH = ["model.name=cnn", "model.weights=none"]


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
def test_recipe_is_equal_after_a_round_trip(name: str) -> None:
    first = recipe.load_recipe(name)
    again = recipe.load_recipe(written(first.to_text()))
    assert again == first
    assert again.digest() == first.digest()
    assert again.name == name


@pytest.mark.parametrize(
    "text",
    ["1e-3", "1E5", "-2e3", "null", "yes", "0x1F", "1_000", "~", "12:30", "ä: ö # ü", "=", " "],
)
def test_unusual_texts_survive_a_round_trip(text: str) -> None:
    first = Recipe(name=text, about=text, data={"name": text})
    again = recipe.load_recipe(written(first.to_text()))
    assert (again.name, again.about, again.data.name) == (text, text, text)


@settings(max_examples=40, deadline=None)
@given(about=st.text(max_size=30), lr=st.floats(1e-300, 1e300), decay=st.floats(0, 1e300))
def test_any_text_and_number_survive_a_round_trip(about: str, lr: float, decay: float) -> None:
    first = Recipe(name="x", about=about, optim={"lr": lr, "weight_decay": decay})
    again = recipe.load_recipe(written(first.to_text(), "any.yaml"))
    assert again == first
    assert again.digest() == first.digest()


def test_digest_depends_only_on_values_that_affect_the_result() -> None:
    first = recipe.load_recipe("digits")
    assert first.model_copy(update={"name": "other", "about": "x"}).digest() == first.digest()
    changed = [
        recipe.load_recipe("digits", [o]) for o in ("optim.lr=0.1", "train.seed=1", "augment=[]")
    ]
    assert len({r.digest() for r in (first, *changed)}) == 4


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("data.without=cat", ("cat",)),
        ("data.without=[cat, new folder]", ("cat", "new folder")),
        ("data.without=[3, '007']", ("3", "007")),
    ],
)
def test_classes_are_lists_of_names_or_a_single_name(override: str, names: tuple[str, ...]) -> None:
    loaded = recipe.load_recipe("digits", [override])
    assert loaded.data.without == names
    assert recipe.load_recipe(written(loaded.to_text(), "classes.yaml")).data.without == names
    assert loaded.digest() != recipe.load_recipe("digits").digest()


def test_class_names_that_yaml_reads_as_booleans_need_quotes() -> None:
    with pytest.raises(UsageError, match="need quotes"):
        recipe.load_recipe("digits", ["data.classes=[yes, no]"])
    assert recipe.load_recipe("digits", ["data.classes=['yes', 'no']"]).data.classes == (
        "yes",
        "no",
    )


def test_options_for_unequal_classes_do_not_change_other_digests() -> None:
    plain = recipe.load_recipe("digits")
    # Of an earlier version, which had none of these keys.
    assert plain.digest() == "07b42fb251d0b123bd49d22059431e10906d2f6b198fd766c3ba21432cded8c6"
    unused = ["optim.class_weights=none", "data.balance=none", "optim.loss=cross_entropy"]
    assert recipe.load_recipe("digits", unused).digest() == plain.digest()
    used = {
        recipe.load_recipe("digits", [text]).digest()
        for text in ("optim.class_weights=auto", "data.balance=sqrt", "optim.loss=focal")
    }
    assert len({plain.digest(), *used}) == 4


def test_the_hash_of_user_code_is_part_of_the_digest() -> None:
    digests = set()
    for sha256 in ("0" * 64, "1" * 64):
        given = {"name": "x", "code": {"./net.py:Net": sha256}}
        loaded = recipe.load_recipe(given)
        assert recipe.load_recipe(written(loaded.to_text())) == loaded
        digests.add(loaded.digest())
    assert len({*digests, recipe.load_recipe({"name": "x"}).digest()}) == 3


def test_options_of_a_part_are_read_as_yaml() -> None:
    values = recipe.parse_values(["width=64", "names=[a, b]", "shape={a:1}", "text="])
    assert values == {"width": 64, "names": ["a", "b"], "shape": {"a": 1}, "text": None}
    with pytest.raises(UsageError, match="write KEY=VALUE"):
        recipe.parse_values(["width"])


def test_class_weights_are_read_by_name() -> None:
    weighted = recipe.load_recipe("digits", ["optim.class_weights={0: 2, seven: 1.5, 'a.b': 3}"])
    assert weighted.optim.class_weights == {"0": 2.0, "seven": 1.5, "a.b": 3.0}
    assert recipe.load_recipe(written(weighted.to_text())) == weighted
    assert weighted.replace(**{"train.seed": 1}).optim == weighted.optim


@pytest.mark.parametrize(
    "value", ["5", "full", "[1, 2]", "{}", "{a: 0}", "{a: -1}", "{a: b}", "{a: true}", "{a: .inf}"]
)
def test_invalid_class_weights_are_refused(value: str) -> None:
    message = refused(f"optim.class_weights={value}")
    assert message.count("class_weights") == 1


def test_recipe_is_immutable() -> None:
    loaded = recipe.load_recipe("digits")
    with pytest.raises(ValueError, match="frozen"):
        loaded.optim.lr = 1.0  # type: ignore[misc]


# Values


def test_numbers_in_all_usual_notations() -> None:
    loaded = recipe.load_recipe("digits", ["optim.lr=1e-3", "model.dropout=2e-1", "optim.ema=.5"])
    assert loaded.optim.lr == 0.001
    assert loaded.model.options["dropout"] == 0.2
    assert loaded.optim.ema == 0.5
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
def test_invalid_values_are_reported_once_with_key_and_value(override: str, key: str) -> None:
    message = refused(override)
    assert key in message
    assert message.count(key) == 1
    assert "more)" not in message


def test_tuples_and_default_fractions() -> None:
    loaded = recipe.load_recipe("digits", ["optim.betas=[0.8, 0.95]"])
    assert loaded.optim.betas == (0.8, 0.95)
    assert loaded.optim.step_size == pytest.approx(1 / 3)


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
def test_unknown_keys_are_reported_once_with_suggestions(override: str, hint: str) -> None:
    message = refused(override)
    key = override.partition("=")[0]
    assert message.startswith(f"unknown key {key!r}")
    assert message.count("unknown key") == 1
    assert hint in message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimizer=sgd", "optim.name"),
        ("train.learning_rate=1", "optim.lr"),
        ("imgsz=64", "data.image_size"),
        ("batchsize=8", "train.batch_size"),
        ("epoch=8", "train.epochs"),
    ],
)
def test_words_of_other_tools_are_explained(override: str, hint: str) -> None:
    key = override.partition("=")[0]
    assert refused(override).startswith(f"unknown key {key!r} (did you mean {hint}?)")


def test_names_of_other_tools_belong_to_keys_and_are_no_keys() -> None:
    keys = recipe._all_keys()
    for key, names in recipe.OTHER_NAMES.items():
        assert key in keys
        assert not {each.rpartition(".")[2].replace("_", "") for each in keys} & set(names)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=resnet18", "model is a section (did you mean model.name=resnet18?)"),
        ("data=mnist", "data is a section (did you mean data.name=mnist?)"),
        ("train=5", "train is a section; write train.KEY=VALUE"),
        ("data.image_size=224,224", "write one number: data.image_size=224"),
        ("data.rename=a:b", "write data.rename={a: b}, in quotes for a shell"),
        ("data.image_size=[224, 320]", "write one number: data.image_size=224"),
        ("data.image_size=32x32", "write one number: data.image_size=32"),
        ("data.image_size=abc", "data.image_size='abc': must be a whole number or auto"),
        ("data.image_size=4", "data.image_size=4: must be at least 8 or auto"),
        ("train.batch_size=1.5", "train.batch_size=1.5: must be a whole number"),
        ("optim.lr=fast", "optim.lr='fast': must be a number"),
        ("optim.lr=0", "optim.lr=0: must be greater than 0"),
        ("optim.lr=0,1", "write a point: optim.lr=0.1"),
        ("data.val_fraction=20%", "write a fraction: data.val_fraction=0.2"),
        ("optim.nesterov=maybe", "must be true or false"),
        ("data.fit=squeeze", "data.fit='squeeze': must be auto, crop, pad or stretch"),
        ("data.range=[1]", "data.range=[1]: must be two numbers in brackets or auto"),
        ("data.range=4095", "data.range=4095: must be two numbers in brackets or auto"),
        ("data.range=0..many", "must be two numbers in brackets or auto"),
        ("data.range=4095..0", "must be smaller"),
        ("optim.betas=0.9", "must be two numbers in brackets"),
        ("optim.betas=[0.9, 2]", "optim.betas.1=2: must be less than 1"),
        ("data.background=pink", "must be auto, alpha, white, black, grey or #rrggbb"),
        ("optim.groups=[{params: head, lr: x}]", "optim.groups.0.lr='x': must be a number"),
        ("model.weights=''", "model.weights='': must have at least 1 character"),
    ],
)
def test_invalid_values_are_explained_in_words(override: str, message: str) -> None:
    text = refused(override)
    assert message in text
    assert "input" not in text.lower()


def test_all_errors_are_reported_at_once() -> None:
    message = refused("data.nam=x", "optim.lr=nan", "train.epochs=-1")
    assert "data.nam" in message
    assert "optim.lr" in message
    assert "train.epochs=-1" in message
    more = refused("data.nam=x", "optim.lr=nan", "train.epochs=-1", "foo=1", "optim.ema=2")
    assert "(and 2 more)" in more


def test_a_mapping_needs_no_blank_after_the_colon() -> None:
    loaded = recipe.load_recipe("digits", ["optim.class_weights={a:2,b:0.5}", "data.rename={x:y}"])
    assert loaded.optim.class_weights == {"a": 2.0, "b": 0.5}
    assert loaded.data.rename == {"x": "y"}
    assert "must be" in refused("data.rename={x}")


def test_override_without_equals_sign_is_explained() -> None:
    assert "write key=value" in refused("optim.lr")


def test_unknown_keys_in_a_file_and_in_a_mapping() -> None:
    path = written("optim: {lrr: 1}\ntrian: {epochs: 1}\n")
    message = refused(source=path)
    assert "'optim.lrr' (did you mean optim.lr" in message
    assert "'trian'" in message
    assert str(path) in message
    assert "'optim.lrr'" in refused(source={"optim": {"lrr": 1}})


# YAML


@pytest.mark.parametrize(
    ("text", "message"),
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
        ("1: 2\n", "1"),
        ("optim: {1: 2}\n", "1"),
        ("name: [1]\n", "name=[1]"),
        ("--- {}\n--- {}\n", "not valid YAML"),
        ("optim:\n", "optim=None"),
    ],
)
def test_invalid_files_are_usage_errors(text: str, message: str) -> None:
    assert message in refused(source=written(text))
    assert not Path("hacked").exists()


def test_yaml_errors_name_the_line_or_the_override() -> None:
    with pytest.raises(UsageError) as caught:
        recipe.load_recipe(written("about: x\noptim:\n  lr: [1\ntrain: {}\n", "broken.yaml"))
    assert caught.value.where == "broken.yaml, line 4"
    assert "'optim.lr=[1', line 1: not valid YAML: expected ',' or ']'" in refused("optim.lr=[1")


def test_unreadable_file_or_unknown_name_is_a_usage_error() -> None:
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x00\x80")
    assert "can't read the recipe" in refused(source="binary.yaml")
    assert "can't read the recipe" in refused(source="absent.yaml")
    assert "unknown recipe 'digitz'" in refused(source="digitz")
    assert "did you mean digits" in refused(source="digitz")


def test_recipe_file_without_a_name_is_named_after_the_file() -> None:
    assert recipe.load_recipe(written("about: a\n", "one.yaml")).name == "one"
    assert recipe.load_recipe(written("name: other\n", "two.yaml")).name == "other"
    assert recipe.load_recipe({}).name == "custom"


# base


def test_base_chains_merge_section_by_section() -> None:
    Path("sub").mkdir()
    written("base: mnist\noptim: {lr: 0.5}\n", "a.yaml")
    written("base: ../a.yaml\ntrain: {epochs: 7}\nmodel: {dropout: 0.3}\n", "sub/b.yaml")
    loaded = recipe.load_recipe(Path("sub/b.yaml"), ["optim.momentum=0.1"])
    mnist = recipe.load_recipe("mnist")
    assert loaded.name == "b"
    assert (loaded.optim.lr, loaded.train.epochs, loaded.optim.momentum) == (0.5, 7, 0.1)
    assert loaded.model.options == {**mnist.model.options, "dropout": 0.3}
    assert (loaded.optim.name, loaded.train.batch_size) == (
        mnist.optim.name,
        mnist.train.batch_size,
    )
    assert loaded.data == mnist.data


def test_lists_replace_the_lists_of_the_base() -> None:
    written("base: digits\naugment: [RandomHorizontalFlip]\nmodel: {widths: [8]}\n", "c.yaml")
    loaded = recipe.load_recipe("c.yaml")
    assert loaded.operations == [("RandomHorizontalFlip", {})]
    assert loaded.model.options["widths"] == [8]


def test_circular_base_is_refused() -> None:
    written("base: q.yaml\n", "p.yaml")
    written("base: p.yaml\n", "q.yaml")
    assert "circular base: p.yaml -> q.yaml -> p.yaml" in refused(source="p.yaml")
    written("base: self.yaml\n", "self.yaml")
    assert "circular" in refused(source="self.yaml")


@pytest.mark.parametrize("base", ["5", "[mnist]", "{a: 1}", "true"])
def test_base_that_is_not_a_name_is_refused(base: str) -> None:
    assert "not the name or file of a recipe" in refused(source=written(f"base: {base}\n"))


def test_unknown_base_is_reported_with_suggestions() -> None:
    assert "did you mean mnist" in refused(source=written("base: mnistt\n"))


# Variants

VARIED = """
base: mnist
optim: {lr: 0.5}
variants:
  nested: {optim: {lr: 0.1, weight_decay: 0.2}, augment: [RandomHorizontalFlip]}
  dotted: {optim.lr: 0.2, train.epochs: 3, about: other}
  family: {model.blocks: 3, model.name: other}
"""


def test_variants_change_the_recipe_and_overrides_change_the_variant() -> None:
    path = written(VARIED, "varied.yaml")
    assert list(recipe.variants(path)) == ["nested", "dotted", "family"]
    unchanged, nested = recipe.load_recipe(path), recipe.load_recipe(path, variant="nested")
    assert (unchanged.optim.lr, nested.optim.lr, nested.optim.weight_decay) == (0.5, 0.1, 0.2)
    assert nested.operations == [("RandomHorizontalFlip", {})]
    assert nested.model == unchanged.model
    dotted = recipe.load_recipe(path, ["optim.lr=0.3"], "dotted")
    assert (dotted.optim.lr, dotted.train.epochs, dotted.about) == (0.3, 3, "other")
    assert recipe.load_recipe(path, variant="family").model.options == {"blocks": 3}
    assert nested.name == unchanged.name == "varied"


def test_variants_are_not_part_of_the_recipe_or_its_digest() -> None:
    with_them = recipe.load_recipe(written(VARIED))
    without = recipe.load_recipe(written(VARIED[: VARIED.index("variants")]))
    assert with_them.digest() == without.digest()
    assert "variants" not in with_them.to_text()
    assert "unknown key 'variants'" in refused("variants={}")


def test_renamed_key_settings_is_refused_with_the_new_name() -> None:
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


def test_variants_of_a_mapping() -> None:
    tree = {"optim": {"lr": 0.1}, "variants": {"a": {"optim.lr": 0.2}}}
    assert recipe.load_recipe(tree, variant="a").optim.lr == 0.2
    assert recipe.variants(tree) == {"a": {"optim.lr": 0.2}}
    assert recipe.variants("digits") == {}
    again = {**recipe.load_recipe(tree).model_dump(mode="json"), "variants": recipe.variants(tree)}
    assert recipe.load_recipe(again, variant="a") == recipe.load_recipe(tree, variant="a")


@pytest.mark.parametrize(
    ("variants", "message"),
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
def test_invalid_variants_are_refused(variants: str, message: str) -> None:
    path = written(f"base: digits\nvariants: {variants}\n")
    with pytest.raises(UsageError) as caught:
        recipe.load_recipe(path, variant="x")
    assert message in str(caught.value)


# Model families


@pytest.mark.parametrize("order", [0, 1])
def test_changed_family_drops_the_options_of_the_previous_one(order: int) -> None:
    overrides = ["model.name=other", "model.blocks=3"]
    if order:
        overrides.reverse()
    loaded = recipe.load_recipe("digits", overrides)
    assert loaded.model.name == "other"
    assert loaded.model.options == {"blocks": 3}


def test_changed_family_in_a_file_keeps_its_own_options() -> None:
    written("base: digits\nmodel: {blocks: 3, name: other}\n", "d.yaml")
    assert recipe.load_recipe("d.yaml").model.options == {"blocks": 3}


def test_unchanged_family_keeps_its_options() -> None:
    loaded = recipe.load_recipe("digits", ["model.name=cnn"])
    assert loaded == recipe.load_recipe("digits")


# Augmentation


def test_all_notations_of_augment_are_equal() -> None:
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
    ("value", "part"),
    [
        ("5", "a list of operations"),
        ("{a: 1}", "a list"),
        ("[5]", "5 is not an operation"),
        ("[[a]]", "is not an operation"),
        ("[{RandomCrop: 4}]", "augment"),
        ("later", "a list"),
    ],
)
def test_invalid_augment_is_refused(value: str, part: str) -> None:
    message = refused(f"augment={value}")
    assert part in message
    assert "list[dict" not in message


# Replacing


def test_replace_validates_the_new_recipe() -> None:
    loaded = recipe.load_recipe("digits").replace(**{"optim.lr": 0.5, "train.epochs": 2})
    assert (loaded.optim.lr, loaded.train.epochs) == (0.5, 2)
    with pytest.raises(UsageError, match=r"train\.epochs=0"):
        loaded.replace(**{"train.epochs": 0})
    with pytest.raises(UsageError, match="unknown key"):
        loaded.replace(**{"train.epoch": 1})


def test_mapping_of_the_caller_is_not_changed() -> None:
    mine: dict[str, Any] = {"optim": {"lr": 0.1}}
    recipe.load_recipe(mine, ["optim.lr=0.2", "data.name=shapes"])
    assert mine == {"optim": {"lr": 0.1}}


# Arbitrary values

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
def test_any_value_is_accepted_or_a_usage_error(
    pairs: list[tuple[str, Any]],
) -> None:
    overrides = [f"{key}={json.dumps(value)}" for key, value in pairs]  # JSON is YAML
    try:
        loaded = recipe.load_recipe("digits", overrides)
        validate_recipe(loaded)
    except UsageError:
        return
    assert math.isfinite(loaded.optim.lr)
    assert recipe.load_recipe(written(loaded.to_text(), "fuzz.yaml")).digest() == loaded.digest()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=3), st.sampled_from(KEYS), st.text(max_size=20))
def test_any_override_text_is_accepted_or_a_usage_error(
    texts: list[str], key: str, value: str
) -> None:
    for overrides in (texts, [f"{key}={value}"]):
        try:
            assert recipe.load_recipe("digits", overrides).name == "digits"
        except UsageError as error:
            assert error.what  # noqa: PT017


# The conversion of images


def test_digests_of_earlier_versions_had_crop_as_the_default() -> None:
    default, cropped = (recipe.load_recipe("folder", o) for o in ([], ["data.fit=crop"]))
    assert default.earlier_digest() is None
    assert cropped.earlier_digest() == default.digest() != cropped.digest()
    padded = recipe.load_recipe("folder", ["data.fit=pad"])
    assert padded.earlier_digest() is None
    only_fit = recipe.load_recipe({"data": {"fit": "crop"}})
    assert only_fit.earlier_digest() == recipe.load_recipe({}).digest()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.range=[5, 5]", "must be smaller"),
        ("data.range=[1, 2, 3]", "data.range"),
        ("data.range=[0, .inf]", "finite"),
        ("data.background=orange", "data.background"),
        ("data.max_pixels=0", "data.max_pixels"),
    ],
)
def test_invalid_conversions_are_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        recipe.load_recipe("folder", [override])


@pytest.mark.parametrize(
    "text",
    [
        "[0, 4095]",
        "0..4095",
        "0-4095",
        "0,4095",
        "0:4095",
        "(0; 4095)",
        "0 to 4095",
        "0.0...4.095e3",
    ],
)
def test_a_value_range_is_read_as_people_write_it(text: str) -> None:
    loaded = recipe.load_recipe("folder", [f"data.range={text}"])
    assert loaded.data.range == (0.0, 4095.0)
    assert loaded.digest() == recipe.load_recipe("folder", ["data.range=[0, 4095]"]).digest()


def test_a_value_range_may_be_negative() -> None:
    for text in ("-1000..-0.5", "-1000 - -.5", "-1e3,-0.5"):
        assert recipe.load_recipe("folder", [f"data.range={text}"]).data.range == (-1000.0, -0.5)


def test_the_conversion_is_recorded_where_the_recipe_says_auto() -> None:
    color = recipe.load_recipe("folder", ["data.background=#00ff7f"])  # no comment, as in YAML
    assert color.data.background == "#00ff7f"
    loaded = recipe.load_recipe("folder", ["data.background=black"])
    resolved = recipe.resolve_auto(
        loaded, images=10, image_size=64, channels=3, fit="pad", value_range=(1.5, 9)
    )
    data = resolved.data
    assert (data.fit, data.range, data.background) == ("pad", (1.5, 9.0), "black")
    assert recipe.load_recipe(resolved.model_dump(mode="json")).digest() == resolved.digest()


# `auto`


@pytest.mark.parametrize(("images", "epochs"), [(10, 60), (13_000, 10), (1_000_000, 8)])
def test_number_of_epochs_follows_from_the_number_of_images(images: int, epochs: int) -> None:
    loaded = recipe.load_recipe("folder", FROM_SCRATCH)
    resolved = recipe.resolve_auto(loaded, images=images, image_size=64, channels=3)
    assert resolved.train.epochs == epochs
    assert (resolved.data.image_size, resolved.data.channels) == (64, 3)
    again = recipe.resolve_auto(resolved, images=1, image_size=64, channels=3)
    assert again == resolved


def test_default_augmentation_does_not_mirror_gray_images() -> None:
    names = [
        [name for entry in recipe.default_augmentation(size, channels) for name in entry]
        for size, channels in ((28, 1), (32, 3), (64, 3))
    ]
    assert names == [
        ["RandomAffine"],
        ["RandomHorizontalFlip", "RandomCrop"],
        ["RandomHorizontalFlip", "RandomResizedCrop", "ColorJitter"],
    ]


@pytest.mark.parametrize(("images", "epochs"), [(10, 20), (1600, 10), (1769, 9), (1_000_000, 3)])
def test_a_fine_tuning_sees_fewer_images(images: int, epochs: int) -> None:
    loaded = recipe.load_recipe("folder", ["model.name=resnet18", "model.weights=IMAGENET1K_V1"])
    resolved = recipe.resolve_auto(loaded, images=images, image_size=160, channels=3)
    assert resolved.train.epochs == epochs


@pytest.mark.parametrize(
    ("epochs", "images", "names"),
    [
        ("19", 1000, ["RandomHorizontalFlip"]),  # `auto` would be 60
        ("20", 1000, ["RandomHorizontalFlip", "RandomResizedCrop", "ColorJitter"]),
        ("2", 100_000, ["RandomHorizontalFlip"]),  # `auto` would be 8
        ("3", 100_000, ["RandomHorizontalFlip", "RandomResizedCrop", "ColorJitter"]),
        ("auto", 1000, ["RandomHorizontalFlip", "RandomResizedCrop", "ColorJitter"]),
        ("auto", 100_000, ["RandomHorizontalFlip", "RandomResizedCrop", "ColorJitter"]),
    ],
)
def test_short_trainings_are_augmented_lightly(epochs: str, images: int, names: list[str]) -> None:
    loaded = recipe.load_recipe("folder", [*FROM_SCRATCH, f"train.epochs={epochs}"])
    resolved = recipe.resolve_auto(loaded, images=images, image_size=64, channels=3)
    assert [name for name, _ in resolved.operations] == names
    # Small and gray images are augmented mildly in any case.
    for size, channels, count in ((32, 3, 2), (64, 1, 1)):
        small = recipe.resolve_auto(loaded, images=images, image_size=size, channels=channels)
        assert len(small.operations) == count

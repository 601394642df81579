"""The command `recipes`."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from convlens import recipe, recipe_reference
from convlens.cli.recipes import UNMEASURED, print_keys, print_recipes
from helpers.commands import here, refused

EDITOR_LINE = re.compile(r"# yaml-language-server: \$schema=(.*)\n")


def test_every_recipe_is_listed_and_unmeasured_ones_last() -> None:
    lines = here("recipes").out.splitlines()
    rows = {name: line for line in lines for name in recipe.recipe_names() if f" {name} " in line}
    assert set(rows) == set(recipe.recipe_names())
    first = next(n for n, line in enumerate(lines) if line.strip() == "for a GPU, unmeasured")
    last = [name for name in rows if lines.index(rows[name]) > first]
    assert (
        set(last)
        == {name for name in rows if UNMEASURED.match(recipe.load_recipe(name).about)}
        >= {"resnet18-best", "tiny-best", "imagenet"}
    )
    assert "unmeasured" not in rows["tiny-best"]


def test_the_list_shows_the_number_of_variants(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = {"few": recipe.load_recipe("mnist"), "digits": recipe.load_recipe("digits")}
    print_recipes(loaded, {"few": ["a", "b"], "digits": []})
    first_line, digits = capsys.readouterr().out.strip().splitlines()[-2:]
    assert first_line.rstrip().endswith("; 2 variants")
    assert "variants" not in digits


@pytest.mark.parametrize("name", ["digits", "mnist-reg"])
def test_a_printed_recipe_names_its_schema_and_is_equal(name: str) -> None:
    printed = here("recipes", name).out
    match = EDITOR_LINE.match(printed)
    assert match
    assert printed.removeprefix(match[0]) == recipe.recipe_text(name)
    url = urlparse(match[1])
    assert url.scheme == "file"
    assert json.loads(Path(unquote(url.path)).read_text()) == json.loads(
        here("recipes", "--schema").out
    )
    Path("mine.yaml").write_text(printed)
    assert recipe.load_recipe("mine.yaml").digest() == recipe.load_recipe(name).digest()
    assert here("recipes", name, "--json").json == recipe.load_recipe(name).model_dump(mode="json")


def test_a_schema_in_the_current_folder_is_named_by_its_name() -> None:
    Path(recipe_reference.SCHEMA_FILE).write_text(here("recipes", "--schema").out)
    assert here("recipes", "mnist").out.startswith(
        "# yaml-language-server: $schema=recipe.schema.json\n"
    )


def test_a_file_is_printed_without_its_base() -> None:
    Path("mine.yaml").write_text("base: digits\ntrain: {epochs: 3}\n")
    printed = here("recipes", "mine.yaml").out
    assert "base:" not in printed
    Path("copy.yaml").write_text(printed)
    assert recipe.load_recipe("copy.yaml") == recipe.load_recipe("mine.yaml")


def test_keys_are_explained_in_a_table_and_as_json() -> None:
    loaded = recipe.load_recipe("mnist-fast")
    expected = recipe_reference.recipe_keys(loaded)
    out = here("recipes", "mnist-fast", "--keys").out
    assert out.splitlines()[1].split() == ["key", "value", "meaning", "choices"]
    lines = out.splitlines()
    for key in expected:
        assert sum(line.startswith(f"{key.key} ") for line in lines) == 1, key
    row = next(line for line in lines if line.startswith("train.batch_size "))
    assert row.split()[1:4] == ["128", "Images", "per"]
    rare = lines.index(next(line for line in lines if line.startswith("rarely needed")))
    assert rare > lines.index(row)
    listed = here("recipes", "mnist-fast", "--keys", "--json").json["keys"]
    assert listed == [key.to_dict() for key in expected]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_keys_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        print_keys("digits", recipe_reference.recipe_keys(recipe.load_recipe("digits")))
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert ("meaning (choices)" in text) == (width == 80)
    shown = [line.split()[0] for line in lines if line.startswith(("optim.", "train."))]
    assert "optim.decay_bias_and_norm" in shown, "names of keys are not broken"


def test_unknown_names_and_contradictions_are_refused() -> None:
    refused(here("recipes", "minst"), 2, "unknown recipe 'minst'", "mnist")
    refused(here("recipes", "minst", "--keys"), 2, "unknown recipe 'minst'", "mnist")
    refused(here("recipes", "mnist", "--schema"), 2, "--schema is for all recipes")

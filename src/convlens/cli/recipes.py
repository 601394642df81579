"""The command `recipes`: the list of recipes, a recipe as a file, its keys, and their schema."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from convlens.cli import completion
from convlens.cli.common import Command, JsonOption, app, print_json
from convlens.cli.results import make_table, stdout_console
from convlens.errors import UsageError
from convlens.utils.console import print_status

if TYPE_CHECKING:
    from convlens.recipe import Recipe
    from convlens.recipe_reference import RecipeKey

# How the description of a recipe begins that nobody has trained to its end.
UNMEASURED = re.compile(r"((?:for a GPU, )?unmeasured): ")
OWN_IMAGES = "folder"  # the recipe whose data set is replaced
WIDE = 110  # columns from which value and choices have columns of their own
MAX_KEY_WIDTH, MAX_VALUE_WIDTH, MAX_CHOICES_WIDTH = 28, 20, 26
RARE = "rarely needed"


@app.command(cls=Command)
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE|FILE.yaml]",
            help="Recipe to print; without it, all are listed.",
            autocompletion=completion.complete_recipe,
        ),
    ] = None,
    keys: Annotated[
        bool,
        typer.Option("--keys", help="Explain every key: value, meaning and possible values."),
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List ready-made trainings (recipes), or print one to edit.

    A printed recipe begins with the address of its schema on this machine, with which editors
    complete and check its keys. A file recipe.schema.json in the current folder is named instead,
    so that both can be handed over.

    Examples:
        convlens recipes
        convlens recipes mnist > mine.yaml
        convlens recipes folder --keys
        convlens recipes --schema > recipe.schema.json
    """
    from convlens import recipe as recipe_module, recipe_reference

    if schema:
        if name is not None or keys:
            raise UsageError("--schema is for all recipes", fix="convlens recipes --schema")
        sys.stdout.write(recipe_reference.schema_text())
        return
    if keys:
        loaded = recipe_module.load_recipe(name or "folder")
        described = recipe_reference.recipe_keys(loaded)
        if as_json:
            print_json(True, {"keys": [key.to_dict() for key in described]})
        else:
            print_keys(loaded.name, described)
    elif name is not None:
        _print_recipe(name, as_json)
    else:
        all_recipes = {
            each: recipe_module.load_recipe(each) for each in recipe_module.recipe_names()
        }
        if as_json:
            print_json(True, {each: recipe.about for each, recipe in all_recipes.items()})
        else:
            variants = {each: list(recipe_module.variants(each)) for each in all_recipes}
            print_recipes(all_recipes, variants)


def _print_recipe(name: str, as_json: bool) -> None:
    """Print a recipe as a file, or its values as JSON."""
    from convlens.recipe import is_recipe_file, load_recipe, recipe_text, variants
    from convlens.recipe_reference import schema_reference

    if as_json:
        of_recipe = variants(name)
        content = load_recipe(name).model_dump(mode="json")
        print_json(True, content | ({"variants": of_recipe} if of_recipe else {}))
        return
    # A file is printed with all its values, so that its base is not needed any more.
    text = load_recipe(name).to_text() if is_recipe_file(name) else recipe_text(name)
    if address := schema_reference():
        sys.stdout.write(f"# yaml-language-server: $schema={address}\n")
    sys.stdout.write(text)


def print_recipes(recipes: Mapping[str, Recipe], variants: Mapping[str, Sequence[str]]) -> None:
    """Print the name and purpose of every recipe; those that were never measured come last."""
    parts: dict[str, list[str]] = {"": []}
    for name, recipe in recipes.items():
        unmeasured = UNMEASURED.match(recipe.about)
        parts.setdefault(unmeasured[1] if unmeasured else "", []).append(name)
    table = make_table("recipe")
    table.add_column("data")
    table.add_column("what it is")
    for part, names in parts.items():
        if part:
            table.add_row()
            table.add_row("", "", f"[bold]{part}[/]")
        for name in names:
            about = UNMEASURED.sub("", recipes[name].about)
            count = len(variants[name])
            about += f"; {count} variants" if count else ""
            data = "your own" if name == OWN_IMAGES else recipes[name].data.name
            table.add_row(name, escape(data), escape(about))
    stdout_console().print(table)
    print_status(
        "[dim]`convlens train NAME` trains a recipe, `convlens recipes NAME` prints it, "
        "`convlens recipes NAME --keys` explains its keys[/]"
    )


def print_keys(name: str, keys: Sequence[RecipeKey]) -> None:
    """Print a table of keys by section; values that the recipe sets are bold.

    In a narrow terminal, the value is below the key and the choices are behind the meaning.
    """
    from rich.table import Table

    out = stdout_console()
    is_wide = out.width >= WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    key_width = None if is_wide else MAX_KEY_WIDTH
    table.add_column("key" if is_wide else "key = value", max_width=key_width, overflow="fold")
    if is_wide:
        table.add_column("value", max_width=MAX_VALUE_WIDTH, overflow="fold")
    table.add_column("meaning" if is_wide else "meaning (choices)", ratio=2)
    if is_wide:
        table.add_column("choices", max_width=MAX_CHOICES_WIDTH)
    section = ""
    for key in sorted(keys, key=lambda key: key.is_rare):
        title = RARE if key.is_rare else key.key.rpartition(".")[0] or "recipe"
        if title != section:
            section = title
            table.add_row()
            table.add_row(f"[dim]{title}[/]")
        table.add_row(*_key_cells(key, is_wide=is_wide))
    out.print(f"{len(keys)} keys of [bold]{escape(name)}[/]; values that it sets are bold")
    out.print(table)
    print_status("[dim]KEY=VALUE changes a key on the command line; null stands for no value[/]")


def _key_cells(key: RecipeKey, *, is_wide: bool) -> list[str]:
    from convlens.recipe_reference import value_in_yaml

    value = escape(value_in_yaml(key.value))
    value = f"[bold]{value}[/]" if key.is_set else value
    meaning, choices = escape(key.meaning), escape(key.choices)
    if is_wide:
        return [f"[cyan]{key.key}[/]", value, meaning, f"[dim]{choices}[/]"]
    return [f"[cyan]{key.key}[/]\n= {value}", f"{meaning} [dim]({choices})[/]"]

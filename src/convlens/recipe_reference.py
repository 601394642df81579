"""The keys of a recipe as a reference: meaning, default and possible values of each one.

The descriptions are those of the fields in `recipe.py`. Options of networks are described in the
docstrings of their classes, augmentations in those of their functions.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError
from convlens.recipe import (
    SECTIONS,
    GroupConfig,
    LookaheadConfig,
    Recipe,
    Section,
)

SCHEMA_FILE = "recipe.schema.json"
LARGE = 1_000_000
# Keys of special optimizers, of several processes, and those that an option of the command line
# sets. Tables of keys list them last.
RARE_KEYS = frozenset(
    [
        "data.count",
        "data.fold",
        "data.folds",
        "optim.aux_lr",
        "optim.head_first",
        "optim.lookahead",
        "optim.muon_iterations",
        "optim.muon_normalise",
        "optim.warmup_from",
        "train.cache_trunk",
        "train.compile",
        "train.deterministic",
        "train.memory_format",
        "train.reference_images",
        "train.sync_batch_norm",
        "train.views",
    ]
)
RETIRED_VALUES = ("graph",)  # of `train.compile`: read from old runs, refused for new ones
# Options of the networks of torchvision and timm, which describe them in various ways.
ZOO_OPTIONS = {
    "attention_dropout": "dropout probability of the attention weights.",
    "drop_path_rate": "probability of skipping a residual block.",
    "drop_rate": "dropout probability.",
    "dropout": "dropout probability before the classifier.",
    "stochastic_depth_prob": "probability of skipping a residual block.",
    "zero_init_residual": "whether the last norm of each residual block starts at 0.",
}


@dataclass(frozen=True)
class RecipeKey:
    """One key of a recipe.

    Attributes:
        key: with dots, as on the command line.
        value: in a given recipe.
        meaning: what it does, with its unit and what `auto` or null stands for.
        choices: its possible values in words; empty if the meaning says all.
        is_set: whether the value differs from the default.
    """

    key: str
    value: Any
    default: Any
    meaning: str
    choices: str
    is_set: bool

    @property
    def is_rare(self) -> bool:
        """Whether few recipes need it."""
        return self.key in RARE_KEYS

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def recipe_keys(recipe: Recipe) -> list[RecipeKey]:
    """Return all keys of a recipe in its order; options of its network follow those of `model`."""
    outside = [name for name in Recipe.model_fields if name not in SECTIONS and name != "name"]
    keys = [_key_of_field(recipe, Recipe, name, "") for name in outside]
    for section, kind in SECTIONS.items():
        values = getattr(recipe, section)
        keys += [_key_of_field(values, kind, name, f"{section}.") for name in kind.model_fields]
        if section == "model":
            keys += model_option_keys(recipe.model.name, recipe.model.options)
    return keys


def nested_keys() -> list[RecipeKey]:
    """Return the keys of values that are mappings themselves: `optim.groups`, `optim.lookahead`."""
    group = GroupConfig(params="head")
    return [
        _key_of_field(values, kind, name, prefix)
        for prefix, kind, values in (
            ("optim.groups[].", GroupConfig, group),
            ("optim.lookahead.", LookaheadConfig, LookaheadConfig()),
        )
        for name in kind.model_fields
    ]


def model_option_keys(network: str, options: Mapping[str, Any]) -> list[RecipeKey]:
    """Return the keys of a network's own options.

    Args:
        options: the values that a recipe sets.
    """
    if network == "auto":
        return []
    # Imports torch, which a list of all other keys does not need.
    from convlens import models

    try:
        defaults = models.model_options(network)
    except ConvlensError:  # a network of a package that is not installed
        defaults = dict.fromkeys(options)
    own = option_descriptions(models.model_family(network)) if network in models.MODELS else {}
    keys = []
    for name, default in defaults.items():
        value = _to_json(options.get(name, default))
        meaning = own.get(name) or ZOO_OPTIONS.get(name, "")
        choices = _choices_of_option(meaning, default)
        default = _to_json(default)
        keys.append(
            RecipeKey(
                key=f"model.{name}",
                value=value,
                default=default,
                meaning=_capitalize(meaning),
                choices=choices,
                is_set=value != default,
            )
        )
    return keys


def option_descriptions(family: Any) -> dict[str, str]:
    """Return the descriptions of a class's arguments, from its docstring or those of its bases."""
    descriptions: dict[str, str] = {}
    for each in reversed(inspect.getmro(family)):
        if each.__module__.startswith("convlens."):
            descriptions |= _argument_descriptions(inspect.cleandoc(each.__doc__ or ""))
    return descriptions


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, for editors.

    A file may hold what `load_recipe` accepts: also `base` and `variants`, and shorter forms of
    some values. The schema keeps to draft 7, which all editors understand.
    """
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    properties = schema["properties"]
    properties["base"] = {
        "type": "string",
        "description": "Recipe or file whose values this file changes.",
    }
    properties["variants"] = {
        "type": "object",
        "additionalProperties": {"type": "object"},
        "description": "Named sets of changes: {slow: {optim.lr: 0.01}}, for `train --variants`.",
    }
    schema["required"] = []
    properties["augment"] = {
        **properties["augment"],
        "anyOf": [{"const": "auto"}, {"type": "array", "items": _augmentation_schema()}],
    }
    data = definitions["DataConfig"]["properties"]
    for key in ("classes", "without"):
        names = {"type": ["string", "integer"]}
        data[key]["anyOf"] = [names, {"type": "array", "items": names}]
        del data[key]["type"], data[key]["items"]
    data["range"]["anyOf"].append({"type": "string"})
    data["lists"]["anyOf"].append({"type": "integer"})
    _replace_pairs(schema)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of convlens",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def schema_reference() -> str:
    """Return where an editor finds the schema: beside a recipe that is written here, or installed.

    Empty if the package is not a folder of files.
    """
    if Path(SCHEMA_FILE).is_file():
        return SCHEMA_FILE
    installed = resources.files("convlens") / "recipes" / SCHEMA_FILE
    return installed.as_uri() if isinstance(installed, Path) and installed.is_file() else ""


def schema_text() -> str:
    """Return the JSON schema of a recipe as it is installed (`tools/reference.py` writes it)."""
    return (resources.files("convlens") / "recipes" / SCHEMA_FILE).read_text("utf-8")


def value_in_yaml(value: Any) -> str:
    """Return a value in one line, as it can be written on the command line: `[64, 128]`."""
    if isinstance(value, Mapping):
        pairs = (f"{key}: {value_in_yaml(inner)}" for key, inner in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_in_yaml, value))}]"
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key_of_field(section: Section, kind: type[Section], name: str, prefix: str) -> RecipeKey:
    field = kind.model_fields[name]
    schema = kind.model_json_schema()
    value = _to_json(getattr(section, name))
    default = None if field.is_required() else _to_json(field.get_default())
    return RecipeKey(
        key=prefix + name,
        value=value,
        default=default,
        meaning=field.description or "",
        choices=_choices_in_words(schema["properties"][name]),
        is_set=value != default,
    )


def _to_json(value: Any) -> Any:
    """Return a value of a recipe as JSON has it, e.g. a list for a tuple."""
    return json.loads(json.dumps(value, default=lambda each: each.model_dump(mode="json")))


def _choices_in_words(schema: Mapping[str, Any]) -> str:
    """Return the values that a JSON schema allows: `auto, a whole number from 8 to 1024`."""
    if "examples" in schema:
        return ", ".join(map(str, schema["examples"])) + (
            ", ..." if "pattern" not in schema else ""
        )
    alternatives = dict.fromkeys(
        words for each in schema.get("anyOf", [schema]) for words in _alternatives(each)
    )
    return ", ".join(alternatives)


def _alternatives(schema: Mapping[str, Any]) -> list[str]:
    if "const" in schema:
        return [value_in_yaml(schema["const"])]
    if "enum" in schema:
        return [value_in_yaml(value) for value in schema["enum"] if value not in RETIRED_VALUES]
    if "pattern" in schema:
        return []
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return [_number_in_words(schema, "whole number" if kind == "integer" else "number")]
    if kind == "array" and "prefixItems" in schema:
        return ["[number, number]"]
    words = {"boolean": "true, false", "null": "null", "string": "text", "array": "list"}
    return [words.get(str(kind), "mapping")]


def _number_in_words(schema: Mapping[str, Any], noun: str) -> str:
    """Return `whole number from 8 to 1,024`, `number above 0`, `number from 0, below 1`, ..."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    words = noun
    if above is not None:
        words += f" above {above:g}"
    elif low is not None:
        words += f" from {low:g}"
    if below is not None:
        words += f", below {below:g}"
    elif high is not None and high < LARGE:  # larger ones only keep a typo from filling the memory
        words += f" to {high:,}"
    return words


def _choices_of_option(meaning: str, default: Any) -> str:
    """Return the possible values of an option of a network, by its default and description."""
    quoted = re.findall(r"`([a-z_0-9]+)`", meaning)
    if isinstance(default, bool):
        return "true, false"
    if isinstance(default, str) and quoted:
        return ", ".join(dict.fromkeys(quoted))
    if isinstance(default, tuple | list):
        return "list of whole numbers"
    if isinstance(default, int):
        return "whole number"
    return "number"


def _capitalize(text: str) -> str:
    """Return a description as a sentence; a value at its beginning stays as it is written."""
    plain = text.replace("`", "")
    return plain if text.startswith("`") else plain[:1].upper() + plain[1:]


def _argument_descriptions(docstring: str) -> dict[str, str]:
    """Return the entries of the section `Args:` of a docstring in Google's style."""
    _, _, section = docstring.partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8,}.*)*)", section, flags=re.MULTILINE)
    return {
        name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")
    }


def _augmentation_schema() -> dict[str, Any]:
    """Return the schema of one operation of `augment`: its name, or `Name: {arguments}`."""
    from convlens.data.transforms.pipeline import AUGMENTS, MIXES  # imports torch

    table = {**AUGMENTS, **MIXES}
    properties = {}
    for name, entry in table.items():
        summary = (inspect.getdoc(entry.apply) or "").partition("\n")[0].replace("`", "")
        properties[name] = {
            "type": ["object", "null"],
            "description": summary,
            "properties": {argument: {} for argument in entry.rules},
            "required": list(entry.required),
            "additionalProperties": False,
        }
    user_code = ":"  # as in FILE.py:NAME
    named = [name for name, entry in table.items() if not entry.required]
    return {
        "anyOf": [
            {"enum": named},
            {"type": "string", "pattern": user_code},
            {
                "type": "object",
                "properties": properties,
                "patternProperties": {user_code: {"type": ["object", "null"]}},
                "additionalProperties": False,
            },
        ]
    }


def _replace_pairs(schema: Any) -> None:
    """Replace `prefixItems`, which draft 7 lacks, by the schema of all items; in place."""
    parts: Iterable[Any] = schema.values() if isinstance(schema, dict) else schema
    if isinstance(schema, dict) and "prefixItems" in schema:
        schema["items"] = schema.pop("prefixItems")[0]
    for part in parts:
        if isinstance(part, dict | list):
            _replace_pairs(part)


def augmentation_rows() -> list[tuple[str, str, dict[str, tuple[Any, str]]]]:
    """Return name, summary and arguments of each augmentation.

    Returns:
        For each argument its default (None: required or none) and its possible values in words.
    """
    from convlens.data.transforms.pipeline import AUGMENTS, MIXES, RuleContext

    rows = []
    for name, entry in {**AUGMENTS, **MIXES}.items():
        summary = (inspect.getdoc(entry.apply) or "").partition("\n")[0].replace("`", "")
        parameters = inspect.signature(entry.apply).parameters
        arguments = {}
        for argument, rule in entry.rules.items():
            default = parameters[argument].default
            # A rule describes the valid values when it gets an invalid one.
            valid = rule(object(), RuleContext())
            arguments[argument] = (
                None if default is inspect.Parameter.empty else _to_json(default),
                valid,
            )
        rows.append((name, summary, arguments))
    return rows

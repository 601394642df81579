"""Recipes: five typed sections that say everything a training run depends on.

`load` turns a name, a file or a mapping plus dotted overrides into a `Recipe`; `to_text` turns
it back into YAML that trains as it stands. All that is wrong is reported at once. No torch in
here: `convlens --help` and `convlens recipes` must be instant.

A recipe file may also have `variants`: named sets of changes to the rest of the file
(`variants: {slow: {optim: {lr: 0.01}}, fast: {optim.lr: 0.1}}`). They belong to the file, not to
the recipe that trains: `load(..., variant="slow")` returns an ordinary recipe.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from convlens.errors import UsageError
from convlens.names import hint, near, pick
from convlens.schema import (
    NESTED,
    SECTIONS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Section,
    TrainConfig,
)
from convlens.system import yamltext
from convlens.system.yamltext import short

Operations = list[tuple[str, dict[str, Any]]]
Source = str | Path | Mapping[str, Any]
Variants = dict[str, dict[str, Any]]

RENAMED_KEYS = {"settings": "variants"}  # old top-level keys, for the hint in the error


class Recipe(Section):
    """One training run, completely described.

    `augment` is a list of operations, `[{"RandomCrop": {"padding": 2}}, ...]`, applied in order
    to each training batch, or `auto`: chosen when the images are known (recipe `folder`).
    """

    name: str
    about: str = ""
    data: DataConfig = DataConfig()
    augment: list[dict[str, dict[str, Any]]] | Literal["auto"] = []  # noqa: RUF012 (pydantic copies it)
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @property
    def operations(self) -> Operations:
        """The augmentations as `(name, arguments)` pairs; empty while still `auto`."""
        if self.augment == "auto":
            return []
        return [(name, arguments) for entry in self.augment for name, arguments in entry.items()]

    def digest(self) -> str:
        """SHA-256 of what changes the result: everything but the name and the description.

        Defaults are left out, so that a key which a later version adds changes no digest.
        """
        content = self.model_dump(mode="json", exclude={"name", "about"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_text(self) -> str:
        """This recipe as YAML; `load` of a file with this text gives an equal recipe."""
        return yamltext.dump(self.model_dump(mode="json"))

    def replace(self, **changes: Any) -> Recipe:
        """A copy with dotted keys changed, e.g. `replace(**{"optim.lr": 0.1})`; checked again."""
        tree = self.model_dump(mode="json")
        for key, value in changes.items():
            _set(tree, key, value)
        return _check(tree, where=self.name)


def names() -> list[str]:
    """The names of the recipes that come with convlens."""
    folder = resources.files("convlens") / "recipes"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def text(name: str) -> str:
    """A built-in recipe's file as it stands, comments included."""
    pick(dict.fromkeys(names()), name, "recipe")
    return (resources.files("convlens") / "recipes" / f"{name}.yaml").read_text("utf-8")


def variants(source: Source) -> Variants:
    """Return a recipe's variants as `{name: changes}`, those of its base first."""
    return _tree(source)[1]


def load(source: Source, overrides: Sequence[str] = (), variant: str | None = None) -> Recipe:
    """The recipe called `source` (a built-in name, a YAML file or a mapping) with overrides.

    Args:
        overrides: `key=value` texts with dotted keys (`optim.lr=0.1`); values are YAML. They
            take precedence over the variant's changes.
        variant: name of a variant to apply; by default the recipe is loaded as it is.

    Raises:
        UsageError: unknown names or keys (with near misses) and impossible values, all at once.
    """
    tree, variants, where = _tree(source)
    problems: list[str] = []
    if variant is not None:
        where = f"{where}, variant {variant}"
        tree = _apply_variant(tree, variants, variant, where, problems)
    # The family first: setting it drops the former one's keys, not those given beside it.
    for override in sorted(overrides, key=lambda text: not text.startswith("model.name=")):
        key, equals, value = override.partition("=")
        if not equals:
            problems.append(f"{override!r} is no override: write key=value, e.g. optim.lr=0.1")
            continue
        try:
            _set(tree, key.strip(), yamltext.parse(value, where=short(override)))
        except UsageError as error:
            problems.append(f"{error.where}: {error.what}" if error.where else error.what)
    set_here = {text.partition("=")[0].strip() for text in overrides}
    return _check(tree, where=where, problems=problems, lines=lambda: _lines(source, set_here))


def _tree(source: Source, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], Variants, str]:
    """The merged, unchecked tree of a recipe and of those it is based on; variants; its place."""
    if isinstance(source, Mapping):
        tree, where, folder = _copy(source), "recipe", Path()
        tree.setdefault("name", "custom")
    elif is_file(str(source)):
        path = Path(source)
        tree = yamltext.parse(yamltext.read(path), where=str(path))
        where, folder = str(path), path.parent
        if not isinstance(tree, dict):
            raise UsageError("a recipe is a mapping of sections", where=where)
        tree.setdefault("name", path.stem)
    else:
        tree, where, folder = (
            yamltext.parse(text(str(source)), where=str(source)),
            str(source),
            Path(),
        )
        tree["name"] = str(source)
    base, variants = tree.pop("base", None), _check_variants(tree.pop("variants", None), where)
    if base is None:
        return tree, variants, where
    if not isinstance(base, str):
        raise UsageError(f"base={short(base)}: a recipe's name or file", where=where)
    if where in above:
        raise UsageError(f"base: {' -> '.join([*above, where])} goes in a circle", where=where)
    beneath, theirs, _ = _tree(folder / base if is_file(base) else base, (*above, where))
    return _merge(beneath, tree), {**theirs, **variants}, where


def _check_variants(value: Any, where: str) -> Variants:
    """Check names and types of a file's variants; their keys are checked when one is applied."""
    if value is None:
        return {}
    wrong = "variants maps names to changes, e.g. variants: {slow: {optim.lr: 0.01}}"
    if not isinstance(value, Mapping):
        raise UsageError(f"{wrong}; not {short(value)}", where=where)
    for name, changes in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name == "all":
            fix = "use letters, digits, `.`, `_` and `-`; `all` is reserved and means every variant"
            raise UsageError(f"invalid variant name {name!r}", where=where, fix=fix)
        if not isinstance(changes, Mapping):
            raise UsageError(f"{wrong}; not {name}: {short(changes)}", where=where)
    return {name: _copy(changes) for name, changes in value.items()}


def _apply_variant(
    tree: dict[str, Any], variants: Variants, name: str, where: str, problems: list[str]
) -> dict[str, Any]:
    """Return `tree` with the changes of variant `name`; invalid keys are added to `problems`."""
    if not variants:
        fix = f"write a file with `base: {tree['name']}` and `variants:`"
        raise UsageError(f"recipe {tree['name']!r} has no variants", where=where, fix=fix)
    changes = dict(pick(variants, name, "variant"))
    dotted = {str(key): changes.pop(key) for key in list(changes) if "." in str(key)}
    for key in [key for key in changes if key in ("name", "base", "variants")]:
        problems.append(f"a variant cannot change {key!r}")
        del changes[key]
    varied = tree
    try:
        varied = _merge(tree, changes)
        for key in sorted(dotted, key=lambda key: key != "model.name"):
            _set(varied, key, dotted[key])
    except UsageError as error:
        problems.append(error.what)
    return varied


def is_file(source: str) -> bool:
    """Whether a recipe argument means a file rather than a name."""
    return source.endswith((".yaml", ".yml"))


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _merge(beneath: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `beneath`, section by section; lists and values replace."""
    merged = _copy(beneath)
    for section, value in above.items():
        if not (isinstance(value, Mapping) and isinstance(merged.get(section), dict)):
            merged[section] = value
            continue
        for key, inner in sorted(value.items(), key=lambda item: item[0] != "name"):
            _set(merged, f"{section}.{key}", inner)
    return merged


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    section, dot, field = key.partition(".")
    if not dot:
        if section not in Recipe.model_fields or section == "name":
            raise _unknown(key)
        tree[section] = value
        return
    inside = tree.setdefault(section, {}) if section in SECTIONS else None
    if not isinstance(inside, dict) or "." in field:
        raise _unknown(key)
    if key == "model.name" and value != inside.get("name", "cnn"):
        # Another family: the former one's own keys would be refused by it.
        tree["model"] = {k: v for k, v in inside.items() if k in ModelConfig.model_fields}
        inside = tree["model"]
    inside[field] = value


def _check(
    tree: dict[str, Any],
    *,
    where: str,
    problems: Sequence[str] = (),
    lines: Callable[[], Mapping[str, int]] = dict,
) -> Recipe:
    """The recipe of a tree; `lines` says where its keys stand in a file."""
    found = list(problems)
    odd = list(yamltext.find_invalid(tree))
    if odd:
        raise UsageError("; ".join(odd[:3]), where=where)
    prepared = {**tree, "augment": _operations(tree.get("augment", []), found)}
    recipe = None
    try:
        recipe = Recipe.model_validate(prepared)
    except ValidationError as error:
        complaints, at = dict[str, str](), lines()
        for key, complaint in map(_explain, error.errors()):
            line = f" (line {at[key]})" if key in at else ""
            complaints.setdefault(key, complaint + line)  # a union reports once per member
        found += complaints.values()
    if found or recipe is None:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise UsageError(
            "; ".join(found[:3]) + more,
            where=where,
            fix="`convlens recipes NAME --json` prints every key of a recipe with its value",
        )
    return recipe


def _lines(source: Source, but: Collection[str]) -> dict[str, int]:
    """Where the keys of a recipe's own file stand; not those that are set elsewhere, too."""
    if isinstance(source, Mapping) or not is_file(str(source)):
        return {}
    at = yamltext.key_lines(yamltext.read(Path(source)))
    return {key: line for key, line in at.items() if key not in but}


def _operations(value: Any, found: list[str]) -> Any:
    """`- RandomHorizontalFlip` and `- RandomCrop: {padding: 2}` in one form."""
    if value == "auto" or value is None:
        return value or []
    if not isinstance(value, list):
        found.append(f"augment is a list of operations, not {short(value)}")
        return []
    entries: list[dict[str, Any]] = []
    for entry in value:
        if isinstance(entry, str):
            entries.append({entry: {}})
        elif isinstance(entry, Mapping):
            entries.append({str(k): ({} if v is None else v) for k, v in entry.items()})
        else:
            found.append(f"augment: {short(entry)} is no operation; write Name or Name: {{args}}")
    return entries


def _explain(item: Any) -> tuple[str, str]:
    """The key that pydantic complains of, and the complaint."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return path, _unknown(path).what
    first = str(item["loc"][0])
    parts = item["loc"][: 2 if first in SECTIONS else 1]
    # Further parts are the members of a union (no use to anyone) or a place within a list.
    parts += tuple(part for part in item["loc"][2:] if isinstance(part, int) or part in NESTED)
    key = ".".join(map(str, parts))
    message = item["msg"][0].lower() + item["msg"][1:]
    return key, f"{key}={short(item['input'])}: {message}"


def _unknown(key: str) -> UsageError:
    close = [RENAMED_KEYS[key]] if key in RENAMED_KEYS else meant(key)
    return UsageError(f"unknown key {short(key)}{hint(close)}")


def meant(key: str) -> list[str]:
    """The keys of a recipe that look like `key`, best first."""
    inside = [f"{name}.{field}" for name, kind in SECTIONS.items() for field in kind.model_fields]
    choices = ["about", "augment", *inside]
    # The right key in the wrong section is the commonest slip.
    last = key.rpartition(".")[2]
    close = [choice for choice in choices if choice.rpartition(".")[2] == last]
    return close or near(key, choices)

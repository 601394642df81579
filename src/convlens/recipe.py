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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convlens.errors import UsageError, close_matches, did_you_mean_suffix, lookup
from convlens.utils import yaml
from convlens.utils.yaml import shorten

# ---- schema ----------------------------------------
# The sections of a recipe and what may stand in them. `recipe.py` reads and writes them.

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section: unknown keys are refused, values can't change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, at which size, split how.

    `val_fraction: 0` leaves no validation split: everything but the test split is trained on, the
    source's own validation images, too; there is no epoch to choose then (`keep: last`).
    `folds: K, fold: k` makes part k of K (from 0) of these images the validation split.
    `per_class` is the number of training images of each class; validation is drawn before, from
    all there are. `total_per_class` counts training and validation together, all that a model
    learns from or is chosen by: with it `val_fraction` is of these few, and the rest is not used.
    `on_bad: skip` leaves out what can't be read, up to `max_bad` of all images and of each class's.
    """

    name: str = "digits"
    image_size: Annotated[int, Field(ge=8, le=1024)] | Literal["auto"] = "auto"
    fit: Literal["crop", "pad", "stretch"] = "crop"
    channels: Literal[1, 3, "auto"] = "auto"
    val_fraction: Fraction = 0.15
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    group: str | None = None
    per_class: Positive | None = None
    total_per_class: Positive | None = None
    folds: Annotated[int, Field(ge=2, le=1000)] | None = None
    fold: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    count: Annotated[int, Field(gt=0, le=10_000_000)] | None = None
    on_bad: Literal["stop", "skip"] = "stop"
    max_bad: Fraction = 0.1

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return self.folds is not None or self.val_fraction > 0


class ModelConfig(Section):
    """Which network. Keys beyond these belong to the family and are checked by it.

    `weights` are those it begins with: `none`, `default` or a member of torchvision's weights enum
    (`IMAGENET1K_V1`), an id of timm's (`hf-hub:...`), a file (.safetensors, .pt, .pth, .bin), or a
    run. Whatever a finished or continued run began with, it needs no more.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "cnn"
    weights: Annotated[str, Field(min_length=1)] = "none"
    trainable: str = "all"  # all, head, stages, last:K, NAME+ or names: models/freezing.py

    @property
    def options(self) -> dict[str, Any]:
        """The family's own keys."""
        return dict(self.model_extra or {})


class GroupConfig(Section):
    """Parameters with a rate, a decay or a time of their own; what isn't set is as in `optim`.

    `params` is a pattern of parameter names (`layer1.*`, `*.norm*.bias`) or one of the words
    `head`, `norms`, `norms.bias`, `biases`, `filters`. They train from `start` to `end`, fractions
    of all steps, and are frozen outside. `muon` chooses between the two rules of muon (a matrix
    that isn't a filter, a filter that is to be left to SGD).
    """

    params: str
    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    momentum: Fraction | None = None
    muon: bool | None = None
    start: Fraction = 0.0
    end: Annotated[float, Field(gt=0, le=1)] = 1.0


class LookaheadConfig(Section):
    """Every `every` steps the weights go back to their average, which moves ever less."""

    every: Positive = 5
    decay: Fraction = 0.95
    power: Annotated[float, Field(ge=0)] = 3.0


class OptimConfig(Section):
    """The optimiser, its schedule and what regularises the loss."""

    name: str = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    aux_lr: Annotated[float, Field(gt=0)] | None = None  # muon's rate for all but filters; null: lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_bias_and_norm: bool = True
    momentum: Fraction = 0.9
    nesterov: bool = False
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    muon_iterations: Annotated[int, Field(ge=1, le=10)] = 3
    muon_normalise: bool = True
    groups: list[GroupConfig] = []
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # a stage's rate over that of the next
    head_first: Fraction = 0.0  # share of the steps in which the head trains alone
    schedule: str = "constant"
    warmup: Fraction = 0.0
    warmup_from: Fraction = 0.0
    final: Fraction = 0.0  # what linear and cosine end at
    step_size: Annotated[float, Field(gt=0, le=1)] = 1 / 3
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    label_smoothing: Fraction = 0.0
    clip_value: Annotated[float, Field(gt=0)] | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    lookahead: LookaheadConfig | None = None


class TrainConfig(Section):
    """How long, in which batches, and which weights are kept."""

    epochs: Annotated[int, Field(gt=0, le=1_000_000)] | Literal["auto"] = "auto"
    batch_size: Annotated[int, Field(gt=0, le=10_000_000)] = 64
    patience: Positive | None = None
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"
    keep: Literal["best", "last"] = "best"
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    # true: torch.compile; auto: what pays, on CUDA only. (`graph` is read from finished runs of
    # earlier versions, and refused by `train`.)
    compile: bool | Literal["auto", "graph"] = "auto"
    sync_batch_norm: bool = False  # of several processes: norms over the whole batch (GPUs only)
    # A frozen trunk is computed once for all epochs; with augmentation for `views` fixed draws.
    cache_trunk: bool = True
    views: Annotated[int, Field(gt=0, le=1000)] | None = None
    deterministic: bool = False


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}
# Keys of what stands in a section as a mapping or a list of mappings.
NESTED = frozenset({*GroupConfig.model_fields, *LookaheadConfig.model_fields})


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
    augment: list[dict[str, dict[str, Any]]] | Literal["auto"] = []
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
        return yaml.dump_yaml(self.model_dump(mode="json"))

    def replace(self, **changes: Any) -> Recipe:
        """A copy with dotted keys changed, e.g. `replace(**{"optim.lr": 0.1})`; checked again."""
        tree = self.model_dump(mode="json")
        for key, value in changes.items():
            _set_key(tree, key, value)
        return _check_tree(tree, where=self.name)


def recipe_names() -> list[str]:
    """The names of the recipes that come with convlens."""
    folder = resources.files("convlens") / "recipes"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """A built-in recipe's file as it stands, comments included."""
    lookup(dict.fromkeys(recipe_names()), name, "recipe")
    return (resources.files("convlens") / "recipes" / f"{name}.yaml").read_text("utf-8")


def variants(source: Source) -> Variants:
    """Return a recipe's variants as `{name: changes}`, those of its base first."""
    return _tree(source)[1]


def load_recipe(
    source: Source, overrides: Sequence[str] = (), variant: str | None = None
) -> Recipe:
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
            _set_key(tree, key.strip(), yaml.parse_yaml(value, where=shorten(override)))
        except UsageError as error:
            problems.append(f"{error.where}: {error.what}" if error.where else error.what)
    set_here = {text.partition("=")[0].strip() for text in overrides}
    return _check_tree(tree, where=where, problems=problems, lines=lambda: _lines(source, set_here))


def _tree(source: Source, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], Variants, str]:
    """The merged, unchecked tree of a recipe and of those it is based on; variants; its place."""
    if isinstance(source, Mapping):
        tree, where, folder = _deep_copy(source), "recipe", Path()
        tree.setdefault("name", "custom")
    elif is_recipe_file(str(source)):
        path = Path(source)
        tree = yaml.parse_yaml(yaml.read_yaml(path), where=str(path))
        where, folder = str(path), path.parent
        if not isinstance(tree, dict):
            raise UsageError("a recipe is a mapping of sections", where=where)
        tree.setdefault("name", path.stem)
    else:
        tree, where, folder = (
            yaml.parse_yaml(recipe_text(str(source)), where=str(source)),
            str(source),
            Path(),
        )
        tree["name"] = str(source)
    base, variants = tree.pop("base", None), _check_variants(tree.pop("variants", None), where)
    if base is None:
        return tree, variants, where
    if not isinstance(base, str):
        raise UsageError(f"base={shorten(base)}: a recipe's name or file", where=where)
    if where in above:
        raise UsageError(f"base: {' -> '.join([*above, where])} goes in a circle", where=where)
    beneath, theirs, _ = _tree(folder / base if is_recipe_file(base) else base, (*above, where))
    return _merge(beneath, tree), {**theirs, **variants}, where


def _check_variants(value: Any, where: str) -> Variants:
    """Check names and types of a file's variants; their keys are checked when one is applied."""
    if value is None:
        return {}
    wrong = "variants maps names to changes, e.g. variants: {slow: {optim.lr: 0.01}}"
    if not isinstance(value, Mapping):
        raise UsageError(f"{wrong}; not {shorten(value)}", where=where)
    for name, changes in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name == "all":
            fix = "use letters, digits, `.`, `_` and `-`; `all` is reserved and means every variant"
            raise UsageError(f"invalid variant name {name!r}", where=where, fix=fix)
        if not isinstance(changes, Mapping):
            raise UsageError(f"{wrong}; not {name}: {shorten(changes)}", where=where)
    return {name: _deep_copy(changes) for name, changes in value.items()}


def _apply_variant(
    tree: dict[str, Any], variants: Variants, name: str, where: str, problems: list[str]
) -> dict[str, Any]:
    """Return `tree` with the changes of variant `name`; invalid keys are added to `problems`."""
    if not variants:
        fix = f"write a file with `base: {tree['name']}` and `variants:`"
        raise UsageError(f"recipe {tree['name']!r} has no variants", where=where, fix=fix)
    changes = dict(lookup(variants, name, "variant"))
    dotted = {str(key): changes.pop(key) for key in list(changes) if "." in str(key)}
    for key in [key for key in changes if key in ("name", "base", "variants")]:
        problems.append(f"a variant cannot change {key!r}")
        del changes[key]
    varied = tree
    try:
        varied = _merge(tree, changes)
        for key in sorted(dotted, key=lambda key: key != "model.name"):
            _set_key(varied, key, dotted[key])
    except UsageError as error:
        problems.append(error.what)
    return varied


def is_recipe_file(source: str) -> bool:
    """Whether a recipe argument means a file rather than a name."""
    return source.endswith((".yaml", ".yml"))


def _deep_copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _merge(beneath: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `beneath`, section by section; lists and values replace."""
    merged = _deep_copy(beneath)
    for section, value in above.items():
        if not (isinstance(value, Mapping) and isinstance(merged.get(section), dict)):
            merged[section] = value
            continue
        for key, inner in sorted(value.items(), key=lambda item: item[0] != "name"):
            _set_key(merged, f"{section}.{key}", inner)
    return merged


def _set_key(tree: dict[str, Any], key: str, value: Any) -> None:
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


def _check_tree(
    tree: dict[str, Any],
    *,
    where: str,
    problems: Sequence[str] = (),
    lines: Callable[[], Mapping[str, int]] = dict,
) -> Recipe:
    """The recipe of a tree; `lines` says where its keys stand in a file."""
    found = list(problems)
    odd = list(yaml.find_invalid(tree))
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
    if isinstance(source, Mapping) or not is_recipe_file(str(source)):
        return {}
    at = yaml.key_lines(yaml.read_yaml(Path(source)))
    return {key: line for key, line in at.items() if key not in but}


def _operations(value: Any, found: list[str]) -> Any:
    """`- RandomHorizontalFlip` and `- RandomCrop: {padding: 2}` in one form."""
    if value == "auto" or value is None:
        return value or []
    if not isinstance(value, list):
        found.append(f"augment is a list of operations, not {shorten(value)}")
        return []
    entries: list[dict[str, Any]] = []
    for entry in value:
        if isinstance(entry, str):
            entries.append({entry: {}})
        elif isinstance(entry, Mapping):
            entries.append({str(k): ({} if v is None else v) for k, v in entry.items()})
        else:
            found.append(f"augment: {shorten(entry)} is no operation; write Name or Name: {{args}}")
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
    return key, f"{key}={shorten(item['input'])}: {message}"


def _unknown(key: str) -> UsageError:
    close = [RENAMED_KEYS[key]] if key in RENAMED_KEYS else matching_keys(key)
    return UsageError(f"unknown key {shorten(key)}{did_you_mean_suffix(close)}")


def matching_keys(key: str) -> list[str]:
    """The keys of a recipe that look like `key`, best first."""
    inside = [f"{name}.{field}" for name, kind in SECTIONS.items() for field in kind.model_fields]
    choices = ["about", "augment", *inside]
    # The right key in the wrong section is the commonest slip.
    last = key.rpartition(".")[2]
    close = [choice for choice in choices if choice.rpartition(".")[2] == last]
    return close or close_matches(key, choices)


# ---- auto ----------------------------------------
# What `auto` in a recipe means, once the images are known.
#
# Each rule is one line with its reason; the values chosen are written into the run's recipe, which
# then trains the same without any rule.

# Images to look at in a whole training: about 3 minutes of the `folder` network on two cores at
# 64 px; more epochs were not worth their time on sets of some thousand photographs (docs/log.md).
TRAIN_IMAGES_TO_SEE = 130_000
EPOCH_LIMITS = (8, 60)


def resolve_auto(recipe: Recipe, *, images: int, image_size: int, channels: int) -> Recipe:
    """The recipe with every `auto` about data, augmentation and length replaced.

    Args:
        images: training images.
        image_size, channels: what the loaded data has, pixels and 1 or 3.
    """
    changes: dict[str, Any] = {"data.image_size": image_size, "data.channels": channels}
    if recipe.augment == "auto":
        changes["augment"] = default_augmentation(image_size, channels)
    if recipe.train.epochs == "auto":
        changes["train.epochs"] = min(
            max(round(TRAIN_IMAGES_TO_SEE / images), EPOCH_LIMITS[0]), EPOCH_LIMITS[1]
        )
    return recipe.replace(**changes)


def default_augmentation(image_size: int, channels: int) -> list[dict[str, dict[str, Any]]]:
    """Mild for grey images (often digits, scans: a mirror image may be another class)."""
    if channels == 1:
        return [{"RandomAffine": {"degrees": 10, "translate": [0.1, 0.1], "scale": [0.9, 1.1]}}]
    if image_size <= 32:  # objects fill the picture: shift, don't zoom
        return [
            {"RandomHorizontalFlip": {}},
            {"RandomCrop": {"padding": max(1, image_size // 8), "padding_mode": "reflect"}},
        ]
    return [
        {"RandomHorizontalFlip": {}},
        {"RandomResizedCrop": {"scale": [0.4, 1.0], "ratio": [0.75, 1.3333]}},
        {"ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}},
    ]

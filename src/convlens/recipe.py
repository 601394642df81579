"""Recipes: everything that a training run depends on, in five typed sections.

`load_recipe` turns a name, a file or a mapping, plus dotted overrides, into a `Recipe`;
`Recipe.to_text` writes it as YAML that can be trained again. All errors of a recipe are reported
at once. torch is not imported, so that `convlens --help` and `convlens recipes` are instant.

A recipe file may also have `variants`: named sets of changes to the rest of the file
(`variants: {slow: {optim: {lr: 0.01}}, fast: {optim.lr: 0.1}}`). They belong to the file and not
to the recipe: `load_recipe(..., variant="slow")` returns an ordinary recipe.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from convlens.errors import UsageError, close_matches, did_you_mean_suffix, lookup
from convlens.utils import yaml
from convlens.utils.yaml import shorten

# Training images to process in total: about 3 minutes of the `folder` network on two cores at
# 64 px. More epochs were not worth their time on sets of some thousand photographs (docs/log.md).
TRAIN_IMAGES_TO_SEE = 130_000
MIN_AUTO_EPOCHS, MAX_AUTO_EPOCHS = 8, 60
# The same for a training that starts with pretrained weights, which needs far fewer.
FINE_TUNING_IMAGES_TO_SEE = 16_000
MIN_FINE_TUNING_EPOCHS, MAX_FINE_TUNING_EPOCHS = 3, 20
# A training with a smaller share of the epochs that `auto` would choose is short: it does not learn
# images that are cropped and recolored as well (docs/log.md).
SHORT_TRAINING = 1 / 3

ERRORS_SHOWN = 3  # errors of a recipe in one message

RENAMED_KEYS = {"settings": "variants"}  # old top-level keys, for the hint in the error
# What other tools call a key, in letters and digits only, for the hint in the error. These are not
# aliases.
OTHER_NAMES = {
    "model.name": ("model", "arch", "architecture", "net", "network", "backbone", "modelname"),
    "model.weights": ("pretrained",),
    "optim.name": ("optimizer", "optimiser", "opt"),
    "optim.lr": ("learningrate", "lrate", "lr0"),
    "optim.schedule": ("scheduler", "lrscheduler", "lrschedule"),
    "optim.weight_decay": ("wd",),
    "optim.loss": ("criterion", "lossfunction", "lossfn"),
    "train.epochs": ("epoch", "numepochs", "nepochs", "maxepochs"),
    "train.batch_size": ("batch", "bs"),
    "train.patience": ("earlystopping",),
    "train.precision": ("amp", "mixedprecision", "fp16", "bf16"),
    "data.name": ("dataset", "datasetname"),
    "data.image_size": ("imgsz", "imgsize", "size", "resize", "resolution", "inputsize"),
    "data.val_fraction": ("valsplit", "validationsplit", "valsize"),
    "data.test_fraction": ("testsplit", "testsize"),
    "augment": ("augmentation", "augmentations", "transform", "transforms"),
}

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Operations = list[tuple[str, dict[str, Any]]]
Source = str | Path | Mapping[str, Any]
Variants = dict[str, dict[str, Any]]
Balance = Literal["none", "sqrt", "full"]


class Section(BaseModel):
    """Base class of the sections: unknown keys are refused, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """The data set, its image size and its splits.

    Attributes:
        name: a built-in set, a folder, a list, shards, or a data set of the user (`FILE.py:NAME`).
        layout: how a folder is read whose folders are named like splits, but could be classes.
        class_level: whether folders inside class folders are parts of these (`top`) or are the
            classes themselves (`leaf`). `auto` stops if both are possible.
        classes: the classes to use; empty for all. They keep the order of the set.
        without: classes to leave out.
        min_images: classes with fewer training images in the set are left out.
        group: a column of a CSV file, or a regular expression that is searched for in the path of
            each image below the folder: its first group, or the whole match. Images with equal
            values stay in one split.
        fit: how images become square. `crop` keeps the center, `pad` adds black borders, `stretch`
            distorts. `auto` crops, or pads where the typical image is longer than 1.5:1.
        range: `[low, high]`, the values of 16-bit, 32-bit and float images that become 0 and 255.
            `auto`: the 0.1 and 99.9 percentile of the training images. 8-bit images need none.
        background: the color behind transparent images: `white`, `black`, `grey` or `#rrggbb`; or
            `alpha`, which shows the alpha channel as a grey image. `auto` is white, and `alpha`
            where all images are transparent and white would hide their only color.
        max_pixels: larger images are refused; by default 89 million. A JPEG is decoded at a
            reduced scale instead.
        val_fraction: share of the images that is held out for validation. With 0 there is no
            validation split: all images outside the test split are used for training, including
            the source's own validation images, and the last epoch is kept (`keep: last`).
        folds, fold: make part `fold` (from 0) of `folds` equal parts the validation split.
        per_class: number of training images of each class. Validation images are drawn first, from
            all images.
        total_per_class: number of training and validation images of each class together, so all
            images that a model is trained on or selected by. `val_fraction` is then a share of
            these, and the remaining images are not used.
        path_column, label_column, split_column: columns of a list of images, if they are not found
            by their names; `split_column: none` reads no column as the split.
        images: the folder that the paths of a list are relative to.
        lists: which lists of a folder are read if there are several for each split: what their
            names have in common, such as `2` for `train2.txt` and `test2.txt`, or `variant` for
            `images_variant_train.txt`.
        rename: new names of classes, `{"old": "new"}`, both in quotes if they are numbers; classes
            with the same name become one.
        balance: how often an epoch draws the images of each class. `none` draws each image once;
            `sqrt` draws classes in proportion to the square root of their number of images, and
            `full` equally often. The number of images per epoch does not change.
        on_bad: `skip` leaves out unreadable images, up to the share `max_bad` of all images and of
            the images of each class.
        duplicates: what is done about images that are equal, byte for byte. `drop` keeps one of
            each, and none where their labels differ. `group` keeps an image and its copies in one
            split, where splits are drawn.
    """

    name: str = "digits"
    image_size: Annotated[int, Field(ge=8, le=1024)] | Literal["auto"] = "auto"
    fit: Literal["auto", "crop", "pad", "stretch"] = "auto"
    channels: Literal[1, 3, "auto"] = "auto"
    range: tuple[float, float] | Literal["auto"] = "auto"
    background: Annotated[str, Field(pattern="^(auto|alpha|white|black|grey|#[0-9a-fA-F]{6})$")] = (
        "auto"
    )
    max_pixels: Positive | None = None
    val_fraction: Fraction = 0.15
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    layout: Literal["auto", "classes", "splits"] = "auto"
    class_level: Literal["auto", "top", "leaf"] = "auto"
    classes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    min_images: Positive | None = None
    group: str | None = None
    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    images: str | None = None
    lists: str | None = None
    rename: dict[str, str] | None = None
    per_class: Positive | None = None
    total_per_class: Positive | None = None
    folds: Annotated[int, Field(ge=2, le=1000)] | None = None
    fold: Annotated[int, Field(ge=0)] = 0
    balance: Balance = "none"
    seed: Annotated[int, Field(ge=0)] = 0
    count: Annotated[int, Field(gt=0, le=10_000_000)] | None = None
    on_bad: Literal["stop", "skip"] = "stop"
    max_bad: Fraction = 0.1
    duplicates: Literal["keep", "drop", "group"] = "keep"

    @field_validator("range", mode="before")
    @classmethod
    def _parse_range(cls, value: Any) -> Any:
        """Accept `0..4095`, `0-4095` and `0,4095`, which people write without brackets."""
        if not isinstance(value, str):
            return value
        number = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
        between = r"\s*(?:\.\.+|-|\u2013|,|;|:|\bto\b|\s)\s*"
        match = re.fullmatch(rf"\s*[(\[]?\s*{number}{between}{number}\s*[)\]]?\s*", value.lower())
        return [float(match[1]), float(match[2])] if match else value

    @field_validator("range")
    @classmethod
    def _check_range(cls, value: Any) -> Any:
        if value != "auto" and not value[0] < value[1]:
            raise ValueError("the first number must be smaller than the second")
        return value

    @field_validator("lists", mode="before")
    @classmethod
    def _to_name(cls, value: Any) -> Any:
        """Accept `data.lists=2`, a number in YAML."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("classes", "without", mode="before")
    @classmethod
    def _to_class_names(cls, value: Any) -> Any:
        """Accept a single name without brackets, and names such as 12, a number in YAML."""
        names = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(name, bool) for name in names):
            raise ValueError("yes, no, on, off, true and false need quotes: ['yes', 'no']")
        return tuple(str(name) if isinstance(name, int) else name for name in names)

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return self.folds is not None or self.val_fraction > 0


class ModelConfig(Section):
    """The network. Any other keys are options of the model family, which checks them.

    Attributes:
        name: a family of `MODELS`, a network of torchvision, `timm/NAME`, or a network of the user
            (`FILE.py:NAME` or `package.module:NAME`). `auto`: the network of the pretrained weights
            that the training starts with (`training.transfer`).
        weights: initial weights: `none`, `default`, a package (`lite0`), a member of torchvision's
            weights enum (`IMAGENET1K_V1`), an id of timm (`hf-hub:...`), a file (.safetensors, .pt,
            .pth, .bin), or a run. `default` of a network with a package means the package if it is
            installed. A run that has started does not need their source again. `auto`: pretrained
            weights that are on this machine, or none; nothing is downloaded.
        trainable: `all`, `head`, `stages`, `last:K`, `NAME+`, or names (`models.stages`). `auto`:
            `all` from scratch, and without the first stages from pretrained weights.
        freeze_batch_norm: keep the statistics of batch norms as they are in the pretrained weights;
            `auto`: if there are any.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "cnn"
    weights: Annotated[str, Field(min_length=1)] = "none"
    trainable: str = "all"
    freeze_batch_norm: bool | Literal["auto"] = False

    @property
    def options(self) -> dict[str, Any]:
        """The options of the model family."""
        return dict(self.model_extra or {})


class GroupConfig(Section):
    """A parameter group with its own learning rate, weight decay or time window.

    Values that are not set are those of `optim`.

    Attributes:
        params: a pattern of parameter names (`layer1.*`, `*.norm*.bias`), or `head`, `norms`,
            `norms.bias`, `biases` or `filters`.
        muon: with `optim.name: muon`, whether these parameters are updated by Muon or by SGD; by
            default, filters are updated by Muon.
        start, end: time window as fractions of all steps. Outside it the parameters are frozen.
    """

    params: str
    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    momentum: Fraction | None = None
    muon: bool | None = None
    start: Fraction = 0.0
    end: Annotated[float, Field(gt=0, le=1)] = 1.0


class LookaheadConfig(Section):
    """Lookahead: every `every` steps the weights are reset to their slowly moving average."""

    every: Positive = 5
    decay: Fraction = 0.95
    power: Annotated[float, Field(ge=0)] = 3.0


class OptimConfig(Section):
    """The optimizer, its schedule, the loss, and regularization.

    Attributes:
        name: an entry of `OPTIMIZERS`, or an optimizer of the user (`FILE.py:NAME`), which may have
            `options`.
        lr, layer_decay: `auto`: values for a training from scratch or from pretrained weights.
        loss: an entry of `engine.losses.LOSSES`. `focal` multiplies the cross-entropy of an image
            by (1 - p)^focal_gamma, where p is the probability of its class, so that images that are
            already classified well count less (Lin et al. 2017). `class_balanced` weights classes
            by their effective number of images (Cui et al. 2019). `logit_adjusted` adds the log of
            the class frequencies to the logits while training (Menon et al. 2021). `asymmetric`
            counts classes other than the label less if their probability is small (Ridnik et al.
            2021); it needs `label_smoothing`. Or a loss of the user (`FILE.py:NAME`).
        loss_options: of the loss: `beta`, `gamma` (class_balanced), `tau` (logit_adjusted),
            `gamma_pos`, `gamma_neg` (asymmetric).
        class_weights: factors of the loss by class. `auto` makes all classes count equally in an
            epoch: n / (K n_c). Or `{name: weight}`, 1 for other classes. All are scaled to a mean
            of 1 over the training images.
    """

    name: str = "adamw"
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = 1e-3
    aux_lr: Annotated[float, Field(gt=0)] | None = None  # muon: rate for all but filters; null: lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_bias_and_norm: bool = True
    momentum: Fraction = 0.9
    nesterov: bool = False
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    options: dict[str, Any] = {}
    muon_iterations: Annotated[int, Field(ge=1, le=10)] = 3
    muon_normalise: bool = True
    groups: list[GroupConfig] = []
    # Ratio of the learning rates of adjacent stages.
    layer_decay: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 1.0
    head_first: Fraction = 0.0  # share of the steps in which only the head is trained
    schedule: str = "constant"
    warmup: Fraction = 0.0
    warmup_from: Fraction = 0.0
    final: Fraction = 0.0  # at the end of linear and cosine, as a fraction of lr
    step_size: Annotated[float, Field(gt=0, le=1)] = 1 / 3
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    loss: str = "cross_entropy"
    loss_options: dict[str, Any] = {}
    focal_gamma: Annotated[float, Field(gt=0, le=10)] = 2.0
    class_weights: str | dict[str, float] = "none"
    label_smoothing: Fraction = 0.0
    clip_value: Annotated[float, Field(gt=0)] | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    lookahead: LookaheadConfig | None = None

    @field_validator("class_weights", mode="before")
    @classmethod
    def _check_class_weights(cls, value: Any) -> Any:
        if value in ("none", "auto"):
            return value
        weights = value.values() if isinstance(value, Mapping) else ()
        if not weights or not all(type(w) in (int, float) and 0 < w < math.inf for w in weights):
            raise PydanticCustomError(
                "class_weights", "not none, auto or {class: weight} with weights above 0"
            )
        return value


class TrainConfig(Section):
    """Number of epochs, batch size, choice of weights, and how steps are computed.

    Attributes:
        minutes: the time for the whole training, test included. What the recipe leaves at `auto` of
            image size, trainable stages and epochs is chosen so that it fits
            (`training.time_budget`).
        monitor: the metric of the validation split by which the best epoch is selected. For
            unequal classes use `val_macro_f1` or `val_balanced_accuracy`, which count rare classes
            as much as common ones.
    """

    epochs: Annotated[int, Field(gt=0, le=1_000_000)] | Literal["auto"] = "auto"
    minutes: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    batch_size: Annotated[int, Field(gt=0, le=10_000_000)] = 64
    patience: Positive | None = None
    monitor: Literal["val_loss", "val_accuracy", "val_macro_f1", "val_balanced_accuracy"] = (
        "val_loss"
    )
    keep: Literal["best", "last"] = "best"
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    # true: torch.compile; auto: if timing shows that it pays, on CUDA only. (`graph` occurs in
    # finished runs of earlier versions; `train` refuses it.)
    compile: bool | Literal["auto", "graph"] = "auto"
    sync_batch_norm: bool = False  # with several processes: statistics of the global batch (GPUs)
    # The features of a frozen backbone are computed once for all epochs; with augmentation, for
    # `views` fixed draws.
    cache_trunk: bool = True
    views: Annotated[int, Field(gt=0, le=1000)] | None = None
    deterministic: bool = False
    # After the last epoch, the temperature, outputs for a half of the validation images, and
    # features of up to 2,000 training images are stored in the model file; `without_features`:
    # all but the features, the largest part.
    calibrate: bool | Literal["without_features"] = True
    # Number of training images whose features are stored; null: as many as fit, up to 2,000.
    reference_images: Annotated[int, Field(gt=0, le=2000)] | None = None


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}
# Keys of values in a section that are mappings or lists of mappings.
NESTED = frozenset({*GroupConfig.model_fields, *LookaheadConfig.model_fields})


class Recipe(Section):
    """A complete description of one training run.

    Attributes:
        about: one line for the list of recipes.
        augment: operations `[{"RandomCrop": {"padding": 2}}, ...]`, applied in order to each
            training batch; or `auto`, which is resolved when the images are known.
        code: the SHA-256 of the source of each part that is user code, by its name
            (`user_code.py`). It is filled in when a recipe is resolved.
    """

    name: str
    about: str = ""
    data: DataConfig = DataConfig()
    augment: list[dict[str, dict[str, Any]]] | Literal["auto"] = []
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    code: dict[str, str] = {}

    @property
    def operations(self) -> Operations:
        """The augmentations as `(name, arguments)` pairs; empty while `augment` is `auto`."""
        if self.augment == "auto":
            return []
        return [(name, arguments) for entry in self.augment for name, arguments in entry.items()]

    def digest(self) -> str:
        """Return the SHA-256 of all values that affect the result: all but name and description.

        Defaults are left out, so that a key added by a later version does not change the digest.
        """
        return _hash(self._content())

    def earlier_digest(self) -> str | None:
        """Return the digest of earlier versions if theirs was another one.

        They cropped by default and left `data.fit: crop` out. A run with this digest has this
        recipe if it crops its images.
        """
        if self.data.fit != "crop":
            return None
        content = self._content()
        del content["data"]["fit"]
        return _hash({key: value for key, value in content.items() if value or key != "data"})

    def _content(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"name", "about"}, exclude_defaults=True)

    def to_text(self) -> str:
        """Return the recipe as YAML; `load_recipe` reads an equal recipe from a file with it."""
        return yaml.dump_yaml(self.model_dump(mode="json"))

    def replace(self, **changes: Any) -> Recipe:
        """Return a validated copy with dotted keys changed, e.g. `replace(**{"optim.lr": 0.1})`."""
        tree = self.model_dump(mode="json")
        for key, value in changes.items():
            _set_key(tree, key, value)
        return _check_tree(tree, where=self.name)


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def recipe_names() -> list[str]:
    """Return the names of the built-in recipes."""
    folder = resources.files("convlens") / "recipes"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """Return the file of a built-in recipe, including its comments."""
    lookup(dict.fromkeys(recipe_names()), name, "recipe")
    return (resources.files("convlens") / "recipes" / f"{name}.yaml").read_text("utf-8")


def is_recipe_file(source: str) -> bool:
    """Return whether a recipe argument is a file rather than a name."""
    return source.endswith((".yaml", ".yml"))


def variants(source: Source) -> Variants:
    """Return a recipe's variants as `{name: changes}`, those of its base first."""
    return _read_tree(source)[1]


def load_recipe(
    source: Source, overrides: Sequence[str] = (), variant: str | None = None
) -> Recipe:
    """Load a recipe and apply overrides.

    Args:
        source: name of a built-in recipe, a YAML file, or a mapping.
        overrides: `key=value` texts with dotted keys (`optim.lr=0.1`); values are YAML. They
            take precedence over the variant's changes.
        variant: name of a variant to apply.

    Raises:
        UsageError: unknown names or keys (with suggestions) and invalid values, all at once.
    """
    tree, all_variants, where = _read_tree(source)
    problems: list[str] = []
    if variant is not None:
        where = f"{where}, variant {variant}"
        tree = _apply_variant(tree, all_variants, variant, where, problems)
    # The model family first: changing it drops the options of the previous family, but not the
    # options that are given beside it.
    for override in sorted(overrides, key=lambda text: not text.startswith("model.name=")):
        key, equals, value = override.partition("=")
        if not equals:
            problems.append(f"{override!r} is not an override: write key=value, e.g. optim.lr=0.1")
            continue
        try:
            # A color such as `#ffffff` would be a comment in YAML.
            is_color = value.lstrip().startswith("#")
            parsed = value if is_color else yaml.parse_yaml(value, where=shorten(override))
            _set_key(tree, key.strip(), _with_values(parsed))
        except UsageError as error:
            problems.append(f"{error.where}: {error.what}" if error.where else error.what)
    overridden = {text.partition("=")[0].strip() for text in overrides}
    return _check_tree(
        tree, where=where, problems=problems, lines=lambda: _lines(source, overridden)
    )


def parse_values(texts: Sequence[str]) -> dict[str, Any]:
    """Return `key=value` texts as a mapping; values are YAML.

    Raises:
        UsageError: a text without `=`, or invalid YAML.
    """
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text!r} is not an option", fix="write KEY=VALUE, e.g. width=64")
        values[key.strip()] = _with_values(yaml.parse_yaml(value, where=shorten(text)))
    return values


def _with_values(parsed: Any) -> Any:
    """Return `{a: b}` for `{a:b}`, in which YAML sees the name `a:b` without a value."""
    if not isinstance(parsed, dict) or any(value is not None for value in parsed.values()):
        return parsed
    pairs = [str(key).partition(":") for key in parsed]
    if not all(value for _, _, value in pairs):
        return parsed
    return {key: yaml.parse_yaml(value, where=key) for key, _, value in pairs}


def _read_tree(
    source: Source, parents: tuple[str, ...] = ()
) -> tuple[dict[str, Any], Variants, str]:
    """Read a recipe and merge it with its bases; nothing is validated yet.

    Args:
        parents: the recipes that have this one as their base, to detect cycles.

    Returns:
        The merged tree, its variants, and the name of the source for error messages.
    """
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
        where, folder = str(source), Path()
        tree = yaml.parse_yaml(recipe_text(where), where=where)
        tree["name"] = where
    base, own_variants = tree.pop("base", None), _check_variants(tree.pop("variants", None), where)
    if base is None:
        return tree, own_variants, where
    if not isinstance(base, str):
        raise UsageError(f"base={shorten(base)}: not the name or file of a recipe", where=where)
    if where in parents:
        raise UsageError(f"circular base: {' -> '.join([*parents, where])}", where=where)
    base_source = folder / base if is_recipe_file(base) else base
    base_tree, base_variants, _ = _read_tree(base_source, (*parents, where))
    return _merge(base_tree, tree), {**base_variants, **own_variants}, where


def _check_variants(value: Any, where: str) -> Variants:
    """Check names and types of a file's variants; their keys are checked when one is applied."""
    if value is None:
        return {}
    message = "variants maps names to changes, e.g. variants: {slow: {optim.lr: 0.01}}"
    if not isinstance(value, Mapping):
        raise UsageError(f"{message}; not {shorten(value)}", where=where)
    for name, changes in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name == "all":
            fix = "use letters, digits, `.`, `_` and `-`; `all` is reserved and means every variant"
            raise UsageError(f"invalid variant name {name!r}", where=where, fix=fix)
        if not isinstance(changes, Mapping):
            raise UsageError(f"{message}; not {name}: {shorten(changes)}", where=where)
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
    changed = tree
    try:
        changed = _merge(tree, changes)
        for key in sorted(dotted, key=lambda key: key != "model.name"):
            _set_key(changed, key, dotted[key])
    except UsageError as error:
        problems.append(error.what)
    return changed


def _deep_copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the sections of `changes` merged into it; lists and values replace."""
    merged = _deep_copy(base)
    for section, value in changes.items():
        if not (isinstance(value, Mapping) and isinstance(merged.get(section), dict)):
            merged[section] = value
            continue
        for key, inner in sorted(value.items(), key=lambda item: item[0] != "name"):
            _set_key(merged, f"{section}.{key}", inner)
    return merged


def _set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a tree.

    Raises:
        UsageError: a recipe has no such key.
    """
    section, dot, field = key.partition(".")
    if not dot:
        if section not in Recipe.model_fields or section == "name":
            raise _unknown_key(key)
        tree[section] = value
        return
    content = tree.setdefault(section, {}) if section in SECTIONS else None
    if not isinstance(content, dict) or "." in field:
        raise _unknown_key(key)
    if key == "model.name" and value != content.get("name", "cnn"):
        # Options of the previous family would be refused by the new one.
        content = {k: v for k, v in content.items() if k in ModelConfig.model_fields}
        tree["model"] = content
    content[field] = value


def _check_tree(
    tree: dict[str, Any],
    *,
    where: str,
    problems: Sequence[str] = (),
    lines: Callable[[], Mapping[str, int]] = dict,
) -> Recipe:
    """Validate a tree and return it as a recipe.

    Args:
        problems: errors that are already known, to be reported together with those found here.
        lines: returns the line of each key in the file, for the messages.
    """
    tree = _with_class_names_as_text(tree)
    invalid = list(yaml.find_invalid(tree))
    if invalid:
        raise UsageError("; ".join(invalid[:ERRORS_SHOWN]), where=where)
    messages = list(problems)
    prepared = {**tree, "augment": _normalize_operations(tree.get("augment", []), messages)}
    recipe = None
    try:
        recipe = Recipe.model_validate(prepared)
    except ValidationError as error:
        errors, line_of = dict[str, list[Any]](), lines()
        for each in error.errors():  # a union reports once per member
            errors.setdefault(_key_of_error(each), []).append(each)
        for key, of_key in errors.items():
            line = f" (line {line_of[key]})" if key in line_of else ""
            messages.append(_describe_errors(key, of_key) + line)
    if messages or recipe is None:
        hidden = len(messages) - ERRORS_SHOWN
        more = f" (and {hidden} more)" if hidden > 0 else ""
        raise UsageError(
            "; ".join(messages[:ERRORS_SHOWN]) + more,
            where=where,
            fix="`convlens recipes NAME --json` prints every key of a recipe with its value",
        )
    return recipe


def _with_class_names_as_text(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with class names like `0` as text: YAML reads `{0: 2}` as a number."""
    options = tree.get("optim")
    weights = options.get("class_weights") if isinstance(options, Mapping) else None
    if not isinstance(options, Mapping) or not isinstance(weights, Mapping):
        return tree
    named = {str(name): weight for name, weight in weights.items()}
    return {**tree, "optim": {**options, "class_weights": named}}


def _lines(source: Source, overridden: Collection[str]) -> dict[str, int]:
    """Return the lines of a recipe file's keys, except those that an override replaces."""
    if isinstance(source, Mapping) or not is_recipe_file(str(source)):
        return {}
    lines = yaml.key_lines(yaml.read_yaml(Path(source)))
    return {key: line for key, line in lines.items() if key not in overridden}


def _normalize_operations(value: Any, problems: list[str]) -> Any:
    """Return `- RandomHorizontalFlip` and `- RandomCrop: {padding: 2}` in the same form."""
    if value == "auto" or value is None:
        return value or []
    if not isinstance(value, list):
        problems.append(f"augment is a list of operations, not {shorten(value)}")
        return []
    operations: list[dict[str, Any]] = []
    for entry in value:
        if isinstance(entry, str):
            operations.append({entry: {}})
        elif isinstance(entry, Mapping):
            operations.append({str(k): ({} if v is None else v) for k, v in entry.items()})
        else:
            problems.append(
                f"augment: {shorten(entry)} is not an operation; write Name or Name: {{args}}"
            )
    return operations


def _key_of_error(error: Any) -> str:
    """Return the dotted key that an error of pydantic is about."""
    loc = error["loc"]
    if error["type"] == "extra_forbidden":
        return ".".join(map(str, loc))
    parts = loc[: 2 if str(loc[0]) in SECTIONS else 1]
    # Further parts are members of a union, which mean nothing to the user, or positions in a list.
    # The positions within a member are left out, so that the key is the same for all members.
    in_union = len(loc) > 2 and isinstance(loc[2], str) and loc[2] not in NESTED
    is_missing_item = error["type"] == "missing" and isinstance(loc[-1], int)
    if not (in_union or is_missing_item):
        parts += tuple(part for part in loc[2:] if isinstance(part, int) or part in NESTED)
    return ".".join(map(str, parts))


def _describe_errors(key: str, errors: Sequence[Any]) -> str:
    """Return a message about a key: what was received, and what it may be instead.

    Args:
        errors: those of pydantic. A key with several types, such as a number or `auto`, has one
            for each type.
    """
    if errors[0]["type"] == "extra_forbidden":
        return _unknown_key(key).what
    value = errors[-1]["input"]  # of a union: the whole value; the first error may be about a part
    received = f"{key}={shorten(value)}"
    if key in SECTIONS:
        if isinstance(value, str) and "name" in SECTIONS[key].model_fields:
            return f"{received}: {key} is a section (did you mean {key}.name={value}?)"
        return f"{received}: {key} is a section; write {key}.KEY=VALUE"
    hint = _hint_about_number(key, value, [error["type"] for error in errors])
    if hint:
        return f"{received}: {hint}"
    pair = re.fullmatch(r"\s*([^:{}]+?)\s*(?::|=|->)\s*([^:{}]+?)\s*", str(value))
    if pair and any(error["type"] == "dict_type" for error in errors):
        return f"{received}: write {key}={{{pair[1]}: {pair[2]}}}, in quotes for a shell"
    expected = [_expected_values(error) for error in errors]
    if all(expected):
        *others, last = dict.fromkeys(itertools.chain.from_iterable(expected))
        alternatives = f"{', '.join(others)} or {last}" if others else last
        return f"{received}: must be {alternatives}"
    message = errors[0]["msg"].removeprefix("Value error, ")
    message = re.sub(r"^\w+ should ", "must ", message)
    return f"{received}: {message[0].lower()}{message[1:]}"


def _expected_values(error: Any) -> list[str]:
    """Return in words what a value may be; empty for an error that only pydantic describes."""
    kind, limits = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return re.split(r", | or ", limits["expected"].replace("'", ""))
    if kind == "string_pattern_mismatch":  # the only key with a pattern is `data.background`
        return ["auto", "alpha", "white", "black", "grey", "#rrggbb"]
    is_missing_item = kind == "missing" and isinstance(error["loc"][-1], int)
    if is_missing_item or kind in ("tuple_type", "too_long"):  # all tuples of a recipe are pairs
        return ["two numbers in brackets"]
    words = {
        "int": ["a whole number"],
        "float": ["a number"],
        "bool": ["true", "false"],
        "string_type": ["text"],
        "list_type": ["a list in brackets"],
        "dict_type": ["a mapping {key: value}"],
        "model_type": ["a mapping {key: value}"],
        "finite_number": ["a finite number"],
        "greater_than": [f"greater than {limits.get('gt', 0):g}"],
        "greater_than_equal": [f"at least {limits.get('ge', 0):g}"],
        "less_than": [f"less than {limits.get('lt', 0):g}"],
        "less_than_equal": [f"at most {limits.get('le', 0):g}"],
    }
    return words.get(kind) or words.get(kind.partition("_")[0], [])


def _hint_about_number(key: str, value: Any, kinds: Sequence[str]) -> str:
    """Return how to write a number that was written in another way (`224,224`, `0,1`, `20%`)."""
    if any(kind.startswith("int_") for kind in kinds):
        pair = re.fullmatch(r"\W*(\d+)(\s*[,;x×]\s*\d+)+\W*", str(value))
        return f"write one number: {key}={pair[1]}" if pair else ""
    if any(kind.startswith("float_") for kind in kinds) and isinstance(value, str):
        if re.fullmatch(r"\d+,\d+", value):
            return f"write a point: {key}={value.replace(',', '.')}"
        if percent := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value):
            return f"write a fraction: {key}={float(percent[1]) / 100:g}"
    return ""


def _unknown_key(key: str) -> UsageError:
    close = [RENAMED_KEYS[key]] if key in RENAMED_KEYS else matching_keys(key)
    return UsageError(f"unknown key {shorten(key)}{did_you_mean_suffix(close)}")


def matching_keys(key: str) -> list[str]:
    """Return the keys of a recipe that are similar to `key`, best first."""
    # The most common mistakes are the right key in the wrong section, and the word of another tool.
    named = keys_named(key.rpartition(".")[2])
    if named:
        return named
    choices = _all_keys()
    last_parts = close_matches(key, {choice.rpartition(".")[2]: None for choice in choices})
    same = [choice for part in last_parts for choice in choices if choice.endswith(f".{part}")]
    return close_matches(key, choices) or same[:3]


def keys_named(name: str) -> list[str]:
    """Return the keys of a recipe whose last part is `name`, or that other tools call `name`."""
    same = [key for key in _all_keys() if key.rpartition(".")[2] == name]
    letters = "".join(filter(str.isalnum, name)).casefold()
    return same or [key for key, names in OTHER_NAMES.items() if letters in names]


def _all_keys() -> list[str]:
    dotted = [f"{name}.{field}" for name, kind in SECTIONS.items() for field in kind.model_fields]
    return ["about", "augment", *dotted]


def resolve_auto(
    recipe: Recipe,
    *,
    images: int,
    image_size: int,
    channels: int,
    fit: str = "crop",
    value_range: tuple[float, float] | None = None,
    background: str = "white",
    crop_size: int | None = None,
) -> Recipe:
    """Return the recipe with every `auto` about data, augmentation and epochs replaced.

    The values are written into the run's recipe, which then needs no rules to be trained again.

    Args:
        images: number of training images.
        image_size: of the loaded data, in pixels.
        channels: of the loaded data, 1 or 3.
        fit: of the loaded data.
        value_range: of the loaded data; None: `data.range` has no effect on them and is kept.
        background: of the loaded data.
        crop_size: size of the images that the network is trained on, if it is smaller than
            `image_size`.
    """
    changes: dict[str, Any] = {"data.image_size": image_size, "data.channels": channels}
    if recipe.data.fit == "auto":
        changes["data.fit"] = fit
    if recipe.data.background == "auto":
        changes["data.background"] = background
    if recipe.data.range == "auto" and value_range is not None:
        changes["data.range"] = list(value_range)
    usual_epochs = auto_epochs(images, is_pretrained=recipe.model.weights != "none")
    epochs = usual_epochs if recipe.train.epochs == "auto" else recipe.train.epochs
    if recipe.augment == "auto":
        is_short = epochs < SHORT_TRAINING * usual_epochs
        changes["augment"] = default_augmentation(
            image_size, channels, is_short=is_short, crop_size=crop_size
        )
    return recipe.replace(**changes, **{"train.epochs": epochs})


def auto_epochs(images: int, *, is_pretrained: bool) -> int:
    """Return the number of epochs that `auto` stands for."""
    if is_pretrained:
        epochs = round(FINE_TUNING_IMAGES_TO_SEE / images)
        return min(max(epochs, MIN_FINE_TUNING_EPOCHS), MAX_FINE_TUNING_EPOCHS)
    epochs = round(TRAIN_IMAGES_TO_SEE / images)
    return min(max(epochs, MIN_AUTO_EPOCHS), MAX_AUTO_EPOCHS)


def default_augmentation(
    image_size: int, channels: int, *, is_short: bool = False, crop_size: int | None = None
) -> list[dict[str, dict[str, Any]]]:
    """Return the augmentation that `auto` stands for.

    It is mild for gray images: often these are digits or scans, and their mirror image may belong
    to another class. In a short training larger images are only mirrored.

    Args:
        crop_size: of the random crops of larger color images; None: the image size.
    """
    if channels == 1:
        return [{"RandomAffine": {"degrees": 10, "translate": [0.1, 0.1], "scale": [0.9, 1.1]}}]
    if image_size <= 32:  # objects fill the image: shift, do not zoom
        return [
            {"RandomHorizontalFlip": {}},
            {"RandomCrop": {"padding": max(1, image_size // 8), "padding_mode": "reflect"}},
        ]
    if is_short and not crop_size:
        return [{"RandomHorizontalFlip": {}}]
    size = {"size": crop_size} if crop_size else {}
    return [
        {"RandomHorizontalFlip": {}},
        {"RandomResizedCrop": {"scale": [0.4, 1.0], "ratio": [0.75, 1.3333], **size}},
        {"ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}},
    ]

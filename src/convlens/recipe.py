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


def _or_user_code(names: list[str]) -> dict[str, Any]:
    """Return the JSON schema of a value that is one of these names, or `FILE.py:NAME`."""
    return {"anyOf": [{"enum": names}, {"pattern": ":"}]}


class Section(BaseModel):
    """Base class of the sections: unknown keys are refused, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """The data set, its image size and its splits."""

    name: str = Field(
        default="digits",
        description="The data set: a built-in name (digits, mnist, cifar10, ...), a folder with "
        "one sub-folder per class, a list of images (CSV, text, JSON, JSONL, parquet), shards, "
        "or a data set of yours (FILE.py:NAME).",
    )
    image_size: Annotated[int, Field(ge=8, le=1024)] | Literal["auto"] = Field(
        default="auto",
        description="Width and height, in pixels, to which images are brought. auto: 16 to 128, by "
        "the typical size of the images, or a size that suits the pretrained weights.",
    )
    fit: Literal["auto", "crop", "pad", "stretch"] = Field(
        default="auto",
        description="How images become square: crop keeps the center, pad adds black borders, "
        "stretch distorts. auto: crop, or pad where the typical image is longer than 1.5:1.",
    )
    channels: Literal[1, 3, "auto"] = Field(
        default="auto",
        description="Channels of the images: 1 (grey) or 3 (color). auto: 1 if all are grey.",
    )
    range: tuple[float, float] | Literal["auto"] = Field(
        default="auto",
        description="[low, high]: the values of 16-bit, 32-bit and float images that become 0 and "
        "255. auto: the 0.1 and 99.9 percentile of the training images. 8-bit images need none.",
    )
    background: Annotated[str, Field(pattern="^(auto|alpha|white|black|grey|#[0-9a-fA-F]{6})$")] = (
        Field(
            default="auto",
            description="Color behind transparent images; alpha shows the alpha channel as a grey "
            "image. auto: white, or alpha where all images are transparent and white would hide "
            "their only color.",
            json_schema_extra={
                "examples": ["auto", "alpha", "white", "black", "grey", "#rrggbb"],
            },
        )
    )
    max_pixels: Positive | None = Field(
        default=None,
        description="Image files with more pixels are refused; JPEGs are decoded at a reduced "
        "scale instead. null: 89 million.",
    )
    val_fraction: Fraction = Field(
        default=0.15,
        description="Share of the images that is held out for validation, if the data set has no "
        "validation split. 0: no validation; all images outside the test split are used for "
        "training, and the last epoch is kept.",
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.15,
        description="Share of the images that is held out for the test, if the data set has no "
        "test split.",
    )
    layout: Literal["auto", "classes", "splits"] = Field(
        default="auto",
        description="What the top folders are if their names could be both: classes or splits. "
        "auto: decided by names and contents; an error if both are possible.",
    )
    class_level: Literal["auto", "top", "leaf"] = Field(
        default="auto",
        description="Which folders are the classes: the top ones, or those that hold the images "
        "(leaf). auto: an error if both are possible.",
    )
    classes: tuple[str, ...] = Field(
        default=(), description="Classes to use, by name; they keep the order of the set. []: all."
    )
    without: tuple[str, ...] = Field(default=(), description="Classes to leave out, by name.")
    min_images: Positive | None = Field(
        default=None,
        description="Classes with fewer training images in the set are left out. null: none is.",
    )
    group: str | None = Field(
        default=None,
        description="Images with the same value stay in one split: a column of the list, or a "
        "regular expression that is searched for in each path (its first group, or the whole "
        "match). null: no groups.",
    )
    path_column: str | None = Field(
        default=None,
        description="Column of a list with the paths of images. null: found by its name.",
    )
    label_column: str | None = Field(
        default=None, description="Column of a list with the classes. null: found by its name."
    )
    split_column: str | None = Field(
        default=None,
        description="Column of a list with the split of each image; none: no column is read as "
        "the split. null: found by its name.",
    )
    images: str | None = Field(
        default=None,
        description="Folder that the paths of a list are relative to. null: the folder of the "
        "list.",
    )
    lists: str | None = Field(
        default=None,
        description="Which lists of a folder to read if it has several for each split: what their "
        "names have in common, e.g. 2 for train2.txt and test2.txt.",
    )
    rename: dict[str, str] | None = Field(
        default=None,
        description='New names of classes, {"old": "new"} (numbers in quotes); classes with the '
        "same name become one.",
    )
    per_class: Positive | None = Field(
        default=None,
        description="Number of training images of each class. Validation images are drawn first, "
        "from all images. null: all images.",
    )
    total_per_class: Positive | None = Field(
        default=None,
        description="Number of training and validation images of each class together; "
        "val_fraction is a share of these, and the remaining images are not used. null: all "
        "images.",
    )
    folds: Annotated[int, Field(ge=2, le=1000)] | None = Field(
        default=None,
        description="Number of equal parts for cross-validation; set by --folds. null: "
        "val_fraction decides.",
    )
    fold: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Which of the parts is the validation split, from 0; set by --folds."
    )
    balance: Balance = Field(
        default="none",
        description="How often an epoch draws the images of each class: each image once (none), "
        "classes in proportion to the square root of their size (sqrt), or all classes equally "
        "often (full). The number of images per epoch does not change.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Random seed of the splits and of the choice of images."
    )
    count: Annotated[int, Field(gt=0, le=10_000_000)] | None = Field(
        default=None, description="Number of images of the generated set shapes. null: 2,000."
    )
    on_bad: Literal["stop", "skip"] = Field(
        default="stop",
        description="What unreadable images do: stop the command, or skip leaves them out, up to "
        "max_bad.",
    )
    max_bad: Fraction = Field(
        default=0.1,
        description="Largest share of unreadable images of a split, and of a class in it, that "
        "on_bad=skip accepts.",
    )
    duplicates: Literal["keep", "drop", "group"] = Field(
        default="keep",
        description="What is done about image files that are equal byte for byte: keep all; drop "
        "all but one of each, and all where their labels differ; or group them, so that equal "
        "images stay in one split.",
    )

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
    """The network. Any other keys are options of the model family, which checks them."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(
        default="cnn",
        description="The network: a family of convlens, a network of torchvision, timm/NAME, or "
        "one of yours (FILE.py:NAME). auto: the network of the pretrained weights that the "
        "training starts with.",
        json_schema_extra={
            "examples": ["auto", "cnn", "fastnet", "resnet18", "resnet34", "resnet50", "wrn"],
        },
    )
    weights: Annotated[str, Field(min_length=1)] = Field(
        default="none",
        description="Weights to start with: none (random), default (pretrained; may be "
        "downloaded), a name of `convlens weights`, a file, or a run. auto: pretrained weights "
        "that are on this machine, or none; nothing is downloaded.",
        json_schema_extra={"examples": ["auto", "none", "default", "lite0"]},
    )
    trainable: str = Field(
        default="all",
        description="Layers that are trained; the others are frozen: all, head, stages (all but "
        "the head), last:K children, NAME+ (from there on), or names separated by commas. auto: "
        "all from scratch, and without the first stages from pretrained weights.",
        json_schema_extra={"examples": ["auto", "all", "head", "stages", "last:2", "layer3+"]},
    )
    freeze_batch_norm: bool | Literal["auto"] = Field(
        default=False,
        description="Keep the statistics of batch norms as they are in the pretrained weights. "
        "auto: if there are any.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The options of the model family."""
        return dict(self.model_extra or {})


class GroupConfig(Section):
    """A parameter group with its own learning rate, weight decay or time window.

    Values that are not set are those of `optim`.
    """

    params: str = Field(
        description="The parameters: a pattern of names (layer1.*, *.norm*.bias), or head, norms, "
        "norms.bias, biases or filters."
    )
    lr: Annotated[float, Field(gt=0)] | None = Field(default=None, description="Learning rate.")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Weight decay."
    )
    momentum: Fraction | None = Field(default=None, description="Momentum.")
    muon: bool | None = Field(
        default=None,
        description="With optim.name=muon: update these parameters by Muon (true) or by SGD "
        "(false). null: filters by Muon.",
    )
    start: Fraction = Field(
        default=0.0, description="Share of all steps from which the parameters are trained."
    )
    end: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Share of all steps until which they are trained; then they are frozen.",
    )


class LookaheadConfig(Section):
    """Lookahead: every `every` steps the weights are reset to their slowly moving average."""

    every: Positive = Field(default=5, description="Number of steps between two resets.")
    decay: Fraction = Field(default=0.95, description="Decay of the average per step.")
    power: Annotated[float, Field(ge=0)] = Field(
        default=3.0, description="Exponent of the decay's growth over the training."
    )


class OptimConfig(Section):
    """The optimizer, its schedule, the loss, and regularization."""

    name: str = Field(
        default="adamw",
        description="The optimizer, or one of yours (FILE.py:NAME).",
        json_schema_extra=_or_user_code(["adam", "adamw", "muon", "sgd"]),
    )
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default=1e-3,
        description="Learning rate, the maximum of the schedule. auto: a value for a training "
        "from scratch or from pretrained weights.",
    )
    aux_lr: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="With muon: learning rate of everything but filters. null: lr."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Weight decay: L2 regularization; decoupled from the gradient with adamw.",
    )
    decay_bias_and_norm: bool = Field(
        default=True, description="Whether biases and norm layers have weight decay, too."
    )
    momentum: Fraction = Field(default=0.9, description="Momentum of sgd and muon.")
    nesterov: bool = Field(default=False, description="Nesterov momentum, with sgd and muon.")
    betas: tuple[Fraction, Fraction] = Field(
        default=(0.9, 0.999),
        description="Decay rates of Adam's averages of the gradient and of its square.",
    )
    options: dict[str, Any] = Field(
        default={}, description="Options of an optimizer of yours, by name."
    )
    muon_iterations: Annotated[int, Field(ge=1, le=10)] = Field(
        default=3, description="With muon: iterations of the orthogonalization."
    )
    muon_normalise: bool = Field(
        default=True,
        description="With muon: scale the weights of each filter to a fixed norm before each step. "
        "false: for filters without a norm layer after them.",
    )
    groups: list[GroupConfig] = Field(
        default=[],
        description="Parameters with their own learning rate, weight decay or time window: "
        "[{params: head, lr: 0.1}, ...]. The first match counts.",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        default=1.0,
        description="Ratio of the learning rates of adjacent stages, from the head backwards. "
        "auto: 1 from scratch, below 1 from pretrained weights.",
    )
    head_first: Fraction = Field(
        default=0.0,
        description="Share of the steps in which only the head is trained, at the beginning.",
    )
    schedule: str = Field(
        default="constant",
        description="How the learning rate changes over the training.",
        json_schema_extra={"enum": ["constant", "cosine", "linear", "one-cycle", "step"]},
    )
    warmup: Fraction = Field(
        default=0.0,
        description="Share of the steps in which the learning rate rises. one-cycle: 0 means 0.3.",
    )
    warmup_from: Fraction = Field(
        default=0.0,
        description="Learning rate at the first step of the warm-up, as a fraction of lr.",
    )
    final: Fraction = Field(
        default=0.0,
        description="Learning rate at the end of the schedules linear and cosine, as a fraction "
        "of lr.",
    )
    step_size: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1 / 3,
        description="Schedule step: share of the steps after which the learning rate is "
        "multiplied by gamma.",
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="Schedule step: factor on the learning rate."
    )
    loss: str = Field(
        default="cross_entropy",
        description="The loss, or one of yours (FILE.py:NAME). focal (Lin et al. 2017) "
        "multiplies the cross-entropy of an image by (1 - p)^focal_gamma, where p is the "
        "probability of its class, so that images that are already classified well count less. "
        "class_balanced (Cui et al. 2019) weights classes by their effective number of images. "
        "logit_adjusted (Menon et al. 2021) adds the log of the class frequencies to the logits "
        "while training. asymmetric (Ridnik et al. 2021) counts classes other than the label less "
        "if their probability is small; it needs label_smoothing.",
        json_schema_extra=_or_user_code(
            ["asymmetric", "class_balanced", "cross_entropy", "focal", "logit_adjusted"]
        ),
    )
    loss_options: dict[str, Any] = Field(
        default={},
        description="Options of the loss: beta, gamma (class_balanced), tau (logit_adjusted), "
        "gamma_pos, gamma_neg (asymmetric), or those of a loss of yours.",
    )
    focal_gamma: Annotated[float, Field(gt=0, le=10)] = Field(
        default=2.0, description="Exponent of the focal loss."
    )
    class_weights: str | dict[str, float] = Field(
        default="none",
        description="Factors of the loss by class: none, {class: weight} (1 for other classes), "
        "or auto: all classes count equally in an epoch. Scaled to a mean of 1 over the training "
        "images.",
        json_schema_extra={"examples": ["none", "auto"]},
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="Share of each label that is spread over all classes."
    )
    clip_value: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Upper bound on the absolute value of each gradient. null: none."
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Upper bound on the norm of all gradients together. null: none."
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Decay per step of a moving average of the weights, which is validated and "
        "kept instead of the last weights. null: no average.",
    )
    lookahead: LookaheadConfig | None = Field(
        default=None,
        description="Reset the weights to their slowly moving average every few steps: {every, "
        "decay, power}. null: off.",
    )

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
    """Number of epochs, batch size, choice of weights, and how steps are computed."""

    epochs: Annotated[int, Field(gt=0, le=1_000_000)] | Literal["auto"] = Field(
        default="auto",
        description="Passes over the training images. auto: 8 to 60 from scratch and 3 to 20 from "
        "pretrained weights, the more the fewer images there are.",
    )
    minutes: Annotated[float, Field(gt=0, le=1_000_000)] | None = Field(
        default=None,
        description="Minutes for the whole training, test included. Image size, trainable stages "
        "and epochs, where they are auto, are chosen to fit. null: no limit.",
    )
    batch_size: Annotated[int, Field(gt=0, le=10_000_000)] = Field(
        default=64, description="Images per step, of all processes together."
    )
    patience: Positive | None = Field(
        default=None,
        description="Stop after this number of epochs without improvement of monitor. null: never.",
    )
    monitor: Literal["val_loss", "val_accuracy", "val_macro_f1", "val_balanced_accuracy"] = Field(
        default="val_loss",
        description="Metric of the validation split by which the best epoch is selected. For "
        "unequal classes use val_macro_f1 or val_balanced_accuracy, which count rare classes as "
        "much as common ones.",
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description="Which weights become the model: of the best epoch or the last one.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Random seed of initial weights, order of images, augmentation and dropout.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="Number format of the computation. auto: the fastest one by timing, among "
        "fp32 and what the hardware supports.",
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = Field(
        default="auto",
        description="Order of the values of images in memory. auto: the faster one by timing.",
    )
    # `graph` occurs in finished runs of earlier versions; `train` refuses it.
    compile: bool | Literal["auto", "graph"] = Field(
        default="auto",
        description="Use torch.compile. auto: on CUDA, if timing shows that it pays.",
    )
    sync_batch_norm: bool = Field(
        default=False,
        description="With several processes on GPUs: batch norm over the batch of all processes.",
    )
    cache_trunk: bool = Field(
        default=True,
        description="Compute the features of a frozen backbone once for all epochs, which is much "
        "faster.",
    )
    views: Annotated[int, Field(gt=0, le=1000)] | None = Field(
        default=None,
        description="With cache_trunk and augmentation: number of fixed random draws per image.",
    )
    deterministic: bool = Field(
        default=False,
        description="Use deterministic algorithms only, which is somewhat slower; set by "
        "--deterministic.",
    )
    calibrate: bool | Literal["without_features"] = Field(
        default=True,
        description="Store in the model file what calibrates predictions: a temperature, outputs "
        "for half of the validation images, and features of training images. without_features: "
        "all but the features, the largest part.",
    )
    reference_images: Annotated[int, Field(gt=0, le=2000)] | None = Field(
        default=None,
        description="Number of training images whose features are stored. null: as many as fit, "
        "up to 2,000.",
    )


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}
# Keys of values in a section that are mappings or lists of mappings.
NESTED = frozenset({*GroupConfig.model_fields, *LookaheadConfig.model_fields})


class Recipe(Section):
    """A complete description of one training run."""

    name: str = Field(description="Name of the recipe; by default that of its file.")
    about: str = Field(default="", description="One line for the list of recipes.")
    data: DataConfig = Field(
        default=DataConfig(), description="The data set, its image size and its splits."
    )
    augment: list[dict[str, dict[str, Any]]] | Literal["auto"] = Field(
        default=[],
        description="Random changes of the training images, applied in order to each batch: "
        "[RandomHorizontalFlip, {RandomCrop: {padding: 2}}, ...]. auto: chosen by size and "
        "channels of the images. []: none.",
    )
    model: ModelConfig = Field(
        default=ModelConfig(), description="The network and the weights that it starts with."
    )
    optim: OptimConfig = Field(
        default=OptimConfig(),
        description="The optimizer, its schedule, the loss, and regularization.",
    )
    train: TrainConfig = Field(
        default=TrainConfig(),
        description="Epochs, batch size, choice of weights, and how steps are computed.",
    )
    code: dict[str, str] = Field(
        default={},
        description="SHA-256 of the source of each part that is user code, by its name; filled in "
        "when a recipe is resolved.",
    )

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
            fix="`convlens recipes NAME --keys` explains every key of a recipe",
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

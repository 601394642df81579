"""The sections of a recipe and what may stand in them. `recipe.py` reads and writes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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
    folds: Annotated[int, Field(ge=2)] | None = None
    fold: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    count: Positive | None = None
    on_bad: Literal["stop", "skip"] = "stop"

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return self.folds is not None or self.val_fraction > 0


class ModelConfig(Section):
    """Which network. Keys beyond these belong to the family and are checked by it."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "cnn"
    weights: Literal["none"] = "none"
    trainable: Literal["all"] = "all"

    @property
    def options(self) -> dict[str, Any]:
        """The family's own keys."""
        return dict(self.model_extra or {})


class OptimConfig(Section):
    """The optimiser, its schedule and what regularises the loss."""

    name: str = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_bias_and_norm: bool = True
    momentum: Fraction = 0.9
    nesterov: bool = False
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    schedule: str = "constant"
    warmup: Fraction = 0.0
    step_size: Annotated[float, Field(gt=0, le=1)] = 1 / 3
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    label_smoothing: Fraction = 0.0
    clip_value: Annotated[float, Field(gt=0)] | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None


class TrainConfig(Section):
    """How long, in which batches, and which weights are kept."""

    epochs: Positive | Literal["auto"] = "auto"
    batch_size: Positive = 64
    patience: Positive | None = None
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"
    keep: Literal["best", "last"] = "best"
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    compile: bool = False
    deterministic: bool = False


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}

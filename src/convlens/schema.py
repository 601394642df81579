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

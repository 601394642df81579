"""The compared networks of convlens in Keras, with the same layers and number of trained weights.

With a stride of 2, Keras's padding `same` pads one side only; the number of products is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import layers


def build(
    name: str,
    shape: Sequence[int],
    classes: int,
    options: Mapping[str, Any],
    *,
    augment: bool,
) -> keras.Model:
    """Build a network for images of `shape`; with `augment` it starts with a flip and a shift.

    The shift is RandomTranslation's, up to 2 of 32 pixels with reflected borders; Keras's
    RandomCrop would crop a whole batch at the same position.
    """
    inputs = keras.Input(shape)
    x = inputs
    if augment:
        x = layers.RandomFlip("horizontal")(x)
        x = layers.RandomTranslation(2 / 32, 2 / 32, interpolation="nearest")(x)
    nets = {"cnn": _cnn, "resnet18": _resnet18, "fastnet": _fastnet}
    return keras.Model(inputs, nets[name](x, classes, **options))


def _norm(x: Any, **options: Any) -> Any:
    axis = 1 if keras.config.image_data_format() == "channels_first" else -1
    return layers.BatchNormalization(axis=axis, **options)(x)


def _conv(
    x: Any,
    width: int,
    kernel: int = 3,
    stride: int = 1,
    *,
    padding: str = "same",
    bias: bool = False,
) -> Any:
    return layers.Conv2D(width, kernel, stride, padding=padding, use_bias=bias)(x)


def _per_stage(value: Any, widths: Sequence[int]) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * len(widths)


def _cnn(
    x: Any,
    classes: int,
    *,
    widths: Sequence[int],
    depth: int | Sequence[int] = 1,
    kernel: int | Sequence[int] = 3,
    padding: str = "same",
    pool: str | Sequence[str] = "max",
    batch_norm: bool = True,
    activation: str = "relu",
    hidden: int = 0,
    head: str = "avg",
    dropout: float = 0.0,
) -> Any:
    depths, kernels, pools = (_per_stage(v, widths) for v in (depth, kernel, pool))
    if dropout or head not in ("flatten", "avg") or not {"stride", "max", "none"} >= set(pools):
        raise ValueError("unsupported option of a compared network")
    for i, width in enumerate(widths):
        for last in [False] * (depths[i] - 1) + [True]:
            stride = 2 if last and pools[i] == "stride" else 1
            x = _conv(x, width, kernels[i], stride, padding=padding, bias=not batch_norm)
            if last and pools[i] == "max":
                x = layers.MaxPooling2D(2)(x)
            if batch_norm:
                x = _norm(x)
            x = layers.Activation(activation)(x)
    x = layers.Flatten()(x) if head == "flatten" else layers.GlobalAveragePooling2D()(x)
    if hidden:
        x = layers.Dense(hidden, activation="relu")(x)
    return layers.Dense(classes)(x)


def _resnet18(x: Any, classes: int, *, stem: str) -> Any:
    if stem != "imagenet":
        raise ValueError("unsupported option of a compared network")
    x = layers.ReLU()(_norm(_conv(x, 64, 7, 2)))
    x = layers.MaxPooling2D(3, 2, padding="same")(x)
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            across = x
            if stride == 2:
                across = _norm(_conv(x, width, 1, 2))
            x = layers.ReLU()(_norm(_conv(x, width, 3, stride)))
            x = _norm(_conv(x, width))
            x = layers.ReLU()(layers.Add()([x, across]))
    return layers.Dense(classes)(layers.GlobalAveragePooling2D()(x))


@keras.saving.register_keras_serializable(package="peers")
class Bias(layers.Layer):
    """Add a bias per channel: the trained part of the whitening layer."""

    def build(self, shape: Sequence[int]) -> None:
        first = keras.config.image_data_format() == "channels_first"
        bias = (shape[1], 1, 1) if first else (shape[-1],)
        self.bias = self.add_weight(shape=bias, initializer="zeros")

    def call(self, x: Any) -> Any:
        return x + self.bias


def _fastnet(
    x: Any, classes: int, *, widths: Sequence[int], batch_norm_momentum: float = 0.4
) -> Any:
    channels = x.shape[1 if keras.config.image_data_format() == "channels_first" else -1]
    x = Bias()(layers.Conv2D(8 * channels, 2, use_bias=False, trainable=False)(x))
    x = layers.Activation("gelu")(x)
    norm = {"scale": False, "momentum": 1 - batch_norm_momentum}
    for width in widths:
        x = layers.MaxPooling2D(2)(_conv(x, width))
        x = layers.Activation("gelu")(_norm(x, **norm))
        x = layers.Activation("gelu")(_norm(_conv(x, width), **norm))
    x = layers.Dense(classes, use_bias=False)(layers.GlobalMaxPooling2D()(x))
    return layers.Rescaling(1 / widths[-1])(x)

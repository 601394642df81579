"""The networks of convlens that are compared, in Keras: the same layers, as many trained weights.

Padding is Keras's `same`, which for stride 2 pads one side only: as many products.
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
    """A network for images of `shape`; `augment` puts a flip and a shift in front of it.

    Keras's layers shift each image by a fraction of a pixel's width, as a crop after padding does
    by whole pixels; its RandomCrop cuts the whole batch at one place.
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


def _conv(x: Any, width: int, kernel: int = 3, stride: int = 1, **options: Any) -> Any:
    return layers.Conv2D(width, kernel, stride, padding="same", **options)(x)


def _cnn(
    x: Any,
    classes: int,
    *,
    widths: Sequence[int],
    kernel: int = 3,
    pool: str = "max",
    batch_norm: bool = True,
    hidden: int = 0,
    head: str = "avg",
    dropout: float = 0.0,
) -> Any:
    if dropout or head not in ("flatten", "avg"):
        raise ValueError("an option that no compared network has")
    for width in widths:
        x = _conv(x, width, kernel, 2 if pool == "stride" else 1, use_bias=not batch_norm)
        if pool == "max":
            x = layers.MaxPooling2D(2)(x)
        if batch_norm:
            x = _norm(x)
        x = layers.ReLU()(x)
    x = layers.Flatten()(x) if head == "flatten" else layers.GlobalAveragePooling2D()(x)
    if hidden:
        x = layers.Dense(hidden, activation="relu")(x)
    return layers.Dense(classes)(x)


def _resnet18(x: Any, classes: int, *, stem: str) -> Any:
    if stem != "imagenet":
        raise ValueError("an option that no compared network has")
    x = layers.ReLU()(_norm(_conv(x, 64, 7, 2, use_bias=False)))
    x = layers.MaxPooling2D(3, 2, padding="same")(x)
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            across = x
            if stride == 2:
                across = _norm(_conv(x, width, 1, 2, use_bias=False))
            x = layers.ReLU()(_norm(_conv(x, width, 3, stride, use_bias=False)))
            x = _norm(_conv(x, width, use_bias=False))
            x = layers.ReLU()(layers.Add()([x, across]))
    return layers.Dense(classes)(layers.GlobalAveragePooling2D()(x))


@keras.saving.register_keras_serializable(package="peers")
class Bias(layers.Layer):
    """One number a channel, added: what is trained of the whitening layer."""

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
        x = layers.MaxPooling2D(2)(_conv(x, width, use_bias=False))
        x = layers.Activation("gelu")(_norm(x, **norm))
        x = layers.Activation("gelu")(_norm(_conv(x, width, use_bias=False), **norm))
    x = layers.Dense(classes, use_bias=False)(layers.GlobalMaxPooling2D()(x))
    return layers.Rescaling(1 / widths[-1])(x)

"""Keras 3: arrays in memory, default `compile` and `fit`; the backend is $KERAS_BACKEND."""

from __future__ import annotations

import os

import keras
import numpy as np

import keras_nets
from turns import Row, Turns, serve


class Lap(keras.callbacks.Callback):
    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.turns = turns

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        self.turns.epoch()


def train(row: Row, variant: str, turns: Turns) -> None:
    first = "channels_first" in variant
    keras.config.set_image_data_format("channels_first" if first else "channels_last")
    images, labels = row.load()
    images = images.astype("float32") / 255
    if images.ndim == 3:
        images = images[..., None]
    images = (images - np.float32(row.mean)) / np.float32(row.std)
    if first:
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    model = keras_nets.build(row.net, images.shape[1:], 10, row.options, augment=row.augment)
    row.check(sum(int(np.prod(v.shape)) for v in model.trainable_variables))
    model.compile(
        optimizer=keras.optimizers.Adam(row.lr),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=8 if "8 steps" in variant else 1,
    )
    model.fit(
        images,
        labels,
        batch_size=row.batch,
        epochs=10**6,
        verbose=0,
        callbacks=[Lap(turns)],
    )


def variants(row: Row) -> list[str]:
    if os.environ.get("KERAS_BACKEND") == "torch":
        return ["channels_first", "channels_last"]
    # Steps of one execution are unrolled, so that a large network takes minutes to compile.
    return ["as it comes", "8 steps an execution"] if row.steps >= 16 else ["as it comes"]


if __name__ == "__main__":
    backend = "torch" if os.environ.get("KERAS_BACKEND") == "torch" else "jax"
    serve(train, variants, ["keras", backend])

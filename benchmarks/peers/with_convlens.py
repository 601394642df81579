"""convlens: a recipe on these images, prepared as by `convlens train`, and its training loop.

As for the peers, progress bar, validation and saving are excluded.
"""

from __future__ import annotations

import numpy as np
import torch

from convlens import device, recipe
from convlens.data.cache import ArrayRows
from convlens.data.conversion import NativeImages
from convlens.data.dataset import Data, Split
from convlens.data.decode import Conversion
from convlens.data.summary import DatasetSummary
from convlens.engine import loop
from convlens.runtime import RuntimeContext
from convlens.training.setup import build_training_job
from convlens.training.train import run_train_loop
from convlens.utils import process
from turns import Row, Turns, serve

EPOCHS = 100_000
COMPILED = "train.compile=true"


def train(row: Row, variant: str, turns: Turns) -> None:
    flips = [
        {"RandomHorizontalFlip": {}},
        {"RandomCrop": {"padding": 2, "padding_mode": "reflect"}},
    ]
    config = recipe.load_recipe(
        {
            "name": "peers",
            "augment": flips if row.augment else [],
            "model": {"name": row.net, **row.options},
            "optim": {"name": "adam", "lr": row.lr},
            "train": {
                "epochs": EPOCHS,
                "batch_size": row.batch,
                "precision": "fp32",
                "compile": variant == COMPILED,
            },
        }
    )
    process.keep_freed_memory()
    device.prepare(deterministic=False)
    job = build_training_job(config, _data(row), RuntimeContext("cpu", quiet=True))
    row.check(sum(p.numel() for p in job.model.parameters() if p.requires_grad))
    turns.how = f"{job.plan}{', compiled' if variant == COMPILED else ''}"
    for record in run_train_loop(job, job.process_group):
        if isinstance(record, loop.Epoch):
            float(record.loss)
            turns.epoch()


def _data(row: Row) -> Data:
    """Return the images of the row as training split; the other splits are empty."""
    images, labels = row.load()
    pixels = torch.from_numpy(images)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    split = Split(ArrayRows(pixels), torch.from_numpy(labels), [str(i) for i in range(len(labels))])
    nothing = Split(ArrayRows(pixels[:0]), split.labels[:0], [])
    classes = tuple("0123456789")
    conversion = Conversion(pixels.shape[2], row.channels, "crop")
    counts = np.bincount(labels, minlength=len(classes))
    return Data(
        name="peers",
        classes=classes,
        conversion=conversion,
        native=NativeImages(conversion.size, row.channels),
        train=split,
        val=nothing,
        fingerprint="",
        split_descriptions={},
        held_out={},
        skipped={},
        summary=DatasetSummary(
            classes, counts, {"train": len(labels)}, {}, row.channels, conversion.size, "crop"
        ),
        notes=(),
        listing=None,
        _test=lambda: nothing,
    )


def variants(row: Row) -> list[str]:
    # As for Keras with JAX, compiling is not counted; of large networks it would take minutes.
    return ["recipe", COMPILED] if row.steps >= 16 else ["recipe"]


if __name__ == "__main__":
    serve(train, variants, ["torch"])

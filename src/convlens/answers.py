"""What a model said to each image of a split, kept in its run: tested once, read many times.

A report or a comparison shows single images. Testing anew for each of them would take minutes and
fill the log of looks with looks at nothing new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from convlens import metrics
from convlens.data import Split
from convlens.errors import ModelFileError
from convlens.formats import modelfile
from convlens.run import RunFolder
from convlens.system import files

LARGEST = 1 << 26  # bytes of logits that are kept: 10,000 images of 1,000 classes are 40 MB


class Answers(NamedTuple):
    """Logits float32 `[N, K]` and labels int64 `[N]` of a split, in the model's class order.

    `images` is a hash over the images' ids and classes, in order. Two models whose hashes agree
    were asked about the same images, at whatever size, and whatever else they learned from.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    images: str

    @property
    def chances(self) -> metrics.Floats:
        """Probabilities `[N, K]`."""
        return metrics.softmax(self.logits)


def keep(place: RunFolder, split: str, fingerprint: str, model: str, answers: Answers) -> None:
    """Writes the answers into the run; very large ones are left out.

    Args:
        fingerprint, model: of the data and of the model file; other answers are not these.
    """
    if answers.logits.nbytes > LARGEST:
        return
    about = {
        "split": split,
        "images": answers.images,
        "data_fingerprint": fingerprint,
        "model_sha256": model,
    }
    tensors = {
        "logits": torch.from_numpy(np.ascontiguousarray(answers.logits, dtype=np.float32)),
        "labels": torch.from_numpy(np.ascontiguousarray(answers.labels, dtype=np.int64)),
    }
    path = _path(place, split, fingerprint)
    files.remove_stale_temp_files(path.parent, [path.name], alone=False)
    modelfile.write(path, tensors, about)


def kept(place: RunFolder, split: str, fingerprint: str, model: str) -> Answers | None:
    """The answers that this very model gave to this very data; None where there are none."""
    path = _path(place, split, fingerprint)
    if not path.exists():
        return None
    try:
        tensors, about = modelfile.read(path)
        if (about["data_fingerprint"], about["model_sha256"]) != (fingerprint, model):
            return None
        return Answers(tensors["logits"].numpy(), tensors["labels"].numpy(), about["images"])
    except (ModelFileError, KeyError):  # damaged, or another version's: they can be had again
        return None


def identity(split: Split, classes: Sequence[str]) -> str:
    """The hash that `Answers.images` is; `split` has labels in the order of `classes`."""
    digest = hashlib.sha256()
    for name, label in zip(split.ids, split.labels.tolist(), strict=True):
        digest.update(json.dumps([str(name), classes[label]]).encode())
    return digest.hexdigest()


def _path(place: RunFolder, split: str, fingerprint: str) -> Path:
    return place.path / "answers" / f"{split}-{fingerprint[:12]}.safetensors"

"""What predict and evaluate open: model files, and ONNX files that were exported from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convlens.data.batches import Prepare
from convlens.data.decode import FITS
from convlens.device import Plan
from convlens.errors import ModelFileError, UsageError
from convlens.formats import modelfile, onnxfile
from convlens.run import Loaded, Preprocessing, load_model

SUFFIX = ".onnx"


@dataclass(frozen=True)
class InGraph(Preprocessing):
    """Preprocessing whose normalisation is part of the exported graph."""

    @property
    def normalise(self) -> Prepare:
        return _as_they_are


def _as_they_are(images: Tensor, plan: Plan) -> Tensor:
    """Pixels 0..255, as floats: test-time augmentation pads, which torch does to floats only."""
    return images.float()


class Exported(Loaded):
    """An exported file: its graph answers on the CPU, and can't be laid out anew or looked into."""

    @property
    def free(self) -> bool:
        return False

    @property
    def original(self) -> bool:
        return False

    def where(self, asked: str | None) -> str:
        if asked not in (None, "auto", "cpu"):
            raise UsageError(
                f"device {asked!r}: exported ONNX files are run on the CPU",
                fix="leave out --device, or take the run itself",
            )
        return "cpu"


def open_model(path: Path) -> Loaded:
    """The network of a model file, or of an ONNX file that `convlens export` made.

    Raises:
        ModelFileError: damaged, foreign, or not what it says; UsageError: onnx or onnxruntime
            isn't installed.
    """
    if Path(path).suffix.lower() != SUFFIX:
        return load_model(path)
    data, facts = onnxfile.read(Path(path))
    card, classes, preprocessing, at_once = _described(facts, path)
    model = onnxfile.OnnxNet(data, str(path), at_once)
    size = preprocessing.image_size
    if not model.fits((preprocessing.channels, size, size), len(classes)):
        raise ModelFileError(
            f"its graph takes images {model.takes[0]} and gives {model.gives[0]}; its facts say "
            f"{preprocessing.channels} channels, {size} px and {len(classes)} classes",
            where=str(path),
            fix=onnxfile.AGAIN,
        )
    return Exported(model.eval(), classes, preprocessing, card, Path(path).parent)


def _described(
    facts: dict[str, str], path: Path
) -> tuple[dict[str, Any], tuple[str, ...], InGraph, int]:
    """Card, classes, preprocessing and images at once, as `exporting.formats.described` says."""
    try:
        classes = tuple(str(name) for name in _kind(json.loads(facts["classes"]), list))
        preprocessing = InGraph(**_kind(json.loads(facts["preprocessing"]), dict))
        right = (
            isinstance(preprocessing.image_size, int)
            and preprocessing.image_size > 0
            and preprocessing.channels in (1, 3)
            and preprocessing.fit in FITS
        )
        if not right or not classes or len(set(classes)) != len(classes):
            raise ValueError("impossible classes or preprocessing")
        own = ("convlens", "run", "sha256")
        card = {**_kind(json.loads(facts["card"]), dict), **{key: facts[key] for key in own}}
        _kind(card["recipe"], dict)
        _kind(card["data"]["fingerprint"], str)
        return card, classes, preprocessing, max(1, min(256, int(facts["at_once"])))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
        newer = modelfile.is_newer(facts.get("convlens"))
        raise ModelFileError(
            f"its facts can't be used: {reason}",
            where=str(path),
            fix="update convlens: a newer one wrote it" if newer else onnxfile.AGAIN,
        ) from error


def _kind(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value

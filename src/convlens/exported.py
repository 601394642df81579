"""Load a model for inference, from a native model file or an exported ONNX file."""

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
    """Preprocessing whose normalization is part of the exported graph."""

    @property
    def normalise(self) -> Prepare:
        return _to_float


def _to_float(images: Tensor, plan: Plan) -> Tensor:
    """Pixels 0..255 as floats: test-time augmentation pads, which torch does to floats only."""
    return images.float()


class Exported(Loaded):
    """A model that is run from an exported file, on the CPU; its layers can't be inspected."""

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
    """Load a model file, or an ONNX file that `convlens export` made.

    Raises:
        ModelFileError: damaged, another program's, or inconsistent.
        UsageError: onnx or onnxruntime isn't installed.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        return load_model(path)
    return onnx_model(onnxfile.read_bytes(path), path)


def onnx_model(content: bytes, path: Path) -> Exported:
    """The model in the content of an exported ONNX file; `path` is where it lies, or will lie."""
    metadata = onnxfile.verify(content, str(path))
    try:
        classes = tuple(str(name) for name in _parsed(metadata, "classes", list))
        pre = InGraph(**_parsed(metadata, "preprocessing", dict))
        valid = (
            isinstance(pre.image_size, int)
            and pre.image_size > 0
            and pre.channels in (1, 3)
            and pre.fit in FITS
        )
        if not valid or not classes or len(set(classes)) != len(classes):
            raise ValueError("impossible classes or preprocessing")
        card = _parsed(metadata, "card", dict)
        card |= {key: metadata[key] for key in ("convlens", "run", "sha256")}
        if not isinstance(card["recipe"], dict) or not isinstance(card["data"]["fingerprint"], str):
            raise TypeError("recipe or data fingerprint of another type")
        at_once = max(1, min(256, int(metadata["at_once"])))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
        newer = modelfile.is_newer(metadata.get("convlens"))
        raise ModelFileError(
            f"its metadata can't be used: {reason}",
            where=str(path),
            fix="update convlens: a newer one wrote it" if newer else onnxfile.EXPORT_AGAIN,
        ) from error
    image = (pre.channels, pre.image_size, pre.image_size)
    model = onnxfile.OnnxNet(content, str(path), image, len(classes), at_once)
    return Exported(model.eval(), classes, pre, card, path.parent)


def _parsed(metadata: dict[str, str], key: str, kind: type) -> Any:
    value = json.loads(metadata[key])
    if not isinstance(value, kind):
        raise TypeError(f"{key} is a {type(value).__name__}, not a {kind.__name__}")
    return value

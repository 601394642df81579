"""Files of tensors that others wrote, or we: named tensors out of them, and nothing else.

safetensors holds nothing but tensors. A `.pt`/`.pth`/`.bin` is a pickle: torch's restricted
unpickler, which calls none but torch's own functions for rebuilding tensors, reads it, and only
tensors in dicts are taken out.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from convlens.errors import ModelFileError
from convlens.formats import modelfile
from convlens.system.files import cannot_read

# Where training scripts keep the weights in what they save; the first that is there is taken.
NESTS = ("state_dict", "model_state_dict", "model", "net")


@dataclass(frozen=True)
class Contents:
    """Tensors by name, the file's SHA-256 and, of a file that convlens wrote, its card."""

    tensors: dict[str, Tensor]
    sha256: str
    card: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Contents:
    """The tensors of a `.safetensors` (of convlens: hash checked), `.pt`, `.pth` or `.bin`.

    Raises:
        ModelFileError: missing, damaged, of another format, or holding code or anything else that
            isn't tensors in dicts. ResourceError: it can't be read.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError("no such file", where=str(path), fix="check the path") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    if modelfile.is_pickle(data):
        _refuse_packed(data, path)
        tensors = _named(_unpickled(data, path), len(data), path)
        return Contents(tensors, hashlib.sha256(data).hexdigest())
    if _is_ours(path):
        tensors, card = modelfile.read(path)
        return Contents(tensors, card["sha256"], card)
    tensors = _checked(modelfile.unpacked(data, path), len(data), path)
    return Contents(tensors, hashlib.sha256(data).hexdigest())


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return modelfile.KEY in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"neither safetensors nor a file of torch.save, or damaged: {error}"[:200],
            where=str(path),
            fix="download or save it again",
        ) from error


def _refuse_packed(data: bytes, path: Path) -> None:
    """A file of torch.save is a zip that packs no tensors: it holds little more than its size."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            inside = packed.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        return  # the older kind, or damaged, which the unpickler will say
    names = [each.filename for each in inside]
    large = sum(each.file_size for each in inside) > 2 * len(data) + (1 << 20)
    if large or len(set(names)) < len(names):
        raise ModelFileError(
            "this file is a zip that unpacks to far more than its size, or has a name twice",
            where=str(path),
            fix="save the weights again with torch.save(model.state_dict(), ...)",
        )


def _unpickled(data: bytes, path: Path) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # Half a file, or one made to harm, can raise anything at all in there.
    except Exception as error:
        # Not torch's own words: they advise to load it all the same.
        holds = re.search(r"GLOBAL (\S+)", str(error))
        script = "TorchScript" in str(error)
        what = "a TorchScript program" if script else holds[1] if holds else ""
        raise ModelFileError(
            f"this file holds {what}, not only tensors: opening that could run any code"
            if what
            else "this file of torch.save is damaged, or holds more than tensors",
            where=str(path),
            fix="where it comes from, save the weights alone: torch.save(model.state_dict(), ...)",
        ) from error


def _named(content: Any, size: int, path: Path) -> dict[str, Tensor]:
    """The state dict in what was saved: itself, or under one of the customary keys."""
    kinds = []
    while isinstance(content, Mapping):
        nest = next((k for k in NESTS if isinstance(content.get(k), Mapping)), None)
        if nest is None:
            found = {k: v for k, v in content.items() if isinstance(v, Tensor)}
            if found and all(isinstance(name, str) for name in found):
                return _checked(found, size, path)
            kinds += [f"{key!r}: {type(value).__name__}" for key, value in content.items()]
            break
        content = content[nest]
    held = f"a dict of {', '.join(kinds[:5])}" if kinds else f"a {type(content).__name__}"
    raise ModelFileError(
        f"no tensors by name in this file: it holds {held}"[:200],
        where=str(path),
        fix="save a state dict: torch.save(model.state_dict(), ...)",
    )


def _checked(tensors: dict[str, Tensor], size: int, path: Path) -> dict[str, Tensor]:
    """Refuses kinds of tensors that are no weights as they stand; the file has `size` bytes."""
    for name, tensor in tensors.items():
        odd = tensor.is_quantized or tensor.is_complex() or tensor.is_nested
        if odd or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = str(tensor.dtype if odd else tensor.layout).removeprefix("torch.")
            raise ModelFileError(
                f"{name} is no plain tensor of numbers ({kind}, {tensor.device.type})",
                where=str(path),
                fix="save the network's weights before it is quantised or pruned",
            )
        if tensor.numel() * tensor.element_size() > size:  # one number, repeated without end
            raise ModelFileError(
                f"{name} claims {tensor.numel():,} numbers, more than the file holds",
                where=str(path),
                fix="save the network's weights again",
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}

"""Files of tensors: safetensors with one JSON text in the header and a hash over all of it.

Nothing here unpickles. `read` refuses a file before any tensor is built from it if one byte
differs from what `write` wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import Tensor

from convlens.errors import Diverged, ModelFileError, UsageError
from convlens.recipe import Recipe, load as load_recipe
from convlens.system.files import cannot_read, is_io_error, write_atomic
from convlens.version import __version__

KEY = "convlens"
FORMAT = 1
NO_HASH = "0" * 64
MAX_HEADER = 100 * 2**20  # safetensors' own cap
# What safetensors calls the kinds of numbers (github.com/huggingface/safetensors, README: format).
KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class NotFiniteError(Diverged, ValueError):
    """Tensors with NaN or infinity: they are never written."""


class NewerFormatError(ModelFileError):
    """The file is whole, but of a format, or with words, that only later versions know."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Writes tensors and metadata atomically; returns the file's hash (hex SHA-256).

    The hash covers the whole file with its own 64 digits taken as zeros, and stands in the
    metadata under `sha256`.

    Raises:
        ResourceError: the disk; NotFiniteError: a tensor holds NaN or infinity.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    bad = _not_finite(plain)
    if bad:
        raise NotFiniteError(
            f"weights became NaN or infinite, so they were not saved: {', '.join(bad[:3])}",
            where=str(path),
            fix="train again with a lower optim.lr, or with optim.clip_norm=1",
        )
    own = {"format": FORMAT, "sha256": NO_HASH}  # not those of a file that it was read from
    content = own | {key: value for key, value in metadata.items() if key not in own}
    # The largest kinds of numbers first, so that all are aligned.
    names = sorted(plain, key=lambda name: (-plain[name].element_size(), name))
    header = _header({name: plain[name] for name in names}, json.dumps(content, ensure_ascii=False))
    bodies = [_bytes(plain[name]) for name in names]
    hashed = hashlib.sha256(header)
    for body in bodies:
        hashed.update(body)
    digest = hashed.hexdigest()
    # Only the first one: the zeros stand before everything the user can name.
    write_atomic(path, header.replace(NO_HASH.encode(), digest.encode(), 1), *bodies)
    return digest


def _header(tensors: Mapping[str, Tensor], text: str) -> bytes:
    """What stands before the tensors' bytes, which follow each other in this order.

    By hand, since safetensors' own writer copies all tensors several times: a network with 11
    million weights took 1.5 s to save instead of 0.35.
    """
    table: dict[str, Any] = {"__metadata__": {KEY: text}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        kind, shape = KINDS[tensor.dtype], list(tensor.shape)
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, not a copy of it."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that `write` wrote.

    Raises:
        ModelFileError: missing, truncated, changed by even one byte, another format, or tensors
            with NaN or infinity; a disk that can't give it back. ResourceError: something else
            stands in the way (rights, too many open files), and the file may be whole.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError(
            "no such model file", where=str(path), fix="train it first, or check the path"
        ) from error
    except OSError as error:
        if not is_io_error(error):
            raise cannot_read(path, error) from error
        raise ModelFileError(
            f"the disk can't give it back: {error.strerror}",
            where=str(path),
            fix="restore it from a copy, or train again with --fresh",
        ) from error
    _refuse_foreign(data, path)
    metadata = _metadata(data, path)
    stored = str(metadata.get("sha256", ""))
    known = re.fullmatch("[0-9a-f]{64}", stored) is not None
    if not known or digest_around(data, data.find(stored.encode())) != stored:
        raise ModelFileError(
            "the model file was changed or damaged after it was written (its hash differs)",
            where=str(path),
            fix="restore it from a copy, or train again with --fresh",
        )
    if metadata.get("format") != FORMAT:
        raise NewerFormatError(
            f"written by a newer convlens (format {metadata.get('format')}, "
            f"this one knows {FORMAT})",
            where=str(path),
            fix="update convlens",
        )
    tensors = unpacked(data, path)  # a right hash may stand over a wrong table of tensors
    bad = _not_finite(tensors)
    if bad:  # `write` refuses them, but it need not have been `write`
        raise ModelFileError(
            f"weights are NaN or infinite in {len(bad)} of {len(tensors)} tensors: "
            f"{', '.join(bad[:3])}",
            where=str(path),
            fix="restore it from a copy, or train again with --fresh",
        )
    return tensors, metadata


def unpacked(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file's bytes.

    Raises:
        ModelFileError: a wrong table of them, or numbers of a kind that isn't computed with.
    """
    try:
        tensors = from_bytes(data)
    except (SafetensorError, KeyError) as error:  # (KeyError: a kind that torch doesn't have)
        reason = f"numbers of the kind {error}" if isinstance(error, KeyError) else str(error)
        raise ModelFileError(
            f"no readable tensors: {reason}"[:200],
            where=str(path),
            fix="save its weights as float32, float16 or bfloat16",
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in KINDS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelFileError(
                f"{name} is no plain tensor of numbers ({kind})",
                where=str(path),
                fix="save its weights as float32, float16 or bfloat16",
            )
    return tensors


def recipe_of(card: Mapping[str, Any]) -> Recipe:
    """The resolved recipe by which a model was trained, from its file's card.

    Raises:
        ModelFileError: there is none; NewerFormatError: a later version wrote it, with words that
            this one doesn't know. UsageError: it can't be used.
    """
    with of_version(card.get("convlens")):
        if not isinstance(card.get("recipe"), Mapping):
            raise ModelFileError("the model file doesn't hold the recipe it was trained by")
        return load_recipe(card["recipe"])


@contextlib.contextmanager
def of_version(version: Any, where: str = "") -> Iterator[None]:
    """Says of words that aren't known that a newer `version` wrote them, where one did."""
    try:
        yield
    except UsageError as error:
        if not is_newer(version):
            raise
        raise NewerFormatError(
            f"written by convlens {version}, which knows more than this one ({__version__}): "
            f"{error.what}",
            where=where or error.where,
            fix="update convlens",
        ) from error


def is_newer(version: Any) -> bool:
    """Whether a version that a file names is later than this one."""
    own, other = (
        [int(part) for part in re.findall(r"\d+", str(each))[:3]] for each in (__version__, version)
    )
    return other > own


def digest_around(data: bytes, at: int) -> str:
    """The SHA-256 of a file with zeros for its own 64 digits at `at`; without a copy of the file.

    Nothing if they are nowhere (`at` is -1).
    """
    if at < 0:
        return ""
    view = memoryview(data)
    digest = hashlib.sha256(view[:at])
    digest.update(NO_HASH.encode())
    digest.update(view[at + len(NO_HASH) :])
    return digest.hexdigest()


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
    # A sum is finite only if all numbers are, and costs a quarter; finite ones may overflow in it.
    odd = [name for name, t in floats.items() if not math.isfinite(t.sum())]
    return [name for name in odd if not torch.isfinite(floats[name]).all()]


def is_pickle(data: bytes) -> bool:
    """Whether a file is one of torch's; the length that safetensors begins with may look alike."""
    return data.startswith(PICKLES) and data[8:9] != b"{"


def _refuse_foreign(data: bytes, path: Path) -> None:
    if path.suffix.lower() == ".onnx":  # `exported.open_model` takes them
        raise ModelFileError(
            "an exported ONNX file only answers: its layers can't be looked into",
            where=str(path),
            fix="give it to predict or evaluate, or take the run it was made from",
        )
    if is_pickle(data):
        raise ModelFileError(
            "this is a pickle (.pt/.pth): opening it could run any code, so it is refused",
            where=str(path),
            fix="give a convlens model.safetensors or the name of a run",
        )
    if len(data) < 8:
        raise ModelFileError(f"only {len(data)} bytes: no model file", where=str(path))


def _metadata(data: bytes, path: Path) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    try:
        if length > min(MAX_HEADER, len(data) - 8):
            raise ValueError(f"its header claims {length} bytes, there are {len(data) - 8}")
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"][KEY]
        content = json.loads(metadata)
        if not isinstance(content, dict):
            raise ValueError("its metadata is no object")
    except KeyError as error:
        raise ModelFileError(
            "a safetensors file, but not one of convlens: it doesn't say its classes and network",
            where=str(path),
            fix="give a model.safetensors that convlens wrote",
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelFileError(
            f"no readable model file (truncated, damaged or another format): {error}"[:200],
            where=str(path),
            fix="restore it from a copy, or train again with --fresh",
        ) from error
    return content

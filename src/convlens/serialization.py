"""Files of tensors: safetensors with one JSON text in the header and a hash over all of it.

Nothing here unpickles. `read` refuses a file before any tensor is built from it if one byte
differs from what `write` wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from torch import Tensor

from convlens.errors import Diverged, ModelFileError, UsageError
from convlens.recipe import Recipe, load_recipe
from convlens.utils.files import cannot_read, is_io_error, write_atomic
from convlens.version import __version__

METADATA_KEY = "convlens"
MODEL_FORMAT = 1
NO_HASH = "0" * 64
MAX_HEADER = 100 * 2**20  # safetensors' own cap
# What safetensors calls the kinds of numbers (github.com/huggingface/safetensors, README: format).
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class NotFiniteError(Diverged, ValueError):
    """Tensors with NaN or infinity: they are never written."""


class NewerFormatError(ModelFileError):
    """The file is whole, but of a format, or with words, that only later versions know."""


def write_model_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
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
    own = {"format": MODEL_FORMAT, "sha256": NO_HASH}  # not those of a file that it was read from
    content = own | {key: value for key, value in metadata.items() if key not in own}
    # The largest kinds of numbers first, so that all are aligned.
    names = sorted(plain, key=lambda name: (-plain[name].element_size(), name))
    header = _header({name: plain[name] for name in names}, json.dumps(content, ensure_ascii=False))
    bodies = [_file_bytes(plain[name]) for name in names]
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
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        kind, shape = DTYPES[tensor.dtype], list(tensor.shape)
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _file_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, not a copy of it."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def read_model_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    if metadata.get("format") != MODEL_FORMAT:
        raise NewerFormatError(
            f"written by a newer convlens (format {metadata.get('format')}, "
            f"this one knows {MODEL_FORMAT})",
            where=str(path),
            fix="update convlens",
        )
    tensors = unpack_tensors(data, path)  # a right hash may stand over a wrong table of tensors
    bad = _not_finite(tensors)
    if bad:  # `write` refuses them, but it need not have been `write`
        raise ModelFileError(
            f"weights are NaN or infinite in {len(bad)} of {len(tensors)} tensors: "
            f"{', '.join(bad[:3])}",
            where=str(path),
            fix="restore it from a copy, or train again with --fresh",
        )
    return tensors, metadata


def unpack_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
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
        if tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelFileError(
                f"{name} is no plain tensor of numbers ({kind})",
                where=str(path),
                fix="save its weights as float32, float16 or bfloat16",
            )
    return tensors


def recipe_from_metadata(model_metadata: Mapping[str, Any]) -> Recipe:
    """The resolved recipe by which a model was trained, from its file's card.

    Raises:
        ModelFileError: there is none; NewerFormatError: a later version wrote it, with words that
            this one doesn't know. UsageError: it can't be used.
    """
    with explain_newer_version(model_metadata.get("convlens")):
        if not isinstance(model_metadata.get("recipe"), Mapping):
            raise ModelFileError("the model file doesn't hold the recipe it was trained by")
        return load_recipe(model_metadata["recipe"])


@contextlib.contextmanager
def explain_newer_version(version: Any, where: str = "") -> Iterator[None]:
    """Says of words that aren't known that a newer `version` wrote them, where one did."""
    try:
        yield
    except UsageError as error:
        if not is_newer_version(version):
            raise
        raise NewerFormatError(
            f"written by convlens {version}, which knows more than this one ({__version__}): "
            f"{error.what}",
            where=where or error.where,
            fix="update convlens",
        ) from error


def is_newer_version(version: Any) -> bool:
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
        metadata = header["__metadata__"][METADATA_KEY]
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


# ---- tensorfiles ----------------------------------------
# Files of tensors that others wrote, or we: named tensors out of them, and nothing else.
#
# safetensors holds nothing but tensors. A `.pt`/`.pth`/`.bin` is a pickle: torch's restricted
# unpickler, which calls none but torch's own functions for rebuilding tensors, reads it, and only
# tensors in dicts are taken out.

# Where training scripts keep the weights in what they save; the first that is there is taken.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net")


@dataclass(frozen=True)
class ForeignWeights:
    """Tensors by name, the file's SHA-256 and, of a file that convlens wrote, its card."""

    tensors: dict[str, Tensor]
    sha256: str
    model_metadata: dict[str, Any] = field(default_factory=dict)


def read_foreign_weights(path: Path) -> ForeignWeights:
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
    if is_pickle(data):
        _refuse_packed(data, path)
        tensors = _named_tensors(_unpickled(data, path), len(data), path)
        return ForeignWeights(tensors, hashlib.sha256(data).hexdigest())
    if _is_ours(path):
        tensors, model_metadata = read_model_file(path)
        return ForeignWeights(tensors, model_metadata["sha256"], model_metadata)
    tensors = _checked_tensors(unpack_tensors(data, path), len(data), path)
    return ForeignWeights(tensors, hashlib.sha256(data).hexdigest())


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return METADATA_KEY in (file.metadata() or {})
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


def _named_tensors(content: Any, size: int, path: Path) -> dict[str, Tensor]:
    """The state dict in what was saved: itself, or under one of the customary keys."""
    kinds = []
    while isinstance(content, Mapping):
        nest = next((k for k in STATE_DICT_KEYS if isinstance(content.get(k), Mapping)), None)
        if nest is None:
            found = {k: v for k, v in content.items() if isinstance(v, Tensor)}
            if found and all(isinstance(name, str) for name in found):
                return _checked_tensors(found, size, path)
            kinds += [f"{key!r}: {type(value).__name__}" for key, value in content.items()]
            break
        content = content[nest]
    held = f"a dict of {', '.join(kinds[:5])}" if kinds else f"a {type(content).__name__}"
    raise ModelFileError(
        f"no tensors by name in this file: it holds {held}"[:200],
        where=str(path),
        fix="save a state dict: torch.save(model.state_dict(), ...)",
    )


def _checked_tensors(tensors: dict[str, Tensor], size: int, path: Path) -> dict[str, Tensor]:
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


# ---- generations ----------------------------------------
# Checkpoints of a run: the two newest are kept, in case one is corrupted.
#
#     state/0003-000017.safetensors       the newest: epoch 3, 17 steps of it done
#     state/0003-000001.safetensors       the one before
#
# File names carry (epoch, step), and every file carries its SHA-256, so no index is needed: the
# newest file that is intact wins. A file gets its name last, by a rename, when its contents are on
# the disk.

NUM_KEPT = 2
_NAME = re.compile(r"(\d{4,})-(\d{6,})\.safetensors")  # epoch, step


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint: saved in `epoch` (counted from 1) after `step` steps of it."""

    epoch: int
    step: int
    tensors: dict[str, Tensor]
    counters: dict[str, Any]


class CheckpointStore:
    """The checkpoints in one directory.

    Attributes:
        corrupt: why `read` skipped newer checkpoints, one sentence each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._current: Path | None = None  # the checkpoint that was read or saved last
        self.corrupt: list[str] = []

    def save(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Write a checkpoint, then delete all but the two newest.

        Args:
            counters: with `position`, a mapping with `epoch` and `step`.

        Raises:
            ResourceError: the disk refused it; the checkpoint before is intact.
        """
        position = epoch, step = _epoch_and_step(counters)
        path = self._folder / f"{epoch:04}-{step:06}.safetensors"
        # A checkpoint ahead of this one was corrupt or unusable when the run went back behind it.
        # It is deleted first: if this process is killed after the rename, the next start must not
        # find it.
        _delete(each for each in self._files() if _position(each) > position)
        write_model_file(path, tensors, counters)
        older = [each for each in self._files() if _position(each) < position]
        if self._current in older:  # others may be corrupt: nobody has read them
            older = [self._current]
        self._delete_all_but({path, *older[: NUM_KEPT - 1]})
        self._current = path

    def read(self, is_usable: Callable[[dict[str, Any]], str] = lambda _: "") -> Checkpoint | None:
        """Read the newest intact checkpoint; None if there is none.

        Args:
            is_usable: returns why a checkpoint with these counters can't be used, or "".

        Raises:
            modelfile.NewerFormatError: a later version wrote it; skipping it would mean that the
                next `save` deletes it.
        """
        self.corrupt, self._current = [], None
        for path in self._files():
            try:
                tensors, counters = read_model_file(path)
                if not _matches(path, counters):
                    raise ModelFileError("its content is of another epoch or step than its name")
                if reason := is_usable(counters):
                    raise ModelFileError(reason)
            except NewerFormatError:
                raise
            except ModelFileError as error:
                self.corrupt.append(f"the checkpoint of {_as_text(path)}: {error.what}")
            else:
                self._current = path
                return Checkpoint(*_position(path), tensors, counters)
        return None

    def keep_newest(self) -> None:
        """Delete all but the newest: a finished run keeps one, so that it can be extended."""
        newest = self._current or next(iter(self._files()), None)
        if newest is not None:
            self._delete_all_but({newest})

    def clear(self) -> None:
        """Delete all checkpoints, and the directory if nothing else is in it."""
        self._current = None
        if self._folder.is_dir():
            self._delete_all_but(set())
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _files(self) -> list[Path]:
        """All files named like a checkpoint, newest first."""
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_position, reverse=True)

    def _delete_all_but(self, kept: Collection[Path]) -> None:
        """Delete older checkpoints, and files that killed processes or earlier versions left."""
        _delete(p for p in self._folder.iterdir() if p not in kept and not p.is_dir())


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        with contextlib.suppress(OSError):
            path.unlink()


def _position(path: Path) -> tuple[int, int]:
    """(epoch, step) by the file's name."""
    epoch, step = path.name.removesuffix(".safetensors").split("-")
    return int(epoch), int(step)


def _as_text(path: Path) -> str:
    return "epoch {}, step {}".format(*_position(path))


def _epoch_and_step(counters: Mapping[str, Any]) -> tuple[int, int]:
    return int(counters["position"]["epoch"]), int(counters["position"]["step"])


def _matches(path: Path, counters: Mapping[str, Any]) -> bool:
    try:
        return _epoch_and_step(counters) == _position(path)
    except (KeyError, TypeError, ValueError):
        return False

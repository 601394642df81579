"""Model files, checkpoints, and weights of other programs.

- Model files and checkpoints are safetensors files with one JSON text in the header and a SHA-256
  over every byte. A file is refused before any tensor is built from it if one byte has changed.
- Weights of other programs are read from safetensors, or from `.pt`/`.pth`/`.bin` files with
  torch's restricted unpickler, which calls only torch's own functions for rebuilding tensors. Only
  tensors in dicts are used.
- `CheckpointStore` keeps the two newest checkpoints of a run, in case one is corrupted.
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
# Tensors in a model file that are not weights: vectors for `uncertainty.outliers`.
AUXILIARY_PREFIX = "convlens."
REFERENCE_FEATURES = f"{AUXILIARY_PREFIX}reference_features"
NO_HASH = "0" * 64
MAX_HEADER_BYTES = 100 * 2**20  # the limit of safetensors itself
# The names of dtypes in safetensors (github.com/huggingface/safetensors, README, "Format").
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
PICKLE_PREFIXES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class NotFiniteError(Diverged, ValueError):
    """Tensors contain NaN or infinity. Such tensors are never written."""


class NewerFormatError(ModelFileError):
    """The file is intact, but its format or its recipe is that of a newer version."""


def write_model_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write tensors and metadata atomically; return the SHA-256 of the file (hex).

    The hash covers the whole file, with zeros for its own 64 digits. It is stored in the metadata
    under `sha256`.

    Raises:
        ResourceError: the file cannot be written.
        NotFiniteError: a tensor contains NaN or infinity.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if bad := _non_finite(on_cpu):
        raise NotFiniteError(
            f"weights became NaN or infinite, so they were not saved: {', '.join(bad[:3])}",
            where=str(path),
            fix="train again with a lower optim.lr, or with optim.clip_norm=1",
        )
    # They replace those of a file that the metadata was read from.
    fixed = {"format": MODEL_FORMAT, "sha256": NO_HASH}
    content = fixed | {key: value for key, value in metadata.items() if key not in fixed}
    # The largest elements first, so that all tensors are aligned.
    names = sorted(on_cpu, key=lambda name: (-on_cpu[name].element_size(), name))
    header = _header(
        {name: on_cpu[name] for name in names}, json.dumps(content, ensure_ascii=False)
    )
    bodies = [_file_bytes(on_cpu[name]) for name in names]
    sha256 = hashlib.sha256(header)
    for body in bodies:
        sha256.update(body)
    digest = sha256.hexdigest()
    # Only the first occurrence: the zeros come before all text that the user can choose.
    write_atomic(path, header.replace(NO_HASH.encode(), digest.encode(), 1), *bodies)
    return digest


def _header(tensors: Mapping[str, Tensor], text: str) -> bytes:
    """Return the header of a safetensors file with these tensors, in this order.

    The writer of the safetensors package copies all tensors several times: a network with 11
    million parameters took 1.5 s to save instead of 0.35.
    """
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        table[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _file_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, without a copy."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def read_model_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and the metadata of a file written by `write_model_file`.

    Tensors that are not weights are left out; see `read_all_tensors`, also for the errors.
    """
    tensors, metadata = read_all_tensors(path)
    weights = {k: v for k, v in tensors.items() if not k.startswith(AUXILIARY_PREFIX)}
    return weights, metadata


def read_all_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors and the metadata of a file written by `write_model_file`.

    Raises:
        ModelFileError: the file is missing, truncated, changed in any byte, of another format, has
            non-finite tensors, or the disk cannot return its content.
        ResourceError: the file may be intact, but cannot be read (permissions, too many open
            files).
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
            f"the disk cannot return the file: {error.strerror}",
            where=str(path),
            fix="restore it from a copy, or train again with --fresh",
        ) from error
    _refuse_foreign(data, path)
    metadata = _metadata(data, path)
    stored = str(metadata.get("sha256", ""))
    is_sha256 = re.fullmatch("[0-9a-f]{64}", stored) is not None
    if not is_sha256 or digest_around(data, data.find(stored.encode())) != stored:
        raise ModelFileError(
            "the model file was changed or damaged after it was written (its hash differs)",
            where=str(path),
            fix="restore it from a copy, or train again with --fresh",
        )
    if metadata.get("format") != MODEL_FORMAT:
        raise NewerFormatError(
            f"written by a newer convlens (format {metadata.get('format')}; this version reads "
            f"format {MODEL_FORMAT})",
            where=str(path),
            fix="update convlens",
        )
    # A file of another program can have a valid hash and still have an invalid table of tensors
    # or non-finite values.
    tensors = unpack_tensors(data, path)
    if bad := _non_finite(tensors):
        raise ModelFileError(
            f"weights are NaN or infinite in {len(bad)} of {len(tensors)} tensors: "
            f"{', '.join(bad[:3])}",
            where=str(path),
            fix="restore it from a copy, or train again with --fresh",
        )
    return tensors, metadata


def unpack_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file.

    Raises:
        ModelFileError: the table of tensors is invalid, or a dtype is not supported.
    """
    try:
        tensors = from_bytes(data)
    except (SafetensorError, KeyError) as error:  # (KeyError: a dtype that torch does not have)
        reason = f"dtype {error} is unknown" if isinstance(error, KeyError) else str(error)
        raise ModelFileError(
            f"no readable tensors: {reason}"[:200],
            where=str(path),
            fix="save its weights as float32, float16 or bfloat16",
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ModelFileError(
                f"the dtype of {name} is not supported ({dtype})",
                where=str(path),
                fix="save its weights as float32, float16 or bfloat16",
            )
    return tensors


def recipe_from_metadata(model_metadata: Mapping[str, Any]) -> Recipe:
    """Return the resolved recipe that a model was trained with, from the metadata of its file.

    Raises:
        ModelFileError: the metadata has no recipe.
        NewerFormatError: a newer version wrote it, with keys that this version does not know.
        UsageError: the recipe is invalid.
    """
    with explain_newer_version(model_metadata.get("convlens")):
        if not isinstance(model_metadata.get("recipe"), Mapping):
            raise ModelFileError("the model file does not contain the recipe it was trained with")
        return load_recipe(model_metadata["recipe"])


@contextlib.contextmanager
def explain_newer_version(version: Any, where: str = "") -> Iterator[None]:
    """Turn a `UsageError` about a recipe of a newer `version` into a `NewerFormatError`."""
    try:
        yield
    except UsageError as error:
        if not is_newer_version(version):
            raise
        raise NewerFormatError(
            f"written by convlens {version}, which is newer than this version ({__version__}): "
            f"{error.what}",
            where=where or error.where,
            fix="update convlens",
        ) from error


def is_newer_version(version: Any) -> bool:
    """Return whether a version number is higher than that of this package."""
    installed, other = (
        [int(part) for part in re.findall(r"\d+", str(each))[:3]] for each in (__version__, version)
    )
    return other > installed


def digest_around(data: bytes, at: int) -> str:
    """Return the SHA-256 of a file with zeros for its own 64 digits, which start at `at`.

    The file is not copied. Returns an empty text if `at` is -1 (the digits were not found).
    """
    if at < 0:
        return ""
    view = memoryview(data)
    digest = hashlib.sha256(view[:at])
    digest.update(NO_HASH.encode())
    digest.update(view[at + len(NO_HASH) :])
    return digest.hexdigest()


def _non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with NaN or infinity."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    # A sum is finite only if all elements are, and takes a quarter of the time of `isfinite`.
    # Finite elements may overflow in it, so that the rest is checked exactly.
    suspects = [name for name, tensor in floats.items() if not math.isfinite(tensor.sum())]
    return [name for name in suspects if not torch.isfinite(floats[name]).all()]


def is_pickle(data: bytes) -> bool:
    """Return whether the content is a file of `torch.save`.

    The first 8 bytes of a safetensors file, a length, may look like a pickle; a `{` follows them.
    """
    return data.startswith(PICKLE_PREFIXES) and data[8:9] != b"{"


def _refuse_foreign(data: bytes, path: Path) -> None:
    """Raise a `ModelFileError` for files of other kinds."""
    if path.suffix.lower() == ".onnx":  # opened by `onnx_model`
        raise ModelFileError(
            "an exported ONNX file can only predict: its layers are not accessible",
            where=str(path),
            fix="use it with predict or evaluate, or use the run it was exported from",
        )
    if is_pickle(data):
        raise ModelFileError(
            "this is a pickle (.pt/.pth): opening it could execute any code, so it is refused",
            where=str(path),
            fix="use a model.safetensors of convlens, or the name of a run",
        )
    if len(data) < 8:
        raise ModelFileError(f"not a model file: only {len(data)} bytes", where=str(path))


def _metadata(data: bytes, path: Path) -> dict[str, Any]:
    """Return the metadata in the header of a model file."""
    length = int.from_bytes(data[:8], "little")
    try:
        if length > min(MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError(f"the header claims {length} bytes, the file has {len(data) - 8}")
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"][METADATA_KEY]
        content = json.loads(metadata)
        if not isinstance(content, dict):
            raise ValueError("the metadata is not a JSON object")
    except KeyError as error:
        raise ModelFileError(
            "a safetensors file that convlens did not write: it does not name classes and network",
            where=str(path),
            fix="use a model.safetensors that convlens wrote",
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelFileError(
            f"not a readable model file (truncated, damaged or another format): {error}"[:200],
            where=str(path),
            fix="restore it from a copy, or train again with --fresh",
        ) from error
    return content


# ---- weights of other programs -----------------------------------------------------------

# Keys under which training scripts save the weights; the first one that exists is used.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net")


@dataclass(frozen=True)
class ForeignWeights:
    """Tensors by name, the SHA-256 of the file and, if convlens wrote it, its metadata."""

    tensors: dict[str, Tensor]
    sha256: str
    model_metadata: dict[str, Any] = field(default_factory=dict)


def read_foreign_weights(path: Path) -> ForeignWeights:
    """Read the tensors of a `.safetensors`, `.pt`, `.pth` or `.bin` file.

    The hash of a model file of convlens is checked.

    Raises:
        ModelFileError: the file is missing, damaged, of another format, or contains code or
            anything else but tensors in dicts.
        ResourceError: the file cannot be read.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError("no such file", where=str(path), fix="check the path") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    if is_pickle(data):
        _refuse_compressed(data, path)
        tensors = _named_tensors(_unpickle_tensors(data, path), len(data), path)
        return ForeignWeights(tensors, hashlib.sha256(data).hexdigest())
    if _is_model_file(path):
        tensors, model_metadata = read_model_file(path)
        return ForeignWeights(tensors, model_metadata["sha256"], model_metadata)
    tensors = _checked_tensors(unpack_tensors(data, path), len(data), path)
    return ForeignWeights(tensors, hashlib.sha256(data).hexdigest())


def _is_model_file(path: Path) -> bool:
    """Return whether a safetensors file was written by convlens."""
    try:
        with safe_open(path, "pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"neither a safetensors nor a torch.save file, or damaged: {error}"[:200],
            where=str(path),
            fix="download or save it again",
        ) from error


def _refuse_compressed(data: bytes, path: Path) -> None:
    """Refuse zip bombs: the zip archive of torch.save is not compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        return  # an old format, or damaged, which the unpickler will report
    names = [member.filename for member in members]
    is_compressed = sum(member.file_size for member in members) > 2 * len(data) + (1 << 20)
    if is_compressed or len(set(names)) < len(names):
        raise ModelFileError(
            "this zip archive unpacks to far more than its size, or has duplicate names",
            where=str(path),
            fix="save the weights again with torch.save(model.state_dict(), ...)",
        )


def _unpickle_tensors(data: bytes, path: Path) -> Any:
    """Read a file of torch.save with the restricted unpickler."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated or malicious file can raise anything
        # The message of torch is not shown: it recommends to load the file anyway.
        match = re.search(r"GLOBAL (\S+)", str(error))
        if "TorchScript" in str(error):
            what = "this file contains a TorchScript program, not only tensors"
        elif match:
            what = f"this file contains {match[1]}, not only tensors"
        else:
            what = "this file of torch.save is damaged, or contains more than tensors"
        raise ModelFileError(
            what + ": opening it could execute any code",
            where=str(path),
            fix="save only the weights: torch.save(model.state_dict(), ...)",
        ) from error


def _named_tensors(content: Any, size: int, path: Path) -> dict[str, Tensor]:
    """Return the state dict in the content: itself, or under one of `STATE_DICT_KEYS`."""
    types = []
    while isinstance(content, Mapping):
        key = next((k for k in STATE_DICT_KEYS if isinstance(content.get(k), Mapping)), None)
        if key is None:
            tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
            if tensors and all(isinstance(name, str) for name in tensors):
                return _checked_tensors(tensors, size, path)
            types += [f"{name!r}: {type(value).__name__}" for name, value in content.items()]
            break
        content = content[key]
    description = f"a dict of {', '.join(types[:5])}" if types else f"a {type(content).__name__}"
    raise ModelFileError(
        f"this file contains no named tensors, but {description}"[:200],
        where=str(path),
        fix="save a state dict: torch.save(model.state_dict(), ...)",
    )


def _checked_tensors(tensors: dict[str, Tensor], size: int, path: Path) -> dict[str, Tensor]:
    """Refuse tensors that cannot be used as weights. `size`: bytes of the file."""
    for name, tensor in tensors.items():
        is_unusual = tensor.is_quantized or tensor.is_complex() or tensor.is_nested
        if is_unusual or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = str(tensor.dtype if is_unusual else tensor.layout).removeprefix("torch.")
            raise ModelFileError(
                f"{name} is not a dense tensor of numbers ({kind}, {tensor.device.type})",
                where=str(path),
                fix="save the weights before the network is quantized or pruned",
            )
        if tensor.numel() * tensor.element_size() > size:  # an expanded view
            raise ModelFileError(
                f"{name} claims {tensor.numel():,} elements, more than the file contains",
                where=str(path),
                fix="save the weights again",
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


# ---- checkpoints -------------------------------------------------------------------------

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
    """The checkpoints of a run. The two newest are kept, in case one is corrupted.

        state/0003-000017.safetensors       the newest: epoch 3, after 17 steps
        state/0003-000001.safetensors       the one before

    File names contain epoch and step, and every file its SHA-256, so that no index is needed: the
    newest intact file is used. A file gets its name by a rename, after its content is on the disk.

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
            ResourceError: the file cannot be written; the previous checkpoint is intact.
        """
        position = epoch, step = _epoch_and_step(counters)
        path = self._folder / f"{epoch:04}-{step:06}.safetensors"
        # A checkpoint ahead of this one was corrupt or unusable when the run resumed before it. It
        # is deleted first: if this process is killed after the rename, the next start must not
        # find it.
        _delete(each for each in self._files() if _position(each) > position)
        write_model_file(path, tensors, counters)
        older = [each for each in self._files() if _position(each) < position]
        if self._current in older:  # others may be corrupt: they have not been read
            older = [self._current]
        self._delete_all_but({path, *older[: NUM_KEPT - 1]})
        self._current = path

    def read(self, is_usable: Callable[[dict[str, Any]], str] = lambda _: "") -> Checkpoint | None:
        """Read the newest intact checkpoint; None if there is none.

        Args:
            is_usable: returns why a checkpoint with these counters cannot be used, or "".

        Raises:
            NewerFormatError: a newer version wrote it. It is not skipped, because the next `save`
                would delete it.
        """
        self.corrupt, self._current = [], None
        for path in self._files():
            try:
                tensors, counters = read_model_file(path)
                if not _matches(path, counters):
                    raise ModelFileError(
                        "its content does not match the epoch and step in its name"
                    )
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
        """Delete all checkpoints but the newest, from which a finished run can be extended."""
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
        """Return all files named like a checkpoint, newest first."""
        if not self._folder.is_dir():
            return []
        paths = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(paths, key=_position, reverse=True)

    def _delete_all_but(self, kept: Collection[Path]) -> None:
        """Delete other checkpoints, and files left by killed processes or earlier versions."""
        _delete(p for p in self._folder.iterdir() if p not in kept and not p.is_dir())


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        with contextlib.suppress(OSError):
            path.unlink()


def _position(path: Path) -> tuple[int, int]:
    """Return (epoch, step) from the name of a checkpoint file."""
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

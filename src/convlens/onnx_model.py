"""Load a model for inference, from a native model file or an exported ONNX file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convlens import serialization
from convlens.data.decode import FITS
from convlens.data.loader import Prepare
from convlens.device import Plan, num_threads
from convlens.errors import ModelFileError, UsageError
from convlens.run import LoadedModel, Preprocessing, load_model
from convlens.serialization import NO_HASH, digest_around
from convlens.utils.files import cannot_read

ONNX_SUFFIX = ".onnx"


@dataclass(frozen=True)
class NormalizedInGraph(Preprocessing):
    """Preprocessing whose normalization is part of the exported graph."""

    @property
    def normalize(self) -> Prepare:
        return _to_float


def _to_float(images: Tensor, plan: Plan) -> Tensor:
    """Pixels 0..255 as floats: test-time augmentation pads, which torch does to floats only."""
    return images.float()


class ExportedModel(LoadedModel):
    """A model that is run from an exported file, on the CPU; its layers can't be inspected."""

    @property
    def can_choose_memory_format(self) -> bool:
        return False

    @property
    def is_native(self) -> bool:
        return False

    def select_device(self, requested: str | None) -> str:
        if requested not in (None, "auto", "cpu"):
            raise UsageError(
                f"device {requested!r}: exported ONNX files are run on the CPU",
                fix="leave out --device, or take the run itself",
            )
        return "cpu"


def load_model_or_onnx(path: Path) -> LoadedModel:
    """Load a model file, or an ONNX file that `convlens export` made.

    Raises:
        ModelFileError: damaged, another program's, or inconsistent.
        UsageError: onnx or onnxruntime isn't installed.
    """
    path = Path(path)
    if path.suffix.lower() != ONNX_SUFFIX:
        return load_model(path)
    return onnx_model(read_bytes(path), path)


def onnx_model(content: bytes, path: Path) -> ExportedModel:
    """The model in the content of an exported ONNX file; `path` is where it lies, or will lie."""
    metadata = verify(content, str(path))
    try:
        classes = tuple(str(name) for name in _parsed(metadata, "classes", list))
        pre = NormalizedInGraph(**_parsed(metadata, "preprocessing", dict))
        valid = (
            isinstance(pre.image_size, int)
            and pre.image_size > 0
            and pre.channels in (1, 3)
            and pre.fit in FITS
        )
        if not valid or not classes or len(set(classes)) != len(classes):
            raise ValueError("impossible classes or preprocessing")
        model_metadata = _parsed(metadata, "card", dict)
        model_metadata |= {key: metadata[key] for key in ("convlens", "run", "sha256")}
        if not isinstance(model_metadata["recipe"], dict) or not isinstance(
            model_metadata["data"]["fingerprint"], str
        ):
            raise TypeError("recipe or data fingerprint of another type")
        at_once = max(1, min(256, int(metadata["at_once"])))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
        newer = serialization.is_newer_version(metadata.get("convlens"))
        raise ModelFileError(
            f"its metadata can't be used: {reason}",
            where=str(path),
            fix="update convlens: a newer one wrote it" if newer else EXPORT_AGAIN,
        ) from error
    image = (pre.channels, pre.image_size, pre.image_size)
    model = OnnxNetwork(content, str(path), image, len(classes), at_once)
    return ExportedModel(model.eval(), classes, pre, model_metadata, path.parent)


def _parsed(metadata: dict[str, str], key: str, kind: type) -> Any:
    value = json.loads(metadata[key])
    if not isinstance(value, kind):
        raise TypeError(f"{key} is a {type(value).__name__}, not a {kind.__name__}")
    return value


# ---- onnxfile ----------------------------------------
# ONNX files of convlens: written with metadata and a SHA-256, and only such files are opened.
#
# An ONNX file may name other files to read its weights from, and runtimes have had security holes.
# So a runtime gets a file only after these checks: the hash matches, all weights are inside, and all
# operators are standard ones.

INPUT, OUTPUTS = "images", ("logits", "probabilities")
MARK, FORMAT = "convlens_format", "1"  # the metadata key that marks our files
MAX_BYTES = 2**31 - 1  # limit of protobuf
STANDARD_DOMAINS = ("", "ai.onnx")
OOM_MESSAGES = ("bad_alloc", "bad allocation", "Failed to allocate memory")
EXPORT_AGAIN = "export it again: convlens export RUN --to onnx"
ONLY_OURS = "only files made by `convlens export` are opened"


def require(package: str) -> Any:
    """Import one of the optional packages that ONNX files need.

    Raises:
        UsageError: it isn't installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        raise UsageError(
            f"{package} is not installed: ONNX files can neither be written nor read",
            fix="pip install onnx onnxruntime onnxscript",
        ) from error


def serialize(proto: Any, metadata: Mapping[str, str]) -> bytes:
    """The file of an ONNX `ModelProto` with `metadata`, whose last entry is the SHA-256.

    It covers the whole file, its own 64 digits taken as zeros (as in model files).

    Raises:
        ModelFileError: larger than 2 GiB.
    """
    del proto.metadata_props[:]
    for key, value in {MARK: FORMAT, **metadata, "sha256": NO_HASH}.items():
        proto.metadata_props.add(key=key, value=value)
    try:
        data: bytes = proto.SerializeToString()
    except MemoryError:
        raise
    except Exception as error:  # protobuf's EncodeError, or a ValueError, by its version
        raise ModelFileError(f"too large for one ONNX file: {error}"[:200]) from error
    # The last match: metadata follow the graph, and the hash follows texts of the user.
    at, digest = data.rfind(NO_HASH.encode()), hashlib.sha256(data).hexdigest()
    return data[:at] + digest.encode() + data[at + len(NO_HASH) :]


def read_bytes(path: Path) -> bytes:
    """The content of an ONNX file, which may be anybody's until `verify` has checked it.

    Raises:
        ModelFileError: missing or larger than an ONNX file can be.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelFileError("an ONNX file is never larger than 2 GiB", where=str(path))
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError("no such file", where=str(path), fix="check the path") from error
    except OSError as error:
        raise cannot_read(path, error) from error


def verify(data: bytes, where: str) -> dict[str, str]:
    """Check that `serialize` made this file, and return its metadata. No other file is opened.

    Raises:
        ModelFileError: damaged, another program's, of a newer format, or with something that our
            files never have: weights in other files, custom operators, functions.
    """

    def refused(what: str, fix: str = EXPORT_AGAIN) -> ModelFileError:
        return ModelFileError(what[:300], where=where, fix=fix)

    proto = require("onnx").ModelProto()
    try:
        proto.ParseFromString(data)
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("its metadata are not text")  # protobuf returns invalid UTF-8 as bytes
    except MemoryError:
        raise
    except Exception as error:  # the module of protobuf's DecodeError depends on its version
        reason = f"{error}"[:120]
        raise refused(
            f"not a readable ONNX file (truncated, damaged or another format): {reason}"
        ) from error
    if MARK not in metadata:
        raise refused("not written by convlens: classes and preprocessing are missing", ONLY_OURS)
    stored = metadata.get("sha256", "")
    known = re.fullmatch("[0-9a-f]{64}", stored) is not None
    if not known or digest_around(data, data.rfind(stored.encode())) != stored:
        raise refused("the file was changed or damaged after it was written (its hash differs)")
    if metadata[MARK] != FORMAT:
        raise refused(
            f"written by a newer convlens (format {metadata[MARK][:20]}, this one knows {FORMAT})",
            "update convlens",
        )
    foreign = _find_foreign(proto)
    if foreign:
        raise refused(f"not written by convlens, although it is marked so: {foreign}", ONLY_OURS)
    return metadata


def _find_foreign(proto: Any) -> str:
    """Describe the first thing that our files never contain; empty if nothing is found."""
    if len(proto.functions) or len(proto.training_info):
        return "it has functions or training steps of its own"
    for message in walk(proto):
        kind = type(message).__name__
        if kind == "TensorProto" and (message.data_location or len(message.external_data)):
            entries = message.external_data
            paths = [f"{entry.value}" for entry in entries if entry.key == "location"]
            return f"weights in another file ({', '.join(paths) or 'without a name'})"
        if kind == "NodeProto" and message.domain not in STANDARD_DOMAINS:
            return f"a custom operator ({message.domain}.{message.op_type})"
    return ""


def walk(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages inside at any depth, except inside tensors."""
    yield message
    if type(message).__name__ == "TensorProto":  # listing its fields would copy the weights
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from walk(inner)


class OnnxNetwork(nn.Module):
    """A verified ONNX file as a module: pixels 0..255 `[B, C, S, S]` to logits float32 `[B, K]`.

    Runs on the CPU with as many threads as torch.

    Args:
        data: the file's bytes, which `verify` has accepted.
        image: `(C, S, S)`, as the metadata say.
        classes: the number of classes there.
        at_once: the batch size in which it runs; a larger batch is split.

    Raises:
        ModelFileError: onnxruntime can't run it, or its inputs or outputs are others.
        MemoryError: out of memory; also from `outputs`.
    """

    def __init__(
        self, data: bytes, where: str, image: tuple[int, int, int], classes: int, at_once: int
    ) -> None:
        super().__init__()
        self.where, self.at_once = where, at_once
        runtime = require("onnxruntime")
        runtime.disable_telemetry_events()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads()
        # Threads that wait for the next batch must not keep the decoder's from their cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # errors are raised, not printed
        try:
            # On an error, the fallback would print it on stdout and try the same again.
            self.session = runtime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            inputs = _signature(self.session.get_inputs())
            outputs = _signature(self.session.get_outputs())
        except Exception as error:  # onnxruntime has a dozen kinds
            what = f"onnxruntime {runtime.__version__} can't run it"
            raise _translate(
                error, what, where, "update onnxruntime, or " + EXPORT_AGAIN
            ) from error
        expected_inputs = [(INPUT, "tensor(uint8)", ["N", *image])]
        expected_outputs = [(name, "tensor(float)", ["N", classes]) for name in OUTPUTS]
        if (inputs, outputs) != (expected_inputs, expected_outputs):
            raise ModelFileError(
                f"its graph takes {inputs} and gives {outputs}; its metadata say {image[0]} "
                f"channels, {image[1]} px and {classes} classes",
                where=where,
                fix=EXPORT_AGAIN,
            )

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities for uint8 images, in one batch."""
        try:
            logits, probs = self.session.run(
                list(OUTPUTS), {INPUT: np.ascontiguousarray(images.numpy())}
            )
        except Exception as error:
            raise _translate(error, "onnxruntime failed", self.where, EXPORT_AGAIN) from error
        return torch.from_numpy(logits), torch.from_numpy(probs)

    def forward(self, images: Tensor) -> Tensor:
        parts = images.to(device="cpu", dtype=torch.uint8).split(self.at_once)
        return torch.cat([self.outputs(part)[0] for part in parts]).to(images.device)


def _signature(values: list[Any]) -> list[tuple[str, str, list[Any]]]:
    """Names, types and shapes of a session's inputs or outputs; a dynamic batch size is "N"."""
    found = []
    for value in values:
        batch = [size if isinstance(size, int) else "N" for size in value.shape[:1]]
        found.append((str(value.name), str(value.type), [*batch, *value.shape[1:]]))
    return found


def _translate(error: Exception, what: str, where: str, fix: str) -> Exception:
    """The exception to raise for one of onnxruntime's; no file is at fault for lack of memory."""
    reason = " ".join(str(error).split())
    for words in OOM_MESSAGES:
        if words in reason:
            return MemoryError(reason[reason.index(words) :])
    if isinstance(error, MemoryError):
        return error
    return ModelFileError(f"{what}: {reason[:160]}", where=where, fix=fix)

"""Models loaded for inference, from a native model file or an exported ONNX file.

`convlens export` writes ONNX files with metadata and a SHA-256, and only such files are opened. An
ONNX file can name other files to read its weights from, and runtimes have had security holes.
Therefore a runtime gets a file only after these checks: the hash matches, all weights are inside,
and all operators are standard ones.
"""

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
from convlens.data.loader import Prepare
from convlens.device import Plan, num_threads
from convlens.errors import ModelFileError, UsageError
from convlens.run import LoadedModel, Preprocessing, load_model
from convlens.serialization import NO_HASH, digest_around
from convlens.uncertainty.calibration import ModelCalibration
from convlens.utils.files import cannot_read

ONNX_SUFFIX = ".onnx"
INPUT, OUTPUTS = "images", ("logits", "probabilities")
MARK, FORMAT = "convlens_format", "1"  # the metadata key that marks files of convlens
MAX_ONNX_BYTES = 2**31 - 1  # limit of protobuf
STANDARD_DOMAINS = ("", "ai.onnx")
OOM_MESSAGES = ("bad_alloc", "bad allocation", "Failed to allocate memory")
EXPORT_AGAIN = "export it again: convlens export RUN --to onnx"
ONLY_OURS = "only files made by `convlens export` are opened"


@dataclass(frozen=True)
class NormalizedInGraph(Preprocessing):
    """Preprocessing whose normalization is part of the exported graph."""

    @property
    def normalize(self) -> Prepare:
        return _to_float


def _to_float(images: Tensor, plan: Plan) -> Tensor:
    """Convert pixels 0..255 to float, because torch cannot pad uint8 (test-time augmentation)."""
    return images.float()


class ExportedModel(LoadedModel):
    """A model in an exported file, which runs on the CPU; its layers cannot be inspected."""

    @property
    def can_choose_memory_format(self) -> bool:
        return False

    @property
    def is_native(self) -> bool:
        return False

    def select_device(self, device: str | None) -> str:
        if device not in (None, "auto", "cpu"):
            raise UsageError(
                f"device {device!r}: exported ONNX files are run on the CPU",
                fix="leave out --device, or use the run itself",
            )
        return "cpu"


def load_model_or_onnx(path: Path) -> LoadedModel:
    """Load a model file, or an ONNX file that `convlens export` wrote.

    Raises:
        ModelFileError: damaged, written by another program, or inconsistent.
        UsageError: onnx or onnxruntime is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ONNX_SUFFIX:
        return load_model(path)
    return onnx_model(read_onnx_file(path), path)


def onnx_model(content: bytes, path: Path) -> ExportedModel:
    """Load the model from the content of an exported ONNX file.

    Args:
        path: where the file is or will be; for messages, and to find the run's other files.

    Raises:
        ModelFileError, UsageError: as by `load_model_or_onnx`.
    """
    metadata = verify(content, str(path))
    try:
        classes = tuple(str(name) for name in _parse_json(metadata, "classes", list))
        pre = NormalizedInGraph(**_parse_json(metadata, "preprocessing", dict))
        valid = (
            isinstance(pre.image_size, int)
            and pre.image_size > 0
            and pre.channels in (1, 3)
            and pre.conversion.is_valid
        )
        if not valid or not classes or len(set(classes)) != len(classes):
            raise ValueError("impossible classes or preprocessing")
        model_metadata = _parse_json(metadata, "card", dict)
        model_metadata |= {key: metadata[key] for key in ("convlens", "run", "sha256")}
        if not isinstance(model_metadata["recipe"], dict) or not isinstance(
            model_metadata["data"]["fingerprint"], str
        ):
            raise TypeError("recipe or data fingerprint of another type")
        max_batch_size = max(1, min(256, int(metadata["at_once"])))
        # Files of earlier versions have none.
        calibration = (
            ModelCalibration.from_metadata(_parse_json(metadata, "calibration", dict))
            if "calibration" in metadata
            else ModelCalibration()
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
        newer = serialization.is_newer_version(metadata.get("convlens"))
        raise ModelFileError(
            f"its metadata can't be used: {reason}",
            where=str(path),
            fix="update convlens: a newer one wrote it" if newer else EXPORT_AGAIN,
        ) from error
    image = (pre.channels, pre.image_size, pre.image_size)
    model = OnnxNetwork(
        content, str(path), image, len(classes), max_batch_size, calibration.temperature
    )
    return ExportedModel(model.eval(), classes, pre, model_metadata, path.parent, calibration)


def _parse_json(metadata: dict[str, str], key: str, kind: type) -> Any:
    value = json.loads(metadata[key])
    if not isinstance(value, kind):
        raise TypeError(f"{key} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def require(package: str) -> Any:
    """Import one of the optional packages for ONNX files.

    Raises:
        UsageError: the package is not installed.
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
    """Return the bytes of an ONNX file with `metadata`, whose last entry is the SHA-256.

    The hash covers every byte, with zeros in place of its own 64 digits (as in model files).

    Args:
        proto: an ONNX `ModelProto`.

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
    except Exception as error:  # EncodeError or ValueError, depending on protobuf's version
        raise ModelFileError(f"too large for one ONNX file: {error}"[:200]) from error
    # The last match: the metadata follow the graph, and the hash follows the user's text.
    at, digest = data.rfind(NO_HASH.encode()), hashlib.sha256(data).hexdigest()
    return data[:at] + digest.encode() + data[at + len(NO_HASH) :]


def read_onnx_file(path: Path) -> bytes:
    """Return the content of an ONNX file, which is untrusted until `verify` has checked it.

    Raises:
        ModelFileError: missing, unreadable, or larger than an ONNX file can be.
    """
    try:
        if path.stat().st_size > MAX_ONNX_BYTES:
            raise ModelFileError("an ONNX file is never larger than 2 GiB", where=str(path))
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError("no such file", where=str(path), fix="check the path") from error
    except OSError as error:
        raise cannot_read(path, error) from error


def verify(data: bytes, where: str) -> dict[str, str]:
    """Check that `serialize` wrote this file, and return its metadata. No other file is opened.

    Raises:
        ModelFileError: damaged, written by another program, of a newer format, or with content that
            exported files never have: weights in other files, custom operators, functions.
    """

    def refusal(what: str, fix: str = EXPORT_AGAIN) -> ModelFileError:
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
        raise refusal(
            f"not a readable ONNX file (truncated, damaged or another format): {reason}"
        ) from error
    if MARK not in metadata:
        raise refusal("not written by convlens: classes and preprocessing are missing", ONLY_OURS)
    stored = metadata.get("sha256", "")
    is_hash = re.fullmatch("[0-9a-f]{64}", stored) is not None
    if not is_hash or digest_around(data, data.rfind(stored.encode())) != stored:
        raise refusal("the file was changed or damaged after it was written (its hash differs)")
    if metadata[MARK] != FORMAT:
        raise refusal(
            f"written by a newer convlens (format {metadata[MARK][:20]}, this one reads {FORMAT})",
            "update convlens",
        )
    foreign = _find_foreign_content(proto)
    if foreign:
        raise refusal(f"not written by convlens, although it is marked so: {foreign}", ONLY_OURS)
    return metadata


def _find_foreign_content(proto: Any) -> str:
    """Describe the first content that exported files never have; empty if there is none."""
    if len(proto.functions) or len(proto.training_info):
        return "it contains functions or training steps"
    for message in list_messages(proto):
        kind = type(message).__name__
        if kind == "TensorProto" and (message.data_location or len(message.external_data)):
            entries = message.external_data
            paths = [f"{entry.value}" for entry in entries if entry.key == "location"]
            return f"weights in another file ({', '.join(paths) or 'without a name'})"
        if kind == "NodeProto" and message.domain not in STANDARD_DOMAINS:
            return f"a custom operator ({message.domain}.{message.op_type})"
    return ""


def list_messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages inside it at any depth, except inside tensors."""
    yield message
    if type(message).__name__ == "TensorProto":  # listing its fields would copy the weights
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from list_messages(inner)


class OnnxNetwork(nn.Module):
    """A verified ONNX file as a module: pixels 0..255 `[B, C, S, S]` to logits float32 `[B, K]`.

    Runs on the CPU with as many threads as torch. The graph divides the logits by the temperature;
    this module multiplies them again, so that they are those of the original network.

    Args:
        data: the file's bytes, which `verify` has accepted.
        image: `(C, S, S)` according to the metadata.
        classes: the number of classes according to the metadata.
        max_batch_size: larger batches are split.
        temperature: by which the graph divides the logits.

    Raises:
        ModelFileError: onnxruntime cannot run it, or inputs or outputs do not match the metadata.
        MemoryError: out of memory; also raised by `outputs`.
    """

    def __init__(
        self,
        data: bytes,
        where: str,
        image: tuple[int, int, int],
        classes: int,
        max_batch_size: int,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.where, self.max_batch_size = where, max_batch_size
        self.temperature = temperature
        runtime = require("onnxruntime")
        runtime.disable_telemetry_events()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads()
        # Threads that wait for the next batch must not take cores from the decoder.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # errors are raised, not printed
        try:
            # On an error, the fallback would print to stdout and retry in the same way.
            self.session = runtime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            inputs = _signature(self.session.get_inputs())
            outputs = _signature(self.session.get_outputs())
        except Exception as error:  # onnxruntime raises a dozen types
            what = f"onnxruntime {runtime.__version__} can't run it"
            raise _translate_error(
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
        """Return logits and probabilities, the outputs of the graph, for one batch of images."""
        try:
            logits, probs = self.session.run(
                list(OUTPUTS), {INPUT: np.ascontiguousarray(images.numpy())}
            )
        except Exception as error:
            raise _translate_error(error, "onnxruntime failed", self.where, EXPORT_AGAIN) from error
        return torch.from_numpy(logits), torch.from_numpy(probs)

    def forward(self, images: Tensor) -> Tensor:
        parts = images.to(device="cpu", dtype=torch.uint8).split(self.max_batch_size)
        logits = torch.cat([self.outputs(part)[0] for part in parts]).to(images.device)
        return logits * self.temperature if self.temperature != 1 else logits


def _signature(values: list[Any]) -> list[tuple[str, str, list[Any]]]:
    """Return names, types and shapes of inputs or outputs; a dynamic batch size is "N"."""
    signature = []
    for value in values:
        batch = [size if isinstance(size, int) else "N" for size in value.shape[:1]]
        signature.append((str(value.name), str(value.type), [*batch, *value.shape[1:]]))
    return signature


def _translate_error(error: Exception, what: str, where: str, fix: str) -> Exception:
    """Return the exception to raise for one of onnxruntime: MemoryError if memory ran out."""
    reason = " ".join(str(error).split())
    for words in OOM_MESSAGES:
        if words in reason:
            return MemoryError(reason[reason.index(words) :])
    if isinstance(error, MemoryError):
        return error
    return ModelFileError(f"{what}: {reason[:160]}", where=where, fix=fix)

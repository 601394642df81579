"""ONNX files of convlens: sealed with facts and a hash, and opened only if they are ours.

An ONNX file may name other files to take its weights from, and what runs it has had its share of
holes; so nothing is handed to a runtime before it is known to be whole (a hash over all of it, as
in our model files), to hold all of itself, and to have standard operators only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convlens.device import num_threads
from convlens.errors import ModelFileError, UsageError
from convlens.formats.modelfile import NO_HASH, digest_around
from convlens.system.files import cannot_read

INPUT, OUTPUTS = "images", ("logits", "probabilities")
MARK, FORMAT = "convlens_format", "1"  # the metadata key that says the file is ours
LARGEST = 2**31 - 1  # protobuf's own limit
DOMAINS = ("", "ai.onnx")
NO_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory")
AGAIN = "export it again: convlens export RUN --to onnx"


def needed(package: str) -> Any:
    """One of the packages that ONNX files need, which not everybody has.

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


def sealed(proto: Any, facts: Mapping[str, str]) -> bytes:
    """The file of an ONNX `ModelProto`: `facts` as its metadata, last of all a hash over it all.

    Raises:
        ModelFileError: larger than such a file can be (2 GiB).
    """
    del proto.metadata_props[:]
    for key, value in {MARK: FORMAT, **facts, "sha256": NO_HASH}.items():
        proto.metadata_props.add(key=key, value=value)
    try:
        data: bytes = proto.SerializeToString()
    except MemoryError:
        raise
    except Exception as error:  # protobuf's EncodeError, or a ValueError, by its version
        raise ModelFileError(f"too large for one ONNX file: {error}"[:200]) from error
    # The last one: the metadata stand behind the graph, and the hash behind the user's words.
    at, digest = data.rfind(NO_HASH.encode()), hashlib.sha256(data).hexdigest()
    return data[:at] + digest.encode() + data[at + len(NO_HASH) :]


def read(path: Path) -> tuple[bytes, dict[str, str]]:
    """A file that `sealed` made, with its facts; nothing else is opened for it.

    Raises:
        ModelFileError: missing, damaged, another program's, a newer format, or with what ours
            never have: weights in other files, operators and functions of its own.
    """
    onnx = needed("onnx")
    data = _bytes(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        facts = {entry.key: entry.value for entry in proto.metadata_props}
        if not all(isinstance(text, str) for pair in facts.items() for text in pair):
            raise ValueError("its metadata are no text")  # protobuf gives bytes instead
    except MemoryError:
        raise
    except Exception as error:  # protobuf's DecodeError lies elsewhere in each of its versions
        raise ModelFileError(
            f"no readable ONNX file (truncated, damaged or another format): {error}"[:200],
            where=str(path),
            fix=AGAIN,
        ) from error
    if MARK not in facts:
        raise ModelFileError(
            "no ONNX file that convlens wrote: it doesn't say its classes and preprocessing",
            where=str(path),
            fix="only files made by `convlens export` are opened",
        )
    stored = facts.get("sha256", "")
    known = re.fullmatch("[0-9a-f]{64}", stored) is not None
    if not known or digest_around(data, data.rfind(stored.encode())) != stored:
        raise ModelFileError(
            "the file was changed or damaged after it was written (its hash differs)",
            where=str(path),
            fix=AGAIN,
        )
    if facts[MARK] != FORMAT:
        raise ModelFileError(
            f"written by a newer convlens (format {facts[MARK][:20]}, this one knows {FORMAT})",
            where=str(path),
            fix="update convlens",
        )
    strange = _strange(proto)
    if strange:
        raise ModelFileError(
            f"it was not written by convlens, whatever it says: {strange}"[:300],
            where=str(path),
            fix="only files made by `convlens export` are opened",
        )
    return data, facts


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ModelFileError("no ONNX file is larger than 2 GiB", where=str(path))
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError("no such file", where=str(path), fix="check the path") from error
    except OSError as error:
        raise cannot_read(path, error) from error


def _strange(proto: Any) -> str:
    """What no file of ours has; empty if there is nothing of the kind."""
    if len(proto.functions) or len(proto.training_info):
        return "it has functions or training steps of its own"
    for message in messages(proto):
        kind = type(message).__name__
        if kind == "TensorProto" and (message.data_location or len(message.external_data)):
            entries = message.external_data
            places = [f"{entry.value}" for entry in entries if entry.key == "location"]
            return f"weights in another file ({', '.join(places) or 'without a name'})"
        if kind == "NodeProto" and message.domain not in DOMAINS:
            return f"an operator that is no standard one ({message.domain}.{message.op_type})"
    return ""


def messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages inside, at any depth; tensors aren't looked into."""
    yield message
    if type(message).__name__ == "TensorProto":  # asking for its fields would copy the weights
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from messages(inner)


class OnnxNet(nn.Module):
    """A sealed file as a network: pixels 0..255 `[B, C, S, S]` to logits float32 `[B, K]`.

    Runs on the CPU, in as many threads as torch.

    Args:
        data: a file's bytes as `read` gives them; nobody else's.
        at_once: how many images go through it together.

    Raises:
        ModelFileError: onnxruntime can't run it, or its input or outputs aren't ours.
        MemoryError: there was none left; also of `answers`.
    """

    def __init__(self, data: bytes, where: str, at_once: int) -> None:
        super().__init__()
        runtime = needed("onnxruntime")
        runtime.disable_telemetry_events()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads()
        # Threads that wait for the next batch must not keep the decoder's from their cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what fails is raised, not printed
        try:
            # Where that fails, the fallback would print it on stdout and try the same again.
            self.session = runtime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            given, made = self.session.get_inputs(), self.session.get_outputs()
            names = [one.name for one in given], tuple(one.name for one in made)
            self.kind = [str(one.type) for one in given]
            self.takes: list[list[Any]] = [one.shape for one in given]
            self.gives: list[list[Any]] = [one.shape for one in made]
        except Exception as error:  # onnxruntime has a dozen kinds
            what = f"onnxruntime {runtime.__version__} can't run it"
            raise _told(error, what, where, "update onnxruntime, or " + AGAIN) from error
        self.where, self.at_once = where, at_once
        if names != ([INPUT], OUTPUTS):
            raise ModelFileError("its input and outputs aren't those of an export", where=where)

    def fits(self, image: tuple[int, int, int], classes: int) -> bool:
        """Whether it takes images `[C, S, S]` of bytes, any number, and answers for `classes`."""
        (taken,) = self.takes
        rows = [taken[0], *(shape[0] for shape in self.gives)]
        sizes = taken[1:] == list(image)
        answers = all(shape[1:] == [classes] for shape in self.gives)
        any_number = not any(isinstance(row, int) for row in rows)
        return self.kind == ["tensor(uint8)"] and sizes and answers and any_number

    def answers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities for uint8 images, all at once."""
        try:
            logits, chances = self.session.run(list(OUTPUTS), {INPUT: _array(images)})
        except Exception as error:
            raise _told(error, "onnxruntime failed", self.where, AGAIN) from error
        return torch.from_numpy(logits), torch.from_numpy(chances)

    def forward(self, images: Tensor) -> Tensor:
        parts = images.to(device="cpu", dtype=torch.uint8).split(self.at_once)
        return torch.cat([self.answers(part)[0] for part in parts]).to(images.device)


def _array(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.numpy())


def _told(error: Exception, what: str, where: str, fix: str) -> Exception:
    """What to raise for one of onnxruntime's: if memory ran out, no file is at fault."""
    reason = " ".join(str(error).split())
    for words in NO_MEMORY:
        if words in reason:
            return MemoryError(reason[reason.index(words) :])
    if isinstance(error, MemoryError):
        return error
    return ModelFileError(f"{what}: {reason[:160]}", where=where, fix=fix)

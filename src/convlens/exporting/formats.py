"""Formats that a network can be exported to, all translated from one captured program.

`torch.export` captures the network once, with the preprocessing that follows decoding in it and a
dynamic batch size; ONNX is translated from that very program.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convlens.data.batches import scale_and_shift
from convlens.errors import ModelFileError
from convlens.exported import onnx_model
from convlens.exporting.agreement import ReferenceOutputs, RunModel
from convlens.formats import onnxfile
from convlens.formats.onnxfile import INPUT, OUTPUTS
from convlens.run import Loaded, Preprocessing
from convlens.stepping import memory
from convlens.version import __version__

FACTS = "convlens.json"  # the metadata, among the extra files of a torch.export archive
OPSET = 18  # torch translates to it without a conversion; runtimes read it since 2023
FITTING = {
    "crop": "its short side resized to {size} px (antialiased, bilinear), the centre cut out",
    "pad": "its long side resized to {size} px (antialiased, bilinear), black borders around it",
    "stretch": "resized to {size} x {size} px (antialiased, bilinear)",
}
COLORS = {1: "grey (ITU-R 601)", 3: "RGB"}


class Format(NamedTuple):
    """An entry of `FORMATS`.

    `serialize` makes a file's bytes from a captured program and metadata. `load` makes a callable
    model from these bytes; the second argument names the file in error messages.
    """

    suffix: str
    packages: tuple[str, ...]
    serialize: Callable[[Any, dict[str, Any]], bytes]
    load: Callable[[bytes, str], RunModel]


class Exportable(nn.Module):
    """A network with its normalization: uint8 pixels as the decoder gives them, any batch size.

    Maps uint8 `[N, C, S, S]` to logits and probabilities, float32 `[N, K]`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        scale, shift = scale_and_shift(mean, std, 255.0, "cpu")
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.model(images.float() * self.scale + self.shift)
        return dict(zip(OUTPUTS, (logits, logits.softmax(1)), strict=True))


def capture(loaded: Loaded) -> Any:
    """Capture the network with `torch.export`, in eval mode, with a dynamic batch size.

    Raises:
        ModelFileError: torch can't capture this network.
    """
    pre = loaded.preprocessing
    model = Exportable(loaded.model.cpu(), pre.mean, pre.std)
    images = torch.zeros(2, pre.channels, pre.image_size, pre.image_size, dtype=torch.uint8)
    shapes = {"images": {0: torch.export.Dim("N", min=1)}}
    with _translating("torch.export"):
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of this machine
    return program


def describe(loaded: Loaded, reference: ReferenceOutputs) -> dict[str, Any]:
    """The metadata of an exported file, in any format."""
    pre = loaded.preprocessing
    shape = f"[N, {pre.channels}, {pre.image_size}, {pre.image_size}]"
    return {
        "convlens": __version__,
        "run": str(loaded.card.get("run", "")),
        "source_sha256": loaded.card["sha256"],
        "classes": list(loaded.classes),
        "input": f"{INPUT}: uint8 {shape}, 0 to 255, any N. {_describe_decoding(pre)} "
        "Nothing else: scaling and normalisation are inside.",
        "outputs": f"{OUTPUTS[0]} and {OUTPUTS[1]} (their softmax): float32 "
        f"[N, {len(loaded.classes)}], in the order of `classes`",
        "preprocessing": asdict(pre),
        "at_once": reference.at_once,
        "proof": reference.conditions(),
        # What `evaluate` needs besides.
        "card": {
            key: loaded.card[key] for key in ("model", "data", "recipe") if key in loaded.card
        },
    }


def _describe_decoding(pre: Preprocessing) -> str:
    """Describe in words how `convlens.data.decode` prepares an image file for the network."""
    return (
        f"Each image: decoded, turned upright by its EXIF, {COLORS[pre.channels]}, transparent "
        f"parts white, {FITTING[pre.fit].format(size=pre.image_size)}."
    )


def _serialize_onnx(program: Any, facts: dict[str, Any]) -> bytes:
    with _translating("torch.onnx"):
        made = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            verbose=False,
        )
        assert made is not None
        proto = made.model_proto
    proto.graph.ClearField("value_info")  # shapes in between, which every runtime infers again
    rows = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == rows and rows:
                size.dim_param = "N"  # torch names it s34 or the like
    for message in onnxfile.walk(proto):
        # Stack traces, with paths of this machine, and repetitions of the graph in words.
        for field in ("metadata_props", "doc_string"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
    proto.producer_name, proto.producer_version = "convlens", __version__
    used = {node.domain for node in proto.graph.node}
    for entry in [each for each in proto.opset_import if each.domain not in (*used, "")]:
        proto.opset_import.remove(entry)
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in facts.items()}
    return onnxfile.serialize(proto, texts)


def _load_onnx(content: bytes, where: str) -> RunModel:
    model = onnx_model(content, Path(where)).model
    assert isinstance(model, onnxfile.OnnxNet)
    return model.outputs


def _serialize_torch(program: Any, facts: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with _translating("torch.export"):
        torch.export.save(program, file, extra_files={FACTS: json.dumps(facts)})
    return file.getvalue()


def _load_torch(content: bytes, where: str) -> RunModel:
    # torch unpickles the example inputs in it: only for bytes that this process has just made.
    with _translating("torch.export"):
        module = torch.export.load(io.BytesIO(content)).module()

    def run_model(images: Tensor) -> tuple[Tensor, Tensor]:
        with _translating("the exported program"):
            outputs = module(images)
        return outputs[OUTPUTS[0]], outputs[OUTPUTS[1]]

    return run_model


# To add a format: two functions here and an entry. `tests/test_exporting.py` exports every family.
FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _serialize_onnx, _load_onnx),
    "torch": Format(".pt2", (), _serialize_torch, _load_torch),
}


@contextlib.contextmanager
def _translating(tool: str) -> Iterator[None]:
    """Silence the logs of torch and onnxscript, and turn their errors into ModelFileErrors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if memory.is_oom(error):  # neither the network nor the format is at fault
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines or [type(error).__name__])[0][:160]
        raise ModelFileError(
            f"{tool} of torch {torch.__version__} can't take this network: {reason}",
            fix="choose the other format (--to), or another network",
        ) from error
    finally:
        logging.disable(before)

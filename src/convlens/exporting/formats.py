"""What a network can be exported to. Each format is captured from the same program.

`torch.export` captures the network once, with the preprocessing that follows decoding in it and
any number of images; ONNX is translated from that very program.
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
from convlens.exporting.agreement import Ask
from convlens.formats import onnxfile
from convlens.formats.onnxfile import INPUT, OUTPUTS
from convlens.run import Loaded, Preprocessing
from convlens.stepping import memory
from convlens.version import __version__

FACTS = "convlens.json"  # in an archive of torch.export, among its extra files
OPSET = 18  # the one torch translates to itself, without conversion; read by any runtime since 2023
FITTING = {
    "crop": "its short side resized to {size} px (antialiased, bilinear), the centre cut out",
    "pad": "its long side resized to {size} px (antialiased, bilinear), black borders around it",
    "stretch": "resized to {size} x {size} px (antialiased, bilinear)",
}
COLOURS = {1: "grey (ITU-R 601)", 3: "RGB"}


class Body(NamedTuple):
    """A network in a format: the bytes of its file with given facts, and how to open such a file.

    `opened` takes a file's path and the bytes that must be there; it gives the facts inside, as
    `texts` has them, and what answers.
    """

    sealed: Callable[[dict[str, Any]], bytes]
    opened: Callable[[Path, bytes], tuple[dict[str, str], Ask]]


class Format(NamedTuple):
    """A line of `FORMATS`: the file's suffix, packages that are needed, and the translation."""

    suffix: str
    packages: tuple[str, ...]
    make: Callable[[Any], Body]


class Exportable(nn.Module):
    """A network with what comes before it: pixels as the decoder gives them, any number.

    uint8 `[N, C, S, S]` to logits and probabilities, float32 `[N, K]`.
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


def captured(loaded: Loaded) -> Any:
    """The network as a program of `torch.export`, in eval mode, for any number of images.

    Raises:
        ModelFileError: torch can't capture this network.
    """
    pre = loaded.preprocessing
    model = Exportable(loaded.model.cpu(), pre.mean, pre.std)
    images = torch.zeros(2, pre.channels, pre.image_size, pre.image_size, dtype=torch.uint8)
    shapes = {"images": {0: torch.export.Dim("N", min=1)}}
    with _quiet(), torch.no_grad(), _telling("torch.export"):
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which are nobody's business
    return program


def described(loaded: Loaded, at_once: int) -> dict[str, Any]:
    """The facts that every exported file holds; where only texts can be kept, as `texts`."""
    pre = loaded.preprocessing
    shown = f"[N, {pre.channels}, {pre.image_size}, {pre.image_size}]"
    return {
        "convlens": __version__,
        "run": str(loaded.card.get("run", "")),
        "source_sha256": loaded.card["sha256"],
        "classes": list(loaded.classes),
        "input": f"{INPUT}: uint8 {shown}, 0 to 255, any N. {told(pre)} "
        "Nothing else: scaling and normalisation are inside.",
        "outputs": f"{OUTPUTS[0]} and {OUTPUTS[1]} (their softmax): float32 "
        f"[N, {len(loaded.classes)}], in the order of `classes`",
        "preprocessing": asdict(pre),
        "at_once": at_once,
        "card": _rest(loaded.card),
    }


def texts(facts: dict[str, Any]) -> dict[str, str]:
    """Facts as texts: all that is none yet is JSON."""
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in facts.items()}


def told(pre: Preprocessing) -> str:
    """In words, what `convlens.data.decode` makes of an image file before the network sees it."""
    return (
        f"Each image: decoded, turned upright by its EXIF, {COLOURS[pre.channels]}, transparent "
        f"parts white, {FITTING[pre.fit].format(size=pre.image_size)}."
    )


def _rest(card: dict[str, Any]) -> dict[str, Any]:
    """What evaluating needs beside the facts that are told by name."""
    return {key: card[key] for key in ("model", "data", "recipe") if key in card}


def _onnx(program: Any) -> Body:
    with _quiet(), torch.no_grad(), _telling("torch.onnx"):
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
                size.dim_param = "N"  # torch calls it s34 or whatever
    for message in onnxfile.messages(proto):
        # Stack traces, with paths of this machine, and repetitions of what the graph says.
        for field in ("metadata_props", "doc_string"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
    proto.producer_name, proto.producer_version = "convlens", __version__
    used = {node.domain for node in proto.graph.node}
    for entry in [each for each in proto.opset_import if each.domain not in (*used, "")]:
        proto.opset_import.remove(entry)

    def opened(path: Path, written: bytes) -> tuple[dict[str, str], Ask]:
        data, facts = onnxfile.read(path)
        _same(data, written, path)
        net = onnxfile.OnnxNet(data, str(path), 1)
        shape, classes = json.loads(facts["preprocessing"]), json.loads(facts["classes"])
        image = (shape["channels"], shape["image_size"], shape["image_size"])
        if not net.fits(image, len(classes)):
            raise ModelFileError(
                f"as ONNX it takes images {net.takes[0]}, not any number of {list(image)}",
                where=str(path),
                fix="export to torch, or use another network",
            )
        return facts, net.answers

    return Body(lambda facts: onnxfile.sealed(proto, texts(facts)), opened)


def _torch(program: Any) -> Body:
    def sealed(facts: dict[str, Any]) -> bytes:
        file = io.BytesIO()
        with _quiet(), _telling("torch.export"):
            torch.export.save(program, file, extra_files={FACTS: json.dumps(facts)})
        return file.getvalue()

    def opened(path: Path, written: bytes) -> tuple[dict[str, str], Ask]:
        data = path.read_bytes()
        _same(data, written, path)  # torch unpickles the example inside: nobody else's file
        extra = {FACTS: ""}
        with _quiet(), _telling("torch.export"):
            module = torch.export.load(io.BytesIO(data), extra_files=extra).module()

        def ask(images: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), _telling("the program"):
                found = module(images)
            return found[OUTPUTS[0]], found[OUTPUTS[1]]

        return texts(json.loads(extra[FACTS])), ask

    return Body(sealed, opened)


def _same(data: bytes, written: bytes, path: Path) -> None:
    if data != written:
        raise ModelFileError(
            "the disk gives back other bytes than were written", where=str(path), fix="try again"
        )


# To add a format: a function here and a line. `tests/test_exporting.py` then exports every family.
FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _onnx),
    "torch": Format(".pt2", (), _torch),
}


@contextlib.contextmanager
def _telling(tool: str) -> Iterator[None]:
    """Whatever torch raises about a network that it can't translate, in words."""
    try:
        yield
    except Exception as error:
        if memory.is_oom(error):  # of which another network or format is no way out
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines or [type(error).__name__])[0][:160]
        raise ModelFileError(
            f"{tool} of torch {torch.__version__} can't take this network: {reason}",
            fix="choose the other format (--to), or another network",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxscript tell their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""The job of `convlens export`: a file is written only if its outputs agree with convlens's."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.testing import assert_allclose
from rich.markup import escape
from torch import Tensor, nn

from convlens import metrics, run
from convlens.data.dataset import Split, load_external_data
from convlens.data.decode import fit_arrays
from convlens.data.loader import scale_and_shift
from convlens.data.sources import DrawnShapes, find_source
from convlens.device import memory_budget, preserve_torch_settings
from convlens.engine import oom
from convlens.engine.inference import Forward, place_model
from convlens.errors import DataError, ModelFileError, UsageError, lookup
from convlens.evaluation import load_own_data
from convlens.onnx_model import INPUT, OUTPUTS, OnnxNetwork, onnx_model, require, serialize, walk
from convlens.run import LoadedModel, Preprocessing, RunDir
from convlens.utils import files
from convlens.utils.console import print_status, quiet_mode
from convlens.version import __version__

# ---- agreement ----------------------------------------
# Numerical check of an exported model against convlens's own outputs, on real images.
#
# Two programs that compute the same network differ in the last digits, because they add in another
# order. A wrong export (other pixels, another class order, batch norm in training mode) differs in
# the first digit.

MAX_IMAGES = 500
SINGLE_IMAGES = 8  # these are run in batches of one, too
BATCH_SIZE = 64
# Absolute tolerance of the logits, relative to the largest logit (or to 1 if that is larger): the
# rounding errors of a logit near zero are as large as those of the others. The planted mistakes of
# the tests make differences of half the largest logit and more.
LOGIT_TOLERANCE = 1e-4
SOFTMAX_TOLERANCE = 1e-5  # of the probabilities, against the softmax of the same file's logits

# From uint8 images `[B, C, S, S]` to logits and probabilities, float32 `[B, K]`.
RunModel = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class NumericalCheck:
    """Differences between the outputs of an exported file and of convlens, both float32 on a CPU.

    `tolerance` is absolute; with a larger difference of any logit no file is written.
    """

    source: str
    images: int
    batch_sizes: list[int]
    top1_agreement: float
    max_logit_difference: float
    max_probability_difference: float
    largest_logit: float
    tolerance: float

    def sentence(self) -> str:
        """The result in one line."""
        sizes = " and ".join(map(str, self.batch_sizes))
        same = "all" if self.top1_agreement == 1 else f"{self.top1_agreement:.2%}"
        return (
            f"on {self.images:,} {self.source}, in batches of {sizes}, the same class for {same}; "
            f"logits differ by at most {self.max_logit_difference:.2g} (the largest is "
            f"{self.largest_logit:.3g})"
        )


class ReferenceOutputs:
    """Outputs of convlens for some images, against which exported files are checked.

    Args:
        loaded: the model that is exported.
        images: uint8 `[N, C, S, S]`.
        source: what these images are, for the report.
    """

    def __init__(self, loaded: LoadedModel, images: Tensor, source: str) -> None:
        self.images, self.source = images, source
        plan = place_model(loaded.model, "cpu")
        forward = Forward(loaded.model, loaded.preprocessing.normalize, plan, total=len(images))
        found = [outputs.logits for outputs in forward.outputs(images)]
        self.logits = torch.cat(found).numpy().astype(np.float64)
        self.probs = metrics.softmax(self.logits)
        self.largest = float(np.abs(self.logits).max())
        self.tolerance = LOGIT_TOLERANCE * max(1.0, self.largest)
        self.at_once = forward.batch_size or 1  # images that fit into memory at once
        self.batch_size = max(2, min(BATCH_SIZE, self.at_once))

    def conditions(self) -> dict[str, Any]:
        """The conditions of the check, which are known before it; they go into the file."""
        return {
            "source": self.source,
            "images": len(self.images),
            "batch_sizes": [1, self.batch_size],
            "tolerance": self.tolerance,
        }

    def check(self, run_model: RunModel, where: str) -> NumericalCheck:
        """Run an exported model on all images and compare its outputs.

        Raises:
            ModelFileError: they differ by more than the tolerance; says by how much.
        """
        batches = [*self.images[:SINGLE_IMAGES].split(1), *self.images.split(self.batch_size)]
        logits, probs = (
            torch.cat(parts).numpy().astype(np.float64)
            for parts in zip(*map(run_model, batches), strict=True)
        )
        expected, expected_probs = (
            np.concatenate([values[:SINGLE_IMAGES], values]) for values in (self.logits, self.probs)
        )
        try:
            _assert_close("logits", logits, expected, self.tolerance)
            _assert_close("probabilities", probs, metrics.softmax(logits), SOFTMAX_TOLERANCE)
        except AssertionError as error:
            # Without the list of indices, which numpy indents below a line "First 5 ...".
            lines = [x for x in str(error).splitlines() if x and not x.startswith((" ", "First"))]
            raise ModelFileError(
                "the exported model does not reproduce the outputs of convlens, so no file was "
                f"written: {', '.join(lines)}"[:400],
                where=where,
                fix="export to another format, and report this: it must not happen",
            ) from error
        return NumericalCheck(
            **self.conditions(),
            top1_agreement=float((logits.argmax(1) == expected.argmax(1)).mean()),
            max_logit_difference=float(np.abs(logits - expected).max()),
            max_probability_difference=float(np.abs(probs - expected_probs).max()),
            largest_logit=self.largest,
        )


def _assert_close(name: str, actual: np.ndarray, expected: np.ndarray, atol: float) -> None:
    # NaN must not pass for equal, and no shape may be broadcast.
    assert_allclose(
        actual,
        expected,
        rtol=0,
        atol=atol,
        equal_nan=False,
        strict=True,
        err_msg=name,
        verbose=False,
    )


def sample_images(run_dir: RunDir, loaded: LoadedModel, data: str | None) -> tuple[Tensor, str]:
    """Up to 500 evenly spaced validation images of the run, or images of the data set `data`.

    Falls back to training images for a run without a validation split, and to synthetic images
    for a model file on its own and for a run whose images are gone; the fallback is reported.
    The test split stays sealed.

    Returns:
        The images, uint8 `[N, C, S, S]`, and where they come from.

    Raises:
        DataError, UsageError: `data` can't be used.
    """
    if data is not None:
        split, name = _load_other(loaded, data)
        return _evenly_spaced(split), f"images of {name!r}"
    try:
        if not run_dir.metadata():
            raise DataError("a model file on its own has no images")
        own = load_own_data(loaded, "cpu")
    except (DataError, UsageError) as error:
        print_status(
            f"compared on drawn images, not on real ones: {error.what} (--data takes others)"
        )
        pre = loaded.preprocessing
        drawn = DrawnShapes(MAX_IMAGES, pre.image_size)[np.arange(MAX_IMAGES)]
        fitted = fit_arrays(drawn, size=pre.image_size, channels=pre.channels, fit=pre.fit)
        return torch.from_numpy(fitted), "drawn images"
    if len(own.val):
        return _evenly_spaced(own.val), f"validation images of {own.name!r}"
    return _evenly_spaced(
        own.train
    ), f"training images of {own.name!r} (it has no validation split)"


def _load_other(loaded: LoadedModel, data: str) -> tuple[Split, str]:
    """The validation split of a data set, or its training split, or all of it, and its name."""
    pre = loaded.preprocessing
    parts = find_source(data, image_size=pre.image_size, tested=True).parts
    split, _, name, _ = load_external_data(
        data,
        next(name for name in ("val", "train", *parts) if name in parts),
        image_size=pre.image_size,
        channels=pre.channels,
        fit=pre.fit,
        memory_budget=memory_budget("cpu"),
        tested=True,
    )
    return split, name


def _evenly_spaced(split: Split) -> Tensor:
    count = min(len(split), MAX_IMAGES)
    return split.rows.gather(torch.linspace(0, len(split) - 1, count).round().long())


@dataclass(frozen=True)
class Export:
    """An exported file and the numerical check (`proof`) that it passed."""

    format: str
    path: str
    sha256: str
    bytes: int
    run: str
    source_sha256: str
    classes: list[str]
    input: str
    outputs: str
    preprocessing: dict[str, Any]
    proof: NumericalCheck
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@preserve_torch_settings()
def export(
    run_dir: RunDir,
    to: Sequence[str] = ("onnx",),
    *,
    output: str | Path | None = None,
    data: str | Path | None = None,
    quiet: bool = False,
) -> list[Export]:
    """Write a run's model as files for other programs, one for each format.

    Args:
        to: names of `FORMATS`.
        output: the file's path, with the format's suffix; by default beside the model file.
        data: a data set to check outputs on; by default the run's validation images.

    Raises:
        UsageError: unknown format, missing package, or another suffix.
        ModelFileError: torch can't translate the network, or the translation does not reproduce
            convlens's outputs; then no file is written.
    """
    names = list(dict.fromkeys(to))
    if not names:
        raise UsageError("no format to export to", fix=f"choose from: {', '.join(FORMATS)}")
    chosen = [lookup(FORMATS, name, "format") for name in names]
    if output is not None and len(names) > 1:
        raise UsageError("one file for several formats", fix="leave out --output, or one --to each")
    targets = [Path(output or run_dir.model_path.with_suffix(form.suffix)) for form in chosen]
    for name, form, target in zip(names, chosen, targets, strict=True):
        if target.suffix.lower() != form.suffix:
            raise UsageError(
                f"{name} files end in {form.suffix}", where=str(output), fix="rename it"
            )
        for package in form.packages:
            require(package)  # now, not after minutes of work
    with quiet_mode(quiet):
        loaded = run.load_model(run_dir.model_path)
        images, source = sample_images(run_dir, loaded, None if data is None else str(data))
        reference = ReferenceOutputs(loaded, images, source)
        program = capture(loaded)
        return [
            write_checked(name, program, target, loaded, reference)
            for name, target in zip(names, targets, strict=True)
        ]


def write_checked(
    name: str, program: Any, target: Path, loaded: LoadedModel, reference: ReferenceOutputs
) -> Export:
    """Serialize a captured program, check the result, and only then write it to `target`."""
    form = FORMATS[name]
    facts = describe(loaded, reference)
    content = form.serialize(program, facts)
    # These very bytes are loaded and run, as a user of the file would, and then written.
    proof = reference.check(form.load(content, str(target)), str(target))
    files.remove_stale_temp_files(target.parent, [target.name], alone=False)
    files.write_atomic(target, content)
    print_status(f"{name}: {escape(proof.sentence())}")
    shared = ("run", "source_sha256", "classes", "input", "outputs", "preprocessing")
    return Export(
        format=name,
        path=str(target),
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        **{key: facts[key] for key in shared},
        proof=proof,
        versions={
            "convlens": facts["convlens"],
            "torch": torch.__version__,
            **{package: str(require(package).__version__) for package in form.packages},
        },
    )


# ---- formats ----------------------------------------
# Formats that a network can be exported to, all translated from one captured program.
#
# `torch.export` captures the network once, with the preprocessing that follows decoding in it and a
# dynamic batch size; ONNX is translated from that very program.

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


def capture(loaded: LoadedModel) -> Any:
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


def describe(loaded: LoadedModel, reference: ReferenceOutputs) -> dict[str, Any]:
    """The metadata of an exported file, in any format."""
    pre = loaded.preprocessing
    shape = f"[N, {pre.channels}, {pre.image_size}, {pre.image_size}]"
    return {
        "convlens": __version__,
        "run": str(loaded.model_metadata.get("run", "")),
        "source_sha256": loaded.model_metadata["sha256"],
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
            key: loaded.model_metadata[key]
            for key in ("model", "data", "recipe")
            if key in loaded.model_metadata
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
    for message in walk(proto):
        # Stack traces, with paths of this machine, and repetitions of the graph in words.
        for field in ("metadata_props", "doc_string"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
    proto.producer_name, proto.producer_version = "convlens", __version__
    used = {node.domain for node in proto.graph.node}
    for entry in [each for each in proto.opset_import if each.domain not in (*used, "")]:
        proto.opset_import.remove(entry)
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in facts.items()}
    return serialize(proto, texts)


def _load_onnx(content: bytes, where: str) -> RunModel:
    model = onnx_model(content, Path(where)).model
    assert isinstance(model, OnnxNetwork)
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


# To add a format: two functions here and an entry. `tests/unit/test_model_export.py` exports every family.
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
        if oom.is_oom(error):  # neither the network nor the format is at fault
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines or [type(error).__name__])[0][:160]
        raise ModelFileError(
            f"{tool} of torch {torch.__version__} can't take this network: {reason}",
            fix="choose the other format (--to), or another network",
        ) from error
    finally:
        logging.disable(before)

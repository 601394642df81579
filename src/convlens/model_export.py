"""Export of models to ONNX and `torch.export` files, with a numerical check on real images.

`torch.export` captures the network once, with the normalization inside and a dynamic batch size;
ONNX is translated from the same program. A file is written only if its outputs agree with those of
convlens. Two programs that compute the same network differ in the last digits, because they add in
another order; a wrong export (other pixels, another class order, batch norm in training mode)
differs in the first digit.

Beside an ONNX file, `export` writes `predict_onnx.py`, a program that classifies image files with
it. It is run on image files of several kinds and has to give the probabilities of convlens.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import Tensor, nn

from convlens import metrics
from convlens.data.dataset import Split, find_external_source, load_external_data
from convlens.data.decode import ALPHA
from convlens.data.loader import scale_and_shift
from convlens.data.sources import DrawnShapes
from convlens.device import memory_budget, preserve_torch_settings
from convlens.engine import oom
from convlens.engine.inference import Forward, place_model
from convlens.errors import (
    DataError,
    ModelFileError,
    UsageError,
    check_path,
    lookup,
    wrong_type,
)
from convlens.evaluation import check_data, load_own_data
from convlens.onnx_model import (
    INPUT,
    ONNX_SUFFIX,
    OUTPUTS,
    OnnxNetwork,
    list_messages,
    onnx_model,
    require,
    serialize,
)
from convlens.prediction import iter_predictions
from convlens.recipe import DataConfig
from convlens.run import LoadedModel, Preprocessing, RunDir, RunLike, as_run_dir, load_model
from convlens.user_code import accepts_trust
from convlens.utils import files
from convlens.utils.console import print_status, quiet_mode
from convlens.version import __version__

MAX_IMAGES = 500
SINGLE_IMAGES = 8  # images that are also run in batches of one
BATCH_SIZE = 64
# Absolute tolerance of the logits, relative to the largest logit (or to 1 if that is larger): the
# rounding errors of a logit near zero are as large as those of the others. The planted mistakes of
# the tests make differences of half the largest logit and more.
LOGIT_TOLERANCE = 1e-4
SOFTMAX_TOLERANCE = 1e-5  # of the probabilities, against the softmax of the same file's logits

SCRIPT = "predict_onnx.py"  # a module of convlens that needs no other one
METADATA_FILE = "convlens.json"  # among the extra files of a torch.export archive
OPSET = 18  # torch translates to it without a conversion; runtimes read it since 2023
FIT_DESCRIPTIONS = {
    "crop": "its short side resized to {size} px (antialiased, bilinear), the center cut out",
    "pad": "its long side resized to {size} px (antialiased, bilinear), black borders around it",
    "stretch": "resized to {size} x {size} px (antialiased, bilinear)",
}
COLOR_DESCRIPTIONS = {1: "gray (ITU-R 601)", 3: "RGB"}

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
        """Return the result in one line."""
        sizes = " and ".join(map(str, self.batch_sizes))
        same = "all" if self.top1_agreement == 1 else f"{self.top1_agreement:.2%}"
        return (
            f"on {self.images:,} {self.source}, in batches of {sizes}, the same class for {same}; "
            f"logits differ by at most {self.max_logit_difference:.2g} (the largest is "
            f"{self.largest_logit:.3g})"
        )


@dataclass(frozen=True)
class ScriptCheck:
    """Differences between the answers of `predict_onnx.py` and of convlens for image files.

    `tolerance` is absolute; with a larger difference of any probability no file is written.
    """

    path: str
    images: int
    max_probability_difference: float
    tolerance: float

    def sentence(self) -> str:
        """Return the result in one line."""
        return (
            f"on {self.images} image files (color, grey, 16 bits, float, transparent, rotated), "
            f"probabilities differ by at most {self.max_probability_difference:.2g}"
        )


@dataclass(frozen=True)
class Export:
    """An exported file and the numerical check (`proof`) that it passed.

    `script` is the program beside an ONNX file; None for other formats.
    """

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
    script: ScriptCheck | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@accepts_trust
@preserve_torch_settings()
def export(
    run: RunLike,
    to: str | Sequence[str] = "onnx",
    *,
    output: str | Path | None = None,
    data: str | Path | DataConfig | None = None,
    quiet: bool = True,
    trust_code: bool = False,
) -> list[Export]:
    """Write a run's model as files for other programs, one for each format.

    Each file is run on real images and written only if it reproduces the outputs of convlens;
    `Export.proof` holds the largest differences. Beside an ONNX file, `predict_onnx.py` classifies
    image files with it; it needs Pillow, numpy and onnxruntime only.

    Args:
        run: a run by name, folder or model file, or a `Run`.
        to: one or several formats: `onnx`, `torch`.
        output: path of the file, with the suffix of the format; by default beside the model file.
        data: a data set for the check, or a data section of a recipe with the keys to read it; by
            default the run's validation images.
        quiet: show no messages.
        trust_code: import user code that the model needs; otherwise that is an error.

    Raises:
        UsageError: unknown run or format, missing package, or another suffix.
        ModelFileError: torch cannot translate the network, or the translation does not reproduce
            the outputs of convlens. No file is written.

    Example:
        >>> convlens.export("digits", "onnx")[0].path
    """
    run_dir = as_run_dir(run)
    check_data(data)
    if not isinstance(to, str | Iterable) or isinstance(to, bytes):
        raise wrong_type("to", to, f"choose from: {', '.join(FORMATS)}")
    requested = [to] if isinstance(to, str) else list(to)
    if not requested:
        raise UsageError("no format to export to", fix=f"choose from: {', '.join(FORMATS)}")
    for name in requested:
        lookup(FORMATS, name, "format")
    names = list(dict.fromkeys(requested))
    formats = [FORMATS[name] for name in names]
    if output is not None and len(names) > 1:
        raise UsageError("one file for several formats", fix="leave out --output, or one --to each")
    output = None if output is None else check_path("output", output)
    targets = [output or run_dir.model_path.with_suffix(form.suffix) for form in formats]
    for name, form, target in zip(names, formats, targets, strict=True):
        if target.suffix.lower() != form.suffix:
            raise UsageError(
                f"{name} files end in {form.suffix}", where=str(output), fix="rename it"
            )
        for package in form.packages:
            require(package)  # now, not after minutes of work
        if form.suffix == ONNX_SUFFIX:
            _check_script_is_ours(target.with_name(SCRIPT))
    with quiet_mode(quiet):
        loaded = load_model(run_dir.model_path)
        images, source = sample_images(run_dir, loaded, data)
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
    metadata = describe(loaded, reference)
    content = form.serialize(program, metadata)
    # These very bytes are loaded and run, as a user of the file would, and then written.
    check = reference.check(form.load(content, str(target)), str(target))
    script = None
    if form.suffix == ONNX_SUFFIX:
        script = check_script(content, target.with_name(SCRIPT), loaded, reference)
    files.remove_stale_temp_files(target.parent, [target.name], alone=False)
    files.write_atomic(target, content)
    if script is not None:
        files.write_atomic(Path(script.path), read_script())
    print_status(f"{name}: written and checked")
    shared = ("run", "source_sha256", "classes", "input", "outputs", "preprocessing")
    return Export(
        format=name,
        path=str(target),
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        **{key: metadata[key] for key in shared},
        proof=check,
        versions={
            "convlens": metadata["convlens"],
            "torch": torch.__version__,
            **{package: str(require(package).__version__) for package in form.packages},
        },
        script=script,
    )


def read_script() -> bytes:
    """Return the program that classifies image files with an exported ONNX file."""
    return Path(__file__).with_name(SCRIPT).read_bytes()


def _check_script_is_ours(path: Path) -> None:
    """Refuse to replace a file of the user by `predict_onnx.py`."""
    if path.exists() and b"`convlens export`" not in path.read_bytes()[:1000]:
        raise UsageError(
            "there is a file of this name that convlens has not written",
            where=str(path),
            fix="rename it, or choose another folder (--output)",
        )


def check_script(
    content: bytes, target: Path, loaded: LoadedModel, reference: ReferenceOutputs
) -> ScriptCheck:
    """Run `predict_onnx.py` on image files and compare its probabilities with those of convlens.

    Args:
        content: the ONNX file.
        target: where the program will be written.

    Raises:
        ModelFileError: it fails, or probabilities differ by more than the tolerance.
    """

    def refusal(what: str) -> ModelFileError:
        return ModelFileError(
            f"{SCRIPT} does not reproduce the answers of convlens, so no file was written: {what}",
            where=str(target),
            fix="please report this as a bug",
        )

    with tempfile.TemporaryDirectory(prefix="convlens-") as folder:
        (Path(folder) / SCRIPT).write_bytes(read_script())
        (Path(folder) / "model.onnx").write_bytes(content)
        paths = write_sample_files(Path(folder), loaded.preprocessing.image_size, reference.images)
        options = ["--json", "--top", str(len(loaded.classes))]
        done = subprocess.run(
            [sys.executable, str(Path(folder) / SCRIPT), *options, *paths],
            capture_output=True,
            encoding="utf-8",
        )
        expected = list(
            iter_predictions(loaded, paths, top_k=len(loaded.classes), device="cpu", quiet=True)
        )
    try:
        answers = json.loads(done.stdout)["predictions"]
    except (ValueError, KeyError, TypeError) as error:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise refusal(lines[-1][:160]) from error
    largest = 0.0
    for prediction, answer in zip(expected, answers, strict=True):
        name = Path(prediction.filename).name
        if (prediction.error is None) != ("error" not in answer):
            raise refusal(f"{name}: {prediction.error or answer['error']}")
        probs = {entry["label"]: entry["prob"] for entry in answer.get("top", ())}
        differences = [abs(probs[label] - prob) for label, prob in prediction.top]
        largest = max(largest, *differences, 0.0)
        # Probabilities differ by at most half as much as logits.
        if not largest <= reference.tolerance:
            raise refusal(f"{name}: a probability differs by {largest:.3g}")
    return ScriptCheck(str(target), len(paths), largest, reference.tolerance)


def write_sample_files(folder: Path, size: int, images: Tensor) -> list[str]:
    """Write image files of the kinds that are converted in different ways; return their paths.

    Args:
        size: of the input of the model; the files have other sizes and shapes.
        images: uint8 `[N, C, S, S]`; the first eight are written as well.
    """
    y, x = np.mgrid[0 : 2 * size + 3, 0 : 3 * size + 1]
    noise = np.random.default_rng(0).integers(0, 60, (*y.shape, 4))
    waves = np.stack([y / len(y), x / x.shape[1], (x * y % 97) / 97, (x + y) % size / size], 2)
    values = (195 * waves + noise).astype(np.uint8)
    grey = values[..., 0]
    deep = grey.astype(np.uint16) * 256 + values[..., 1]
    samples: dict[str, Image.Image] = {
        "color.png": Image.fromarray(values[..., :3]),
        "tall.bmp": Image.fromarray(np.ascontiguousarray(values[..., :3].transpose(1, 0, 2))),
        "grey.png": Image.fromarray(grey),
        "palette.gif": Image.fromarray(values[..., :3]).quantize(64),
        "transparent.png": Image.fromarray(values),
        "16-bit.png": Image.fromarray(deep),
        "float.tiff": Image.fromarray(deep.astype(np.float32) / 65535),
        # Large enough to be decoded at a reduced scale.
        "rotated.jpg": Image.fromarray(np.repeat(np.repeat(values[..., :3], 3, 0), 3, 1)),
    }
    for number, image in enumerate(images[:SINGLE_IMAGES].permute(0, 2, 3, 1).numpy()):
        pixels = image[..., 0] if image.shape[2] == 1 else image
        samples[f"{number}.png"] = Image.fromarray(np.ascontiguousarray(pixels))
    paths = []
    for name, sample in samples.items():
        exif = Image.Exif()
        if name.startswith("rotated"):
            exif[0x0112] = 6  # orientation: turn by 90 degrees
        sample.save(folder / name, exif=exif) if len(exif) else sample.save(folder / name)
        paths.append(str(folder / name))
    return paths


class ReferenceOutputs:
    """Outputs of convlens for some images, against which exported files are checked.

    Args:
        loaded: the model that is exported.
        images: uint8 `[N, C, S, S]`.
        source: description of these images, for the report.
    """

    def __init__(self, loaded: LoadedModel, images: Tensor, source: str) -> None:
        self.images, self.source = images, source
        plan = place_model(loaded.model, "cpu")
        forward = Forward(loaded.model, loaded.preprocessing.normalize, plan, total=len(images))
        outputs = [each.logits for each in forward.outputs(images)]
        # As in the exported graph.
        temperature = loaded.calibration.temperature
        self.logits = torch.cat(outputs).numpy().astype(np.float64) / temperature
        self.probs = metrics.softmax(self.logits)
        self.largest = float(np.abs(self.logits).max())
        self.tolerance = LOGIT_TOLERANCE * max(1.0, self.largest)
        self.max_batch_size = forward.batch_size or 1  # images that fit into memory
        self.batch_size = max(2, min(BATCH_SIZE, self.max_batch_size))

    def conditions(self) -> dict[str, Any]:
        """Return the conditions of the check, which are stored in the file."""
        return {
            "source": self.source,
            "images": len(self.images),
            "batch_sizes": [1, self.batch_size],
            "tolerance": self.tolerance,
        }

    def check(self, run_model: RunModel, where: str) -> NumericalCheck:
        """Run an exported model on all images and compare its outputs.

        Raises:
            ModelFileError: outputs differ by more than the tolerance.
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
                fix="export to another format, and please report this as a bug",
            ) from error
        return NumericalCheck(
            **self.conditions(),
            top1_agreement=float((logits.argmax(1) == expected.argmax(1)).mean()),
            max_logit_difference=float(np.abs(logits - expected).max()),
            max_probability_difference=float(np.abs(probs - expected_probs).max()),
            largest_logit=self.largest,
        )


def _assert_close(name: str, actual: np.ndarray, expected: np.ndarray, atol: float) -> None:
    # NaN must not count as equal, and shapes must not be broadcast.
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


def sample_images(
    run_dir: RunDir, loaded: LoadedModel, data: str | Path | DataConfig | None
) -> tuple[Tensor, str]:
    """Return up to 500 evenly spaced validation images of the run, or images of `data`.

    Falls back to training images for a run without a validation split, and to synthetic images
    for a bare model file and for a run whose images are gone; a message reports the fallback.
    The test split stays sealed.

    Returns:
        The images, uint8 `[N, C, S, S]`, and a description of their source.

    Raises:
        DataError, UsageError: `data` cannot be used.
    """
    if data is not None:
        split, name = _load_external_split(loaded, data)
        return _evenly_spaced(split), f"images of {name!r}"
    try:
        if not run_dir.metadata():
            raise DataError("a bare model file has no images")
        own_data = load_own_data(loaded, "cpu")
    except (DataError, UsageError) as error:
        print_status(
            f"checked on synthetic images: {error.what} (--data NAME checks on other images)"
        )
        pre = loaded.preprocessing
        shapes = DrawnShapes(MAX_IMAGES, pre.image_size)[np.arange(MAX_IMAGES)]
        return torch.from_numpy(pre.conversion.array(shapes)), "synthetic images"
    if len(own_data.val):
        return _evenly_spaced(own_data.val), f"validation images of {own_data.name!r}"
    source = f"training images of {own_data.name!r} (it has no validation split)"
    return _evenly_spaced(own_data.train), source


def _load_external_split(loaded: LoadedModel, data: str | Path | DataConfig) -> tuple[Split, str]:
    """Load the validation split of a data set, or else its training split, or else all images.

    The labels are not used, so its classes need not be those of the model.

    Returns:
        The split and the name of the data set.
    """
    conversion, classes = loaded.preprocessing.conversion, loaded.classes
    source = find_external_source(data, conversion=conversion, known_classes=classes, tested=True)
    split = next(name for name in ("val", "train", *source.parts) if name in source.parts)
    external = load_external_data(
        data,
        None if list(source.parts) == ["train"] else split,  # a set without splits
        conversion=conversion,
        memory_budget=memory_budget("cpu"),
        tested=True,
        known_classes=classes,
    )
    return external.images, external.name


def _evenly_spaced(split: Split) -> Tensor:
    count = min(len(split), MAX_IMAGES)
    return split.rows.gather(torch.linspace(0, len(split) - 1, count).round().long())


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
    """A network with its normalization, for uint8 pixels as the decoder returns them.

    Maps uint8 `[N, C, S, S]` to calibrated logits, i.e. those of the network divided by the
    temperature, and to probabilities, their softmax; float32 `[N, K]`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, mean: list[float], std: list[float], temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.model = copy.deepcopy(model).requires_grad_(False)
        scale, shift = scale_and_shift(mean, std, 255.0, "cpu")
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.model(images.float() * self.scale + self.shift)
        if self.temperature != 1:
            logits = logits / self.temperature
        return dict(zip(OUTPUTS, (logits, logits.softmax(1)), strict=True))


def capture(loaded: LoadedModel) -> Any:
    """Capture the network with `torch.export`, in eval mode, with a dynamic batch size.

    Raises:
        ModelFileError: torch cannot capture this network.
    """
    pre = loaded.preprocessing
    model = Exportable(loaded.model.cpu(), pre.mean, pre.std, loaded.calibration.temperature)
    images = torch.zeros(2, pre.channels, pre.image_size, pre.image_size, dtype=torch.uint8)
    shapes = {"images": {0: torch.export.Dim("N", min=1)}}
    with _translating("torch.export"):
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    return program


def describe(loaded: LoadedModel, reference: ReferenceOutputs) -> dict[str, Any]:
    """Return the metadata of an exported file, in any format."""
    pre = loaded.preprocessing
    shape = f"[N, {pre.channels}, {pre.image_size}, {pre.image_size}]"
    return {
        "convlens": __version__,
        "run": str(loaded.model_metadata.get("run", "")),
        "source_sha256": loaded.model_metadata["sha256"],
        "classes": list(loaded.classes),
        "input": f"{INPUT}: uint8 {shape}, 0 to 255, any N. {_describe_decoding(pre)} "
        "Nothing else: scaling and normalization are inside.",
        "outputs": _describe_outputs(loaded),
        "preprocessing": pre.to_dict(),
        "at_once": reference.max_batch_size,
        "proof": reference.conditions(),
        # The graph divides by its temperature already.
        "calibration": loaded.calibration.to_metadata(),
        # Needed by `evaluate`.
        "card": {
            key: loaded.model_metadata[key]
            for key in ("model", "data", "recipe")
            if key in loaded.model_metadata
        },
    }


def _describe_outputs(loaded: LoadedModel) -> str:
    temperature = loaded.calibration.temperature
    calibrated = f" (divided by the temperature {temperature:.4g})" if temperature != 1 else ""
    return (
        f"{OUTPUTS[0]}{calibrated} and {OUTPUTS[1]} (their softmax): float32 "
        f"[N, {len(loaded.classes)}], in the order of `classes`"
    )


def _describe_decoding(pre: Preprocessing) -> str:
    """Describe in words how `convlens.data.decode` prepares an image file for the network."""
    color, fit = COLOR_DESCRIPTIONS[pre.channels], FIT_DESCRIPTIONS[pre.fit]
    transparent = f"transparent parts {pre.background}"
    if pre.background == ALPHA:
        transparent = "of transparent images the alpha channel"
    deep = ""
    if pre.value_range is not None:
        low, high = pre.value_range
        deep = f"values of more than 8 bits from {low:g} to {high:g} scaled to 0 to 255, "
    return (
        f"Each image: decoded, turned upright by its EXIF, {deep}{color}, {transparent}, "
        f"{fit.format(size=pre.image_size)}."
    )


def _serialize_onnx(program: Any, metadata: dict[str, Any]) -> bytes:
    with _translating("torch.onnx"):
        exported = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            verbose=False,
        )
        assert exported is not None
        proto = exported.model_proto
    proto.graph.ClearField("value_info")  # intermediate shapes, which every runtime infers again
    rows = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == rows and rows:
                size.dim_param = "N"  # torch names it s34 or the like
    for message in list_messages(proto):
        # Stack traces with paths of this machine, and the graph repeated as text.
        for field in ("metadata_props", "doc_string"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
    proto.producer_name, proto.producer_version = "convlens", __version__
    used = {node.domain for node in proto.graph.node}
    for entry in [each for each in proto.opset_import if each.domain not in (*used, "")]:
        proto.opset_import.remove(entry)
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in metadata.items()}
    return serialize(proto, texts)


def _load_onnx(content: bytes, where: str) -> RunModel:
    model = onnx_model(content, Path(where)).model
    assert isinstance(model, OnnxNetwork)
    return model.outputs


def _serialize_torch(program: Any, metadata: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with _translating("torch.export"):
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})
    return file.getvalue()


def _load_torch(content: bytes, where: str) -> RunModel:
    # torch unpickles the example inputs in it: only for bytes that this process has just written.
    with _translating("torch.export"):
        module = torch.export.load(io.BytesIO(content)).module()

    def run_model(images: Tensor) -> tuple[Tensor, Tensor]:
        with _translating("the exported program"):
            outputs = module(images)
        return outputs[OUTPUTS[0]], outputs[OUTPUTS[1]]

    return run_model


# To add a format: two functions and an entry. `tests/unit/test_model_export.py` exports every
# family of networks to every format.
FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _serialize_onnx, _load_onnx),
    "torch": Format(".pt2", (), _serialize_torch, _load_torch),
}


@contextlib.contextmanager
def _translating(tool: str) -> Iterator[None]:
    """Silence the logs of torch and onnxscript, and turn their errors into `ModelFileError`."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if oom.is_oom(error):  # not a problem of the network or the format
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines or [type(error).__name__])[0][:160]
        raise ModelFileError(
            f"{tool} of torch {torch.__version__} can't export this network: {reason}",
            fix="choose the other format (--to), or another network",
        ) from error
    finally:
        logging.disable(before)

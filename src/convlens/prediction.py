"""Classification of images with a trained model, in batches: files, arrays, PIL images, streams.

`predict` loads a model for one call. `Predictor` keeps it in memory for many calls.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from convlens import metrics
from convlens.data.arrays import ValueRange, check_range, to_uint8
from convlens.data.conversion import by_itself_note, not_finite_note
from convlens.data.decode import (
    Conversion,
    DeepFacts,
    DeepReport,
    Pixels,
    UnreadableImage,
    read_bytes,
)
from convlens.data.input_images import (
    ImageLike,
    InputBatch,
    InputImage,
    Inputs,
    collect_inputs,
    count_images,
)
from convlens.device import Plan, preserve_torch_settings, usable_cores
from convlens.engine import inference
from convlens.engine.inference import Forward, ModelOutputs, place_model
from convlens.errors import UsageError, check_count
from convlens.onnx_model import load_model_or_onnx
from convlens.run import LoadedModel, Preprocessing, RunLike, as_run_dir
from convlens.uncertainty.calibration import ModelCalibration, OutlierDetector
from convlens.uncertainty.promises import Promises, ShareLike
from convlens.user_code import trust
from convlens.utils import notebook
from convlens.utils.console import print_status, progress_bar, quiet_mode
from convlens.utils.process import submit_task, wait_for_result

# Files that a thread decodes in one task: submitting a task costs as much as decoding a small file.
IMAGES_PER_TASK = 16
MAX_FEW_CLASSES = 64  # up to which numbers are faster than arrays
MAX_BATCH_IMAGES, MAX_BATCH_BYTES = 256, 1 << 23  # two batches are read ahead


class _Computed:
    """A field whose value may be a function; it is called when the field is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return None  # the default of the field
        value = instance.__dict__[self._name]
        if callable(value):
            value = instance.__dict__[self._name] = value()
        return value

    def __set__(self, instance: object, value: object) -> None:
        instance.__dict__[self._name] = value


@dataclass(frozen=True, repr=False)
class Prediction:
    """The most probable classes of one image, or the reason why it could not be read.

    For a single image `unlike` and `unlike_score` are computed when they are first read: comparing
    it with the stored training images takes as long as a small network.

    Attributes:
        filename: path of the file; for an image in memory, its number among all images.
        top: classes with their probabilities, the most probable first; empty after an error.
        error: the reason why the file could not be read.
        tta_top: as `top`, with test-time augmentation. `label`, `prob` and `top` are without it.
        unsure: whether the confidence is too low for `min_accuracy`; then `label` and `prob` are
            None.
        prediction_set: classes of the set with the requested coverage, the most probable first;
            None if none was requested.
        unlike: whether the image is unlike the training images; None if the model cannot tell.
        unlike_score: how far its score is above the threshold; `unlike` if positive.
    """

    filename: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    tta_top: tuple[tuple[str, float], ...] = ()
    unsure: bool = False
    prediction_set: tuple[str, ...] | None = None
    unlike: bool | None = cast(None, _Computed())
    unlike_score: float | None = cast(None, _Computed())

    def __getstate__(self) -> dict[str, Any]:
        """Return the values of all fields; the functions that compute them can't be pickled."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def label(self) -> str | None:
        return self.top[0][0] if self.top and not self.unsure else None

    @property
    def prob(self) -> float | None:
        return self.top[0][1] if self.top and not self.unsure else None

    @property
    def tta_label(self) -> str | None:
        return self.tta_top[0][0] if self.tta_top else None

    @property
    def tta_prob(self) -> float | None:
        return self.tta_top[0][1] if self.tta_top else None

    def __repr__(self) -> str:
        result = "unreadable: " + self.error if self.error else f"{self.label!r}, {self.prob:.3f}"
        return f"Prediction({self.filename!r}, {result})"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        if self.error is not None:
            return notebook.paragraph(f"{self.filename}: unreadable: {self.error}")
        rows = [(label, f"{prob:.1%}") for label, prob in self.top]
        return notebook.table((self.filename, "probability"), rows)


@dataclass(frozen=True)
class PredictionColumns:
    """What is shown of each image: `top` classes, and what was requested beside them."""

    top: int
    tta: bool = False
    unsure: bool = False
    sets: bool = False
    unlike: bool = False

    def to_dict(self, prediction: Prediction) -> dict[str, Any]:
        """Return a prediction as in the JSON of `convlens predict --json` and `convlens serve`."""
        entry: dict[str, Any] = {"filename": prediction.filename}
        if prediction.error is not None:
            return entry | {"error": prediction.error}
        entry |= {"label": prediction.label, "prob": prediction.prob}
        entry["top"] = [{"label": label, "prob": prob} for label, prob in prediction.top]
        if self.tta:
            entry |= {"tta_label": prediction.tta_label, "tta_prob": prediction.tta_prob}
            entry["tta_top"] = [
                {"label": label, "prob": prob} for label, prob in prediction.tta_top
            ]
        if self.unsure:
            entry["unsure"] = prediction.unsure
        if self.unlike:
            entry |= {"unlike": prediction.unlike, "unlike_score": prediction.unlike_score}
        if self.sets:
            entry["prediction_set"] = list(prediction.prediction_set or ())
        return entry


def predict(
    run: RunLike,
    inputs: ImageLike | Iterable[ImageLike],
    *,
    top_k: int = 1,
    tta: str | None = None,
    min_accuracy: ShareLike | None = None,
    confidence: ShareLike = 0.95,
    prediction_set: ShareLike | None = None,
    channels: str | None = None,
    range: ValueRange | None = None,
    max_pixels: int | None = None,
    device: str | None = None,
    quiet: bool = True,
    trust_code: bool = False,
) -> list[Prediction]:
    """Classify images; return one `Prediction` for each, in the order given.

    The model is loaded for this call. To classify images one by one, use `Run.open`.

    Args:
        run: a run by name, folder or model file (also an exported ONNX file), or a `Run`.
        inputs: one of these, or an iterable of them, which is read completely first:

            - a path, a folder (all images inside) or a glob pattern;
            - the content of an image file as `bytes`, or an open binary file, which is read from
              its start;
            - a PIL image;
            - an array or tensor: one image `[H, W]`, `[H, W, C]` or `[C, H, W]`, or a batch
              `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, with 1, 3 (RGB) or 4 channels (RGBA).
              In a list, three axes are one image.

            All of them go through the decoding and the preprocessing of the training.
        top_k: number of classes to return for each image.
        tta: test-time augmentation, `flip` or `flip+shifts`. Its predictions are returned in
            addition to those without it. Only for classes that a mirror image does not change.
        min_accuracy: answer only images of such confidence that this share of the answers, 0.95 or
            `"95%"`, is correct; the others are `unsure`. For images like those of the validation
            split.
        confidence: the probability that this promise holds.
        prediction_set: also return sets of classes that contain the true one for this share of
            images like those of the validation split.
        channels: which axis of an array's images holds the channels: `first`, `last`, or `none`
            for grey images. Needed if a shape can be read in two ways, e.g. `(3, 64, 64)`: one
            color image, or three grey ones.
        range: the values of arrays, and of files with more than 8 bits per value, that become
            black and white, e.g. `(0, 4095)`. Not needed for uint8, booleans, floats in 0..1, or
            if the model was trained on such values.
        max_pixels: larger files are refused; by default the limit of the training.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress.
        trust_code: import user code that the model needs; otherwise that is an error.

    Raises:
        UsageError: unknown run or views, something that is not an image, an image without pixels,
            an array that can be read in two ways, or too few validation images for a promise.
        DataError: a pattern or folder without images.

    A file or stream that cannot be decoded gives a `Prediction` with `error` set.

    Warns:
        UserWarning: files with more than 8 bits per value were given to a model of 8-bit images
            without `range`; or values are NaN.

    Example:
        >>> convlens.predict("digits", ["seven.png", "more/"])[0].label
    """
    check_count("top_k", top_k)
    sources = collect_inputs(inputs, channels=channels)
    # (Not by `accepts_trust`: the warnings below are about the line that calls this function.)
    with trust(trust_code or getattr(run, "trust_code", False)):
        loaded = load_model_or_onnx(as_run_dir(run).model_path)
    reader = ImageReader(loaded.preprocessing.conversion, value_range=range, max_pixels=max_pixels)
    predictions = list(
        iter_predictions(
            loaded,
            sources,
            top_k=top_k,
            tta=tta,
            promises=Promises.of(loaded.calibration, min_accuracy, confidence, prediction_set),
            reader=reader,
            device=device,
            quiet=quiet,
        )
    )
    reader.warn()
    return predictions


class Predictor:
    """A model that is kept in memory to classify images; `Run.open` returns it. Thread-safe.

    Args:
        loaded: the model.
        device: where it computes; by default the fastest one.

    Example:
        >>> model = convlens.Run.load("digits").open()
        >>> model.predict(image)[0].label
    """

    def __init__(self, loaded: LoadedModel, device: str | None = None) -> None:
        self._loaded = loaded
        self.transform = ImageTransform(loaded.preprocessing)
        pre = loaded.preprocessing
        blank = torch.zeros(1, pre.channels, pre.image_size, pre.image_size, dtype=torch.uint8)
        self._normalize, self._conversion = pre.normalize, pre.conversion
        with preserve_torch_settings():
            self._threads = torch.get_num_threads()
            self._plan = place_model(loaded.model, loaded.select_device(device))
        self._with_features = _uses_features(loaded)
        if self._with_features:
            inference.prepare_head_inputs(loaded.model)
        self._layers = list(loaded.model.modules())
        # Measured once: `Forward` would attach hooks, which other threads would see.
        with preserve_torch_settings(self._plan.device):
            self._batch_size = inference.measure_batch_size(
                loaded.model, blank, self._normalize, self._plan
            )

    def __repr__(self) -> str:
        return f"Predictor({len(self.classes)} classes, {self.device})"

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the model's outputs."""
        return self._loaded.classes

    @property
    def device(self) -> str:
        return self._plan.device

    @property
    def module(self) -> nn.Module:
        """The network on its device; it must not be changed."""
        return self._loaded.model

    def predict(
        self,
        inputs: ImageLike | Iterable[ImageLike],
        *,
        top_k: int = 1,
        tta: str | None = None,
        min_accuracy: ShareLike | None = None,
        confidence: ShareLike = 0.95,
        prediction_set: ShareLike | None = None,
        channels: str | None = None,
        range: ValueRange | None = None,
        max_pixels: int | None = None,
        quiet: bool = True,
    ) -> list[Prediction]:
        """Classify images; arguments, result and errors are those of `convlens.predict`."""
        check_count("top_k", top_k)
        promises = Promises.of(self._loaded.calibration, min_accuracy, confidence, prediction_set)
        is_plain = tta is None and channels is None and range is None and max_pixels is None
        if quiet and is_plain:
            prediction = self._predict_file(inputs, min(top_k, len(self.classes)), promises)
            if prediction is not None:
                return [prediction]
        sources = collect_inputs(inputs, channels=channels)
        total = count_images(sources)
        reader = ImageReader(self._conversion, value_range=range, max_pixels=max_pixels)
        is_trial = total >= inference.MIN_TRIAL_IMAGES and self._loaded.can_choose_memory_format
        forward = Forward(
            # A copy, since the memory format changes and other threads may be using the model.
            copy.deepcopy(self.module) if is_trial else self.module,
            self._normalize,
            self._plan,
            views=inference.select_views(tta),
            total=total,
            batch_size=None if is_trial else self._batch_size,
            choose_memory_format=is_trial,
            with_features=_uses_features(self._loaded),
        )
        predictions = list(
            _iter_predictions(
                self._loaded,
                sources,
                forward,
                reader,
                promises,
                top_k=top_k,
                quiet=quiet,
                settings=self._settings,
            )
        )
        reader.warn()
        return predictions

    def _predict_file(self, inputs: object, k: int, promises: Promises) -> Prediction | None:
        """Return the prediction for one file, given its path or its bytes, without any detour.

        The result is that of all other ways to give the image. For small networks, what is needed
        for many images takes as long as the network.

        Returns:
            None for other inputs, for files that can't be read, and where there is something to
            warn of.
        """
        for module in self._layers:
            if module.training:  # somebody has changed the network
                return None
        deep: list[DeepFacts] = []
        try:
            if isinstance(inputs, bytes):
                name, content = "0", inputs
            elif isinstance(inputs, str | os.PathLike):
                name = os.fsdecode(inputs)
                content = read_bytes(name)
            else:
                return None
            pixels = self._conversion.file(content, name, deep.append)
        except UnreadableImage:
            return None
        if any(facts.by_itself or facts.not_finite for facts in deep):
            return None
        with self._settings():
            outputs = inference.opened_outputs(
                self.module,
                torch.from_numpy(pixels[None].copy()),
                self._normalize,
                self._plan,
                with_features=self._with_features,
            )
        if k > 1 or len(self.classes) > MAX_FEW_CLASSES or promises.coverage is not None:
            arrays = _to_arrays(outputs, self._loaded.calibration.temperature)
            return _answers(arrays, [name], k, self._loaded, promises)[0]
        return _only_answer(outputs, name, self._loaded, promises)

    def warm_up(self, batch_size: int) -> None:
        """Run the network on blank images, and choose its memory format by timing.

        For a program that classifies many small batches: the first prediction is as fast as later
        ones. Other threads must not use the model meanwhile.
        """
        pre = self._loaded.preprocessing
        total = batch_size * inference.MIN_TRIAL_IMAGES
        shape = (pre.channels, pre.image_size, pre.image_size)
        images = torch.zeros(1, *shape, dtype=torch.uint8).expand(total, *shape)
        forward = Forward(
            self.module,
            self._normalize,
            self._plan,
            total=total,
            choose_memory_format=self._loaded.can_choose_memory_format,
        )
        with self._settings():
            for outputs in forward.outputs(images):
                if not forward.is_choosing and len(outputs.logits) >= batch_size:
                    break
        self._plan = forward.plan

    def predict_entries(
        self,
        entries: Sequence[InputEntry],
        *,
        top_k: int = 1,
        promises: Promises | None = None,
    ) -> list[Prediction]:
        """Classify images that an `ImageReader` has read; return one `Prediction` for each."""
        forward = Forward(
            self.module,
            self._normalize,
            self._plan,
            total=len(entries),
            batch_size=self._batch_size,
            with_features=_uses_features(self._loaded),
        )
        k = min(max(top_k, 1), len(self.classes))
        promises = promises or Promises()
        return _predict_batch(entries, self._loaded, forward, promises, k, self._settings)

    def _settings(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass."""
        # Counting the cores takes a tenth of the time of a small network.
        if self.device == "cpu" and torch.get_num_threads() <= self._threads:
            return contextlib.nullcontext()
        return preserve_torch_settings(self.device)


@dataclass(frozen=True)
class ImageTransform:
    """The preprocessing of a model as a function, e.g. for data sets of torchvision.

    Example:
        >>> run.module(run.transform("seven.png")[None]).softmax(1)
    """

    preprocessing: Preprocessing

    def __call__(
        self,
        image: ImageLike,
        *,
        channels: str | None = None,
        range: ValueRange | None = None,
        max_pixels: int | None = None,
    ) -> Tensor:
        """Return an image as a normalized float32 tensor `[C, H, W]`.

        Args:
            image: one image, as `convlens.predict` takes it.
            channels, range, max_pixels: as for `convlens.predict`.

        Raises:
            UnreadableImage: the file or stream cannot be decoded.
            UsageError: not an image, or several.
        """
        sources = collect_inputs([image], channels=channels)
        if count_images(sources) != 1:
            raise UsageError(
                f"a transform takes one image, not {count_images(sources)}",
                fix="call it for each image",
            )
        (source,) = sources
        reader = ImageReader(
            self.preprocessing.conversion, value_range=range, max_pixels=max_pixels
        )
        if isinstance(source, InputBatch):
            source = InputImage("0", source.images[0])
        pixels = reader.read(source, reader.record)
        reader.warn()
        batch = torch.from_numpy(np.array(pixels))[None]  # writable: torch warns of other arrays
        tensor: Tensor = self.preprocessing.normalize(batch, Plan("cpu", "fp32", "contiguous"))[0]
        return tensor


def iter_predictions(
    loaded: LoadedModel,
    inputs: ImageLike | InputImage | InputBatch | Iterable[ImageLike | InputImage | InputBatch],
    *,
    top_k: int = 1,
    tta: str | None = None,
    promises: Promises | None = None,
    reader: ImageReader | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Iterator[Prediction]:
    """Yield the predictions of `predict` one by one, while later files are still being read.

    Args:
        loaded: the model.
        inputs: as for `predict`, or as `collect_inputs` returns them.
        top_k, tta, device, quiet: as in `predict`.
        promises: thresholds for answers and sets of this model.
        reader: reads the images; by default as the model was trained.

    Raises:
        UsageError, DataError: as by `predict`.
    """
    views = inference.select_views(tta)
    sources = collect_inputs(inputs)
    with preserve_torch_settings():
        plan = place_model(loaded.model, loaded.select_device(device))
    forward = Forward(
        loaded.model,
        loaded.preprocessing.normalize,
        plan,
        views=views,
        total=count_images(sources),
        choose_memory_format=loaded.can_choose_memory_format,
        with_features=_uses_features(loaded),
    )
    if views is not None:
        with quiet_mode(quiet):
            print_status(
                f"tta columns are the mean over the views of {tta!r}; label and prob are without it"
            )
    yield from _iter_predictions(
        loaded,
        sources,
        forward,
        reader or ImageReader(loaded.preprocessing.conversion),
        promises or Promises(),
        top_k=top_k,
        quiet=quiet,
        settings=lambda: preserve_torch_settings(plan.device),
    )


def _iter_predictions(
    loaded: LoadedModel,
    inputs: Inputs,
    forward: Forward,
    reader: ImageReader,
    promises: Promises,
    *,
    top_k: int,
    quiet: bool,
    settings: Callable[[], AbstractContextManager[None]],
) -> Iterator[Prediction]:
    """Yield the predictions for collected inputs.

    Args:
        settings: returns the context of a forward pass, with the settings of torch.
    """
    k = min(max(top_k, 1), len(loaded.classes))
    # A bar that is not shown takes longer than a small network.
    shown = contextlib.nullcontext() if quiet else progress_bar("predicting", count_images(inputs))
    with shown as bar:
        for batch in _read_inputs(inputs, reader):
            # Not around the loop: the caller's code runs between two predictions.
            predictions = _predict_batch(batch, loaded, forward, promises, k, settings)
            for entry, prediction in zip(batch, predictions, strict=True):
                reader.count(entry)
                yield prediction
            if bar is not None:
                bar.advance(len(batch))


def _predict_batch(
    batch: Sequence[InputEntry],
    loaded: LoadedModel,
    forward: Forward,
    promises: Promises,
    k: int,
    settings: Callable[[], AbstractContextManager[None]],
) -> list[Prediction]:
    """Return the prediction for each image of a batch; `k` is the number of classes in each."""
    readable = [entry.pixels for entry in batch if entry.pixels is not None]
    names = [entry.name for entry in batch if entry.pixels is not None]
    with settings():
        outputs = _run_network(readable, loaded, forward)
    answers = iter(_answers(outputs, names, k, loaded, promises))
    return [
        Prediction(entry.name, error=entry.error) if entry.pixels is None else next(answers)
        for entry in batch
    ]


def _uses_features(loaded: LoadedModel) -> bool:
    detector = loaded.calibration.detector
    return detector is not None and detector.uses_features


def _answers(
    outputs: BatchOutputs,
    names: Sequence[str],
    k: int,
    loaded: LoadedModel,
    promises: Promises,
) -> list[Prediction]:
    """Return the prediction for each row of a batch; `names` are the file names."""
    probs = outputs.probs
    tops, tta_tops = _top_classes(probs, k, loaded), _top_classes(outputs.tta_probs, k, loaded)
    sets = _set_classes(probs, loaded, promises)
    detector, scores = loaded.calibration.detector, None
    if detector is not None:
        scores = _OutlierScores(outputs.logits, outputs.features, detector, loaded.calibration)
    if scores is not None and len(names) > 1:  # at once; outputs of large batches are not kept
        scores.compute()
    answers = []
    for row, name in enumerate(names):
        top = tops[row]
        answer = Prediction(
            name,
            top,
            tta_top=tta_tops[row] if tta_tops else (),
            unsure=top[0][1] < promises.answer_from,
            prediction_set=None if sets is None else sets[row],
            unlike=None if scores is None else cast(None, partial(scores.is_unlike, row)),
            unlike_score=None if scores is None else cast(None, partial(scores.of, row)),
        )
        answers.append(answer)
    return answers


def _set_classes(
    probs: np.ndarray, loaded: LoadedModel, promises: Promises
) -> list[tuple[str, ...]] | None:
    """Return the classes in the set of each row, the most probable first; None if not requested."""
    if promises.coverage is None:
        return None
    inside, order = promises.sets(probs), np.argsort(-probs, axis=1, kind="stable")
    return [
        tuple(loaded.classes[i] for i in ranked if inside[row, i])
        for row, ranked in enumerate(order.tolist())
    ]


def _only_answer(
    outputs: ModelOutputs, name: str, loaded: LoadedModel, promises: Promises
) -> Prediction:
    """Return the prediction of `_answers` for one image: the best of a few classes."""
    calibration = loaded.calibration
    logits, features = outputs.logits, outputs.features
    (row,) = logits.tolist()
    if not math.isfinite(sum(row)):
        metrics.softmax(logits.numpy(force=True))  # raises the error
    probs = metrics.softmax_row(row, calibration.temperature)
    prob = max(probs)
    detector, unlike, score = calibration.detector, None, None
    if detector is not None:
        if not logits.is_cpu:  # its memory is not kept on a GPU
            logits, features = logits.cpu(), None if features is None else features.cpu()
        scores = _OutlierScores(logits, features, detector, calibration)
        unlike, score = partial(scores.is_unlike, 0), partial(scores.of, 0)
    return Prediction(
        name,
        ((loaded.classes[probs.index(prob)], prob),),
        unsure=prob < promises.answer_from,
        unlike=cast(None, unlike),
        unlike_score=cast(None, score),
    )


class _OutlierScores:
    """How far the scores of the images in a batch are above the threshold of the model."""

    def __init__(
        self,
        logits: npt.NDArray[np.float32] | Tensor,
        features: npt.NDArray[np.float32] | Tensor | None,
        detector: OutlierDetector,
        calibration: ModelCalibration,
    ) -> None:
        self._outputs: tuple[Any, Any] | None = logits, features
        self._detector, self._temperature = detector, calibration.temperature
        self._values: list[float] | None = None  # None: the model has no threshold

    def compute(self) -> list[float] | None:
        """Return the values of all images; the outputs are needed no longer."""
        outputs = self._outputs
        if outputs is not None and len(outputs[0]):
            logits, features = outputs
            scored = self._detector.scores(logits, self._temperature, features)
            if scored is not None:
                scores, threshold = scored
                self._values = (scores - threshold).tolist()
        self._outputs = None
        return self._values

    def of(self, row: int) -> float | None:
        values = self.compute() if self._values is None else self._values
        return None if values is None else values[row]

    def is_unlike(self, row: int) -> bool | None:
        score = self.of(row)
        return None if score is None else score > 0


def _top_classes(
    probs: npt.NDArray[np.float64], k: int, loaded: LoadedModel
) -> list[tuple[tuple[str, float], ...]]:
    """Return the `k` most probable classes of each row; of equal ones the first in the order."""
    if not len(probs):
        return []
    classes = loaded.classes
    if k == 1:  # without sorting
        best = probs.argmax(axis=1).tolist()
        return [((classes[i], row.item(i)),) for i, row in zip(best, probs, strict=True)]
    order = np.argsort(-probs, axis=1, kind="stable")[:, :k].tolist()
    return [
        tuple((classes[i], row.item(i)) for i in ranked)
        for ranked, row in zip(order, probs, strict=True)
    ]


class InputEntry(NamedTuple):
    """An image that was read, or the reason why it was not; and what is to be reported of it."""

    name: str
    pixels: Pixels | None
    error: str | None = None
    facts: DeepFacts | None = None


# What a thread reads at once.
ReadTask = list[InputImage] | InputBatch


class ImageReader:
    """Converts images to the input of a model, and counts what people should know of them.

    `read`, `fit` and `read_task` may be called by several threads, the others by one.

    Args:
        conversion: that of the model.
        value_range, max_pixels: `range` and `max_pixels` of `predict`.

    Raises:
        UsageError: a range or number that is not possible.
    """

    def __init__(
        self,
        conversion: Conversion,
        *,
        value_range: object = None,
        max_pixels: int | None = None,
    ) -> None:
        self.conversion = conversion
        self.value_range = check_range(value_range)
        if max_pixels is not None:
            limit = check_count("max_pixels", max_pixels)
            self.conversion = replace(self.conversion, max_pixels=limit)
        if self.value_range is not None:
            self.conversion = replace(self.conversion, value_range=self.value_range)
        self._total = 0
        self._by_itself: list[str] = []  # names
        self._not_finite: list[str] = []
        self._share = 0.0  # sum of the shares of values that are not finite

    def read(self, image: InputImage, report: DeepReport | None = None) -> Pixels:
        """Return an image as uint8 `[C, H, W]` of the model's size.

        Raises:
            UnreadableImage: it cannot be decoded.
            UsageError: the range of an array's values is not known.
        """
        name, source = image.name, image.source
        if isinstance(source, np.ndarray):
            pixels: Pixels = self.fit(source[None], where=f"image {name}")[0]
            facts = self._facts_of(source)
            if report is not None and facts is not None:
                report(facts)
            return pixels
        if source == b"":
            raise UnreadableImage(name, "it is empty (0 bytes)")
        if isinstance(source, Image.Image):
            return self.conversion.pil(source, name, report)
        return self.conversion.file(source, name, report)

    def fit(self, images: npt.NDArray[Any], where: str = "") -> Pixels:
        """Return images `[N, C, H, W]` of any type as uint8 of the model's size."""
        stored_range = self.conversion.value_range
        pixels = to_uint8(
            images, value_range=self.value_range, stored_range=stored_range, where=where
        )
        return self.conversion.array(pixels)

    def _facts_of(self, image: npt.NDArray[Any]) -> DeepFacts | None:
        """Return what to report of an array; without a value range it has no NaN."""
        if image.dtype.kind != "f" or self.conversion.value_range is None:
            return None
        return DeepFacts(False, 1 - float(np.isfinite(image).mean()))

    def read_task(self, task: ReadTask) -> list[InputEntry]:
        """Read some images, each of which may be unreadable."""
        if isinstance(task, InputBatch):
            images = zip(task.images, self.fit(task.images), strict=True)
            return [
                InputEntry(str(number), pixels, facts=self._facts_of(image))
                for number, (image, pixels) in enumerate(images, task.first)
            ]
        return list(map(self._read_entry, task))

    def _read_entry(self, image: InputImage) -> InputEntry:
        found: list[DeepFacts] = []
        try:
            pixels = self.read(image, found.append)
        except UnreadableImage as error:
            return InputEntry(image.name, None, error.reason)
        return InputEntry(image.name, pixels, facts=found[0] if found else None)

    def count(self, entry: InputEntry) -> None:
        """Count an image for `notes`."""
        self._total += 1
        if entry.facts is not None:
            self.record(entry.facts, entry.name)

    def record(self, facts: DeepFacts, name: str = "image") -> None:
        """Count a deep image for `notes`."""
        self._total = max(self._total, 1)
        if facts.by_itself:
            self._by_itself.append(name)
        if facts.not_finite:
            self._not_finite.append(name)
            self._share += facts.not_finite

    def notes(self, fix: str) -> list[str]:
        """Return warnings about the images that were counted.

        Args:
            fix: how to give a value range.
        """
        notes = []
        if self._by_itself:
            notes.append(by_itself_note(len(self._by_itself), self._total, self._by_itself[0], fix))
        if self._not_finite:
            count, first = len(self._not_finite), self._not_finite[0]
            notes.append(not_finite_note(count, self._total, self._share / count, first=first))
        return notes

    def warn(self) -> None:
        """Issue the notes as Python warnings about the line that calls the caller of this."""
        for note in self.notes("range=(low, high) gives the values that become black and white"):
            warnings.warn(note.removeprefix("warning: "), stacklevel=3)


def _read_inputs(inputs: Inputs, reader: ImageReader) -> Iterator[list[InputEntry]]:
    """Yield the images in batches; the next files are decoded while the caller uses a batch."""
    fitting = MAX_BATCH_BYTES // reader.conversion.image_bytes
    # A multiple of the task size.
    fitting = max(IMAGES_PER_TASK, fitting // IMAGES_PER_TASK * IMAGES_PER_TASK)
    size = min(MAX_BATCH_IMAGES, fitting)
    if len(inputs) <= IMAGES_PER_TASK and count_images(inputs) <= size:  # not worth any threads
        tasks = (each if isinstance(each, InputBatch) else [each] for each in inputs)
        yield [entry for task in tasks for entry in reader.read_task(task)]
        return
    pool = ThreadPoolExecutor(max_workers=usable_cores())
    waiting: deque[list[Future[list[InputEntry]]]] = deque()
    try:
        for batch in _group_tasks(_split_tasks(inputs, size), size):
            waiting.append([submit_task(pool, reader.read_task, task) for task in batch])
            if len(waiting) > 2:
                yield [entry for task in waiting.popleft() for entry in wait_for_result(task)]
        while waiting:
            yield [entry for task in waiting.popleft() for entry in wait_for_result(task)]
    finally:
        pool.shutdown(cancel_futures=True)


def _split_tasks(inputs: Inputs, size: int) -> Iterator[ReadTask]:
    """Split the inputs into tasks of at most `size` images."""
    images: list[InputImage] = []
    for each in inputs:
        if isinstance(each, InputImage):
            images.append(each)
        if images and (isinstance(each, InputBatch) or len(images) == IMAGES_PER_TASK):
            yield images
            images = []
        if isinstance(each, InputBatch):
            for start in range(0, len(each.images), size):
                yield InputBatch(each.first + start, each.images[start : start + size])
    if images:
        yield images


def _group_tasks(tasks: Iterable[ReadTask], size: int) -> Iterator[list[ReadTask]]:
    """Group tasks into batches of about `size` images."""
    batch: list[ReadTask] = []
    count = 0
    for task in tasks:
        batch.append(task)
        count += len(task.images) if isinstance(task, InputBatch) else len(task)
        if count >= size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


class BatchOutputs(NamedTuple):
    """Outputs for some images: logits `[N, K]`, probabilities without and with TTA, features."""

    logits: npt.NDArray[np.float32]
    probs: npt.NDArray[np.float64]
    tta_probs: npt.NDArray[np.float64]  # no rows if it is not used
    features: npt.NDArray[np.float32] | None


def _run_network(images: Sequence[Pixels], loaded: LoadedModel, forward: Forward) -> BatchOutputs:
    if not len(images):
        none = np.empty((0, len(loaded.classes)))
        return BatchOutputs(none.astype(np.float32), none, none, None)
    # Joining a single array or tensor would take as long as a small layer. The copy is writable;
    # torch warns of other arrays.
    batch = images[0][None].copy() if len(images) == 1 else np.stack(images)
    outputs = inference.join_outputs(list(forward.outputs(torch.from_numpy(batch))))
    return _to_arrays(outputs, loaded.calibration.temperature)


def _to_arrays(outputs: ModelOutputs, temperature: float) -> BatchOutputs:
    logits, augmented = outputs.logits.numpy(force=True), outputs.tta_logits
    probs = metrics.softmax(logits, temperature)
    return BatchOutputs(
        logits,
        probs,
        probs[:0]
        if augmented is None
        else metrics.softmax(augmented.numpy(force=True), temperature),
        None if outputs.features is None else outputs.features.numpy(force=True),
    )


@preserve_torch_settings()
def all_probabilities(
    loaded: LoadedModel, images: Pixels, *, device: str | None = None
) -> npt.NDArray[np.float64]:
    """Return probabilities `[N, K]` of uint8 images `[N, C, H, W]`.

    The memory format is that of the training: a format chosen by timing could change the last
    digits from call to call, and scikit-learn expects equal results for an equal `random_state`.
    """
    plan, pre = place_model(loaded.model, loaded.select_device(device)), loaded.preprocessing
    forward = Forward(loaded.model, pre.normalize, plan, total=len(images))
    reader = ImageReader(pre.conversion)
    parts = [np.empty((0, len(loaded.classes)))]
    for start in range(0, len(images), MAX_BATCH_IMAGES):
        pixels = reader.fit(images[start : start + MAX_BATCH_IMAGES])
        parts.append(_run_network(list(pixels), loaded, forward).probs)
    return np.concatenate(parts)

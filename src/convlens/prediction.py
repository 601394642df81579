"""Classification of images with a trained model, in batches: files, arrays, PIL images, streams.

`predict` loads a model for one call. `Predictor` keeps it in memory for many calls.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from convlens.data.arrays import ValueRange, check_range, to_uint8
from convlens.data.decode import Conversion, Pixels, UnreadableImage
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
from convlens.engine.inference import Forward, place_model, probabilities
from convlens.errors import UsageError
from convlens.onnx_model import load_model_or_onnx
from convlens.run import LoadedModel, Preprocessing, RunLike, as_run_dir
from convlens.uncertainty.promises import Promises
from convlens.utils import notebook
from convlens.utils.console import print_status, progress_bar, quiet_mode
from convlens.utils.process import submit_task, wait_for_result

# Files that a thread decodes in one task: submitting a task costs as much as decoding a small file.
IMAGES_PER_TASK = 16
MAX_BATCH_IMAGES, MAX_BATCH_BYTES = 256, 1 << 23  # two batches are read ahead


@dataclass(frozen=True, repr=False)
class Prediction:
    """The most probable classes of one image, or the reason why it could not be read.

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
    unlike: bool | None = None
    unlike_score: float | None = None

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


def predict(
    run: RunLike,
    inputs: ImageLike | Iterable[ImageLike],
    *,
    top_k: int = 1,
    tta: str | None = None,
    min_accuracy: float | None = None,
    confidence: float = 0.95,
    prediction_set: float | None = None,
    channels: str | None = None,
    range: ValueRange | None = None,
    device: str | None = None,
    quiet: bool = True,
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
        min_accuracy: answer only images of such confidence that this share of the answers is
            correct; the others are `unsure`. For images like those of the validation split.
        confidence: the probability that this promise holds.
        prediction_set: also return sets of classes that contain the true one for this share of
            images like those of the validation split.
        channels: which axis of an array's images holds the channels: `first`, `last`, or `none`
            for grey images. Needed if a shape can be read in two ways, e.g. `(3, 64, 64)`: one
            color image, or three grey ones.
        range: the values of arrays that become black and white, e.g. `(0, 4095)`. Not needed for
            uint8, booleans, floats in 0..1, or if the model was trained on such values.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress.

    Raises:
        UsageError: unknown run or views, something that is not an image, an image without pixels,
            an array that can be read in two ways, or too few validation images for a promise.
        DataError: a pattern or folder without images.

    A file or stream that cannot be decoded gives a `Prediction` with `error` set.

    Example:
        >>> convlens.predict("digits", ["seven.png", "more/"])[0].label
    """
    sources = collect_inputs(inputs, channels=channels)
    loaded = load_model_or_onnx(as_run_dir(run).model_path)
    promises = Promises.of(loaded.calibration, min_accuracy, confidence, prediction_set)
    return list(
        iter_predictions(
            loaded,
            sources,
            top_k=top_k,
            tta=tta,
            promises=promises,
            value_range=range,
            device=device,
            quiet=quiet,
        )
    )


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
        self._normalize = pre.normalize
        with preserve_torch_settings():
            self._threads = torch.get_num_threads()
            self._plan = place_model(loaded.model, loaded.select_device(device))
        if _uses_features(loaded):
            inference.prepare_head_inputs(loaded.model)
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
        min_accuracy: float | None = None,
        confidence: float = 0.95,
        prediction_set: float | None = None,
        channels: str | None = None,
        range: ValueRange | None = None,
        quiet: bool = True,
    ) -> list[Prediction]:
        """Classify images; arguments, result and errors are those of `convlens.predict`."""
        sources = collect_inputs(inputs, channels=channels)
        total = count_images(sources)
        calibration = self._loaded.calibration
        promises = Promises.of(calibration, min_accuracy, confidence, prediction_set)
        is_trial = self._loaded.can_choose_memory_format and total >= inference.MIN_TRIAL_IMAGES
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
        return list(
            _iter_predictions(
                self._loaded,
                sources,
                forward,
                check_range(range),
                promises,
                top_k=top_k,
                quiet=quiet,
                settings=self._settings,
            )
        )

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
        self, image: ImageLike, *, channels: str | None = None, range: ValueRange | None = None
    ) -> Tensor:
        """Return an image as a normalized float32 tensor `[C, H, W]`.

        Args:
            image: one image, as `convlens.predict` takes it.
            channels, range: as for `convlens.predict`.

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
        value_range = check_range(range)
        (source,) = sources
        conversion = self.preprocessing.conversion
        pixels = (
            _fit_batch(source.images, conversion, value_range)[0]
            if isinstance(source, InputBatch)
            else _read_image(source, conversion, value_range)
        )
        batch = torch.from_numpy(np.array(pixels))[None]  # writable: torch warns of other arrays
        tensor: Tensor = self.preprocessing.normalize(batch, Plan("cpu", "fp32", "contiguous"))[0]
        return tensor


def iter_predictions(
    loaded: LoadedModel,
    inputs: Sequence[str] | Inputs,
    *,
    top_k: int = 1,
    tta: str | None = None,
    promises: Promises | None = None,
    value_range: ValueRange | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Iterator[Prediction]:
    """Yield the predictions of `predict` one by one, while later files are still being read.

    Args:
        loaded: the model.
        inputs: as `collect_inputs` returns them; or paths of files.
        value_range: the `range` of `predict`.
        top_k, tta, device, quiet: as in `predict`.
        promises: thresholds for answers and sets of this model.

    Raises:
        UsageError: unknown views, or an array that does not hold images.
    """
    views = inference.select_views(tta)
    sources = [InputImage(each, each) if isinstance(each, str) else each for each in inputs]
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
        check_range(value_range),
        promises or Promises(),
        top_k=top_k,
        quiet=quiet,
        settings=lambda: preserve_torch_settings(plan.device),
    )


def _iter_predictions(
    loaded: LoadedModel,
    inputs: Inputs,
    forward: Forward,
    value_range: ValueRange | None,
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
        for batch in _read_inputs(inputs, loaded.preprocessing.conversion, value_range):
            readable = [image for _, image, _ in batch if image is not None]
            names = [name for name, image, _ in batch if image is not None]
            # Not around the loop: the caller's code runs between two predictions.
            with settings():
                outputs = _run_network(readable, loaded, forward)
            answers = _answers(outputs, names, k, loaded, promises)
            for filename, image, error in batch:
                if image is None:
                    yield Prediction(filename, error=error)
                else:
                    yield next(answers)
            if bar is not None:
                bar.advance(len(batch))


def _uses_features(loaded: LoadedModel) -> bool:
    detector = loaded.calibration.detector
    return detector is not None and detector.uses_features


def _answers(
    outputs: BatchOutputs,
    names: Sequence[str],
    k: int,
    loaded: LoadedModel,
    promises: Promises,
) -> Iterator[Prediction]:
    """Yield the prediction for each row of a batch; `names` are the file names."""
    probs = outputs.probs
    top, tta_top = _top_classes(probs, k, loaded), _top_classes(outputs.tta_probs, k, loaded)
    unsure = promises.unsure(probs).tolist()
    sets = _set_classes(probs, loaded, promises)
    scores = _outlier_scores(outputs, loaded)
    for row, name in enumerate(names):
        score = None if scores is None else float(scores[row])
        yield Prediction(
            name,
            next(top),
            tta_top=next(tta_top, ()),
            unsure=unsure[row],
            prediction_set=None if sets is None else sets[row],
            unlike=None if score is None else score > 0,
            unlike_score=score,
        )


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


def _outlier_scores(outputs: BatchOutputs, loaded: LoadedModel) -> np.ndarray | None:
    """Return how far the score of each row is above the threshold; None if there is none."""
    calibration = loaded.calibration
    if calibration.detector is None or not len(outputs.logits):
        return None
    scored = calibration.detector.scores(outputs.logits, calibration.temperature, outputs.features)
    if scored is None:
        return None
    scores, threshold = scored
    return np.asarray(scores - threshold)


def _top_classes(
    probs: npt.NDArray[np.float64], k: int, loaded: LoadedModel
) -> Iterator[tuple[tuple[str, float], ...]]:
    """Yield the `k` most probable classes of each row."""
    if not len(probs):
        return
    order = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    best = probs[np.arange(len(probs))[:, None], order]  # faster than `take_along_axis`
    for classes, row in zip(order.tolist(), best.tolist(), strict=True):
        yield tuple((loaded.classes[i], prob) for i, prob in zip(classes, row, strict=True))


# Name, image or None, and the reason why there is no image.
InputEntry = tuple[str, Pixels | None, str | None]
# What a thread reads at once.
ReadTask = list[InputImage] | InputBatch


def _read_inputs(
    inputs: Inputs, conversion: Conversion, value_range: ValueRange | None
) -> Iterator[list[InputEntry]]:
    """Yield the images in batches; the next files are decoded while the caller uses a batch."""
    fitting = MAX_BATCH_BYTES // conversion.image_bytes
    # A multiple of the task size.
    fitting = max(IMAGES_PER_TASK, fitting // IMAGES_PER_TASK * IMAGES_PER_TASK)
    size = min(MAX_BATCH_IMAGES, fitting)
    if len(inputs) <= IMAGES_PER_TASK and count_images(inputs) <= size:  # not worth any threads
        tasks = _split_tasks(inputs, size)
        yield [entry for task in tasks for entry in _read_task(task, conversion, value_range)]
        return
    pool = ThreadPoolExecutor(max_workers=usable_cores())
    waiting: deque[list[Future[list[InputEntry]]]] = deque()
    try:
        for batch in _group_tasks(_split_tasks(inputs, size), size):
            waiting.append(
                [submit_task(pool, _read_task, t, conversion, value_range) for t in batch]
            )
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


def _read_task(
    task: ReadTask, conversion: Conversion, value_range: ValueRange | None
) -> list[InputEntry]:
    if isinstance(task, InputBatch):
        images = _fit_batch(task.images, conversion, value_range)
        return [(str(number), image, None) for number, image in enumerate(images, task.first)]
    entries: list[InputEntry] = []
    for each in task:
        try:
            entries.append((each.name, _read_image(each, conversion, value_range), None))
        except UnreadableImage as error:
            entries.append((each.name, None, error.reason))
    return entries


def _read_image(
    image: InputImage, conversion: Conversion, value_range: ValueRange | None
) -> Pixels:
    """Return an image as uint8 `[C, H, W]` of the model's size.

    Raises:
        UnreadableImage: it cannot be decoded.
        UsageError: the range of an array's values is not known.
    """
    name, source = image.name, image.source
    if isinstance(source, np.ndarray):
        pixels: Pixels = _fit_batch(source[None], conversion, value_range, where=f"image {name}")[0]
        return pixels
    if source == b"":
        raise UnreadableImage(name, "it is empty (0 bytes)")
    if isinstance(source, Image.Image):
        return conversion.pil(source, name)
    return conversion.file(source, name)


def _fit_batch(
    images: npt.NDArray[Any],
    conversion: Conversion,
    value_range: ValueRange | None,
    where: str = "",
) -> Pixels:
    stored_range = conversion.value_range
    pixels = to_uint8(images, value_range=value_range, stored_range=stored_range, where=where)
    return conversion.array(pixels)


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
    outputs = list(forward.outputs(torch.from_numpy(batch)))
    temperature = loaded.calibration.temperature
    logits = _join([each.logits for each in outputs])
    probs = probabilities(logits, temperature)
    augmented = [each.tta_logits for each in outputs if each.tta_logits is not None]
    features = [each.features for each in outputs if each.features is not None]
    return BatchOutputs(
        logits.numpy(),
        probs,
        probabilities(_join(augmented), temperature) if augmented else probs[:0],
        _join(features).numpy() if features else None,
    )


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return (tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))).cpu()


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
    parts = [np.empty((0, len(loaded.classes)))]
    for start in range(0, len(images), MAX_BATCH_IMAGES):
        pixels = _fit_batch(images[start : start + MAX_BATCH_IMAGES], pre.conversion, None)
        parts.append(_run_network(list(pixels), loaded, forward).probs)
    return np.concatenate(parts)

"""Classification of image files and arrays with a trained model, in batches."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape

from convlens.data.decode import UnreadableImage
from convlens.data.layout import printable
from convlens.data.scan import Scanner
from convlens.data.types import is_image_name
from convlens.device import preserve_torch_settings, usable_cores
from convlens.engine import inference
from convlens.engine.inference import Forward, place_model, probabilities
from convlens.errors import DataError, UsageError
from convlens.onnx_model import load_model_or_onnx
from convlens.run import LoadedModel, RunLike, as_run_dir
from convlens.utils.console import print_status, progress_bar, quiet_mode
from convlens.utils.process import submit_task, wait_for_result

# Files that a thread decodes in one task: submitting a task costs as much as decoding a small file.
IMAGES_PER_TASK = 16
MAX_BATCH_IMAGES, MAX_BATCH_BYTES = 256, 1 << 23  # two batches are read ahead


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, or the reason why it could not be read.

    Attributes:
        filename: path of the file, or the number of the image in the array.
        top: classes with their probabilities, the most probable first; empty after an error.
        error: the reason why the file could not be read.
        tta_top: as `top`, with test-time augmentation. `label`, `prob` and `top` are without it.
    """

    filename: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    tta_top: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str | None:
        return self.top[0][0] if self.top else None

    @property
    def prob(self) -> float | None:
        return self.top[0][1] if self.top else None

    @property
    def tta_label(self) -> str | None:
        return self.tta_top[0][0] if self.tta_top else None

    @property
    def tta_prob(self) -> float | None:
        return self.tta_top[0][1] if self.tta_top else None


def predict(
    run: RunLike,
    inputs: str | Path | Iterable[str | Path] | np.ndarray,
    *,
    top_k: int = 1,
    tta: str | None = None,
    device: str | None = None,
    quiet: bool = True,
) -> list[Prediction]:
    """Classify images; return one `Prediction` for each, in the order given.

    Args:
        run: a run by name, folder or model file (also an exported ONNX file), or a `Run`.
        inputs: image files, folders and glob patterns, or an array of images: uint8 `[N, H, W]`,
            `[N, H, W, C]` or `[N, C, H, W]`, or floats in 0..1. All of them go through the
            decoding and the preprocessing of the training.
        top_k: number of classes to return for each image.
        tta: test-time augmentation, `flip` or `flip+shifts`. Its predictions are returned in
            addition to those without it. Only for classes that a mirror image does not change.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress.

    Raises:
        UsageError: unknown run or views, or an array that does not hold images.
        DataError: a pattern or folder without images.

    A file that cannot be read gives a `Prediction` with `error` set.

    Example:
        >>> convlens.predict("digits", ["seven.png", "more/"])[0].label
    """
    loaded = load_model_or_onnx(as_run_dir(run).model_path)
    if isinstance(inputs, str | Path):
        inputs = [inputs]
    images = inputs if isinstance(inputs, np.ndarray) else expand_paths(inputs)
    return list(iter_predictions(loaded, images, top_k=top_k, tta=tta, device=device, quiet=quiet))


def expand_paths(paths: Iterable[str | Path]) -> list[str]:
    """Return files for files, folders (all images inside, sorted) and glob patterns, in order.

    Files that do not exist and folders that cannot be opened are returned as well: reading them
    gives a `Prediction` with the reason.

    Raises:
        DataError: names all patterns without a match and all folders without images.
    """
    expanded: list[str] = []
    missing: list[str] = []
    for given in paths:
        if not isinstance(given, str | os.PathLike):
            raise UsageError(
                f"a {type(given).__name__} is not a path",
                fix="give paths, or one array of images [N, H, W, C]",
            )
        path = os.fspath(given)
        if os.path.isdir(path):
            inside = _images_in_folder(path)
            expanded += inside
            if not inside:
                missing.append(f"{path} (a folder without images)")
        elif os.path.exists(path) or not glob.has_magic(path):
            expanded.append(path)
        else:
            matches = sorted(glob.glob(path, recursive=True))
            expanded += matches
            if not matches:
                missing.append(path)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"not found: {', '.join(missing[:5])}{more}", fix="give image files, folders or globs"
        )
    return expanded


def _images_in_folder(folder: str) -> list[str]:
    below = Scanner(folder).find_images(folder)
    odd = [path for path in below.special_files if is_image_name(os.path.basename(path))]
    links = len(below.special_files) - len(odd)
    if links:
        print_status(escape(f"{printable(folder)}: skipped {links} broken links"))
    return sorted([*below.images, *odd, *below.unreadable_folders])


def iter_predictions(
    loaded: LoadedModel,
    inputs: Sequence[str | Path] | np.ndarray,
    *,
    top_k: int = 1,
    tta: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Iterator[Prediction]:
    """Yield the predictions of `predict` one by one, while later files are still being read.

    Args:
        loaded: the model.
        inputs: paths of files, as `expand_paths` returns them, or an array of images.
        top_k, tta, device, quiet: as in `predict`.

    Raises:
        UsageError: unknown views, or an array that does not hold images.
    """
    views = inference.select_views(tta)
    with preserve_torch_settings():
        plan = place_model(loaded.model, loaded.select_device(device))
    forward = Forward(
        loaded.model,
        loaded.preprocessing.normalize,
        plan,
        views=views,
        total=len(inputs),
        choose_memory_format=loaded.can_choose_memory_format,
    )
    k = min(max(top_k, 1), len(loaded.classes))
    if views is not None:
        with quiet_mode(quiet):
            print_status(
                f"tta columns are the mean over the views of {tta!r}; label and prob are without it"
            )
    with progress_bar("predicting", len(inputs), shown=not quiet) as bar:
        for batch in _read_inputs(inputs, loaded):
            readable = [image for _, image, _ in batch if image is not None]
            # Not around the loop: the caller's code runs between two predictions.
            with preserve_torch_settings(plan.device):
                probs, tta_probs = _probabilities(readable, loaded, forward)
            top, tta_top = _top_classes(probs, k, loaded), _top_classes(tta_probs, k, loaded)
            for filename, image, error in batch:
                if image is None:
                    yield Prediction(filename, error=error)
                else:
                    yield Prediction(filename, next(top), tta_top=next(tta_top, ()))
            bar.advance(len(batch))


def _top_classes(
    probs: np.ndarray, k: int, loaded: LoadedModel
) -> Iterator[tuple[tuple[str, float], ...]]:
    """Yield the `k` most probable classes of each row."""
    order = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(probs, order, axis=1)
    for classes, row in zip(order.tolist(), best.tolist(), strict=True):
        yield tuple((loaded.classes[i], prob) for i, prob in zip(classes, row, strict=True))


# Name, image or None, and the reason why there is no image.
InputEntry = tuple[str, np.ndarray | None, str | None]


def _read_inputs(
    inputs: Sequence[str | Path] | np.ndarray, loaded: LoadedModel
) -> Iterator[list[InputEntry]]:
    """Yield the images in batches; the next files are decoded while the caller uses a batch."""
    pre = loaded.preprocessing
    fitting = MAX_BATCH_BYTES // (pre.channels * pre.image_size**2)
    # A multiple of the task size.
    fitting = max(IMAGES_PER_TASK, fitting // IMAGES_PER_TASK * IMAGES_PER_TASK)
    size = min(MAX_BATCH_IMAGES, fitting)
    starts = range(0, len(inputs), size)
    if isinstance(inputs, np.ndarray):
        for start in starts:
            images = _fit(inputs[start : start + size], loaded)
            yield [(str(number), image, None) for number, image in enumerate(images, start)]
        return
    pool = ThreadPoolExecutor(max_workers=usable_cores())
    waiting: deque[list[Future[list[InputEntry]]]] = deque()
    try:
        for start in starts:
            paths = inputs[start : start + size]
            tasks = [paths[i : i + IMAGES_PER_TASK] for i in range(0, len(paths), IMAGES_PER_TASK)]
            waiting.append([submit_task(pool, _decode_files, task, loaded) for task in tasks])
            if len(waiting) > 2:
                yield [entry for task in waiting.popleft() for entry in wait_for_result(task)]
        while waiting:
            yield [entry for task in waiting.popleft() for entry in wait_for_result(task)]
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_files(paths: Sequence[str | Path], loaded: LoadedModel) -> list[InputEntry]:
    conversion = loaded.preprocessing.conversion
    entries: list[InputEntry] = []
    for path in paths:
        try:
            entries.append((str(path), conversion.file(path), None))
        except UnreadableImage as error:
            entries.append((str(path), None, error.reason))
    return entries


def _fit(images: np.ndarray, loaded: LoadedModel) -> np.ndarray:
    return loaded.preprocessing.conversion.array(channels_first(images))


def _probabilities(
    images: Sequence[np.ndarray], loaded: LoadedModel, forward: Forward
) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities `[N, K]` without and with test-time augmentation (unused: no rows)."""
    empty = np.empty((0, len(loaded.classes)))
    if not len(images):
        return empty, empty
    outputs = list(forward.outputs(torch.from_numpy(np.stack(images))))
    plain = probabilities(torch.cat([each.logits for each in outputs]))
    augmented = [each.tta_logits for each in outputs if each.tta_logits is not None]
    return plain, probabilities(torch.cat(augmented)) if augmented else empty


@preserve_torch_settings()
def all_probabilities(
    loaded: LoadedModel, images: np.ndarray, *, device: str | None = None
) -> np.ndarray:
    """Return probabilities float64 `[N, K]` for an array of images as `predict` takes it.

    The memory format is that of the training: a format chosen by timing could change the last
    digits from call to call, and scikit-learn expects equal results for an equal `random_state`.
    """
    plan, normalize = (
        place_model(loaded.model, loaded.select_device(device)),
        loaded.preprocessing.normalize,
    )
    forward = Forward(loaded.model, normalize, plan, total=len(images))
    parts = [np.empty((0, len(loaded.classes)))]
    for start in range(0, len(images), MAX_BATCH_IMAGES):
        pixels = _fit(images[start : start + MAX_BATCH_IMAGES], loaded)
        parts.append(_probabilities(list(pixels), loaded, forward)[0])
    return np.concatenate(parts)


def channels_first(images: np.ndarray) -> np.ndarray:
    """Convert images to uint8 `[N, C, H, W]`.

    Args:
        images: `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` with 1 or 3 channels: integers in
            0..255, floats in 0..1 (scaled to 0..255 and rounded), or booleans.

    Raises:
        UsageError: another shape, not numbers, or values outside the range of their type.
    """
    array = _to_nchw(np.asarray(images))
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype.kind not in "uif":
        raise UsageError(f"images must be numbers, not {array.dtype}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.isfinite(array).all() or (array.size and (array.min() < 0 or array.max() > 255)):
        raise UsageError("image values must be finite and within 0..1 (float) or 0..255 (integer)")
    if np.issubdtype(array.dtype, np.floating):
        if array.size and array.max() > 1:
            raise UsageError("float images hold values above 1", fix="scale them to 0..1")
        array = np.rint(array * 255)
    return np.ascontiguousarray(array.astype(np.uint8))


def _to_nchw(array: np.ndarray) -> np.ndarray:
    shape = array.shape
    if array.ndim == 3:
        if shape[2] in (1, 3):  # images are not 1 or 3 pixels wide
            raise UsageError(
                f"an array {shape} looks like one image [H, W, C], not like several",
                fix="give images[None]",
            )
        array = array[:, None]
    elif array.ndim == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3):
        array = np.moveaxis(array, 3, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise UsageError(
            f"images of shape {shape} can't be used",
            fix="give [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels",
        )
    return array

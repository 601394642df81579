"""Classifying image files and arrays with a trained model, in batches."""

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

from convlens.data.decode import UnreadableImage, decode, fit_arrays
from convlens.data.image_folder import Scanner, printable
from convlens.data.types import is_image_name
from convlens.device import preserve_torch_settings, usable_cores
from convlens.engine import inference
from convlens.engine.inference import Forward, place_model, probabilities
from convlens.errors import DataError, UsageError
from convlens.run import LoadedModel
from convlens.utils.console import print_status, progress_bar, quiet_mode

IMAGES_PER_TASK = (
    16  # files that a thread decodes in a row: handing over a task costs as much as a small one
)
BATCH, BYTES = 256, 1 << 23  # the most images in a lot, and their bytes; two lots are read ahead


@dataclass(frozen=True)
class Prediction:
    """The answer for one image, likeliest class first, or the reason why there is none.

    `label`, `prob` and `top` are of the image as it is; with test-time augmentation `tta_label`,
    `tta_prob` and `tta_top` stand beside them.
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


def expand_paths(paths: Iterable[str | Path]) -> list[str]:
    """Files for files, folders (all images inside, sorted) and glob patterns, in order.

    A file that isn't there stays among the others: reading it says why there is no answer, and so
    does reading a folder that may not be looked into.

    Raises:
        DataError: a pattern that matches nothing, a folder without images; all of them at once.
    """
    found: list[str] = []
    missing: list[str] = []
    for given in paths:
        if not isinstance(given, str | os.PathLike):
            raise UsageError(
                f"a {type(given).__name__} is no path",
                fix="give paths, or one array of images [N, H, W, C]",
            )
        path = os.fspath(given)
        if os.path.isdir(path):
            inside = _inside(path)
            found += inside
            if not inside:
                missing.append(f"{path} (a folder without images)")
        elif os.path.exists(path) or not glob.has_magic(path):
            found.append(path)
        else:
            matches = sorted(glob.glob(path, recursive=True))
            found += matches
            if not matches:
                missing.append(path)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"not found: {', '.join(missing[:5])}{more}", fix="give image files, folders or globs"
        )
    return found


def _inside(folder: str) -> list[str]:
    contents = Scanner(folder).find_images(folder)
    special = [p for p in contents.special_files if is_image_name(os.path.basename(p))]
    links = len(contents.special_files) - len(special)
    if links:
        print_status(escape(f"{printable(folder)}: {links} links to nothing were left out"))
    return sorted([*contents.images, *special, *contents.unreadable_folders])


def predict(
    loaded: LoadedModel,
    inputs: Sequence[str | Path] | np.ndarray,
    *,
    top_k: int = 1,
    tta: str | None = None,
    on: str | None = None,
    quiet: bool = False,
) -> Iterator[Prediction]:
    """One `Prediction` for each image, in the order given.

    Args:
        inputs: paths of image files, or uint8 images `[N, H, W]`, `[N, H, W, C]` or
            `[N, C, H, W]`; all go through the decoder and the preprocessing of training.
        top_k: how many classes to name for each image.
        tta: test-time augmentation, `flip` or `flip+shifts`: its answers come beside the plain
            ones. Mirror images must not change the class.

    Raises:
        UsageError: no such views, or an array that is no images.

    An unreadable file gives a `Prediction` with `error` set; the others are done all the same.
    """
    chosen = inference.select_views(tta)
    with preserve_torch_settings():
        plan = place_model(loaded.model, loaded.select_device(on))
    forward = Forward(
        loaded.model,
        loaded.preprocessing.normalize,
        plan,
        views=chosen,
        total=len(inputs),
        choose_memory_format=loaded.can_choose_memory_format,
    )
    k = min(max(top_k, 1), len(loaded.classes))
    if chosen is not None:
        with quiet_mode(quiet):
            print_status(
                f"tta answers are the mean over the views of {tta!r}; label and prob are plain"
            )
    with progress_bar("predicting", len(inputs), shown=not quiet) as bar:
        for batch in _read_inputs(inputs, loaded):
            good = [image for _, image, _ in batch if image is not None]
            # Not around the loop: the caller computes between two of these answers.
            with preserve_torch_settings(plan.device):
                plain, mean = _probabilities(good, loaded, forward)
            top, beside = _top(plain, k, loaded), iter(_top(mean, k, loaded))
            for filename, image, error in batch:
                if image is None:
                    yield Prediction(filename, error=error)
                else:
                    yield Prediction(filename, next(top), tta_top=next(beside, ()))
            bar.advance(len(batch))


def _top(probs: np.ndarray, k: int, loaded: LoadedModel) -> Iterator[tuple[tuple[str, float], ...]]:
    """The likeliest `k` classes of each row."""
    order = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(probs, order, axis=1)
    for classes, shares in zip(order.tolist(), best.tolist(), strict=True):
        yield tuple((loaded.classes[i], share) for i, share in zip(classes, shares, strict=True))


# Name, image or None, and why there is none.
InputEntry = tuple[str, np.ndarray | None, str | None]


def _read_inputs(
    inputs: Sequence[str | Path] | np.ndarray, loaded: LoadedModel
) -> Iterator[list[InputEntry]]:
    """The images, some at a time; the next files are decoded while these are being looked at."""
    pre = loaded.preprocessing
    lot = min(
        BATCH,
        max(
            IMAGES_PER_TASK,
            BYTES // (pre.channels * pre.image_size**2) // IMAGES_PER_TASK * IMAGES_PER_TASK,
        ),
    )
    starts = range(0, len(inputs), lot)
    if isinstance(inputs, np.ndarray):
        for start in starts:
            images = _fitted(inputs[start : start + lot], loaded)
            yield [(str(number), image, None) for number, image in enumerate(images, start)]
        return
    pool = ThreadPoolExecutor(max_workers=usable_cores())
    waiting: deque[list[Future[list[InputEntry]]]] = deque()
    try:
        for start in starts:
            some = inputs[start : start + lot]
            tasks = [some[i : i + IMAGES_PER_TASK] for i in range(0, len(some), IMAGES_PER_TASK)]
            waiting.append([pool.submit(_decoded, task, loaded) for task in tasks])
            if len(waiting) > 2:
                yield [entry for task in waiting.popleft() for entry in task.result()]
        while waiting:
            yield [entry for task in waiting.popleft() for entry in task.result()]
    finally:
        pool.shutdown(cancel_futures=True)


def _decoded(paths: Sequence[str | Path], loaded: LoadedModel) -> list[InputEntry]:
    pre = loaded.preprocessing
    found: list[InputEntry] = []
    for path in paths:
        try:
            image = decode(path, size=pre.image_size, channels=pre.channels, fit=pre.fit)
            found.append((str(path), image, None))
        except UnreadableImage as error:
            found.append((str(path), None, error.reason))
    return found


def _fitted(images: np.ndarray, loaded: LoadedModel) -> np.ndarray:
    pre = loaded.preprocessing
    ready = channels_first(images)
    return fit_arrays(ready, size=pre.image_size, channels=pre.channels, fit=pre.fit)


def _probabilities(
    images: Sequence[np.ndarray], loaded: LoadedModel, forward: Forward
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[N, classes]` of the images as they are, and of the views (none: no rows)."""
    none = np.empty((0, len(loaded.classes)))
    if not len(images):
        return none, none
    found = list(forward.outputs(torch.from_numpy(np.stack(images))))
    plain = probabilities(torch.cat([each.logits for each in found]))
    beside = [each.tta_logits for each in found if each.tta_logits is not None]
    return plain, probabilities(torch.cat(beside)) if beside else none


@preserve_torch_settings()
def all_probabilities(
    loaded: LoadedModel, images: np.ndarray, *, on: str | None = None
) -> np.ndarray:
    """Probabilities float64 `[N, classes]` for images as `predict` takes them."""
    plan, normalize = (
        place_model(loaded.model, loaded.select_device(on)),
        loaded.preprocessing.normalize,
    )
    forward = Forward(
        loaded.model,
        normalize,
        plan,
        total=len(images),
        choose_memory_format=loaded.can_choose_memory_format,
    )
    parts = [np.empty((0, len(loaded.classes)))]
    for start in range(0, len(images), BATCH):
        ready = _fitted(images[start : start + BATCH], loaded)
        parts.append(_probabilities(list(ready), loaded, forward)[0])
    return np.concatenate(parts)


def channels_first(images: np.ndarray) -> np.ndarray:
    """uint8 `[N, C, H, W]` from `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`; C is 1 or 3.

    Floats are taken as 0..1 and rounded to 0..255.

    Raises:
        UsageError: another shape, no numbers, or values outside the range of their type.
    """
    array = np.asarray(images)
    if array.ndim == 3:
        if array.shape[2] in (1, 3):  # no image is that narrow
            raise UsageError(
                f"an array {np.shape(images)} looks like one image [H, W, C], not like several",
                fix="give images[None]",
            )
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = np.moveaxis(array, 3, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise UsageError(
            f"images of shape {np.shape(images)} can't be used",
            fix="give [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels",
        )
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

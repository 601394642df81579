"""Numerical check of an exported model against convlens's own outputs, on real images.

Two programs that compute the same network differ in the last digits, because they add in another
order. A wrong export (other pixels, another class order, batch norm in training mode) differs in
the first digit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from convlens import device, metrics
from convlens.data import Split, load_foreign
from convlens.data.decode import fit_images
from convlens.data.drawn import Drawn
from convlens.data.sources import find
from convlens.errors import DataError, ModelFileError, UsageError
from convlens.evaluation import own_data
from convlens.inference import Forward, placed
from convlens.run import Loaded, RunFolder
from convlens.system.console import print_status

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

    def __init__(self, loaded: Loaded, images: Tensor, source: str) -> None:
        self.images, self.source = images, source
        plan = placed(loaded.model, "cpu")
        forward = Forward(loaded.model, loaded.preprocessing.normalise, plan, total=len(images))
        found = [answers.plain for answers in forward.answers(images)]
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


def sample_images(run_dir: RunFolder, loaded: Loaded, data: str | None) -> tuple[Tensor, str]:
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
        if not run_dir.facts():
            raise DataError("a model file on its own has no images")
        own = own_data(loaded, "cpu")
    except (DataError, UsageError) as error:
        print_status(
            f"compared on drawn images, not on real ones: {error.what} (--data takes others)"
        )
        pre = loaded.preprocessing
        drawn = Drawn(MAX_IMAGES, pre.image_size)[np.arange(MAX_IMAGES)]
        fitted = fit_images(drawn, size=pre.image_size, channels=pre.channels, fit=pre.fit)
        return torch.from_numpy(fitted), "drawn images"
    if len(own.val):
        return _evenly_spaced(own.val), f"validation images of {own.name!r}"
    return _evenly_spaced(
        own.train
    ), f"training images of {own.name!r} (it has no validation split)"


def _load_other(loaded: Loaded, data: str) -> tuple[Split, str]:
    """The validation split of a data set, or its training split, or all of it, and its name."""
    pre = loaded.preprocessing
    parts = find(data, image_size=pre.image_size, tested=True).parts
    split, _, name, _ = load_foreign(
        data,
        next(name for name in ("val", "train", *parts) if name in parts),
        image_size=pre.image_size,
        channels=pre.channels,
        fit=pre.fit,
        memory_budget=device.memory_budget("cpu"),
        tested=True,
    )
    return split, name


def _evenly_spaced(split: Split) -> Tensor:
    count = min(len(split), MAX_IMAGES)
    return split.rows.gather(torch.linspace(0, len(split) - 1, count).round().long())

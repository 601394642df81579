"""Does an exported file answer as convlens does? The images that are asked about, and the verdict.

Two programs that compute the same network differ in last digits: they add in different orders. A
wrong export (other pixels, other class order, batch norm in training mode) differs in the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
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

IMAGES = 500
BATCHES = (1, 7)  # eight of each, and the rest in larger ones
REST = 64
# The largest difference of a logit that last digits can make, as a share of the largest logit (or
# of 1, if that is larger). The planted mistakes of the tests make half of it and more.
TOLERANCE = 1e-4
SOFTMAX = 1e-5  # the largest difference of a probability to the softmax of the same file's logits

# From uint8 images `[B, C, S, S]` to logits and probabilities `[B, K]`, float32.
Ask = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pictures:
    """Images uint8 `[N, C, S, S]` to compare answers on, their ids, and where they come from."""

    images: Tensor
    ids: Sequence[str]
    source: str


@dataclass(frozen=True)
class Agreement:
    """How an exported file's answers compare with convlens's, both float32 on a CPU.

    `near_ties` are images of which the two name different classes that convlens itself holds for
    equal within `max_logit_difference`; any other difference of classes refuses the export.
    """

    source: str
    images: int
    batch_sizes: list[int]
    top1_agreement: float
    near_ties: list[dict[str, Any]]
    max_logit_difference: float
    max_probability_difference: float
    largest_logit: float
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        """What was found, in one line."""
        sizes = ", ".join(map(str, self.batch_sizes[:-1])) + f" and {self.batch_sizes[-1]}"
        ties = f" but {len(self.near_ties)} near-ties" if self.near_ties else ""
        return (
            f"on {self.images:,} {self.source}, in batches of {sizes}, the same class for all"
            f"{ties}; logits differ by at most {self.max_logit_difference:.2g} (the largest is "
            f"{self.largest_logit:.3g})"
        )


def pictures(place: RunFolder, loaded: Loaded, data: str | None) -> Pictures:
    """Up to 500 images, evenly spaced: the run's validation images, or those of the set `data`.

    A run without a validation split gives training images; a model file on its own, or a run
    whose images are gone, gets drawn ones, and it is said. The test split stays sealed.

    Raises:
        DataError, UsageError: `data` can't be used.
    """
    if data is not None:
        part, name = _foreign(loaded, data)
        return _some(part, f"images of {name!r}")
    if not place.facts():
        return _drawn(loaded, "a model file on its own has no images")
    try:
        own = own_data(loaded, "cpu")
    except (DataError, UsageError) as error:
        return _drawn(loaded, error.what)
    if len(own.val):
        return _some(own.val, f"validation images of {own.name!r}")
    return _some(own.train, f"training images of {own.name!r}, which kept none for validation")


def _drawn(loaded: Loaded, why: str) -> Pictures:
    print_status(f"compared on drawn images, not on real ones: {why} (--data takes others)")
    pre = loaded.preprocessing
    shapes = Drawn(IMAGES, pre.image_size)[np.arange(IMAGES)]
    images = fit_images(shapes, size=pre.image_size, channels=pre.channels, fit=pre.fit)
    return Pictures(
        torch.from_numpy(images), [f"shapes/{i}" for i in range(IMAGES)], "drawn images"
    )


def _foreign(loaded: Loaded, data: str) -> tuple[Split, str]:
    """A set's validation part; all of it where it has no parts, else its training part."""
    pre = loaded.preprocessing
    parts = find(data, image_size=pre.image_size, tested=True).parts
    split = next(name for name in ("val", "train", *parts) if name in parts)
    part, _, name, _ = load_foreign(
        data,
        split,
        image_size=pre.image_size,
        channels=pre.channels,
        fit=pre.fit,
        memory_budget=device.memory_budget("cpu"),
        tested=True,
    )
    return part, name


def _some(part: Split, source: str) -> Pictures:
    chosen = np.unique(np.linspace(0, len(part) - 1, min(len(part), IMAGES)).round().astype(int))
    images = part.rows.gather(torch.from_numpy(chosen))
    return Pictures(images, [part.ids[i] for i in chosen.tolist()], source)


class Witness:
    """convlens's own answers to some images, and the comparison of others' with them.

    `at_once` is how many images convlens computes at once.
    """

    def __init__(self, loaded: Loaded, seen: Pictures) -> None:
        self.classes, self.seen = loaded.classes, seen
        self.preprocessing = asdict(loaded.preprocessing)
        plan = placed(loaded.model, "cpu")
        forward = Forward(
            loaded.model, loaded.preprocessing.normalise, plan, total=len(seen.images)
        )
        found = [each.plain for each in forward.answers(seen.images)]
        self.logits = torch.cat(found).numpy().astype(np.float64)
        self.at_once = forward.batch

    def sizes(self) -> list[int]:
        """The batch sizes, one after the other; few images are asked about more than once."""
        small = [size for size in BATCHES for _ in range(8)]
        rest = max(REST // 8, len(self.seen.images) - sum(small))
        large = min(REST, max(8, self.at_once))
        return [*small, *([large] * (rest // large)), *([rest % large] if rest % large else [])]

    def compare(self, ask: Ask, path: str) -> Agreement:
        """Asks the exported file about all images.

        Raises:
            ModelFileError: it doesn't agree; says in what.
        """
        sizes = self.sizes()
        turns = np.arange(sum(sizes)) % len(self.seen.images)
        parts = [ask(self.seen.images[rows]) for rows in torch.from_numpy(turns).split(sizes)]
        theirs, chances = (
            np.concatenate([part[i].numpy() for part in parts]).astype(np.float64) for i in (0, 1)
        )
        ours = self.logits[turns]
        if theirs.shape != ours.shape or chances.shape != ours.shape:
            raise _refused(f"its answers have the shape {theirs.shape}, not {ours.shape}", path)
        if not (np.isfinite(theirs).all() and np.isfinite(chances).all()):
            raise _refused("some of its answers are no finite numbers", path)
        return self._judged(turns, sizes, ours, theirs, chances, path)

    def _judged(
        self,
        turns: np.ndarray,
        sizes: list[int],
        ours: np.ndarray,
        theirs: np.ndarray,
        chances: np.ndarray,
        path: str,
    ) -> Agreement:
        apart = float(np.abs(theirs - ours).max())
        unlike = float(np.abs(chances - metrics.softmax(ours)).max())
        largest = float(np.abs(ours).max())
        limit = TOLERANCE * max(1.0, largest)
        rows = np.arange(len(turns))
        first, other = ours.argmax(1), theirs.argmax(1)
        gaps = ours[rows, first] - ours[rows, other]
        wrong = (first != other) & (gaps >= apart)
        count = len({int(turn) for turn in turns[first != other]})
        if wrong.any() or apart > limit:
            raise _refused(
                f"{count} of {len(self.seen.images)} images get another class; logits differ by "
                f"up to {apart:.2g} (allowed: {limit:.2g})",
                path,
            )
        off = float(np.abs(chances - metrics.softmax(theirs)).max())
        if off > SOFTMAX:
            raise _refused(f"its probabilities are {off:.2g} off the softmax of its logits", path)
        ties = {
            self.seen.ids[turns[row]]: {
                "image": self.seen.ids[turns[row]],
                "convlens": self.classes[first[row]],
                "exported": self.classes[other[row]],
                "gap": float(gaps[row]),
            }
            for row in np.flatnonzero(first != other)
        }
        return Agreement(
            source=self.seen.source,
            images=len(self.seen.images),
            batch_sizes=sorted(set(sizes)),
            top1_agreement=1.0,
            near_ties=list(ties.values()),
            max_logit_difference=apart,
            max_probability_difference=unlike,
            largest_logit=largest,
            tolerance=limit,
        )


def _refused(why: str, path: str) -> ModelFileError:
    return ModelFileError(
        f"the exported file doesn't answer as convlens does, so it was not kept: {why}",
        where=path,
        fix="export to another format, or tell us: this must not happen",
    )

"""Suspected label errors: what `find_label_errors` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Twin:
    """A copy of an image under another label; not `exact` means that it looks the same."""

    id: str
    label: str
    exact: bool


@dataclass(frozen=True)
class Suspect:
    """An image whose label is probably wrong.

    `score` is the probability of the given label, `top` are the likeliest classes with theirs.
    `split` is the one that the image is in.
    """

    id: str
    split: str
    label: str
    suggested: str
    score: float
    top: list[tuple[str, float]]
    twins: list[Twin]


@dataclass(frozen=True)
class Pair:
    """An estimated number of images labelled `label` that belong to `likely`."""

    label: str
    likely: str
    images: int


@dataclass(frozen=True)
class LabelReport:
    """What `find_label_errors` returns; `to_dict` is what `--json` prints.

    Of all N images that were judged: `ids`, `splits`, `labels` int64 `[N]`, `chances` float64
    `[N, K]` and `scores` `[N]`; `order` ranks them, all suspects first. `accuracy` is how often
    the models agree with the given labels, `noise` the estimated share of wrong ones, `disputed`
    the number of pairs of copies under two labels of which neither is suspected.
    """

    name: str
    data: str
    classes: tuple[str, ...]
    folds: int
    runs: list[str]
    rule: str
    accuracy: float
    noise: float
    suspects: list[Suspect]
    pairs: list[Pair]
    disputed: int
    tested: bool
    ids: list[str] = field(repr=False)
    splits: list[str] = field(repr=False)
    labels: npt.NDArray[np.int64] = field(repr=False)
    chances: npt.NDArray[np.float64] = field(repr=False)
    scores: npt.NDArray[np.float64] = field(repr=False)
    order: npt.NDArray[np.int64] = field(repr=False)
    sheets: list[Path] = field(default_factory=list)
    table: Path | None = None
    trainable: bool = False  # whether `table` can be trained on: the images are files

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the images that are not suspected, their number."""
        arrays = ("ids", "splits", "labels", "chances", "scores", "order")
        content = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in arrays}
        content |= {
            "classes": list(self.classes),
            "images": len(self.ids),
            "suspects": [asdict(suspect) for suspect in self.suspects],
            "pairs": [asdict(pair) for pair in self.pairs],
            "sheets": [str(path) for path in self.sheets],
            "table": None if self.table is None else str(self.table),
        }
        return content

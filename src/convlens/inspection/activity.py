"""What the layers of a network give for one picture: values, numbers, and what is shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convlens import metrics
from convlens.errors import UsageError
from convlens.inspection import layers
from convlens.inspection.subjects import Picture, Subject
from convlens.names import pick

Maps = npt.NDArray[np.float32]
PERCENTILE = 99.5
ORDERS = ("active", "index")


@dataclass(frozen=True)
class LayerNumbers:
    """One layer's answer to one picture.

    `blank` channels are the same everywhere (of a single value: zero); `broken` ones hold NaN or
    infinity. `mean` is over all finite values, `active` the share of them above zero.
    """

    layer: str
    channels: int
    height: int
    width: int
    blank: int
    broken: int
    mean: float | None
    active: float | None


@dataclass(frozen=True)
class Activity:
    """The layers' outputs float32 `[C, h, w]` by name, and the logits float32 `[K]`."""

    run: str
    classes: tuple[str, ...]
    picture: Picture
    maps: dict[str, Maps]
    logits: npt.NDArray[np.float32]

    @property
    def answer(self) -> tuple[str | None, float | None]:
        """The likeliest class and its probability; None where the logits are not finite."""
        if not np.isfinite(self.logits).all():
            return None, None
        chances = metrics.softmax(self.logits[None])[0]
        return self.classes[int(chances.argmax())], float(chances.max())

    @property
    def truth(self) -> str | None:
        label = self.picture.label
        return None if label is None else self.classes[label]

    def numbers(self) -> list[LayerNumbers]:
        return [_numbers(name, maps) for name, maps in self.maps.items()]

    def to_dict(self) -> dict[str, Any]:
        label, probability = self.answer
        stages = [asdict(each) for each in self.numbers()]
        return {"label": label, "prob": probability, "stages": stages}


def see(subject: Subject, picture: Picture, names: Sequence[str]) -> Activity:
    """The network's layers `names` for a picture."""
    # One pass for both; a subject's network is in eval mode.
    with torch.inference_mode(), layers.recording(subject.model, names) as outputs:
        logits = subject.model(subject.prepared(picture.pixels[None])).float()
    maps = layers.as_maps(outputs, names)
    arrays = {name: value[0].cpu().numpy() for name, value in maps.items()}
    return Activity(subject.name, subject.classes, picture, arrays, logits[0].cpu().numpy())


def blank(maps: Maps) -> npt.NDArray[np.bool_]:
    """bool `[C]`: channels that show nothing, being the same everywhere.

    A map of a single value is always that; it is blank if it is zero.
    """
    flat = maps.reshape(len(maps), -1)
    if flat.shape[1] == 1:
        return np.asarray(flat[:, 0] == 0)
    return np.asarray((flat == flat[:, :1]).all(1))  # NaN is equal to nothing


def broken(maps: Maps) -> npt.NDArray[np.bool_]:
    """bool `[C]`: channels with a value that is NaN or infinite."""
    return np.asarray(~np.isfinite(maps.reshape(len(maps), -1)).all(1))


def order(maps: Maps, how: str) -> npt.NDArray[np.int64]:
    """The channels in the order they are shown in: most active first, or by index.

    Active means the mean of the absolute values; broken channels come first, to be seen.

    Raises:
        UsageError: no such order.
    """
    pick(dict.fromkeys(ORDERS), how, "order")
    if how == "index":
        return np.arange(len(maps))
    strength = np.abs(maps.reshape(len(maps), -1)).mean(1, dtype=np.float64)
    return np.argsort(np.where(broken(maps), -np.inf, -strength), kind="stable")


def limits(values: Sequence[Maps]) -> tuple[float, float]:
    """The values of the first and last colour, shared by the maps of several networks.

    From 0 to the 99.5th percentile of their finite values; where some are negative, plus and
    minus that of their absolute values. Where hardly any differs from 0, to the greatest.
    """
    parts = [each[np.isfinite(each)] for each in values]
    finite = np.concatenate([part.ravel() for part in parts])
    if not finite.size:
        return 0.0, 0.0
    signed, sizes = bool((finite < 0).any()), np.abs(finite)
    high = float(np.percentile(sizes, PERCENTILE)) or float(sizes.max())
    return (-high if signed else 0.0), high


def check_layers(subjects: Sequence[Subject], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The layers to look at in each network: those asked for that it has, or its stages.

    Raises:
        UsageError: a name that no network has, or a network that has none of them; with near
            misses.
    """
    if not names:
        return [layers.stages(subject.model) for subject in subjects]
    there = [dict(subject.model.named_modules()) for subject in subjects]
    nowhere = [name for name in names if not any(name in each for each in there)]
    found = []
    for subject, each in zip(subjects, there, strict=True):
        mine = [name for name in dict.fromkeys(names) if name in each and name]
        if nowhere or not mine:
            layers.find(subject.model, nowhere or names)
            raise UsageError(f"{subject.name} has no layer {', '.join(names)}")  # of no name: ""
        found.append(tuple(mine))
    return found


def _numbers(name: str, maps: Maps) -> LayerNumbers:
    finite = maps[np.isfinite(maps)]
    none = not finite.size
    return LayerNumbers(
        layer=name,
        channels=maps.shape[0],
        height=maps.shape[1],
        width=maps.shape[2],
        blank=int(blank(maps).sum()),
        broken=int(broken(maps).sum()),
        mean=None if none else float(finite.mean(dtype=np.float64)),
        active=None if none else float((finite > 0).mean()),
    )

"""What the layers of a network give for one picture: values, numbers, and what is shown of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convlens import metrics
from convlens.errors import UsageError, lookup
from convlens.interpret import features
from convlens.interpret.inputs import InspectedModel, LookInputs, Picture
from convlens.utils.files import write_atomic

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
        probs = metrics.softmax(self.logits[None])[0]
        return self.classes[int(probs.argmax())], float(probs.max())

    @property
    def truth(self) -> str | None:
        label = self.picture.label
        return None if label is None else self.classes[label]

    def numbers(self) -> list[LayerNumbers]:
        return [_layer_numbers(name, maps) for name, maps in self.maps.items()]

    def to_dict(self) -> dict[str, Any]:
        label, probability = self.answer
        stages = [asdict(each) for each in self.numbers()]
        return {"label": label, "prob": probability, "stages": stages}


def compute_activity(subject: InspectedModel, picture: Picture, names: Sequence[str]) -> Activity:
    """The network's layers `names` for a picture."""
    # One pass for both; a subject's network is in eval mode.
    with torch.inference_mode(), features.record_outputs(subject.model, names) as outputs:
        logits = subject.model(subject.prepared(picture.pixels[None])).float()
    maps = features.as_maps(outputs, names)
    arrays = {name: value[0].cpu().numpy() for name, value in maps.items()}
    return Activity(subject.name, subject.classes, picture, arrays, logits[0].cpu().numpy())


def blank_channels(maps: Maps) -> npt.NDArray[np.bool_]:
    """bool `[C]`: channels that show nothing, being the same everywhere.

    A map of a single value is always that; it is blank if it is zero.
    """
    flat = maps.reshape(len(maps), -1)
    if flat.shape[1] == 1:
        return np.asarray(flat[:, 0] == 0)
    return np.asarray((flat == flat[:, :1]).all(1))  # NaN is equal to nothing


def broken_channels(maps: Maps) -> npt.NDArray[np.bool_]:
    """bool `[C]`: channels with a value that is NaN or infinite."""
    return np.asarray(~np.isfinite(maps.reshape(len(maps), -1)).all(1))


def channel_order(maps: Maps, how: str) -> npt.NDArray[np.int64]:
    """The channels in the order they are shown in: most active first, or by index.

    Active means the mean of the absolute values; broken channels come first, to be seen.

    Raises:
        UsageError: no such order.
    """
    lookup(dict.fromkeys(ORDERS), how, "order")
    if how == "index":
        return np.arange(len(maps))
    strength = np.abs(maps.reshape(len(maps), -1)).mean(1, dtype=np.float64)
    return np.argsort(np.where(broken_channels(maps), -np.inf, -strength), kind="stable")


def channel_limits(values: Sequence[Maps]) -> tuple[float, float]:
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


def check_layers(subjects: Sequence[InspectedModel], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The layers to look at in each network: those asked for that it has, or its stages.

    Raises:
        UsageError: a name that no network has, or a network that has none of them; with near
            misses.
    """
    if not names:
        return [features.stage_names(subject.model) for subject in subjects]
    there = [dict(subject.model.named_modules()) for subject in subjects]
    nowhere = [name for name in names if not any(name in each for each in there)]
    found = []
    for subject, each in zip(subjects, there, strict=True):
        mine = [name for name in dict.fromkeys(names) if name in each and name]
        if nowhere or not mine:
            features.find_layers(subject.model, nowhere or names)
            raise UsageError(f"{subject.name} has no layer {', '.join(names)}")  # of no name: ""
        found.append(tuple(mine))
    return found


def _layer_numbers(name: str, maps: Maps) -> LayerNumbers:
    finite = maps[np.isfinite(maps)]
    none = not finite.size
    return LayerNumbers(
        layer=name,
        channels=maps.shape[0],
        height=maps.shape[1],
        width=maps.shape[2],
        blank=int(blank_channels(maps).sum()),
        broken=int(broken_channels(maps).sum()),
        mean=None if none else float(finite.mean(dtype=np.float64)),
        active=None if none else float((finite > 0).mean()),
    )


# ---- drawing ----------------------------------------
# Figures and raw arrays of what the layers of networks make of an image.

CHANNELS_SHOWN = 64  # shown of a layer


def draw_activations(
    opened: LookInputs, seen: Sequence[Activity], name: str, order: str, channels: int | None
) -> list[Path]:
    """One figure and one file of arrays a network, and a figure with all side by side.

    Args:
        seen: what each network makes of the same image.
        name: of the files, without ending.
        order, channels: which channels are shown, as in `looking.Options`.
    """
    from convlens import plots

    scales = _scales(seen)
    orders = [{n: channel_order(m, order) for n, m in a.maps.items()} for a in seen]
    count = channels or CHANNELS_SHOWN
    shown = seen[0].picture.name
    is_ = describe_truth(seen)
    label = f"truth: {is_}" if is_ else "truth unknown"
    paths, columns = [], []
    for number, each in enumerate(seen):
        panels = [
            _panel(layer, maps, orders[number][layer], scales[number][index], count)
            for index, (layer, maps) in enumerate(each.maps.items())
        ]
        columns.append(plots.Column(opened.names[number], describe_prediction(each), panels))
        ending = f"-{opened.slugs[number]}" if len(seen) > 1 else ""
        path = opened.folder / f"{name}-activations{ending}"
        words = f"{label}; answer: {describe_prediction(each)}"
        title = f"{opened.names[number]}, {shown}"
        how = _scale_words(order, False)
        pixels = each.picture.pixels.numpy()
        figure = plots.activations(pixels, panels, title, words, how)
        paths += [save_arrays(figure, path), _arrays(each, orders[number], path)]
    if len(seen) > 1:
        how = _scale_words(order, True)
        pixels = seen[0].picture.pixels.numpy()
        figure = plots.activations_side_by_side(pixels, columns, shown, label, how)
        paths.append(save_arrays(figure, opened.folder / f"{name}-activations"))
    return paths


def activation_figure(seen: Activity, title: str, *, channels: int = CHANNELS_SHOWN) -> bytes:
    """One network's activations for one image as a PNG, most active channels first."""
    from convlens import plots

    panels = [
        _panel(layer, maps, channel_order(maps, "active"), channel_limits([maps]), channels)
        for layer, maps in seen.maps.items()
    ]
    words = f"truth: {seen.truth or 'unknown'}; answer: {describe_prediction(seen)}"
    how = _scale_words("active", False)
    pixels = seen.picture.pixels.numpy()
    return plots.encode_png(plots.activations(pixels, panels, title, words, how))


def _scales(seen: Sequence[Activity]) -> list[list[tuple[float, float]]]:
    """Limits by network and place of the layer, shared by networks whose layers are the same."""
    alone = len({tuple(each.maps) for each in seen}) > 1
    if alone:
        return [[channel_limits([maps]) for maps in each.maps.values()] for each in seen]
    shared = [channel_limits([each.maps[name] for each in seen]) for name in seen[0].maps]
    return [shared] * len(seen)


def _panel(layer: str, maps: Maps, order: Any, limits: tuple[float, float], count: int) -> Any:
    from convlens import plots

    shown = order[:count]
    blank, broken = blank_channels(maps), broken_channels(maps)
    channels, high, wide = maps.shape
    amount = f"{len(shown):,} of {channels:,}" if len(shown) < channels else f"all {channels:,}"
    amount += f", {broken.sum():,} NaN" if broken.any() else ""
    note = f"{high}×{wide}, {blank.sum():,} blank, "
    low, top = limits
    note += f"±{top:.3g}" if low < 0 else f"0–{top:.3g}"
    return plots.Panel(f"{layer}: {amount}", note, maps[shown], limits, blank[shown], broken[shown])


def _scale_words(order: str, several: bool) -> str:
    first = "most active channels first" if order == "active" else "channels by index"
    over = ", shared by the networks where their layers are the same" if several else ""
    return f"max: 99.5th percentile of the layer's values for this image{over}; {first}"


def describe_prediction(seen: Activity) -> str:
    """A network's answer as words."""
    label, probability = seen.answer
    return "none (NaN)" if label is None else f"{label} {probability:.1%}"


def _arrays(seen: Activity, orders: Mapping[str, Any], path: Path) -> Path:
    """The raw values: float32 `[C, h, w]` by layer, and what is needed to read them."""
    return pack_arrays(
        path,
        {
            **seen.maps,
            **{f"order:{name}": order for name, order in orders.items()},
            "image:pixels": seen.picture.pixels.numpy(),
            "image:logits": seen.logits,
            "image:classes": np.array(seen.classes),
        },
    )


def describe_truth(seen: Sequence[Activity]) -> str | None:
    """The class of an image by name, as far as any of the networks knows it."""
    return next((each.truth for each in seen if each.truth is not None), None)


def save_arrays(figure: Any, path: Path) -> Path:
    """A figure at that path, with `.png` appended."""
    from convlens import plots

    path = path.parent / f"{path.name}.png"  # a layer's name has points that are no ending
    plots.save_figure(figure, path)
    return path


def pack_arrays(path: Path, arrays: Mapping[str, Any]) -> Path:
    """Arrays at that path, as `.npz`."""
    path = path.parent / f"{path.name}.npz"
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomic(path, content.getvalue())
    return path

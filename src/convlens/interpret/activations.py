"""Activations of the layers of networks for one image: values, statistics, figures and arrays."""

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
SCALE_PERCENTILE = 99.5  # of the absolute values: the end of a color scale
ORDERS = ("active", "index")
CHANNELS_SHOWN = 64  # of each layer


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a layer's output for one image.

    Attributes:
        channels, height, width: shape of the output.
        blank: number of channels that are constant over the map (for a single value: zero).
        broken: number of channels with NaN or infinite values.
        mean: over all finite values; None if there are none.
        active: share of the finite values above zero; None if there are none.
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
    """The outputs of a network for one image.

    Attributes:
        run: name of the network.
        classes: its classes.
        picture: the image.
        maps: float32 `[C, h, w]` by layer.
        logits: float32 `[K]`.
        temperature: of the model; the probability is that of the logits divided by it.
    """

    run: str
    classes: tuple[str, ...]
    picture: Picture
    maps: dict[str, Maps]
    logits: npt.NDArray[np.float32]
    temperature: float = 1.0

    @property
    def prediction(self) -> tuple[str | None, float | None]:
        """The most probable class and its probability; None if the logits are not finite."""
        if not np.isfinite(self.logits).all():
            return None, None
        probs = metrics.softmax(self.logits[None], self.temperature)[0]
        return self.classes[int(probs.argmax())], float(probs.max())

    @property
    def truth(self) -> str | None:
        """The class of the image, if known."""
        label = self.picture.label
        return None if label is None else self.classes[label]

    def numbers(self) -> list[LayerStatistics]:
        """Return the statistics of each layer."""
        return [_layer_statistics(name, maps) for name, maps in self.maps.items()]

    def to_dict(self) -> dict[str, Any]:
        label, probability = self.prediction
        stages = [asdict(each) for each in self.numbers()]
        return {"label": label, "prob": probability, "stages": stages}


def compute_activity(subject: InspectedModel, picture: Picture, names: Sequence[str]) -> Activity:
    """Compute the outputs of the layers `names` and the logits for an image, in one pass."""
    with torch.inference_mode(), features.record_outputs(subject.model, names) as outputs:
        logits = subject.model(subject.prepared(picture.pixels[None])).float()
    maps = features.as_maps(outputs, names)
    arrays = {name: value[0].cpu().numpy() for name, value in maps.items()}
    return Activity(
        subject.name,
        subject.classes,
        picture,
        arrays,
        logits[0].cpu().numpy(),
        subject.loaded.calibration.temperature,
    )


def check_layers(subjects: Sequence[InspectedModel], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the layers of each network: those of `names` that it has, or by default its stages.

    Raises:
        UsageError: a name that no network has, or a network that has none of them, with close
            matches.
    """
    if not names:
        return [features.stage_names(subject.model) for subject in subjects]
    modules = [dict(subject.model.named_modules()) for subject in subjects]
    unknown = [name for name in names if not any(name in known for known in modules)]
    layers = []
    for subject, known in zip(subjects, modules, strict=True):
        present = [name for name in dict.fromkeys(names) if name in known and name]
        if unknown or not present:
            features.find_layers(subject.model, unknown or names)
            # `find_layers` accepts what is left here: the empty name of the network itself.
            raise UsageError(f"{subject.name} has no layer {', '.join(names)}")
        layers.append(tuple(present))
    return layers


# Channels


def blank_channels(maps: Maps) -> npt.NDArray[np.bool_]:
    """Return a mask `[C]` of channels that are constant over the map.

    A map of a single value is blank if it is zero.
    """
    flat = maps.reshape(len(maps), -1)
    if flat.shape[1] == 1:
        return np.asarray(flat[:, 0] == 0)
    return np.asarray((flat == flat[:, :1]).all(1))  # NaN is not equal to itself: never blank


def broken_channels(maps: Maps) -> npt.NDArray[np.bool_]:
    """Return a mask `[C]` of channels with a value that is NaN or infinite."""
    return np.asarray(~np.isfinite(maps.reshape(len(maps), -1)).all(1))


def channel_order(maps: Maps, order: str) -> npt.NDArray[np.int64]:
    """Return the channels in the order in which they are shown.

    Args:
        maps: float32 `[C, h, w]`.
        order: `index`, or `active` for decreasing mean absolute value, with broken channels first
            so that they are not missed.

    Raises:
        UsageError: an unknown order.
    """
    lookup(dict.fromkeys(ORDERS), order, "order")
    if order == "index":
        return np.arange(len(maps))
    strength = np.abs(maps.reshape(len(maps), -1)).mean(1, dtype=np.float64)
    return np.argsort(np.where(broken_channels(maps), -np.inf, -strength), kind="stable")


def channel_limits(values: Sequence[Maps]) -> tuple[float, float]:
    """Return the ends of the color scale that the maps of one or several networks share.

    The upper end is the 99.5th percentile of the finite absolute values, or their maximum if that
    percentile is 0. The lower end is 0, or minus the upper end if there are negative values.
    """
    finite = np.concatenate([each[np.isfinite(each)].ravel() for each in values])
    if not finite.size:
        return 0.0, 0.0
    signed, magnitudes = bool((finite < 0).any()), np.abs(finite)
    high = float(np.percentile(magnitudes, SCALE_PERCENTILE)) or float(magnitudes.max())
    return (-high if signed else 0.0), high


def _layer_statistics(name: str, maps: Maps) -> LayerStatistics:
    finite = maps[np.isfinite(maps)]
    return LayerStatistics(
        layer=name,
        channels=maps.shape[0],
        height=maps.shape[1],
        width=maps.shape[2],
        blank=int(blank_channels(maps).sum()),
        broken=int(broken_channels(maps).sum()),
        mean=float(finite.mean(dtype=np.float64)) if finite.size else None,
        active=float((finite > 0).mean()) if finite.size else None,
    )


# Figures and arrays


def draw_activations(
    opened: LookInputs,
    activities: Sequence[Activity],
    name: str,
    order: str,
    channels: int | None,
) -> list[Path]:
    """Write a figure and an array file for each network, and a figure with all side by side.

    Args:
        opened: the networks and the folder.
        activities: the outputs of each network for the same image.
        name: of the files, without suffix.
        order: of the channels, see `channel_order`.
        channels: how many channels of each layer are shown; by default `CHANNELS_SHOWN`.

    Returns:
        The files.
    """
    from convlens import plots

    limits = _color_limits(activities)
    orders = [
        {layer: channel_order(maps, order) for layer, maps in activity.maps.items()}
        for activity in activities
    ]
    count = channels or CHANNELS_SHOWN
    pixels = activities[0].picture.pixels.numpy()
    image_name = activities[0].picture.name
    truth = describe_truth(activities)
    label = f"truth: {truth}" if truth else "truth unknown"
    several = len(activities) > 1
    paths, columns = [], []
    for number, activity in enumerate(activities):
        panels = [
            _panel(layer, maps, orders[number][layer], limits[number][index], count)
            for index, (layer, maps) in enumerate(activity.maps.items())
        ]
        prediction = describe_prediction(activity)
        columns.append(plots.Column(opened.names[number], prediction, panels))
        suffix = f"-{opened.slugs[number]}" if several else ""
        path = opened.folder / f"{name}-activations{suffix}"
        figure = plots.activations(
            activity.picture.pixels.numpy(),
            panels,
            f"{opened.names[number]}, {image_name}",
            f"{label}; prediction: {prediction}",
            _scale_note(order, shared=False),
        )
        paths += [write_figure(figure, path), _write_activity(activity, orders[number], path)]
    if several:
        figure = plots.activations_side_by_side(
            pixels, columns, image_name, label, _scale_note(order, shared=True)
        )
        paths.append(write_figure(figure, opened.folder / f"{name}-activations"))
    return paths


def activation_figure(activity: Activity, title: str, *, channels: int = CHANNELS_SHOWN) -> bytes:
    """Return a PNG of a network's activations for one image, the most active channels first."""
    from convlens import plots

    panels = [
        _panel(layer, maps, channel_order(maps, "active"), channel_limits([maps]), channels)
        for layer, maps in activity.maps.items()
    ]
    truth = activity.truth or "unknown"
    words = f"truth: {truth}; prediction: {describe_prediction(activity)}"
    pixels = activity.picture.pixels.numpy()
    note = _scale_note("active", shared=False)
    return plots.encode_png(plots.activations(pixels, panels, title, words, note))


def _color_limits(activities: Sequence[Activity]) -> list[list[tuple[float, float]]]:
    """Return limits by network and layer, shared by networks with the same layers."""
    if len({tuple(activity.maps) for activity in activities}) > 1:
        return [
            [channel_limits([maps]) for maps in activity.maps.values()] for activity in activities
        ]
    shared = [
        channel_limits([activity.maps[layer] for activity in activities])
        for layer in activities[0].maps
    ]
    return [shared] * len(activities)


def _panel(
    layer: str, maps: Maps, order: Any, limits: tuple[float, float], max_channels: int
) -> Any:
    from convlens import plots

    shown = order[:max_channels]
    blank, broken = blank_channels(maps), broken_channels(maps)
    channels, height, width = maps.shape
    amount = f"{len(shown):,} of {channels:,}" if len(shown) < channels else f"all {channels:,}"
    amount += f", {broken.sum():,} NaN" if broken.any() else ""
    low, high = limits
    scale = f"±{high:.3g}" if low < 0 else f"0–{high:.3g}"
    note = f"{height}×{width}, {blank.sum():,} blank, {scale}"
    return plots.Panel(f"{layer}: {amount}", note, maps[shown], limits, blank[shown], broken[shown])


def _scale_note(order: str, *, shared: bool) -> str:
    networks = ", shared by the networks if their layers are the same" if shared else ""
    channels = "most active channels first" if order == "active" else "channels by index"
    return f"max: 99.5th percentile of the layer's values for this image{networks}; {channels}"


def describe_prediction(activity: Activity) -> str:
    """Return a network's prediction and its probability in words."""
    label, probability = activity.prediction
    return "none (NaN)" if label is None else f"{label} {probability:.1%}"


def describe_truth(activities: Sequence[Activity]) -> str | None:
    """Return the class of an image, if any of the networks knows it."""
    return next((each.truth for each in activities if each.truth is not None), None)


def _write_activity(activity: Activity, orders: Mapping[str, Any], path: Path) -> Path:
    """Write the maps by layer, with the channel orders, image, logits and classes."""
    return write_arrays(
        path,
        {
            **activity.maps,
            **{f"order:{name}": order for name, order in orders.items()},
            "image:pixels": activity.picture.pixels.numpy(),
            "image:logits": activity.logits,
            "image:classes": np.array(activity.classes),
        },
    )


def write_figure(figure: Any, path: Path) -> Path:
    """Write a figure to `path` with `.png` appended, and return the file."""
    from convlens import plots

    path = (
        path.parent / f"{path.name}.png"
    )  # names of layers contain dots that do not start a suffix
    plots.save_figure(figure, path)
    return path


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> Path:
    """Write arrays to `path` with `.npz` appended, and return the file."""
    path = path.parent / f"{path.name}.npz"
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomic(path, content.getvalue())
    return path

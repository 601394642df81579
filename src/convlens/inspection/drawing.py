"""Figures and raw arrays of what the layers of networks make of an image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convlens.inspection import activity
from convlens.inspection.activity import Activity
from convlens.inspection.choosing import Opened
from convlens.system.files import write_atomic

CHANNELS = 64  # shown of a layer


def draw_activations(
    opened: Opened, seen: Sequence[Activity], name: str, order: str, channels: int | None
) -> list[Path]:
    """One figure and one file of arrays a network, and a figure with all side by side.

    Args:
        seen: what each network makes of the same image.
        name: of the files, without ending.
        order, channels: which channels are shown, as in `looking.Options`.
    """
    from convlens import plots

    scales = _scales(seen)
    orders = [{n: activity.order(m, order) for n, m in a.maps.items()} for a in seen]
    count = channels or CHANNELS
    shown = seen[0].picture.name
    is_ = truth(seen)
    label = f"truth: {is_}" if is_ else "truth unknown"
    paths, columns = [], []
    for number, each in enumerate(seen):
        panels = [
            _panel(layer, maps, orders[number][layer], scales[number][place], count)
            for place, (layer, maps) in enumerate(each.maps.items())
        ]
        columns.append(plots.Column(opened.names[number], said(each), panels))
        ending = f"-{opened.slugs[number]}" if len(seen) > 1 else ""
        path = opened.folder / f"{name}-activations{ending}"
        words = f"{label}; answer: {said(each)}"
        title = f"{opened.names[number]}, {shown}"
        how = _scale_words(order, False)
        pixels = each.picture.pixels.numpy()
        figure = plots.activations(pixels, panels, title, words, how)
        paths += [save(figure, path), _arrays(each, orders[number], path)]
    if len(seen) > 1:
        how = _scale_words(order, True)
        pixels = seen[0].picture.pixels.numpy()
        figure = plots.activations_side_by_side(pixels, columns, shown, label, how)
        paths.append(save(figure, opened.folder / f"{name}-activations"))
    return paths


def activation_figure(seen: Activity, title: str, *, channels: int = CHANNELS) -> bytes:
    """One network's activations for one image as a PNG, most active channels first."""
    from convlens import plots

    panels = [
        _panel(layer, maps, activity.order(maps, "active"), activity.limits([maps]), channels)
        for layer, maps in seen.maps.items()
    ]
    words = f"truth: {seen.truth or 'unknown'}; answer: {said(seen)}"
    how = _scale_words("active", False)
    pixels = seen.picture.pixels.numpy()
    return plots.encoded(plots.activations(pixels, panels, title, words, how))


def _scales(seen: Sequence[Activity]) -> list[list[tuple[float, float]]]:
    """Limits by network and place of the layer, shared by networks whose layers are the same."""
    alone = len({tuple(each.maps) for each in seen}) > 1
    if alone:
        return [[activity.limits([maps]) for maps in each.maps.values()] for each in seen]
    shared = [activity.limits([each.maps[name] for each in seen]) for name in seen[0].maps]
    return [shared] * len(seen)


def _panel(
    layer: str, maps: activity.Maps, order: Any, limits: tuple[float, float], count: int
) -> Any:
    from convlens import plots

    shown = order[:count]
    blank, broken = activity.blank(maps), activity.broken(maps)
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


def said(seen: Activity) -> str:
    """A network's answer as words."""
    label, probability = seen.answer
    return "none (NaN)" if label is None else f"{label} {probability:.1%}"


def _arrays(seen: Activity, orders: Mapping[str, Any], path: Path) -> Path:
    """The raw values: float32 `[C, h, w]` by layer, and what is needed to read them."""
    return pack(
        path,
        {
            **seen.maps,
            **{f"order:{name}": order for name, order in orders.items()},
            "image:pixels": seen.picture.pixels.numpy(),
            "image:logits": seen.logits,
            "image:classes": np.array(seen.classes),
        },
    )


def truth(seen: Sequence[Activity]) -> str | None:
    """The class of an image by name, as far as any of the networks knows it."""
    return next((each.truth for each in seen if each.truth is not None), None)


def save(figure: Any, path: Path) -> Path:
    """A figure at that path, with `.png` appended."""
    from convlens import plots

    path = path.parent / f"{path.name}.png"  # a layer's name has points that are no ending
    plots.save(figure, path)
    return path


def pack(path: Path, arrays: Mapping[str, Any]) -> Path:
    """Arrays at that path, as `.npz`."""
    path = path.parent / f"{path.name}.npz"
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomic(path, content.getvalue())
    return path

"""`convlens look`: what is inside a network, as pictures, raw arrays and a short table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convlens.console import say
from convlens.errors import UsageError
from convlens.files import write_atomic
from convlens.inspection import activity, dreaming, filters, toppers
from convlens.inspection.activity import Activity
from convlens.inspection.choosing import Opened, file_names
from convlens.inspection.subjects import Subject
from convlens.names import pick

CHANNELS = 64  # shown of a layer
KERNELS = 48  # channels shown of a deeper layer's kernels: a row each
ROWS = 16  # channels shown with their strongest images
FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True)
class Options:
    """What is looked at, and how it is drawn.

    Args:
        layers: names of layers, by default the stem and each block.
        order: of the channels, `active` (most active first) or `index`.
        channels: how many are shown of each layer; by default 64 of activations and filters, 48
            rows of deeper kernels, 16 channels with their images.
        filters: layers whose kernels are shown; `first` is the first convolution.
        top_images: layers whose channels' strongest images are shown.
        dream: `LAYER[:CHANNEL,...]`: a made input for each of these channels.
        split, data: where strongest images come from: a split of the run's own data, or of
            another set.
        format: of figures: `png`, `svg` or `pdf`.
        seed: of made inputs.
    """

    layers: Sequence[str] = ()
    order: str = "active"
    channels: int | None = None
    filters: Sequence[str] = ()
    top_images: Sequence[str] = ()
    dream: Sequence[str] = ()
    split: str = "test"
    data: str | Path | None = None
    format: str = "png"
    seed: int = 0

    def check(self) -> None:
        """Refuses what can't be before anything is opened."""
        pick(dict.fromkeys(activity.ORDERS), self.order, "order")
        pick(dict.fromkeys(FORMATS), self.format, "format")
        pick(dict.fromkeys(("test", "val", "train")), self.split, "split")
        for text in self.dream:
            dreaming.asked(text)
        if self.channels is not None and self.channels < 1:
            raise UsageError(f"--channels {self.channels}: show at least one")

    @property
    def only(self) -> bool:
        """Whether something is asked for that needs no images."""
        return bool(self.filters or self.top_images or self.dream)


@dataclass
class Look:
    """What was seen, and the files it was written to.

    `seen` has the activities of each image, one a network; `filters`, `top_images` and `made`
    what was asked for beyond.
    """

    opened: Opened
    seen: list[tuple[Activity, ...]] = field(default_factory=list)
    filters: list[filters.Filters] = field(default_factory=list)
    top_images: list[toppers.TopImages] = field(default_factory=list)
    made: list[dreaming.Made] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    rows: int = ROWS

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `convlens look --json` prints."""
        names = self.opened.names
        images = [
            {
                "name": each[0].picture.name,
                "truth": truth(each),
                "runs": {n: one.to_dict() for n, one in zip(names, each, strict=True)},
            }
            for each in self.seen
        ]
        return {
            "runs": names,
            "images": images,
            "filters": [each.to_dict() for each in self.filters],
            "top_images": [each.to_dict(self.rows) for each in self.top_images],
            "made": [each.to_dict() for each in self.made],
            "folder": str(self.opened.folder),
            "files": [str(path) for path in self.files],
        }


def look(opened: Opened, options: Options) -> Look:
    """Draws everything asked for into the opened folder, with the raw arrays beside.

    Raises:
        UsageError: layers, channels or classes that aren't there. DataError: images that can't
            be had.
    """
    found = Look(opened, rows=options.channels or ROWS)
    chosen = activity.check_layers(opened.subjects, options.layers)
    for pictures, name in zip(opened.pictures, file_names(opened.pictures), strict=True):
        rows = zip(opened.subjects, pictures, chosen, strict=True)
        seen = tuple(activity.see(subject, each, names) for subject, each, names in rows)
        found.seen.append(seen)
        found.files += _activations(opened, seen, name, options)
    for number, subject in enumerate(opened.subjects):
        ending = f"-{opened.slugs[number]}" if len(opened.subjects) > 1 else ""
        _kernels(found, subject, ending, options)
        _images(found, subject, ending, options)
    return found


def truth(seen: Sequence[Activity]) -> str | None:
    """The class of an image by name, as far as any of the networks knows it."""
    return next((each.truth for each in seen if each.truth is not None), None)


def _activations(
    opened: Opened, seen: Sequence[Activity], name: str, options: Options
) -> list[Path]:
    """Figures and arrays of one image: one each a network, and all side by side."""
    from convlens import plots

    scales = _scales(seen)
    orders = [{n: activity.order(m, options.order) for n, m in a.maps.items()} for a in seen]
    count = options.channels or CHANNELS
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
        how = _scale_words(options.order, False)
        pixels = each.picture.pixels.numpy()
        figure = plots.activations(pixels, panels, title, words, how)
        paths += [_draw(figure, path, options.format), _arrays(each, orders[number], path)]
    if len(seen) > 1:
        how = _scale_words(options.order, True)
        pixels = seen[0].picture.pixels.numpy()
        figure = plots.activations_side_by_side(pixels, columns, shown, label, how)
        paths.append(_draw(figure, opened.folder / f"{name}-activations", options.format))
    return paths


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
    return _pack(
        path,
        {
            **seen.maps,
            **{f"order:{name}": order for name, order in orders.items()},
            "image:pixels": seen.picture.pixels.numpy(),
            "image:logits": seen.logits,
            "image:classes": np.array(seen.classes),
        },
    )


def _kernels(found: Look, subject: Subject, ending: str, options: Options) -> None:
    for layer in options.filters:
        each = filters.read(subject, layer)
        default = CHANNELS if each.coloured else KERNELS
        figure = filters.figure(each, options.channels or default)
        path = found.opened.folder / f"filters-{each.layer}{ending}"
        arrays: dict[str, Any] = {
            "weights": each.weights,
            "order": each.order,
            "energy": each.energy,
        }
        found.filters.append(each)
        found.files += [_draw(figure, path, options.format), _pack(path, arrays)]


def _images(found: Look, subject: Subject, ending: str, options: Options) -> None:
    """Strongest images, and made inputs, which are compared with them."""
    wanted = [dreaming.asked(text) for text in options.dream]
    layers_ = [*options.top_images, *(layer for layer, _ in wanted)]
    activity.check_layers([subject], layers_)
    own = subject.place is not None or options.data is not None
    split = subject.split(options.split, options.data) if layers_ and (
        own or options.top_images
    ) else None  # fmt: skip
    name = options.split if options.data is None else Path(str(options.data)).name
    known: dict[str, toppers.TopImages] = {}
    for layer in dict.fromkeys(layers_):
        if split is not None:
            known[layer] = toppers.strongest(subject, split, layer, name)
    folder = found.opened.folder
    for layer in options.top_images:
        each = known[layer]
        assert split is not None
        figure = toppers.figure(each, split, found.rows)
        path = folder / f"top-images-{layer}{ending}"
        arrays: dict[str, Any] = {"peaks": each.peaks, "images": each.images, "places": each.places}
        arrays |= {"selectivity": each.selectivity, "labels": each.labels}
        found.top_images.append(each)
        found.files += [_draw(figure, path, options.format), _pack(path, arrays)]
    for layer, channels in wanted:
        made = dreaming.make(subject, layer, channels, known=known.get(layer), seed=options.seed)
        path = folder / f"made-{layer}{ending}"
        arrays = {"images": made.images, "channels": np.array(made.channels)}
        arrays |= {"peaks": np.array(made.peaks), "means": np.array(made.means)}
        found.made.append(made)
        figure = dreaming.figure(made)
        found.files += [_draw(figure, path, options.format), _pack(path, arrays)]
    if wanted and split is None:
        say(f"{subject.name} has no data of its own: name a set with --data to compare with")


def _draw(figure: Any, path: Path, kind: str) -> Path:
    from convlens import plots

    path = path.parent / f"{path.name}.{kind}"  # a layer's name has points that are no ending
    plots.save(figure, path)
    return path


def _pack(path: Path, arrays: Mapping[str, Any]) -> Path:
    path = path.parent / f"{path.name}.npz"
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomic(path, content.getvalue())
    return path

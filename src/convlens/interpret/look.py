"""`convlens look`: what is inside networks, as pictures, raw arrays and short tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convlens.device import preserve_torch_settings
from convlens.errors import UsageError, lookup
from convlens.interpret import activations, attribution, attribution_methods, embedding, feature_viz
from convlens.interpret.activations import (
    CHANNELS_SHOWN,
    Activity,
    describe_truth,
    draw_activations,
    pack_arrays,
    save_arrays,
)
from convlens.interpret.inputs import InspectedModel, LookInputs, file_names
from convlens.interpret.measure import Measurements, measure, select_measures
from convlens.utils.console import print_status

KERNELS = 48  # channels shown of a deeper layer's kernels: a row each
ROWS = 16  # channels shown with their strongest images
ALL_LAYERS = "all"


@dataclass(frozen=True)
class LookOptions:
    """What is looked at, and how it is drawn. Without any of it, the activations of images.

    Args:
        layers: names of layers, by default the stem and each block.
        order: of the channels, `active` (most active first) or `index`.
        channels: how many are shown of each layer; by default 64 of activations and filters, 48
            rows of deeper kernels, 16 channels with their images.
        filters: layers whose kernels are shown; `first` is the first convolution.
        top_images: layers whose channels' strongest images are shown.
        dream: `LAYER[:CHANNEL,...]`: a made input for each of these channels.
        attribution: methods (`saliency.METHODS`, or `all`) that say which pixels speak for a class.
        target: that class, by default the predicted one; `cam_layer`: where Grad-CAM is done;
            `sanity`: whether maps depend on the weights, and whether their places matter.
        measure: measurements of every stage (`measuring.NAMES`, or `all`); `untrained` measures
            fresh weights beside.
        embedding: `pca`, `tsne`: maps of a split's last features.
        nearest: how many training images nearest to each image are shown.
        split, data: where measured and strongest images come from: a split of the run's own
            data (by default `val`; `train` where a run held none out), or of another set.
        seed: of made inputs, measurements and maps.
    """

    layers: Sequence[str] = ()
    order: str = "active"
    channels: int | None = None
    filters: Sequence[str] = ()
    top_images: Sequence[str] = ()
    dream: Sequence[str] = ()
    attribution: Sequence[str] = ()
    target: str | None = None
    cam_layer: str | None = None
    sanity: bool = False
    measure: Sequence[str] = ()
    untrained: bool = False
    embedding: Sequence[str] = ()
    nearest: int = 0
    split: str | None = None
    data: str | Path | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuses what can't be before anything is opened."""
        lookup(dict.fromkeys(activations.ORDERS), self.order, "order")
        if self.split is not None:
            lookup(dict.fromkeys(("test", "val", "train")), self.split, "split")
        for text in self.dream:
            feature_viz.parse_dream(text)
        if self.attribution:
            attribution_methods.select_methods(self.attribution)
        for name in self.embedding:
            lookup(embedding.EMBEDDINGS, name, "embedding")
        select_measures(self.measures)
        if self.channels is not None and self.channels < 1:
            raise UsageError(f"--channels {self.channels}: show at least one")
        lone = [
            name
            for name, given, needed in (
                ("--class", self.target, self.attribution),
                ("--cam-layer", self.cam_layer, self.attribution),
                ("--sanity", self.sanity, self.attribution),
                ("--untrained", self.untrained, self.measure),
            )
            if given and not needed
        ]
        if lone:
            what = "--measure" if lone == ["--untrained"] else "--attribution METHOD"
            raise UsageError(f"{', '.join(lone)} is about something else", fix=f"add {what}")
        over_data = self.top_images or self.dream or self.measure or self.embedding
        if (self.split is not None or self.data is not None) and not over_data:
            name = "--split" if self.split is not None else "--data"
            raise UsageError(
                f"{name} is about something else",
                fix="add --measure, --embedding, --top-images or --dream; of a split's images "
                "val:17, test:17 or train:17 are one",
            )

    @property
    def measures(self) -> Sequence[str]:
        """The measurements by name; `all` of them is an empty list to `measuring`."""
        return () if ALL_LAYERS in self.measure else self.measure

    @property
    def needs_images(self) -> bool:
        """Whether pictures are shown to the networks even if none were named."""
        about_data = self.filters or self.top_images or self.dream or self.measure or self.embedding
        return bool(self.layers or self.attribution or self.nearest) or not about_data

    @property
    def activations(self) -> bool:
        """Whether activations are drawn of the pictures that there are."""
        return bool(self.layers) or not (
            self.attribution or self.nearest or self.measure or self.embedding
        )


@dataclass
class Look:
    """What was seen, and the files it was written to.

    `seen` has the activities of each image, one a network; the others what was asked for beyond.
    """

    opened: LookInputs = field(repr=False)
    seen: list[tuple[Activity, ...]] = field(default_factory=list, repr=False)
    filters: list[feature_viz.Filters] = field(default_factory=list)
    top_images: list[feature_viz.TopImages] = field(default_factory=list)
    made: list[feature_viz.MadeInputs] = field(default_factory=list)
    attribution: attribution.Attributions | None = None
    measures: Measurements | None = None
    embeddings: list[embedding.Embedding] = field(default_factory=list)
    neighbors: list[embedding.NeighborReport] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    rows: int = ROWS

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `convlens look --json` prints."""
        names = self.opened.names
        images = [
            {
                "name": each[0].picture.name,
                "truth": describe_truth(each),
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
            "attribution": self.attribution and self.attribution.to_dict(),
            "measures": self.measures and self.measures.to_dict(),
            "embeddings": [each.to_dict() for each in self.embeddings],
            "neighbours": [each.to_dict() for each in self.neighbors],
            "folder": str(self.opened.folder),
            "files": [str(path) for path in self.files],
        }


@preserve_torch_settings()
def look(opened: LookInputs, options: LookOptions) -> Look:
    """Draws everything asked for into the opened folder, with the raw arrays beside.

    Raises:
        UsageError: layers, channels or classes that aren't there. DataError: images that can't
            be had.
    """
    found = Look(opened, rows=options.channels or ROWS)
    if options.nearest or (options.embedding and options.data is None):
        for subject in opened.subjects:
            subject.data  # noqa: B018 (a network without data is told before anything is drawn)
    if options.activations:
        _see(found, options)
    for number, subject in enumerate(opened.subjects):
        ending = f"-{opened.slugs[number]}" if len(opened.subjects) > 1 else ""
        _kernels(found, subject, ending, options)
        _images(found, subject, ending, options)
    if options.attribution:
        found.attribution = attribution.attribute(
            opened.subjects,
            list(zip(*opened.pictures, strict=True)),
            options.attribution,
            layer=options.cam_layer,
            target=options.target,
            sanity=options.sanity,
            folder=opened.folder,
        )
        maps = found.attribution
        found.files += [maps.figure, maps.arrays, *maps.sanity_figures]
    if options.measure:
        found.measures = measure(
            opened.subjects,
            options.measures,
            folder=opened.folder,
            layers=options.layers,
            split=options.split or "val",
            data=options.data,
            untrained=options.untrained,
            seed=options.seed,
        )
        found.files += found.measures.files
    _features(found, options)
    return found


def _see(found: Look, options: LookOptions) -> None:
    opened = found.opened
    chosen = activations.check_layers(opened.subjects, options.layers)
    for pictures, name in zip(opened.pictures, file_names(opened.pictures), strict=True):
        rows = zip(opened.subjects, pictures, chosen, strict=True)
        seen = tuple(
            activations.compute_activity(subject, each, names) for subject, each, names in rows
        )
        found.seen.append(seen)
        found.files += draw_activations(opened, seen, name, options.order, options.channels)


def _features(found: Look, options: LookOptions) -> None:
    """Maps and neighbours by the last features, in a folder for each of several networks."""
    opened = found.opened
    several = len(opened.subjects) > 1
    for number, subject in enumerate(opened.subjects):
        folder = opened.folder / opened.slugs[number] if several else opened.folder
        for method in options.embedding:
            data, seed = options.data, options.seed
            split = options.split or subject.held_out(data)
            points = embedding.embed(
                subject, method, folder=folder, split=split, data=data, seed=seed
            )
            found.embeddings.append(points)
            found.files += [points.file, points.file.with_suffix(".csv")]
        if options.nearest:
            mine = [each[number] for each in opened.pictures]
            near = embedding.nearest_neighbors(subject, mine, options.nearest, folder=folder)
            found.neighbors.append(near)
            found.files.append(near.file)


def _kernels(found: Look, subject: InspectedModel, ending: str, options: LookOptions) -> None:
    for layer in options.filters:
        each = feature_viz.read_filters(subject, layer)
        default = CHANNELS_SHOWN if each.colored else KERNELS
        figure = feature_viz.filters_figure(each, options.channels or default)
        path = found.opened.folder / f"filters-{each.layer}{ending}"
        arrays: dict[str, Any] = {
            "weights": each.weights,
            "order": each.order,
            "energy": each.energy,
        }
        found.filters.append(each)
        found.files += [save_arrays(figure, path), pack_arrays(path, arrays)]


def _images(found: Look, subject: InspectedModel, ending: str, options: LookOptions) -> None:
    """Strongest images, and made inputs, which are compared with them."""
    wanted = [feature_viz.parse_dream(text) for text in options.dream]
    layers_ = [*options.top_images, *(layer for layer, _ in wanted)]
    activations.check_layers([subject], layers_)
    own = subject.run_dir is not None or options.data is not None
    split_name = options.split or (subject.held_out(options.data) if layers_ and own else "val")
    split = (
        subject.split(split_name, options.data) if layers_ and (own or options.top_images) else None
    )
    name = split_name if options.data is None else Path(str(options.data)).name
    known: dict[str, feature_viz.TopImages] = {}
    for layer in dict.fromkeys(layers_):
        if split is not None:
            known[layer] = feature_viz.top_activating(subject, split, layer, name)
    folder = found.opened.folder
    for layer in options.top_images:
        each = known[layer]
        assert split is not None
        figure = feature_viz.top_images_figure(each, split, found.rows)
        path = folder / f"top-images-{layer}{ending}"
        arrays: dict[str, Any] = {"peaks": each.peaks, "images": each.images, "places": each.places}
        arrays |= {"selectivity": each.selectivity, "labels": each.labels}
        found.top_images.append(each)
        found.files += [save_arrays(figure, path), pack_arrays(path, arrays)]
    for layer, channels in wanted:
        made = feature_viz.make_inputs(
            subject, layer, channels, known=known.get(layer), seed=options.seed
        )
        path = folder / f"made-{layer}{ending}"
        arrays = {"images": made.images, "channels": np.array(made.channels)}
        arrays |= {"peaks": np.array(made.peaks), "means": np.array(made.means)}
        found.made.append(made)
        figure = feature_viz.made_inputs_figure(made)
        found.files += [save_arrays(figure, path), pack_arrays(path, arrays)]
    if wanted and split is None:
        print_status(
            f"{subject.name} has no data of its own: name a set with --data to compare with"
        )

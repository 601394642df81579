"""The views that `convlens look` offers, each written as figures, raw arrays and short tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from convlens.device import preserve_torch_settings
from convlens.errors import UsageError, check_count, lookup, wrong_type
from convlens.evaluation import check_data, check_split
from convlens.interpret import activations, attribution, attribution_methods, embedding, feature_viz
from convlens.interpret.activations import (
    CHANNELS_SHOWN,
    Activity,
    describe_truth,
    draw_activations,
    write_arrays,
    write_figure,
)
from convlens.interpret.inputs import (
    EXAMPLES,
    EXAMPLES_FOR_CHECKS,
    InspectedModel,
    LookInputs,
    check_external_split,
    file_names,
    is_image_argument,
    is_split_position,
)
from convlens.interpret.measure import Measurements, measure, select_measures
from convlens.recipe import DataConfig
from convlens.utils import notebook
from convlens.utils.console import print_status

KERNEL_ROWS = 48  # channels of a deeper layer whose kernels are shown, one row each
TOP_IMAGE_ROWS = 16  # channels whose top images are shown, one row each
ALL = "all"
# Ready-made views: the options that `--why`, `--inside` and `--knows` stand for.
VIEWS: dict[str, dict[str, Any]] = {
    "why": {"attribution": (ALL,), "sanity": True},
    "inside": {"draw_activations": True, "filters": ("first",)},
    "knows": {"measure": (ALL,)},
}


@dataclass(frozen=True)
class LookOptions:
    """Options of `convlens look`. By default, the activations of the images are drawn.

    Args:
        layers: names of layers; by default the stem and each block.
        order: of the channels, `active` (most active first) or `index`.
        channels: how many channels of each layer are shown; by default 64 of activations and
            filters, 48 rows of deeper kernels, 16 channels with their top images.
        filters: layers whose kernels are shown; `first` is the first convolution.
        top_images: layers for whose channels the most activating images are shown.
        dream: `LAYER[:CHANNEL,...]`: optimize an input for each of these channels.
        attribution: attribution methods (`attribution_methods.METHODS`, or `all`).
        target: the class that is attributed; by default the predicted one.
        cam_layer: the layer of Grad-CAM.
        sanity: run the sanity checks of the attribution maps.
        measure: measurements of every stage (`measure.NAMES`, or `all`).
        untrained: measure the same architectures with untrained weights, too.
        embedding: `pca`, `tsne`: embeddings of the penultimate features of a split.
        nearest: how many nearest training images are shown for each image.
        split: split to measure, embed and search for top images; by default `val`, or `train` if
            the run has no validation images.
        data: another data set than the run's own; may be a data section of a recipe with the keys
            to read it.
        max_pixels: larger image files are refused; by default the limit of the training.
        draw_activations: draw the activations of the images also beside other views.
        seed: of optimized inputs, measurements and embeddings.
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
    data: str | Path | DataConfig | None = None
    max_pixels: int | None = None
    draw_activations: bool = False
    seed: int = 0

    def with_views(self, names: Sequence[str]) -> LookOptions:
        """Return a copy with the options of ready-made views (`VIEWS`) where they are not set.

        Raises:
            UsageError: unknown view.
        """
        options = self
        for name in names:
            for key, value in lookup(VIEWS, name, "view").items():
                if not getattr(options, key):
                    options = replace(options, **{key: value})
        return options

    def check(self, images: Sequence[str] = ()) -> None:
        """Check the options before anything is opened.

        Args:
            images: the arguments that name images, or that may do so.

        Raises:
            UsageError: unknown names, or options that would have no effect.
        """
        lookup(dict.fromkeys(activations.ORDERS), self.order, "order")
        if self.split is not None:
            check_split(self.split)
        for text in self.dream:
            feature_viz.parse_dream(text)
        if self.attribution:
            attribution_methods.select_methods(self.attribution)
        for name in self.embedding:
            lookup(embedding.EMBEDDINGS, name, "embedding")
        select_measures(self.measures)
        check_data(self.data)
        for name in ("channels", "max_pixels"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("nearest", "seed"):
            check_count(name, getattr(self, name), minimum=0)
        for name in ("target", "cam_layer"):
            if not isinstance(getattr(self, name), str | None):
                raise wrong_type(name, getattr(self, name), "give a name")
        self._check_effect(images)

    def _check_effect(self, images: Sequence[str]) -> None:
        attribution_options = {
            "--class": self.target,
            "--cam-layer": self.cam_layer,
            "--sanity": self.sanity,
        }
        unused = [name for name, value in attribution_options.items() if value]
        if unused and not self.attribution:
            raise UsageError(
                f"{', '.join(unused)}: no effect without --attribution",
                fix="add --attribution METHOD",
            )
        if self.untrained and not self.measure:
            raise UsageError("--untrained: no effect without --measure", fix="add --measure NAME")
        if self.split is not None and not self.uses_split:
            raise UsageError(
                "--split: no effect without --measure, --embedding, --top-images or --dream",
                fix="add one of them; to show an image of a split, name it, e.g. val:17",
            )
        from_data = self.uses_split or (
            self.needs_images and not any(map(is_image_argument, images))
        )
        if self.data is not None and not (from_data or any(map(is_split_position, images))):
            raise UsageError(
                "--data: no effect, because no image is taken from it",
                fix="name images of it (test:17, worst:5, class:NAME:3), or add --measure, "
                "--embedding, --top-images or --dream",
            )

    @property
    def measures(self) -> Sequence[str]:
        """The measurements by name; empty for `all`, as `select_measures` takes them."""
        return () if ALL in self.measure else self.measure

    @property
    def uses_split(self) -> bool:
        """Whether images of a split or data set are read."""
        return bool(self.top_images or self.dream or self.measure or self.embedding)

    @property
    def needs_images(self) -> bool:
        """Whether to choose example images if none are named."""
        shows_images = bool(
            self.draw_activations or self.layers or self.attribution or self.nearest
        )
        return shows_images or not (self.filters or self.uses_split)

    @property
    def num_examples(self) -> int:
        """How many correctly classified images to choose if none are named."""
        if not self.needs_images:
            return 0
        return EXAMPLES_FOR_CHECKS if self.sanity else EXAMPLES

    @property
    def activations(self) -> bool:
        """Whether to draw the activations of the images."""
        return bool(self.draw_activations or self.layers) or not (
            self.attribution or self.nearest or self.measure or self.embedding
        )


@dataclass(repr=False)
class Look:
    """The result of `look`.

    Attributes:
        opened: the networks and images.
        seen: activations, one `Activity` for each image and network.
        filters: kernels of convolutions.
        top_images: most activating images of channels.
        made: inputs optimized for channels.
        attribution: attribution maps, if requested.
        measures: measurements of stages, if requested.
        embeddings: embeddings of penultimate features.
        neighbors: nearest training images.
        files: all files written.
        rows: channels of `top_images` that are listed.
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
    rows: int = TOP_IMAGE_ROWS

    def __repr__(self) -> str:
        folder, count = str(self.opened.folder), len(self.files)
        return f"Look({', '.join(self.opened.names)}: {count} files in {folder!r})"

    def _repr_html_(self) -> str:
        """Return the figures for notebooks."""
        return notebook.paragraph(repr(self)) + notebook.embed_figures(self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return the output of `convlens look --json`."""
        names = self.opened.names
        images = [
            {
                "name": row[0].picture.name,
                "truth": describe_truth(row),
                "runs": {n: activity.to_dict() for n, activity in zip(names, row, strict=True)},
            }
            for row in self.seen
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
    """Write the requested figures and arrays to the folder of the inputs.

    Raises:
        UsageError: unknown layers, channels or classes.
        DataError: images that have changed, moved or can't be read.
    """
    result = Look(opened, rows=options.channels or TOP_IMAGE_ROWS)
    if options.split is not None:
        options = replace(options, split=check_split(options.split))
        if options.data is not None:
            check_external_split(opened.subjects[0], str(options.split), options.data)
    if options.nearest or (options.embedding and options.data is None):
        for subject in opened.subjects:
            subject.data  # noqa: B018 (fail before anything is drawn if a network has no data)
    if options.activations:
        _draw_activations(result, options)
    for number, subject in enumerate(opened.subjects):
        suffix = f"-{opened.slugs[number]}" if len(opened.subjects) > 1 else ""
        _draw_filters(result, subject, suffix, options)
        dreams = [feature_viz.parse_dream(text) for text in options.dream]
        layers = [*options.top_images, *(layer for layer, _ in dreams)]
        activations.check_layers([subject], layers)
        top_images = _draw_top_images(result, subject, suffix, options)
        _draw_dreams(result, subject, suffix, options, top_images)
    if options.attribution:
        result.attribution = attribution.attribute(
            opened.subjects,
            list(zip(*opened.pictures, strict=True)),
            options.attribution,
            layer=options.cam_layer,
            target=options.target,
            sanity=options.sanity,
            folder=opened.folder,
        )
        maps = result.attribution
        result.files += [maps.figure, maps.arrays, *maps.sanity_figures]
    if options.measure:
        result.measures = measure(
            opened.subjects,
            options.measures,
            folder=opened.folder,
            layers=options.layers,
            split=options.split or "val",
            data=options.data,
            untrained=options.untrained,
            seed=options.seed,
        )
        result.files += result.measures.files
    for number, subject in enumerate(opened.subjects):
        _draw_features(result, number, subject, options)
    for subject in opened.subjects:  # last: a command that fails costs no use of the test split
        subject.log_test_use("look")
    return result


def _draw_activations(result: Look, options: LookOptions) -> None:
    opened = result.opened
    layers = activations.check_layers(opened.subjects, options.layers)
    for pictures, name in zip(opened.pictures, file_names(opened.pictures), strict=True):
        activities = tuple(
            activations.compute_activity(subject, picture, names)
            for subject, picture, names in zip(opened.subjects, pictures, layers, strict=True)
        )
        result.seen.append(activities)
        result.files += draw_activations(opened, activities, name, options.order, options.channels)


def _draw_filters(result: Look, subject: InspectedModel, suffix: str, options: LookOptions) -> None:
    for layer in options.filters:
        filters = feature_viz.read_filters(subject, layer)
        default = CHANNELS_SHOWN if filters.colored else KERNEL_ROWS
        figure = feature_viz.filters_figure(filters, options.channels or default)
        path = result.opened.folder / f"filters-{filters.layer}{suffix}"
        arrays = {"weights": filters.weights, "order": filters.order, "energy": filters.energy}
        result.filters.append(filters)
        result.files += [write_figure(figure, path), write_arrays(path, arrays)]


def _draw_top_images(
    result: Look, subject: InspectedModel, suffix: str, options: LookOptions
) -> dict[str, feature_viz.TopImages]:
    """Draw the most activating images of each layer's channels, and return them by layer."""
    found: dict[str, feature_viz.TopImages] = {}
    for layer in options.top_images:
        split, name = subject.reference_split(options.split, options.data)
        if layer not in found:
            found[layer] = feature_viz.top_activating(subject, split, layer, name)
        top = found[layer]
        path = result.opened.folder / f"top-images-{layer}{suffix}"
        figure = feature_viz.top_images_figure(top, split, result.rows)
        arrays = {
            "peaks": top.peaks,
            "images": top.images,
            "places": top.positions,
            "selectivity": top.selectivity,
            "labels": top.labels,
        }
        result.top_images.append(top)
        result.files += [write_figure(figure, path), write_arrays(path, arrays)]
    return found


def _draw_dreams(
    result: Look,
    subject: InspectedModel,
    suffix: str,
    options: LookOptions,
    top_images: Mapping[str, feature_viz.TopImages],
) -> None:
    """Draw an optimized input for each channel, compared with the best image of the split.

    Args:
        top_images: by layer, if they have been computed already.
    """
    has_data = subject.run_dir is not None or options.data is not None
    known = dict(top_images)
    for layer, channels in map(feature_viz.parse_dream, options.dream):
        if has_data and layer not in known:
            split, name = subject.reference_split(options.split, options.data)
            known[layer] = feature_viz.top_activating(subject, split, layer, name)
        made = feature_viz.make_inputs(
            subject, layer, channels, reference=known.get(layer), seed=options.seed
        )
        path = result.opened.folder / f"made-{layer}{suffix}"
        arrays = {
            "images": made.images,
            "channels": np.array(made.channels),
            "peaks": np.array(made.peaks),
            "means": np.array(made.means),
        }
        figure = feature_viz.made_inputs_figure(made)
        result.made.append(made)
        result.files += [write_figure(figure, path), write_arrays(path, arrays)]
    if options.dream and not has_data:
        print_status(
            f"{subject.name} has no data of its own: name a data set with --data to compare the "
            "optimized inputs with its images"
        )


def _draw_features(
    result: Look, number: int, subject: InspectedModel, options: LookOptions
) -> None:
    """Draw embeddings and nearest training images, in a folder for each of several networks."""
    opened = result.opened
    folder = opened.folder / opened.slugs[number] if len(opened.subjects) > 1 else opened.folder
    for method in options.embedding:
        points = embedding.embed(
            subject,
            method,
            folder=folder,
            split=options.split or subject.default_split(options.data) or "test",
            data=options.data,
            seed=options.seed,
        )
        result.embeddings.append(points)
        result.files += [points.file, points.file.with_suffix(".csv")]
    if options.nearest:
        pictures = [row[number] for row in opened.pictures]
        neighbors = embedding.nearest_neighbors(subject, pictures, options.nearest, folder=folder)
        result.neighbors.append(neighbors)
        result.files.append(neighbors.file)

"""Attribution maps of several networks for the same images: one figure, arrays, sanity checks."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlens.engine import inference
from convlens.errors import UsageError, lookup
from convlens.interpret import attribution_methods, attribution_sanity, features
from convlens.interpret.attribution_methods import METHODS, Method
from convlens.interpret.attribution_sanity import SanityReport
from convlens.interpret.inputs import InspectedModel, Picture, unique_names
from convlens.models import model_parts
from convlens.run import safe_name
from convlens.utils import console, files


@dataclass
class ModelAttributions:
    """Attribution maps of one network.

    Attributes:
        name: of the network.
        classes: its classes.
        pictures: the images.
        probs: probabilities, float64 `[N, classes]`.
        targets: int64 `[N]`, the class that is attributed for each image.
        layer: the layer of Grad-CAM; None without Grad-CAM.
        side: side of that layer's maps; None without Grad-CAM.
        maps: float32 `[N, h, w]` by method, at the resolution of the method.
        expected_sums: by complete method, the sum that each map must have, float64 `[N]`.
        sanity: the sanity checks, if requested.
        slug: the network's unique name in file names.
    """

    name: str
    classes: tuple[str, ...]
    pictures: Sequence[Picture]
    probs: np.ndarray
    targets: Tensor
    layer: str | None
    side: int | None
    maps: dict[str, Tensor]
    expected_sums: dict[str, np.ndarray]
    sanity: SanityReport | None = None
    slug: str = ""

    def to_dict(self) -> dict[str, Any]:
        methods = {name: METHODS[name] for name in self.maps}
        return {
            "model": self.name,
            "layer": self.layer,
            "layer_size": self.side,
            "images": [self._image_dict(index) for index in range(len(self.pictures))],
            "methods": {
                name: {"title": method.title, "signed": method.signed, "unit": method.unit}
                for name, method in methods.items()
            },
            "sanity": None if self.sanity is None else self.sanity.to_dict(),
        }

    def _image_dict(self, index: int) -> dict[str, Any]:
        picture, target = self.pictures[index], int(self.targets[index])
        pred = int(self.probs[index].argmax())
        return {
            "image": picture.name,
            "truth": None if picture.label is None else self.classes[picture.label],
            "predicted": self.classes[pred],
            "predicted_probability": float(self.probs[index, pred]),
            "class": self.classes[target],
            "probability": float(self.probs[index, target]),
            "ranges": {
                name: [float(maps[index].min()), float(maps[index].max())]
                for name, maps in self.maps.items()
            },
            "completeness": {
                name: {
                    "sum": float(self.maps[name][index].double().sum()),
                    "expected": float(sums[index]),
                }
                for name, sums in self.expected_sums.items()
            },
        }


@dataclass
class Attributions:
    """The result of `attribute`: maps of each network and the files they were written to."""

    models: list[ModelAttributions]
    figure: Path
    arrays: Path
    sanity_figures: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """Return the value of `attribution` in the output of `convlens look --json`."""
        return {
            "models": [each.to_dict() for each in self.models],
            "figure": str(self.figure),
            "arrays": str(self.arrays),
            "sanity_figures": [str(path) for path in self.sanity_figures],
        }


def attribute(
    subjects: Sequence[InspectedModel],
    pictures: Sequence[Sequence[Picture]],
    methods: Sequence[str],
    *,
    layer: str | None = None,
    target: str | None = None,
    sanity: bool = False,
    folder: Path,
    quiet: bool = False,
) -> Attributions:
    """Compute attribution maps and write `attribution.png` and `attribution.npz`.

    Args:
        subjects, pictures, methods, layer, target, quiet: as for `compute_attributions`.
        sanity: run the checks of `attribution_sanity`, and write a figure
            `attribution-sanity-<model>.png` for each network.
        folder: of the files.

    Raises:
        UsageError, ModelFileError: as by `compute_attributions`.
    """
    models = compute_attributions(
        subjects, pictures, methods, layer=layer, target=target, sanity=sanity, quiet=quiet
    )
    table = attribution_methods.select_methods(methods)
    return Attributions(
        models,
        _draw_maps(models, table, folder),
        _write_arrays(models, folder),
        [_draw_sanity(model, folder) for model in models if model.sanity is not None],
    )


def compute_attributions(
    subjects: Sequence[InspectedModel],
    pictures: Sequence[Sequence[Picture]],
    methods: Sequence[str],
    *,
    layer: str | None = None,
    target: str | None = None,
    sanity: bool = False,
    quiet: bool = False,
) -> list[ModelAttributions]:
    """Compute attribution maps of several networks for the same images, without writing files.

    Args:
        subjects: the networks.
        pictures: the same images for each network, as `LookInputs.pictures` has them.
        methods: names in `METHODS`, or `all`.
        layer: of Grad-CAM; by default that of `attribution_methods.choose_cam_layer`.
        target: the class that is attributed; by default each image's predicted class.
        sanity: run the checks of `attribution_sanity`.
        quiet: show no progress bar.

    Raises:
        UsageError: an unknown method, layer or class, with close matches; a network without maps
            for Grad-CAM; no images.
        ModelFileError: logits or maps that are not finite.
    """
    table = attribution_methods.select_methods(methods)
    if not subjects or len(pictures) != len(subjects) or not all(pictures):
        raise UsageError("no images to attribute", fix="name files, test:17, worst:5 or class:a:3")
    prepared = [
        _prepare(subject, images, table, layer, target)
        for subject, images in zip(subjects, pictures, strict=True)
    ]
    models = [model for model, _ in prepared]
    slugs = unique_names([safe_name(subject.name) for subject in subjects])
    for model, slug in zip(models, slugs, strict=True):
        model.slug = slug
    total = sum(
        _count_progress_steps(subject, len(images), len(table), sanity)
        for subject, images in zip(subjects, pictures, strict=True)
    )
    with console.progress_bar("attribution", total, shown=not quiet) as bar:
        for (model, inputs), subject in zip(prepared, subjects, strict=True):
            _compute_maps(model, subject, inputs, table, sanity, bar)
    return models


def _count_progress_steps(subject: InspectedModel, images: int, methods: int, sanity: bool) -> int:
    if not sanity:
        return methods
    stages = len(model_parts(subject.model).stages) + 1  # and the head
    return methods + attribution_sanity.count_progress_steps(methods, stages, images)


def _prepare(
    subject: InspectedModel,
    pictures: Sequence[Picture],
    table: Mapping[str, Method],
    layer: str | None,
    target: str | None,
) -> tuple[ModelAttributions, Tensor]:
    """Check all arguments, and return attributions without maps and the normalized images."""
    images = subject.prepared(torch.stack([picture.pixels for picture in pictures]))
    with _naming_subject(subject):
        layers = features.find_layers(subject.model, [] if layer is None else [layer])
        logits, shapes = _forward(subject, images, layers)
        probs = inference.probabilities(logits, subject.loaded.calibration.temperature)
        cam_layer = None
        if any(method.layered for method in table.values()):
            cam_layer = attribution_methods.choose_cam_layer(shapes, layer)
        if target is None:
            targets = logits.argmax(1)
        else:
            class_index = {name: index for index, name in enumerate(subject.classes)}
            targets = torch.full((len(images),), lookup(class_index, target, "class"))
    targets = targets.cpu()
    complete = [name for name, method in table.items() if method.complete]
    expected_sums = {}
    if complete:
        baseline = torch.zeros_like(images[:1])
        baseline_logits, _ = attribution_methods.logits_and_shapes(subject.model, baseline, [])
        difference = (logits - baseline_logits).double().cpu()
        expected = difference.gather(1, targets[:, None])[:, 0].numpy()
        expected_sums = dict.fromkeys(complete, expected)
    model = ModelAttributions(
        name=subject.name,
        classes=subject.classes,
        pictures=pictures,
        probs=probs,
        targets=targets,
        layer=cam_layer,
        side=None if cam_layer is None else shapes[cam_layer][2],
        maps={},
        expected_sums=expected_sums,
    )
    return model, images


def _forward(
    subject: InspectedModel, images: Tensor, layers: Sequence[str]
) -> tuple[Tensor, attribution_methods.LayerShapes]:
    """Return the logits of all images, computed in batches, and the shapes of the layers."""
    results = [
        attribution_methods.logits_and_shapes(subject.model, batch, layers)
        for batch in images.split(attribution_methods.images_per_pass(images))
    ]
    return torch.cat([logits for logits, _ in results]), results[0][1]


@contextmanager
def _naming_subject(subject: InspectedModel) -> Iterator[None]:
    """Add the name of the network to usage errors."""
    try:
        yield
    except UsageError as error:
        raise UsageError(error.what, where=error.where or subject.name, fix=error.fix) from error


def _compute_maps(
    model: ModelAttributions,
    subject: InspectedModel,
    images: Tensor,
    table: Mapping[str, Method],
    sanity: bool,
    bar: console.ProgressBar,
) -> None:
    """Add the maps and sanity checks to `model`."""
    targets, layer = model.targets.to(images.device), model.layer or ""
    for name, method in table.items():
        model.maps[name] = attribution_methods.attribution_maps(
            method, subject.model, images, targets, layer
        )
        bar.advance(1, f"{model.name}: {method.title}")
    if sanity:
        model.sanity = attribution_sanity.run_sanity_checks(
            subject.model,
            images,
            targets,
            layer,
            table,
            model.maps,
            lambda count: bar.advance(count, f"{model.name}: sanity"),
        )


def _draw_maps(
    models: Sequence[ModelAttributions], table: Mapping[str, Method], folder: Path
) -> Path:
    from convlens import plots
    from convlens.plots.attributions import AttributionColumn, AttributionPanel

    panels = []
    for model in models:
        images = np.stack([picture.pixels.numpy() for picture in model.pictures])
        layer_note = f"{model.layer}, {model.side}×{model.side}"
        columns = [
            AttributionColumn(
                method.title,
                layer_note if method.layered else "",
                model.maps[name].numpy(),
                method.signed,
            )
            for name, method in table.items()
        ]
        rows = [
            (model.classes[target], float(model.probs[index, target]))
            for index, target in enumerate(model.targets.tolist())
        ]
        panels.append(AttributionPanel(model.name, images, columns, rows))
    first = models[0]
    names = [
        (picture.name, "" if picture.label is None else first.classes[picture.label])
        for picture in first.pictures
    ]
    path = folder / "attribution.png"
    plots.save_figure(plots.attribution_grid(names, panels), path)
    return path


def _draw_sanity(model: ModelAttributions, folder: Path) -> Path:
    from convlens import plots

    report = model.sanity
    assert report is not None
    methods = list(report.methods.values())
    similarity = {
        measure: {
            checks.title: [(m.value, m.interval95) for m in getattr(checks, measure).values()]
            for checks in methods
        }
        for measure in ("spearman", "ssim")
    }
    curves = {
        kind: {checks.title: checks.curves[kind] for checks in methods}
        | {"random order": report.random_curves[kind]}
        for kind in attribution_sanity.CURVES
    }
    stages = list(methods[0].spearman)
    title = f"{model.name}, {len(model.pictures)} images"
    path = folder / f"attribution-sanity-{model.slug}.png"
    plots.save_figure(plots.attribution_sanity(stages, similarity, curves, title), path)
    return path


def _write_arrays(models: Sequence[ModelAttributions], folder: Path) -> Path:
    """Write all maps as `<model>/<method>`, with the images and the attributed classes."""
    arrays: dict[str, np.ndarray] = {}
    for model in models:
        for name, maps in model.maps.items():
            arrays[f"{model.slug}/{name}"] = maps.numpy()
        arrays[f"{model.slug}/pixels"] = np.stack([p.pixels.numpy() for p in model.pictures])
        arrays[f"{model.slug}/images"] = np.array([p.name for p in model.pictures])
        targets = [model.classes[target] for target in model.targets.tolist()]
        arrays[f"{model.slug}/classes"] = np.array(targets)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    path = folder / "attribution.npz"
    files.write_atomic(path, buffer.getvalue())
    return path

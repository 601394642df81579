"""Attribution of networks on pictures: maps, one figure, raw arrays, and whether to believe them.

The methods are in `saliency.py`, the checks in `sanity.py`.
"""

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
    """What one network's methods say of the pictures.

    Attributes:
        probs: probabilities, float64 `[N, classes]`.
        targets: int64 `[N]`, the class each picture's maps are of.
        layer, side: where Grad-CAM was done, and the side of its maps; None without Grad-CAM.
        maps: by method, float32 `[N, h, w]` as fine as the method makes them.
        rises: by complete method, what each map must add up to, float64 `[N]`.
    """

    name: str
    classes: tuple[str, ...]
    pictures: Sequence[Picture]
    probs: np.ndarray
    targets: Tensor
    layer: str | None
    side: int | None
    maps: dict[str, Tensor]
    rises: dict[str, np.ndarray]
    sanity: SanityReport | None = None
    slug: str = ""  # what files call it: unlike those of the other networks

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "layer": self.layer,
            "layer_size": self.side,
            "images": [self._image(index) for index in range(len(self.pictures))],
            "methods": {
                name: {"title": METHODS[name].title, "signed": METHODS[name].signed}
                | {"unit": METHODS[name].unit}
                for name in self.maps
            },
            "sanity": None if self.sanity is None else self.sanity.to_dict(),
        }

    def _image(self, index: int) -> dict[str, Any]:
        picture, target = self.pictures[index], int(self.targets[index])
        guess = int(self.probs[index].argmax())
        found: dict[str, Any] = {
            "image": picture.name,
            "truth": None if picture.label is None else self.classes[picture.label],
            "predicted": self.classes[guess],
            "predicted_probability": float(self.probs[index, guess]),
            "class": self.classes[target],
            "probability": float(self.probs[index, target]),
            "ranges": {},
            "completeness": {},
        }
        for name, maps in self.maps.items():
            found["ranges"][name] = [float(maps[index].min()), float(maps[index].max())]
        for name, rises in self.rises.items():
            total = float(self.maps[name][index].double().sum())
            found["completeness"][name] = {"sum": total, "expected": float(rises[index])}
        return found


@dataclass
class Attributions:
    """What `attribute` gives: maps of each network, and the files they are in."""

    models: list[ModelAttributions]
    figure: Path
    arrays: Path
    sanity_figures: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `convlens look --json` prints under `attribution`."""
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
    """Maps of what speaks for a class, in `attribution.png` and `attribution.npz` in `folder`.

    Args:
        pictures: for each subject the same pictures, as `choose_pictures` gives them.
        methods: names in `METHODS`, or `all`.
        layer: where Grad-CAM is done; by default as `saliency.find_layer` says.
        target: the class whose evidence is shown; by default each picture's predicted class.
        sanity: whether the methods depend on the weights, and deletion and insertion scores; a
            figure `attribution-sanity-<model>.png` for each network.

    Raises:
        UsageError: a method, layer or class that isn't there, with near misses; a network that
            has no maps for Grad-CAM; no pictures.
        ModelFileError: logits or maps that are not finite.
    """
    table = attribution_methods.select_methods(methods)
    if not subjects or len(pictures) != len(subjects) or not all(pictures):
        raise UsageError("no images to attribute", fix="name files, test:17, worst:5 or class:a:3")
    begun = [
        _begin(subject, shown, table, layer, target)
        for subject, shown in zip(subjects, pictures, strict=True)
    ]
    slugs = unique_names([safe_name(subject.name) for subject in subjects])
    for (found, _), slug in zip(begun, slugs, strict=True):
        found.slug = slug
    total = sum(
        len(table) + sanity * attribution_sanity.steps_of(len(table), _stages(subject), len(shown))
        for subject, shown in zip(subjects, pictures, strict=True)
    )
    with console.progress_bar("attribution", total, shown=not quiet) as bar:
        for (found, images), subject in zip(begun, subjects, strict=True):
            _fill(found, subject, images, table, sanity, bar)
    models = [found for found, _ in begun]
    return Attributions(
        models,
        _draw(models, table, folder),
        _write(models, folder),
        [_draw_sanity(each, folder) for each in models if each.sanity is not None],
    )


def _stages(subject: InspectedModel) -> int:
    return len(model_parts(subject.model).stages) + 1


def _begin(
    subject: InspectedModel,
    pictures: Sequence[Picture],
    table: Mapping[str, Method],
    layer: str | None,
    target: str | None,
) -> tuple[ModelAttributions, Tensor]:
    """All that can be wrong is found here, before anything takes time: maps to be filled."""
    images = subject.prepared(torch.stack([picture.pixels for picture in pictures]))
    with _about(subject):
        wanted = features.find_layers(subject.model, [] if layer is None else [layer])
        logits, shapes = _forward(subject, images, wanted)
        probs = inference.probabilities(logits)
        layered = any(method.layered for method in table.values())
        layer_name = attribution_methods.find_layer(shapes, layer) if layered else None
        if target is None:
            targets = logits.argmax(1)
        else:
            numbers = {name: number for number, name in enumerate(subject.classes)}
            targets = torch.full((len(images),), lookup(numbers, target, "class"))
    side = None if layer_name is None else shapes[layer_name][2]
    found = ModelAttributions(
        subject.name, subject.classes, pictures, probs, targets.cpu(), layer_name, side, {}, {}
    )
    empty, _ = attribution_methods.shapes_of(subject.model, torch.zeros_like(images[:1]), [])
    rises = (logits - empty).double().cpu().gather(1, found.targets[:, None])[:, 0].numpy()
    found.rises = {name: rises for name, method in table.items() if method.complete}
    return found, images


def _forward(
    subject: InspectedModel, images: Tensor, names: Sequence[str]
) -> tuple[Tensor, attribution_methods.LayerShapes]:
    """Logits of all pictures, in batches, and the shapes of the layers."""
    answers = [
        attribution_methods.shapes_of(subject.model, part, names)
        for part in images.split(attribution_methods.at_once(images))
    ]
    return torch.cat([logits for logits, _ in answers]), answers[0][1]


@contextmanager
def _about(subject: InspectedModel) -> Iterator[None]:
    """Errors inside say which of the networks they are about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(error.what, where=error.where or subject.name, fix=error.fix) from error


def _fill(
    found: ModelAttributions,
    subject: InspectedModel,
    images: Tensor,
    table: Mapping[str, Method],
    sanity: bool,
    bar: console.ProgressBar,
) -> None:
    targets, layer = found.targets.to(images.device), found.layer or ""
    for name, method in table.items():
        found.maps[name] = attribution_methods.attribution_maps(
            method, subject.model, images, targets, layer
        )
        bar.advance(1, f"{found.name}: {method.title}")
    if sanity:
        found.sanity = attribution_sanity.run_sanity_checks(
            subject.model,
            images,
            targets,
            layer,
            table,
            found.maps,
            lambda count: bar.advance(count, f"{found.name}: sanity"),
        )


def _draw(models: Sequence[ModelAttributions], table: Mapping[str, Method], folder: Path) -> Path:
    from convlens import plots
    from convlens.plots.attributions import AttributionColumn, AttributionPanel

    panels = []
    for model in models:
        own = np.stack([picture.pixels.numpy() for picture in model.pictures])
        below = f"{model.layer}, {model.side}×{model.side}"
        columns = [
            AttributionColumn(
                method.title,
                below if method.layered else "",
                model.maps[name].numpy(),
                method.signed,
            )
            for name, method in table.items()
        ]
        rows = [
            (model.classes[target], float(model.probs[index, target]))
            for index, target in enumerate(model.targets.tolist())
        ]
        panels.append(AttributionPanel(model.name, own, columns, rows))
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

    assert model.sanity is not None
    found = model.sanity
    methods = list(found.methods.values())
    left = {
        measure: {
            each.title: [(m.value, m.interval95) for m in getattr(each, measure).values()]
            for each in methods
        }
        for measure in ("spearman", "ssim")
    }
    curves = {
        order: {each.title: each.curves[order] for each in methods}
        | {"random order": found.random_curves[order]}
        for order in attribution_sanity.RANDOM_ORDERS_DRAWN
    }
    stages = list(methods[0].spearman)
    title = f"{model.name}, {len(model.pictures)} images"
    path = folder / f"attribution-sanity-{model.slug}.png"
    plots.save_figure(plots.attribution_sanity(stages, left, curves, title), path)
    return path


def _write(models: Sequence[ModelAttributions], folder: Path) -> Path:
    """All maps under `<model>/<method>`, with the pictures and classes they belong to."""
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

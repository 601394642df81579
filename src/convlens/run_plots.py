"""The figures of a run: `plots/<run>/*.png`, drawn from metrics, predictions and images.

matplotlib takes longer to import than some runs take to train, so `plots` is imported inside the
functions that draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from convlens import metrics
from convlens.data.audit import Audit
from convlens.data.dataset import Data, Split
from convlens.data.decode import Pixels
from convlens.data.loader import Augment, to_unit
from convlens.data.transforms.pipeline import build_pipeline
from convlens.data.transforms.random import SampleInfo
from convlens.device import derive_seed
from convlens.errors import UsageError
from convlens.recipe import Recipe
from convlens.run import PLOTS_DIR, RunDir, safe_name
from convlens.utils import options

MAX_IMAGES = 16  # on a sheet
COMPANIONS = 3  # images beside one whose augmented views are drawn
MIN_MIXED_SHARE = 0.005  # of a class in a mixed label; smaller shares are not written

Row = Mapping[str, float]


def figures_disabled() -> bool:
    """Return whether training and evaluation leave out their figures (`--figures none`)."""
    return options.figures() == "none"


def plot_training(
    run_dir: RunDir, rows: Sequence[Row], kept: int, data: Data, augment: Augment | None
) -> None:
    """Draw training curves, the learning rate, and a batch before and after augmentation.

    Args:
        rows: the rows of `metrics.csv`.
        kept: the epoch whose weights were kept; it is marked if validation chose it.
    """
    if figures_disabled():
        return
    from convlens import plots

    history = metric_columns(rows)
    chosen = None if np.isnan(history["val_loss"]).all() else kept
    _save_plot(run_dir, "curves", plots.curves(history, chosen, run_dir.name))
    rate = plots.learning_rate(history["epoch"], history["lr"], run_dir.name)
    _save_plot(run_dir, "learning_rate", rate)
    if augment is not None:
        _save_plot(run_dir, "augmented", _draw_augmented(data, augment, run_dir.name))


def plot_evaluation(
    run_dir: RunDir,
    label: str,
    split: Split,
    logits: np.ndarray,
    classes: Sequence[str],
    temperature: float = 1.0,
) -> None:
    """Draw confusion, calibration and the worst mistakes of one evaluation of a split.

    Args:
        label: part of the file names, e.g. `test`.
        logits: `[N, K]` in the order of `split`, whose labels are in the model's order.
        temperature: the logits are divided by it for the probabilities.
    """
    if figures_disabled():
        return
    from convlens import plots

    targets = split.labels.numpy()
    probs = metrics.softmax(logits, temperature)
    preds = logits.argmax(1)
    title = f"{run_dir.name}, {label}"
    table = metrics.confusion_matrix(targets, preds, len(classes))
    _save_plot(run_dir, f"confusion-{label}", plots.confusion(table, classes, title))
    bins = metrics.reliability_bins(probs, targets)
    error = metrics.ece(probs, targets)
    _save_plot(run_dir, f"reliability-{label}", plots.reliability(*bins, error))
    worst = worst_mistake_images(probs, targets)[:MAX_IMAGES]
    if len(worst):
        figure = plots.worst_mistakes(
            split.rows.gather(torch.from_numpy(worst)).numpy(),
            [classes[targets[i]] for i in worst],
            [classes[preds[i]] for i in worst],
            [float(probs[i].max()) for i in worst],
            f"{title}: worst mistakes",
        )
        _save_plot(run_dir, f"worst-{label}", figure)


def plot_risk_coverage(run_dir: RunDir, label: str, coverage: np.ndarray, risk: np.ndarray) -> None:
    """Draw the error rate among the most confident images of a split.

    Args:
        label: part of the file name, e.g. `test`.
        coverage, risk: as `uncertainty.selective.risk_coverage_curve` returns them.
    """
    if figures_disabled():
        return
    from convlens import plots

    figure = plots.risk_coverage(coverage, risk, f"{run_dir.name}, {label}")
    _save_plot(run_dir, f"risk-coverage-{label}", figure)


def plot_data_sheet(report: Audit) -> Path:
    """Write a contact sheet of a data set's training images, class by class; return its path."""
    from convlens import plots

    images, titles = report.sheet()
    path = PLOTS_DIR / f"data-{safe_name(report.name)}.png"
    plots.save_figure(plots.contact_sheet(images, titles, report.name), path)
    return path


def check_augmentation(recipe: Recipe) -> None:
    """Check that a recipe has an augmentation to draw, before any image is read.

    Raises:
        UsageError: it has none, or names or parameters of it are invalid.
    """
    build_pipeline(recipe.operations)
    if not recipe.augment:
        raise UsageError(
            f"recipe {recipe.name!r} augments nothing",
            fix="`convlens recipes NAME` shows what a recipe does, under augment",
        )


def plot_augmented_sheet(recipe: Recipe, data: Data) -> Path:
    """Write a batch of training images before and after augmentation; return its path.

    Args:
        recipe: as it is trained, without `auto`.
    """
    from convlens import plots

    pipeline = augmentation(recipe, data)
    path = PLOTS_DIR / f"augmented-{safe_name(data.name)}-{safe_name(recipe.name)}.png"
    figure = _draw_augmented(data, pipeline, f"{data.name}, augmented as in {recipe.name}")
    plots.save_figure(figure, path)
    return path


def augmentation(recipe: Recipe, data: Data) -> Augment:
    """Return the augmentation of a training with this recipe, which has no `auto`."""
    return build_pipeline(
        recipe.operations,
        image_size=data.image_size,
        channels=data.channels,
        classes=len(data.classes),
    )


def augmented_views(recipe: Recipe, data: Data, split: Split, number: int, count: int) -> Pixels:
    """Return an image of a split as the first `count` epochs would show it to the network.

    Some training images are in the batch as well, for augmentations that mix images.

    Args:
        number: of the image in the split.

    Returns:
        uint8 `[count, C, S, S]`; no images if the recipe augments nothing.
    """
    if not recipe.augment:
        return np.empty((0, data.channels, data.image_size, data.image_size), np.uint8)
    augment = augmentation(recipe, data)
    companions = _evenly_spaced(len(data.train), COMPANIONS)
    index = torch.tensor([number])
    batch = to_unit(torch.cat([split.rows.gather(index), data.train.rows.gather(companions)]))
    labels = torch.cat([split.labels[index], data.train.labels[companions]])
    numbers = torch.cat([index, companions])
    views = []
    for epoch in range(1, count + 1):
        generator = torch.Generator().manual_seed(derive_seed(0, epoch, 0))
        images, _ = augment(batch, labels, SampleInfo(numbers, epoch, seed=0), generator)
        views.append(images[0].clamp(0, 1).mul(255).round().to(torch.uint8))
    return torch.stack(views).numpy()


def _draw_augmented(data: Data, augment: Augment, title: str) -> Any:
    """Draw training images of all classes before and after; mixed images with their classes."""
    from convlens import plots

    shown = _evenly_spaced(data.train.rows.shape[0], MAX_IMAGES)
    before, labels = data.train.rows.gather(shown), data.train.labels[shown]
    generator = torch.Generator().manual_seed(derive_seed(0, 0, 0))
    after, mixed = augment(to_unit(before), labels, SampleInfo(shown, epoch=1, seed=0), generator)
    if after.shape != before.shape:  # crops of another size, enlarged to be drawn beside the images
        after = interpolate(after, size=before.shape[-2:], mode="bilinear", antialias=True)
    after = after.clamp(0, 1).mul(255).round().to(torch.uint8)
    return plots.augmented_batch(
        before.numpy(),
        after.numpy(),
        title,
        labels=[data.classes[label] for label in labels.tolist()],
        mixed=[_largest_shares(row, data.classes) for row in mixed.tolist()]
        if mixed.ndim == 2
        else (),
    )


def _largest_shares(shares: Sequence[float], classes: Sequence[str]) -> list[tuple[str, float]]:
    """Return the two largest shares of a mixed label with their classes."""
    pairs = sorted(zip(classes, shares, strict=True), key=lambda pair: -pair[1])
    return [(name, share) for name, share in pairs[:2] if share >= MIN_MIXED_SHARE]


def _evenly_spaced(count: int, wanted: int) -> torch.Tensor:
    """Return `wanted` positions evenly over `count`, which covers all classes of sorted images."""
    return torch.linspace(0, count - 1, min(wanted, count)).long()


def plot_several(
    path: Path, variants: Mapping[str, Sequence[Sequence[Row]]], title: str, averaged_over: str
) -> None:
    """Draw the curves of several runs: of one recipe with their band, or of its variants overlaid.

    Args:
        variants: the epochs of each run, by the name of its variant.
        averaged_over: the runs that are averaged, e.g. `3 seeds`.
    """
    if figures_disabled():
        return
    from convlens import plots

    groups = {name: [metric_columns(rows) for rows in runs] for name, runs in variants.items()}
    if len(groups) == 1:
        (runs,) = groups.values()
        plots.save_figure(plots.seed_curves(runs, title, averaged_over), path)
    else:
        plots.save_figure(plots.variant_curves(groups, title, averaged_over), path)


def plot_comparison(
    folder: Path,
    title: str,
    variants: Mapping[str, Sequence[Sequence[Row]]],
    gains: Mapping[str, tuple[float, tuple[float, float] | None, bool]],
    reference: str,
) -> list[Path]:
    """Draw the overlaid curves of runs, and their differences of accuracy from the reference.

    Args:
        variants: the epochs of each run, by the name of its variant; runs without any are left out.
        gains: by name, the difference and its interval as shares, and whether it is significant.

    Returns:
        The written files.
    """
    from convlens import plots

    histories = {
        name: [metric_columns(rows) for rows in runs if rows]
        for name, runs in variants.items()
        if any(runs)
    }
    written = []
    if histories:
        written.append(folder / "curves.png")
        counts = {len(runs) for runs in histories.values()}
        averaged_over = f"{max(counts)} seeds" if len(counts) == 1 else "the seeds"
        plots.save_figure(plots.variant_curves(histories, title, averaged_over), written[-1])
    written.append(folder / "differences.png")
    plots.save_figure(plots.differences(gains, reference), written[-1])
    return written


def worst_mistake_images(probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the positions of the mistakes, the lowest probability of the true class first.

    Args:
        probs: `[N, K]`.
        targets: `[N]`.
    """
    of_target = probs[np.arange(len(targets)), targets]
    wrong = np.flatnonzero(probs.argmax(1) != targets)
    ordered: np.ndarray = wrong[np.argsort(of_target[wrong], kind="stable")]
    return ordered


def metric_columns(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return the rows of `metrics.csv` as one list for each column."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def _save_plot(run_dir: RunDir, name: str, figure: Any) -> None:
    from convlens import plots

    plots.save_figure(figure, run_dir.plots / f"{name}.png")

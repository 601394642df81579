"""Which plots a run gets, and from what: the step from results to `plots/<run>/*.png`.

matplotlib takes longer to import than some runs take to train, so `plots` is imported by the
functions that draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convlens import metrics
from convlens.data.audit import Audit
from convlens.data.dataset import Data, Split, load_data
from convlens.data.loader import Augment, to_unit
from convlens.data.transforms.pipeline import build_pipeline
from convlens.data.transforms.random import SampleInfo
from convlens.device import derive_seed, memory_budget
from convlens.errors import UsageError
from convlens.recipe import Recipe, resolve_auto
from convlens.run import PLOTS_DIR, RunDir, safe_name
from convlens.utils import options

MAX_SHOWN = 16  # pictures in a sheet
Row = Mapping[str, float]


def figures_disabled() -> bool:
    """Whether the plots that a training and a test leave are to be left out (`--figures none`)."""
    return options.figures() == "none"


def plot_training(
    run_dir: RunDir, rows: Sequence[Row], kept: int, data: Data, change: Augment | None
) -> None:
    """Curves with the kept epoch marked, learning rate, and a batch before and after augmenting."""
    if figures_disabled():
        return
    from convlens import plots

    history = metric_columns(rows)
    chosen = None if np.isnan(history["val_loss"]).all() else kept  # nothing chose the last one
    _save_plot(run_dir, "curves", plots.curves(history, chosen, run_dir.name))
    rate = plots.learning_rate(history["epoch"], history["lr"], run_dir.name)
    _save_plot(run_dir, "learning_rate", rate)
    if change is not None:
        _save_plot(run_dir, "augmented", _augmented(data, change, run_dir.name))


def plot_evaluation(
    run_dir: RunDir, label: str, split: Split, scores: np.ndarray, classes: Sequence[str]
) -> None:
    """Confusion, calibration and the worst mistakes of one look at a split.

    Args:
        label: goes into the file names, e.g. `test`.
        scores: logits `[N, K]` in the order of `split`, whose labels are in the model's order.
    """
    if figures_disabled():
        return
    from convlens import plots

    targets = split.labels.numpy()
    probs = metrics.softmax(scores)
    preds = probs.argmax(1)
    title = f"{run_dir.name}, {label}"
    table = metrics.confusion_matrix(targets, preds, len(classes))
    _save_plot(run_dir, f"confusion-{label}", plots.confusion(table, classes, title))
    bins = metrics.reliability_bins(probs, targets)
    error = metrics.ece(probs, targets)
    _save_plot(run_dir, f"reliability-{label}", plots.reliability(*bins, error))
    worst = worst_mistake_images(probs, targets)[:MAX_SHOWN]
    if len(worst):
        _save_plot(
            run_dir,
            f"worst-{label}",
            plots.worst_mistakes(
                split.rows.gather(torch.from_numpy(worst)).numpy(),
                [classes[targets[i]] for i in worst],
                [classes[preds[i]] for i in worst],
                [float(probs[i].max()) for i in worst],
                f"{title}: the surest mistakes",
            ),
        )


def plot_data_sheet(report: Audit) -> Path:
    """A contact sheet of a data set's training images, class by class; returns its path."""
    from convlens import plots

    images, titles = report.sheet()
    path = PLOTS_DIR / f"data-{safe_name(report.name)}.png"
    plots.save_figure(plots.contact_sheet(images, titles, report.name), path)
    return path


def plot_augmented_sheet(asked: Recipe) -> Path:
    """A batch of a recipe's training images, before and after its augmentation; returns its path.

    Raises:
        UsageError: the recipe augments nothing, or not with these names and numbers.
    """
    from convlens import plots

    build_pipeline(asked.operations)  # before any image is read
    if not asked.augment:
        raise UsageError(
            f"recipe {asked.name!r} augments nothing",
            fix="`convlens recipes NAME` shows what a recipe does, under augment",
        )
    data = load_data(asked.data, memory_budget=memory_budget("cpu"))
    size, channels = data.image_size, data.channels
    count = int(data.train.labels.numel())
    recipe = resolve_auto(asked, images=count, image_size=size, channels=channels)
    pipeline = build_pipeline(
        recipe.operations, image_size=size, channels=channels, classes=len(data.classes)
    )
    path = PLOTS_DIR / f"augmented-{safe_name(data.name)}-{safe_name(recipe.name)}.png"
    plots.save_figure(
        _augmented(data, pipeline, f"{data.name}, augmented as in {recipe.name}"), path
    )
    return path


def _augmented(data: Data, change: Augment, title: str) -> Any:
    """Training images of all classes before and after; for mixed ones, what they are made of."""
    from convlens import plots

    shown = _evenly_spaced(data.train.rows.shape[0], MAX_SHOWN)
    before, labels = data.train.rows.gather(shown), data.train.labels[shown]
    generator = torch.Generator().manual_seed(derive_seed(0, 0, 0))
    after, mixed = change(to_unit(before), labels, SampleInfo(shown, epoch=1, seed=0), generator)
    after = after.clamp(0, 1).mul(255).round().to(torch.uint8)
    return plots.augmented_batch(
        before.numpy(),
        after.numpy(),
        title,
        labels=[data.classes[label] for label in labels.tolist()],
        mixed=[_largest(row, data.classes) for row in mixed.tolist()] if mixed.ndim == 2 else (),
    )


def _largest(shares: Sequence[float], classes: Sequence[str]) -> list[tuple[str, float]]:
    """The two greatest shares of a mixed label, those under half a per cent left out."""
    pairs = sorted(zip(classes, shares, strict=True), key=lambda pair: -pair[1])
    return [(name, share) for name, share in pairs[:2] if share >= 0.005]


def plot_several(
    path: Path, variants: Mapping[str, Sequence[Sequence[Row]]], title: str, what: str
) -> None:
    """Curves of several runs: of one recipe with their band, or of its variants overlaid.

    Args:
        variants: the epochs of each run, by the name of its variant.
        what: what means are over, e.g. `3 seeds`.
    """
    if figures_disabled():
        return
    from convlens import plots

    groups = {name: [metric_columns(rows) for rows in runs] for name, runs in variants.items()}
    if len(groups) == 1:
        (runs,) = groups.values()
        plots.save_figure(plots.seed_curves(runs, title, what), path)
    else:
        plots.save_figure(plots.variant_curves(groups, title, what), path)


def plot_comparison(
    folder: Path,
    title: str,
    variants: Mapping[str, Sequence[Sequence[Row]]],
    gains: Mapping[str, tuple[float, tuple[float, float] | None, bool]],
    reference: str,
) -> list[Path]:
    """Curves of the runs that have any, overlaid, and differences of accuracy from the reference.

    Args:
        gains: by name, difference and interval as shares, and whether it can be told from none.
    """
    from convlens import plots

    curves, differences = folder / "curves.png", folder / "differences.png"
    drawn = {
        name: [metric_columns(rows) for rows in runs if rows] for name, runs in variants.items()
    }
    drawn = {name: histories for name, histories in drawn.items() if histories}
    if drawn:
        counts = {len(histories) for histories in drawn.values()}
        what = f"{max(counts)} seeds" if len(counts) == 1 else "the seeds"
        plots.save_figure(plots.variant_curves(drawn, title, what), curves)
    plots.save_figure(plots.differences(gains, reference), differences)
    return [*([curves] if drawn else []), differences]


def worst_mistake_images(probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Positions of the wrong answers, the one least likely to its truth first."""
    of_truth = probs[np.arange(len(targets)), targets]
    wrong = np.flatnonzero(probs.argmax(1) != targets)
    ordered: np.ndarray = wrong[np.argsort(of_truth[wrong], kind="stable")]
    return ordered


def _evenly_spaced(count: int, wanted: int) -> torch.Tensor:
    """`wanted` positions evenly over `count`, so that sorted classes are all seen."""
    return torch.linspace(0, count - 1, min(wanted, count)).long()


def metric_columns(rows: Sequence[Row]) -> dict[str, list[float]]:
    """One list for each column of `metrics.csv`."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def _save_plot(run_dir: RunDir, name: str, figure: Any) -> None:
    from convlens import plots

    plots.save_figure(figure, run_dir.plots / f"{name}.png")

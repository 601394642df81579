"""Sections of the page of one run, in the order of the page, and the table of them.

The confusion section is a table whose cells show their images, or a list if there are too many
classes. The sections in `INSIDE_SECTIONS` look inside the network and consist of finished figures.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from markupsafe import Markup

from convlens import metrics, run_plots
from convlens.engine.inference import place_model
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation import CachedPredictions, TrainAccuracy
from convlens.interpret import attribution
from convlens.interpret.activations import (
    activation_figure,
    check_layers,
    compute_activity,
    describe_prediction,
)
from convlens.interpret.inputs import InspectedModel, Picture, pick_examples
from convlens.interpret.measure import measure
from convlens.recipe import Recipe, load_recipe, recipe_names
from convlens.reports.contents import MetricsRow, ReportContents
from convlens.reports.html import (
    ChartLine,
    PageFigure,
    PageSection,
    cell_thumbnails,
    color_swatch,
    format_seconds,
    format_share,
    interval_chart,
    line_chart,
    reliability_chart,
    render_figures,
    render_template,
    thumbnails,
)
from convlens.uncertainty import selective
from convlens.uncertainty.calibration import ModelCalibration, as_percent
from convlens.uncertainty.outliers import ORDINARY_SHARE
from convlens.uncertainty.promises import Promises

SPLIT_WORDS = {"test": "test", "val": "validation", "train": "training"}
OVERFITTING_POINTS = 10  # a larger gap to the training accuracy is called overfitting
MAX_EPOCHS = 1000  # rows in the table of epochs
MAX_GAPS = 8  # epochs that are named in the note on a loss that is not finite
MAX_CLASSES = 40  # classes of a readable confusion table
MAX_PAIRS = 60  # confusions that are listed if there are more classes
MAX_MISTAKES = 24  # images in the section of the worst mistakes
MAX_CURVE_POINTS = 200  # of the curve of risk over coverage
EPOCH_CLASS_MEANS = {  # of the table of epochs
    "val_macro_f1": "validation macro F1",
    "val_balanced_accuracy": "validation balanced accuracy",
}
PROMISED_ACCURACIES = (0.9, 0.95, 0.99)
PROMISED_COVERAGES = (0.9, 0.95)
PROMISE_CONFIDENCE = 0.95

CORRECT_EXAMPLES = 2  # correctly classified images of different classes, beside the worst mistake
CHANNELS_PER_LAYER = 32
ATTRIBUTION_METHODS = ("grad-cam", "integrated-gradients")
STAGE_MEASURES = ("probe", "picture", "rank", "dead")
# Images that stages are measured on and that probes learn from: some seconds for a ResNet-18 at
# 32 pixels.
MEASURED_IMAGES, PROBE_IMAGES = 500, 1000
# Not `look`: its finer measurements and its maps of other images must not be overwritten.
INSIDE_FOLDER = "report"

ConfusionTable = npt.NDArray[np.int64]  # [K, K], rows are true classes


def measure_calibration(contents: ReportContents) -> metrics.Calibration | None:
    """Return the calibration of a run; None without predictions for single images."""
    if contents.predictions is None or contents.summary is None:
        return None
    probs = contents.predictions.probs
    surplus = float(probs.max(axis=1).mean()) - float(contents.summary["accuracy"])
    return metrics.Calibration(contents.summary["ece"], metrics.ece_by_chance(probs), surplus)


def run_verdict(contents: ReportContents) -> str:
    """Return one sentence: accuracy with n and interval, gap to training, calibration."""
    summary = contents.summary
    if summary is None:
        if not contents.is_finished:
            count = len(contents.rows)
            epochs = "1 epoch is" if count == 1 else f"{count} epochs are"
            return f"Not evaluated yet: training has not finished; {epochs} in its log."
        return "Not evaluated: no images were held out of training."
    low, high = summary["interval95"]
    split = SPLIT_WORDS[contents.split]
    parts = [
        f"{summary['accuracy']:.1%} of {summary['n']:,} {split} images are classified correctly "
        f"(95% interval {low:.1%} to {high:.1%})"
    ]
    majority = majority_class(contents)
    if majority is not None and low <= majority[1]:
        name, share = majority
        parts.append(f"not distinguishable from always predicting {name!r} ({share:.1%})")
    if contents.train_accuracy is not None:
        parts.append(_train_gap(contents.train_accuracy, summary["correct"], summary["n"]))
    calibration = measure_calibration(contents)
    if calibration is not None:
        parts.append(_describe_calibration(calibration))
    elif summary["ece"] is not None:
        parts.append(f"calibration error {summary['ece']:.3f}")
    return "; ".join(parts) + "."


def majority_class(contents: ReportContents) -> tuple[str, float] | None:
    """Return the most common class of the evaluated images, and its share."""
    table = (contents.summary or {}).get("confusion")
    if not table:
        return None
    counts = [sum(row) for row in table]
    largest = counts.index(max(counts))
    return contents.classes[largest], counts[largest] / sum(counts)


def _train_gap(train: TrainAccuracy, correct: int, n: int) -> str:
    """Compare the accuracy with that on training images, by the interval of the difference."""
    low, high = metrics.newcombe_independent_interval(correct, n, train.correct, train.n)
    count = f"{train.n:,} " * (train.n < train.total)
    training = f"the {train.share:.1%} on {count}training images without augmentation"
    points = 100 * (train.share - correct / n)
    if low <= 0 <= high:
        return f"not distinguishable from {training}"
    if points > 0:
        note = "overfitting" if points > OVERFITTING_POINTS else "some overfitting"
        return f"{points:.1f} points below {training} ({note})"
    return f"{-points:.1f} points above {training}"


def _describe_calibration(calibration: metrics.Calibration) -> str:
    if calibration.is_good:
        return "its confidence agrees with its accuracy, as far as this many images can show"
    error = f"calibration error {100 * calibration.error:.1f} points"
    if calibration.label == "badly calibrated":
        return f"it is badly calibrated ({error})"
    surplus = abs(100 * calibration.surplus)
    return f"it is {calibration.label}, by {surplus:.1f} points on average ({error})"


def head_section(contents: ReportContents) -> Markup:
    """Render name, verdict, the main numbers, and what is missing."""
    return render_template(
        "head.html",
        contents=contents,
        summary=contents.summary,
        numbers=summary_section(contents),
        test_uses=contents.test_uses(),
    )


def summary_section(contents: ReportContents) -> Markup:
    """Render the verdict and the main numbers."""
    summary = contents.summary
    baseline = bar = None
    majority = majority_class(contents)
    if summary is not None and majority is not None:
        baseline = majority[1]
        low, high = summary["interval95"]
        description = (
            f"accuracy {format_share(summary['accuracy'])}, "
            f"interval {format_share(low)} to {format_share(high)}"
        )
        bar = interval_chart(low, high, summary["accuracy"], baseline, description)
    return render_template(
        "summary.html",
        contents=contents,
        verdict=run_verdict(contents),
        summary=summary,
        train_accuracy=contents.train_accuracy,
        calibration=measure_calibration(contents),
        baseline=baseline,
        bar=bar,
        split=SPLIT_WORDS[contents.split],
    )


def curves_section(contents: ReportContents) -> Markup | None:
    """Render loss and accuracy over epochs with the kept epoch marked, and their table."""
    if not contents.rows:
        return None
    return render_template(
        "curves.html",
        charts=training_curves(contents.rows, contents.kept_epoch),
        rows=contents.rows[:MAX_EPOCHS],
        gaps=_describe_gaps(contents.rows),
        kept=contents.kept_epoch,
        omitted=max(0, len(contents.rows) - MAX_EPOCHS),
        validated=any(math.isfinite(row["val_loss"]) for row in contents.rows),
        # Earlier versions did not record them.
        class_means={
            key: name
            for key, name in EPOCH_CLASS_MEANS.items()
            if any(math.isfinite(row.get(key, math.nan)) for row in contents.rows)
        },
    )


def training_curves(
    rows: Sequence[MetricsRow], kept_epoch: int | None = None
) -> list[dict[str, Any]]:
    """Return charts of the loss and accuracy of a run, in training and validation.

    Args:
        rows: of `metrics.csv`, not empty.
        kept_epoch: is marked.
    """
    epochs = [row["epoch"] for row in rows]
    charts = []
    for key, label, percent in (("loss", "Loss (nats)", False), ("accuracy", "Accuracy", True)):
        lines = [
            ChartLine(SPLIT_WORDS[split], split, [row[f"{split}_{key}"] for row in rows])
            for split in ("train", "val")
        ]
        lines = [line for line in lines if any(map(math.isfinite, line.values))]
        svg = line_chart(epochs, lines, label, percent=percent, mark=kept_epoch)
        legend = [(color_swatch(line.css_class), line.name) for line in lines]
        charts.append({"title": label, "svg": svg, "legend": legend})
    return charts


def _describe_gaps(rows: Sequence[MetricsRow]) -> str:
    """Return a sentence that names the epochs whose training loss is not finite; empty if none."""
    epochs = [int(row["epoch"]) for row in rows if not math.isfinite(row["train_loss"])]
    if not epochs:
        return ""
    named = ", ".join(map(str, epochs[:MAX_GAPS]))
    if len(epochs) > MAX_GAPS:
        named += f" and {len(epochs) - MAX_GAPS} more"
    return f"The training loss was not finite in epoch {named}: training diverged."


def confusion_section(contents: ReportContents) -> Markup | None:
    """Render the predicted classes of each class; a cell is a button that shows its images."""
    table = _confusion_table(contents)
    if table is None:
        return None
    images = _cell_images(contents, _shown_cells(table))
    content = {"cells": images, "classes": contents.classes} if images else None
    return _render_confusion(contents, table, images, content)


def confusion_buttons(contents: ReportContents) -> Markup | None:
    """Render the same for a page that finds the images of a cell itself, by its `data-cell`."""
    table = _confusion_table(contents)
    if table is None:
        return None
    return _render_confusion(contents, table, {_cell_key(*cell) for cell in _shown_cells(table)})


def _confusion_table(contents: ReportContents) -> ConfusionTable | None:
    if contents.summary is None or not contents.summary.get("confusion"):
        return None
    return np.asarray(contents.summary["confusion"], dtype=np.int64)


def _shown_cells(table: ConfusionTable) -> list[tuple[int, int]]:
    """Return (target, pred) of the cells with images, of a table or of a list of confusions."""
    return confusion_cells(table) if len(table) <= MAX_CLASSES else confused_pairs(table)


def _render_confusion(
    contents: ReportContents,
    table: ConfusionTable,
    keys: Collection[str],
    content: Mapping[str, Any] | None = None,
) -> Markup:
    """Render the table, or the list of confusions if there are too many classes.

    Args:
        keys: of the cells that are buttons.
        content: the images that the page holds.
    """
    as_table = len(table) <= MAX_CLASSES
    rows: list[list[dict[str, Any]]] = []
    pairs: list[dict[str, Any]] = []
    if as_table:
        rows = [_confusion_row(table, target, keys) for target in range(len(table))]
    else:
        pairs = [_confusion_pair(contents, table, cell, keys) for cell in _shown_cells(table)]
    return render_template(
        "confusion.html",
        classes=contents.classes,
        split=SPLIT_WORDS[contents.split],
        as_table=as_table,
        rows=rows,
        pairs=pairs,
        confusions=int((table - np.diag(table.diagonal()) > 0).sum()),
        clickable=bool(keys),
        content=content,
    )


def confusion_cells(table: ConfusionTable) -> list[tuple[int, int]]:
    """Return (target, pred) of every cell with images in it."""
    return [(int(target), int(pred)) for target, pred in np.argwhere(table > 0)]


def confused_pairs(table: ConfusionTable) -> list[tuple[int, int]]:
    """Return (target, pred) of the most frequent confusions, the most frequent first."""
    wrong = table - np.diag(table.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    cells = (np.unravel_index(int(i), wrong.shape) for i in order)
    return [(int(target), int(pred)) for target, pred in cells if wrong[target, pred]]


def cell_shade(count: int, total: int, correct: bool) -> int:
    """Return the shade of a cell from 0 (none) to 9 (all) for its share of the class.

    Shades of mistakes follow the square root of the share. A good model's mistakes are a few
    percent of a class, and would all look white on the scale of the diagonal.
    """
    if not count:
        return 0
    share = count / total
    return max(1, min(9, round(9 * (share if correct else math.sqrt(share)))))


def _confusion_row(
    table: ConfusionTable, target: int, keys: Collection[str]
) -> list[dict[str, Any]]:
    total = int(table[target].sum())
    return [
        {
            "pred": pred,
            "target": target,
            "count": count,
            "correct": pred == target,
            "shade": cell_shade(count, total, pred == target),
            "key": _known_key(target, pred, keys),
        }
        for pred, count in enumerate(table[target].tolist())
    ]


def _confusion_pair(
    contents: ReportContents,
    table: ConfusionTable,
    cell: tuple[int, int],
    keys: Collection[str],
) -> dict[str, Any]:
    target, pred = cell
    return {
        "target": contents.classes[target],
        "pred": contents.classes[pred],
        "count": int(table[target, pred]),
        "share": table[target, pred] / table[target].sum(),
        "key": _known_key(target, pred, keys),
    }


def _cell_key(target: int, pred: int) -> str:
    return f"{target}-{pred}"


def _known_key(target: int, pred: int, keys: Collection[str]) -> str | None:
    key = _cell_key(target, pred)
    return key if key in keys else None


def _cell_images(contents: ReportContents, cells: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return for each cell its count and, for the first images, thumbnail, id and confidence.

    The most confident mistakes come first, and the least confident correct predictions.
    """
    if contents.predictions is None or contents.images is None:
        return {}
    probs, targets = contents.predictions.probs, contents.predictions.labels
    preds = probs.argmax(axis=1)
    confidences = probs.max(axis=1)
    positions: dict[str, list[int]] = {}
    for target, pred in cells:
        members = np.flatnonzero((targets == target) & (preds == pred))
        order = confidences[members] if target == pred else -confidences[members]
        ordered = members[np.argsort(order, kind="stable")]
        positions[_cell_key(target, pred)] = ordered.tolist()
    sources = cell_thumbnails(contents.images, positions)
    ids = contents.images.ids
    return {
        key: {
            "n": len(members),
            "images": [
                [source, str(ids[i]), round(float(confidences[i]), 4)]
                for source, i in zip(sources[key], members, strict=False)
            ],
        }
        for key, members in positions.items()
    }


def classes_section(contents: ReportContents) -> Markup | None:
    """Render the sortable scores of each class, with its most frequent confusion."""
    if contents.summary is None or not contents.summary.get("per_class"):
        return None
    table = np.asarray(contents.summary["confusion"], dtype=np.int64)
    rows = []
    for index, (name, scores) in enumerate(contents.summary["per_class"].items()):
        mistakes = table[index].copy()
        mistakes[index] = 0
        pred = int(mistakes.argmax())
        correct = int(table[index, index])
        rows.append(
            {
                "name": name,
                **scores,
                "order": index,
                "interval": metrics.wilson_interval(correct, scores["n"]) if scores["n"] else None,
                "confused_with": (contents.classes[pred], int(mistakes[pred]))
                if mistakes[pred]
                else None,
            }
        )
    return render_template("classes.html", rows=rows, split=SPLIT_WORDS[contents.split])


def reliability_section(contents: ReportContents) -> Markup | None:
    """Render accuracy against confidence, as a chart and a table."""
    calibration = measure_calibration(contents)
    if contents.predictions is None or calibration is None:
        return None
    confidence, accuracy, count = (
        array.tolist()
        for array in metrics.reliability_bins(
            contents.predictions.probs, contents.predictions.labels
        )
    )
    bins = [
        {"from": i / len(count), "to": (i + 1) / len(count), "n": n, "confidence": c, "accuracy": a}
        for i, (c, a, n) in enumerate(zip(confidence, accuracy, count, strict=True))
        if n
    ]
    svg = reliability_chart(confidence, accuracy, count)
    return render_template("calibration.html", svg=svg, bins=bins, calibration=calibration)


def trust_section(contents: ReportContents) -> Markup | None:
    """Render the section on trust, and write the figure of risk over coverage."""
    curve = _risk_coverage(contents)
    if curve is not None:
        run_plots.plot_risk_coverage(contents.run_dir, contents.split, *curve)
    return trust_text(contents)


def _risk_coverage(contents: ReportContents) -> tuple[metrics.Floats, metrics.Floats] | None:
    """Return coverage and risk of the evaluated images; None without their predictions."""
    predictions = contents.predictions
    if predictions is None:
        return None
    preds = predictions.logits.argmax(axis=1)
    return selective.risk_coverage_curve(predictions.probs.max(axis=1), preds == predictions.labels)


def trust_text(contents: ReportContents) -> Markup | None:
    """Render the effect of the temperature, risk over coverage, promises, and unknown images."""
    predictions, summary, curve = contents.predictions, contents.summary, _risk_coverage(contents)
    if predictions is None or summary is None or curve is None:
        return None
    calibration = ModelCalibration()
    if contents.loaded is not None:
        calibration = contents.loaded.calibration
    coverage, risk = curve
    shown = np.unique(np.linspace(0, len(risk) - 1, MAX_CURVE_POINTS).round().astype(int))
    svg = line_chart(
        (100 * coverage[shown]).tolist(),
        [ChartLine("error rate", "val", risk[shown].tolist())],
        "Error rate",
        percent=True,
        unit="% answered",
        over="the share of answered images",
    )
    reserved = calibration.reserved
    answers, sets = list[dict[str, str]](), list[dict[str, str]]()
    if reserved is not None:
        confidence = as_percent(PROMISE_CONFIDENCE)
        answers = [
            _promise_row(
                f"accuracy {as_percent(share)}, confidence {confidence}",
                calibration,
                predictions,
                accuracy=share,
            )
            for share in PROMISED_ACCURACIES
        ]
        sets = [
            _promise_row(
                f"prediction sets, {as_percent(share)}", calibration, predictions, coverage=share
            )
            for share in PROMISED_COVERAGES
        ]
    return render_template(
        "trust.html",
        split=SPLIT_WORDS[contents.split],
        temperature=calibration.temperature,
        num_fitting=calibration.num_fitting,
        no_temperature="none was fitted"
        if reserved is None
        else "none differs from 1 on the validation images, or it was not fitted",
        ece_before=summary.get("ece_uncalibrated", summary["ece"]),
        ece_after=summary["ece"],
        svg=svg,
        answers=answers,
        sets=sets,
        num_reserved=0 if reserved is None else len(reserved),
        candidates=1 if reserved is None else reserved.candidates,
        grouped=reserved is not None and reserved.grouped,
        outliers=_describe_outliers(calibration),
        unlike=contents.unlike,
        n=summary["n"],
    )


def _promise_row(
    name: str,
    calibration: ModelCalibration,
    predictions: CachedPredictions,
    *,
    accuracy: float | None = None,
    coverage: float | None = None,
) -> dict[str, str]:
    """Return what a promise gives on the evaluated images, as a row of a table."""
    try:
        promises = Promises.of(calibration, accuracy, PROMISE_CONFIDENCE, coverage)
    except UsageError as error:
        return {"promise": name, "measured": f"{error.what}."}
    result = promises.measure(predictions.logits, predictions.temperature, predictions.labels)
    if accuracy is not None:
        return {"promise": name, "measured": _describe_answers(result["selective"])}
    return {"promise": name, "measured": _describe_sets(result["sets"])}


def _describe_answers(result: Mapping[str, Any]) -> str:
    if not result["answered"]:
        return "every image is unsure"
    low, high = result["interval95"]
    return (
        f"{result['coverage']:.1%} are answered, {result['accuracy']:.1%} of them correctly "
        f"(95% interval {low:.1%} to {high:.1%})"
    )


def _describe_sets(result: Mapping[str, Any]) -> str:
    low, high = result["interval95"]
    return (
        f"{result['covered']:.1%} of the sets contain the class (95% interval {low:.1%} to "
        f"{high:.1%}); {result['mean_size']:.2f} classes on average"
    )


def _describe_outliers(calibration: ModelCalibration) -> str:
    """Say how unknown images are found, and where that fails; empty if they are not."""
    detector = calibration.detector
    if detector is None:
        return ""
    if detector.uses_features and detector.reference is not None:
        rule = (
            f"whose features are farther than {detector.distance_threshold:.3f} from the k-th "
            f"nearest of {len(detector.reference):,} training images (k = {detector.neighbors})"
        )
    elif detector.energy_threshold is not None:
        rule = f"whose energy is above {detector.energy_threshold:.2f}"
    else:
        return "There are too few validation images for a threshold for unknown images."
    return (
        f"predict marks images as unlike the training images {rule}. By construction it marks "
        f"about {1 - ORDINARY_SHARE:.0%} of ordinary images, too. It notices images that look "
        "different to the network, and misses many others: an unknown kind of object that "
        "resembles a known class is often not marked. An image without the mark is not proven to "
        "be of a known class."
    )


def mistakes_section(contents: ReportContents) -> Markup | None:
    """Render the mistakes with the lowest probability of the true class."""
    if contents.predictions is None or contents.images is None:
        return None
    probs, targets = contents.predictions.probs, contents.predictions.labels
    worst = run_plots.worst_mistake_images(probs, targets)
    shown = worst[:MAX_MISTAKES].tolist()
    images = []
    for i, source in zip(shown, thumbnails(contents.images, shown), strict=True):
        pred = int(probs[i].argmax())
        images.append(
            {
                "source": source,
                "id": str(contents.images.ids[i]),
                "confidence": float(probs[i, pred]),
                "pred": contents.classes[pred],
                "target": contents.classes[targets[i]],
            }
        )
    return render_template("mistakes.html", images=images, wrong=len(worst), n=len(targets))


def activation_figures(contents: ReportContents) -> Sequence[PageFigure]:
    """Return the activations of the stem and of each block for some images."""
    subject = _inspected_model(contents)
    if subject is None:
        return ()
    (layers,) = check_layers([subject], ())
    figures = []
    for picture in _example_pictures(contents):
        activity = compute_activity(subject, picture, layers)
        title = f"{contents.name}, {picture.name}"
        content = activation_figure(activity, title, channels=CHANNELS_PER_LAYER)
        text = f"{picture.name}: {describe_prediction(activity)}"
        blank = ", ".join(f"{n.layer} {n.blank} of {n.channels}" for n in activity.numbers())
        caption = f"{text}. Blank channels: {blank}."
        figures.append(PageFigure(content, f"Activations for {text}", caption))
    return figures


def attribution_figures(contents: ReportContents) -> Sequence[PageFigure]:
    """Return the pixels that support the predictions of the network."""
    subject, pictures = _inspected_model(contents), _example_pictures(contents)
    if subject is None or not pictures:
        return ()
    folder = contents.run_dir.plots / INSIDE_FOLDER
    maps = attribution.attribute(
        [subject], [pictures], ATTRIBUTION_METHODS, folder=folder, quiet=True
    )
    layer = maps.models[0].layer
    caption = f"Grad-CAM at {layer} and integrated gradients, for the predicted class."
    names = ", ".join(picture.name for picture in pictures)
    return [PageFigure(maps.figure.read_bytes(), f"Attribution maps for {names}", caption)]


def stage_figures(contents: ReportContents) -> Sequence[PageFigure]:
    """Return measurements of each stage: linear probe, reconstruction, rank, dead channels."""
    subject = _inspected_model(contents)
    if subject is None:
        return ()
    if not len(subject.data.val):
        contents.missing.append("The stages were not measured: the run has no validation images.")
        return ()
    result = measure(
        [subject],
        STAGE_MEASURES,
        folder=contents.run_dir.plots / INSIDE_FOLDER,
        images=MEASURED_IMAGES,
        learn_from=PROBE_IMAGES,
        quiet=True,
    )
    caption = (
        f"On up to {MEASURED_IMAGES:,} validation images; probes and decoders learned from up "
        f"to {PROBE_IMAGES:,} training images. `convlens look RUN --measure all` measures more, on "
        "more images."
    )
    return [
        PageFigure(path.read_bytes(), f"Measurements of the stages of {contents.name}", caption)
        for path in result.files
        if path.name == "measures.png"
    ]


def _inspected_model(contents: ReportContents) -> InspectedModel | None:
    """Return the model on its device; None without its weights or images."""
    if contents.loaded is None or contents.images is None or contents.predictions is None:
        return None
    plan = place_model(contents.loaded.model, contents.device)
    return InspectedModel(contents.name, contents.loaded, plan, contents.run_dir)


def _example_pictures(contents: ReportContents) -> list[Picture]:
    """Return correctly classified images of the first classes, then the worst mistake."""
    if contents.predictions is None or contents.images is None:
        return []
    targets = contents.predictions.labels
    positions = pick_examples(contents.predictions.probs, targets, CORRECT_EXAMPLES)
    pixels = contents.images.rows.gather(torch.tensor(positions, dtype=torch.int64))
    return [
        Picture(f"{contents.split}:{position}", image, int(targets[position]))
        for position, image in zip(positions, pixels, strict=True)
    ]


# Sections that look inside the network, by their id: heading, introduction, and a function that
# returns finished figures, or none if there is nothing to show.
INSIDE_SECTIONS: dict[str, tuple[str, str, Callable[[ReportContents], Sequence[PageFigure]]]] = {
    "activations": ("Activations", "The output of each stage for some images.", activation_figures),
    "attributions": (
        "Attribution",
        "The pixels that support the predictions.",
        attribution_figures,
    ),
    "stages": ("Stages", "Measured on held-out images.", stage_figures),
}


def inside_section(name: str) -> Callable[[ReportContents], Markup | None]:
    """Return the section of an entry of `INSIDE_SECTIONS`; errors become notes on the page."""

    def render(contents: ReportContents) -> Markup | None:
        heading, lead, make_figures = INSIDE_SECTIONS[name]
        try:
            return render_figures(make_figures(contents), lead)
        except ConvlensError as error:
            contents.missing.append(f"{heading}: {error.what}.")
            return None

    return render


def data_section(contents: ReportContents) -> Markup | None:
    """Render the origin of the splits, and the audit of the images."""
    metadata = contents.metadata.get("data") or contents.model_metadata.get("data")
    if not metadata:
        return None
    audit = contents.audit
    return render_template(
        "data.html",
        data=dict(metadata),
        audit=audit,
        sizes=None if audit is None else [audit.width, audit.height],
        name=contents.name,
    )


def recipe_section(contents: ReportContents) -> Markup | None:
    """Render the resolved recipe, and its differences from the published one of its name."""
    if contents.recipe is None:
        return None
    return render_template(
        "recipe.html",
        recipe=contents.recipe,
        text=contents.recipe.to_text(),
        changed=recipe_differences(contents.recipe),
        published=contents.recipe.name in recipe_names(),
    )


def recipe_differences(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return `(key, here, published)` for each key that differs from the published recipe.

    Values that the published recipe leaves to `auto` do not count as differences.
    """
    if recipe.name not in recipe_names():
        return []
    here, published = (
        flatten_recipe(r.model_dump(mode="json")) for r in (recipe, load_recipe(recipe.name))
    )
    return [
        (key, here.get(key, "–"), published.get(key, "–"))
        for key in here | published
        if here.get(key, "–") != published.get(key, "–")
        and published.get(key) != "auto"
        and key not in ("name", "about")
    ]


def flatten_recipe(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return dotted keys and their values as text; lists count as values."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_recipe(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[f"{prefix}{key}"] = text
    return flat


def environment_section(contents: ReportContents) -> Markup | None:
    """Render versions, hardware and fingerprints."""
    metadata, model_metadata = contents.metadata, contents.model_metadata
    hardware = dict(metadata.get("hardware", {}))
    plan = dict(metadata.get("plan", {}))
    started_from = metadata.get("weights") or model_metadata.get("weights") or {}
    rows = {
        "convlens": metadata.get("convlens", model_metadata.get("convlens")),
        "Python": hardware.pop("python", None),
        "torch": hardware.pop("torch", None),
        "system": hardware.pop("system", None),
        "processor": hardware.pop("cpu", None),
        **{key.replace("_", " "): value for key, value in hardware.items()},
        "precision": plan.get("precision"),
        "memory format": plan.get("memory_format"),
        "deterministic": plan.get("deterministic"),
        "trained": metadata.get("created"),
        "training time": _optional_seconds(metadata.get("training_seconds")),
        "processor time": _optional_seconds(metadata.get("cpu_seconds")),
        "weights": _optional_count(metadata.get("parameters")),
        "weights trained": _optional_count(metadata.get("trainable_parameters")),
        "pretrained weights": started_from.get("origin"),
        "licence of these weights": started_from.get("licence"),
    }
    data = metadata.get("data") or model_metadata.get("data") or {}
    hashes = {
        "data (SHA-256)": data.get("fingerprint"),
        "model file (SHA-256)": model_metadata.get("sha256"),
        "pretrained weights (SHA-256)": started_from.get("sha256"),
        "recipe as requested": next(iter(metadata.get("digests", [])), None),
    }
    rows = {key: str(value) for key, value in rows.items() if value is not None}
    hashes = {key: value for key, value in hashes.items() if value}
    return render_template("environment.html", rows=rows, hashes=hashes) if rows or hashes else None


def _optional_seconds(value: float | None) -> str | None:
    return None if value is None else format_seconds(value)


def _optional_count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def reproduce_section(contents: ReportContents) -> Markup | None:
    """Render the commands that repeat the training, the evaluation and this page."""
    recipe = contents.recipe
    if recipe is None:
        return None
    name = shlex.quote(contents.name)
    version = contents.metadata.get("convlens", contents.model_metadata.get("convlens"))
    commands = [(f"pip install convlens=={version}", "the version that trained it")]
    if recipe.name in recipe_names() and not recipe_differences(recipe):
        note = "trains the recipe, unless a finished run of it exists"
        commands.append((f"convlens train {shlex.quote(recipe.name)}", note))
    repeat = shlex.quote(contents.name + "-again")
    commands += [
        (
            f"convlens train recipe.yaml --name {repeat}",
            "recipe.yaml is the recipe above, also in the run directory",
        ),
        (f"convlens evaluate {name} --split {contents.split}", "the numbers of this page"),
        (f"convlens report {name}", "this page"),
    ]
    return render_template("reproduce.html", commands=commands)


SECTIONS: dict[str, PageSection] = {
    "curves": ("Curves", curves_section),
    "confusion": ("Confusion", confusion_section),
    "classes": ("Classes", classes_section),
    "calibration": ("Calibration", reliability_section),
    "trust": ("How far can a single answer be trusted", trust_section),
    "mistakes": ("Worst mistakes", mistakes_section),
    **{name: (heading, inside_section(name)) for name, (heading, _, _) in INSIDE_SECTIONS.items()},
    "data": ("Data", data_section),
    "recipe": ("Recipe", recipe_section),
    "environment": ("Environment", environment_section),
    "reproduce": ("How to reproduce", reproduce_section),
}

"""The parts of a run's page, in their order: a function each, and the table of them."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from markupsafe import Markup

from convlens import metrics, run_plots
from convlens.device import Plan
from convlens.engine.inference import place_model
from convlens.errors import ConvlensError
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
from convlens.reports import html
from convlens.reports.contents import ReportContents
from convlens.reports.html import (
    ChartLine,
    PageFigure,
    PageSection,
    figures_of,
    format_seconds,
    format_share,
    render_page,
)

# ---- confusing ----------------------------------------
# The confusion section: a table whose cells show their images, or a list where it is too large.

MAX_CLASSES = 40  # classes that still make a readable table
MAX_PAIRS = 60  # confusions that are listed where there are more

ConfusionTable = npt.NDArray[np.int64]


def confusion_section(found: ReportContents) -> Markup | None:
    """What each class was taken for. A cell is a button: it shows the images counted in it."""
    if found.summary is None or not found.summary.get("confusion"):
        return None
    table = np.asarray(found.summary["confusion"], dtype=np.int64)
    whole = len(table) <= MAX_CLASSES
    wanted = confusion_cells(table) if whole else confused_pairs(table)
    shown = _pair_images(found, wanted)
    return render_page(
        "confusion.html",
        classes=found.classes,
        what=CALIBRATION_WORDS[found.split],
        whole=whole,
        rows=[_confusion_row(table, t, shown) for t in range(len(table))] if whole else [],
        pairs=[] if whole else [_pair_row(found, table, t, s, shown) for t, s in wanted],
        confusions=int((table - np.diag(table.diagonal()) > 0).sum()),
        content={"cells": shown, "classes": found.classes} if shown else None,
    )


def confusion_cells(table: ConfusionTable) -> list[tuple[int, int]]:
    """(truth, said) of every cell with images in it."""
    return [(int(t), int(s)) for t, s in np.argwhere(table > 0)]


def confused_pairs(table: ConfusionTable) -> list[tuple[int, int]]:
    """(truth, said) of the most frequent confusions, the most frequent first."""
    wrong = table - np.diag(table.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    run_dirs = (np.unravel_index(int(i), wrong.shape) for i in order)
    return [(int(t), int(s)) for t, s in run_dirs if wrong[t, s]]


def cell_shade(count: int, total: int, right: bool) -> int:
    """From 0 (none) to 9 (all): the share of the class; the root of it for mistakes.

    A good model's mistakes are a few per cent of a class: on one scale with the diagonal they
    would all look white.
    """
    if not count:
        return 0
    share = count / total
    return max(1, min(9, round(9 * (share if right else math.sqrt(share)))))


def _confusion_row(
    table: ConfusionTable, truth: int, shown: dict[str, Any]
) -> list[dict[str, Any]]:
    total = int(table[truth].sum())
    return [
        {
            "said": said,
            "truth": truth,
            "count": int(count),
            "right": said == truth,
            "shade": cell_shade(int(count), total, said == truth),
            "share": count / total if total else None,
            "key": _color_key(truth, said) if _color_key(truth, said) in shown else None,
        }
        for said, count in enumerate(table[truth].tolist())
    ]


def _pair_row(
    found: ReportContents, table: ConfusionTable, truth: int, said: int, shown: dict[str, Any]
) -> dict[str, Any]:
    key = _color_key(truth, said)
    return {
        "truth": found.classes[truth],
        "said": found.classes[said],
        "count": int(table[truth, said]),
        "share": table[truth, said] / table[truth].sum(),
        "key": key if key in shown else None,
    }


def _color_key(truth: int, said: int) -> str:
    return f"{truth}-{said}"


def _pair_images(found: ReportContents, wanted: list[tuple[int, int]]) -> dict[str, Any]:
    """For each cell its count and, for the first images, picture, id and confidence.

    The surest mistakes come first; of right answers the least sure.
    """
    if found.answers is None or found.images is None:
        return {}
    probs, labels = found.answers.probs, found.answers.labels
    said = probs.argmax(axis=1)
    sure = probs.max(axis=1)
    run_dirs: dict[str, list[int]] = {}
    for truth, guess in wanted:
        here = np.flatnonzero((labels == truth) & (said == guess))
        by = sure[here] if truth == guess else -sure[here]
        run_dirs[_color_key(truth, guess)] = here[np.argsort(by, kind="stable")].tolist()
    pictures = html.cell_thumbnails(found.images, run_dirs)
    ids = found.images.ids
    return {
        key: {
            "n": len(where),
            "images": [
                [source, str(ids[i]), round(float(sure[i]), 4)]
                for source, i in zip(pictures[key], where, strict=False)
            ],
        }
        for key, where in run_dirs.items()
    }


# ---- insides ----------------------------------------
# The sections of a page that look inside the network: activations, evidence, what stages know.

CORRECT_SHOWN = (
    2  # images that are classified correctly, of different classes; beside the worst mistake
)
REPORT_METHODS = ("grad-cam", "integrated-gradients")
# So many images are measured, and learned from: some seconds for a ResNet-18 at 32 px.
MEASURED, LEARNED = 500, 1000
REPORT_MEASURES = ("probe", "picture", "rank", "dead")
REPORT_CHANNELS = 32  # shown of each layer
INSIDE_FOLDER = (
    "report"  # not `look`, whose finer measurements and maps of other images are to stay
)


def activations_section(found: ReportContents) -> Sequence[PageFigure]:
    """What the stem and each block give for some images."""
    subject = _subject(found)
    if subject is None:
        return ()
    (names,) = check_layers([subject], ())
    made = []
    for picture in _chosen_pictures(found):
        seen = compute_activity(subject, picture, names)
        title = f"{found.name}, {picture.name}"
        figure = activation_figure(seen, title, channels=REPORT_CHANNELS)
        said = f"{picture.name}: {describe_prediction(seen)}"
        blank = ", ".join(f"{n.layer} {n.blank} of {n.channels}" for n in seen.numbers())
        made.append(
            PageFigure(figure, f"Activations for {said}", f"{said}. Blank channels: {blank}.")
        )
    return made


def attributions_section(found: ReportContents) -> Sequence[PageFigure]:
    """Which pixels speak for what the network says."""
    subject, pictures = _subject(found), _chosen_pictures(found)
    if subject is None or not pictures:
        return ()
    folder = found.run_dir.plots / INSIDE_FOLDER
    maps = attribution.attribute([subject], [pictures], REPORT_METHODS, folder=folder, quiet=True)
    layer = maps.models[0].layer
    words = f"Grad-CAM at {layer}, and integrated gradients, for the class that was predicted."
    names = ", ".join(picture.name for picture in pictures)
    return [PageFigure(maps.figure.read_bytes(), f"Attribution maps for {names}", words)]


def stages_section(found: ReportContents) -> Sequence[PageFigure]:
    """What can be read off each stage: the class, the picture, how many directions it uses."""
    subject = _subject(found)
    if subject is None:
        return ()
    if not len(subject.data.val):
        found.missing.append("The stages were not measured: the run held no validation images out.")
        return ()
    result = measure(
        [subject],
        REPORT_MEASURES,
        folder=found.run_dir.plots / INSIDE_FOLDER,
        images=MEASURED,
        learn_from=LEARNED,
        quiet=True,
    )
    words = (
        f"On {MEASURED:,} validation images at most; probes and decoders learned on {LEARNED:,} "
        "training images. `convlens look RUN --measure all` measures more, on more."
    )
    return [
        PageFigure(path.read_bytes(), f"Measurements of the stages of {found.name}", words)
        for path in result.files
        if path.name == "measures.png"
    ]


def _subject(found: ReportContents) -> InspectedModel | None:
    """The run as something to look into; None without its weights or images."""
    if found.loaded is None or found.images is None or found.answers is None:
        return None
    plan: Plan = place_model(found.loaded.model, found.device)
    return InspectedModel(found.name, found.loaded, plan, found.run_dir)


def _chosen_pictures(found: ReportContents) -> list[Picture]:
    """Images of the judged split: right ones of the first classes, then the surest mistake."""
    if found.answers is None or found.images is None:
        return []
    labels = found.answers.labels
    run_dirs = pick_examples(found.answers.probs, labels, CORRECT_SHOWN)
    pixels = found.images.rows.gather(torch.tensor(run_dirs, dtype=torch.int64))
    return [
        Picture(f"{found.split}:{run_dir}", image, int(labels[run_dir]))
        for run_dir, image in zip(run_dirs, pixels, strict=True)
    ]


# ---- origin ----------------------------------------
# Where a run comes from: its recipe, what it ran on, and the commands that make it again.

AUTO = "auto"


def recipe_section(found: ReportContents) -> Markup | None:
    """The resolved recipe, and where it differs from the published one of its name."""
    if found.recipe is None:
        return None
    changed = recipe_differences(found.recipe)
    return render_page(
        "recipe.html",
        recipe=found.recipe,
        text=found.recipe.to_text(),
        changed=changed,
        published=found.recipe.name in recipe_names(),
    )


def recipe_differences(mine: Recipe) -> list[tuple[str, str, str]]:
    """`(key, here, published)` wherever a run's recipe isn't the published one of its name.

    What the published one leaves to `auto` is no difference.
    """
    if mine.name not in recipe_names():
        return []
    ours, theirs = (
        flatten_recipe(r.model_dump(mode="json")) for r in (mine, load_recipe(mine.name))
    )
    found = []
    for key in ours | theirs:
        here, there = ours.get(key, "–"), theirs.get(key, "–")
        if here != there and there != AUTO and key not in ("name", "about"):
            found.append((key, here, there))
    return found


def flatten_recipe(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Dotted keys and their values as text; lists count as values."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flatten_recipe(value, f"{above}{key}.")
        else:
            plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[f"{above}{key}"] = plain
    return found


def environment_section(found: ReportContents) -> Markup | None:
    """Versions, hardware and fingerprints."""
    facts, model_metadata = found.facts, found.model_metadata
    hardware = dict(facts.get("hardware", {}))
    plan = dict(facts.get("plan", {}))
    rows = {
        "convlens": facts.get("convlens", model_metadata.get("convlens")),
        "Python": hardware.pop("python", None),
        "torch": hardware.pop("torch", None),
        "system": hardware.pop("system", None),
        "processor": hardware.pop("cpu", None),
        **{key.replace("_", " "): value for key, value in hardware.items()},
        "precision": plan.get("precision"),
        "memory format": plan.get("memory_format"),
        "deterministic": plan.get("deterministic"),
        "trained": facts.get("created"),
        "training time": _training_seconds(facts.get("training_seconds")),
        "processor time": _training_seconds(facts.get("cpu_seconds")),
        "weights": _parameter_count(facts.get("parameters")),
        "weights trained": _parameter_count(facts.get("trainable_parameters")),
    }
    hashes = {
        "data (SHA-256)": (facts.get("data") or model_metadata.get("data") or {}).get(
            "fingerprint"
        ),
        "model file (SHA-256)": model_metadata.get("sha256"),
        "recipe as asked for": next(iter(facts.get("digests", [])), None),
    }
    rows = {key: str(value) for key, value in rows.items() if value is not None}
    hashes = {key: value for key, value in hashes.items() if value}
    return render_page("environment.html", rows=rows, hashes=hashes) if rows or hashes else None


def reproduce_section(found: ReportContents) -> Markup | None:
    """The commands that train the same again, test it and make this page."""
    if found.recipe is None:
        return None
    name = shlex.quote(found.name)
    version = found.facts.get("convlens", found.model_metadata.get("convlens"))
    published = found.recipe.name in recipe_names() and not recipe_differences(found.recipe)
    commands = [(f"pip install convlens=={version}", "the version that trained it")]
    if published:
        again = "trains the recipe; a finished run of it is found, not trained again"
        commands.append((f"convlens train {shlex.quote(found.recipe.name)}", again))
    commands.append(
        (
            f"convlens train recipe.yaml --name {shlex.quote(found.name + '-again')}",
            "trains anew; recipe.yaml is the text above, also in the run's folder",
        )
    )
    commands += [
        (f"convlens evaluate {name} --split {found.split}", "the numbers of this page"),
        (f"convlens report {name}", "this page"),
    ]
    return render_page("reproduce.html", commands=commands)


def _training_seconds(value: float | None) -> str | None:
    return None if value is None else format_seconds(value)


def _parameter_count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


MISTAKES_SHOWN = 24  # of the worst mistakes
EPOCHS_SHOWN = 1000  # rows of the table of epochs, at most
CLASSES_PER_PART = (("train", "training"), ("val", "validation"))


def head_section(found: ReportContents) -> Markup:
    """Name, verdict and the numbers that everybody asks for."""
    summary = found.summary
    trained = found.trained_accuracy()
    looks = 0
    if found.split == "test":
        sha = found.model_metadata.get("sha256")
        log = found.run_dir.evaluation_log()
        same = [x for x in log if x["split"] == "test" and x["model_sha256"] == sha]
        looks = len([x for x in same if x.get("own")])
    floor = bar = None
    common = most_common_errors(found)
    if summary is not None and common is not None:
        floor = common[1]
        low, high = summary["interval95"]
        said = f"accuracy {format_share(summary['accuracy'])}, interval {format_share(low)} to {format_share(high)}"
        bar = html.interval_chart(low, high, summary["accuracy"], floor, said)
    return render_page(
        "head.html",
        found=found,
        verdict=verdict_section(found),
        summary=summary,
        trained=trained,
        calibration=calibration(found),
        looks=looks,
        floor=floor,
        bar=bar,
        what=CALIBRATION_WORDS[found.split],
    )


def curves_section(found: ReportContents) -> Markup | None:
    """Loss and accuracy over epochs, with the kept epoch marked, and the numbers as a table."""
    if not found.rows:
        return None
    x = [row["epoch"] for row in found.rows]
    charts = []
    for key, label, percent in (("loss", "Loss (nats)", False), ("accuracy", "Accuracy", True)):
        lines = [
            ChartLine(words, part, [row[f"{part}_{key}"] for row in found.rows])
            for part, words in CLASSES_PER_PART
        ]
        lines = [line for line in lines if any(map(math.isfinite, line.values))]
        svg = html.line_chart(x, lines, label, percent=percent, mark=found.kept_epoch)
        legend = [(html.color_swatch(line.look), line.name) for line in lines]
        charts.append({"title": label, "svg": svg, "legend": legend})
    return render_page(
        "curves.html",
        charts=charts,
        rows=found.rows[:EPOCHS_SHOWN],
        gaps=gaps_section(found.rows),
        kept=found.kept_epoch,
        more=max(0, len(found.rows) - EPOCHS_SHOWN),
        validated=any(math.isfinite(row["val_loss"]) for row in found.rows),
    )


def gaps_section(rows: Sequence[dict[str, float]]) -> str:
    """The epochs whose training loss is not a number, in words; empty if there are none."""
    bad = [int(row["epoch"]) for row in rows if not math.isfinite(row["train_loss"])]
    if not bad:
        return ""
    listed = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" * (len(bad) > 8))
    return f"The training loss was not a number in epoch {listed}: the training diverged there."


def classes_section(found: ReportContents) -> Markup | None:
    """How each class fares, sortable; with what it is most often taken for."""
    if found.summary is None or not found.summary.get("per_class"):
        return None
    table = np.asarray(found.summary["confusion"], dtype=np.int64)
    rows = []
    for index, (name, scores) in enumerate(found.summary["per_class"].items()):
        others = table[index].copy()
        others[index] = 0
        most = int(others.argmax())
        hits = int(table[index, index])
        rows.append(
            {
                "name": name,
                **scores,
                "order": index,
                "interval": metrics.wilson_interval(hits, scores["n"]) if scores["n"] else None,
                "taken": (found.classes[most], int(others[most])) if others[most] else None,
            }
        )
    return render_page("classes.html", rows=rows, what=CALIBRATION_WORDS[found.split])


def reliability_section(found: ReportContents) -> Markup | None:
    """Whether the stated probabilities can be taken at their word."""
    judged = calibration(found)
    if found.answers is None or judged is None:
        return None
    confidence, right, count = (
        array.tolist()
        for array in metrics.reliability_bins(found.answers.probs, found.answers.labels)
    )
    bins = [
        {"from": i / len(count), "to": (i + 1) / len(count), "n": n, "sure": c, "right": r}
        for i, (c, r, n) in enumerate(zip(confidence, right, count, strict=True))
        if n
    ]
    svg = html.reliability_chart(confidence, right, count)
    return render_page("calibration.html", svg=svg, bins=bins, judged=judged)


def mistakes_section(found: ReportContents) -> Markup | None:
    """The wrong answers that were least likely to the truth."""
    if found.answers is None or found.images is None:
        return None
    probs, labels = found.answers.probs, found.answers.labels
    worst = run_plots.worst_mistake_images(probs, labels)
    shown = worst[:MISTAKES_SHOWN].tolist()
    pictures = []
    for i, source in zip(shown, html.thumbnails(found.images, shown), strict=True):
        said = int(probs[i].argmax())
        pictures.append(
            {
                "source": source,
                "id": str(found.images.ids[i]),
                "sure": float(probs[i, said]),
                "said": found.classes[said],
                "truth": found.classes[labels[i]],
                "of_truth": float(probs[i, labels[i]]),
            }
        )
    return render_page("mistakes.html", pictures=pictures, wrong=len(worst), n=len(labels))


# Ways of looking inside, by name: each returns finished pictures, or none where there is nothing
# to show. They become sections of their own.
InsideSection = Callable[[ReportContents], Sequence[PageFigure]]
INSIDE_SECTIONS: dict[str, tuple[str, str, InsideSection]] = {
    "activations": ("Activations", "What each stage gives for some images.", activations_section),
    "attributions": (
        "Evidence",
        "Which pixels speak for what the model says.",
        attributions_section,
    ),
    "stages": ("What each stage knows", "Measured on held-out images.", stages_section),
}


def inside_section(name: str) -> Callable[[ReportContents], Markup | None]:
    """The section of an entry of `LOOKS`; what can't be drawn is said and left out."""

    def draw(found: ReportContents) -> Markup | None:
        _, lead, look = INSIDE_SECTIONS[name]
        try:
            return figures_of(look(found), lead)
        except ConvlensError as error:
            found.missing.append(f"{INSIDE_SECTIONS[name][0]}: {error.what}.")
            return None

    return draw


def data_section(found: ReportContents) -> Markup | None:
    """Where the splits come from, and what an audit of every image found."""
    about: dict[str, Any] = dict(found.facts.get("data") or found.model_metadata.get("data") or {})
    if not about:
        return None
    report = found.audit
    sizes = None
    if report is not None:
        sizes = [report.width, report.height]
    return render_page("data.html", about=about, report=report, sizes=sizes, name=found.name)


SECTIONS: dict[str, PageSection] = {
    "curves": ("Curves", curves_section),
    "confusion": ("Confusion", confusion_section),
    "classes": ("Classes", classes_section),
    "calibration": ("Calibration", reliability_section),
    "mistakes": ("Worst mistakes", mistakes_section),
    **{name: (INSIDE_SECTIONS[name][0], inside_section(name)) for name in INSIDE_SECTIONS},
    "data": ("Data", data_section),
    "recipe": ("Recipe", recipe_section),
    "environment": ("Environment", environment_section),
    "reproduce": ("How to reproduce", reproduce_section),
}


# ---- verdict ----------------------------------------
# What a run's numbers come to, in a sentence.

CALIBRATION_WORDS = {"test": "test", "val": "validation", "train": "training"}


class Calibration(NamedTuple):
    """`error` (ECE), the error that chance alone explains, and confidence minus accuracy."""

    error: float
    chance: float
    surplus: float

    @property
    def good(self) -> bool:
        return self.error <= self.chance

    @property
    def words(self) -> str:
        """E.g. `overconfident`."""
        if self.good:
            return "within chance"
        if abs(self.surplus) < self.error / 2:  # too sure here, not sure enough there
            return "badly calibrated"
        return "overconfident" if self.surplus > 0 else "underconfident"


def calibration(found: ReportContents) -> Calibration | None:
    """How confidence and accuracy agree; None without the answers to single images."""
    if found.answers is None or found.summary is None:
        return None
    probs = found.answers.probs
    surplus = float(probs.max(axis=1).mean()) - float(found.summary["accuracy"])
    return Calibration(found.summary["ece"], metrics.ece_by_chance(probs), surplus)


def verdict_section(found: ReportContents) -> str:
    """One honest sentence: accuracy with n and interval, gap to training, calibration."""
    if found.summary is None:
        if not found.finished:
            done = len(found.rows)
            epochs = f"{done} epoch{'s' * (done != 1)} of training are in its log"
            return f"Not judged yet: the training has not finished; {epochs}."
        return "Not judged: there are no images held out of training to judge it by."
    s = found.summary
    low, high = s["interval95"]
    parts = [
        f"{s['accuracy']:.1%} of {s['n']:,} {CALIBRATION_WORDS[found.split]} images are classified correctly "
        f"(95% interval {low:.1%} to {high:.1%})"
    ]
    floor = most_common_errors(found)
    if floor is not None and low <= floor[1]:
        parts.append(f"not distinguishable from always saying {floor[0]!r} ({floor[1]:.1%})")
    trained = found.trained_accuracy()
    if trained is not None:
        parts.append(_overfit_gap(100 * (trained[0] - s["accuracy"]), trained[0], low, high))
    judged = calibration(found)
    if judged is None:
        parts.append(f"calibration error {s['ece']:.3f}" if s["ece"] is not None else "")
    elif judged.good:
        parts.append("its confidence agrees with its accuracy, as far as so many images can tell")
    else:
        parts.append(_uncertainty_note(judged))
    return "; ".join(part for part in parts if part) + "."


def most_common_errors(found: ReportContents) -> tuple[str, float] | None:
    """The class that most of the judged images have, and their share."""
    table = (found.summary or {}).get("confusion")
    if not table:
        return None
    counts = [sum(row) for row in table]
    most = counts.index(max(counts))
    return found.classes[most], counts[most] / sum(counts)


def _overfit_gap(points: float, trained: float, low: float, high: float) -> str:
    if low <= trained <= high:
        return f"not distinguishable from the {trained:.1%} on training images"
    much = "overfitting" if points > 10 else "some overfitting"
    if points > 0:
        return f"{points:.1f} points below the {trained:.1%} on training images ({much})"
    return f"{-points:.1f} points above the {trained:.1%} on training images"


def _uncertainty_note(judged: Calibration) -> str:
    points = f"calibration error {100 * judged.error:.1f} points"
    if judged.words == "badly calibrated":
        return f"its probabilities are off ({points})"
    return f"it is {judged.words}, by {abs(100 * judged.surplus):.1f} points on average ({points})"

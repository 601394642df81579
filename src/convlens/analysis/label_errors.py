"""Label errors in a data set, found by models that did not train on the images they judge.

K models of a recipe are trained, each without one of K folds (ordinary runs of `train_many`), so
that each image gets probabilities from a model that never saw its label. Confident learning
(`find_issues`) finds the labels that contradict these probabilities. A suspected error is not
proven: `write_review` draws a sheet of images and writes a CSV to correct.

The epoch of each model is chosen on its fold (unless the recipe keeps the last one): one choice
among some dozens of epochs, which is far too little to memorize the label of an image.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convlens import evaluation
from convlens.data import audit, duplicates
from convlens.data.dataset import Data, Split, load_data
from convlens.data.decode import Conversion, UnreadableImage, fit_arrays
from convlens.data.image_list import escape_csv_formula
from convlens.data.sources import find_configured_source
from convlens.data.types import DataSource, EncodedFiles, FilePaths, Part
from convlens.device import memory_budget, preserve_torch_settings, select_device
from convlens.engine.inference import place_model, probabilities, split_logits
from convlens.errors import UsageError, check_count
from convlens.recipe import DataConfig, Recipe
from convlens.run import (
    PLOTS_DIR,
    LoadedModel,
    RunDir,
    RunHandle,
    as_run_dir,
    check_run_name,
    load_model,
)
from convlens.training import resolve
from convlens.training.repeats import train_many
from convlens.user_code import accepts_trust, trust
from convlens.utils import files
from convlens.utils.console import message_scope, print_status, progress_bar, quiet_mode

DEFAULT_FOLDS = 5
TOP_CLASSES = 3  # classes of an image that are listed with their probabilities
MAX_TWINS = 3  # copies that are listed for an image
IMAGES_PER_CHUNK = 1024
IMAGES_PER_SHEET = 48
MAX_SHEETS = 10  # the CSV lists all suspects
THUMBNAIL_SIDE = 120

# cleanlab's default. Over planted errors on digits and MNIST (`benchmarks/labels.py`) its mean F1
# is the highest, 0.90; `both` and `prune_by_class` reach 0.89, `confident_learning` 0.86 (it names
# fewer, nearly all of them wrong), every disagreement 0.81.
FILTER_METHOD = "prune_by_noise_rate"

LabelArray = npt.NDArray[np.int64]  # [N]
Probs = npt.NDArray[np.float64]  # [N, K], rows add up to 1


@dataclass(frozen=True)
class Twin:
    """A copy of an image under another label; not `exact` means that it looks the same."""

    id: str
    label: str
    exact: bool


@dataclass(frozen=True)
class JudgedImage:
    """An image, its label, and the judgment of models that did not train on it.

    Attributes:
        split: `train` (which includes validation images) or `test`.
        suggested: the most probable class.
        score: probability of the given label.
        top: the most probable classes with their probabilities.
        rank: position among the suspects, from 1 for the most certain; None if not suspected.
        probs: probabilities of all classes, float64 `[K]`.
        twins: copies under another label, of suspects only.
    """

    id: str
    split: str
    label: str
    suggested: str
    score: float
    top: list[tuple[str, float]]
    rank: int | None
    probs: npt.NDArray[np.float64] = field(repr=False)
    twins: list[Twin] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the values of a suspect for `--json`."""
        keys = ("id", "split", "label", "suggested", "score", "top")
        twins = [asdict(twin) for twin in self.twins]
        return {**{key: getattr(self, key) for key in keys}, "twins": twins}


@dataclass(frozen=True)
class ConfusedLabels:
    """An estimated number of images labelled `label` that belong to `likely`."""

    label: str
    likely: str
    images: int


@dataclass(frozen=True)
class LabelReport:
    """Result of `find_label_errors`.

    Attributes:
        images: all images that were judged: suspects first, by rising score.
        accuracy: how often the models agree with the given labels.
        noise: estimated share of wrong labels.
        pairs: the most common confusions.
        disputed: number of pairs of copies under two labels of which neither is suspected.
        tested: whether the test split was judged, too.
        sheets, table: the paths of the sheets of images and of the CSV to correct.
        trainable: whether the CSV can be used for training, because the images are files.
    """

    name: str
    data: str
    classes: tuple[str, ...]
    folds: int
    runs: list[str]
    rule: str
    accuracy: float
    noise: float
    images: list[JudgedImage] = field(repr=False)
    pairs: list[ConfusedLabels]
    disputed: int
    tested: bool
    sheets: list[Path] = field(default_factory=list)
    table: Path | None = None
    trainable: bool = False

    @property
    def suspects(self) -> list[JudgedImage]:
        """Images whose labels are probably wrong, the most certain first."""
        return [image for image in self.images if image.rank is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the output of `convlens labels --json`."""
        return {
            "name": self.name,
            "data": self.data,
            "classes": list(self.classes),
            "folds": self.folds,
            "runs": self.runs,
            "rule": self.rule,
            "accuracy": self.accuracy,
            "noise": self.noise,
            "suspects": [suspect.to_dict() for suspect in self.suspects],
            "pairs": [asdict(pair) for pair in self.pairs],
            "disputed": self.disputed,
            "tested": self.tested,
            "sheets": [str(path) for path in self.sheets],
            "table": None if self.table is None else str(self.table),
            "trainable": self.trainable,
            "images": len(self.images),
        }


@accepts_trust
@message_scope()
@preserve_torch_settings()
def find_label_errors(
    what: str | Path | Mapping[str, Any] | Recipe | RunDir | RunHandle,
    overrides: Mapping[str, Any] | Sequence[str] | str = (),
    *,
    data: str | Path | None = None,
    folds: int = DEFAULT_FOLDS,
    test: bool = False,
    name: str | None = None,
    fresh: bool = False,
    device: str | None = None,
    quiet: bool = False,
    trust_code: bool = False,
) -> LabelReport:
    """Find images whose labels are probably wrong, by models that did not train on them.

    Args:
        what, overrides, data, name, fresh, device, quiet: as in `convlens.train`. `what` may also
            be a run, whose recipe is used.
        folds: number of models; each judges the images of the fold that it did not train on. The
            only image of a class is not judged.
        test: also judge the images of the test split, by the mean over all models. This is logged
            as a use of the test set in the run of each fold.
        trust_code: import user code that the model needs; otherwise that is an error.

    Returns:
        All images with their probabilities, the suspects first, and the paths of a sheet of images
        and of a CSV to correct.

    Raises:
        DataError: training refuses the data set.
        UsageError: `what` is not a recipe, a data set or a run.

    Example:
        >>> convlens.find_label_errors("photos/", folds=3).suspects[0].suggested
    """
    if isinstance(what, RunDir | RunHandle):
        run_dir = as_run_dir(what)
        what = run_dir.model_path if run_dir.model_path.is_file() else run_dir.path
    check_run_name(name)
    check_count("folds", folds, minimum=0)
    texts = resolve.override_texts(overrides)
    resolved = resolve.resolve_recipe_or_run(what, data=data, overrides=texts)
    if folds < 2:
        raise UsageError(
            f"{folds} folds: each image needs a model that did not train on it",
            fix="at least --folds 2",
        )
    recipe = resolved.recipe
    if not recipe.data.validates:  # the folds are the validation splits
        recipe = recipe.replace(**{"data.val_fraction": DataConfig().val_fraction})
        recipe = recipe.model_copy(update={"name": resolved.recipe.name})
        resolved = resolve.ResolvedRecipe(recipe, resolved.is_unmodified)
    named = resolve.named_code([recipe], [what, data, *texts])
    with quiet_mode(quiet), trust(named):
        all_data = _load_data(recipe.data, folds, select_device(device))
        print_status(
            f"trains {folds} models of [bold]{name or recipe.name}[/], each without one fold of "
            f"the images: this takes {folds} times as long as one training"
        )
        table = train_many(
            {None: resolved},
            folds=folds,
            name=name,
            fresh=fresh,
            test=False,
            device=device,
            quiet=quiet,
        )
        run_dirs = [outcome.run_dir for outcome in table.outcomes]
        report = _judge(table.name, recipe, run_dirs, test, device)
        folder = _output_folder(table.name, resolved, name)
        report = write_review(report, recipe.data, all_data, folder)
        if test:  # last: a command that fails costs no use of the test split
            for run_dir in run_dirs:
                evaluation.evaluate(run_dir, "test", device=device)
            print_status("test set used (logged in the run of each fold)")
        return report


def _output_folder(run_name: str, resolved: resolve.ResolvedRecipe, name: str | None) -> Path:
    """Return a folder named like runs: a modified recipe gets six digits of its hash."""
    is_unmodified = resolved.is_unmodified or name is not None
    suffix = "" if is_unmodified else f"-{resolved.recipe.digest()[:6]}"
    return PLOTS_DIR / f"labels-{run_name}{suffix}"


def _load_data(config: DataConfig, folds: int, device: str) -> Data:
    """Load the data with the splits of the first fold."""
    first = config.model_copy(update={"folds": folds, "fold": 0, "per_class": None})
    with quiet_mode():
        return load_data(first, memory_budget=memory_budget(device))


FoldModel = tuple[RunDir, LoadedModel]


@dataclass(frozen=True)
class _SplitPredictions:
    """Images of a split with their labels `[N]`, probabilities `[N, K]` and file facts."""

    ids: list[str]
    split: str
    labels: LabelArray
    probs: Probs
    facts: audit.FileFacts


def _judge(
    run_name: str, recipe: Recipe, run_dirs: Sequence[RunDir], test: bool, device: str | None
) -> LabelReport:
    """Predict all images with the models of the folds and find the suspected labels."""
    models = [(run_dir, load_model(run_dir.model_path)) for run_dir in run_dirs]
    classes = models[0][1].classes
    splits = [_predict_out_of_fold(models, device)]
    if test:
        splits.append(_predict_test_split(models, device))
    # Separately, because single models judge training images, but all models the test images.
    issues = [find_issues(split.labels, split.probs) for split in splits]
    joint = np.sum([each.joint for each in issues], axis=0)
    labels = np.concatenate([split.labels for split in splits])
    preds = np.concatenate([split.probs.argmax(1) for split in splits])
    images, disputed = _rank_images(splits, issues, classes)
    return LabelReport(
        name=run_name,
        data=recipe.data.name,
        classes=classes,
        folds=len(run_dirs),
        runs=[run_dir.name for run_dir in run_dirs],
        rule=FILTER_METHOD,
        accuracy=float((preds == labels).mean()),
        noise=float(1 - np.trace(joint) / joint.sum()),
        images=images,
        pairs=_confused_labels(joint, classes),
        disputed=disputed,
        tested=test,
    )


def _rank_images(
    splits: Sequence[_SplitPredictions], issues: Sequence[LabelIssues], classes: Sequence[str]
) -> tuple[list[JudgedImage], int]:
    """Return the images of all splits, ranked, and the number of disputed pairs of copies."""
    images = [
        image
        for split, split_issues in zip(splits, issues, strict=True)
        for image in _judged_images(split, split_issues, classes)
    ]
    labels = np.concatenate([split.labels for split in splits])
    suspected = np.concatenate([each.suspected for each in issues])
    facts = np.concatenate([split.facts for split in splits])
    twins, disputed = _find_twins(facts, labels, suspected)
    scores = np.concatenate([each.scores for each in issues])
    ranked = []
    for rank, i in enumerate(np.lexsort((scores, ~suspected)).tolist(), 1):
        if suspected[i]:
            listed = [
                Twin(images[j].id, images[j].label, exact)
                for j, exact in twins.get(i, [])[:MAX_TWINS]
            ]
            ranked.append(replace(images[i], rank=rank, twins=listed))
        else:
            ranked.append(images[i])
    return ranked, disputed


def _judged_images(
    split: _SplitPredictions, issues: LabelIssues, classes: Sequence[str]
) -> Iterator[JudgedImage]:
    """Yield the images of a split, without ranks and copies."""
    for i, identity in enumerate(split.ids):
        probs = split.probs[i]
        yield JudgedImage(
            id=identity,
            split=split.split,
            label=classes[split.labels[i]],
            suggested=classes[issues.suggested[i]],
            score=float(issues.scores[i]),
            top=[(classes[c], float(probs[c])) for c in (-probs).argsort()[:TOP_CLASSES]],
            rank=None,
            probs=probs,
        )


def _predict_out_of_fold(models: Sequence[FoldModel], device: str | None) -> _SplitPredictions:
    """Predict each image outside the test split with the model whose fold contains it."""
    folds = []
    for run_dir, model in models:
        part = evaluation.load_eval_split(model, "val", device=select_device(device)).part
        folds.append(_predict_images(part, "val", [(run_dir, model)], device))
    return _SplitPredictions(
        [identity for fold in folds for identity in fold.ids],
        "train",
        np.concatenate([fold.labels for fold in folds]),
        np.concatenate([fold.probs for fold in folds]),
        np.concatenate([fold.facts for fold in folds]),
    )


def _predict_test_split(models: Sequence[FoldModel], device: str | None) -> _SplitPredictions:
    """Predict the test split by the mean over the probabilities of all models."""
    part = evaluation.load_eval_split(models[0][1], "test", device=select_device(device)).part
    return _predict_images(part, "test", models, device)


def _predict_images(
    part: Split, split: str, models: Sequence[FoldModel], device: str | None
) -> _SplitPredictions:
    """Predict the images of a split by the mean over the probabilities of the models."""
    probs = [
        probabilities(_logits(part, split, run_dir, model, device), model.calibration.temperature)
        for run_dir, model in models
    ]
    facts = np.zeros(len(part), audit.FILE_FACTS)
    with progress_bar("looking for copies", len(part)) as bar:
        for index in torch.arange(len(part)).split(IMAGES_PER_CHUNK):
            facts[index.numpy()] = audit.facts_of(part.rows.gather(index).numpy())
            bar.advance(len(index))
    mean = np.mean(probs, axis=0)
    return _SplitPredictions(list(part.ids), split, part.labels.numpy(), mean, facts)


def _logits(
    part: Split, split: str, run_dir: RunDir, model: LoadedModel, device: str | None
) -> torch.Tensor:
    """Return the logits of a split: those that `evaluate` cached, or computed again."""
    metadata = model.model_metadata
    cached = evaluation.load_predictions(
        run_dir, split, metadata["data"]["fingerprint"], metadata["sha256"]
    )
    if cached is not None:
        return torch.from_numpy(cached.logits)
    plan = place_model(model.model, device)
    normalize = model.preprocessing.normalize
    return split_logits(
        model.model, part, normalize, plan, choose_memory_format=model.can_choose_memory_format
    )[0]


def _find_twins(
    facts: audit.FileFacts, labels: LabelArray, suspected: npt.NDArray[np.bool_]
) -> tuple[dict[int, list[tuple[int, bool]]], int]:
    """Find copies under another label, by the pixels that the network sees.

    Files of other sizes or formats are found, too.

    Returns:
        For each suspect its copies and whether they are exact, exact ones first, and the number of
        disputed pairs: copies under two labels of which neither is suspected.
    """
    twins: dict[int, list[tuple[int, bool]]] = {}
    disputed = 0
    for group in duplicates.exact_duplicates(facts["digest"]):
        has_two_labels = len(set(labels[group].tolist())) > 1
        disputed += has_two_labels and not suspected[group].any()
        for i in group if has_two_labels else ():
            if suspected[i]:
                copies = (j for j in group if labels[j] != labels[i])
                twins[i] = [(j, True) for j in itertools.islice(copies, MAX_TWINS)]
    for pair in duplicates.near_duplicates(facts["thumb"], facts["digest"])[0].tolist():
        if labels[pair[0]] == labels[pair[1]]:
            continue
        disputed += not suspected[pair].any()
        for i, j in (pair, reversed(pair)):
            if suspected[i]:
                twins.setdefault(i, []).append((j, False))
    return twins, disputed


def _confused_labels(
    joint: npt.NDArray[np.float64], classes: Sequence[str]
) -> list[ConfusedLabels]:
    """Return the off-diagonal entries that round to at least one image, the largest first."""
    counts = joint.round().astype(int)
    np.fill_diagonal(counts, 0)
    pairs = sorted(np.argwhere(counts > 0).tolist(), key=lambda pair: -counts[tuple(pair)])
    return [ConfusedLabels(classes[a], classes[b], int(counts[a, b])) for a, b in pairs]


@dataclass(frozen=True)
class LabelIssues:
    """Result of confident learning on N labels.

    Attributes:
        suspected: which labels are probably wrong, bool `[N]`.
        scores: probability of the given label, `[N]`; low scores are suspicious. It ranks planted
            errors as well as its margin over the best other class where models are good, and
            better where they are not.
        suggested: the most probable class, `[N]`.
        joint: `joint[a, b]` estimates how many images are labelled a and belong to b; rows add up
            to the number of images with that label.
    """

    suspected: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]
    suggested: LabelArray
    joint: npt.NDArray[np.float64]


def find_issues(labels: LabelArray, probs: Probs, *, rule: str = FILTER_METHOD) -> LabelIssues:
    """Find labels that contradict out-of-sample probabilities, by confident learning.

    Northcutt, Jiang & Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels"
    (JAIR 70, arXiv:1911.00068), as implemented in cleanlab.

    Args:
        labels: the given labels, int64 `[N]`.
        probs: `[N, K]` of models that did not train on these images; rows add up to 1.
        rule: cleanlab's `filter_by`.
    """
    # Importing cleanlab takes seconds.
    from cleanlab.count import compute_confident_joint
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_self_confidence_for_each_label

    joint = np.asarray(compute_confident_joint(labels, probs, calibrate=True), np.float64)
    with warnings.catch_warnings():
        # A class without images (a test split may lack one) has no labels to flag, either.
        warnings.filterwarnings("ignore", "May not flag all label issues in class")
        # One process: by default there is one for each core, each with a copy of all arrays.
        suspected = find_label_issues(labels, probs, filter_by=rule, n_jobs=1)
    suggested = probs.argmax(1).astype(np.int64)
    return LabelIssues(
        # Rules that go by counts can flag an image whose own class is the most probable.
        suspected=np.asarray(suspected, np.bool_) & (suggested != labels),
        scores=np.asarray(get_self_confidence_for_each_label(labels, probs), np.float64),
        suggested=suggested,
        joint=joint,
    )


def write_review(report: LabelReport, config: DataConfig, data: Data, folder: Path) -> LabelReport:
    """Write the sheet of suspects and a CSV of all images; return the report with their paths.

    The CSV lists all images of the data set with `path`, `label` and `split`, the suspects first.
    With corrected labels `convlens train` can use it; test images stay test images by their
    `split`. An older CSV in the folder, which may have been corrected, is kept: the new one is
    named `labels-2.csv`, and so on.

    Args:
        config: source of the images.
        data: the data set, with its held-out test images and unreadable files.
    """
    source = find_configured_source(config)
    trainable = isinstance(source.parts["train"].images, FilePaths)
    text = _review_csv(report, source, config.group, data)
    path = _unused_csv_path(folder, text)
    files.write_atomic(path, text)
    sheets = _draw_sheets(report, source, data.conversion, folder)
    return replace(report, sheets=sheets, table=path, trainable=trainable)


@dataclass(frozen=True)
class _Judgment:
    """The columns of the CSV that the models fill; empty for images that were not judged."""

    suspect: int | str = ""
    suggested: str = ""
    score: str = ""
    p_suggested: str = ""
    copies: str = ""

    @classmethod
    def of(cls, image: JudgedImage) -> _Judgment:
        return cls(
            suspect=image.rank or "",
            suggested=image.suggested,
            score=f"{image.score:.4f}",
            p_suggested=f"{image.top[0][1]:.4f}",
            copies="; ".join(f"{twin.label}: {twin.id}" for twin in image.twins),
        )


def _review_csv(report: LabelReport, source: DataSource, group: str | None, data: Data) -> str:
    """Return the CSV: suspects by rank, then all other images in the order of the source."""
    judgments = {image.id: _Judgment.of(image) for image in report.images}
    rows = []
    for identity, columns, image_group in _source_images(source, data):
        rows.append(columns | asdict(judgments.get(identity, _Judgment())))
        if group is not None and image_group is not None:
            rows[-1].setdefault(group, image_group)
    rows.sort(key=lambda row: row["suspect"] or math.inf)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: escape_csv_formula(v) if isinstance(v, str) else v for k, v in row.items()}
        )
    return text.getvalue()


def _source_images(source: DataSource, data: Data) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield id, first columns and group of each readable image (None if there are no groups).

    The columns are `path` (`id` if the images are not files), `label` and `split`.
    """
    held_out, skipped = set(data.held_out.get("test", ())), set(data.skipped)
    not_text = 0
    for split, part in source.parts.items():
        for number, identity in enumerate(part.ids):
            if identity in skipped:
                continue
            path = part.images[number] if isinstance(part.images, FilePaths) else None
            if path is not None and not _is_text(path):
                not_text += 1
                continue
            columns: dict[str, Any] = {"id": identity} if path is None else {"path": path}
            columns["label"] = source.classes[part.labels[number]]
            columns["split"] = "test" if split == "train" and identity in held_out else split
            yield identity, columns, None if part.groups is None else part.groups[number]
    if not_text:
        print_status(f"the CSV lacks {not_text} files whose names are not valid text: rename them")


def _is_text(path: str) -> bool:
    """Return whether a file name can be written to a UTF-8 file."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unused_csv_path(folder: Path, text: str) -> Path:
    """Return the first of `labels.csv`, `labels-2.csv`, ... that does not hold other content."""
    number, path = 1, folder / "labels.csv"
    while path.exists() and path.read_bytes() != text.encode():
        number += 1
        path = folder / f"labels-{number}.csv"
    return path


def _draw_sheets(
    report: LabelReport, source: DataSource, conversion: Conversion, folder: Path
) -> list[Path]:
    """Draw `review.png`, `review-2.png`, ... with `IMAGES_PER_SHEET` images each."""
    from convlens import plots

    for old in folder.glob("review*.png"):
        old.unlink()
    shown = report.suspects[: IMAGES_PER_SHEET * MAX_SHEETS]
    pages = [
        shown[start : start + IMAGES_PER_SHEET] for start in range(0, len(shown), IMAGES_PER_SHEET)
    ]
    paths = []
    for number, page in enumerate(pages, 1):
        title = f"{report.name}: suspected labels, the most certain first"
        if len(pages) > 1:
            title += f", page {number} of {len(pages)}"
        title += " (above: given label, below: suggested)"
        figure = plots.label_review(
            _thumbnails(page, source, conversion),
            [suspect.label for suspect in page],
            [suspect.suggested for suspect in page],
            [suspect.top[0][1] for suspect in page],
            title,
            first=(number - 1) * IMAGES_PER_SHEET + 1,
            copied=[bool(suspect.twins) for suspect in page],
        )
        paths.append(folder / ("review.png" if number == 1 else f"review-{number}.png"))
        plots.save_figure(figure, paths[-1])
    return paths


def _thumbnails(
    suspects: Sequence[JudgedImage], source: DataSource, conversion: Conversion
) -> np.ndarray:
    """Return uint8 `[n, C, S, S]` from the source: the network's input may be very small."""
    wanted = {suspect.id for suspect in suspects}
    located = {
        identity: (part, number)
        for part in source.parts.values()
        for number, identity in enumerate(part.ids)
        if identity in wanted
    }
    return np.stack([_thumbnail(*located[suspect.id], conversion) for suspect in suspects])


def _thumbnail(part: Part, number: int, conversion: Conversion) -> np.ndarray:
    channels = conversion.channels
    if isinstance(part.images, EncodedFiles):
        try:
            content, name = part.images.read(number), part.images.name(number)
            return replace(conversion, size=THUMBNAIL_SIDE, fit="pad").file(content, name)
        except UnreadableImage:  # deleted or changed in the meantime
            return np.full((channels, THUMBNAIL_SIDE, THUMBNAIL_SIDE), 255, np.uint8)
    pixels = part.images[np.array([number])]
    size = min(THUMBNAIL_SIDE, max(pixels.shape[2:]))
    shown: np.ndarray = fit_arrays(pixels, size=size, channels=channels, fit="pad")[0]
    return shown

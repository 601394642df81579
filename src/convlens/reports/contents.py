"""Gathers the contents of a page: everything a run directory holds, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convlens import evaluation, metrics, run, serialization
from convlens.data.audit import Audit, audit as audit_data
from convlens.data.dataset import Data, Split
from convlens.device import select_device
from convlens.errors import ConvlensError, ModelFileError, UsageError
from convlens.evaluation import CachedPredictions, Evaluation, TrainAccuracy
from convlens.recipe import Recipe
from convlens.run import LoadedModel, RunDir
from convlens.utils.console import print_status

QUICK_AUDIT_IMAGES = 5000  # data sets of up to this many images are audited by default
# Metrics that the evaluation log keeps, under the keys of `metrics.summarize`.
SUMMARY_KEYS = (
    "n",
    "correct",
    "accuracy",
    "interval95",
    "macro_f1",
    "macro_f1_interval95",
    "balanced_accuracy",
    "balanced_accuracy_interval95",
    "loss",
    "top5",
    "ece",
    "ece_uncalibrated",
    "per_class",
    "confusion",
)

MetricsRow = dict[str, float]


@dataclass
class ReportContents:
    """Everything the sections of a page draw from; what is missing is None or empty.

    Attributes:
        metadata: of the run, from `run.json`.
        rows: of `metrics.csv`, one for each epoch.
        evaluations: from the evaluation log.
        loaded: the model.
        split: the evaluated split: `test` if it has been used before, else `val`.
        summary: the metrics on that split, as from `metrics.summarize`.
        predictions: the logits and labels of that split.
        images: its images.
        own_data: the data set of the run, once it was loaded.
        unlike: how many of its images are marked as unlike the training images, as in
            `Evaluation.unlike`.
        train_accuracy: on training images with the final weights, without augmentation.
        audit: of the whole data set.
        missing: sentences about everything that is unavailable.
    """

    run_dir: RunDir
    metadata: dict[str, Any] = field(default_factory=dict)
    rows: list[MetricsRow] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    loaded: LoadedModel | None = None
    recipe: Recipe | None = None
    split: str = "val"
    summary: dict[str, Any] | None = None
    predictions: CachedPredictions | None = None
    unlike: dict[str, Any] | None = None
    images: Split | None = None
    own_data: Data | None = None
    train_accuracy: TrainAccuracy | None = None
    audit: Audit | None = None
    device: str | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def classes(self) -> tuple[str, ...]:
        if self.loaded is not None:
            return self.loaded.classes
        return tuple(self.metadata.get("data", {}).get("classes", ()))

    @property
    def model_metadata(self) -> Mapping[str, Any]:
        """The metadata of the model file."""
        return {} if self.loaded is None else self.loaded.model_metadata

    @property
    def is_finished(self) -> bool:
        return bool(self.metadata.get("status", "finished") == "finished")

    @property
    def kept_epoch(self) -> int | None:
        """The epoch whose weights the model has."""
        epoch = self.metadata.get("kept_epoch")
        return None if epoch is None else int(epoch)

    @property
    def validation_chose_epoch(self) -> bool:
        """Whether the epoch with the best validation was kept: figures on it are optimistic."""
        return self.recipe is None or self.recipe.train.keep == "best"

    def test_uses(self) -> int:
        """Return how often the test split of the run has been used, this page included."""
        if self.loaded is None:
            return 0
        return evaluation.count_test_uses(self.run_dir, self.loaded) + self.shows_test_split

    @property
    def shows_test_split(self) -> bool:
        """Whether the page shows something of the test split, which is a use of it."""
        return self.split == "test" and self.summary is not None and self.loaded is not None


def gather_contents(
    name: str, *, audit: bool | None, device: str | None, with_images: bool = True
) -> ReportContents:
    """Gather everything about a run that its page shows.

    The test split is used only if it was evaluated before with exactly these weights. If the
    predictions of that evaluation were not kept, they are computed again; either way
    `ReportContents.shows_test_split` says that the page is a use of the test split, which the
    caller logs. A run whose test split is sealed is evaluated on its validation split.

    Args:
        audit: whether to inspect every image of the data set; by default only small sets.
        with_images: whether the page shows single images and the audit.

    Raises:
        UsageError, ModelFileError: no such run, or files of it that cannot be trusted.
    """
    select_device(device)  # an unavailable device is an error, not a gap in the page
    run_dir = run.find_run(name)
    contents = ReportContents(
        run_dir, run_dir.metadata(), run_dir.metrics(), run_dir.evaluations(), device=device
    )
    if not run_dir.model_path.exists():
        contents.missing.append("The run has no weights yet; the first epoch writes them.")
        contents.recipe = _read_recipe(run_dir)
        return contents
    contents.loaded = run.load_model(run_dir.model_path)
    contents.recipe = serialization.recipe_from_metadata(contents.model_metadata)
    if not contents.is_finished:
        contents.missing.append(
            "Training has not finished: the page shows its curves so far, without an evaluation."
        )
        return contents
    _add_evaluation(contents)
    _add_train_accuracy(contents)
    if with_images:
        _add_images(contents, audit)
    return contents


def gather_split(
    run_dir: RunDir,
    loaded: LoadedModel,
    split: str,
    *,
    device: str | None = None,
    own_data: Data | None = None,
) -> ReportContents:
    """Gather what the sections about one split of a run show; single images are left out.

    Predictions that are not cached are computed. It is the caller who decides that the test split
    may be shown, and who logs that use of it.

    Args:
        split: `val` or `test`.
        own_data: the data set of the run, if the caller has loaded it already.

    Raises:
        ModelFileError: files of the run that cannot be trusted.
    """
    contents = ReportContents(
        run_dir,
        run_dir.metadata(),
        run_dir.metrics(),
        run_dir.evaluations(),
        loaded,
        serialization.recipe_from_metadata(loaded.model_metadata),
        split,
        own_data=own_data,
        device=device,
    )
    if contents.is_finished:
        _add_predictions(contents)
    else:
        contents.missing.append("Training has not finished: there is nothing to evaluate yet.")
    return contents


def _read_recipe(run_dir: RunDir) -> Recipe | None:
    path = run_dir.path / "recipe.yaml"
    try:
        return run_dir.recipe() if path.exists() else None
    except (UsageError, ModelFileError):  # the model file holds the recipe, too
        return None


def _own_evaluations(contents: ReportContents) -> list[dict[str, Any]]:
    """Return the logged evaluations of exactly these weights on splits of the run."""
    sha = contents.model_metadata["sha256"]
    return [e for e in contents.evaluations if e.get("own") and e["model_sha256"] == sha]


def _add_evaluation(contents: ReportContents) -> None:
    """Choose the split, and add its metrics."""
    was_tested = any(entry["split"] == "test" for entry in _own_evaluations(contents))
    contents.split = "test" if was_tested else "val"
    _add_predictions(contents)


def _add_predictions(contents: ReportContents) -> None:
    """Add the metrics of the split, from cached predictions or by another evaluation."""
    run_dir, split = contents.run_dir, contents.split
    entries = [entry for entry in _own_evaluations(contents) if entry["split"] == split]
    latest = entries[-1] if entries else None
    sha = contents.model_metadata["sha256"]
    fingerprint = contents.model_metadata["data"]["fingerprint"]
    predictions = evaluation.load_predictions(run_dir, split, fingerprint, sha)
    if latest is not None:
        contents.unlike = latest.get("unlike")
    if predictions is None:
        try:
            contents.unlike = _evaluate(contents).unlike
            predictions = evaluation.load_predictions(run_dir, split, fingerprint, sha)
            contents.evaluations = run_dir.evaluations()
        except ConvlensError as error:
            contents.missing.append(_error_sentence(error))
    if predictions is not None:
        contents.predictions = predictions
        contents.summary = metrics.summarize(
            predictions.logits,
            predictions.labels,
            list(contents.classes),
            predictions.temperature,
        )
        contents.summary |= metrics.class_means_intervals(
            predictions.labels, predictions.logits.argmax(1), len(contents.classes)
        )
    elif latest is not None:
        contents.summary = {key: latest.get(key) for key in SUMMARY_KEYS}
        contents.missing.append(
            f"The metrics are those of the last evaluation of the {split} split, whose "
            "predictions for single images were not kept."
        )


def _evaluate(contents: ReportContents) -> Evaluation:
    """Evaluate the split, which caches its predictions.

    Only an evaluation of the validation split is logged here: the page as a whole is one use of
    the test split.
    """
    assert contents.loaded is not None
    if contents.split != "test":
        return evaluation.evaluate(
            contents.run_dir,
            contents.split,
            device=contents.device,
            quiet=False,
            own_data=contents.own_data,
        )
    device = select_device(contents.device)
    split = evaluation.load_eval_split(
        contents.loaded, contents.split, device=device, own_data=_load_own_data(contents)
    )
    return evaluation.evaluate_split(contents.run_dir, contents.loaded, split, device).evaluation


def _load_own_data(contents: ReportContents) -> Data:
    """Return the data set of the run, loaded only once.

    Raises:
        DataError: the images have changed or moved.
    """
    assert contents.loaded is not None
    if contents.own_data is None:
        device = select_device(contents.device)
        contents.own_data = evaluation.load_own_data(contents.loaded, device)
    return contents.own_data


def _add_train_accuracy(contents: ReportContents) -> None:
    """Add the accuracy on training images: the logged one, or that of some of them."""
    assert contents.loaded is not None
    sha = contents.model_metadata["sha256"]
    for entry in reversed(contents.evaluations):
        if entry["split"] == "train" and entry.get("own") and entry["model_sha256"] == sha:
            n = int(entry["n"])
            contents.train_accuracy = TrainAccuracy(int(entry["correct"]), n, n)
            return
    try:
        contents.train_accuracy = evaluation.measure_train_accuracy(
            contents.run_dir,
            contents.loaded,
            select_device(contents.device),
            own_data=lambda: _load_own_data(contents),
        )
    except ConvlensError as error:
        contents.missing.append(_error_sentence(error))


def _add_images(contents: ReportContents, audit: bool | None) -> None:
    """Add the images of the split, and the audit of the data set."""
    assert contents.loaded is not None
    assert contents.recipe is not None
    device = select_device(contents.device)
    try:
        if contents.predictions is not None:
            split = evaluation.load_eval_split(
                contents.loaded, contents.split, device=device, own_data=_load_own_data(contents)
            )
            contents.images = split.part
        if audit is None:
            data = _load_own_data(contents)
            evaluated = 0 if contents.summary is None else int(contents.summary["n"])
            audit = len(data.train) + len(data.val) + evaluated <= QUICK_AUDIT_IMAGES
        if audit:
            found = {"name": _load_own_data(contents).name}  # the data set may have moved
            contents.audit = audit_data(contents.recipe.data.model_copy(update=found))
    except ConvlensError as error:
        contents.missing.append(_error_sentence(error))
        print_status("[yellow]the images are unavailable: the page is written without them[/]")
    contents.missing = list(dict.fromkeys(contents.missing))


def _error_sentence(error: ConvlensError) -> str:
    """Return the message of an error without its location, a path of this machine."""
    return f"{error.what[:1].upper()}{error.what[1:]}."

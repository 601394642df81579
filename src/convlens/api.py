"""The Python API: training and using models, and `Run` as what it is all about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convlens import evaluation, model_export, onnx_model, prediction, serialization
from convlens.errors import UsageError
from convlens.evaluation import Evaluation
from convlens.model_export import Export
from convlens.prediction import Prediction
from convlens.recipe import Recipe, load_recipe, recipe_names
from convlens.run import RunDir, find_run
from convlens.training import repeats as several, resolve, train as training_train
from convlens.training.repeats import RunResults, VariantSummary
from convlens.utils.console import print_status, quiet_mode

if TYPE_CHECKING:
    from convlens.analysis.compare import Comparison
    from convlens.analysis.diagnosis import Diagnosis
    from convlens.analysis.label_errors import LabelReport
    from convlens.interpret.look import Look
    from convlens.interpret.measure import Measurements
    from convlens.reports.build import Report


class Run:
    """A trained (or half-trained) model with its history: what `train` returns.

    Example:
        >>> run = convlens.train("digits")
        >>> run.evaluate("test").accuracy
        >>> run.predict(["seven.png"])[0].label
    """

    def __init__(self, folder: RunDir) -> None:
        self._folder = folder

    @classmethod
    def load(cls, name: str | Path) -> Run:
        """The run of that name under `models/`, in that folder, or of that model or ONNX file."""
        return cls(find_run(name))

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self._folder.metadata().get('status', 'a model file')})"

    @property
    def name(self) -> str:
        return self._folder.name

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe, which trains the same again."""
        return serialization.recipe_from_metadata(
            onnx_model.load_model_or_onnx(self._folder.model_path).model_metadata
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the model's outputs."""
        return onnx_model.load_model_or_onnx(self._folder.model_path).classes

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One row an epoch: losses, accuracies, learning rate, seconds."""
        return self._folder.metrics()

    @property
    def results(self) -> list[dict[str, Any]]:
        """Every look at a split so far, oldest first."""
        return self._folder.evaluations()

    def evaluate(
        self,
        split: str = "test",
        *,
        data: str | Path | None = None,
        tta: str | None = None,
        device: str | None = None,
        quiet: bool = True,
    ) -> Evaluation:
        """Accuracy with its interval, and everything else, on a split or another data set.

        With `tta` (`flip`, `flip+shifts`) `Evaluation.tta` has the numbers of test-time
        augmentation; the others stay plain.
        """
        result = evaluation.evaluate(
            self._folder, split, data=data, tta=tta, on=device, quiet=quiet
        )
        if not quiet:
            print_status(evaluation.sentence({**result.to_dict(), "own": data is None}))
            if tta is not None:
                print_status(result.tta_sentence())
        return result

    def predict(
        self,
        inputs: str | Path | Iterable[str | Path] | np.ndarray,
        *,
        top_k: int = 1,
        tta: str | None = None,
        device: str | None = None,
        quiet: bool = True,
    ) -> list[Prediction]:
        """A `Prediction` for each image: files, folders and globs, or an array of images.

        With `tta` (`flip`, `flip+shifts`) each has `tta_label` and `tta_prob` beside the plain.
        """
        loaded = onnx_model.load_model_or_onnx(self._folder.model_path)
        if isinstance(inputs, str | Path):
            inputs = [inputs]
        images = inputs if isinstance(inputs, np.ndarray) else prediction.expand_paths(inputs)
        answers = prediction.predict(loaded, images, top_k=top_k, tta=tta, on=device, quiet=quiet)
        return list(answers)

    def export(
        self,
        to: str | Sequence[str] = "onnx",
        *,
        output: str | Path | None = None,
        data: str | Path | None = None,
        quiet: bool = True,
    ) -> list[Export]:
        """The model as files for other programs, one for each format: `onnx`, `torch`.

        Each is run on the run's validation images (or those of `data`) and written only if it
        reproduces the outputs of convlens; `Export.proof` holds the largest differences.
        """
        names = [to] if isinstance(to, str) else to
        return model_export.export(self._folder, names, output=output, data=data, quiet=quiet)


def train(
    what: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    data: str | Path | None = None,
    name: str | None = None,
    fresh: bool = False,
    extend: bool = False,
    test: bool = True,
    device: str | None = None,
    quiet: bool = False,
) -> Run:
    """Trains a recipe, or the default recipe on a data set, and tests it once at the end.

    Args:
        what: a recipe's name, a YAML file, a `Recipe` or mapping, or a data set: a built-in
            name, a folder of class folders, a CSV.
        overrides: dotted keys, `{"optim.lr": 0.1}` or `["optim.lr=0.1"]`.
        data: trains the recipe on this data set instead of its own.
        extend: begin where a finished run of this recipe with fewer epochs ended.
        name, fresh, test, device, quiet: as on the command line.

    Raises:
        ConvlensError: with what, where and what to do.
    """
    asked = resolve.resolve_recipe(what, data=data, overrides=_texts(overrides))
    run_dir = training_train.train(
        asked.recipe,
        name=name,
        plain=asked.plain,
        fresh=fresh,
        extend=extend,
        test=test,
        on=device,
        quiet=quiet,
    )
    if test and not quiet:
        print_status(evaluation.sentence(run_dir.evaluations()[-1]))
    return Run(run_dir)


class RunTable:
    """Several runs side by side: what `train_many` returns.

    Example:
        >>> table = convlens.train_many("digits", seeds=5)
        >>> table.summaries[0].mean, table.summaries[0].sd
    """

    def __init__(self, table: RunResults) -> None:
        self._table = table

    def __repr__(self) -> str:
        return f"RunTable({self._table.name!r}, {len(self._table.outcomes)} runs)"

    @property
    def runs(self) -> list[Run]:
        """Every run that was measured, in the order of variants, splits, seeds and folds."""
        return [Run(outcome.run_dir) for outcome in self._table.outcomes]

    @property
    def summaries(self) -> list[VariantSummary]:
        """What each variant reached: `variant`, `accuracies`, `mean`, `sd`, `interval95`, ..."""
        return self._table.summaries

    @property
    def plot(self) -> Path:
        """The picture of their curves."""
        return self._table.plot

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `convlens train --json` prints."""
        return self._table.to_dict()


def train_many(
    what: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    variants: str | Sequence[str] | None = None,
    repeat_splits: int = 1,
    seeds: int = 1,
    folds: int | None = None,
    refit: bool = False,
    data: str | Path | None = None,
    name: str | None = None,
    fresh: bool = False,
    test: bool = True,
    device: str | None = None,
    quiet: bool = False,
) -> RunTable:
    """Trains a recipe several times and puts the runs side by side.

    Args:
        what, overrides, data, name, fresh, test, device, quiet: as in `train`.
        variants: `"all"` variants of the recipe, or some by name; overrides apply to each.
        repeat_splits: number of random splits of the data (`data.seed`, `data.seed` + 1, ...).
        seeds: number of seeds of everything else (`train.seed`, `train.seed` + 1, ...).
        folds: K-fold cross-validation; the test split stays sealed.
        refit: finds the number of epochs by validation, then trains on training and validation
            images together for that many, and tests that run.

    Raises:
        ConvlensError: with what, where and what to do.
    """
    asked = resolve.resolve_variants(what, variants, data=data, overrides=_texts(overrides))
    table = several.train_many(
        asked,
        repeat_splits=repeat_splits,
        seeds=seeds,
        folds=folds,
        refit=refit,
        name=name,
        fresh=fresh,
        test=test,
        on=device,
        quiet=quiet,
    )
    return RunTable(table)


def _texts(overrides: Mapping[str, Any] | Sequence[str]) -> Sequence[str]:
    return resolve.to_overrides(overrides) if isinstance(overrides, Mapping) else overrides


def evaluate(run: str | Path | Run, split: str = "test", **options: Any) -> Evaluation:
    """`Run.evaluate` of a run given by name, folder or model file."""
    return (run if isinstance(run, Run) else Run.load(run)).evaluate(split, **options)


def predict(
    run: str | Path | Run, inputs: str | Path | Iterable[str | Path] | np.ndarray, **options: Any
) -> list[Prediction]:
    """`Run.predict` of a run given by name, folder or model file."""
    return (run if isinstance(run, Run) else Run.load(run)).predict(inputs, **options)


def export(run: str | Path | Run, to: str | Sequence[str] = "onnx", **options: Any) -> list[Export]:
    """`Run.export` of a run given by name, folder or model file."""
    return (run if isinstance(run, Run) else Run.load(run)).export(to, **options)


def recipes() -> dict[str, Recipe]:
    """The recipes that come with convlens, by name."""
    return {name: load_recipe(name) for name in recipe_names()}


# ---- insight ----------------------------------------
# The Python API of looking: inside networks, at runs side by side, at what is wrong.


def look(
    runs: str | Path | Run | Sequence[str | Path | Run],
    images: str | Path | Sequence[str | Path] = (),
    *,
    device: str | None = None,
    quiet: bool = True,
    **options: Any,
) -> Look:
    """Draws what the layers of networks make of images, all networks side by side.

    Args:
        runs: one or several: runs (name, folder, model file or `Run`), or networks of torchvision
            or timm (`NAME[:WEIGHTS]`).
        images: files, folders, globs, `test:17`, `worst:5`, `class:cat:3`; without any, a few
            validation images, unless only filters and the like are asked for.
        options: as in `inspection.looking.Options`, and on the command line: `layers`, `order`,
            `channels`, `filters`, `top_images`, `dream`, `attribution`, `measure`, `embedding`,
            `nearest` and more.

    Raises:
        ConvlensError: with what, where and what to do.

    Example:
        >>> seen = convlens.look(["resnet18", "resnet18-tiny"], ["cat.png", "worst:3"])
        >>> seen.files, seen.seen[0][1].maps["layer1.0"].shape
    """
    from convlens.interpret import inputs, look as interpret_look

    listed = ("layers", "filters", "top_images", "dream", "attribution", "measure", "embedding")
    options |= {k: _as_list(options[k]) for k in listed if k in options}
    try:
        asked = interpret_look.LookOptions(**options)
    except TypeError as error:
        known = ", ".join(interpret_look.LookOptions.__dataclass_fields__)
        raise UsageError(f"look: {error}", fix=f"its options are {known}") from error
    asked.check()
    with quiet_mode(quiet):
        opened = inputs.open_look_inputs(
            [*_run_names(runs), *map(str, _as_list(images))],
            on=device,
            examples=asked.needs_images,
        )
        return interpret_look.look(opened, asked)


def measure(
    runs: str | Path | Run | Sequence[str | Path | Run],
    measures: str | Sequence[str] = (),
    *,
    folder: str | Path | None = None,
    device: str | None = None,
    quiet: bool = True,
    **options: Any,
) -> Measurements:
    """Measures every stage of one or several networks over images, and draws one figure.

    Args:
        runs: a run or several, by name, folder or model file; or networks of torchvision or timm.
        measures: some of `convlens.interpret.measure.NAMES`; all by default.
        folder: of the figures; `plots/RUN/look`, of several `plots/look-RUN-RUN`, by default.
        options: `split`, `data`, `layers`, `images`, `learn_from`, `untrained`, `seed`, as in
            `convlens.interpret.measure.measure`.

    Example:
        >>> found = convlens.measure(["resnet18", "resnet18-noaug"], ["probe", "picture"])
        >>> found.networks[0].stages["layer4.1"]["probe"].value
    """
    from convlens.interpret import measure as interpret_measure
    from convlens.interpret.inputs import figures_folder, open_inspected_model

    names = _as_list(measures)
    interpret_measure.select_measures(names)
    subjects = [open_inspected_model(text, on=device) for text in _run_names(runs)]
    run_dir = figures_folder(subjects) if folder is None else Path(folder)
    return interpret_measure.measure(subjects, names, folder=run_dir, quiet=quiet, **options)


def compare(
    *runs: str | Path | Run,
    split: str = "test",
    data: str | Path | None = None,
    force: bool = False,
    device: str | None = None,
    quiet: bool = True,
) -> Comparison:
    """Puts runs side by side, and says which can be told apart from the first.

    Example:
        >>> result = convlens.compare("resnet18", "resnet18-noaug")
        >>> result.verdicts[0].sentence

    Args:
        runs: at least two; those that differ only in their seeds are taken together.
        split, data, force, device: as on the command line.
    """
    from convlens.analysis import compare as analysis_compare

    names = [run._folder if isinstance(run, Run) else run for run in runs]
    return analysis_compare.compare(names, split, data=data, force=force, on=device, quiet=quiet)


def diagnose(run: str | Path | Run, *, device: str | None = None, quiet: bool = True) -> Diagnosis:
    """Diagnose a run: overfitting, learning rate, dead layers and more, with evidence and remedy.

    Example:
        >>> [(finding.rule, finding.overrides) for finding in convlens.diagnose("mnist").findings]
    """
    from convlens.analysis import diagnosis

    folder = run._folder if isinstance(run, Run) else find_run(run)
    return diagnosis.diagnose(folder, on=device, quiet=quiet)


def report(
    *runs: str | Path | Run,
    output: str | Path | None = None,
    audit: bool | None = None,
    device: str | None = None,
    quiet: bool = True,
) -> Report:
    """Writes one HTML page about a run, or one that compares several; `Report.path` is where.

    Args:
        output: the file; by default below `plots/`.
        audit: whether to look at every image of the data set; by default where they are few.
    """
    from convlens.reports import build

    return build.report(_run_names(runs), output=output, audit=audit, device=device, quiet=quiet)


def find_label_errors(
    what: str | Path | Mapping[str, Any] | Recipe | Run,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    data: str | Path | None = None,
    folds: int = 5,
    test: bool = False,
    name: str | None = None,
    fresh: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> LabelReport:
    """Names images whose labels are probably wrong, by models that didn't train on them.

    Args:
        what, overrides, data, name, fresh, device, quiet: as in `train`; `what` may be a run,
            whose recipe is then taken.
        folds: so many models are trained, each judges the images of its fold.
        test: judges the test split as well, by all models; their runs log that look.

    Returns:
        Suspects with suggestions, the surest first, probabilities and scores of all images, and
        the paths of a sheet of pictures and of a CSV to correct.

    Raises:
        ConvlensError: with what, where and what to do.
    """
    from convlens.analysis import label_errors

    if isinstance(what, Run):
        alone = what._folder.model_path
        what = alone if alone.is_file() else what.path
    return label_errors.find_label_errors(
        what,
        overrides,
        data=data,
        folds=folds,
        test=test,
        name=name,
        fresh=fresh,
        on=device,
        quiet=quiet,
    )


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Path | Run) else list(value)


def _run_names(runs: Any) -> list[str]:
    """Runs as the command line names them."""
    return [str(each.path if isinstance(each, Run) else each) for each in _as_list(runs)]

"""Training and inspection as Python functions, and `Run`, which they return or take.

The other functions of the Python API (`evaluate`, `predict`, `export`, `compare`, `diagnose`,
`report`, `find_label_errors`) are those that the command line calls; `convlens` exports them
directly.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from convlens import evaluation, model_export, onnx_model, serialization, user_code
from convlens.data.arrays import ValueRange
from convlens.data.input_images import ImageLike
from convlens.errors import UsageError, check_path, wrong_type
from convlens.evaluation import Evaluation
from convlens.model_export import Export
from convlens.prediction import ImageTransform, Prediction, Predictor
from convlens.recipe import DataConfig, Recipe, load_recipe, recipe_names
from convlens.run import LoadedModel, RunDir, RunHandle, RunLike, find_run, run_reference
from convlens.training import repeats, resolve, train as training_train
from convlens.training.repeats import RunResults, VariantSummary
from convlens.uncertainty.promises import ShareLike
from convlens.user_code import accepts_trust
from convlens.utils import notebook
from convlens.utils.console import print_status, quiet_mode

if TYPE_CHECKING:
    from convlens.analysis.diagnosis import Diagnosis
    from convlens.interpret.look import Look
    from convlens.interpret.measure import Measurements
    from convlens.reports.build import Report

# Options of `measure` beside those it names.
MEASURE_OPTIONS = ("split", "data", "layers", "images", "learn_from", "untrained", "seed")
# Modification time, size and inode of a model file: they change when it is written again.
FileState = tuple[int, int, int]


class Run(RunHandle):
    """A trained or partly trained model with its history; `train` returns it.

    Args:
        run_dir: its run directory; `Run.load` finds it by name.
        trust_code: import user code that the model needs: all of it, or the parts of these names.

    Example:
        >>> run = convlens.train("digits")
        >>> run.evaluate("test").accuracy
        >>> run.predict(["seven.png"])[0].label
        >>> run.open().predict(image)[0].label  # keeps the network in memory
    """

    def __init__(self, run_dir: RunDir, trust_code: bool | frozenset[str] = False) -> None:
        if not isinstance(run_dir, RunDir):
            raise wrong_type("Run", run_dir, "open a run by its name with Run.load(NAME)")
        self.run_dir = run_dir
        self.trust_code = trust_code
        # Kept for the next call, until the model file changes.
        self._lock = threading.Lock()
        self._predictors: dict[tuple[FileState, str | None], Predictor] = {}
        self._models: dict[FileState, LoadedModel] = {}

    def __reduce__(self) -> tuple[type[Run], tuple[RunDir, bool | frozenset[str]]]:
        """Copies, also in other processes, open the model themselves."""
        return type(self), (self.run_dir, self.trust_code)

    @classmethod
    def load(cls, name: str | Path, *, trust_code: bool = False) -> Run:
        """Return the run with that name under `models/`, in that folder, or of that model file.

        Args:
            trust_code: allow this run to import user code that it was trained with.

        Raises:
            UsageError: unknown name.
            ModelFileError: no run at that path.
        """
        return cls(find_run(name), trust_code)

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.run_dir.metadata().get('status', 'a model file')})"

    def _repr_html_(self) -> str:
        """Return the evaluations and the learning curves for notebooks."""
        rows = [
            (
                each["split"],
                str(each["data"]),
                f"{each['accuracy']:.2%}",
                "{:.2%} to {:.2%}".format(*each["interval95"]),
                f"{each['n']:,}",
            )
            for each in self.results
        ]
        table = notebook.table(("split", "data", "accuracy", "95% interval", "n"), rows)
        curves = notebook.embed_figures([self.run_dir.plots / "curves.png"])
        return notebook.paragraph(repr(self)) + (table if rows else "") + curves

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.run_dir.path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe, which reproduces the training."""
        return serialization.recipe_from_metadata(self._loaded().model_metadata)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the model's outputs."""
        return self._loaded().classes

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One row for each epoch: losses, accuracies, learning rate, seconds."""
        return self.run_dir.metrics()

    @property
    def results(self) -> list[dict[str, Any]]:
        """All evaluations of splits so far, oldest first."""
        return self.run_dir.evaluations()

    @property
    def module(self) -> nn.Module:
        """The network, in eval mode, on the CPU. `transform` makes its inputs.

        It is a copy of its own: changing it does not change later predictions.
        """
        return self._loaded().model

    @property
    def transform(self) -> ImageTransform:
        """The preprocessing: an image (path, PIL image, array) to a float tensor `[C, H, W]`."""
        return ImageTransform(self._loaded().preprocessing)

    def open(self, device: str | None = None) -> Predictor:
        """Return the model, kept in memory, to classify images one by one.

        Args:
            device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.

        Example:
            >>> model = run.open()
            >>> for image in camera:
            ...     print(model.predict(image)[0].label)
        """
        with user_code.trust(self.trust_code):
            return Predictor(onnx_model.load_model_or_onnx(self.run_dir.model_path), device)

    def _loaded(self) -> LoadedModel:
        """Return the content of the model file, which is read again if it has changed."""
        state = self._file_state()
        with self._lock:
            if state not in self._models:
                with user_code.trust(self.trust_code):
                    self._models = {state: onnx_model.load_model_or_onnx(self.run_dir.model_path)}
            return self._models[state]

    def _predictor(self, device: str | None) -> Predictor:
        """Return the model that `predict` keeps; it is opened again if its file has changed."""
        key = self._file_state(), device
        with self._lock:
            if key not in self._predictors:
                self._predictors = {key: self.open(device)}
            return self._predictors[key]

    def _file_state(self) -> FileState:
        try:
            status = self.run_dir.model_path.stat()
        except OSError:
            return (0, 0, 0)  # opening the file says why
        return status.st_mtime_ns, status.st_size, status.st_ino

    def evaluate(
        self,
        split: str | None = None,
        *,
        data: str | Path | DataConfig | None = None,
        tta: str | None = None,
        min_accuracy: ShareLike | None = None,
        confidence: ShareLike = 0.95,
        prediction_set: ShareLike | None = None,
        device: str | None = None,
        quiet: bool = True,
    ) -> Evaluation:
        """Evaluate the model; see `convlens.evaluate`."""
        return evaluation.evaluate(
            self,
            split,
            data=data,
            tta=tta,
            min_accuracy=min_accuracy,
            confidence=confidence,
            prediction_set=prediction_set,
            device=device,
            quiet=quiet,
        )

    def predict(
        self,
        inputs: ImageLike | Iterable[ImageLike],
        *,
        top_k: int = 1,
        tta: str | None = None,
        min_accuracy: ShareLike | None = None,
        confidence: ShareLike = 0.95,
        prediction_set: ShareLike | None = None,
        channels: str | None = None,
        range: ValueRange | None = None,
        max_pixels: int | None = None,
        device: str | None = None,
        quiet: bool = True,
    ) -> list[Prediction]:
        """Classify images; see `convlens.predict`.

        The model is loaded by the first call and kept for the next ones, as `open` does.
        """
        return self._predictor(device).predict(
            inputs,
            top_k=top_k,
            tta=tta,
            min_accuracy=min_accuracy,
            confidence=confidence,
            prediction_set=prediction_set,
            channels=channels,
            range=range,
            max_pixels=max_pixels,
            quiet=quiet,
        )

    def export(
        self,
        to: str | Sequence[str] = "onnx",
        *,
        output: str | Path | None = None,
        data: str | Path | DataConfig | None = None,
        quiet: bool = True,
    ) -> list[Export]:
        """Write the model as files for other programs; see `convlens.export`."""
        return model_export.export(self, to, output=output, data=data, quiet=quiet)

    def look(self, images: str | Path | Sequence[str | Path] = (), **options: Any) -> Look:
        """Draw what the layers of the network compute for images; see `convlens.look`."""
        return look(self, images, **options)

    def report(self, **options: Any) -> Report:
        """Write an HTML page about the run; see `convlens.report`."""
        from convlens.reports import build

        return build.report(self, **options)

    def explore(
        self, *, port: int = 0, open_browser: bool = True, device: str | None = None
    ) -> None:
        """Serve a page about the run on this machine until Ctrl-C; see `convlens explore`.

        Args:
            port: 0 for any free one.
            open_browser: open the page; its URL is printed in any case.
            device: where the model computes; by default the fastest one.

        Raises:
            UsageError: the packages of the extra `explore` are not installed.
        """
        from convlens import explore

        explore.check_installed("explore")
        from convlens.explore import server

        with user_code.trust(self.trust_code):
            server.explore(
                [run_reference(self)], port=port, open_browser=open_browser, device=device
            )

    def diagnose(self, **options: Any) -> Diagnosis:
        """Diagnose overfitting, learning rate, dead layers and more; see `convlens.diagnose`."""
        from convlens.analysis import diagnosis

        return diagnosis.diagnose(self, **options)


def train(
    what: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] | str = (),
    *,
    data: str | Path | None = None,
    name: str | None = None,
    fresh: bool = False,
    extend: bool = False,
    test: bool = True,
    device: str | None = None,
    quiet: bool = False,
    trust_code: bool = False,
) -> Run:
    """Train a recipe, or the default recipe on a data set, and test it once at the end.

    A finished run of the same recipe is not trained again, and an interrupted one is resumed.

    Args:
        what: a recipe's name, a YAML file, a `Recipe` or mapping, or a data set: a built-in
            name, a folder of class folders, a CSV.
        overrides: dotted keys, `{"optim.lr": 0.1}`, `["optim.lr=0.1"]` or `"optim.lr=0.1"`.
        data: train the recipe on this data set instead of its own.
        name: name of the run; by default that of the recipe.
        fresh: train from scratch as a new run.
        extend: continue from the end of a finished run of this recipe with fewer epochs.
        test: evaluate the test split at the end.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress.
        trust_code: import user code that only a recipe file names; what this call names itself is
            imported in any case.

    Raises:
        ConvlensError: a problem the user can fix; the message says where and how.
    """
    texts = resolve.override_texts(overrides)
    resolved = resolve.resolve_recipe(what, data=data, overrides=texts)
    trusted = trust_code or resolve.named_code([resolved.recipe], [what, data, *texts])
    with user_code.trust(trusted):
        run_dir = training_train.train(
            resolved.recipe,
            name=name,
            is_unmodified_recipe=resolved.is_unmodified,
            fresh=fresh,
            extend=extend,
            test=test,
            device=device,
            quiet=quiet,
        )
    if test and not quiet:
        print_status(evaluation.sentence(run_dir.evaluations()[-1]))
    return Run(run_dir, trusted)


class RunTable:
    """Several runs side by side; `train_many` returns it.

    Example:
        >>> table = convlens.train_many("digits", seeds=5)
        >>> table.summaries[0].mean, table.summaries[0].sd
    """

    def __init__(self, table: RunResults, trust_code: bool | frozenset[str] = False) -> None:
        self._table, self._trust_code = table, trust_code

    def __repr__(self) -> str:
        return f"RunTable({self._table.name!r}, {len(self._table.outcomes)} runs)"

    def _repr_html_(self) -> str:
        """Return the figure of the curves for notebooks."""
        return notebook.paragraph(repr(self)) + notebook.embed_figures([self.plot])

    @property
    def runs(self) -> list[Run]:
        """All evaluated runs, in the order of variants, splits, seeds and folds."""
        return [Run(outcome.run_dir, self._trust_code) for outcome in self._table.outcomes]

    @property
    def summaries(self) -> list[VariantSummary]:
        """Results of each variant: `variant`, `accuracies`, `mean`, `sd`, `interval95`, ..."""
        return self._table.summaries

    @property
    def plot(self) -> Path:
        """The figure of their curves."""
        return self._table.plot

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the output of `convlens train --json`."""
        return self._table.to_dict()


def train_many(
    what: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] | str = (),
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
    trust_code: bool = False,
) -> RunTable:
    """Train a recipe several times and compare the runs.

    Args:
        what, overrides, data, name, fresh, test, device, quiet: as in `train`.
        variants: `"all"` variants of the recipe, or their names; overrides apply to each.
        repeat_splits: number of random splits of the data (`data.seed`, `data.seed` + 1, ...).
        seeds: number of seeds of everything else (`train.seed`, `train.seed` + 1, ...).
        folds: K-fold cross-validation; the test split stays sealed.
        refit: choose the number of epochs on validation images, then retrain on training and
            validation images together and test that run.
        trust_code: as in `train`.

    Raises:
        ConvlensError: a problem the user can fix; the message says where and how.
    """
    texts = resolve.override_texts(overrides)
    resolved = resolve.resolve_variants(what, variants, data=data, overrides=texts)
    trained = [each.recipe for each in resolved.values()]
    trusted = trust_code or resolve.named_code(trained, [what, data, *texts])
    with user_code.trust(trusted):
        table = repeats.train_many(
            resolved,
            repeat_splits=repeat_splits,
            seeds=seeds,
            folds=folds,
            refit=refit,
            name=name,
            fresh=fresh,
            test=test,
            device=device,
            quiet=quiet,
        )
    return RunTable(table, trusted)


def recipes() -> dict[str, Recipe]:
    """Return the recipes that come with convlens, by name."""
    return {name: load_recipe(name) for name in recipe_names()}


@accepts_trust
def look(
    runs: RunLike | Sequence[RunLike],
    images: str | Path | Sequence[str | Path] = (),
    *,
    device: str | None = None,
    quiet: bool = True,
    trust_code: bool = False,
    **options: Any,
) -> Look:
    """Draw what the layers of networks compute for images, all networks side by side.

    Args:
        runs: one or several runs (name, folder, model file or `Run`) or networks of torchvision
            or timm (`NAME[:WEIGHTS]`).
        images: files, folders, globs, `test:17`, `worst:5`, `class:cat:3`; by default a few
            validation images, if the requested figures need images.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress.
        options: fields of `convlens.interpret.look.LookOptions`: `layers`, `order`, `channels`,
            `filters`, `top_images`, `dream`, `attribution`, `measure`, `embedding`, `nearest` and
            more, as on the command line.
        trust_code: import user code that the model needs; otherwise that is an error.

    Raises:
        ConvlensError: a problem the user can fix; the message says where and how.

    Example:
        >>> result = convlens.look(["resnet18", "resnet18-tiny"], ["cat.png", "worst:3"])
        >>> result.files, result.seen[0][1].maps["layer1.0"].shape
    """
    from convlens.interpret import inputs, look as interpret_look

    lists = ("layers", "filters", "top_images", "dream", "attribution", "measure", "embedding")
    options |= {k: _as_names(k, options[k]) for k in lists if k in options}
    _check_options("look", options, interpret_look.LookOptions.__dataclass_fields__)
    look_options = interpret_look.LookOptions(**options)
    names = [_image_name(image) for image in _as_list(images)]
    look_options.check(names)
    with quiet_mode(quiet):
        opened = inputs.open_look_inputs(
            [*_references(runs), *names],
            device=device,
            examples=look_options.num_examples,
            data=look_options.data,
            max_pixels=look_options.max_pixels,
        )
        return interpret_look.look(opened, look_options)


@accepts_trust
def measure(
    runs: RunLike | Sequence[RunLike],
    measures: str | Sequence[str] = (),
    *,
    folder: str | Path | None = None,
    device: str | None = None,
    quiet: bool = True,
    trust_code: bool = False,
    **options: Any,
) -> Measurements:
    """Measure every stage of one or several networks over images, and draw a figure.

    Args:
        runs: as in `look`.
        measures: names from `convlens.interpret.measure.NAMES`; all by default.
        folder: for the figures; by default `plots/RUN/look`, or `plots/look-RUN-RUN` for several.
        device, quiet: as in `look`.
        options: `split`, `data`, `layers`, `images`, `learn_from`, `untrained`, `seed`, as in
            `convlens.interpret.measure.measure`.
        trust_code: import user code that the model needs; otherwise that is an error.

    Example:
        >>> result = convlens.measure(["resnet18", "resnet18-noaug"], ["probe", "picture"])
        >>> result.networks[0].stages["layer4.1"]["probe"].value
    """
    from convlens.interpret import measure as interpret_measure
    from convlens.interpret.inputs import figures_folder, open_inspected_model

    names = _as_names("measures", measures)
    if "layers" in options:
        options["layers"] = _as_names("layers", options["layers"])
    interpret_measure.select_measures(names)
    _check_options("measure", options, MEASURE_OPTIONS)
    target = None if folder is None else check_path("folder", folder)
    models = [open_inspected_model(text, device=device) for text in _references(runs)]
    target = target or figures_folder(models)
    result = interpret_measure.measure(models, names, folder=target, quiet=quiet, **options)
    with quiet_mode(quiet):
        for model in models:
            model.log_test_use("measure")
    return result


def _check_options(function: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UsageError(
            f"{function}: unknown option {unknown[0]!r}",
            fix=f"its options are {', '.join(known)}",
        )


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str | os.PathLike | RunDir | RunHandle):
        return [value]
    if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        return list(value)
    raise UsageError(
        f"an object of type {type(value).__name__!r} is not a name", fix="give names or paths"
    )


def _as_names(option: str, value: Any) -> list[str]:
    """Return one name, or several, as a list."""
    names = _as_list(value)
    for name in names:
        if not isinstance(name, str):
            raise wrong_type(option, name, "give names")
    return names


def _image_name(image: Any) -> str:
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    raise UsageError(
        f"an object of type {type(image).__name__!r} is not the name of an image",
        fix="give names or paths; save an image in memory to a file first",
    )


def _references(runs: RunLike | Sequence[RunLike]) -> list[str]:
    """Return runs and networks as they are named on the command line."""
    return [run_reference(run) for run in _as_list(runs)]

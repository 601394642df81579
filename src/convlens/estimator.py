"""`ImageClassifier`, a scikit-learn estimator for arrays of images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from convlens import user_code
from convlens.data.arrays import SEVERAL_IMAGES, as_array, to_nchw, to_uint8
from convlens.data.conversion import resolve_fit
from convlens.data.dataset import data_from_arrays
from convlens.data.decode import fit_arrays
from convlens.device import prepare, preserve_rng, preserve_torch_settings, select_device
from convlens.errors import UsageError, wrong_type
from convlens.prediction import all_probabilities
from convlens.recipe import Recipe
from convlens.run import LoadedModel, RunDir, load_model
from convlens.runtime import RuntimeContext
from convlens.training import resolve, train
from convlens.training.calibrate import calibrate_model
from convlens.training.resolve import validate_recipe
from convlens.training.setup import build_training_job
from convlens.utils.console import quiet_mode


class ImageClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A convolutional classifier with scikit-learn's `fit`, `predict` and `predict_proba`.

    `X` is an array or tensor of images: `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` with 1, 3 or
    4 channels (RGBA, put onto white), uint8, or floats in 0..1; or flattened rows `[N, D]` together
    with `image_shape`. For image files, use `convlens.train`.
    `fit` holds out a stratified part of its images to choose the best epoch.

    Args:
        recipe: name or file of a recipe; its data section and test set are not used.
        overrides: dotted keys, e.g. `{"optim.lr": 0.01}`.
        epochs: shorthand for `train.epochs`.
        image_shape: shape of one image if `X` has flattened rows.
        channels: which axis of an image holds the channels, `first`, `last` or `none` (grey
            images). Needed only if the shape can be read in two ways.
        val_fraction: share of `X` that is held out; 0 trains on all images, which needs
            `train.keep=last` among the overrides.
        class_weight: `"balanced"` or `{label: weight}`; the weights are scaled to a mean of 1 over
            the training images (`optim.class_weights`).
        random_state: seed of weights, order, augmentation and the held-out part.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        verbose: show the progress.

    Example:
        >>> digits = sklearn.datasets.load_digits()
        >>> cross_val_score(ImageClassifier(epochs=10), digits.images / 16, digits.target)
    """

    def __init__(
        self,
        recipe: str = "folder",
        *,
        overrides: Mapping[str, Any] | None = None,
        epochs: int | None = None,
        image_shape: tuple[int, ...] | None = None,
        channels: str | None = None,
        val_fraction: float = 0.15,
        class_weight: Mapping[Any, float] | str | None = None,
        random_state: int = 0,
        device: str | None = None,
        verbose: bool = False,
    ) -> None:
        self.recipe = recipe
        self.overrides = overrides
        self.epochs = epochs
        self.image_shape = image_shape
        self.channels = channels
        self.val_fraction = val_fraction
        self.class_weight = class_weight
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    @preserve_torch_settings()
    @preserve_rng()
    def fit(
        self,
        X: npt.ArrayLike,  # noqa: N803
        y: npt.ArrayLike,
        **unsupported: Any,
    ) -> ImageClassifier:
        """Train on images `X` with labels `y` of any sortable type; return self.

        Weights of single samples are not supported; there are those of classes (`class_weight`).
        """
        # Not in the signature: scikit-learn would take `sample_weight` there as supported.
        if unsupported:
            name = next(iter(unsupported))
            fix = "ImageClassifier(...) takes the options"
            if name == "sample_weight":
                fix = "give weights of classes: ImageClassifier(class_weight={label: weight})"
            raise UsageError(f"fit does not support {name}", fix=fix)
        images, targets = self._images(X), column_or_1d(y, warn=True)
        check_classification_targets(targets)
        if len(images) != len(targets):
            raise UsageError(f"{len(images)} images for {len(targets)} labels")
        self.classes_, labels = np.unique(targets, return_inverse=True)
        if len(self.classes_) < 2:
            raise UsageError(
                f"the classifier needs 2 classes, the labels have only {self.classes_}"
            )
        overrides = self._overrides(images)
        recipe = resolve.resolve_recipe(self.recipe, overrides=overrides).recipe
        with user_code.trust(resolve.named_code([recipe], [self.recipe, *overrides])):
            return self._fit(recipe, images, labels)

    def _fit(
        self, recipe: Recipe, images: npt.NDArray[np.uint8], labels: npt.NDArray[Any]
    ) -> ImageClassifier:
        """Train a recipe on images `[N, C, H, W]` with class numbers; return self."""
        validate_recipe(recipe)
        side = images.shape[2]
        fit = resolve_fit(recipe.data.fit, [images.shape[2:]])
        if images.shape[3] != side or recipe.data.image_size not in ("auto", side):
            size = recipe.data.image_size
            side = max(images.shape[2:]) if size == "auto" else int(size)
            images = fit_arrays(images, size=side, channels=images.shape[1], fit=fit)
        data = data_from_arrays(
            images,
            labels.astype(np.int64),
            [str(name) for name in self.classes_],
            val_fraction=self.val_fraction,
            seed=self.random_state,
            fit=fit,
        )
        with quiet_mode(not self.verbose), tempfile.TemporaryDirectory() as folder:
            run_dir = RunDir(Path(folder) / "run", Path(folder) / "plots")
            context = RuntimeContext(select_device(self.device), quiet=not self.verbose)
            prepare(recipe.train.deterministic, context.device)
            data.print_interpretation()
            job = build_training_job(recipe, data, context)
            with run_dir.lock():
                train.fit(job, run_dir)
                calibrate_model(job, run_dir)
            self.model_: LoadedModel = load_model(run_dir.model_path)
            self.history_ = run_dir.metrics()
        self.n_features_in_ = int(np.prod(images.shape[1:]))
        return self

    def predict_proba(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:  # noqa: N803
        """Return calibrated probabilities `[N, K]`, with columns in the order of `classes_`."""
        check_is_fitted(self, "model_")
        return all_probabilities(self.model_, self._images(X), device=self.device)

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:  # noqa: N803
        """Return the most probable label of each image, `[N]`, of the type given to `fit`."""
        best = self.predict_proba(X).argmax(1)  # before `classes_`: raises if not fitted
        labels: npt.NDArray[Any] = self.classes_[best]
        return labels

    def _overrides(self, images: npt.NDArray[np.uint8]) -> list[str]:
        if not isinstance(self.overrides, Mapping | None):
            raise wrong_type("overrides", self.overrides, 'give {"optim.lr": 0.1}')
        values = {**(self.overrides or {}), "train.seed": self.random_state}
        values |= {"data.channels": int(images.shape[1]), "data.val_fraction": self.val_fraction}
        if self.epochs is not None:
            values["train.epochs"] = self.epochs
        if isinstance(self.class_weight, Mapping):
            weights = {str(label): weight for label, weight in self.class_weight.items()}
            values["optim.class_weights"] = weights
        elif self.class_weight is not None:
            if self.class_weight != "balanced":
                raise UsageError(
                    f"class_weight={self.class_weight!r} is not 'balanced' or a dictionary"
                )
            values["optim.class_weights"] = "auto"
        return resolve.to_overrides(values)

    def _images(self, X: npt.ArrayLike) -> npt.NDArray[np.uint8]:  # noqa: N803
        array = _as_numbers(X)
        if array.ndim == 2:
            if self.image_shape is None:
                raise UsageError(
                    f"X has flattened rows {array.shape}", fix="set image_shape=(height, width)"
                )
            if not isinstance(self.image_shape, tuple | list):
                raise wrong_type("image_shape", self.image_shape, "give (height, width)")
            if array.shape[1] != np.prod(self.image_shape):
                raise UsageError(
                    f"rows of {array.shape[1]} numbers are not images of "
                    f"image_shape={self.image_shape}"
                )
            array = array.reshape(len(array), *self.image_shape)
        array = to_nchw(array, channels=self.channels, layouts=SEVERAL_IMAGES, where="X")
        images = to_uint8(array, accepts_range=False, where="X")
        if images.shape[1] == 4:
            images = fit_arrays(images, size=None, channels=3, fit="crop")
        return images


def _as_numbers(X: npt.ArrayLike) -> npt.NDArray[Any]:  # noqa: N803
    """Return `X` as an array of numbers.

    Raises:
        UsageError: it holds file names, or images of different sizes.
    """
    array = as_array(X)
    if array.dtype.kind in "US" or (
        array.dtype == object and isinstance(array.flat[0], os.PathLike)
    ):
        raise UsageError(
            "X holds names of files, not images",
            where="X",
            fix="train on files with convlens.train(FOLDER), or on a CSV file with the columns "
            "path,label",
        )
    return array

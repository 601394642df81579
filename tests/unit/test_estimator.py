"""`ImageClassifier` in scikit-learn's cross-validation, pipelines and searches."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler
from sklearn.utils.validation import has_fit_parameter

from convlens import ImageClassifier
from convlens.data.decode import fit_arrays
from convlens.errors import ConvlensError, UsageError

TINY: dict[str, Any] = {
    "model.widths": [4, 8],
    "model.head": "flatten",
    "train.batch_size": 8,
    "augment": [],
    "optim.ema": None,
}
DIGITS = load_digits()
CHOSEN = np.concatenate([np.flatnonzero(DIGITS.target == k)[:30] for k in (2, 4, 7)])
X = DIGITS.images[CHOSEN] / 16
Y = np.array(["two", "four", "seven"])[np.repeat([0, 1, 2], 30)]


def small(**parameters: Any) -> ImageClassifier:
    return ImageClassifier(**{"overrides": TINY, "epochs": 8, **parameters})


@pytest.fixture(scope="module")
def fitted() -> ImageClassifier:
    return small(epochs=12).fit(X, Y)


def test_it_learns_and_returns_the_given_labels(fitted: ImageClassifier) -> None:
    assert fitted.classes_.tolist() == ["four", "seven", "two"]
    assert fitted.score(X, Y) > 0.9
    preds = fitted.predict(X)
    assert preds.dtype == Y.dtype
    probs = fitted.predict_proba(X)
    assert probs.shape == (90, 3)
    np.testing.assert_allclose(probs.sum(1), 1)
    np.testing.assert_array_equal(fitted.classes_[probs.argmax(1)], preds)
    assert len(fitted.history_) == 12
    assert fitted.n_features_in_ == 64


def test_fit_writes_no_files_and_prints_nothing(fitted: ImageClassifier, capfd: Any) -> None:
    small(epochs=1).fit(X, Y)
    assert list(Path().iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_get_params_set_params_and_clone(fitted: ImageClassifier) -> None:
    assert is_classifier(fitted)
    twin = clone(fitted)
    assert twin.get_params() == fitted.get_params()
    assert not hasattr(twin, "classes_")
    assert twin.set_params(epochs=3, device="cpu").epochs == 3
    with pytest.raises(NotFittedError):
        twin.predict(X)


def test_random_state_determines_the_result() -> None:
    first, again, other = (small(epochs=2, random_state=s).fit(X, Y) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.predict_proba(X), again.predict_proba(X))
    assert not np.array_equal(first.predict_proba(X), other.predict_proba(X))


def test_every_array_format_gives_the_same_model() -> None:
    pixels = np.rint(X * 255).astype(np.uint8)
    expected = small(epochs=2).fit(pixels, Y).predict_proba(pixels)
    flat = X.reshape(90, 64)
    for images, more in [
        (pixels[..., None], {}),
        (pixels[:, None], {}),
        (pixels / 255, {}),
        (pixels.tolist(), {}),
        (torch.tensor(pixels), {}),
        (pixels.reshape(90, 64), {"image_shape": (8, 8)}),
        (pixels.reshape(90, 64), {"image_shape": (8, 8, 1)}),
    ]:
        got = small(epochs=2, **more).fit(images, Y)
        np.testing.assert_array_equal(got.predict_proba(images), expected)
    with pytest.raises(UsageError, match="image_shape"):
        small().fit(flat, Y)


def test_color_images_and_integer_labels() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([10, 9, -3], 12)
    images = random.integers(0, 60, (36, 8, 8, 3), dtype=np.uint8)
    images[np.arange(36), :, :, np.repeat([0, 1, 2], 12)] += 190
    got = small(epochs=30).fit(images, labels)
    assert got.classes_.tolist() == [-3, 9, 10]
    assert got.predict(images).dtype == labels.dtype
    assert got.score(images, labels) == 1.0
    assert got.model_.preprocessing.channels == 3


def test_transparent_images_are_put_onto_white() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 8, 8, 4), dtype=np.uint8)
    opaque = fit_arrays(images.transpose(0, 3, 1, 2), size=None, channels=3, fit="crop")
    labels = np.tile([0, 1], 12)
    by_rgba, by_rgb = (small(epochs=1).fit(each, labels) for each in (images, opaque))
    np.testing.assert_array_equal(by_rgba.predict_proba(images), by_rgb.predict_proba(opaque))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_images_that_are_not_square_are_fitted_as_in_training(fit: str) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 10, 20), dtype=np.uint8)
    labels = np.tile([0, 1], 20)
    got = small(epochs=1, overrides={**TINY, "data.fit": fit}).fit(images, labels)
    assert got.model_.preprocessing.fit == fit
    side = got.model_.preprocessing.image_size
    square = fit_arrays(images[:, None], size=side, channels=1, fit=fit)
    np.testing.assert_array_equal(got.predict_proba(images), got.predict_proba(square))


def test_the_requested_image_size_is_used() -> None:
    got = small(epochs=1, overrides={**TINY, "data.image_size": 12}).fit(X, Y)
    assert got.model_.preprocessing.image_size == 12
    assert got.predict(X[:3]).shape == (3,)


def test_cross_validation_works() -> None:
    scores = cross_val_score(small(), X, Y, cv=2, error_score="raise")
    assert scores.shape == (2,)
    assert (scores > 0.6).all()


def test_it_works_in_a_pipeline() -> None:
    steps = make_pipeline(MinMaxScaler(clip=True), small(image_shape=(8, 8)))
    steps.fit(X.reshape(90, 64) * 3 - 1, Y)
    assert steps.score(X.reshape(90, 64) * 3 - 1, Y) > 0.6
    scaled = make_pipeline(FunctionTransformer(lambda images: images / 16), small(epochs=1))
    assert scaled.fit(X * 16, Y).predict_proba(X * 16).shape == (90, 3)


def test_a_grid_search_accepts_numpy_numbers() -> None:
    grid = {"epochs": np.array([1, 2]), "random_state": np.arange(1)}
    search = GridSearchCV(small(), grid, cv=2, error_score="raise").fit(X, Y)
    assert search.best_params_["epochs"] in (1, 2)
    assert search.predict(X).shape == (90,)


def test_class_weight_is_that_of_the_recipe() -> None:
    rare = np.r_[0:30, 30:34, 60:90]
    numbers = np.repeat([2, 4, 7], 30)  # labels that are not text
    fitted = {}
    for name, parameters in {
        "balanced": {"class_weight": "balanced"},
        "auto": {"overrides": {**TINY, "optim.class_weights": "auto"}},
        "by label": {"class_weight": {2: 1.0, np.int64(4): 9, 7: 1.0}},
        "none": {},
    }.items():
        made = small(epochs=2, **parameters).fit(X[rare], numbers[rare])
        fitted[name] = made.predict_proba(X)
    np.testing.assert_array_equal(fitted["balanced"], fitted["auto"])
    rare_class = {name: probs[:, 1].mean() for name, probs in fitted.items()}
    assert rare_class["none"] < rare_class["balanced"]
    assert rare_class["none"] < rare_class["by label"]
    with pytest.raises(UsageError, match="class_weight='equal' is not 'balanced'"):
        small(class_weight="equal").fit(X, Y)


def test_options_for_unequal_classes_are_overrides() -> None:
    rare = np.r_[0:30, 30:34, 60:90]
    unequal = {**TINY, "optim.class_weights": {"four": 5, "two": 0.5}, "data.balance": "sqrt"}
    got = small(overrides=unequal, epochs=2).fit(X[rare], Y[rare])
    assert {"val_macro_f1", "val_balanced_accuracy"} <= set(got.history_[0])
    with pytest.raises(UsageError, match="does not have: eight"):
        small(overrides={**TINY, "optim.class_weights": {"eight": 5}}, epochs=2).fit(X, Y)


def test_a_fitted_classifier_can_be_stored(fitted: ImageClassifier, tmp_path: Path) -> None:
    joblib.dump(fitted, tmp_path / "model.joblib")
    for copy in (joblib.load(tmp_path / "model.joblib"), pickle.loads(pickle.dumps(fitted))):
        np.testing.assert_array_equal(copy.predict_proba(X), fitted.predict_proba(X))
        assert copy.predict(X).tolist() == fitted.predict(X).tolist()


@pytest.mark.parametrize(
    ("images", "labels", "parameters", "message"),
    [
        (X, Y[:-1], {}, "labels"),
        (X, np.full(90, "one"), {}, "2 classes"),
        (X * 16, Y, {}, r"range of float64 images[\s\S]*where: X[\s\S]*divide them by 16"),
        (["a.png", "b.png"], Y[:2], {}, r"names of files[\s\S]*convlens.train\(FOLDER\)"),
        ([Path("a.png")] * 90, Y, {}, "names of files"),
        (X[:, :3, :3], Y, {"channels": "first"}, "does not hold images"),
        (np.zeros((90, 3, 8, 3)), Y, {}, "can be"),
        (np.zeros((90, 0, 8)), Y, {}, "without pixels"),
        (np.full_like(X, np.nan), Y, {}, "finite"),
        (X[..., None].repeat(2, 3), Y, {}, "shape"),
        (X, np.linspace(0, 1, 90), {}, "continuous|Unknown label"),
        (X, np.stack([np.repeat([0, 1, 2], 30)] * 2, 1), {}, "1d|shape"),
        (X, Y, {"recipe": "foldr"}, "foldr"),
        (X, Y, {"overrides": {"optim.lrr": 1}}, "optim.lrr"),
        (X, Y, {"epochs": 0}, "train.epochs"),
        (X.reshape(90, 64), Y, {"image_shape": (7, 8)}, "image_shape"),
    ],
)
def test_invalid_arguments_are_refused(
    images: Any, labels: Any, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConvlensError, ValueError), match=message):
        small(**parameters).fit(images, labels)


def test_sample_weight_is_refused_and_not_announced() -> None:
    assert not has_fit_parameter(ImageClassifier(), "sample_weight")
    with pytest.raises(UsageError, match="fit does not support sample_weight") as error:
        small().fit(X, Y, sample_weight=np.ones(90))
    assert "class_weight={label: weight}" in error.value.fix
    with pytest.raises(UsageError, match="fit does not support epochs"):
        small().fit(X, Y, epochs=3)


@pytest.mark.parametrize("wrong", [3, [1], b"x", np.zeros(2), {"a": 1}, object()])
@pytest.mark.parametrize(
    "parameter",
    ["recipe", "overrides", "epochs", "image_shape", "channels", "val_fraction", "random_state"],
)
def test_arguments_of_other_types_are_refused(parameter: str, wrong: Any) -> None:
    if isinstance(wrong, int) and parameter in ("epochs", "random_state"):
        return
    images = X.reshape(90, 64) if parameter == "image_shape" else X
    with pytest.raises(ConvlensError):
        ImageClassifier(**{"overrides": TINY, "epochs": 1, parameter: wrong}).fit(images, Y)


def test_a_class_with_one_image_is_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    got = small(epochs=1, verbose=True).fit(X, np.array(["once", *Y[1:]]))
    assert got.predict_proba(X).shape == (90, 4)
    shown = capsys.readouterr().err
    assert "arrays: 1 class has a single image, which stays in training: once" in shown
    with pytest.raises(ConvlensError, match="every class has a single image"):
        small().fit(X[:3], np.array(["a", "b", "c"]))


def test_a_column_of_labels_gives_a_warning() -> None:
    with pytest.warns(Warning, match="1d array"):
        got = small(epochs=1).fit(X, Y[:, None])
    assert got.predict(X).shape == (90,)

"""The Python API: `train`, `Run`, and the core functions that `convlens` exports."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

import convlens
from convlens import Run, recipe
from convlens.data.decode import fit_arrays
from convlens.errors import ConvlensError, ModelFileError, UsageError
from helpers.commands import COLORS, DIGITS, picture, pictures
from helpers.support import TINY

CHANGES = {"data.per_class": 8, "model.widths": [4, 8], "model.depth": 1, "train.epochs": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        made = convlens.train("digits", CHANGES, name="mine", test=False, quiet=True)
        return Run.load(made.path.resolve())


def test_dir_lists_exactly_the_public_names() -> None:
    assert set(dir(convlens)) == set(convlens.__all__)
    for name in convlens.__all__:
        assert getattr(convlens, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = convlens.trian


def test_quiet_training_prints_nothing_and_returns_the_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = convlens.train("digits", CHANGES, test=False, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert made.path == Path("models") / made.name
    assert [row["epoch"] for row in made.metrics] == [1, 2]
    assert made.results == []
    assert made.classes == tuple("0123456789")
    assert repr(made) == f"Run({made.name!r}, finished)"
    # The same overrides as a list find the same run.
    assert convlens.train(*DIGITS[:1], DIGITS[1:], test=False, quiet=True).name == made.name


def test_one_override_can_be_a_text() -> None:
    made = convlens.train(TINY, "train.epochs=1", test=False, quiet=True)
    assert made.recipe.train.epochs == 1
    with pytest.raises(UsageError, match=r"unknown key 'train\.epoch'"):
        convlens.train("digits", "train.epoch=1")


def test_arrays_are_refused_with_what_to_use() -> None:
    images, labels = np.zeros((3, 8, 8)), np.zeros(3)
    for arguments in ((images,), (images, labels), ([images],), ("digits", labels)):
        for function in (convlens.train, convlens.train_many, convlens.find_label_errors):
            with pytest.raises(UsageError) as error:
                function(*arguments)  # type: ignore[operator]
            assert "convlens.ImageClassifier().fit(images, labels)" in error.value.fix
    for wrong in (3, None):
        with pytest.raises(UsageError, match="is not a name"):
            convlens.look(wrong)  # type: ignore[arg-type]
    for call in (convlens.evaluate, convlens.report, convlens.diagnose):
        with pytest.raises(UsageError, match="an object of type 'ndarray' is not a run"):
            call(images)  # type: ignore[operator]
    with pytest.raises(UsageError, match="is not the name of a split"):
        convlens.evaluate("digits", labels)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="an object of type 'ndarray' is not a data set"):
        convlens.evaluate("digits", data=images)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is not the name of an image"):
        convlens.look("digits", [images])  # type: ignore[list-item]


WRONG: list[Any] = [None, 3, 0.5, [3], {"a": 1}, {3: 1}, np.zeros((2, 8, 8)), b"x", object()]
# Arguments for which one of these values is right.
FITTING: dict[str, tuple[type, ...]] = {
    "overrides": (),
    "name": (type(None),),
    "data": (type(None),),
    "device": (type(None),),
    "split": (type(None),),
    "tta": (type(None),),
    "variants": (type(None),),
    "folds": (int, type(None)),
    "seeds": (int,),
    "repeat_splits": (int,),
    "min_accuracy": (type(None), float),
    "prediction_set": (type(None), float),
    "confidence": (float,),
    "top_k": (int,),
    "channels": (int, type(None)),
    "range": (type(None),),
    "max_pixels": (int, type(None)),
    "output": (type(None),),
    "folder": (type(None),),
    "seed": (int,),
    "nearest": (int,),
    "target": (type(None),),
    "cam_layer": (type(None),),
    "images": (int,),
    "learn_from": (int,),
}


def is_wrong(argument: str, value: Any) -> bool:
    return not isinstance(value, FITTING.get(argument, ()))


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_values_of_other_types_are_refused_by_every_function(run: Run, value: Any) -> None:
    """Never a raw TypeError or AttributeError."""
    calls: list[tuple[Any, tuple[Any, ...], tuple[str, ...]]] = [
        (convlens.train, (TINY,), ("overrides", "data", "name", "device")),
        (
            convlens.train_many,
            (TINY,),
            ("overrides", "variants", "repeat_splits", "seeds", "folds", "data", "name"),
        ),
        (
            convlens.find_label_errors,
            (TINY,),
            ("overrides", "data", "name", "device", "folds"),
        ),
        (
            convlens.evaluate,
            (run, "val"),
            ("data", "tta", "min_accuracy", "confidence", "prediction_set", "device"),
        ),
        (
            convlens.predict,
            (run, np.zeros((8, 8), np.uint8)),
            (
                *("top_k", "tta", "min_accuracy", "confidence", "prediction_set", "channels"),
                *("range", "max_pixels", "device"),
            ),
        ),
        (convlens.export, (run,), ("to", "output", "data")),
        (convlens.compare, (run, run), ("split", "data", "device")),
        (convlens.diagnose, (run,), ("device",)),
        (convlens.report, (run,), ("output", "device")),
        (
            convlens.look,
            (run,),
            (
                *("layers", "order", "channels", "filters", "top_images", "dream", "attribution"),
                *("target", "cam_layer", "measure", "embedding", "nearest", "split", "data"),
                *("max_pixels", "seed", "device"),
            ),
        ),
        (
            convlens.measure,
            (run, ["dead"]),
            ("folder", "device", "split", "data", "layers", "images", "learn_from", "seed"),
        ),
    ]
    for function, arguments, names in calls:
        for name in names:
            if is_wrong(name, value):
                with pytest.raises(ConvlensError):
                    function(*arguments, **{name: value})
    for function in (
        convlens.train,
        convlens.train_many,
        convlens.find_label_errors,
        convlens.evaluate,
        convlens.export,
        convlens.diagnose,
        convlens.report,
        convlens.look,
        convlens.measure,
        Run,
        Run.load,
    ):
        with pytest.raises(ConvlensError):
            function(value)  # type: ignore[operator]
    for call in (
        lambda: convlens.predict(value, "a.png"),
        lambda: convlens.compare(value, run),
        lambda: convlens.measure(run, value),
        lambda: convlens.evaluate(run, value) if value is not None else run.evaluate("all"),
    ):
        with pytest.raises(ConvlensError):
            call()


@pytest.mark.figures
def test_runs_and_looks_show_their_figures_in_notebooks() -> None:
    made = convlens.train(TINY, "train.epochs=1", quiet=True)
    page = made._repr_html_()
    assert "<td>test</td>" in page
    content = (made.run_dir.plots / "curves.png").read_bytes()
    assert base64.b64encode(content).decode() in page
    seen = made.look(picture(Path("a.png"), (100,)))
    assert repr(seen) == f"Look({made.name}: {len(seen.files)} files in 'plots/{made.name}/look')"
    assert seen._repr_html_().count("data:image/png;base64,") >= 1


def test_a_mapping_or_a_recipe_can_be_trained() -> None:
    by_mapping = convlens.train(TINY, {"train.epochs": 1}, quiet=True)
    assert by_mapping.results[-1]["split"] == "test"
    by_recipe = convlens.train(recipe.load_recipe(TINY, ["train.epochs=1"]), quiet=True)
    assert by_recipe.name.startswith("tiny")
    assert by_recipe.recipe.digest() == by_mapping.recipe.digest()


def test_training_the_recipe_of_a_run_finds_the_run(run: Run) -> None:
    again = convlens.train(run.recipe, name=str(run.path), test=False, quiet=True)
    assert again.recipe == run.recipe


def test_functions_and_methods_agree(run: Run) -> None:
    images = load_digits().images[:20] / 16
    expected = run.predict(images)
    for reference in (run, run.run_dir, run.path, str(run.run_dir.model_path)):
        assert convlens.predict(reference, images) == expected
        assert convlens.evaluate(reference, "val").correct == run.evaluate("val").correct


def test_a_trained_model_is_better_than_chance() -> None:
    digits = load_digits()
    trained = convlens.train(
        "digits", {**CHANGES, "train.epochs": 20, "data.per_class": 60}, quiet=True
    )
    result = trained.evaluate("test")
    assert result.accuracy > 0.6
    low, high = result.interval95
    assert low < result.accuracy < high
    preds = [int(each.label or -1) for each in trained.predict(digits.images / 16)]
    assert np.mean(np.array(preds) == digits.target) > 0.6


def test_predict_accepts_files_folders_globs_and_iterators(run: Run) -> None:
    one = picture(Path("a.png"), (100,))
    pictures(Path("more"), {"x": 2})
    single = run.predict(one)
    assert single == run.predict("a.png") == run.predict([one]) == run.predict(iter(["a.png"]))
    assert len(run.predict(["a.png", "more", "*.png"], top_k=3)[0].top) == 3
    assert [each.filename for each in run.predict(["a.png", "more"])] == [
        "a.png",
        "more/x/000.png",
        "more/x/001.png",
    ]


def test_an_array_and_a_file_of_the_same_pixels_agree_at_any_size(run: Run) -> None:
    from PIL import Image

    path = picture(Path("big.png"), (80, 120, 90), size=21)
    pixels = np.asarray(Image.open(path))
    assert run.predict(pixels[None])[0].top == run.predict(path)[0].top
    small = fit_arrays(pixels.transpose(2, 0, 1)[None], size=8, channels=1, fit="crop")
    assert run.predict(small)[0].top == run.predict(path)[0].top


def test_an_unreadable_file_has_an_error_and_no_label(run: Run) -> None:
    Path("bad.png").write_text("text")
    bad, good = run.predict(["bad.png", picture(Path("a.png"), (9,))])
    assert (bad.label, bad.prob, bad.top) == (None, None, ())
    assert bad.error == "it is text, not an image"
    assert good.error is None


def test_a_folder_of_images_can_be_trained_on(tmp_path: Path) -> None:
    root = pictures(tmp_path / "photos", dict.fromkeys(COLORS, 8))
    made = convlens.train(root, {"train.epochs": 1, "model.widths": [4]}, quiet=True)
    assert made.name.startswith("photos-")
    assert made.classes == ("blue", "green", "red")
    assert made.recipe.data.name == str(root)


def test_errors_are_convlens_errors() -> None:
    with pytest.raises(ConvlensError):
        convlens.train("nothing-of-that-name")
    with pytest.raises(ValueError, match=r"optim\.lrr"):
        convlens.train("digits", {"optim.lrr": 1})
    with pytest.raises(ModelFileError):
        Run.load("models/none")
    with pytest.raises(UsageError):
        Run.load("none")


def test_recipes_are_returned_by_name() -> None:
    assert list(convlens.recipes()) == recipe.recipe_names()
    assert convlens.recipes()["digits"] == recipe.load_recipe("digits")


def test_the_exported_functions_are_those_of_the_core() -> None:
    for name, module in convlens._MODULES.items():
        assert getattr(convlens, name).__module__ == f"convlens.{module}"


def test_the_functions_that_read_a_run_accept_run_objects(run: Run) -> None:
    assert convlens.diagnose(run).status == convlens.diagnose(run.path).status == "finished"
    assert convlens.report(run, audit=False).runs == ["mine"]
    assert run.diagnose() == convlens.diagnose(run)
    assert run.report(audit=False) == convlens.report(run, audit=False)
    (exported,) = convlens.export(run, "torch", output="model.pt2")
    assert exported.run == "mine"

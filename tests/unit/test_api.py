"""The Python API: the commands as functions, and what a run can be asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import convlens
from convlens import Run, recipe
from convlens.data.decode import fit_arrays
from convlens.errors import ConvlensError, ModelFileError, UsageError
from helpers.commands import COLORS, DIGITS, environment, picture, pictures
from helpers.support import TINY

CHANGES = {"data.per_class": 8, "model.widths": [4, 8], "model.depth": 1, "train.epochs": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        made = convlens.train("digits", CHANGES, name="mine", test=False, quiet=True)
        return Run.load(made.path.resolve())


def test_the_names_are_there_and_no_others() -> None:
    assert set(dir(convlens)) == set(convlens.__all__)
    for name in convlens.__all__:
        assert getattr(convlens, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = convlens.trian


def test_the_import_brings_no_torch() -> None:
    code = "import sys, convlens; dir(convlens); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout == "False\n"


def test_training_says_nothing_if_asked_and_returns_the_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = convlens.train("digits", CHANGES, test=False, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert made.path == Path("models") / made.name
    assert [row["epoch"] for row in made.metrics] == [1, 2]
    assert made.results == []
    assert made.classes == tuple("0123456789")
    assert repr(made) == f"Run({made.name!r}, finished)"
    # The same from a list of texts is the same run.
    assert convlens.train(*DIGITS[:1], DIGITS[1:], test=False, quiet=True).name == made.name


def test_a_mapping_and_a_recipe_train() -> None:
    by_mapping = convlens.train(TINY, {"train.epochs": 1}, quiet=True)
    assert by_mapping.results[-1]["split"] == "test"
    by_recipe = convlens.train(recipe.load_recipe(TINY, ["train.epochs=1"]), quiet=True)
    assert by_recipe.name.startswith("tiny")
    assert by_recipe.recipe.digest() == by_mapping.recipe.digest()


def test_the_recipe_of_a_run_finds_it(run: Run) -> None:
    again = convlens.train(run.recipe, name=str(run.path), test=False, quiet=True)
    assert again.recipe == run.recipe


def test_functions_and_methods_agree(run: Run) -> None:
    images = load_digits().images[:20] / 16
    by_name = convlens.predict(run.path, images)
    assert by_name == run.predict(images)
    assert by_name == convlens.predict(run, images)
    assert convlens.evaluate(run, "val").correct == run.evaluate("val").correct


def test_predictions_are_right_more_often_than_chance_once_trained() -> None:
    digits = load_digits()
    trained = convlens.train(
        "digits", {**CHANGES, "train.epochs": 20, "data.per_class": 60}, quiet=True
    )
    result = trained.evaluate("test")
    assert result.accuracy > 0.6
    low, high = result.interval95
    assert low < result.accuracy < high
    answers = trained.predict(digits.images / 16)
    right = np.mean([int(a.label or -1) == t for a, t in zip(answers, digits.target, strict=True)])
    assert right > 0.6


def test_paths_of_every_kind(run: Run) -> None:
    one = picture(Path("a.png"), (100,))
    pictures(Path("more"), {"x": 2})
    single = run.predict(one)
    assert single == run.predict("a.png") == run.predict([one]) == run.predict(iter(["a.png"]))
    assert len(run.predict(["a.png", "more", "*.png"], top_k=3)[0].top) == 3
    assert [a.filename for a in run.predict(["a.png", "more"])] == [
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


def test_own_images(tmp_path: Path) -> None:
    root = pictures(tmp_path / "photos", dict.fromkeys(COLORS, 8))
    made = convlens.train(root, {"train.epochs": 1, "model.widths": [4]}, quiet=True)
    assert made.name.startswith("photos-")
    assert made.classes == ("blue", "green", "red")
    assert made.recipe.data.name == str(root)


def test_errors_are_of_one_family() -> None:
    with pytest.raises(ConvlensError):
        convlens.train("nothing-of-that-name")
    with pytest.raises(ValueError, match=r"optim\.lrr"):
        convlens.train("digits", {"optim.lrr": 1})
    with pytest.raises(ModelFileError):
        Run.load("models/none")
    with pytest.raises(UsageError):
        Run.load("none")


def test_every_recipe_by_name() -> None:
    assert list(convlens.recipes()) == recipe.recipe_names()
    assert convlens.recipes()["digits"] == recipe.load_recipe("digits")

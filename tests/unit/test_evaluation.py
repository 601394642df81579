"""Evaluation: metrics computed by hand, classes matched by name, every evaluation logged."""

from __future__ import annotations

import csv
import gzip
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convlens import Run, evaluation as evaluations
from convlens.data.dataset import load_data
from convlens.engine import inference
from convlens.errors import DataError, ModelFileError, UsageError
from convlens.metrics import wilson_interval
from convlens.recipe import load_recipe
from convlens.run import RunDir
from convlens.uncertainty.calibration import ModelCalibration, OutlierDetector, ReservedOutputs
from helpers.commands import (
    COLORS,
    DIGITS,
    Done,
    brightness_model,
    constant_model,
    here,
    picture,
    pictures,
    refused,
)
from helpers.shards import tar

CLASSES = ("blue", "green", "red")
KEYS = {
    "run",
    "split",
    "data",
    "n",
    "correct",
    "accuracy",
    "interval95",
    "loss",
    "ece",
    "ece_uncalibrated",
    "ece_by_chance",
    "confidence",
    "temperature",
    "selective",
    "sets",
    "top5",
    "per_class",
    "confusion",
    "classes",
    "tta",
    "looks",
    "images_per_second",
    "data_fingerprint",
    "model_sha256",
    "convlens",
    "hardware",
    "near_ties",
    "own",
    "trained_on",
    "unlike",
    "macro_f1",
    "macro_f1_interval95",
    "balanced_accuracy",
    "balanced_accuracy_interval95",
}


@pytest.fixture
def model(tmp_path: Path) -> RunDir:
    """A model with constant logits (0, 2, 1), which always predicts `green`."""
    return constant_model(tmp_path / "models" / "greens", [0.0, 2.0, 1.0], CLASSES)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run on `digits` whose test split was not used."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = here("train", *DIGITS, "--no-test", "--name", "small")
        assert done.code == 0, done.err
    return folder / "models" / "small"


@pytest.fixture
def small(digits: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(digits, Path("models") / "small"))


def test_metrics_computed_by_hand(model: RunDir) -> None:
    root = pictures(Path("set"), {"blue": 2, "green": 3, "red": 5})
    got = here("evaluate", model.path, "--data", root, "--json").json
    assert set(got) == KEYS
    # Every image gets softmax(0, 2, 1).
    total = 1 + math.exp(2) + math.exp(1)
    blue, green, red = 1 / total, math.exp(2) / total, math.exp(1) / total
    assert (got["n"], got["correct"], got["accuracy"]) == (10, 3, 0.3)
    assert got["interval95"] == list(wilson_interval(3, 10))
    assert got["interval95"] == pytest.approx([0.1078, 0.6032], abs=5e-5)  # Wilson by hand
    loss = -(2 * math.log(blue) + 3 * math.log(green) + 5 * math.log(red)) / 10
    assert got["loss"] == pytest.approx(loss, abs=1e-6)
    assert got["ece"] == pytest.approx(green - 0.3, abs=1e-6)
    assert got["top5"] is None
    assert got["confusion"] == [[0, 2, 0], [0, 3, 0], [0, 5, 0]]
    nothing = {"precision": None, "recall": 0.0, "f1": 0.0}
    assert got["per_class"]["blue"] == {"n": 2, **nothing}
    assert got["per_class"]["red"] == {"n": 5, **nothing}
    f1 = 2 * 0.3 * 1 / 1.3
    green_scores = {"n": 3, "precision": 0.3, "recall": 1.0, "f1": pytest.approx(f1)}
    assert got["per_class"]["green"] == green_scores
    assert got["macro_f1"] == pytest.approx(f1 / 3)
    assert got["balanced_accuracy"] == pytest.approx(1 / 3)
    # All predictions are equal, so all resamples are.
    assert got["macro_f1_interval95"] == pytest.approx([f1 / 3] * 2)
    assert got["balanced_accuracy_interval95"] == pytest.approx([1 / 3] * 2)
    printed = here("evaluate", model.path, "--data", root).out
    assert "macro F1 15.38%, balanced accuracy 33.33%" in printed


def test_an_evaluation_is_short_and_shows_a_table_in_notebooks(model: RunDir) -> None:
    root = pictures(Path("two"), {"blue": 3, "red": 5})
    result = Run(model).evaluate(data=root)
    assert isinstance(result.interval95, tuple)
    low, high = result.interval95
    assert (low, high) == pytest.approx(wilson_interval(result.correct, 8))
    assert repr(result) == (
        f"Evaluation({model.name!r}, 'all', accuracy {result.accuracy:.2%} "
        f"({low:.2%} to {high:.2%}), n = 8)"
    )
    page = result._repr_html_()
    assert "n = 8" in page
    assert "<td>blue</td><td>3</td>" in page
    assert "<td>red</td><td>5</td>" in page


def test_more_than_five_classes_have_a_top5_accuracy(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(6)]
    run_dir = constant_model(tmp_path / "six", [5.0, 4.0, 3.0, 2.0, 1.0, 0.0], names)
    root = pictures(Path("set"), dict.fromkeys(names, 1))
    assert Run(run_dir).evaluate(data=root).top5 == pytest.approx(5 / 6)


def test_classes_are_matched_by_name_whatever_their_order(tmp_path: Path) -> None:
    root = pictures(Path("set"), {"blue": 2, "green": 3, "red": 5})
    turned = constant_model(tmp_path / "turned", [2.0, 1.0, 0.0], ("red", "blue", "green"))
    got = Run(turned).evaluate(data=root)
    assert (got.correct, got.n) == (5, 10)
    assert got.classes == ["red", "blue", "green"]
    assert got.confusion == [[5, 0, 0], [2, 0, 0], [3, 0, 0]]
    assert got.per_class["red"]["recall"] == 1.0


def test_classes_without_images_have_no_scores(model: RunDir) -> None:
    root = pictures(Path("some"), {"green": 3, "red": 1})
    done = here("evaluate", model.path, "--data", root)
    assert done.code == 0
    (blue,) = [line.split() for line in done.out.splitlines() if "blue" in line]
    assert blue == ["blue", "0", "-", "-", "-"]
    got = Run(model).evaluate(data=root)
    assert got.per_class["blue"] == {"n": 0, "precision": None, "recall": None, "f1": None}
    assert (got.correct, got.n) == (3, 4)


def test_a_class_the_model_does_not_know_is_refused(model: RunDir) -> None:
    root = pictures(Path("more"), {"green": 1, "pink": 1, "red": 1})
    done = here("evaluate", model.path, "--data", root)
    refused(done, 3, "doesn't know 1 of the classes: pink", "blue, green, red")
    pictures(Path("case"), {"Green": 1, "green": 1})
    done = here("evaluate", model.path, "--data", "case")
    refused(done, 3, "doesn't know 1 of the classes: Green (it has green)", "data.rename={")
    assert not Run(model).results


def test_unknown_classes_are_refused_before_images_are_read(model: RunDir) -> None:
    root = pictures(Path("more"), {"green": 1, "pink": 1})
    (root / "green" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="doesn't know 1 of the classes: pink"):
        Run(model).evaluate(data=root)


def test_classes_that_differ_in_form_are_matched_or_renamed(tmp_path: Path) -> None:
    run_dir = constant_model(tmp_path / "signs", [0.0, 2.0, 1.0], ("00002", "00012", "Stop"))
    root = pictures(Path("set"), {"red": 3})
    rows = [f"red/{path.name},{label}" for path, label in zip(
        sorted((root / "red").iterdir()), ("12", "2", "STOP"), strict=True)]  # fmt: skip
    Path("signs.csv").write_text("\n".join(["Filename;ClassId", *rows]).replace(",", ";"))
    done = here("evaluate", run_dir.path, "--data", "signs.csv", "data.images=set", "--json")
    assert done.code == 0, done.err
    assert done.json["confusion"] == [[0, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert "matched with those of the model: 12 is 00012, 2 is 00002, STOP is Stop" in done.err
    Path("signs.csv").write_text(Path("signs.csv").read_text().replace("STOP", "halt"))
    command = ("evaluate", run_dir.path, "--data", "signs.csv", "images=set")
    refused(here(*command), 3, "doesn't know 1 of the classes: halt")
    done = here(*command, 'data.rename={"halt": "Stop", "12": "00012"}', "--json")
    assert done.code == 0, done.err
    assert done.json["confusion"] == [[0, 1, 0], [0, 1, 0], [0, 1, 0]]
    refused(here("evaluate", run_dir.path, "images=set"), 2, "add --data")


@pytest.mark.parametrize("form", ["folder", "test", "csv", "shards"])
def test_a_data_set_with_a_single_class_can_be_evaluated(model: RunDir, form: str) -> None:
    root = pictures(Path("one/test" if form == "test" else "one"), {"green": 3})
    (root / "blue").mkdir()  # an empty folder counts as a class without images
    data = Path("one")
    if form == "csv":
        data = Path("one.csv")
        data.write_text("path,label\n" + "".join(f"{p},green\n" for p in root.glob("*/*.png")))
    if form == "shards":
        data = Path("one.tar")
        members = [(p.name, p.read_bytes()) for p in sorted(root.glob("*/*.png"))]
        tar(
            data,
            [
                each
                for name, content in members
                for each in ((name, content), (f"{name[:-4]}.txt", b"green"))
            ],
        )
    got = Run(model).evaluate(data=data)
    assert (got.n, got.correct, got.accuracy) == (3, 3, 1.0)
    assert {name: scores["n"] for name, scores in got.per_class.items()} == {
        "blue": 0,
        "green": 3,
        "red": 0,
    }
    assert tuple(got.interval95) == wilson_interval(3, 3)
    done = here("evaluate", model.path, "--data", data)
    assert done.code == 0, done.err
    reasons = {"folder": "class folders without images: blue", "test": "no train folder"}
    refused(here("train", data), 3, reasons.get(form, "only one class: green"))


def test_class_names_match_in_any_unicode_form(tmp_path: Path) -> None:
    run_dir = constant_model(tmp_path / "cafe", [1.0, 0.0], ["caf\u00e9", "tea"])
    root = pictures(Path("set"), {"cafe\u0301": 2, "tea": 1})
    got = Run(run_dir).evaluate(data=root)
    assert (got.n, got.correct) == (3, 2)


def test_the_error_for_unreadable_images_says_what_to_do(model: RunDir) -> None:
    for root in (pictures(Path("one"), {"red": 2}), pictures(Path("two"), {"red": 2, "blue": 1})):
        (root / "red" / "bad.png").write_bytes(b"")
        done = here("evaluate", model.path, "--data", root)
        refused(done, 3, "1 of ", "red/bad.png: the file is empty", "move them out of the set")
        assert "on_bad" not in done.err
        # `convlens audit` is suggested only if it works.
        assert ("convlens audit" in done.err) == (here("audit", root).code == 0)
        (root / "red" / "bad.png").unlink()
        assert here("evaluate", model.path, "--data", root).code == 0


def test_skipped_files_are_reported(model: RunDir) -> None:
    root = pictures(Path("set"), {"red": 2, "green": 2})
    (root / "red" / "gone.png").symlink_to("/no/such/disk/gone.png")
    done = here("evaluate", model.path, "--data", root)
    assert done.code == 0, done.err
    assert "1 broken links, pipes or devices were left out: red/gone.png" in done.err


def test_images_that_it_was_trained_on_are_counted() -> None:
    root = own_run()
    with gzip.open("models/mine/images.csv.gz", "rt") as file:
        split_of = {row["id"]: row["split"] for row in csv.DictReader(file)}
    trained = sum(split == "train" for split in split_of.values())
    assert 0 < trained < 24
    warning = "images were also used for training"
    pictures(root, {"red": 1}, first=400)
    done = here("evaluate", "mine", "--data", root)
    assert f"{root}: {trained} of 25 {warning}" in done.err
    assert f"({trained} of 25 were training images; 95% interval" in done.out
    assert here("evaluate", "mine", "--data", root, "--json").json["trained_on"] == trained
    (root / "red" / "400.png").unlink()
    # By content, not by name.
    pictures(Path("new"), {"red": 5}, first=500)
    known = next(name for name, split in split_of.items() if split == "train")
    shutil.copy(root / known, "new/red/renamed.png")
    held_out = next(name for name, split in split_of.items() if split == "test")
    shutil.copy(root / held_out, "new/red/tested.png")
    assert f"new: 1 of 7 {warning}" in here("evaluate", "mine", "--data", "new").err
    Path("new/red/renamed.png").unlink()
    assert warning not in here("evaluate", "mine", "--data", "new").err
    assert warning not in here("evaluate", "mine").err
    for damage in (b"", b"\x1f\x8b", gzip.compress(b"id,class,split,sha256\na,b,train,xyz\n")):
        Path("models/mine/images.csv.gz").write_bytes(damage)
        done = here("evaluate", "mine", "--data", root)
        assert (done.code, warning in done.err) == (0, False), done.err


def test_a_split_of_another_data_set_is_chosen_by_name(model: RunDir) -> None:
    root = Path("parts")
    pictures(root / "train", {"green": 4, "red": 1})
    pictures(root / "test", {"green": 1, "red": 2}, first=50)
    got = Run(model).evaluate("test", data=root)
    assert (got.correct, got.n) == (1, 3)
    assert Run(model).evaluate("train", data=root).n == 5
    with pytest.raises(DataError, match="has no val images"):
        Run(model).evaluate("val", data=root)


def test_the_order_of_the_images_does_not_matter(model: RunDir) -> None:
    pictures(Path("set"), {"green": 2, "red": 3})
    lines = [f"{p},{p.parent.name}" for p in sorted(Path("set").rglob("*.png"), reverse=True)]
    Path("list.csv").write_text("\n".join(["path,label", *lines]))
    listed, folder = Run(model).evaluate(data="list.csv"), Run(model).evaluate(data="set")
    assert listed.per_class == folder.per_class
    assert listed.loss == pytest.approx(folder.loss)


def test_every_evaluation_is_counted(small: Path) -> None:
    assert not (small / "results.json").exists()
    for looks, split in [(1, "test"), (2, "test"), (1, "val"), (3, "test")]:
        assert here("evaluate", "small", "--split", split, "--json").json["looks"] == looks
    logged = json.loads((small / "results.json").read_text())
    assert [(r["split"], r["looks"]) for r in logged] == [
        ("test", 1),
        ("test", 2),
        ("val", 1),
        ("test", 3),
    ]
    assert all(r["own"] for r in logged)
    assert logged == Run.load("small").results


def test_evaluating_the_validation_split_gives_the_metrics_of_training(small: Path) -> None:
    run = Run.load("small")
    kept = run.metrics[int(json.loads((small / "run.json").read_text())["kept_epoch"]) - 1]
    got = run.evaluate("val")
    assert got.loss == pytest.approx(kept["val_loss"], rel=1e-5)
    assert got.accuracy == pytest.approx(kept["val_accuracy"], rel=1e-6)


def test_the_test_split_is_the_held_out_images(small: Path) -> None:
    config = load_recipe(small / "recipe.yaml").data
    data = load_data(config, memory_budget=1 << 30)
    test = data.unseal_test()
    assert not set(test.ids) & ({*data.train.ids} | {*data.val.ids})
    rows = [line.split(",") for line in (small / "split.csv").read_text().splitlines()[1:]]
    assert {i for i, split in rows if split == "test"} == set(test.ids)
    got = Run.load("small").evaluate("test")
    counts = np.bincount(test.labels.numpy(), minlength=10).tolist()
    assert [score["n"] for score in got.per_class.values()] == counts
    assert got.data_fingerprint == data.fingerprint


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_a_bare_model_file_can_be_evaluated(small: Path) -> None:
    alone = Path("elsewhere/best.safetensors")
    alone.parent.mkdir()
    shutil.copy(small / "model.safetensors", alone)
    got = Run.load(alone).evaluate("test")
    assert got.correct == Run.load("small").evaluate("test").correct
    assert got.run == "best"
    assert Path("plots/best/confusion-test.png").is_file()


def test_a_run_can_be_named_from_inside_its_folder(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small)
    assert here("evaluate", ".", "--json").json["run"] == "small"


def test_streamed_images_give_the_same_metrics(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Run.load("small").evaluate("test")
    monkeypatch.setenv("CONVLENS_MEMORY", "1KB")
    streamed = Run.load("small").evaluate("test")
    assert (streamed.loss, streamed.confusion) == (expected.loss, expected.confusion)


def own_run() -> Path:
    root = pictures(Path("photos"), dict.fromkeys(COLORS, 8))
    done = here(
        "train", "photos", "model.widths=[4]", "train.epochs=1", "augment=[]", "--name", "mine"
    )
    assert done.code == 0, done.err
    return root


def test_images_that_changed_since_training_are_refused() -> None:
    root = own_run()
    picture(root / "red" / "000.png", COLORS["red"], seed=999)  # one image, other pixels
    message = ("changed since this model was trained", "--data", "--fresh")
    refused(here("evaluate", "mine"), 3, *message)
    again = here(
        "train", "photos", "model.widths=[4]", "train.epochs=1", "augment=[]", "--name", "mine"
    )
    refused(again, 3, *message)
    got = Run.load("mine").evaluate(data=root)  # all images as they are now
    assert (got.n, got.looks) == (24, 1)
    (root / "red" / "000.png").unlink()
    refused(here("evaluate", "mine"), 3, "changed since")
    assert [r["own"] for r in Run.load("mine").results] == [True, False]


def test_a_folder_that_is_gone_is_named() -> None:
    shutil.move(own_run(), "moved")
    refused(
        here("evaluate", "mine"),
        3,
        "the data set 'photos' that 'mine' was trained on does not exist any more",
        f"it was at {Path('photos').absolute()}",
        "`convlens evaluate mine --data NEWPLACE`",
    )


def evaluate(*arguments: str | Path) -> Done:
    return here("evaluate", *arguments)


def test_unknown_names_are_refused(small: Path) -> None:
    refused(evaluate("smal"), 2, "no run called 'smal'", "did you mean small?")
    refused(evaluate("models/none"), 4, "no such run")
    refused(evaluate("x.safetensors"), 4, "no such run")
    refused(evaluate("small", "--split", "tset"), 2, "unknown split 'tset'", "did you mean test?")
    refused(evaluate("small", "--data", "digts"), 2, "digits")
    refused(evaluate("small", "--data", "no/where"), 3, "no such file or folder")
    refused(evaluate("small", "--device", "cuda:77"), 2, "cuda:77")
    done = evaluate("small", "--splt", "val")
    assert (done.code, "--split" in done.err, done.out) == (2, True, "")
    assert not Run.load("small").results


def test_python_raises_the_same(small: Path) -> None:
    with pytest.raises(UsageError):
        Run.load("small").evaluate("tset")
    with pytest.raises(ModelFileError):
        Run.load("models/none")


def test_an_invalid_memory_budget_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_MEMORY", "lots")
    refused(evaluate("small"), 2, "CONVLENS_MEMORY", "64MB")


def test_temperature_changes_the_calibration_error_but_not_accuracy_and_loss(
    model: RunDir,
) -> None:
    root = pictures(Path("set"), {"blue": 2, "green": 3, "red": 5})
    before = Run(model).evaluate(data=root)
    model.add_calibration(ModelCalibration(temperature=4.0))
    after = Run(model).evaluate(data=root)
    for key in ("correct", "confusion", "loss", "near_ties", "per_class"):
        assert getattr(before, key) == getattr(after, key), key
    # Every image gets softmax(0, 2, 1), or softmax(0, 0.5, 0.25).
    green = math.exp(2) / (1 + math.exp(2) + math.exp(1))
    cooler = math.exp(0.5) / (1 + math.exp(0.5) + math.exp(0.25))
    assert (before.temperature, after.temperature) == (1, 4)
    assert before.ece == before.ece_uncalibrated == pytest.approx(green - 0.3, abs=1e-6)
    assert after.ece_uncalibrated == before.ece
    assert after.ece == pytest.approx(cooler - 0.3, abs=1e-6)
    out = here("evaluate", model.path, "--data", root).out
    assert f"calibration error {after.ece:.3f} ({before.ece:.3f} before calibration)" in out
    # Three of ten are right. By chance alone, the error of ten images is as large as the last one.
    assert (before.confidence, after.confidence) == pytest.approx((green, cooler), abs=1e-6)
    assert before.ece_by_chance is not None
    assert before.ece_by_chance < before.ece
    assert after.ece_by_chance is not None
    assert after.ece_by_chance > after.ece
    words = f"confidence is {100 * (green - 0.3):.1f} points too high"
    assert evaluations.sentence(before.to_dict()).endswith(words)
    assert "confidence agrees with accuracy" in out
    of_earlier_version = {**before.to_dict(), "ece_by_chance": None, "confidence": None}
    assert evaluations.sentence(of_earlier_version).endswith(f"calibration error {before.ece:.3f}")


def test_promises_are_measured_on_the_split(model: RunDir) -> None:
    root = pictures(Path("set"), {"blue": 2, "green": 3, "red": 5})
    options = ("--min-accuracy", "80%", "--prediction-set", "50%")
    refused(
        here("evaluate", model.path, "--data", root, *options), 2, "needs held-out images", "80%"
    )
    assert model.evaluation_log() == []  # a promise that cannot be made uses no split
    # The confidence of this model, 0.665, is that of its reserved images.
    confidences = np.full(40, 0.6)
    reserved = ReservedOutputs(confidences, confidences, np.ones(40, bool), candidates=1)
    model.add_calibration(ModelCalibration(reserved=reserved))
    done = here("evaluate", model.path, "--data", root, *options, "--json")
    selective, sets = done.json["selective"], done.json["sets"]
    assert selective["threshold"] == 0.6
    assert (selective["answered"], selective["correct"]) == (10, 3)
    assert (selective["coverage"], selective["accuracy"]) == (1, 0.3)
    # Sets of classes of at least 0.6: `green` only, which 3 of 10 images are.
    assert sets["covered"] == 0.3
    assert (sets["mean_size"], sets["single"]) == (1, 1)
    out = here("evaluate", model.path, "--data", root, *options).out
    assert "for at least 80% accuracy with 95% confidence, 10 of 10 images are answered" in out
    assert "prediction sets for 50% coverage: 30.00% contain the class" in out
    assert here("evaluate", model.path, "--data", root, "--json").json["selective"] is None


def test_images_unlike_the_training_images_are_counted_as_predict_marks_them(
    tmp_path: Path,
) -> None:
    run_dir = brightness_model(tmp_path / "models" / "bright")
    for number, value in enumerate((0, 0, 90, 160, 250)):
        path = Path("set", "light" if value > 127 else "dark", f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value,) * 3).save(path)
    assert Run(run_dir).evaluate(data="set").unlike is None  # the model cannot tell
    # Black has the feature 0, which has no direction: its distance to all others is sqrt(2).
    reference = np.ones((3, 1), np.float16)
    run_dir.add_calibration(
        ModelCalibration(detector=OutlierDetector(-1.0, 0.5, 2, reference=reference))
    )
    assert sum(bool(each.unlike) for each in Run(run_dir).predict("set")) == 2
    result = Run(run_dir).evaluate(data="set")
    expected = {
        "marked": 2,
        "share": 0.4,
        "interval95": list(wilson_interval(2, 5)),
        "by": "features",
    }
    assert result.unlike == expected
    done = here("evaluate", run_dir.path, "--data", "set")
    assert (
        "2 of 5 images (40.0%, 95% interval 11.8% to 76.9%) are marked as unlike the training "
        "images; about 5% of ordinary images are"
    ) in done.out
    assert here("evaluate", run_dir.path, "--data", "set", "--json").json["unlike"] == expected
    assert run_dir.evaluations()[-1]["unlike"] == expected
    run_dir.add_calibration(ModelCalibration(detector=OutlierDetector(-1.0)))
    by_energy = Run(run_dir).evaluate(data="set").unlike
    assert by_energy is not None
    assert by_energy["by"] == "energy"
    predicted = Run(run_dir).predict("set")
    assert by_energy["marked"] == sum(bool(each.unlike) for each in predicted)


def test_scores_are_reduced_in_each_batch(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of a complete split may need more memory than its images."""
    expected = Run.load(digits).evaluate("train").unlike
    assert expected is not None
    monkeypatch.setattr(inference, "MAX_BATCH", 8)
    assert Run.load(digits).evaluate("train").unlike == expected


def test_deep_images_for_a_model_of_8_bit_images_are_stated(tmp_path: Path) -> None:
    run_dir = brightness_model(tmp_path / "models" / "bright")
    for name, value in (("dark", 1000), ("light", 3000)):
        Path("deep", name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((8, 8), value, np.uint16)).save(f"deep/{name}/{number}.png")
    done = here("evaluate", run_dir.path, "--data", "deep", "--json")
    (line,) = (line for line in done.err.splitlines() if line.startswith("warning:"))
    assert "6 of 6 images have more than 8 bits per value, the first is " in line
    assert line.endswith("data.range=[low, high] sets the values that become black and white")
    assert done.json["accuracy"] == 0.5  # 3000 of 65,535 is dark
    done = here("evaluate", run_dir.path, "--data", "deep", "data.range=[0,4095]", "--json")
    assert "warning" not in done.err
    assert done.json["accuracy"] == 1
    refused(here("evaluate", run_dir.path, "--data", "deep", "data.fit=pad"), 2, "can't be changed")

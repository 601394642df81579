"""Test-time augmentation in evaluate and predict: off by default, reported in addition."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

import convlens
from convlens import Run
from convlens.engine.inference import VIEWS
from convlens.errors import UsageError
from convlens.metrics import wilson_interval
from convlens.run import RunDir
from helpers.commands import DIGITS, here, refused, sided_model

every = pytest.mark.parametrize("name", list(VIEWS))


@pytest.fixture
def sided(tmp_path: Path) -> RunDir:
    """Logits are (8 * left, 9 * right); averaged with the mirror image, `right` always wins."""
    return sided_model(tmp_path / "models" / "sided")


def half(path: Path, side: str, brightness: int = 255) -> Path:
    """Write an image of 8 px that is black except for one half."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    columns = slice(0, 4) if side == "left" else slice(4, 8)
    pixels[:, columns] = brightness
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def halves(left: int, right: int) -> Path:
    """Write class folders of images of different brightness (equal files would be duplicates)."""
    for side, count in (("left", left), ("right", right)):
        for n in range(count):
            half(Path("set") / side / f"{n}.png", side, 255 - n)
    return Path("set")


# Evaluate


@every
def test_metrics_without_tta_stay_bit_identical(name: str) -> None:
    assert here("train", *DIGITS, "--no-test", "--name", "small").code == 0
    plain = here("evaluate", "small", "--json").json
    both = here("evaluate", "small", "--tta", name, "--json").json
    tta = both["tta"]
    assert plain["tta"] is None
    for key in plain.keys() - {"tta", "looks", "images_per_second"}:
        assert both[key] == plain[key], key
    assert (plain["looks"], both["looks"]) == (1, 2)
    assert set(tta) == {
        "views",
        "accuracy",
        "interval95",
        "correct",
        "loss",
        "ece",
        "gained",
        "lost",
        "p",
        "macro_f1",
        "balanced_accuracy",
    }
    assert tta["views"] == name
    assert tta["correct"] == plain["correct"] + tta["gained"] - tta["lost"]
    assert tta["accuracy"] == tta["correct"] / plain["n"]
    assert tta["interval95"] == list(wilson_interval(tta["correct"], plain["n"]))
    changed = tta["gained"] + tta["lost"]
    assert changed  # mirrored digits are not digits
    assert tta["p"] == binomtest(tta["gained"], changed).pvalue
    logged = json.loads(Path("models/small/results.json").read_text())
    assert [entry["tta"] for entry in logged] == [None, tta]


def test_metrics_computed_by_hand(sided: RunDir) -> None:
    got = Run(sided).evaluate(data=halves(left=3, right=5), tta="flip")
    assert (got.correct, got.n) == (8, 8)
    assert got.tta is not None
    # The mean logits of an image and its mirror image are (4 b, 4.5 b) for brightness b.
    assert (got.tta["correct"], got.tta["accuracy"]) == (5, 5 / 8)
    assert (got.tta["gained"], got.tta["lost"], got.tta["p"]) == (0, 3, 2 * 0.5**3)
    losses = [math.log(1 + math.exp(0.5 * (1 - n / 255))) for n in range(3)]
    losses += [math.log(1 + math.exp(-0.5 * (1 - n / 255))) for n in range(5)]
    assert got.tta["loss"] == pytest.approx(sum(losses) / 8, abs=1e-6)


def test_the_text_output_has_both_accuracies_and_their_difference(sided: RunDir) -> None:
    done = here("evaluate", sided.path, "--data", halves(left=3, right=5), "--tta", "flip")
    assert done.code == 0, done.err
    plain, augmented = [line for line in done.out.splitlines() if "95% interval" in line]
    assert plain.startswith("accuracy on set 100.00%")
    assert augmented.startswith("with test-time augmentation (flip) 62.50%: -37.50 points")
    assert augmented.endswith("0 images gained, 3 lost (McNemar's exact p = 0.2500)")
    assert "95% interval" not in done.err
    without = here("evaluate", sided.path, "--data", "set")
    assert "test-time" not in without.out + without.err


# Predict


def test_predictions_computed_by_hand(sided: RunDir) -> None:
    paths = [half(Path("l.png"), "left"), half(Path("r.png"), "right")]
    left, right = Run(sided).predict(paths, tta="flip", top_k=2)
    assert (left.label, left.tta_label) == ("left", "right")
    assert left.prob == pytest.approx(1 / (1 + math.exp(-8)))
    assert left.tta_prob == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert (right.label, right.tta_label) == ("right", "right")
    assert right.prob == pytest.approx(1 / (1 + math.exp(-9)))
    assert dict(right.tta_top) == pytest.approx(dict(left.tta_top))
    plain = Run(sided).predict(paths, top_k=2)
    assert [each.top for each in plain] == [left.top, right.top]
    assert (plain[0].tta_label, plain[0].tta_prob, plain[0].tta_top) == (None, None, ())


def test_csv_has_both_predictions(sided: RunDir) -> None:
    half(Path("l.png"), "left")
    Path("bad.png").write_text("text")
    done = here("predict", sided.path, "bad.png", "l.png", "-f", "csv", "--tta", "flip")
    refused(done, 3, "1 of 2 files")
    assert "tta columns are the mean over the views of 'flip'" in done.err
    bad, good = csv.DictReader(io.StringIO(done.out))
    assert list(good) == ["filename", "label", "prob", "tta_label", "tta_prob", "error"]
    assert list(good.values()) == ["l.png", "left", "0.999665", "right", "0.622459", ""]
    assert list(bad.values()) == ["bad.png", "", "", "", "", "it is text, not an image"]
    done = here("predict", sided.path, "l.png", "-f", "csv", "--tta", "flip", "-k", "2")
    assert done.out.splitlines()[0] == (
        "filename,label,prob,label2,prob2,tta_label,tta_prob,tta_label2,tta_prob2,error"
    )


def test_json_has_both_predictions(sided: RunDir) -> None:
    half(Path("l.png"), "left")
    (prediction,) = here("predict", sided.path, "l.png", "--tta", "flip", "--json").json[
        "predictions"
    ]
    assert (prediction["label"], prediction["tta_label"]) == ("left", "right")
    assert prediction["tta_top"] == [{"label": "right", "prob": prediction["tta_prob"]}]
    (plain,) = here("predict", sided.path, "l.png", "--json").json["predictions"]
    assert plain == {key: prediction[key] for key in ("filename", "label", "prob", "top")}


def test_the_table_shows_both_predictions_if_they_differ(sided: RunDir) -> None:
    half(Path("l.png"), "left")
    half(Path("r.png"), "right")
    done = here("predict", sided.path, "l.png", "r.png", "--tta", "flip")
    assert done.out.splitlines() == [
        "l.png  right 62.2%  (without TTA: left 100.0%)",
        "r.png  right 62.2%",
    ]


# Both


def test_tta_works_in_a_subprocess(sided: RunDir) -> None:
    root = halves(left=2, right=2)
    done = here("evaluate", sided.path, "--data", root, "--tta", "flip+shifts", "--json")
    assert done.code == 0, done.err
    assert (done.json["accuracy"], done.json["tta"]["accuracy"]) == (1.0, 0.5)
    assert done.json["tta"]["views"] == "flip+shifts"
    done = here("predict", sided.path, root, "--tta", "flip+shifts", "--json")
    assert done.code == 0, done.err
    assert [a["tta_label"] for a in done.json["predictions"]] == ["right"] * 4


def test_a_typo_is_reported_before_anything_is_read(sided: RunDir) -> None:
    half(Path("l.png"), "left")
    for arguments in (["evaluate", sided.path], ["predict", sided.path, "l.png"]):
        done = here(*arguments, "--tta", "flip+shift")
        refused(done, 2, "unknown test-time augmentation 'flip+shift'", "did you mean flip+shifts")
        assert done.out == ""
    refused(here("evaluate", sided.path, "--tta", ""), 2, "choose from: flip, flip+shifts")
    with pytest.raises(UsageError, match="'flp'"):
        convlens.evaluate(Run(sided), tta="flp")
    with pytest.raises(UsageError, match="'flp'"):
        convlens.predict(Run(sided), ["l.png"], tta="flp")
    assert not Run(sided).results


def test_the_help_names_the_limits() -> None:
    for name in ("evaluate", "predict"):
        text = " ".join(here(name, "--help").out.replace("│", " ").split())
        assert "Only for classes that mirroring does not change" in text

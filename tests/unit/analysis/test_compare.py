"""Comparison of runs: verdicts computed by hand, groups of seeds, refused comparisons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

import convlens
from convlens.errors import UsageError
from convlens.metrics import newcombe_interval
from convlens.run import RunDir
from helpers.commands import Done, brightness_model, constant_model, here, pictures, refused
from helpers.support import TINY

CLASSES = ("blue", "green", "red")


@pytest.fixture
def images() -> Path:
    return pictures(Path("set"), {"blue": 2, "green": 3, "red": 5})


@pytest.fixture
def greens(tmp_path: Path) -> RunDir:
    """A model that always predicts `green`."""
    return constant_model(tmp_path / "models" / "greens", [0.0, 2.0, 1.0], CLASSES)


@pytest.fixture
def reds(tmp_path: Path) -> RunDir:
    """A model that always predicts `red`; its classes are in another order."""
    return constant_model(tmp_path / "models" / "reds", [2.0, 0.0, 1.0], ("red", "blue", "green"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on 80 digits: `small` and `wide` with two seeds each, and one of another split."""
    folder = tmp_path_factory.mktemp("trained")
    wide = {"model.widths": [16, 32]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, changes in {
            "small": {},
            "small-1": {"train.seed": 1},
            "wide": wide,
            "wide-1": {**wide, "train.seed": 1},
            "other": {**wide, "data.seed": 1},
        }.items():
            changes = {"train.epochs": 2, **changes}
            convlens.train(TINY, changes, name=name, test=False, quiet=True, device="cpu")
    return folder


@pytest.fixture
def runs(trained: Path) -> None:
    shutil.copytree(trained / "models", "models")


def compare(*arguments: str | Path) -> Done:
    return here("compare", *arguments, "--device", "cpu")


def test_the_verdict_on_two_models_agrees_with_a_computation_by_hand(
    greens: RunDir, reds: RunDir, images: Path
) -> None:
    done = compare(greens.path, reds.path, "--data", images, "--json")
    got = done.json
    assert (got["split"], got["data"]) == ("all", "set")
    (verdict,) = got["verdicts"]
    assert verdict["details"] == {
        "n": 10,
        "both": 0,
        "only_this": 5,
        "only_reference": 3,
        "neither": 2,
    }
    # 3 of 8: p = 2 * (1 + 8 + 28 + 56) / 2^8
    assert verdict["p"] == verdict["p_holm"] == pytest.approx(186 / 256)
    assert verdict["difference"] == pytest.approx(0.2)
    assert verdict["interval95"] == list(newcombe_interval(0, 3, 5, 2))
    assert verdict["differs"] is False
    # Recalls 0, 1, 0 and 0, 0, 1; F1 of green 2 * 3 / 13, of red 2 * 5 / 15, of the others 0. The
    # models always predict the same, so there is nothing to resample.
    means = verdict["class_means"]
    assert means["balanced_accuracy"]["difference"] == pytest.approx(0)
    assert means["balanced_accuracy"]["interval95"] == pytest.approx([0, 0])
    gain = (10 / 15 - 6 / 13) / 3
    assert means["macro_f1"]["difference"] == pytest.approx(gain)
    assert means["macro_f1"]["interval95"] == pytest.approx([gain, gain])
    assert [group["macro_f1"] for group in got["groups"]] == pytest.approx([2 / 13, 2 / 9])
    assert verdict["sentence"].startswith(
        "reds and greens are not distinguishable: +20.00 points for reds (95% interval "
    )
    assert "p = 0.73" in verdict["sentence"]
    assert [group["accuracy"] for group in got["groups"]] == [0.3, 0.5]
    assert [group["runs"][0]["training_seconds"] for group in got["groups"]] == [None, None]
    # Neither has curves.
    assert got["plots"] == ["plots/compare-greens-reds/differences.png"]
    assert Path(got["plots"][0]).is_file()
    # Each evaluation is logged.
    assert [run_dir.evaluations()[0]["looks"] for run_dir in (greens, reds)] == [1, 1]


def test_a_clear_difference_is_reported(tmp_path: Path) -> None:
    colors = {"dark": (20, 20, 20), "light": (230, 230, 230)}
    root = pictures(Path("set"), dict.fromkeys(colors, 12), colors=colors)
    knows = brightness_model(tmp_path / "models" / "knows")
    preds = constant_model(tmp_path / "models" / "guesses", [1.0, 0.0], ("dark", "light"))
    got = convlens.compare(knows.path, preds.path, data=root)
    (verdict,) = got.verdicts
    # 24 correct images against 12: p = 2 / 2^12
    assert verdict.p == pytest.approx(2**-11)
    low, high = newcombe_interval(12, 12, 0, 0)
    # 12 of 12 images of each class: no resample of them differs.
    assert verdict.class_means["balanced_accuracy"][:2] == (-0.5, (-0.5, -0.5))
    assert verdict.class_means_sentence == (
        "guesses against knows: macro F1 -66.67 points (95% interval -66.67 to -66.67), "
        "balanced accuracy -50.00 points (95% interval -50.00 to -50.00)"
    )
    assert verdict.sentence == (
        "knows is more accurate than guesses by 50.00 points (95% interval "
        f"{-100 * high:.2f} to {-100 * low:.2f}), p = 0.00049 (McNemar's exact test on 24 images: "
        "0 correct only by guesses, 12 only by knows)"
    )


def test_runs_that_differ_only_in_seeds_form_a_group(runs: None) -> None:
    done = compare("small", "wide", "small-1", "wide-1", "--json")
    got = done.json
    assert [group["name"] for group in got["groups"]] == ["tiny (2 seeds)", "wide (2 seeds)"]
    assert [[r["run"] for r in g["runs"]] for g in got["groups"]] == [
        ["small", "small-1"],
        ["wide", "wide-1"],
    ]
    values = [[run["accuracy"] for run in group["runs"]] for group in got["groups"]]
    (verdict,) = got["verdicts"]
    assert (verdict["test"], verdict["details"]) == ("seeds", {"seeds": 2})
    gains = [after - before for before, after in zip(*values, strict=True)]
    assert verdict["difference"] == pytest.approx(sum(gains) / 2)
    assert got["groups"][0]["sd"] == pytest.approx(abs(values[0][0] - values[0][1]) / 2**0.5)
    for metric, means in verdict["class_means"].items():
        values = [[run[metric] for run in group["runs"]] for group in got["groups"]]
        expected = ttest_rel(values[1], values[0])
        assert means["p"] == pytest.approx(expected.pvalue)
        assert means["interval95"] == pytest.approx(list(expected.confidence_interval(0.95)))
    assert {Path(p).name for p in got["plots"]} == {"curves.png", "differences.png"}
    for run in got["groups"][0]["runs"]:
        facts = json.loads(Path(f"models/{run['run']}/run.json").read_text())
        assert run["parameters"] == facts["parameters"]
        assert run["training_seconds"] == facts["training_seconds"]
        assert run["file_bytes"] == Path(f"models/{run['run']}/model.safetensors").stat().st_size


def test_a_group_and_a_single_run_are_compared_as_two_models(runs: None) -> None:
    got = convlens.compare("small", "small-1", "wide")
    assert [verdict.test for verdict in got.verdicts] == ["images"]
    assert (got.verdicts[0].name, got.verdicts[0].reference) == ("wide", "small")
    assert any("several seeds" in note for note in got.notes)


def test_runs_of_one_recipe_are_compared_and_their_spread_is_noted(runs: None) -> None:
    got = convlens.compare("small", "small-1")
    assert [group.name for group in got.groups] == ["small", "small-1"]
    assert got.verdicts[0].test == "images"
    assert any(note.startswith("one recipe with 2 seeds: accuracy") for note in got.notes)


def test_p_values_are_corrected_for_the_number_of_comparisons(
    greens: RunDir, reds: RunDir, images: Path, tmp_path: Path
) -> None:
    blues = constant_model(tmp_path / "models" / "blues", [9.0, 0.0, 0.0], CLASSES)
    got = convlens.compare(greens.path, reds.path, blues.path, data=images)
    assert [v.p for v in got.verdicts] == [pytest.approx(186 / 256), 1.0]
    assert [v.p_holm for v in got.verdicts] == [1.0, 1.0]
    assert "by itself p = 0.73, corrected by Holm" in got.verdicts[0].sentence


def test_the_command_prints_a_table(runs: None) -> None:
    done = compare("small", "wide")
    assert done.code == 0, done.err
    for text in (
        "accuracy %",
        "macro F1 %",
        "balanced %",
        "wide against small: macro F1",
        "ECE",
        "MFLOPs",
        "trained s",
        "images/s",
        "curves.png",
    ):
        assert text in done.out
    assert done.out.count("McNemar's exact test on 270 images") == 1
    assert "compare several seeds" in done.err


def test_different_test_images_are_refused_before_they_are_used(runs: None) -> None:
    refused(
        compare("small", "other"), 3, "not evaluated on the same images", "--force", "270 images"
    )
    assert not RunDir(Path("models/small")).evaluations()
    forced = compare("small", "other", "--force", "--json").json
    (verdict,) = forced["verdicts"]
    assert (verdict["test"], verdict["p"], verdict["differs"]) == ("none", None, None)
    assert verdict["sentence"].startswith("no verdict on other and small: they were evaluated on")
    assert any("nothing is tested" in note for note in forced["notes"])
    # On a common data set they can be compared.
    assert compare("small", "other", "--data", "digits", "--json").json["verdicts"][0]["p"]


def test_accuracies_on_validation_images_are_called_optimistic(runs: None) -> None:
    done = compare("small", "wide", "--split", "val", "--json")
    assert any("optimistic" in note for note in done.json["notes"])


def test_different_classes_are_refused(greens: RunDir, tmp_path: Path, images: Path) -> None:
    more = constant_model(tmp_path / "models" / "more", [0.0] * 4, (*CLASSES, "pink"))
    done = compare(greens.path, more.path, "--data", images)
    refused(done, 3, "greens and more don't have the same classes: pink")
    done = compare(greens.path, more.path, "--data", images, "--force", "--json")
    assert done.json["verdicts"][0]["test"] == "none"


def test_one_error_names_all_unknown_runs(runs: None) -> None:
    refused(compare("smal", "wide"), 2, "no run called 'smal'", "did you mean small")
    refused(compare("smal", "wid"), 2, "'smal'", "'wid'", "did you mean wide")
    refused(compare("small"), 2, "at least two different runs, got 1", "wide", "convlens evaluate")
    refused(compare("small", "models/small"), 2, "at least two different runs, got 1")
    refused(compare("small", "wide", "--split", "tset"), 2, "did you mean test?")
    assert compare().code == 2


def test_a_run_without_weights_or_images_is_refused(runs: None) -> None:
    Path("models/small/model.safetensors").unlink()
    refused(compare("small", "wide"), 4, "run 'small' has no weights yet")
    root = pictures(Path("photos"), {"blue": 8, "green": 8})
    for name in ("a", "b"):
        done = here(
            "train",
            root,
            "model.widths=[4]",
            "train.epochs=1",
            "augment=[]",
            "--no-test",
            "--name",
            name,
            f"train.seed={int(name == 'b')}",
        )
        assert done.code == 0, done.err
    shutil.move(root, "moved")
    refused(compare("a", "b"), 3, "the data set 'photos' that 'a' was trained on")
    assert compare("a", "b", "--data", "moved").code == 0


def test_a_bare_model_file_can_be_compared(runs: None) -> None:
    shutil.copy("models/wide/model.safetensors", "alone.safetensors")
    got = convlens.compare("small", convlens.Run.load("alone.safetensors"))
    assert got.groups[1].members[0].training_seconds is None
    with pytest.raises(UsageError):
        convlens.compare("small")

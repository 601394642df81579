"""Data sets that have moved, grown or have other splits, and which of their images are tested."""

from __future__ import annotations

import csv
import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import convlens
from convlens import Run
from convlens.analysis import compare as analysis_compare
from convlens.data import dataset
from convlens.evaluation import Evaluation, sentence
from convlens.model_export import sample_images
from convlens.run import RunDir, load_model
from convlens.training.resolve import resolve_recipe_or_run
from helpers.commands import COLORS, constant_model, here, pictures, refused

NET = ("model.widths=[4]", "train.epochs=1", "augment=[]", "data.image_size=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images `plain` and the run `moved`, whose test split was used once."""
    folder = tmp_path_factory.mktemp("moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pictures(Path("plain"), dict.fromkeys(COLORS, 8))
        done = here("train", "plain", *NET, "--name", "moved")
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def run(trained: Path) -> RunDir:
    """A copy of the run; its images are at `new/place` instead of `plain`."""
    shutil.copytree(trained / "models", "models")
    shutil.copytree(trained / "plain", "new/place")
    run_dir = RunDir(Path("models/moved"))
    data = {**run_dir.metadata()["data"], "path": os.path.abspath("plain")}
    run_dir.update_metadata({"data": data})
    return run_dir


def split_of(run_dir: RunDir) -> dict[str, str]:
    with gzip.open(run_dir.path / "images.csv.gz", "rt") as file:
        return {row["id"]: row["split"] for row in csv.DictReader(file)}


def test_the_own_test_split_is_evaluated_at_the_new_place(run: RunDir) -> None:
    before = run.evaluations()[-1]
    done = here("evaluate", "moved", "--data", "new/place", "--json")
    assert done.code == 0, done.err
    assert "new/place holds the images that this model was trained and tested on" in done.err
    assert "only its own test split" in done.err
    got = done.json
    assert (got["n"], got["confusion"]) == (before["n"], before["confusion"])
    assert (got["split"], got["own"], got["looks"], got["trained_on"]) == ("test", True, 2, 0)
    assert got["data_fingerprint"] == before["data_fingerprint"]
    val = here("evaluate", "moved", "--data", "new/place", "--split", "validation", "--json").json
    assert (val["split"], val["n"]) == ("val", list(split_of(run).values()).count("val"))


def test_every_command_finds_the_new_place_afterwards(run: RunDir) -> None:
    refused(here("look", "moved", "test:0"), 3, "does not exist any more")
    assert here("evaluate", "moved", "--data", "./new/place/").code == 0
    assert run.metadata()["data"]["path"] == os.path.abspath("new/place")
    for command in (
        ["evaluate", "moved"],
        ["look", "moved", "test:0"],
        ["diagnose", "moved"],
    ):
        done = here(*command)
        assert done.code == 0, done.err
        assert "does not exist" not in done.err + done.out, command
    report = convlens.report("moved")
    assert report.missing == []
    assert resolve_recipe_or_run("moved").recipe.data.name == "new/place"  # of `labels`
    # A set of other images at the old place does not hide the one that moved.
    pictures(Path("plain"), dict.fromkeys(COLORS, 4), first=90)
    assert here("evaluate", "moved", "--json").json["looks"] == 6


def test_look_and_compare_take_the_new_place(run: RunDir) -> None:
    shutil.copytree(run.path, "models/twin")
    done = here("look", "moved", "--data", "new/place", "worst:2", "class:red:1", "val:0", "--json")
    assert done.code == 0, done.err
    assert {each["name"].split(":")[0] for each in done.json["images"]} == {"test", "val"}
    assert run.evaluation_log()[-1]["by"] == "look"
    done = here("look", "moved", "--data", "new/place", "--json")
    assert {each["name"].split(":")[0] for each in done.json["images"]} == {"val"}
    assert len(run.evaluation_log()) == 2
    compared = convlens.compare("moved", "twin", data="new/place")
    assert (compared.split, compared.groups[0].members[0].evaluation.looks) == ("test", 3)


def test_a_larger_set_is_described_and_offers_the_test_images(run: RunDir) -> None:
    before, splits = run.evaluations()[-1], list(split_of(run).values())
    pictures(Path("new/place"), {"red": 3}, first=800)
    done = here("evaluate", "moved", "--data", "new/place")
    n, trained_on = 27, splits.count("train")
    assert f"new/place: {trained_on} of {n} images were also used for training" in done.err
    offer = f"the {splits.count('test')} test images of this run are in it, too; --split test"
    assert offer in " ".join(done.err.split())
    last = next(line for line in done.out.splitlines() if "accuracy" in line)
    assert last.startswith("accuracy on new/place ")
    assert f"({trained_on} of {n} were training images; 95% interval" in last
    assert "test set used" not in last
    got = here("evaluate", "moved", "--data", "new/place", "--split", "test", "--json").json
    assert (got["n"], got["confusion"]) == (before["n"], before["confusion"])
    assert (got["own"], got["looks"]) == (True, 2)
    assert here("evaluate", "moved", "--data", "new/place", "--json").json["split"] == "all"
    # One test image less: only a part of the split is there.
    gone = next(image for image, split in split_of(run).items() if split == "test")
    Path("new/place", gone).unlink()
    done = here("evaluate", "moved", "--data", "new/place", "--split", "test")
    some = f"{splits.count('test') - 1} of the {splits.count('test')} test images of the run"
    refused(done, 3, "has no splits, so --split test does not apply", some, "leave out --split")
    assert "are in it, too" not in here("evaluate", "moved", "--data", "new/place").err


@pytest.mark.parametrize("split", ["val", "train", "test", "validation"])
def test_a_split_that_does_not_apply_is_an_error(split: str, tmp_path: Path) -> None:
    run_dir = constant_model(tmp_path / "models" / "greens", [0.0, 2.0, 1.0], tuple(COLORS))
    pictures(Path("more"), dict.fromkeys(COLORS, 2))
    done = here("evaluate", run_dir.path, "--data", "more", "--split", split)
    refused(done, 3, "'more' has no splits, so --split", "leave out --split to use all 6 images")
    assert run_dir.evaluation_log() == []
    refused(here("look", run_dir.path, "--data", "more", "--measure", "dead", "--split", split), 3)


def test_splits_of_another_data_set_are_chosen_by_any_spelling(tmp_path: Path) -> None:
    run_dir = constant_model(tmp_path / "models" / "greens", [0.0, 2.0, 1.0], tuple(COLORS))
    for number, (name, count) in enumerate((("train", 4), ("valid", 2), ("test", 1))):
        pictures(Path("parts") / name, dict.fromkeys(COLORS, count), first=50 * number)
    evaluate: Callable[..., Evaluation] = Run(run_dir).evaluate
    assert [evaluate(data="parts").n, evaluate("test", data="parts").n] == [3, 3]
    got = evaluate("validation", data="parts")
    assert (got.split, got.n, got.own) == ("val", 6, False)
    assert "val accuracy on parts " in sentence(got.to_dict())
    assert evaluate("training", data="parts").n == 12
    refused(here("evaluate", run_dir.path, "--split", "vlaidation"), 2, "did you mean val?")
    shutil.rmtree("parts/test")
    refused(here("evaluate", run_dir.path, "--data", "parts"), 3, "no test images", "train, val")


def test_exactly_the_test_images_are_a_use_of_the_test_split_in_any_set(run: RunDir) -> None:
    for image, split in split_of(run).items():
        for root in ("parts/" + (split if split == "test" else "train"), "only-" + split):
            Path(root, image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("new/place", image), Path(root, image))
    before = run.evaluations()[-1]
    for uses, data in enumerate(("only-test", "parts"), 2):
        done = here("evaluate", "moved", "--data", data, "--json")
        assert "these are exactly the test images of this run" in done.err
        got = done.json
        assert (got["own"], got["looks"], got["split"]) == (True, uses, "test")
        assert got["confusion"] == before["confusion"]
    got = here("evaluate", "moved", "--data", "only-val", "--json").json
    assert (got["own"], got["split"], got["looks"]) == (False, "all", 1)


def test_runs_with_other_test_images_are_compared_on_the_whole_set(run: RunDir) -> None:
    done = here("train", "new/place", *NET, "data.seed=1", "--name", "other", "--no-test")
    assert done.code == 0, done.err
    compared = convlens.compare("moved", "other", data="new/place")
    assert (compared.split, compared.groups[0].members[0].evaluation.n) == ("all", 24)
    assert [len(run.evaluation_log()), len(RunDir(Path("models/other")).evaluation_log())] == [2, 1]
    assert not run.evaluation_log()[-1]["own"]


def test_built_in_sets_are_evaluated_as_a_whole() -> None:
    done = here("train", "digits", "data.per_class=8", *NET, "--no-test", "--name", "small")
    assert done.code == 0, done.err
    got = here("evaluate", "small", "--data", "digits", "--json").json
    assert (got["split"], got["n"], got["own"]) == ("all", 1797, False)
    refused(here("evaluate", "small", "--data", "digits", "--split", "val"), 3, "has no splits")


def test_a_comparison_that_fails_uses_no_test_split(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.path, "models/twin")
    monkeypatch.setattr(analysis_compare, "_plot", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convlens.compare("moved", "twin", data="new/place")
    assert len(run.evaluation_log()) == 1


def test_the_list_of_the_runs_images_is_read_once(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(Path("new/place"), {"red": 3}, first=800)
    read = list[Path]()
    original = dataset._read_image_list
    monkeypatch.setattr(
        dataset, "_read_image_list", lambda path: read.append(path) or original(path)
    )
    result = convlens.evaluate(run, data="new/place")
    assert result.trained_on > 0
    assert read == [run.path / "images.csv.gz"]


def test_keys_and_classes_settle_how_the_other_set_is_read(run: RunDir) -> None:
    """`evaluate`, `compare`, `look` and `export` read the same set in the same way."""
    shutil.copytree(run.path, "models/twin")
    photos = pictures(Path("photos"), dict.fromkeys(COLORS, 4), first=300)
    lines = [f"{p.relative_to(photos)},{p.parent.name}" for p in sorted(photos.rglob("*.png"))]
    Path("list.csv").write_text("\n".join(["file,kind", *lines]))
    keys = ("data.path_column=file", "label_column=kind", "data.images=photos")
    got = here("evaluate", "moved", "--data", "list.csv", *keys, "--json")
    assert got.json["n"] == 12, got.err
    compared = here("compare", "moved", "twin", *keys, "--data", "list.csv", "--json")
    assert compared.code == 0, compared.err
    assert [each["runs"][0]["n"] for each in compared.json["groups"]] == [12, 12]
    looked = here("look", "moved", "class:red:2", *keys, "--data", "list.csv", "--json")
    assert looked.code == 0, looked.err
    assert [each["name"] for each in looked.json["images"]] == ["list.csv:8", "list.csv:9"]
    measured = here("look", "moved", *keys, "--data", "list.csv", "--measure", "dead", "--json")
    assert measured.code == 0, measured.err
    assert measured.json["measures"]["networks"][0]["n"] == 12 // 5
    options = ("--to", "torch", "-o", "m.pt2", "--json")
    exported = here("export", "moved", *keys, "--data", "list.csv", *options)
    assert exported.code == 0, exported.err
    assert exported.json["exports"][0]["proof"]["images"] == 12
    for command in (["compare", "moved", "twin"], ["look", "moved"], ["export", "moved"]):
        refused(here(*command, "data.images=photos"), 2, "these keys say how to read", "--data")
        refused(here(*command, "--data", "list.csv", "data.imges=x"), 2, "data.imges")


def test_the_models_classes_settle_an_ambiguous_folder(tmp_path: Path) -> None:
    """`odd/test` and `odd/train` look like splits, but they are the classes of the model."""
    classes = ("test", "train")
    run_dir = constant_model(tmp_path / "models" / "odd", [0.0, 1.0], classes)
    pictures(Path("odd"), dict.fromkeys(classes, 3))
    for command in (["evaluate", run_dir.path], ["look", run_dir.path, "--measure", "dead"]):
        done = here(*command, "--data", "odd", "--json")
        assert done.code == 0, done.err
    images, source = sample_images(run_dir, load_model(run_dir.model_path), "odd")
    assert (len(images), source) == (6, "images of 'odd'")

"""Commands for training and data: `train`, `recipes`, `audit` and `augment`."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convlens import Run, recipe
from convlens.run import RunDir
from helpers.commands import (
    COLORS,
    DIGITS,
    NET,
    Done,
    here,
    picture,
    pictures,
    refused,
    weights,
)


def metadata(run: str | Path) -> dict[str, Any]:
    """Return the contents of run.json."""
    content: dict[str, Any] = json.loads((Path("models") / run / "run.json").read_text())
    return content


def train(*arguments: str | Path) -> Any:
    """Run `convlens train ... --json` and return its result."""
    done = here("train", *arguments, "--json")
    assert done.code == 0, done.err
    return done.json


def test_same_command_finds_the_finished_run_and_tests_it_again() -> None:
    first = train(*DIGITS)
    model = Path(first["path"]) / "model.safetensors"
    before, written = metadata(first["run"]), model.stat().st_mtime_ns
    again = here("train", *DIGITS, "--json")
    assert "is already trained" in again.err
    assert "epoch" not in again.err
    second = again.json
    same = ("run", "path", "n", "correct", "loss", "model_sha256", "data_fingerprint")
    assert {k: second[k] for k in same} == {k: first[k] for k in same}
    assert second["looks"] == 2
    assert (metadata(first["run"]), model.stat().st_mtime_ns) == (before, written)
    assert [p.name for p in Path("models").iterdir()] == [first["run"]]


def test_changed_recipe_starts_a_new_run() -> None:
    one, two = train(*DIGITS), train(*DIGITS, "train.seed=1")
    assert one["run"] != two["run"]
    assert one["run"].startswith("digits-")
    assert two["run"].startswith("digits-")


def test_fresh_trains_again_in_a_new_folder() -> None:
    first = train(*DIGITS)
    fresh = train(*DIGITS, "--fresh")
    assert fresh["run"] == f"{first['run']}-2"
    old, new = weights(Path(first["path"])), weights(Path(fresh["path"]))
    assert all(bool((old[name] == new[name]).all()) for name in old)
    # From now on the command finds the newer one.
    assert train(*DIGITS)["run"] == fresh["run"]


def test_name_option_sets_the_name_of_the_run() -> None:
    assert train(*DIGITS, "--name", "My run/1")["run"] == "My-run-1"
    assert train(*DIGITS, "--name", "My run/1")["looks"] == 2
    # Another recipe under that name never overwrites it.
    other = train(*DIGITS, "train.seed=1", "--name", "My run/1")["run"]
    assert other != "My-run-1"
    assert other.startswith("My-run-1-")


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_no_test_option_leaves_the_test_split_unused() -> None:
    done = here("train", *DIGITS, "--no-test", "--name", "sealed")
    assert done.code == 0
    assert "test accuracy" not in done.out + done.err
    assert not Path("models/sealed/results.json").exists()
    assert not list(Path("plots/sealed").glob("*test*"))
    assert train(*DIGITS, "--name", "sealed")["looks"] == 1


def test_deterministic_option_is_stored_in_the_recipe() -> None:
    result = train(*DIGITS, "--deterministic", "--name", "steady")
    assert recipe.load_recipe(Path(result["path"]) / "recipe.yaml").train.deterministic
    train(*DIGITS, "--name", "other")  # the setting is restored after the command


def test_printed_recipe_can_be_trained() -> None:
    Path("mine.yaml").write_text(here("recipes", "digits").out)
    short = ["train.epochs=1", "data.per_class=8", "model.widths=[4]"]
    mine, built_in = train("mine.yaml", *short), train("digits", *short)
    assert mine["run"].startswith("mine-")
    one, two = weights(Path(mine["path"])), weights(Path(built_in["path"]))
    assert all(bool((one[name] == two[name]).all()) for name in one)


def test_recipe_of_a_run_finds_the_run_and_trains_to_the_same_bits() -> None:
    first = train(*DIGITS)
    written = Path(first["path"]) / "recipe.yaml"
    assert "auto" not in {
        recipe.load_recipe(written).train.epochs,
        recipe.load_recipe(written).data.image_size,
    }
    again = train(written)
    assert (again["run"], again["looks"]) == (first["run"], 2)
    fresh = train(written, "--fresh")
    assert fresh["run"] not in {first["run"]}
    one, two = weights(Path(first["path"])), weights(Path(fresh["path"]))
    assert all(bool((one[name] == two[name]).all()) for name in one)


def test_recipe_file_may_have_a_base() -> None:
    Path("quick.yaml").write_text("base: digits\ntrain: {epochs: 1}\nmodel: {widths: [4]}\n")
    result = train("quick.yaml", "data.per_class=4")
    assert recipe.load_recipe(Path(result["path"]) / "recipe.yaml").model.options["widths"] == [4]


def test_data_option_replaces_the_data_of_a_recipe() -> None:
    result = train(
        "mnist-reg",
        "--data",
        "digits",
        "train.epochs=1",
        "model.widths=[4]",
        "data.val_fraction=0.2",
        "data.per_class=5",
        "model.hidden=0",
    )
    assert result["run"].startswith("mnist-reg-digits-")
    assert result["data"] == "digits"


def load_run(done: Done) -> Run:
    """Return the run that a `train` command has made."""
    assert done.code == 0, done.err
    return Run.load(done.json["run"])


def test_class_folders_are_trained_tested_and_predicted() -> None:
    root = pictures(Path("photos"), {"red": 30, "green": 30, "blue": 30}, size=16)
    arguments = [
        "train",
        root,
        "model.widths=[8]",
        "train.epochs=12",
        "augment=[]",
        "train.batch_size=8",
    ]
    run = load_run(here(*arguments, "--json"))
    assert run.name.startswith("photos-")
    assert run.classes == ("blue", "green", "red")
    assert (run.recipe.data.image_size, run.recipe.data.channels) == (16, 3)
    assert run.results[-1]["accuracy"] == 1.0
    how = metadata(run.name)["data"]["splits"]
    assert "held out" in how["test"]
    rows = list(csv.DictReader((run.path / "split.csv").open()))
    assert {row["split"] for row in rows} == {"val", "test"}
    for name, color in COLORS.items():
        image = picture(Path(f"new-{name}.bmp"), color, size=16, seed=7)
        prediction = here("predict", run.name, image, "--json").json["predictions"][0]
        assert prediction["label"] == name


def test_split_folders_are_recognized_by_their_usual_names() -> None:
    root = Path("photos")
    pictures(root / "Training", {"red": 6, "green": 6})
    pictures(root / "valid", {"red": 3, "green": 2}, first=100)
    pictures(root / "test", {"red": 1, "green": 4}, first=200)
    run = load_run(here("train", root, *NET, "--json"))
    counts = {name: score["n"] for name, score in run.results[-1]["per_class"].items()}
    assert counts == {"green": 4, "red": 1}
    assert run.evaluate("val").n == 5
    assert run.evaluate("train").n == 12
    assert (run.path / "split.csv").read_text() == "id,split\n"


def test_csv_with_columns_for_split_and_group() -> None:
    pictures(Path("all"), {"red": 12, "green": 12})
    with Path("list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "owner"])
        for path in sorted(Path("all").rglob("*.png")):
            n = int(path.stem)
            split = "test" if n >= 10 else "train"
            writer.writerow([path, path.parent.name, split, f"{split}{n // 2}"])
    run = load_run(here("train", "list.csv", "data.group=owner", *NET, "--json"))
    assert run.name.startswith("list-")
    assert run.results[-1]["n"] == 4
    held_out = [row["id"] for row in csv.DictReader((run.path / "split.csv").open())]
    assert held_out
    for pattern in ("all/red/{:03}.png", "all/green/{:03}.png"):
        owners = {int(Path(i).stem) // 2 for i in held_out if i.startswith(pattern[:8])}
        assert all(
            {pattern.format(2 * o), pattern.format(2 * o + 1)} <= {*held_out} for o in owners
        )


def test_audit_reports_counts_and_duplicates_of_a_folder() -> None:
    root = pictures(Path("photos"), {"red": 12, "green": 14})
    (root / "green" / "copy.png").write_bytes((root / "red" / "000.png").read_bytes())
    done = here("audit", root)
    assert done.code == 0
    assert "under two labels" in done.out
    assert "contact sheet  plots/data-photos.png" in done.out
    assert Path("plots/data-photos.png").is_file()
    result = here("audit", root, "val_fraction=0.2", "--json").json
    assert sum(result["counts"]["green"].values()) == 15
    assert result["duplicates"]["two_labels"] == 1
    assert os.path.isfile(result["contact_sheet"])


def test_augment_draws_a_batch_or_reports_an_invalid_augmentation() -> None:
    root = pictures(Path("photos"), {"red": 12, "green": 14})
    Path("mine.yaml").write_text(
        "base: folder\naugment: [TrivialAugmentWide, AlternatingFlip, MixUp, CutMix]\n"
    )
    for source, name in (("digits", "digits"), ("folder", "folder"), ("mine.yaml", "mine")):
        done = here("augment", source, root)
        assert done.code == 0, done.err
        path = f"plots/augmented-photos-{name}.png"
        assert done.out == f"augmented batch  {path}\n"
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
    done = here("augment", "digits", "digits", "per_class=5", "--json")
    assert done.json == {
        "data": "digits",
        "recipe": "digits",
        "augmented_batch": "plots/augmented-digits-digits.png",
    }
    refused(here("augment", "digts", "digits"), 2, "unknown recipe 'digts'", "digits?")
    refused(here("augment", "digits", "digist"), 2, "unknown data 'digist'", "mean digits")
    refused(here("augment", "mnist", "digits"), 2, "'mnist' augments nothing")
    Path("bad.yaml").write_text("base: folder\naugment: [{Cutout: {size: 0}}]\n")
    refused(here("augment", "bad.yaml", "digits"), 2, "size=0 should be", "Cutout takes")
    Path("big.yaml").write_text("base: folder\naugment: [{Cutout: {size: 9}}]\n")
    refused(here("augment", "big.yaml", "digits"), 2, "at most the image size 8")


def test_folders_with_two_readings_stop_until_the_recipe_chooses() -> None:
    colors = dict(zip(("car", "plane", "train"), COLORS.values(), strict=True))
    root = pictures(Path("vehicles"), dict.fromkeys(colors, 8), colors=colors)
    for command in ("train", "audit"):
        refused(
            here(command, root),
            3,
            "these folders could be splits or classes: train",
            "data.layout=classes (3 classes: car, plane, train)",
            "data.without=[train] (2 classes: car, plane)",
        )
    done = here("train", root, *NET, "data.layout=classes", "data.without=[plane]", "--json")
    assert done.code == 0, done.err
    assert "vehicles: classes named like splits: train" in done.err
    run = Run(RunDir(Path("models") / done.json["run"]))
    assert run.classes == ("car", "train")
    # The classes of the model settle how its own images and those of another set are read.
    pictures(Path("more"), {"car": 2, "train": 3}, colors=colors)
    assert here("evaluate", done.json["run"], "--data", "more", "--json").json["n"] == 5
    assert here("evaluate", done.json["run"], "--split", "train", "--json").code == 0


def test_groups_and_small_classes_of_folders_are_stated() -> None:
    root = Path("signs")
    for name, tracks in (("stop", 6), ("yield", 6), ("rare", 1)):
        for number in range(2 * tracks):
            file = root / name / f"{number // 2:03}_{number % 2}.png"
            picture(file, COLORS["red" if name == "stop" else "blue"], seed=number)
    keys = ["data.group=^(.*)_", "data.min_images=3"]
    done = here("train", root, *NET, *keys, "--json")
    assert done.code == 0, done.err
    assert "1 of 3 classes have fewer than 3 training images and are left out: rare (2)" in done.err
    splits: dict[str, set[str]] = {}
    for row in csv.DictReader((Path("models") / done.json["run"] / "split.csv").open()):
        splits.setdefault(row["split"], set()).add(row["id"].rpartition("_")[0])
    assert set(splits) == {"val", "test"}
    assert not splits["val"] & splits["test"]  # a track is never divided
    assert all(
        "stop" in image or "yield" in image for images in splits.values() for image in images
    )

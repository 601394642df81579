"""Changed images, recipes, versions and hardware are reported when a run is resumed."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import pytest

from convlens.data import dataset
from convlens.run import RunDir
from convlens.utils.files import sha256
from helpers.commands import DIGITS, NET, here, picture, pictures, refused
from helpers.shards import shards

PHOTOS = ("photos", *NET, "--no-test", "--name", "mine")


def unfinished_run(*arguments: str, name: str = "mine") -> RunDir:
    """Return an unfinished run, as a stop in its first minute leaves it."""
    done = here("train", *arguments)
    assert done.code == 0, done.err
    run_dir = RunDir(Path("models") / name)
    run_dir.update_metadata({"status": "training"})
    return run_dir


@pytest.fixture
def mine() -> RunDir:
    """Return an unfinished run on a folder of images."""
    pictures(Path("photos"), {"red": 9, "green": 9})
    return unfinished_run(*PHOTOS)


def file_hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256(p) for p in folder.iterdir() if p.is_file() and p.name[0] != "."}


# Images


def test_all_images_are_recorded_with_their_split_and_digest(mine: RunDir) -> None:
    with gzip.open(mine.path / dataset.IMAGES_FILE, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [
        f"{name}/{i:03}.png" for name in ("green", "red") for i in range(9)
    ]
    for row in rows:
        assert row["class"] == row["id"].partition("/")[0]
        digest = hashlib.sha256(Path("photos", row["id"]).read_bytes()).hexdigest()
        assert row["sha256"] == digest[:16]
    with (mine.path / "split.csv").open(newline="") as file:
        held_out = {row["id"]: row["split"] for row in csv.DictReader(file)}
    assert {row["id"]: row["split"] for row in rows if row["split"] != "train"} == held_out
    assert set(held_out.values()) == {"val", "test"}


def test_added_removed_and_changed_images_are_listed(mine: RunDir) -> None:
    picture(Path("photos/red/new.png"), (9, 9, 9))
    Path("photos/green/004.png").unlink()
    Path("photos/green/007.png").unlink()
    picture(Path("photos/red/002.png"), (1, 2, 3), seed=9)
    before = file_hashes(mine.path)
    messages = (
        "1 added: red/new.png",
        "2 removed: green/004.png, green/007.png",
        "1 with other content: red/002.png",
    )
    refused(
        here("train", *PHOTOS), 3, "not those that run 'mine' started with", *messages, "--fresh"
    )
    refused(here("evaluate", "mine", "--split", "val"), 3, "changed since", *messages)
    assert file_hashes(mine.path) == before
    done = here("train", *PHOTOS, "--fresh", "--json")
    assert done.code == 0, done.err
    assert done.json["run"] != "mine"


def test_a_run_resumes_once_its_images_are_restored(mine: RunDir) -> None:
    shutil.move("photos/red/000.png", "kept.png")
    refused(here("train", *PHOTOS), 3, "1 removed: red/000.png")
    shutil.move("kept.png", "photos/red/000.png")
    assert here("train", *PHOTOS).code == 0
    assert mine.is_finished


def test_many_changes_are_counted_and_a_few_listed(mine: RunDir) -> None:
    for number in range(9):
        picture(Path(f"photos/red/{number:03}.png"), (1, 2, 3), seed=50 + number)
    refused(
        here("train", *PHOTOS),
        3,
        "9 with other content: red/000.png, red/001.png, red/002.png ...",
    )


def test_an_image_moved_to_another_class_is_listed() -> None:
    pictures(Path("photos"), {"red": 9, "green": 9})
    lines = [f"photos/{c}/{i:03}.png,{c}" for c in ("red", "green") for i in range(9)]
    Path("mine.csv").write_text("\n".join(["path,label", *lines]))
    arguments = ("mine.csv", *NET, "--no-test", "--name", "mine")
    unfinished_run(*arguments)
    lines[3] = lines[3].replace(",red", ",green")
    Path("mine.csv").write_text("\n".join(["path,label", *lines]))
    refused(here("train", *arguments), 3, "1 in another class: photos/red/003.png")


def test_changed_images_in_shards_are_listed() -> None:
    root = shards(Path("sharded"), {"train": 40})
    arguments = ("sharded", *NET, "data.image_size=8", "--no-test", "--name", "mine")
    unfinished_run(*arguments)
    path = root / "train-2.tar"
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for member, content in members:
            if member.name != "0025.cls":
                tar.addfile(member, io.BytesIO(content))
            else:
                member.size = 1
                tar.addfile(member, io.BytesIO(b"0"))
    refused(here("train", *arguments), 3, "1 in another class: train-2.tar/0025")


@pytest.mark.parametrize("damage", ["gone", "cut", "text"])
def test_changed_images_are_refused_even_without_the_image_list(mine: RunDir, damage: str) -> None:
    path = mine.path / dataset.IMAGES_FILE
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-30] if damage == "cut" else b"red/000.png,red")
    Path("photos/red/000.png").unlink()
    done = here("train", *PHOTOS)
    refused(done, 3, "not those that run 'mine' started with\n")


def test_built_in_data_sets_have_no_image_list() -> None:
    run_dir = unfinished_run(*DIGITS, "--no-test", "--name", "mine")
    assert not (run_dir.path / dataset.IMAGES_FILE).exists()
    run_dir.update_metadata({"data": {**run_dir.metadata()["data"], "fingerprint": "another"}})
    refused(here("train", *DIGITS, "--no-test", "--name", "mine"), 3, "not those that run 'mine'")


def test_metadata_without_a_data_fingerprint_is_a_clear_error() -> None:
    run_dir = unfinished_run(*DIGITS, "--no-test", "--name", "mine")
    for wrong in ({}, [], "x", None):
        run_dir.update_metadata({"data": wrong})
        refused(
            here("train", *DIGITS, "--no-test", "--name", "mine"),
            4,
            "which images this run started with",
        )


# The recipe


def test_a_different_recipe_starts_a_different_run() -> None:
    first = here("train", *DIGITS, "--no-test", "--json")
    assert first.code == 0, first.err
    again = here("train", *DIGITS, "--no-test", "--json")
    assert "is already trained" in again.err
    other = here("train", *DIGITS, "optim.lr=0.02", "--no-test", "--json")
    assert other.code == 0, other.err
    assert other.json["run"] != first.json["run"]
    assert RunDir(Path("models") / first.json["run"]).is_finished


def test_a_run_name_of_another_recipe_is_not_reused() -> None:
    assert here("train", *DIGITS, "--no-test", "--name", "mine").code == 0
    before = file_hashes(Path("models/mine"))
    done = here("train", *DIGITS, "train.seed=5", "--no-test", "--name", "mine", "--json")
    assert done.code == 0, done.err
    assert done.json["run"].startswith("mine-")
    assert file_hashes(Path("models/mine")) == before


# Versions and hardware


def test_other_versions_and_hardware_are_reported_and_recorded() -> None:
    arguments = (*DIGITS, "--no-test", "--name", "mine")
    run_dir = unfinished_run(*arguments)
    hardware = {**run_dir.metadata()["hardware"], "torch": "2.0.0", "threads": 96}
    run_dir.update_metadata({"hardware": hardware, "world_size": 2, "convlens": "0.0.1"})
    done = here("train", *arguments)
    assert done.code == 0, done.err
    for text in (
        "torch 2.0.0, now ",
        "threads 96, now ",
        "processes 2, now 1",
        "convlens 0.0.1, now ",
        "results will not be bit-identical to an uninterrupted run",
    ):
        assert text in done.err
    metadata = run_dir.metadata()
    assert metadata["status"] == "finished"
    assert metadata["world_size"] == 1
    assert metadata["changed"][0]["torch"][0] == "2.0.0"
    run_dir.update_metadata({"status": "training"})
    assert "different setup" not in here("train", *arguments).err


# Classes


def test_class_folders_without_images_are_listed_whatever_else_they_contain() -> None:
    root = pictures(Path("photos"), {"red": 3, "green": 3})
    for name, junk in {"a": ".hidden.png", "b": "Thumbs.db", "c": "notes.txt"}.items():
        (root / name).mkdir()
        (root / name / junk).write_bytes(b"x")
    pictures(root / "d", {".ipynb_checkpoints": 1, "__MACOSX": 1})
    refused(here("train", root), 3, "class folders without images: a, b, c (1 .txt), d")


def test_numeric_class_names_keep_their_order_in_the_model() -> None:
    colors = {"10": (220, 30, 30), "2": (30, 200, 30), "1": (30, 30, 220)}
    pictures(Path("photos"), dict.fromkeys(colors, 12), colors=colors)
    done = here(
        "train",
        "photos",
        "model.widths=[8]",
        "train.epochs=20",
        "train.batch_size=8",
        "optim.lr=0.05",
        "augment=[]",
        "optim.ema=null",
        "--json",
    )
    assert done.code == 0, done.err
    shutil.copy(Path(done.json["path"]) / "model.safetensors", "alone.safetensors")
    shutil.rmtree("models")
    for name, color in colors.items():
        picture(Path("new") / f"{name}.png", color, seed=77)
    result = here("predict", "alone.safetensors", "new", "--json").json
    labels = {Path(each["filename"]).stem: each["label"] for each in result["predictions"]}
    assert labels == {"1": "1", "2": "2", "10": "10"}


def test_a_data_set_without_one_of_the_classes_can_be_evaluated() -> None:
    pictures(Path("photos"), {"red": 9, "green": 9, "blue": 9})
    name = here("train", "photos", *NET, "--json").json["run"]
    pictures(Path("fewer"), {"red": 4, "blue": 3}, first=60)
    result = here("evaluate", name, "--data", "fewer", "--json").json
    assert result["n"] == 7
    assert {name: values["n"] for name, values in result["per_class"].items()} == {
        "blue": 3,
        "green": 0,
        "red": 4,
    }
    pictures(Path("more"), {"red": 4, "pink": 3}, first=60)
    refused(here("evaluate", name, "--data", "more"), 3, "doesn't know 1 of the classes: pink")


def test_truncated_images_stay_refused_in_pillow() -> None:
    from PIL import ImageFile

    import convlens.data.decode

    assert convlens.data.decode.FORMATS
    assert not ImageFile.LOAD_TRUNCATED_IMAGES

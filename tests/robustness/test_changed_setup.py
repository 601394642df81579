"""What changed since a run began: its images, its recipe, what it runs on. Said, not guessed."""

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


def begun(*asked: str, name: str = "mine") -> RunDir:
    """A run that isn't finished, as a stop in its first minute leaves it."""
    done = here("train", *asked)
    assert done.code == 0, done.err
    place = RunDir(Path("models") / name)
    place.update_metadata({"status": "training"})
    return place


@pytest.fixture
def mine() -> RunDir:
    pictures(Path("photos"), {"red": 9, "green": 9})
    return begun(*PHOTOS)


def everything(folder: Path) -> dict[str, str]:
    return {p.name: sha256(p) for p in folder.iterdir() if p.is_file() and p.name[0] != "."}


# Images (F12)


def test_all_images_are_listed_with_their_split_and_digest(mine: RunDir) -> None:
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


def test_images_added_removed_and_changed_are_named(mine: RunDir) -> None:
    picture(Path("photos/red/new.png"), (9, 9, 9))
    Path("photos/green/004.png").unlink()
    Path("photos/green/007.png").unlink()
    picture(Path("photos/red/002.png"), (1, 2, 3), seed=9)
    before = everything(mine.path)
    said = (
        "1 added: red/new.png",
        "2 removed: green/004.png, green/007.png",
        "1 with other content: red/002.png",
    )
    refused(here("train", *PHOTOS), 3, "not those that run 'mine' started with", *said, "--fresh")
    refused(here("evaluate", "mine", "--split", "val"), 3, "changed since", *said)
    assert everything(mine.path) == before
    done = here("train", *PHOTOS, "--fresh", "--json")
    assert done.code == 0, done.err
    assert done.json["run"] != "mine"


def test_as_they_were_again_the_run_goes_on(mine: RunDir) -> None:
    shutil.move("photos/red/000.png", "kept.png")
    refused(here("train", *PHOTOS), 3, "1 removed: red/000.png")
    shutil.move("kept.png", "photos/red/000.png")
    assert here("train", *PHOTOS).code == 0
    assert mine.is_finished


def test_many_changes_are_counted(mine: RunDir) -> None:
    for number in range(9):
        picture(Path(f"photos/red/{number:03}.png"), (1, 2, 3), seed=50 + number)
    refused(
        here("train", *PHOTOS),
        3,
        "9 with other content: red/000.png, red/001.png, red/002.png ...",
    )


def test_an_image_in_another_class_is_named() -> None:
    pictures(Path("photos"), {"red": 9, "green": 9})
    lines = [f"photos/{c}/{i:03}.png,{c}" for c in ("red", "green") for i in range(9)]
    Path("mine.csv").write_text("\n".join(["path,label", *lines]))
    asked = ("mine.csv", *NET, "--no-test", "--name", "mine")
    begun(*asked)
    lines[3] = lines[3].replace(",red", ",green")
    Path("mine.csv").write_text("\n".join(["path,label", *lines]))
    refused(here("train", *asked), 3, "1 in another class: photos/red/003.png")


def test_images_in_shards_are_named_too() -> None:
    root = shards(Path("sharded"), {"train": 40})
    asked = ("sharded", *NET, "data.image_size=8", "--no-test", "--name", "mine")
    begun(*asked)
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
    refused(here("train", *asked), 3, "1 in another class: train-2.tar/0025")


@pytest.mark.parametrize("damage", ["gone", "cut", "text"])
def test_without_its_list_a_changed_set_is_refused_all_the_same(mine: RunDir, damage: str) -> None:
    path = mine.path / dataset.IMAGES_FILE
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-30] if damage == "cut" else b"red/000.png,red")
    Path("photos/red/000.png").unlink()
    done = here("train", *PHOTOS)
    refused(done, 3, "not those that run 'mine' started with\n")


def test_built_in_sets_have_no_list() -> None:
    place = begun(*DIGITS, "--no-test", "--name", "mine")
    assert not (place.path / dataset.IMAGES_FILE).exists()
    place.update_metadata({"data": {**place.metadata()["data"], "fingerprint": "another"}})
    refused(here("train", *DIGITS, "--no-test", "--name", "mine"), 3, "not those that run 'mine'")


def test_a_record_without_images_is_no_crash() -> None:
    place = begun(*DIGITS, "--no-test", "--name", "mine")
    for wrong in ({}, [], "x", None):
        place.update_metadata({"data": wrong})
        refused(here("train", *DIGITS, "--no-test", "--name", "mine"), 4, "on which images")


# The recipe (F17)


def test_another_recipe_is_another_run() -> None:
    first = here("train", *DIGITS, "--no-test", "--json")
    assert first.code == 0, first.err
    again = here("train", *DIGITS, "--no-test", "--json")
    assert "is trained already" in again.err
    other = here("train", *DIGITS, "optim.lr=0.02", "--no-test", "--json")
    assert other.code == 0, other.err
    assert other.json["run"] != first.json["run"]
    assert RunDir(Path("models") / first.json["run"]).is_finished


def test_a_name_that_another_recipe_has_is_not_taken() -> None:
    assert here("train", *DIGITS, "--no-test", "--name", "mine").code == 0
    before = everything(Path("models/mine"))
    done = here("train", *DIGITS, "train.seed=5", "--no-test", "--name", "mine", "--json")
    assert done.code == 0, done.err
    assert done.json["run"].startswith("mine-")
    assert everything(Path("models/mine")) == before


# What it runs on (F17)


def test_another_version_and_other_hardware_are_told_and_noted() -> None:
    asked = (*DIGITS, "--no-test", "--name", "mine")
    place = begun(*asked)
    hardware = {**place.metadata()["hardware"], "torch": "2.0.0", "threads": 96}
    place.update_metadata({"hardware": hardware, "world_size": 2, "convlens": "0.0.1"})
    done = here("train", *asked)
    assert done.code == 0, done.err
    for text in (
        "torch 2.0.0, now ",
        "threads 96, now ",
        "processes 2, now 1",
        "convlens 0.0.1, now ",
        "not end with the bits",
    ):
        assert text in done.err
    facts = place.metadata()
    assert facts["status"] == "finished"
    assert facts["world_size"] == 1
    assert facts["changed"][0]["torch"][0] == "2.0.0"
    place.update_metadata({"status": "training"})
    assert "on a different setup" not in here("train", *asked).err


# Classes (F3 to F6)


def test_folders_without_images_are_named_whatever_else_is_in_them() -> None:
    root = pictures(Path("photos"), {"red": 3, "green": 3})
    for name, junk in {"a": ".hidden.png", "b": "Thumbs.db", "c": "notes.txt"}.items():
        (root / name).mkdir()
        (root / name / junk).write_bytes(b"x")
    pictures(root / "d", {".ipynb_checkpoints": 1, "__MACOSX": 1})
    refused(here("train", root), 3, "class folders without images: a, b, c, d")


def test_numbers_as_classes_keep_their_order_in_the_model() -> None:
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
    answered = here("predict", "alone.safetensors", "new", "--json").json
    found = {Path(each["filename"]).stem: each["label"] for each in answered["predictions"]}
    assert found == {"1": "1", "2": "2", "10": "10"}


def test_a_set_that_lacks_a_class_counts_none_of_it() -> None:
    pictures(Path("photos"), {"red": 9, "green": 9, "blue": 9})
    name = here("train", "photos", *NET, "--json").json["run"]
    pictures(Path("fewer"), {"red": 4, "blue": 3}, first=60)
    found = here("evaluate", name, "--data", "fewer", "--json").json
    assert found["n"] == 7
    assert {c: its["n"] for c, its in found["per_class"].items()} == {
        "blue": 3,
        "green": 0,
        "red": 4,
    }
    pictures(Path("more"), {"red": 4, "pink": 3}, first=60)
    refused(here("evaluate", name, "--data", "more"), 3, "doesn't know 1 of the classes: pink")


def test_no_half_image_is_ever_taken() -> None:
    from PIL import ImageFile

    import convlens.data.decode

    assert convlens.data.decode.FORMATS
    assert not ImageFile.LOAD_TRUNCATED_IMAGES

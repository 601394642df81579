"""Audit of data sets: handmade folders with known properties and faults."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convlens.data import dataset
from convlens.data.audit import Audit, audit
from convlens.errors import DataError
from convlens.recipe import DataConfig
from helpers.commands import here
from helpers.datasets import cifar10_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty folder for a data set."""
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random image `(width, height)`; images of different seeds look different."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def plain(value: int | tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L" if isinstance(value, int) else "RGB", size, value)


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def folder(root: Path, classes: dict[str, int], start: int = 0) -> Path:
    """Write images `root/<class>/<k>.png`, all different."""
    seeds = iter(range(start, start + 10_000))
    for name, count in classes.items():
        for k in range(count):
            save(noise(next(seeds)), root / name / f"{k}.png")
    return root


def audit_of(root: Path, **settings: object) -> Audit:
    return audit(DataConfig(name=str(root), **settings))  # type: ignore[arg-type]


# Numbers, computed by hand


def test_counts_sizes_modes_and_channel_means(root: Path) -> None:
    train, test = root / "train", root / "test"
    save(plain((255, 0, 51), (10, 20)), train / "a" / "1.png")
    save(plain((255, 0, 51), (30, 20)), train / "a" / "2.png")
    save(plain((0, 0, 153), (12, 50)), train / "b" / "1.png")
    save(plain((0, 0, 153), (13, 50)), train / "b" / "2.bmp")
    save(plain((0, 0, 0), (99, 99)).convert("P"), test / "a" / "1.png")
    save(plain((9, 9, 9), (99, 99)), root / "val" / "b" / "1.png")
    report = audit_of(root)
    assert report.images == 6
    assert report.counts == {
        "a": {"train": 2, "val": 0, "test": 1},
        "b": {"train": 2, "val": 1, "test": 0},
    }
    assert report.width == (10, 21.5, 99)
    assert report.height == (20, 50.0, 99)
    assert report.sizes == 5
    assert report.modes == {"RGB": 5, "P": 1}
    assert report.channels == 3
    # Of the training images, all with the same weight: red is 1 1 0 0, blue .2 .2 .6 .6.
    np.testing.assert_allclose(report.mean, [0.5, 0.0, 0.4], atol=1e-9)
    np.testing.assert_allclose(report.std, [0.5, 0.0, 0.2], atol=1e-9)
    assert report.plain == 6
    assert report.how["test"] == "1 images of the source's own split"
    assert report.problems == []
    assert report.unreadable == []


def test_means_of_a_grey_gradient(root: Path) -> None:
    gradient = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for name in "ab":
        for k in range(6):
            save(gradient, root / name / f"{k}.png")
    report = audit_of(root)
    assert report.channels == 1
    assert report.modes == {"L": 12}
    assert report.plain == 0
    np.testing.assert_allclose(report.mean, [0.5])
    np.testing.assert_allclose(report.std, [np.arange(256).std() / 255])


def test_splits_equal_those_of_training(root: Path) -> None:
    folder(root, {"a": 20, "b": 13, "c": 9})
    (root / "a" / "5.png").write_bytes(b"")
    settings = {"on_bad": "skip", "seed": 3, "val_fraction": 0.2}
    report = audit_of(root, **settings)
    config = DataConfig(name=str(root), **settings)  # type: ignore[arg-type]
    loaded = dataset.load_data(config, memory_budget=1 << 30)
    for name in "abc":
        for split, ids in {**loaded.held_out, "train": list(loaded.train.ids)}.items():
            expected = sum(i.startswith(name) for i in ids)
            assert report.counts[name][split] == expected, (name, split)
    assert report.how == loaded.split_descriptions


# Faults


def test_unreadable_files_are_all_listed_with_reasons(root: Path) -> None:
    folder(root, {"a": 12, "b": 12})
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "a" / "text.png").write_text("this is no picture\n" * 10)
    content = save(noise(900, (300, 300)), root / "b" / "cut.jpg").read_bytes()
    (root / "b" / "cut.jpg").write_bytes(content[: len(content) // 2])
    report = audit_of(root)
    assert report.images == 24
    reasons = {Path(u.id).name: (u.label, u.reason) for u in report.unreadable}
    assert reasons["empty.png"] == ("a", "the file is empty (0 bytes)")
    assert reasons["text.png"] == ("a", "it is text, not an image")
    assert reasons["cut.jpg"][0] == "b"
    assert "cut short" in reasons["cut.jpg"][1]
    assert sum(report.counts["a"].values()) == 12


def test_set_without_any_readable_file_is_described(root: Path) -> None:
    for name in "ab":
        (root / name).mkdir()
        (root / name / "x.png").write_bytes(b"")
    report = audit_of(root)
    assert report.images == 0
    assert len(report.unreadable) == 2
    assert report.problems == ["no readable training image in: a, b"]
    json.dumps(report.to_dict())
    assert len(report.sheet()[1]) == 0


def test_set_that_training_refuses_is_described(root: Path) -> None:
    report = audit_of(folder(root, {"a": 1, "b": 1}))
    assert report.images == 2
    assert report.counts == {"a": {"train": 1}, "b": {"train": 1}}
    assert report.problems == ["every class has a single image, but 15% must be held out"]


def test_a_class_of_a_single_image_is_noted(root: Path) -> None:
    report = audit_of(folder(root, {"a": 5, "b": 1}))
    assert report.problems == []
    assert report.notes[0] == "1 class has a single image, which stays in training: b"
    assert report.counts["b"] == {"train": 1, "val": 0, "test": 0}
    assert report.summary == (
        "2 classes: a 5, b 1 · train 4 · val 1 · test 1 (held out, stratified) · 3 channels · "
        "28 px, crop keeps 75% of the area"
    )


def test_copies_are_dropped_or_grouped_as_in_training(root: Path) -> None:
    folder(root, {"a": 20, "b": 13})
    (root / "a" / "copy.png").write_bytes((root / "a" / "3.png").read_bytes())
    for duplicates, images in (("drop", 33), ("group", 34)):
        report = audit_of(root, duplicates=duplicates)
        config = DataConfig(name=str(root), duplicates=duplicates)  # type: ignore[arg-type]
        loaded = dataset.load_data(config, memory_budget=1 << 30)
        assert report.images == images
        assert report.summary == str(loaded.summary)
        assert report.how == loaded.split_descriptions
        assert report.duplicates.across_splits == 0
        assert "data.duplicates=" in report.notes[0]


def test_folder_without_classes_is_an_error(root: Path) -> None:
    (root / "empty").mkdir()
    with pytest.raises(DataError):
        audit_of(root / "empty")


# Copies


def test_copies_under_two_labels_or_across_splits_are_counted(root: Path) -> None:
    train = folder(root / "train", {"a": 12, "b": 12})
    folder(root / "test", {"a": 3, "b": 3}, start=500)
    save(noise(0), train / "b" / "same.bmp")  # pixels of a/0.png, in another format
    save(noise(1), root / "test" / "a" / "leak.png")  # a/1.png
    save(noise(2), train / "a" / "harmless.png")  # a/2.png
    report = audit_of(root).duplicates
    assert (report.groups, report.across_splits, report.two_labels) == (3, 1, 1)
    leak, mislabelled, harmless = report.listed  # the worst first
    assert leak.across_splits
    assert set(leak.splits) == {"train", "test"}
    assert {Path(i).name for i in leak.ids} == {"1.png", "leak.png"}
    assert mislabelled.two_labels
    assert mislabelled.labels == ("a", "b")
    assert {Path(i).name for i in mislabelled.ids} == {"0.png", "same.bmp"}
    assert not harmless.across_splits
    assert not harmless.two_labels


def test_copies_count_in_the_splits_that_training_would_make(root: Path) -> None:
    folder(root, {"a": 10, "b": 10})
    for k in range(30):
        save(noise(0), root / "a" / f"copy{k}.png")
    report = audit_of(root).duplicates
    assert report.groups == report.across_splits == 1
    assert len(report.listed[0].ids) == 31


def test_same_bytes_in_another_shape_are_not_a_copy(root: Path) -> None:
    for name, size in (("a", (4, 6)), ("b", (6, 4))):
        for k in range(6):
            save(plain(10 * k, size), root / name / f"{k}.png")
    assert audit_of(root).duplicates.groups == 0


def test_scaled_and_recompressed_copies_are_near_duplicates(root: Path) -> None:
    folder(root, {"a": 30, "b": 30})
    original = noise(7, (200, 150))
    save(original, root / "a" / "original.png")
    original.resize((120, 90)).save(root / "b" / "copy.jpg", quality=60)
    brighter = original.point(lambda v: min(255, v * 0.8 + 30))
    save(brighter, root / "b" / "brighter.png")
    report = audit_of(root)
    assert report.duplicates.groups == 0
    names = {frozenset(Path(i).name for i in r.ids) for r in report.near_duplicates.listed}
    wanted = {frozenset({"original.png", "copy.jpg"}), frozenset({"original.png", "brighter.png"})}
    assert wanted <= names
    # noise(7) is also a/7.png, at another size; no other images look similar.
    of_seed_7 = {"original.png", "copy.jpg", "brighter.png", "7.png"}
    assert all(pair <= of_seed_7 for pair in names)
    assert report.near_duplicates.two_labels >= 2


def test_plain_images_are_not_near_duplicates(root: Path) -> None:
    for name in "ab":
        for k in range(8):
            save(plain(20 + 16 * k + (name == "b"), (16, 16)), root / name / f"{k}.png")
    report = audit_of(root)
    assert report.plain == 16
    assert report.near_duplicates.groups == 0


# Notes, JSON, pictures


def test_notes_on_class_order_and_balance(root: Path) -> None:
    folder(root, {"1": 20, "2": 20, "10": 300})
    notes = "\n".join(audit_of(root).notes)
    assert "'10' comes before '2'" in notes
    assert "uneven classes: 10 has" in notes
    assert "case" not in notes
    assert "fewer" not in notes


def test_notes_on_case_small_classes_and_grey_images(root: Path) -> None:
    folder(root, {"Cat": 12, "cat": 12, "dog": 5})
    if len(list(root.iterdir())) < 3:
        pytest.skip("this file system ignores case")
    save(noise(77).convert("L"), root / "dog" / "grey.png")
    notes = "\n".join(audit_of(root).notes)
    assert "differ only in case: Cat, cat" in notes
    assert "fewer than 10 training images:" in notes
    assert "dog (4)" in notes
    assert "1 of 30 images are grey" in notes
    assert "string order" not in notes


def test_notes_mention_known_near_duplicates_of_cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLENS_DATA", str(root))
    (root / "cifar-10-batches-bin").mkdir()
    for name, content in cifar10_files().items():
        (root / "cifar-10-batches-bin" / name).write_bytes(content)
    (note,) = [note for note in audit(DataConfig(name="cifar10")).notes if "near-dup" in note]
    assert note.startswith("3.3% of the test images have near-duplicates in the training part")


def test_notes_count_images_that_decoding_changes(root: Path) -> None:
    folder(root, {"a": 12, "b": 12})
    exif = Image.Exif()
    for n, turn in enumerate((1, 3, 6, 8)):  # 1 is upright
        exif[0x0112] = turn
        for kind in ("jpg", "tif", "png"):
            noise(100 + n).save(root / "a" / f"turned{n}.{kind}", exif=exif)
    clear = noise(200).convert("RGBA")
    save(clear, root / "a" / "clear.png")
    save(clear.convert("LA"), root / "b" / "clear.png")
    noise(201).convert("P").save(root / "b" / "palette.png", transparency=0)
    more = [noise(seed) for seed in (301, 302)]
    for kind in ("gif", "webp", "tif"):
        noise(300).save(root / "b" / f"several.{kind}", save_all=True, append_images=more)
    noise(303).save(root / "b" / "phone.jpg", "MPO", save_all=True, append_images=more)
    report = audit_of(root)
    assert (report.turned, report.alpha, report.frames) == (9, 3, 4)
    notes = "\n".join(report.notes)
    assert "9 of 43 images are turned upright, as their EXIF says" in notes
    assert "3 of 43 images have transparency, which becomes white" in notes
    assert "4 of 43 images have more than one frame: only the first is used" in notes
    done = here("audit", root)
    assert "only the first is used" in " ".join(done.out.split())
    assert here("audit", root, "--json").json["frames"] == 4


def test_clean_set_has_no_notes(root: Path) -> None:
    report = audit_of(folder(root, {"img01": 20, "img02": 20, "img10": 20}))
    assert report.notes == []
    assert report.problems == []


def test_json_has_all_public_fields(root: Path) -> None:
    folder(root, {"a": 12, "b": 12})
    save(noise(0), root / "b" / "same.png")
    (root / "a" / "bad.png").write_bytes(b"")
    report = json.loads(json.dumps(audit_of(root).to_dict()))
    assert report["images"] == 25
    assert report["width"] == [40, 40.0, 40]
    assert report["duplicates"]["listed"][0]["labels"] == ["a", "b"]
    assert report["unreadable"][0]["reason"] == "the file is empty (0 bytes)"
    assert not [key for key in report if key.startswith("_")]


def test_contact_sheet_shows_readable_training_images_of_every_class(root: Path) -> None:
    for k in range(12):
        save(plain((200, 0, 0), (64, 64)), root / "train" / "red" / f"{k}.png")
        save(plain((0, 0, 200), (32, 64)), root / "train" / "sky" / f"{k}.png")
        save(plain((0, 90, 0), (64, 64)), root / "test" / "red" / f"{k}.png")
    (root / "train" / "red" / "00.png").write_bytes(b"")
    images, titles = audit_of(root).sheet(side=48)
    assert images.shape == (16, 3, 48, 48)
    assert titles == ["red"] * 8 + ["sky"] * 8
    assert (images[:8, 0] == 200).all()
    assert (images[:, 1] == 0).all()
    assert (images[8:, 2, :, 24] == 200).all()
    assert (images[8:, :, :, 0] == 0).all()


def test_contact_sheet_of_many_classes_has_one_image_of_each(root: Path) -> None:
    images, titles = audit_of(folder(root, {f"c{k:03}": 4 for k in range(60)})).sheet(side=32)
    assert images.shape[0] == 60
    assert len(set(titles)) == 60


def test_audit_of_a_built_in_set() -> None:
    report = audit(DataConfig(name="digits"))
    assert report.images == 1797
    assert report.channels == 1
    assert report.modes == {"L": 1797}
    assert report.width == (8, 8.0, 8)
    assert report.sizes == 1
    assert sum(sum(of.values()) for of in report.counts.values()) == 1797
    images, titles = report.sheet()
    assert images.shape == (80, 1, 8, 8)
    assert titles[::8] == list("0123456789")


def test_audit_of_a_csv_with_groups(root: Path) -> None:
    lines = ["path,label,patient"]
    for k in range(40):
        save(noise(k), root / f"{k}.png")
        lines.append(f"{k}.png,{'ab'[k % 2]},p{k // 4}")
    (root / "list.csv").write_text("\n".join(lines))
    report = audit_of(root / "list.csv", group="patient")
    assert report.images == 40
    assert report.problems == []
    assert all("group" in report.how[split] for split in ("val", "test"))

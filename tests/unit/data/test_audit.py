"""The audit of a data set: hand-made folders with known faults, and the search for look-alikes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convlens.data import dataset, duplicates
from convlens.data.audit import Audit, audit
from convlens.errors import DataError
from convlens.recipe import DataConfig
from helpers.commands import here
from helpers.datasets import cifar10_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a set, with nothing else in it."""
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random picture `(width, height)`: no two seeds look alike."""
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
    """`root/<class>/<k>.png`, all different."""
    seeds = iter(range(start, start + 10_000))
    for name, count in classes.items():
        for k in range(count):
            save(noise(next(seeds)), root / name / f"{k}.png")
    return root


def look(root: Path, **settings: object) -> Audit:
    return audit(DataConfig(name=str(root), **settings))  # type: ignore[arg-type]


# Numbers, computed by hand


def test_counts_sizes_modes_and_means(root: Path) -> None:
    train, test = root / "train", root / "test"
    save(plain((255, 0, 51), (10, 20)), train / "a" / "1.png")
    save(plain((255, 0, 51), (30, 20)), train / "a" / "2.png")
    save(plain((0, 0, 153), (12, 50)), train / "b" / "1.png")
    save(plain((0, 0, 153), (13, 50)), train / "b" / "2.bmp")
    save(plain((0, 0, 0), (99, 99)).convert("P"), test / "a" / "1.png")
    save(plain((9, 9, 9), (99, 99)), root / "val" / "b" / "1.png")
    found = look(root)
    assert found.images == 6
    assert found.counts == {
        "a": {"train": 2, "val": 0, "test": 1},
        "b": {"train": 2, "val": 1, "test": 0},
    }
    assert found.width == (10, 21.5, 99)
    assert found.height == (20, 50.0, 99)
    assert found.sizes == 5
    assert found.modes == {"RGB": 5, "P": 1}
    assert found.channels == 3
    # Of train alone, every image counting the same: red is 1 1 0 0, blue .2 .2 .6 .6.
    np.testing.assert_allclose(found.mean, [0.5, 0.0, 0.4], atol=1e-9)
    np.testing.assert_allclose(found.std, [0.5, 0.0, 0.2], atol=1e-9)
    assert found.plain == 6
    assert found.how["test"] == "2 images of the source's own split".replace("2", "1")
    assert found.problems == []
    assert found.unreadable == []


def test_means_of_a_grey_gradient(root: Path) -> None:
    gradient = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for name in "ab":
        for k in range(6):
            save(gradient, root / name / f"{k}.png")
    found = look(root)
    assert found.channels == 1
    assert found.modes == {"L": 12}
    assert found.plain == 0
    np.testing.assert_allclose(found.mean, [0.5])
    np.testing.assert_allclose(found.std, [np.arange(256).std() / 255])


def test_the_splits_are_those_of_training(root: Path) -> None:
    folder(root, {"a": 20, "b": 13, "c": 9})
    (root / "a" / "5.png").write_bytes(b"")
    settings = {"on_bad": "skip", "seed": 3, "val_fraction": 0.2}
    found = look(root, **settings)
    config = DataConfig(name=str(root), **settings)  # type: ignore[arg-type]
    loaded = dataset.load_data(config, memory_budget=1 << 30)
    for name in "abc":
        for split, ids in {**loaded.held_out, "train": list(loaded.train.ids)}.items():
            expected = sum(i.startswith(name) for i in ids)
            assert found.counts[name][split] == expected, (name, split)
    assert found.how == loaded.how


# Faults


def test_unreadable_files_are_all_listed_with_reasons(root: Path) -> None:
    folder(root, {"a": 12, "b": 12})
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "a" / "text.png").write_text("this is no picture\n" * 10)
    whole = save(noise(900, (300, 300)), root / "b" / "cut.jpg").read_bytes()
    (root / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    found = look(root)
    assert found.images == 24
    reasons = {Path(u.id).name: (u.label, u.reason) for u in found.unreadable}
    assert reasons["empty.png"] == ("a", "the file is empty (0 bytes)")
    assert reasons["text.png"] == ("a", "it is text, not an image")
    assert reasons["cut.jpg"][0] == "b"
    assert "cut short" in reasons["cut.jpg"][1]
    assert sum(found.counts["a"].values()) == 12


def test_every_file_unreadable(root: Path) -> None:
    for name in "ab":
        (root / name).mkdir()
        (root / name / "x.png").write_bytes(b"")
    found = look(root)
    assert found.images == 0
    assert len(found.unreadable) == 2
    assert found.problems == ["no readable training image in: a, b"]
    json.dumps(found.to_dict())
    assert len(found.sheet()[1]) == 0


def test_a_set_that_training_refuses_is_still_described(root: Path) -> None:
    found = look(folder(root, {"a": 5, "b": 1}))
    assert found.images == 6
    assert found.counts == {"a": {"train": 5}, "b": {"train": 1}}
    assert len(found.problems) == 1
    assert "b (1)" in found.problems[0]


def test_a_source_that_cannot_be_made_out_is_an_error(root: Path) -> None:
    (root / "empty").mkdir()
    with pytest.raises(DataError):
        look(root / "empty")


# Copies


def test_copies_under_two_labels_and_across_splits(root: Path) -> None:
    train = folder(root / "train", {"a": 12, "b": 12})
    folder(root / "test", {"a": 3, "b": 3}, start=500)
    save(noise(0), train / "b" / "same.bmp")  # pixels of a/0.png, in another format
    save(noise(1), root / "test" / "a" / "leak.png")  # a/1.png
    save(noise(2), train / "a" / "harmless.png")  # a/2.png
    found = look(root).duplicates
    assert (found.groups, found.across_splits, found.two_labels) == (3, 1, 1)
    leak, mislabelled, harmless = found.listed  # the worst first
    assert leak.across_splits
    assert set(leak.splits) == {"train", "test"}
    assert {Path(i).name for i in leak.ids} == {"1.png", "leak.png"}
    assert mislabelled.two_labels
    assert mislabelled.labels == ("a", "b")
    assert {Path(i).name for i in mislabelled.ids} == {"0.png", "same.bmp"}
    assert not harmless.across_splits
    assert not harmless.two_labels


def test_copies_in_a_set_without_splits_count_where_they_would_land(root: Path) -> None:
    folder(root, {"a": 10, "b": 10})
    for k in range(30):
        save(noise(0), root / "a" / f"copy{k}.png")
    found = look(root).duplicates
    assert found.groups == found.across_splits == 1
    assert len(found.listed[0].ids) == 31


def test_same_pixels_in_another_shape_are_no_copy(root: Path) -> None:
    for name, size in (("a", (4, 6)), ("b", (6, 4))):
        for k in range(6):
            save(plain(10 * k, size), root / name / f"{k}.png")
    assert look(root).duplicates.groups == 0


def test_a_scaled_and_recompressed_copy_looks_the_same(root: Path) -> None:
    folder(root, {"a": 30, "b": 30})
    original = noise(7, (200, 150))
    save(original, root / "a" / "original.png")
    original.resize((120, 90)).save(root / "b" / "copy.jpg", quality=60)
    brighter = original.point(lambda v: min(255, v * 0.8 + 30))
    save(brighter, root / "b" / "brighter.png")
    found = look(root)
    assert found.duplicates.groups == 0
    names = {frozenset(Path(i).name for i in r.ids) for r in found.near_duplicates.listed}
    wanted = {frozenset({"original.png", "copy.jpg"}), frozenset({"original.png", "brighter.png"})}
    assert wanted <= names
    # noise(7) is also a/7.png, at another size; nothing else looks alike.
    of_seed_7 = {"original.png", "copy.jpg", "brighter.png", "7.png"}
    assert all(pair <= of_seed_7 for pair in names)
    assert found.near_duplicates.two_labels >= 2


def test_plain_images_do_not_look_alike(root: Path) -> None:
    for name in "ab":
        for k in range(8):
            save(plain(20 + 16 * k + (name == "b"), (16, 16)), root / name / f"{k}.png")
    found = look(root)
    assert found.plain == 16
    assert found.near_duplicates.groups == 0


def test_close_pairs_are_exactly_those_of_brute_force() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 1 << 62, 400).astype(np.uint64) << np.uint64(1)
    for i in range(0, 200, 2):  # flips 0 to 7 random bits of the neighbour
        bits = random.choice(63, i // 2 % 8, replace=False) + 1
        hashes[i + 1] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64))
    hashes[300:320] = hashes[300]
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(apart <= duplicates.DISTANCE, 1))
    found, complete = duplicates.close_pairs(hashes)
    assert complete
    assert np.array_equal(found, expected)
    assert len(expected) > 240
    some, complete = duplicates.close_pairs(hashes, most=50)
    assert not complete
    assert len(some) == 50


def test_hashes_of_nothing_and_of_one() -> None:
    for n in (0, 1):
        thumbs = np.zeros((n, duplicates.HASH_SIDE, duplicates.HASH_SIDE), np.uint8)
        pairs, complete = duplicates.near_duplicates(thumbs, np.zeros((n, 32), np.uint8))
        assert pairs.shape == (0, 2)
        assert complete


def test_twenty_thousand_hashes_are_searched_quickly() -> None:
    import time

    hashes = np.random.default_rng(0).integers(0, 1 << 63, 20_000).astype(np.uint64)
    start = time.process_time()
    pairs, complete = duplicates.close_pairs(hashes)
    assert complete
    assert len(pairs) == 0
    assert time.process_time() - start < 5  # about 0.1 s; pairs one by one would take minutes


# Notes, JSON, pictures


def test_notes_on_names_and_balance(root: Path) -> None:
    folder(root, {"1": 20, "2": 20, "10": 300})
    notes = "\n".join(look(root).notes)
    assert "'10' comes before '2'" in notes
    assert "uneven classes: 10 has" in notes
    assert "case" not in notes
    assert "fewer" not in notes


def test_notes_on_case_few_and_grey(root: Path) -> None:
    folder(root, {"Cat": 12, "cat": 12, "dog": 5})
    if len(list(root.iterdir())) < 3:
        pytest.skip("this file system ignores case")
    save(noise(77).convert("L"), root / "dog" / "grey.png")
    notes = "\n".join(look(root).notes)
    assert "differ only in case: Cat, cat" in notes
    assert "fewer than 10 training images:" in notes
    assert "dog (4)" in notes
    assert "1 of 30 images are grey" in notes
    assert "string order" not in notes


def test_known_near_duplicates_of_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_DATA", str(root))
    (root / "cifar-10-batches-bin").mkdir()
    for name, content in cifar10_files().items():
        (root / "cifar-10-batches-bin" / name).write_bytes(content)
    (note,) = [note for note in audit(DataConfig(name="cifar10")).notes if "near-dup" in note]
    assert note.startswith("3.3% of the test images have near-duplicates in the training part")


def test_notes_on_what_decoding_changes(root: Path) -> None:
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
    found = look(root)
    assert (found.turned, found.alpha, found.frames) == (9, 3, 4)
    notes = "\n".join(found.notes)
    assert "9 of 43 images are turned upright, as their EXIF says" in notes
    assert "3 of 43 images have transparency, which becomes white" in notes
    assert "4 of 43 images have more than one frame: only the first is used" in notes
    told = here("audit", root)
    assert "only the first is used" in " ".join(told.out.split())
    assert here("audit", root, "--json").json["frames"] == 4


def test_no_notes_on_a_sound_set(root: Path) -> None:
    found = look(folder(root, {"img01": 20, "img02": 20, "img10": 20}))
    assert found.notes == []
    assert found.problems == []


def test_json_holds_everything_but_the_pictures(root: Path) -> None:
    folder(root, {"a": 12, "b": 12})
    save(noise(0), root / "b" / "same.png")
    (root / "a" / "bad.png").write_bytes(b"")
    found = json.loads(json.dumps(look(root).to_dict()))
    assert found["images"] == 25
    assert found["width"] == [40, 40.0, 40]
    assert found["duplicates"]["listed"][0]["labels"] == ["a", "b"]
    assert found["unreadable"][0]["reason"] == "the file is empty (0 bytes)"
    assert not [key for key in found if key.startswith("_")]


def test_the_sheet_shows_readable_training_images_of_every_class(root: Path) -> None:
    for k in range(12):
        save(plain((200, 0, 0), (64, 64)), root / "train" / "red" / f"{k}.png")
        save(plain((0, 0, 200), (32, 64)), root / "train" / "sky" / f"{k}.png")
        save(plain((0, 90, 0), (64, 64)), root / "test" / "red" / f"{k}.png")
    (root / "train" / "red" / "00.png").write_bytes(b"")
    images, titles = look(root).sheet(side=48)
    assert images.shape == (16, 3, 48, 48)
    assert titles == ["red"] * 8 + ["sky"] * 8
    assert (images[:8, 0] == 200).all()
    assert (images[:, 1] == 0).all()
    assert (images[8:, 2, :, 24] == 200).all()
    assert (images[8:, :, :, 0] == 0).all()


def test_the_sheet_of_many_classes_has_one_of_each(root: Path) -> None:
    images, titles = look(folder(root, {f"c{k:03}": 4 for k in range(60)})).sheet(side=32)
    assert images.shape[0] == 60
    assert len(set(titles)) == 60


def test_a_built_in_set() -> None:
    found = audit(DataConfig(name="digits"))
    assert found.images == 1797
    assert found.channels == 1
    assert found.modes == {"L": 1797}
    assert found.width == (8, 8.0, 8)
    assert found.sizes == 1
    assert sum(sum(of.values()) for of in found.counts.values()) == 1797
    images, titles = found.sheet()
    assert images.shape == (80, 1, 8, 8)
    assert titles[::8] == list("0123456789")


def test_a_csv_with_groups(root: Path) -> None:
    lines = ["path,label,patient"]
    for k in range(40):
        save(noise(k), root / f"{k}.png")
        lines.append(f"{k}.png,{'ab'[k % 2]},p{k // 4}")
    (root / "list.csv").write_text("\n".join(lines))
    found = look(root / "list.csv", group="patient")
    assert found.images == 40
    assert found.problems == []
    assert all("group" in found.how[split] for split in ("val", "test"))

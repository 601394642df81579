"""Loading of data sets: splits, unreadable images, image size, fingerprint, statistics."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convlens.data import dataset
from convlens.data.cache import ArrayRows, IndexedRows
from convlens.data.dataset import Data, Split, channel_stats, load_data, load_external_data
from convlens.data.decode import Conversion
from convlens.errors import DataError
from convlens.recipe import DataConfig
from convlens.utils.console import quiet_mode
from helpers.paths import REPOSITORY

PLENTY = 1 << 30


@pytest.fixture(autouse=True)
def cache_and_data_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONVLENS_DATA", str(tmp_path / "sets"))


def folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (20, 18)) -> str:
    """Write PNGs that differ: image i of the n-th folder has red n and green i."""
    for n, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (n, i % 256, 0)).save(root / name / f"{i:04d}.png")
    return str(root)


def everything(split: Split) -> torch.Tensor:
    return split.rows.gather(torch.arange(len(split.ids)))


def test_digits_are_split_in_three_and_test_is_sealed() -> None:
    data = load_data(DataConfig(name="digits"), memory_budget=PLENTY)
    test = data.unseal_test()
    sizes = len(data.train.ids), len(data.val.ids), len(test.ids)
    assert sizes == (1257, 270, 270)
    assert (data.image_size, data.channels, data.classes) == (8, 1, tuple("0123456789"))
    ids = [*data.train.ids, *data.val.ids, *test.ids]
    assert len(set(ids)) == 1797
    assert data.held_out == {"val": list(data.val.ids), "test": list(test.ids)}
    assert data.split_descriptions["val"].startswith(
        "270 of 1,797 training images held out (15%, stratified"
    )
    assert set(data.split_descriptions) == {"train", "val", "test"}
    assert data.train.labels.dtype == torch.int64
    for split in (data.train, data.val, test):
        assert split.rows.shape == (len(split.ids), 1, 8, 8)
        assert np.bincount(split.labels).min() > 0.09 * len(split.ids)
    assert "test" not in {f for f in vars(data) if not f.startswith("_")}


def test_fingerprint_depends_on_recipe_and_seed() -> None:
    def one(**values: object) -> str:
        return load_data(DataConfig(name="digits", **values), memory_budget=PLENTY).fingerprint  # type: ignore[arg-type]

    assert one() == one()
    changes = [{"seed": 1}, {"image_size": 16}, {"channels": 3}, {"val_fraction": 0.2}]
    assert len({one(), *(one(**change) for change in changes)}) == 5


def test_images_and_labels_stay_together(tmp_path: Path) -> None:
    name = folder(tmp_path / "x", {"b": 30, "a": 50, "c": 20})
    data = load_data(DataConfig(name=name), memory_budget=PLENTY)
    red = {"b": 0, "a": 1, "c": 2}
    for split in (data.train, data.val, data.unseal_test()):
        for image, label, image_id in zip(everything(split), split.labels, split.ids, strict=True):
            kind, file = image_id.split(os.sep)
            assert data.classes[label] == kind
            assert image[:, 8, 8].tolist() == [red[kind], int(file[:4]), 0]


def test_splits_of_the_source_are_kept(tmp_path: Path) -> None:
    counts = {"train/a": 20, "train/b": 20, "valid/a": 3, "test/b": 4}
    data = load_data(DataConfig(name=folder(tmp_path / "x", counts)), memory_budget=PLENTY)
    assert len(data.train.ids) == 40
    assert data.held_out == {}
    assert data.val.labels.tolist() == [0, 0, 0]
    assert data.unseal_test().labels.tolist() == [1, 1, 1, 1]
    assert data.split_descriptions["test"] == "4 images of the source's own split"


def test_only_missing_splits_are_held_out(tmp_path: Path) -> None:
    counts = {"train/a": 20, "train/b": 20, "test/a": 5, "test/b": 5}
    data = load_data(DataConfig(name=folder(tmp_path / "x", counts)), memory_budget=PLENTY)
    assert (len(data.train.ids), len(data.val.ids)) == (34, 6)
    assert list(data.held_out) == ["val"]
    assert len(data.unseal_test().ids) == 10


def test_per_class_is_taken_after_the_split(tmp_path: Path) -> None:
    name = folder(tmp_path / "x", {"a": 40, "b": 20})
    full = load_data(DataConfig(name=name), memory_budget=PLENTY)
    tiny = load_data(DataConfig(name=name, per_class=5), memory_budget=PLENTY)
    assert np.bincount(tiny.train.labels).tolist() == [5, 5]
    assert tiny.val.ids == full.val.ids
    assert set(tiny.train.ids) < set(full.train.ids)
    assert tiny.split_descriptions["train"].startswith("10 of 42 training images: 5 of each class")
    assert tiny.fingerprint != full.fingerprint
    with pytest.raises(DataError, match=r"per_class=15.*b \(14\)"):
        load_data(DataConfig(name=name, per_class=15), memory_budget=PLENTY)


@pytest.mark.parametrize("layout", ["", "train/"])
def test_a_class_of_a_single_image_stays_in_training(tmp_path: Path, layout: str) -> None:
    counts = {f"{layout}a": 9, f"{layout}b": 1}
    if layout:
        counts |= {"test/a": 2, "test/b": 1}
    name = folder(tmp_path / "x", counts)
    note = "1 class has a single image, which stays in training: b"
    for values in ({}, {"folds": 3, "fold": 0}, {"folds": 3, "fold": 2}):
        data = load_data(DataConfig(name=name, **values), memory_budget=PLENTY)  # type: ignore[arg-type]
        assert data.notes == (note,)
        assert data.train.labels.tolist().count(1) == 1
        assert set(data.val.labels.tolist()) == {0}
    # Without a validation split nothing is drawn from a set with its own test split.
    bare = load_data(DataConfig(name=name, val_fraction=0), memory_budget=PLENTY)
    assert bare.notes == (() if layout else (note,))


def test_classes_of_two_images(tmp_path: Path) -> None:
    two = load_data(DataConfig(name=folder(tmp_path / "y", {"a": 9, "b": 2})), memory_budget=PLENTY)
    assert 1 in two.train.labels.tolist()


def test_groups_of_a_csv_stay_together(tmp_path: Path) -> None:
    folder(tmp_path / "x", {"a": 40, "b": 40})
    lines = [f"x/{c}/{i:04d}.png,{c},{i // 4}" for c in "ab" for i in range(40)]
    (tmp_path / "l.csv").write_text("path,label,who\n" + "\n".join(lines))
    data = load_data(DataConfig(name=str(tmp_path / "l.csv"), group="who"), memory_budget=PLENTY)
    who = dict(line.split(",")[::2] for line in lines)
    groups = [{who[i] for i in s.ids} for s in (data.train, data.val, data.unseal_test())]
    assert all(groups)
    assert len(set.union(*groups)) == sum(map(len, groups)) == 10
    assert "groups by 'who' kept together" in data.split_descriptions["val"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((20, 18), 16), ((300, 200), 128), ((64, 70), 64), ((9, 9), 16), ((31, 40), 28)],
)
def test_automatic_image_size(tmp_path: Path, size: tuple[int, int], expected: int) -> None:
    name = folder(tmp_path / "x", {"a": 8, "b": 8}, size)
    data = load_data(DataConfig(name=name), memory_budget=PLENTY)
    assert (data.image_size, data.channels) == (expected, 3)
    assert data.train.rows.shape[1:] == (3, expected, expected)


def test_automatic_channels(tmp_path: Path) -> None:
    name = folder(tmp_path / "x", {"a": 8, "b": 8})
    for path in Path(name).rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert load_data(DataConfig(name=name), memory_budget=PLENTY).channels == 1
    Image.new("RGB", (20, 20), "red").save(Path(name) / "a" / "0000.png")
    assert load_data(DataConfig(name=name), memory_budget=PLENTY).channels == 3
    assert load_data(DataConfig(name=name, channels=1), memory_budget=PLENTY).channels == 1


def test_summary_says_how_the_set_was_interpreted(tmp_path: Path) -> None:
    name = folder(tmp_path / "x", {"a": 40, "b": 20})
    assert str(load_data(DataConfig(name=name), memory_budget=PLENTY).summary) == (
        "2 classes: a 40, b 20 · train 42 · val 9 · test 9 (held out, stratified) · 3 channels · "
        "16 px, crop keeps 90% of the area"
    )
    config = DataConfig(name=name, folds=3, fold=1, fit="pad", channels=1)
    assert str(load_data(config, memory_budget=PLENTY).summary) == (
        "2 classes: a 40, b 20 · train 34 · val 17 (fold 1 of 3, stratified) · "
        "test 9 (held out, stratified) · 1 channel · 16 px, padded to squares"
    )
    counts = {"train/a": 20, "train/b": 20, "val/a": 3, "test/b": 4}
    given = folder(tmp_path / "y", counts, (16, 16))
    assert str(load_data(DataConfig(name=given), memory_budget=PLENTY).summary) == (
        "2 classes: a 23, b 24 · train 40 · val 3 · test 4 (given by the data set) · 3 channels · "
        "16 px"
    )
    bare = DataConfig(name="digits", val_fraction=0)
    assert str(load_data(bare, memory_budget=PLENTY).summary).endswith(
        "train 1,527 · val 0 (data.val_fraction=0) · test 270 (held out, stratified) · 1 channel · "
        "8 px"
    )


def with_copies(root: Path) -> str:
    """Write a folder with a copy in its class, and a copy of another image in another class."""
    folder(root, {"a": 20, "b": 20})
    shutil.copy(root / "a" / "0003.png", root / "a" / "copy.png")
    shutil.copy(root / "a" / "0004.png", root / "b" / "wrong.png")
    return str(root)


def ids_of(data: Data) -> dict[str, list[str]]:
    splits = {"train": data.train, "val": data.val, "test": data.unseal_test()}
    return {name: list(split.ids) for name, split in splits.items()}


def test_copies_are_dropped(tmp_path: Path) -> None:
    name = with_copies(tmp_path / "x")
    data = load_data(DataConfig(name=name, duplicates="drop"), memory_budget=PLENTY)
    used = {i for ids in ids_of(data).values() for i in ids}
    everywhere = {f"{c}/{i:04}.png" for c in "ab" for i in range(20)}
    assert used == everywhere - {"a/0004.png"}
    assert data.notes == (
        "1 copy of another image is left out (data.duplicates=drop)",
        "2 equal images under different labels are all left out (data.duplicates=drop), "
        "e.g. a/0004.png",
    )
    # The images keep their labels and pixels.
    for image, label, image_id in zip(
        everything(data.train), data.train.labels, data.train.ids, strict=True
    ):
        assert image[:, 8, 8].tolist() == [label, int(image_id[2:6]), 0]
    keep = load_data(DataConfig(name=name), memory_budget=PLENTY)
    assert sum(map(len, ids_of(keep).values())) == 42
    assert data.fingerprint != keep.fingerprint


def test_a_copy_in_a_given_test_split_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "x"
    folder(root / "train", {"a": 20, "b": 20})
    (root / "test" / "a").mkdir(parents=True)
    for copy in ("train/a/again.png", "test/a/1.png", "test/a/2.png"):
        shutil.copy(root / "train" / "a" / "0007.png", root / copy)
    data = load_data(DataConfig(name=str(root), duplicates="drop"), memory_budget=PLENTY)
    ids = ids_of(data)
    assert ids["test"] == ["test/a/1.png"]
    assert not {"train/a/0007.png", "train/a/again.png"} & {*ids["train"], *ids["val"]}
    assert data.notes[0] == "3 copies of other images are left out (data.duplicates=drop)"
    group = load_data(DataConfig(name=str(root), duplicates="group"), memory_budget=PLENTY)
    assert len(ids_of(group)["test"]) == 2  # a given split is not changed
    assert group.notes[1].startswith("images that occur more than once: 1 in more than one split")


def test_a_class_of_which_all_images_are_dropped_is_refused(tmp_path: Path) -> None:
    name = with_copies(tmp_path / "x")
    for path in sorted((tmp_path / "x" / "b").iterdir())[:-1]:
        path.unlink()
    with pytest.raises(DataError, match="drop leaves no training image of: b"):
        load_data(DataConfig(name=name, duplicates="drop"), memory_budget=PLENTY)


def test_copies_are_kept_in_one_split(tmp_path: Path) -> None:
    name = with_copies(tmp_path / "x")
    pairs = [{"a/0003.png", "a/copy.png"}, {"a/0004.png", "b/wrong.png"}]
    divided = 0
    for seed in range(8):
        keep = load_data(DataConfig(name=name, seed=seed), memory_budget=PLENTY)
        group = load_data(
            DataConfig(name=name, seed=seed, duplicates="group"), memory_budget=PLENTY
        )
        divided += any(
            pair & set(ids) and pair - set(ids) for pair in pairs for ids in ids_of(keep).values()
        )
        for ids in ids_of(group).values():
            assert all(not pair & set(ids) or pair <= set(ids) for pair in pairs)
        assert {len(ids) for ids in ids_of(group).values()} <= {5, 6, 7, 29, 30, 31}
        assert (
            group.notes[0]
            == "2 groups of equal images, each kept in one split (data.duplicates=group)"
        )
        assert "copies kept together" in group.split_descriptions["val"]
        assert group.summary.origins["val"] == "held out, copies kept together"
    assert divided  # the test would notice a split that ignores copies


def test_duplicates_of_a_set_without_copies_change_nothing(tmp_path: Path) -> None:
    name = folder(tmp_path / "x", {"a": 30, "b": 20})
    keep, drop, group = (
        load_data(DataConfig(name=name, duplicates=how), memory_budget=PLENTY)  # type: ignore[arg-type]
        for how in ("keep", "drop", "group")
    )
    assert keep.fingerprint == drop.fingerprint == group.fingerprint
    assert keep.notes == drop.notes == group.notes == ()


def test_equal_pixels_of_built_in_sets_are_copies() -> None:
    keep = load_data(DataConfig(name="digits"), memory_budget=PLENTY)
    drop = load_data(DataConfig(name="digits", duplicates="drop"), memory_budget=PLENTY)
    images = torch.cat([everything(s) for s in (keep.train, keep.val, keep.unseal_test())])
    distinct = {image.numpy().tobytes() for image in images}
    assert sum(map(len, ids_of(drop).values())) == len(distinct)


def test_similar_images_in_different_splits_are_counted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        for c in "ab":
            (tmp_path / "x" / split / c).mkdir(parents=True)
            for i in range(count):
                small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                image = Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)
                image.save(tmp_path / "x" / split / c / f"{i}.png")
    root = tmp_path / "x"
    for side, copy in ((50, "test/a/8"), (40, "train/a/9")):
        Image.open(root / "train/a/0.png").resize((side, side)).save(root / f"{copy}.png")
    shutil.copy(root / "train/b/1.png", root / "test/b/equal.png")  # reported as a copy
    listing = load_data(DataConfig(name=str(root)), memory_budget=PLENTY).listing
    assert listing is not None
    assert listing.count == 23
    similar = listing.similar_across_splits()
    assert {group.ids for group in similar.listed} == {
        ("train/a/0.png", "test/a/8.png"),
        ("train/a/9.png", "test/a/8.png"),
    }
    assert similar.groups == similar.across_splits == 2


def test_similar_images_are_reported_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for c in "ab":
        (tmp_path / "x" / c).mkdir(parents=True)
        for i in range(20):
            small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)
            for k, side in enumerate((64, 60)):
                image.resize((side, side)).save(tmp_path / "x" / c / f"{i}-{k}.png")
    data = load_data(DataConfig(name=str(tmp_path / "x")), memory_budget=PLENTY)
    split_of = {i: name for name, ids in ids_of(data).items() for i in ids}
    pairs = [(f"{c}/{i}-0.png", f"{c}/{i}-1.png") for c in "ab" for i in range(20)]
    divided = [pair for pair in pairs if split_of[pair[0]] != split_of[pair[1]]]
    data.print_similar_images()
    shown = capsys.readouterr().err
    assert f"{len(divided)} pairs of similar images in different splits, e.g. " in shown
    assert any(
        f"{a} ({split_of[a]})" in shown and f"{b} ({split_of[b]})" in shown for a, b in divided
    )
    assert "data.group=REGEX (of a CSV: COLUMN) keeps related images in one split" in shown
    assert data.image_size == 48
    monkeypatch.setattr(dataset, "MAX_PIXELS_COMPARED", 80 * 48 * 48 - 1)
    data.print_similar_images()
    assert "audit" in capsys.readouterr().err
    with quiet_mode():  # neither computed nor printed
        monkeypatch.setattr(dataset.ImageList, "similar_across_splits", None)
        data.print_similar_images()
    assert capsys.readouterr().err == ""


@pytest.fixture
def partly_bad(tmp_path: Path) -> str:
    name = folder(tmp_path / "x", {"a": 30, "b": 30, "c": 20})
    for i in range(12):
        (Path(name) / "a" / f"{i:04d}.png").write_bytes(b"")
    (Path(name) / "b" / "0003.png").write_text("not an image")
    return name


def test_unreadable_files_are_refused_with_a_list(partly_bad: str) -> None:
    with pytest.raises(DataError, match="13 of 80 images can't be read") as caught:
        load_data(DataConfig(name=partly_bad), memory_budget=PLENTY)
    assert caught.value.where.count("empty (0 bytes)") == 10
    assert caught.value.where.endswith("and 3 more")
    assert f"convlens audit {partly_bad}" in caught.value.fix
    assert "data.on_bad=skip" in caught.value.fix


def test_unreadable_files_can_be_skipped(partly_bad: str) -> None:
    data = load_data(DataConfig(name=partly_bad, on_bad="skip", max_bad=0.4), memory_budget=PLENTY)
    assert len(data.skipped) == 13
    assert data.skipped[os.path.join("a", "0000.png")] == "the file is empty (0 bytes)"
    ids = {*data.train.ids, *data.val.ids, *data.unseal_test().ids}
    assert len(ids) == 67
    assert not ids & data.skipped.keys()
    test_images = everything(data.train)
    assert test_images[:, 1, 8, 8].tolist() == [int(Path(i).stem) for i in data.train.ids]


def test_at_most_a_share_of_unreadable_images_is_skipped(tmp_path: Path) -> None:
    root = Path(folder(tmp_path / "x/train", {"a": 50, "b": 10})).parent
    folder(root / "test", {"a": 20, "b": 4})

    def damage(*names: str) -> set[str]:
        for name in names:
            (root / name).write_bytes(b"")
        try:
            load_data(DataConfig(name=str(root), on_bad="skip"), memory_budget=PLENTY)
        except DataError as error:
            return set(error.what.partition(" of ")[2].split(", "))
        return set()

    # One image may always be skipped, else at most a tenth of a split and of each class in it.
    assert damage("train/b/0000.png", "test/b/0000.png", "test/a/0000.png") == set()
    assert damage(*(f"train/a/{i:04}.png" for i in range(5))) == set()
    train = {"all of train (7 of 60)", "a (6 of 50)"}
    assert damage("train/a/0005.png") == train
    assert damage("test/b/0001.png") == train | {"all of test (3 of 24)", "b (2 of 4)"}
    config = DataConfig(name=str(root), on_bad="skip", max_bad=0.5)
    assert len(load_data(config, memory_budget=PLENTY).skipped) == 10
    with pytest.raises(DataError, match="more than 0% can't be read of ") as caught:
        load_data(config.model_copy(update={"max_bad": 0}), memory_budget=PLENTY)
    assert "raise data.max_bad" in caught.value.fix


def test_class_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    name = folder(tmp_path / "x", {"a": 9, "b": 3})
    for path in (Path(name) / "b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no readable training image in: b"):
        load_data(DataConfig(name=name, on_bad="skip"), memory_budget=PLENTY)


@pytest.fixture(params=["folder", "shapes", "digits"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DataConfig]:
    if request.param == "folder":
        yield DataConfig(name=folder(tmp_path / "x", {"a": 30, "b": 30}))
    elif request.param == "shapes":
        yield DataConfig(name="shapes", count=200, image_size=12)
    else:
        yield DataConfig(name="digits", image_size=16, channels=3)


def test_images_beyond_the_budget_are_read_from_disk_and_equal(source: DataConfig) -> None:
    small, large = load_data(source, memory_budget=100), load_data(source, memory_budget=PLENTY)
    assert isinstance(small.train.rows, IndexedRows)
    assert isinstance(large.train.rows, ArrayRows)
    assert small.train.rows.in_memory_tensor() is None
    assert large.train.rows.in_memory_tensor() is not None
    assert small.fingerprint == large.fingerprint
    for streamed, in_memory in (
        (small.train, large.train),
        (small.val, large.val),
        (small.unseal_test(), large.unseal_test()),
    ):
        assert streamed.ids == in_memory.ids
        assert torch.equal(everything(streamed), everything(in_memory))


def test_fingerprint_changes_with_one_image(tmp_path: Path) -> None:
    config = DataConfig(name=folder(tmp_path / "x", {"a": 9, "b": 9}))
    before = load_data(config, memory_budget=PLENTY).fingerprint
    assert load_data(config, memory_budget=PLENTY).fingerprint == before
    Image.new("RGB", (20, 18), (9, 9, 9)).save(tmp_path / "x" / "a" / "0004.png")
    assert load_data(config, memory_budget=PLENTY).fingerprint != before


def test_channel_stats_equal_those_of_all_pixels() -> None:
    images = torch.randint(0, 256, (1000, 3, 9, 9), dtype=torch.uint8)
    images[:, 2] = 51
    split = Split(ArrayRows(images), torch.zeros(1000, dtype=torch.int64), [""] * 1000)
    mean, std = channel_stats(split)
    values = images.numpy() / 255
    np.testing.assert_allclose(mean, values.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], values.std(axis=(0, 2, 3))[:2], rtol=1e-12)
    assert std[2] == 1 / 255
    assert mean[2] == pytest.approx(0.2, abs=1e-12)


def test_channel_stats_of_many_images_are_sampled_evenly() -> None:
    levels = torch.arange(240_000) % 256
    images = levels.to(torch.uint8)[:, None, None, None].expand(-1, 1, 1, 1)
    split = Split(ArrayRows(images), levels, [""] * 240_000)
    mean, std = channel_stats(split)
    assert mean[0] == pytest.approx(0.5, abs=0.005)
    assert std[0] == pytest.approx(0.2898, abs=0.003)


def test_external_data_is_converted_to_the_models_input(tmp_path: Path) -> None:
    counts = {"train/a": 5, "train/b": 5, "test/a": 2, "test/b": 1}
    name = folder(tmp_path / "x", counts)
    options = {"conversion": Conversion(12, 1, "pad"), "memory_budget": PLENTY}
    split, classes, data_name, fingerprint, chosen, *_ = load_external_data(name, **options)  # type: ignore[arg-type]
    assert chosen == "test"
    assert split.rows.shape == (3, 1, 12, 12)
    assert classes == ("a", "b")
    assert split.labels.tolist() == [0, 0, 1]
    assert data_name == name
    assert len(fingerprint) == 64
    with pytest.raises(DataError, match="no val images"):
        load_external_data(name, "val", **options)  # type: ignore[arg-type]
    digits = load_external_data("digits", **options)  # type: ignore[arg-type]
    assert (digits.split, len(digits.images)) == ("all", 1797)
    for split in ("test", "val", "train"):
        with pytest.raises(DataError, match=f"--split {split} does not apply") as error:
            load_external_data("digits", split, **options)  # type: ignore[arg-type]
        assert error.value.fix == "leave out --split to use all 1,797 images"


REAL = REPOSITORY / "data"


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "MNIST" / "raw").is_dir(), reason="no MNIST under data/")
def test_mnist_has_its_known_sizes_and_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_DATA", str(REAL))
    data = load_data(DataConfig(name="mnist"), memory_budget=PLENTY)
    test = data.unseal_test()
    assert data.train.rows.shape == (51_000, 1, 28, 28)
    assert data.val.rows.shape == (9_000, 1, 28, 28)
    assert np.bincount(test.labels)[:3].tolist() == [980, 1135, 1032]
    train, *_ = load_external_data(
        "mnist", "train", conversion=Conversion(28, 1, "crop"), memory_budget=PLENTY
    )
    mean, std = channel_stats(train)  # the well-known 0.1307 and 0.3081
    assert (round(mean[0], 3), round(std[0], 3)) == (0.131, 0.308)

"""Where images come from: built-in sets in every layout, downloads that fail, own folders, CSVs."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convlens.data import download, image_folder
from convlens.data.sources import SHAPES, SOURCES, find_source, known_names
from convlens.data.types import EncodedFiles, Part
from convlens.errors import DataError, UsageError
from helpers.datasets import cifar10_files
from helpers.serving import Pages, serving


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder and working directory, and no way to a real network."""
    root = tmp_path / "sets"
    root.mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("CONVLENS_DATA", str(root))
    monkeypatch.setattr(download, "SOCKET_TIMEOUT_S", 2.0)
    for name, its in download.DOWNLOADS.items():
        monkeypatch.setitem(
            download.DOWNLOADS, name, replace(its, mirrors=("http://127.0.0.1:9/",))
        )
    return root


def picture(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, 0, 0)).save(path)
    return path


def tree(root: Path, counts: dict[str, int]) -> Path:
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(root / folder / f"{i}.png", i)
    return root


def pixels(part: Part) -> np.ndarray:
    assert not isinstance(part.images, EncodedFiles)
    return part.images[np.arange(part.images.shape[0])]


# ------------------------------------------------------------------ built-in sets


def test_digits_are_scikit_learns() -> None:
    source = find_source("digits")
    part = source.parts["train"]
    assert source.classes == tuple("0123456789")
    assert part.images.shape == (1797, 1, 8, 8)  # type: ignore[union-attr]
    images = pixels(part)
    assert images.max() == 255
    # The first is a 0; its first row is 0 0 5 13 9 1 0 0 of 16.
    np.testing.assert_array_equal(images[0, 0, 0], [0, 0, 80, 207, 143, 16, 0, 0])
    assert part.labels[:10].tolist() == list(range(10))


def test_shapes_depend_on_their_number_only() -> None:
    few, many = find_source("shapes", count=40), find_source("shapes", count=400)
    np.testing.assert_array_equal(pixels(few.parts["train"]), pixels(many.parts["train"])[:40])
    assert few.classes == SHAPES
    assert many.parts["train"].labels[:12].tolist() == [*range(10), 0, 1]
    images = many.parts["train"].images
    assert not isinstance(images, list)
    np.testing.assert_array_equal(images[np.array([377, 5])], pixels(many.parts["train"])[[377, 5]])
    assert find_source("shapes").parts["train"].images.shape == (2000, 3, 32, 32)  # type: ignore[union-attr]
    assert find_source("shapes", count=20, image_size=61).parts["train"].images.shape[2:] == (
        61,
        61,
    )  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="at least 20"):
        find_source("shapes", count=5)


def test_shapes_are_no_matter_of_mean_colour() -> None:
    from sklearn.linear_model import LogisticRegression

    part = find_source("shapes", count=1200, image_size=16).parts["train"]
    flat = pixels(part).reshape(1200, -1) / 255
    linear = LogisticRegression(max_iter=60).fit(flat[:1000], part.labels[:1000])
    assert linear.score(flat[1000:], part.labels[1000:]) < 0.4


def write_idx(folder: Path, count: int = 20, gz: bool = False) -> np.ndarray:
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
    for stem in ("train", "t10k"):
        head = np.array([2051, count, 28, 28], ">u4").tobytes()
        labels = np.array([2049, count], ">u4").tobytes() + bytes(i % 10 for i in range(count))
        for kind, content in (("images-idx3", head + images.tobytes()), ("labels-idx1", labels)):
            name = f"{stem}-{kind}-ubyte"
            (folder / name).write_bytes(content)
    return images


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
)
def test_idx_sets_in_torchvisions_layout(data_root: Path, name: str, folder: str) -> None:
    images = write_idx(data_root / folder / "raw")
    source = find_source(name)
    assert len(source.classes) == 10
    assert set(source.parts) == {"train", "test"}
    np.testing.assert_array_equal(pixels(source.parts["train"])[:, 0], images)
    part = source.parts["test"]
    np.testing.assert_array_equal(part.images[np.array([7, 3, 4])][:, 0], images[[7, 3, 4]])  # type: ignore[index]
    assert part.labels[:11].tolist() == [*range(10), 0]
    assert part.ids[3] == "test/3"


def test_idx_files_cut_short_are_named(data_root: Path) -> None:
    write_idx(data_root / "MNIST" / "raw")
    path = data_root / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-784])
    with pytest.raises(DataError, match="header") as caught:
        find_source("mnist")
    assert caught.value.where == str(path)


def check_cifar10() -> None:
    source, files = find_source("cifar10"), cifar10_files()
    assert source.classes[0] == "airplane"
    assert source.classes[9] == "truck"
    third = np.frombuffer(files["data_batch_3.bin"], np.uint8).reshape(4, 3073)
    train = source.parts["train"]
    assert train.labels[8:12].tolist() == [2, 3, 4, 9]
    np.testing.assert_array_equal(pixels(train)[8:12].reshape(4, -1), third[:, 1:])
    # Red first, rows within: byte 1 + 1024 + 32 is green at row 1, column 0.
    assert pixels(train)[8, 1, 1, 0] == third[0, 1 + 1024 + 32]
    assert len(source.parts["test"].labels) == 4


def test_cifar10_from_its_binary_folder(data_root: Path) -> None:
    folder = data_root / "cifar-10-batches-bin"
    folder.mkdir()
    for name, content in cifar10_files().items():
        (folder / name).write_bytes(content)
    check_cifar10()
    (folder / "test_batch.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(DataError, match="whole number of records"):
        find_source("cifar10")


def test_cifar100_takes_the_fine_label(data_root: Path) -> None:
    folder = data_root / "cifar-100-binary"
    folder.mkdir()
    record = np.zeros((2, 3074), np.uint8)
    record[:, 0], record[:, 1] = 19, [0, 99]
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(record.tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"n{i}" for i in range(100)) + "\n")
    source = find_source("cifar100")
    assert len(source.classes) == 100
    assert source.parts["train"].labels.tolist() == [0, 99]


@pytest.mark.parametrize("folder", ["SVHN", "svhn", "."])
def test_svhn_calls_ten_zero(data_root: Path, folder: str) -> None:
    from scipy.io import savemat

    (data_root / folder).mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), np.uint8)
    for split in ("train", "test"):
        labels = np.array([[10], [1], [9], [10]], np.uint8)
        savemat(data_root / folder / f"{split}_32x32.mat", {"X": images, "y": labels})
    part = find_source("svhn").parts["test"]
    assert part.labels.tolist() == [0, 1, 9, 0]
    np.testing.assert_array_equal(pixels(part)[2], images[..., 2].transpose(2, 0, 1))


def test_stl10_is_stored_by_columns(data_root: Path) -> None:
    folder = data_root / "stl10_binary"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), np.uint8)
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(images.swapaxes(2, 3).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes([1, 10, 2]))
    part = find_source("stl10").parts["train"]
    assert part.labels.tolist() == [0, 9, 1]
    np.testing.assert_array_equal(pixels(part), images)


def test_a_built_in_set_as_an_image_folder_keeps_its_class_order(data_root: Path) -> None:
    names = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
    for split in ("train", "test"):
        tree(data_root / "kmnist" / split, dict.fromkeys(names, 2))
    source = find_source("kmnist")
    assert source.classes == tuple(names)
    assert source.parts["train"].labels.tolist() == np.repeat(range(10), 2).tolist()
    assert "o/0.png" in source.parts["train"].ids[0]


# ------------------------------------------------------------------ downloads


@pytest.fixture
def server() -> Iterator[tuple[str, type[Pages]]]:
    with serving() as running:
        yield running


def tar_gz(files: dict[str, bytes], extra: dict[str, bytes] | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in {**(extra or {}), **files}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("cifar-10-batches-bin/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return stream.getvalue()


def offer_cifar10(monkeypatch: pytest.MonkeyPatch, url: str, content: bytes) -> None:
    its = download.DOWNLOADS["cifar10"]
    archive = replace(its.archives[0], md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(
        download.DOWNLOADS, "cifar10", replace(its, mirrors=(url,), archives=(archive,))
    )


CIFAR = {f"cifar-10-batches-bin/{name}": content for name, content in cifar10_files().items()}


def test_download_takes_only_what_it_expects(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, type[Pages]]
) -> None:
    url, handler = server
    evil = {"../evil.bin": b"x", "/tmp/convlens-evil.bin": b"x", "cifar-10-batches-bin/odd": b"x"}
    content = tar_gz(CIFAR, evil)
    handler.pages["/cifar-10-binary.tar.gz"] = content
    offer_cifar10(monkeypatch, url, content)
    folder = data_root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / ".cifar-10-binary.tar.gz.abcdefgh.part").touch()  # of a process that was killed
    unpacked = folder / ".test_batch.bin.abcdefgh.part"
    unpacked.touch()
    os.utime(unpacked, (0, 0))
    check_cifar10()
    check_cifar10()
    assert len(handler.asked) == 1
    there = {p.name for p in (data_root / "cifar-10-batches-bin").iterdir()}
    assert there - {".download.lock"} == set(cifar10_files())
    assert sorted(p.name for p in data_root.iterdir()) == ["cifar-10-batches-bin"]
    assert not Path("/tmp/convlens-evil.bin").exists()


def test_the_second_mirror_is_tried(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, type[Pages]]
) -> None:
    url, handler = server
    write_idx(data_root / "made")
    archives = []
    for archive in download.DOWNLOADS["mnist"].archives:
        content = gzip.compress((data_root / "made" / archive.members[0]).read_bytes())
        handler.pages[f"/good/{archive.file}"] = content
        archives.append(replace(archive, md5=hashlib.md5(content).hexdigest()))
    its = replace(
        download.DOWNLOADS["mnist"], mirrors=(url + "bad/", url + "good/"), archives=tuple(archives)
    )
    monkeypatch.setitem(download.DOWNLOADS, "mnist", its)
    assert len(find_source("mnist").parts["train"].labels) == 20


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("404", "HTTP 404"),
        ("html", "web page"),
        ("wrong", "wrong checksum"),
        ("half", "IncompleteRead"),
        ("refused", "refused"),
    ],
)
def test_failed_downloads_say_what_to_put_where(
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: tuple[str, type[Pages]],
    trouble: str,
    message: str,
) -> None:
    url, handler = server
    content = tar_gz(CIFAR)
    offer_cifar10(monkeypatch, "http://127.0.0.1:9/" if trouble == "refused" else url, content)
    bad = {"html": b"<html>log in</html>", "wrong": content[:-1] + b"?", "half": content}
    if trouble in bad:
        handler.pages["/cifar-10-binary.tar.gz"] = bad[trouble]
    handler.cut = trouble == "half"
    with pytest.raises(DataError, match=message) as caught:
        find_source("cifar10")
    error = caught.value
    assert str(data_root / "cifar-10-batches-bin") in error.where
    assert f"cifar-10-binary.tar.gz into {data_root}" in error.fix
    assert f"{data_root / 'cifar10'}/{{train,test}}" in error.fix
    assert "digits" in error.fix
    left = {p.name for p in (data_root / "cifar-10-batches-bin").iterdir()}
    assert left <= {".download.lock"}


def test_a_pickled_archive_is_named_and_not_read(data_root: Path) -> None:
    (data_root / "cifar-10-batches-py").mkdir()
    (data_root / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match="pickles, which are never read") as caught:
        find_source("cifar10")
    assert "cifar-10-binary.tar.gz" in caught.value.fix


def test_an_archive_put_by_hand_is_used_after_its_checksum(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tar_gz(CIFAR)
    (data_root / "cifar-10-binary.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match="MD5"):
        find_source("cifar10")
    offer_cifar10(monkeypatch, "http://127.0.0.1:9/", content)
    check_cifar10()
    assert (data_root / "cifar-10-binary.tar.gz").exists()


def test_missing_mnist_files_are_named_one_by_one(data_root: Path) -> None:
    write_idx(data_root / "MNIST" / "raw")
    (data_root / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError) as caught:
        find_source("mnist")
    assert "put t10k-labels-idx1-ubyte.gz into" in caught.value.fix
    assert "train-images" not in caught.value.fix


# ------------------------------------------------------------------ own folders


def test_a_folder_of_classes(tmp_path: Path) -> None:
    root = tree(tmp_path / "pets", {"dog": 3, "cat": 2, "10": 1, "2": 1})
    picture(root / "cat" / "deeper" / "x.JPG")
    for junk in ("dog/.hidden.png", "dog/Thumbs.db", "dog/notes.txt", ".DS_Store", "dog/a.mp4"):
        (root / junk).write_bytes(b"x")
    tree(root, {"__MACOSX/dog": 1, ".ipynb_checkpoints": 1, "dog/.ipynb_checkpoints": 1})
    picture(root / "loose.png")
    source = find_source(str(root))
    assert source.classes == ("10", "2", "cat", "dog")
    part = source.parts["train"]
    assert part.labels.tolist() == [0, 1, 2, 2, 2, 3, 3, 3]
    assert list(part.ids[2:5]) == ["cat/0.png", "cat/1.png", f"cat/deeper{os.sep}x.JPG"]
    assert part.images[0] == str(root / "10" / "0.png")
    assert "2 files that are no images were ignored" in source.notes
    assert "1 images beside the class folders were ignored" in source.notes


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "eval", "evaluation", "dev", "VAL"])
@pytest.mark.parametrize("test", ["test", "Testing"])
def test_spellings_of_splits(tmp_path: Path, train: str, val: str, test: str) -> None:
    root = tmp_path / "x"
    counts = {f"{train}/a": 2, f"{train}/b": 1, f"{val}/a": 1, f"{test}/b": 3, "extra/a": 1}
    source = find_source(str(tree(root, counts)))
    assert {s: len(p.labels) for s, p in source.parts.items()} == {"train": 3, "val": 1, "test": 3}
    assert source.parts["test"].labels.tolist() == [1, 1, 1]
    assert source.parts["val"].ids[0] == f"{val}/a/0.png"
    assert any("extra" in note for note in source.notes)


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    source = find_source(str(tree(tmp_path / "x", {"train": 2, "bus": 2})))
    assert source.classes == ("bus", "train")


def test_classes_match_by_name_in_any_unicode_form(tmp_path: Path) -> None:
    composed, split_up = "caf\u00e9", "cafe\u0301"
    root = tmp_path / "x"
    source = find_source(
        str(tree(root, {f"train/{composed}": 1, "train/tea": 1, f"test/{split_up}": 1}))
    )
    assert source.classes == (composed, "tea")
    assert source.parts["test"].labels.tolist() == [0]
    with pytest.raises(DataError, match="but for Unicode form"):
        find_source(str(tree(tmp_path / "y", {composed: 1, split_up: 1, "tea": 1})))
    # Or one would hide the other's images.
    both = {f"train/{composed}": 1, "train/tea": 1, f"test/{composed}": 1, f"test/{split_up}": 1}
    with pytest.raises(DataError, match="but for Unicode form"):
        find_source(str(tree(tmp_path / "z", both)))


@pytest.mark.parametrize(
    ("counts", "messages"),
    [
        ({}, ["no class folders"]),
        ({"a": 0, "b": 0}, ["no images"]),
        ({"a": 1, "b": 0, "c": 0}, ["without images: b, c"]),
        ({"a": 3}, ["only one class folder: a"]),
        (
            {"train/Cat": 1, "train/dog": 1, "train/none": 0, "test/cat": 1, "val/cow": 1},
            ["without images: none", r"in test .* 'cat' \(train has 'Cat'\)", "in val .* 'cow'"],
        ),
        ({"train/a": 1, "train/b": 1, "training/a": 1}, ["two train folders: train, training"]),
        ({"test/a": 1, "val/a": 1}, ["no train folder"]),
        ({"train": 2, "test": 2}, ["splits without class folders"]),
    ],
)
def test_bad_folders(tmp_path: Path, counts: dict[str, int], messages: list[str]) -> None:
    root = tmp_path / "x"
    root.mkdir()
    import re

    with pytest.raises(DataError) as caught:
        find_source(str(tree(root, counts)))
    assert str(root) in caught.value.where
    for message in messages:
        assert re.search(message, caught.value.what), caught.value.what
    assert caught.value.fix


def test_rules_that_are_for_training(tmp_path: Path) -> None:
    """What is only tested on may have one class, empty ones, and those that `train` lacks."""
    one = find_source(str(tree(tmp_path / "one", {"a": 3})), tested=True)
    assert (one.classes, one.parts["train"].labels.tolist()) == (("a",), [0, 0, 0])
    some = find_source(str(tree(tmp_path / "some", {"a": 0, "b": 2})), tested=True)
    assert (some.classes, some.parts["train"].labels.tolist()) == (("a", "b"), [1, 1])
    apart = tree(tmp_path / "apart", {"train/a": 2, "val/b": 1, "test/c": 1, "test/a": 0})
    found = find_source(str(apart), tested=True)
    assert found.classes == ("a", "b", "c")
    assert {s: p.labels.tolist() for s, p in found.parts.items()} == {
        "train": [0, 0],
        "val": [1],
        "test": [2],
    }
    alone = find_source(str(tree(tmp_path / "alone", {"test/c": 2})), tested=True)
    assert (alone.classes, list(alone.parts)) == (("c",), ["test"])
    for counts in ({"d": 0}, {}, {"test/c": 0, "val/c": 0}):
        root = tmp_path / f"bad{len(counts)}"
        root.mkdir()
        with pytest.raises(DataError, match=r"no class folders|no images in any class"):
            find_source(str(tree(root, counts)), tested=True)


def test_a_set_one_level_too_high_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        find_source(str(tree(tmp_path / "x", {"flowers/a": 1, "flowers/b": 1})))
    assert str(tmp_path / "x" / "flowers") in caught.value.fix


def test_loops_pipes_and_links(tmp_path: Path) -> None:
    root = tree(tmp_path / "x", {"a": 2, "b": 1})
    elsewhere = tree(tmp_path / "elsewhere", {"inner": 1})
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "b" / "more").symlink_to(elsewhere)
    (elsewhere / "inner" / "back").symlink_to(elsewhere)
    (root / "b" / "one.png").symlink_to(root / "a" / "0.png")
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "ring.png").symlink_to("ring.png")
    (root / "b" / "unmounted").symlink_to("/no/such/disk")
    (root / "notes.txt").symlink_to("/no/such/disk/notes.txt")
    (root / "c").symlink_to("/no/such/disk/c")
    source = find_source(str(root))
    assert list(source.parts["train"].ids) == [
        "a/0.png",
        "a/1.png",
        "b/0.png",
        "b/more/inner/0.png",
        "b/one.png",
    ]
    assert source.notes == (
        "6 links to nothing, pipes or devices were left out: a/pipe.png, a/ring.png, b/gone.png, "
        "b/unmounted, c and 1 more",
    )


def test_classes_on_a_disk_that_is_away(tmp_path: Path) -> None:
    disk = tree(tmp_path / "disk", {"a": 2, "b": 2})
    root = tmp_path / "x"
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.png").symlink_to(disk / name / f"{i}.png")
    assert len(find_source(str(root)).parts["train"].labels) == 4
    (disk / "a").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"without images: a; links to nothing.*: a/0.png, a/1.png"):
        find_source(str(root))
    tree(root, {"train/a": 1, "train/b": 1})
    (root / "val").symlink_to("/no/such/disk/val")
    assert any("left out: " in note and "val" in note for note in find_source(str(root)).notes)


def test_a_link_to_itself_hinders_nothing(data_root: Path) -> None:
    tree(data_root / "pets", {"a": 1, "b": 1})
    tree(data_root / "kmnist" / "train", {"a": 1, "b": 1})
    for place in (data_root, data_root / "kmnist", data_root / "pets", data_root / "pets" / "a"):
        (place / "train.tar").symlink_to("train.tar")
    (data_root / "ring").symlink_to("ring")
    (data_root / "kmnist" / "test").symlink_to("test")
    assert known_names() == [*SOURCES, "pets"]
    assert find_source("pets").classes == ("a", "b")
    assert find_source("kmnist").classes == ("a", "b")
    with pytest.raises(UsageError, match="unknown data"):
        find_source("ring")


def test_shards_on_a_disk_that_is_away_are_named(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train-0.tar").write_bytes(b"")
    (tmp_path / "x" / "train-1.tar").symlink_to("/no/such/disk/train-1.tar")
    with pytest.raises(DataError, match=r"1 shards are links to nothing.*: train-1.tar"):
        find_source(str(tmp_path / "x"))


def test_a_long_scan_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "x", {"a": 2, "b": 2})
    find_source(str(root))
    assert not capsys.readouterr().err
    monkeypatch.setattr(image_folder, "NOTICE_AFTER_S", 0.0)
    find_source(str(root))
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{root}: looking for images, {n} files so far" for n in (2, 4)]


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = picture(tmp_path / "one.png").read_bytes()
    root = tmp_path / "x"
    for name in map(str, range(10)):
        (root / name).mkdir(parents=True)
        for i in range(10_000):
            (root / name / f"{i}.png").write_bytes(content)
    start = time.perf_counter()
    part = find_source(str(root)).parts["train"]
    seconds = time.perf_counter() - start
    assert len(part.labels) == 100_000
    assert seconds < 60
    with capsys.disabled():
        print(f"\n100,000 files found in {seconds:.2f} s")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    root = tree(tmp_path / "x", {"a": 1, "b": 1})
    picture(root / "c.png").rename(os.fsdecode(os.fsencode(root / "a") + b"/\xff.png"))
    part = find_source(str(root)).parts["train"]
    assert "a/\\udcff.png" in part.ids
    for one in part.ids:
        one.encode()
    assert all(os.path.exists(path) for path in part.images)  # type: ignore[union-attr]


# ------------------------------------------------------------------ CSVs


def csv(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_csv_with_splits_and_groups(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / "img" / f"{i}.png", i)
    text = (
        "\ufeffPath;label;split;patient\nimg/0.png;b;train;p1\nimg/1.png;a;;p1\n"
        "img/2.png;a;training;p2\n\nimg/3.png;b;valid;p3\nimg/4.png;a;Test;p4\n"
    )
    source = find_source(csv(tmp_path / "all.csv", text), group="patient")
    assert source.classes == ("a", "b")
    train = source.parts["train"]
    assert train.labels.tolist() == [1, 0, 0]
    assert list(train.ids) == ["img/0.png", "img/1.png", "img/2.png"]
    assert train.groups == ["p1", "p1", "p2"]
    assert train.images[2] == str(tmp_path / "img" / "2.png")
    assert {s: len(p.labels) for s, p in source.parts.items()} == {"train": 3, "val": 1, "test": 1}
    with pytest.raises(UsageError, match="no column 'pacient'") as caught:
        find_source(str(tmp_path / "all.csv"), group="pacient")
    assert "patient" in caught.value.fix


def test_everything_wrong_with_a_csv_is_said_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.png")
    (tmp_path / "x.txt").write_text("x")
    text = (
        "path,label,split,g\n0.png,a,train,p\n1.png,b,train,q\ngone.png,a,train,r\n0.png,b,test,p\n"
        "1.png,,train,q\n1.png,b,tset,q\nx.txt,a,train,s\n1.png,c,test,q\nshort.png,a\n"
    )
    with pytest.raises(DataError) as caught:
        find_source(csv(tmp_path / "a.csv", text), group="g")
    for part in (
        "files that do not exist: gone.png",
        "lines without a label: line 6",
        "not train, val or test: tset",
        "no images by their extension: x.txt",
        "missing cells: line 10",
        "files with two labels: 0.png, 1.png",
        "files in two splits: 0.png, 1.png",
        "groups in two splits: p, q",
        "classes in test that train lacks: c",
    ):
        assert part in caught.value.what


@pytest.mark.parametrize(
    ("text", "message", "classes"),
    [
        ("0.png,a,\n1.png,a,\n", "only one class: a", ("a",)),
        (
            "0.png,a,\n1.png,b,test\n",
            "only one class: a; classes in test that train lacks: b",
            ("a", "b"),
        ),
        ("0.png,a,test\n1.png,b,test\n", "no training images", ("a", "b")),
    ],
)
def test_one_class_in_a_csv(
    tmp_path: Path, text: str, message: str, classes: tuple[str, ...]
) -> None:
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.png")
    name = csv(tmp_path / "a.csv", f"path,label,split\n{text}")
    with pytest.raises(DataError, match=message):
        find_source(name)
    assert find_source(name, tested=True).classes == classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no images"),
        (b"path,label\n", "lists no images"),
        (b"a,b\n1,2\n", "no column 'path'"),
        (b"path,x\n1,2\n", "no column 'label'"),
        (b"path,label\n\xff\xfe,1\n", "not UTF-8"),
    ],
)
def test_files_that_are_no_such_csv(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_source(str(tmp_path / "a.csv"))


# ------------------------------------------------------------------ names


def test_where_a_name_is_looked_for(data_root: Path, tmp_path: Path) -> None:
    tree(data_root / "pets", {"a": 1, "b": 1})
    tree(Path("data") / "plants", {"c": 1, "d": 1})
    assert find_source("pets").classes == ("a", "b")
    assert find_source("plants").classes == ("c", "d")
    tree(Path("pets"), {"e": 1, "f": 1})
    assert find_source("pets").classes == ("e", "f")
    assert known_names() == [*SOURCES, "pets", "plants"]
    for path in ("a/b", "x.csv", "."):
        assert known_names(path)[-1] == path
    assert "mnits" not in known_names("mnits")


def test_names_that_are_not_found(data_root: Path, tmp_path: Path) -> None:
    tree(data_root / "petals", {"a": 1, "b": 1})
    for wrong, near in (("mnits", "mnist"), ("petal", "petals"), ("cifar", "cifar10")):
        with pytest.raises(UsageError, match="unknown data") as caught:
            find_source(wrong)
        assert near in caught.value.fix
    for path in ("some/where", "./x", "list.csv", str(tmp_path / "no")):
        with pytest.raises(DataError, match="no such file or folder"):
            find_source(path)
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="no CSV") as caught_data:
        find_source(str(tmp_path / "a.zip"))
    assert "unpack" in caught_data.value.fix


def test_keys_that_do_not_apply(data_root: Path) -> None:
    tree(data_root / "pets", {"a": 1, "b": 1})
    with pytest.raises(UsageError, match=r"data\.count"):
        find_source("digits", count=100)
    for name in ("digits", "pets"):
        with pytest.raises(UsageError, match=r"data\.group"):
            find_source(name, group="patient")

"""Built-in data sets in each of their formats, and the names by which data are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from convlens.data.layout import ClassChoice
from convlens.data.shard_writer import write_shards
from convlens.data.sources import (
    SHAPES,
    SOURCES,
    canonical_name,
    find_configured_source,
    find_source,
    is_same_data,
    known_names,
)
from convlens.data.types import DataSource
from convlens.errors import DataError, UsageError
from convlens.recipe import load_recipe
from helpers.commands import constant_model, here, refused
from helpers.datasets import (
    all_pixels,
    cifar10_files,
    write_class_folders,
    write_idx_files,
    write_image,
)

pytestmark = pytest.mark.usefixtures("data_root")


def test_digits_are_scikit_learns() -> None:
    source = find_source("digits")
    part = source.parts["train"]
    assert source.classes == tuple("0123456789")
    assert part.images.shape == (1797, 1, 8, 8)  # type: ignore[union-attr]
    images = all_pixels(part)
    assert images.max() == 255
    # The first image is a 0; its first row is 0 0 5 13 9 1 0 0, in 0..16.
    np.testing.assert_array_equal(images[0, 0, 0], [0, 0, 80, 207, 143, 16, 0, 0])
    assert part.labels[:10].tolist() == list(range(10))


def test_a_shape_depends_only_on_its_number() -> None:
    small, large = find_source("shapes", count=40), find_source("shapes", count=400)
    pixels = all_pixels(large.parts["train"])
    np.testing.assert_array_equal(all_pixels(small.parts["train"]), pixels[:40])
    assert small.classes == SHAPES
    assert large.parts["train"].labels[:12].tolist() == [*range(10), 0, 1]
    images = large.parts["train"].images
    np.testing.assert_array_equal(images[np.array([377, 5])], pixels[[377, 5]])
    with pytest.raises(UsageError, match="at least 20"):
        find_source("shapes", count=5)


def test_shapes_have_the_requested_size() -> None:
    images = find_source("shapes").parts["train"].images
    assert images.shape == (2000, 3, 32, 32)
    images = find_source("shapes", count=20, image_size=61).parts["train"].images
    assert images.shape == (20, 3, 61, 61)


def test_shapes_are_not_linearly_separable() -> None:
    """Mean color and position do not give the class away: a linear model hardly learns it."""
    part = find_source("shapes", count=1200, image_size=16).parts["train"]
    pixels = all_pixels(part).reshape(1200, -1) / 255 - 0.5
    targets = np.eye(10)[part.labels]
    gram = pixels[:1000] @ pixels[:1000].T
    for ridge in (1.0, 100.0):
        dual = np.linalg.solve(gram + ridge * np.eye(1000), targets[:1000])
        preds = (pixels[1000:] @ (pixels[:1000].T @ dual)).argmax(axis=1)
        assert (preds == part.labels[1000:]).mean() < 0.4


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
)
def test_idx_sets_are_read_from_torchvisions_folders(
    data_root: Path, name: str, folder: str
) -> None:
    images = write_idx_files(data_root / folder / "raw")
    source = find_source(name)
    assert len(source.classes) == 10
    assert set(source.parts) == {"train", "test"}
    np.testing.assert_array_equal(all_pixels(source.parts["train"])[:, 0], images)
    part = source.parts["test"]
    np.testing.assert_array_equal(part.images[np.array([7, 3, 4])][:, 0], images[[7, 3, 4]])  # type: ignore[index]
    assert part.labels[:11].tolist() == [*range(10), 0]
    assert part.ids[3] == "test/3"


def test_a_truncated_idx_file_is_reported(data_root: Path) -> None:
    write_idx_files(data_root / "MNIST" / "raw")
    path = data_root / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-784])
    with pytest.raises(DataError, match="header") as caught:
        find_source("mnist")
    assert caught.value.where == str(path)


def test_cifar10_is_read_from_its_binary_files(data_root: Path) -> None:
    folder, files = data_root / "cifar-10-batches-bin", cifar10_files()
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    source = find_source("cifar10")
    assert source.classes[0] == "airplane"
    assert source.classes[9] == "truck"
    third = np.frombuffer(files["data_batch_3.bin"], np.uint8).reshape(4, 3073)
    train = source.parts["train"]
    assert train.labels[8:12].tolist() == [2, 3, 4, 9]
    np.testing.assert_array_equal(all_pixels(train)[8:12].reshape(4, -1), third[:, 1:])
    # Red first, rows within: byte 1 + 1024 + 32 is green at row 1, column 0.
    assert all_pixels(train)[8, 1, 1, 0] == third[0, 1 + 1024 + 32]
    assert len(source.parts["test"].labels) == 4
    (folder / "test_batch.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(DataError, match="not a whole number of 3073-byte records"):
        find_source("cifar10")


def test_cifar100_uses_the_fine_labels(data_root: Path) -> None:
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
def test_svhn_label_ten_is_zero(data_root: Path, folder: str) -> None:
    from scipy.io import savemat

    (data_root / folder).mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), np.uint8)
    for split in ("train", "test"):
        labels = np.array([[10], [1], [9], [10]], np.uint8)
        savemat(data_root / folder / f"{split}_32x32.mat", {"X": images, "y": labels})
    part = find_source("svhn").parts["test"]
    assert part.labels.tolist() == [0, 1, 9, 0]
    np.testing.assert_array_equal(all_pixels(part)[2], images[..., 2].transpose(2, 0, 1))


def test_stl10_is_read_column_by_column(data_root: Path) -> None:
    folder = data_root / "stl10_binary"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), np.uint8)
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(images.swapaxes(2, 3).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes([1, 10, 2]))
    part = find_source("stl10").parts["train"]
    assert part.labels.tolist() == [0, 9, 1]
    np.testing.assert_array_equal(all_pixels(part), images)


def test_a_built_in_set_as_an_image_folder_keeps_its_class_order(data_root: Path) -> None:
    names = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
    for split in ("train", "test"):
        write_class_folders(data_root / "kmnist" / split, dict.fromkeys(names, 2))
    source = find_source("kmnist")
    assert source.classes == tuple(names)
    assert source.parts["train"].labels.tolist() == np.repeat(range(10), 2).tolist()
    assert "o/0.png" in source.parts["train"].ids[0]


def test_a_path_has_priority_over_a_folder_in_the_data_roots(
    data_root: Path, tmp_path: Path
) -> None:
    write_class_folders(data_root / "pets", {"a": 1, "b": 1})
    write_class_folders(Path("data") / "plants", {"c": 1, "d": 1})
    assert find_source("pets").classes == ("a", "b")
    assert find_source("plants").classes == ("c", "d")
    write_class_folders(Path("pets"), {"e": 1, "f": 1})
    assert find_source("pets").classes == ("e", "f")
    assert known_names() == [*SOURCES, "pets", "plants"]
    for path in ("a/b", "x.csv", "."):
        assert known_names(path)[-1] == path
    assert "mnits" not in known_names("mnits")


def test_unknown_names_and_missing_paths_are_reported(data_root: Path, tmp_path: Path) -> None:
    write_class_folders(data_root / "petals", {"a": 1, "b": 1})
    for name, similar in (("mnits", "mnist"), ("petal", "petals"), ("cifar", "cifar10")):
        with pytest.raises(UsageError, match="unknown data") as caught:
            find_source(name)
        assert similar in caught.value.fix
    for path in ("some/where", "./x", "list.csv", str(tmp_path / "no")):
        with pytest.raises(DataError, match="no such file or folder"):
            find_source(path)
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="not a CSV or a tar") as caught_data:
        find_source(str(tmp_path / "a.zip"))
    assert "unpack" in caught_data.value.fix
    write_image(tmp_path / "one.png")
    with pytest.raises(DataError, match="not a CSV or a tar") as caught_data:
        find_source(str(tmp_path / "one.png"))
    assert "name the folder of all images" in caught_data.value.fix


@pytest.mark.parametrize(
    "name",
    ["https://host/x.zip", "http://host/set", "s3://bucket/set", "gs://b/{0..3}.tar", "hf://a/b"],
)
def test_an_address_says_that_a_set_must_be_here(name: str) -> None:
    with pytest.raises(DataError, match="must be a folder or a list on this machine") as caught:
        find_source(name)
    assert "download it, unpack it" in caught.value.fix
    assert canonical_name(name) == name


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "my pets", {"a": 1, "b": 1})
    for address in (f"file://{tmp_path}/my%20pets", f"file://localhost{tmp_path}/my pets/"):
        assert find_source(address).classes == ("a", "b")
        assert canonical_name(address) == canonical_name(str(tmp_path / "my pets"))
        assert is_same_data(address, str(tmp_path / "my pets"))
        assert address in known_names(address)
    with pytest.raises(DataError, match="no such file or folder") as caught:
        find_source(f"file://{tmp_path}/pets")
    assert caught.value.where == str(tmp_path / "pets")


def test_paths_of_windows_are_named() -> None:
    write_class_folders(Path("sets/pets"), {"a": 1, "b": 1})
    for name, fix in (
        ("C:\\my images\\pets", "under WSL, C:\\my images\\pets is /mnt/c/my images/pets"),
        ("\\\\server\\share", "mount the network folder"),
        ("sets\\pets", "did you mean sets/pets?"),
        ("sets\\gone", "with / between folders"),
    ):
        with pytest.raises(DataError, match="a path of Windows") as caught:
            find_source(name)
        assert fix in caught.value.fix
    with pytest.raises(DataError, match="no such file or folder") as caught:
        find_source("~nobody-here/pets")
    assert "~nobody-here is not a user of this machine" in caught.value.fix
    refused(here("train", "C:\\pets"), 3, "a path of Windows")
    refused(here("train", "https://host/pets.zip"), 3, "download it, unpack it")
    refused(here("audit", "s3://bucket/pets"), 3, "must be a folder or a list on this machine")


def test_options_that_do_not_apply_are_usage_errors(data_root: Path) -> None:
    write_class_folders(data_root / "pets", {"a": 1, "b": 1})
    with pytest.raises(UsageError, match=r"data\.count"):
        find_source("digits", count=100)
    for name in ("digits", "pets"):
        with pytest.raises(UsageError, match=r"data\.group"):
            find_source(name, group="patient")


def bincount(source: DataSource) -> dict[str, dict[str, int]]:
    """Return the number of images by split and class."""
    return {
        split: {
            name: int((part.labels == number).sum()) for number, name in enumerate(source.classes)
        }
        for split, part in source.parts.items()
    }


def test_classes_of_every_kind_of_source_can_be_chosen(data_root: Path) -> None:
    digits = find_source("digits", choice=ClassChoice(only=("8", "3", "1"), without=("8",)))
    assert bincount(digits) == {"train": {"1": 182, "3": 183}}
    pets = write_class_folders(data_root / "pets", {"cat": 3, "dog": 2, "emu": 1, "new folder": 0})
    write_image(pets / "emu" / "0.png", 77)
    choice = ClassChoice(without=("dog", "new folder"))
    expected = {"train": {"cat": 3, "emu": 1}}
    source = find_source("pets", choice=choice)
    assert bincount(source) == expected
    all_pets = find_source("pets", choice=ClassChoice(without=("new folder",)))
    rows = [f"pets/{image},{image.split('/')[0]}" for image in all_pets.parts["train"].ids]
    table = data_root / "pets.csv"
    table.write_text("\n".join(["path,label", *rows]))
    write_shards(all_pets, data_root / "tars")
    choice = ClassChoice(without=("dog",))
    for name in (str(table), "tars"):
        source = find_source(name, choice=choice)
        assert bincount(source) == expected
        images = source.parts["train"].images
        emu = source.parts["train"].labels.tolist().index(1)  # shards are shuffled
        assert images.read(emu) == (pets / "emu" / "0.png").read_bytes()  # type: ignore[union-attr]
    for name in ("digits", "pets", str(table), "tars"):
        with pytest.raises(UsageError, match="without names classes that do not exist: 33"):
            find_source(name, choice=ClassChoice(without=("33",)))


def test_small_classes_are_left_out_with_a_note(data_root: Path) -> None:
    counts = {"train/a": 4, "train/b": 3, "train/c": 1, "train/d": 0, "test/a": 1, "test/c": 9}
    write_class_folders(data_root / "pets", counts)
    source = find_source("pets", choice=ClassChoice(min_images=3))
    assert bincount(source) == {"train": {"a": 4, "b": 3}, "test": {"a": 1, "b": 0}}
    assert source.notes == (
        "2 of 4 classes have fewer than 3 training images and are left out: c (1), d (0)",
    )
    left = "1 classes are left: a; 3 of 4 classes have fewer"
    with pytest.raises(DataError, match=left) as caught:
        find_source("pets", choice=ClassChoice(min_images=4))
    assert "data.min_images" in caught.value.fix
    with pytest.raises(DataError, match="class folders in train without images: d") as caught:
        find_source("pets")
    assert caught.value.fix == "add images to them, or leave them out: data.without=[d]"


def test_images_are_grouped_by_a_regular_expression(data_root: Path) -> None:
    # As in GTSRB: class/track_number, with 30 pictures of each track.
    for name in (
        "00000/00000_00000",
        "00000/00000_00001",
        "00000/00001_00000",
        "00001/00000_00000",
    ):
        write_image(data_root / "signs" / f"{name}.ppm")
    tracks = ["00000/00000", "00000/00000", "00000/00001", "00001/00000"]
    for pattern in ("^(.*)_", r"^\d+/\d+(?=_)"):  # the first group, or the whole match
        assert find_source("signs", group=pattern).parts["train"].groups == tracks
    with pytest.raises(DataError, match="matches 3 of 4 images, but not: 00001/00000_00000"):
        find_source("signs", group="^00000/(.*)_")
    with pytest.raises(UsageError, match="matches no path like 00000/00000_00000"):
        find_source("signs", group="person(.*)_")
    with pytest.raises(UsageError, match="not a valid regular expression: missing"):
        find_source("signs", group="(")
    with pytest.raises(UsageError, match="applies only to image files"):
        find_source("digits", group="(.*)")


def test_groups_across_the_own_splits_of_a_set_are_noted(data_root: Path) -> None:
    for name in ("train/a/p1_0", "train/b/p2_0", "test/a/p1_7"):
        write_image(data_root / "x" / f"{name}.png")
    source = find_source("x", group=r"(p\d)_")
    assert source.parts["test"].groups == ["p1"]
    assert source.notes == ("1 groups are in more than one of the set's own splits: p1",)


def test_the_group_of_a_csv_is_a_column_or_a_regular_expression(data_root: Path) -> None:
    for name in ("a1_0", "a1_1", "b1_0"):
        write_image(data_root / f"{name}.png")
    path = data_root / "list.csv"
    path.write_text("path,label,a (b)\na1_0.png,a,x\na1_1.png,a,y\nb1_0.png,b,z\n")
    assert find_source(str(path), group="a (b)").parts["train"].groups == ["x", "y", "z"]
    assert find_source(str(path), group="^(.*)_").parts["train"].groups == ["a1", "a1", "b1"]
    with pytest.raises(UsageError, match=r"no column 'patient' for data\.group"):
        find_source(str(path), group="patient")


def test_the_keys_of_a_recipe_reach_the_source(data_root: Path) -> None:
    write_class_folders(data_root / "x", {"cat/a": 3, "cat/b": 1, "dog/a": 2, "test/c": 3})
    keys = ["layout=classes", "class_level=leaf", "without=test/c", "min_images=2", "group='(.)/'"]
    config = load_recipe("folder", ["data.name=x", *(f"data.{key}" for key in keys)]).data
    source = find_configured_source(config)
    assert bincount(source) == {"train": {"cat/a": 3, "dog/a": 2}}
    assert source.parts["train"].groups == ["t", "t", "t", "g", "g"]
    # A run of an earlier version has no such keys: the classes of its model choose the reading.
    write_class_folders(data_root / "vehicles", {"car": 1, "train": 2})
    config = load_recipe("folder", ["data.name=vehicles"]).data
    with pytest.raises(DataError, match="could be splits or classes: train"):
        find_configured_source(config)
    source = find_configured_source(config, known_classes=("car", "train"))
    assert bincount(source) == {"train": {"car": 1, "train": 2}}
    shapes = load_recipe("folder", ["data.name=shapes", "data.count=20", "data.image_size=24"])
    images = find_configured_source(shapes.data).parts["train"].images
    assert images.shape == (20, 3, 24, 24)  # type: ignore[union-attr]


def test_links_to_themselves_are_ignored(data_root: Path) -> None:
    write_class_folders(data_root / "pets", {"a": 1, "b": 1})
    write_class_folders(data_root / "kmnist" / "train", {"a": 1, "b": 1})
    for folder in (data_root, data_root / "kmnist", data_root / "pets", data_root / "pets" / "a"):
        (folder / "train.tar").symlink_to("train.tar")
    (data_root / "ring").symlink_to("ring")
    (data_root / "kmnist" / "test").symlink_to("test")
    assert known_names() == [*SOURCES, "pets"]
    assert find_source("pets").classes == ("a", "b")
    assert find_source("kmnist").classes == ("a", "b")
    with pytest.raises(UsageError, match="unknown data"):
        find_source("ring")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["./", ".//", "sub/../", "sub//.././", "link/../"]), max_size=4),
    st.sampled_from(["", "/", "//", "/.", "/a/.."]),
    st.booleans(),
)
def test_detours_do_not_change_the_canonical_name(
    detours: list[str], end: str, is_absolute: bool
) -> None:
    for folder in ("flowers/a", "sub"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if not Path("link").is_symlink():
        Path("link").symlink_to("sub")
    start = f"{Path.cwd()}/" if is_absolute else ""
    assert canonical_name("".join([start, *detours, "flowers", end])) == "flowers"


def test_every_spelling_of_a_path_has_one_canonical_name(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Path.cwd()
    for folder in ("flowers", "sub/birds", "digits", "~x"):
        write_class_folders(Path(folder), {"a": 1, "b": 1})
    write_class_folders(data_root / "plants", {"a": 1, "b": 1})
    write_class_folders(data_root / "flowers", {"a": 1, "b": 1})
    Path("list.csv").write_text("path,label\n")
    Path("link").symlink_to("sub")
    Path("../elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(work))
    same = {
        "flowers": ["flowers/", "./flowers", "sub/../flowers", "link/../flowers", "~/flowers"],
        "sub/birds": ["./sub//birds/", str(work / "sub/birds")],
        "list.csv": ["./list.csv", str(work / "list.csv")],
        "plants": [str(data_root / "plants"), f"{data_root}/./plants/"],
        "./digits": ["digits/", str(work / "digits")],
        "~x": ["./~x", str(work / "~x")],
        str(data_root / "flowers"): [f"{data_root}/flowers/"],
        str(work.parent / "elsewhere"): ["../elsewhere", "../elsewhere/"],
        ".": ["./", str(work)],
        "set-{0..3}.tar": ["./set-{0..3}.tar", str(work / "set-{0..3}.tar")],
    }
    for canonical, spellings in same.items():
        for spelling in (canonical, *spellings):
            assert canonical_name(spelling) == canonical, spelling
            assert is_same_data(spelling, canonical)
    for unchanged in ("digits", "mnist", "no/such/folder/", "unknwn", "", "a\0b"):
        assert canonical_name(unchanged) == unchanged
    # A link has its own name, but is the same set; equal names in two folders are not.
    assert canonical_name("link/birds") == "link/birds"
    assert is_same_data("link/birds", "sub/birds")
    assert not is_same_data("flowers", str(data_root / "flowers"))
    assert not is_same_data("digits", "./digits")


# What people type


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("MNIST", "mnist"),
        ("CIFAR10", "cifar10"),
        ("Cifar-100", "cifar100"),
        ("FashionMNIST", "fashion-mnist"),
        ("fashion_mnist", "fashion-mnist"),
    ],
)
def test_names_of_torchvision_are_explained(typed: str, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_source(typed)
    assert caught.value.fix.startswith(f"did you mean {name}?")
    refused(here("train", typed), 2, f"did you mean {name}?")
    refused(here("audit", typed), 2, f"unknown data {typed!r}", f"did you mean {name}?")


@pytest.mark.parametrize(
    ("file", "folders", "name"),
    [
        ("MNIST/raw/train-images-idx3-ubyte", ["MNIST", "data/MNIST/raw", "./data"], "mnist"),
        ("FashionMNIST/raw/t10k-labels-idx1-ubyte.gz", ["FashionMNIST"], "fashion-mnist"),
        ("cifar-10-batches-py/data_batch_1", ["data/cifar-10-batches-py"], "cifar10"),
        ("cifar-100-python/meta", ["cifar-100-python"], "cifar100"),
        ("stl10_binary/train_X.bin", ["stl10_binary"], "stl10"),
    ],
)
def test_folders_with_the_files_of_torchvision_are_named(
    file: str, folders: list[str], name: str
) -> None:
    path = Path("data") / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    for folder in folders:
        with pytest.raises(DataError, match=f"torchvision's files of {name}") as caught:
            find_source(folder)
        assert caught.value.fix == f"the data set is called {name}, e.g. `convlens train {name}`"
    assert known_names() == list(SOURCES)
    Path("data").rename("elsewhere")
    with pytest.raises(DataError, match=f"files of {name}") as caught:
        find_source(f"elsewhere/{file.split('/', maxsplit=1)[0]}")
    assert "it is searched for in " in caught.value.fix


def test_folders_without_images_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("weights", "flowers", "empty"):
        Path("sets", folder).mkdir(parents=True)
        Path("sets", folder, ".download.lock").touch()
    Path("sets/flowers/rose").mkdir()
    Path("sets/weights/resnet18.pth").touch()
    monkeypatch.setenv("CONVLENS_DATA", "sets")
    assert known_names() == [*SOURCES, "flowers"]
    with pytest.raises(UsageError, match="unknown data 'weigths'") as caught:
        find_source("weigths")
    assert "weights" not in caught.value.fix


def test_missing_data_has_the_same_exit_code_in_every_command() -> None:
    constant_model(Path("models/m"), [0, 1], ["a", "b"])
    for name, code in (("nothing", 2), ("nothing/", 3), ("./nothing", 3), ("nothing.csv", 3)):
        for typed in (
            f"train {name}",
            f"audit {name}",
            f"evaluate m --data {name}",
            f"evaluate m --data {name} data.images=x",
            f"export m --data {name}",
            f"shard {name} out",
        ):
            refused(here(*typed.split()), code, "nothing")

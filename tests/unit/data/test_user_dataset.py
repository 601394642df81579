"""Data sets of users: splits, images of every kind, labels, classes, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens import user_code
from convlens.data.decode import UnreadableImage
from convlens.data.sources import canonical_name, find_source, is_available
from convlens.data.user_dataset import DatasetImages, encode
from convlens.errors import ConvlensError, DataError, UsageError
from convlens.user_code import UntrustedCode
from helpers.commands import here, refused
from helpers.user_parts import forget_imports

HEAD = "import numpy as np\nimport torch\nfrom torch.utils.data import Dataset, TensorDataset\n\n"
NAME = "./mydata.py:make"
TWO_COLORS = (
    HEAD
    + '''
class make(Dataset):
    """Dark and bright images of different sizes, 30 for training and 10 for testing."""

    classes = ["dark", "bright"]

    def __init__(self, train):
        self.count, self.first = (30, 0) if train else (10, 100)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        number = self.first + index
        image = np.full((12, 10 + index % 3, 3), 180 * (index % 2) + number % 50, np.uint8)
        return image, index % 2
'''
)


@pytest.fixture(autouse=True)
def trusted() -> Iterator[None]:
    forget_imports()
    with user_code.trust(True):
        yield


def write(text: str) -> str:
    Path("mydata.py").write_text(HEAD + text)
    return NAME


def test_an_image_is_encoded_without_loss() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    color = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
    for image in (grey, Image.fromarray(grey), torch.tensor(grey), grey / np.float32(255)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(image)))), grey)
    for image in (color, Image.fromarray(color), torch.tensor(color).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(image)))), color)
    assert encode(grey) == b"P5\n4 3\n255\n" + grey.tobytes()
    with pytest.raises(UsageError):
        encode(np.zeros((3, 4), np.float32) + 7)


def test_a_class_with_the_keyword_train_has_two_splits() -> None:
    Path("mydata.py").write_text(TWO_COLORS)
    source = find_source(NAME)
    assert source.classes == ("dark", "bright")
    assert {split: len(part.labels) for split, part in source.parts.items()} == {
        "train": 30,
        "test": 10,
    }
    assert source.parts["test"].labels.tolist() == [0, 1] * 5
    images = source.parts["test"].images
    assert isinstance(images, DatasetImages)
    pixels = np.asarray(Image.open(io.BytesIO(images.read(3))))
    assert pixels.shape == (12, 10, 3)
    assert pixels[0, 0, 0] == 180 + 103 % 50


def test_a_function_with_the_keyword_split_may_lack_some() -> None:
    name = write(
        "def make(split):\n"
        "    if split == 'val':\n        return None\n"
        "    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)\n"
        "    images[:, 0, 0, 0] = torch.arange(4)\n"
        "    return TensorDataset(images, torch.tensor([3, 1, 3, 1]))"
    )
    source = find_source(name)
    assert sorted(source.parts) == ["test", "train"]
    assert source.classes == ("1", "3")
    assert source.parts["train"].labels.tolist() == [1, 0, 1, 0]


def test_parts_of_the_images_keep_their_order() -> None:
    Path("mydata.py").write_text(TWO_COLORS)
    parts = find_source(NAME).parts
    train, test = parts["train"].images, parts["test"].images
    assert isinstance(train, DatasetImages)
    assert isinstance(test, DatasetImages)
    both = train.subset(np.array([5, 2])).concat(test.subset(np.array([7])))
    assert [both.read(i) for i in range(3)] == [train.read(5), train.read(2), test.read(7)]
    assert len({each.stat_digest() for each in (train, test, both)}) == 3


def test_labels_may_be_texts() -> None:
    name = write(
        "def make():\n    return [(np.full((8, 8), i, np.uint8), 'ba'[i % 2]) for i in range(6)]"
    )
    source = find_source(name)
    assert source.classes == ("a", "b")
    assert source.parts["train"].labels.tolist() == [1, 0] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make():\n    return 3", "object of type 'int'"),
        ("def make():\n    return []", "has no training images"),
        ("def make():\n    return [1 / 0]", "ZeroDivisionError"),
        ("def make():\n    return [np.zeros((8, 8), np.uint8)] * 3", "ValueError"),
        ("def make():\n    return [(np.zeros((8, 8), np.uint8), 0.5)] * 3", "label 0.5 is neither"),
        ("def make():\n    return [('a.png', 0)] * 3", "UsageError"),
        (
            "class make(list):\n    classes = ['a']\n"
            "    def __init__(self):\n"
            "        super().__init__([(np.zeros((8, 8), np.uint8), 1)] * 2)",
            "labels from 1 to 1 for 1 classes",
        ),
        (
            "class make:\n    def __len__(self):\n        return 4\n"
            "    def __getitem__(self, index):\n"
            "        return np.random.randint(0, 256, (8, 8)).astype(np.uint8), index % 2",
            "another image each time",
        ),
    ],
)
def test_unsuitable_data_sets_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConvlensError, match=message):
        find_source(write(text))


def test_an_item_that_fails_later_is_an_unreadable_image() -> None:
    images = DatasetImages("x", [[("no image", 0)]], np.zeros((1, 2), np.int64), [b""])
    with pytest.raises(UnreadableImage, match="UsageError"):
        images.read(0)


def test_the_name_is_known_and_stays_as_it_is() -> None:
    Path("mydata.py").write_text(TWO_COLORS)
    assert is_available(NAME)
    assert canonical_name(NAME) == NAME
    Path("flowers.py:make").mkdir()  # a folder with such a name is a folder
    with pytest.raises(DataError):
        find_source("flowers.py:make")


def test_a_training_on_a_user_data_set_and_what_follows() -> None:
    Path("mydata.py").write_text(TWO_COLORS)
    with user_code.trust(False):
        done = here("train", NAME, "model.widths=[4]", "train.epochs=2", "model.weights=none")
    assert done.code == 0, done.err
    (folder,) = Path("models").iterdir()
    assert folder.name.startswith("make")
    run = convlens.Run.load(folder.name, trust_code=True)
    assert run.evaluate("test").n == 10
    assert run.recipe.code.keys() == {NAME}
    Path("mydata.py").unlink()  # the copy in the run is used
    forget_imports()
    assert run.evaluate("val").n > 0


class TestWithoutConsent:
    """No fixture trusts the code here."""

    @pytest.fixture(autouse=True)
    def trusted(self) -> None:
        forget_imports()

    def test_a_data_set_is_not_imported(self) -> None:
        write("raise AssertionError('imported')")
        with pytest.raises(UntrustedCode):
            find_source(NAME)
        refused(here("audit", NAME), 4, "needs user code, ./mydata.py:make")
        refused(here("evaluate", "--data", NAME, "x"), 2, "no run called")

    def test_an_audit_with_consent(self) -> None:
        Path("mydata.py").write_text(TWO_COLORS)
        done = here("audit", NAME, "--trust-code", "--json")
        assert done.code == 0, done.err
        assert "dark" in done.out

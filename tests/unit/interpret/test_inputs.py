"""What is looked at: runs and networks of libraries, and the images they are shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens.errors import DataError, UsageError
from convlens.interpret.inputs import (
    InspectedModel,
    open_inspected_model,
    select_pictures,
    worst_images,
)
from helpers.support import TINY


@pytest.fixture
def run() -> InspectedModel:
    convlens.train(TINY, name="small", quiet=True)
    return open_inspected_model("small", on="cpu")


def test_images_are_found_by_split_class_and_mistake(run: InspectedModel) -> None:
    test = run.split("test")
    one, *others = select_pictures(run, ["test:17", "class:3:2", "worst:4", "train:0"])
    assert (one.name, one.label) == ("test:17", int(test.labels[17]))
    assert torch.equal(one.pixels, test.rows.gather(torch.tensor([17]))[0])
    threes = (test.labels == run.classes.index("3")).nonzero()[:2, 0].tolist()
    assert [p.name for p in others[:2]] == [f"test:{i}" for i in threes]
    assert others[-1].name == "train:0"
    # The surest mistakes, by a loop.
    with torch.inference_mode():
        probs = run.model(run.prepared(test.rows.gather(torch.arange(len(test))))).softmax(1)
    wrong = [
        (float(row[label]), i)
        for i, (row, label) in enumerate(zip(probs, test.labels.tolist(), strict=True))
        if int(row.argmax()) != label
    ]
    assert worst_images(run, test).tolist() == [i for _, i in sorted(wrong)]
    assert [p.name for p in others[2:-1]] == [f"test:{i}" for _, i in sorted(wrong)[:4]]


def test_where_all_answers_are_right_there_is_no_worst(run: InspectedModel) -> None:
    test = run.split("test")
    with torch.inference_mode():
        answers = run.model(run.prepared(test.rows.gather(torch.arange(len(test))))).argmax(1)
    test.labels.copy_(answers)
    with pytest.raises(UsageError, match="no mistake on the test split"):
        select_pictures(run, ["worst:2"])


def test_showing_test_images_is_logged_once_a_subject(run: InspectedModel) -> None:
    assert run.place is not None
    before = len(run.place.evaluation_log())

    def shown() -> int:
        assert run.place is not None
        return len(run.place.evaluation_log()) - before

    select_pictures(run, ["val:0", "train:0"])
    assert shown() == 0
    select_pictures(run, ["test:1", "worst:1"])
    assert shown() == 1
    select_pictures(open_inspected_model("small", on="cpu"), ["class:3:1"])
    assert shown() == 2


def test_files_go_through_the_decoder_of_training(run: InspectedModel) -> None:
    Image.fromarray(np.full((20, 30, 3), 200, dtype=np.uint8)).save("grey.png")
    (picture,) = select_pictures(run, ["grey.png"])
    pre = run.loaded.preprocessing
    assert picture.pixels.shape == (pre.channels, pre.image_size, pre.image_size)
    assert (picture.name, picture.label, set(picture.pixels.flatten().tolist())) == (
        "grey.png",
        None,
        {200},
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["test:99999"], "test:99999 isn't there"),
        (["test:x"], "'x' is no number"),
        (["class:tree:2"], "unknown class 'tree'"),
        ([], "no images"),
    ],
)
def test_images_that_are_not_there(run: InspectedModel, asked: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        select_pictures(run, asked)


def test_files_that_are_no_images(run: InspectedModel) -> None:
    with open("broken.png", "wb") as file:
        file.write(b"nothing")
    with pytest.raises(DataError, match="can't be read"):
        select_pictures(run, ["broken.png"])
    with pytest.raises(DataError, match="there is no such file"):
        select_pictures(run, ["missing.png"])


def test_a_network_of_torchvision_is_looked_at_without_a_run() -> None:
    subject = open_inspected_model("squeezenet1_1:none", on="cpu")
    assert len(subject.classes) == 1000
    assert not subject.model.training
    assert subject.prepared(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape[2] == 224
    with pytest.raises(UsageError, match="no run of convlens"):
        subject.split("test")
    with pytest.raises(UsageError, match="no run called 'squeezenet9'"):
        open_inspected_model("squeezenet9", on="cpu")

"""Networks to inspect (runs and networks of libraries), the images they are shown, and samples."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens.errors import DataError, UsageError
from convlens.interpret.inputs import (
    InspectedModel,
    _check_position_kind,
    draw_sample,
    is_image_argument,
    is_split_position,
    open_inspected_model,
    select_pictures,
    worst_images,
)
from convlens.models import build_model
from helpers.commands import picture
from helpers.support import TINY, same


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `small`, whose test split has been used once."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convlens.train(TINY, name="small", quiet=True)
    return folder


@pytest.fixture
def run(trained: Path) -> InspectedModel:
    shutil.copytree(trained / "models", "models")
    return open_inspected_model("small", device="cpu")


def test_images_are_selected_by_split_class_and_mistake(run: InspectedModel) -> None:
    test = run.split("test")
    one, *others = select_pictures(run, ["test:17", "class:3:2", "worst:4", "train:0"])
    assert (one.name, one.label) == ("test:17", int(test.labels[17]))
    assert torch.equal(one.pixels, test.rows.gather(torch.tensor([17]))[0])
    threes = (test.labels == run.classes.index("3")).nonzero()[:2, 0].tolist()
    assert [p.name for p in others[:2]] == [f"test:{i}" for i in threes]
    assert others[-1].name == "train:0"
    # The worst mistakes, by a loop.
    with torch.inference_mode():
        logits = run.model(run.prepared(test.rows.gather(torch.arange(len(test)))))
        probs = (logits / run.loaded.calibration.temperature).softmax(1)
    wrong = [
        (float(row[label]), i)
        for i, (row, label) in enumerate(zip(probs, test.labels.tolist(), strict=True))
        if int(row.argmax()) != label
    ]
    assert worst_images(run, test).tolist() == [i for _, i in sorted(wrong)]
    assert [p.name for p in others[2:-1]] == [f"test:{i}" for _, i in sorted(wrong)[:4]]


def test_worst_images_of_a_perfect_network_are_refused(run: InspectedModel) -> None:
    test = run.split("test")
    with torch.inference_mode():
        preds = run.model(run.prepared(test.rows.gather(torch.arange(len(test))))).argmax(1)
    test.labels.copy_(preds)
    with pytest.raises(UsageError, match="no mistakes on the test split"):
        select_pictures(run, ["worst:2"])


def test_a_command_that_opened_the_test_split_logs_one_use(run: InspectedModel) -> None:
    assert run.run_dir is not None
    before = len(run.run_dir.evaluation_log())

    def logged() -> int:
        assert run.run_dir is not None
        return len(run.run_dir.evaluation_log()) - before

    select_pictures(run, ["val:0", "train:0"])
    run.log_test_use("look")
    assert logged() == 0
    select_pictures(run, ["test:1", "worst:1"])
    assert logged() == 0  # the command may still fail
    run.log_test_use("look")
    run.log_test_use("look")
    assert logged() == 1
    again = open_inspected_model("small", device="cpu")
    select_pictures(again, ["class:3:1"])
    again.log_test_use("look")
    assert logged() == 2


def test_positions_in_a_split_are_checked_before_the_split_is_loaded(
    run: InspectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InspectedModel, "split", None)
    with pytest.raises(UsageError, match="unknown class 'tre'"):
        select_pictures(run, ["class:3:2", "class:tre:2"])


def test_misspelled_positions_name_what_they_may_mean() -> None:
    for text, meant in (("wors:5", "worst:5"), ("clas:3:1", "class:3:1"), ("tset:1", "test:1")):
        with pytest.raises(UsageError, match="nor an image of a split") as caught:
            _check_position_kind(text)
        assert meant in caught.value.fix
    for text in ("resnet18:none", "resnt18:default", "small", "worst:5"):
        if not is_split_position(text):
            _check_position_kind(text)
    assert is_split_position("validation:3")
    assert not is_split_position("other:3")


def test_files_are_decoded_as_in_training(run: InspectedModel) -> None:
    Image.fromarray(np.full((20, 30, 3), 200, dtype=np.uint8)).save("grey.png")
    (grey,) = select_pictures(run, ["grey.png"])
    pre = run.loaded.preprocessing
    assert grey.pixels.shape == (pre.channels, pre.image_size, pre.image_size)
    assert (grey.name, grey.label, set(grey.pixels.flatten().tolist())) == (
        "grey.png",
        None,
        {200},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test:99999"], "test:99999 does not exist"),
        (["test:x"], "'x' is not a number"),
        (["class:tree:2"], "unknown class 'tree'"),
        (["class:3"], "the number of images is missing"),
        ([], "no images given"),
    ],
)
def test_unknown_images_are_refused(
    run: InspectedModel, arguments: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        select_pictures(run, arguments)


def test_unreadable_and_missing_files_are_refused(run: InspectedModel) -> None:
    with open("broken.png", "wb") as file:
        file.write(b"nothing")
    with pytest.raises(DataError, match="can't be read"):
        select_pictures(run, ["broken.png"])
    with pytest.raises(DataError, match="there is no such file"):
        select_pictures(run, ["missing.png"])


def test_network_of_torchvision_is_opened_without_a_run() -> None:
    subject = open_inspected_model("squeezenet1_1:none", device="cpu")
    assert len(subject.classes) == 1000
    assert not subject.model.training
    assert subject.prepared(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape[2] == 224
    with pytest.raises(UsageError, match="not a convlens run"):
        subject.split("test")
    with pytest.raises(UsageError, match="no run called 'squeezenet9'"):
        open_inspected_model("squeezenet9", device="cpu")


def test_a_network_of_a_library_has_as_many_outputs_as_its_weights() -> None:
    """The order of tensors in a file is not that of the layers."""
    network = build_model("squeezenet1_1", 7, 3, 224, {})
    tensors = dict(sorted(network.state_dict().items(), reverse=True))
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, "seven.pth")
    subject = open_inspected_model("squeezenet1_1:seven.pth", device="cpu")
    assert subject.classes == tuple("0123456")
    same(dict(subject.model.state_dict()), dict(network.state_dict()))


def test_samples_are_seeded_and_disjoint_from_training_samples(run: InspectedModel) -> None:
    for split in ("val", "test", "train"):
        sample = draw_sample(run, split, max_images=5)
        training = draw_sample(run, split, max_images=5000, training=True)
        assert not set(sample.ids) & set(training.ids)
        assert sample.ids == draw_sample(run, split, max_images=5).ids
        assert sample.ids != draw_sample(run, split, max_images=5, seed=1).ids
    trained = set(run.split("train").ids)
    assert set(draw_sample(run, "train", max_images=99).ids) < trained
    assert not set(draw_sample(run, "test", max_images=99).ids) & trained
    with pytest.raises(UsageError, match="unknown split 'tset'") as caught:
        draw_sample(run, "tset", max_images=9)
    assert "test" in caught.value.fix


def test_arguments_are_classified_as_networks_or_images() -> None:
    Path("models/x").mkdir(parents=True)
    Path("photos").mkdir()
    picture(Path("photos/a.png"), (1, 2, 3))
    Path("class:cat").write_text("")
    runs = ["x", "models/x", "resnet18:none", "timm/resnet18", "unknown", "a.safetensors"]
    for text in runs:
        assert not is_image_argument(text), text
    for text in ("photos", "photos/*.png", "none.png", "test:1", "worst:3", "class:cat:3"):
        assert is_image_argument(text), text

"""Fifteen common mistakes that silently give wrong numbers, each made on purpose.

Other tools shipped them, or users make them. Each is either reported by an error or a warning, or
it has no effect because the code has a single implementation of the step.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens import Run, serialization
from convlens.data.dataset import load_data, load_external_data
from convlens.data.decode import Conversion, decode, fit_arrays
from convlens.engine import inference
from convlens.engine.data_parallel import SplitSlice
from convlens.engine.inference import split_logits
from convlens.metrics import cross_entropy
from convlens.run import load_model
from helpers.commands import (
    COLORS,
    Done,
    brightness_model,
    constant_model,
    here,
    pictures,
    refused,
    sided_model,
    weights,
)
from helpers.support import PLAN, same

ROOT = Path(convlens.__file__).parent
NUMBERS = {"1": (220, 50, 40), "2": (40, 200, 60), "10": (40, 60, 220)}
SMALL = (
    "model.widths=[4,8]",
    "augment=[]",
    "optim.lr=0.01",
    "optim.ema=null",
    "train.batch_size=16",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on digits that uses everything that differs between training and testing."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = here(
            "train",
            "digits",
            *SMALL,
            "train.epochs=3",
            "model.dropout=0.2",
            "optim.ema=0.95",
            "optim.label_smoothing=0.3",
            "--no-test",
            "--name",
            "digits",
        )
        assert done.code == 0, done.err
    return folder / "models" / "digits"


@pytest.fixture
def digits(trained: Path) -> Run:
    """Return a copy of the run that a test may evaluate and damage."""
    return Run.load(shutil.copytree(trained, Path("models") / "digits"))


def files_of(run: Run, count: int) -> tuple[list[Path], np.ndarray]:
    """Write the first images of the test split into class folders; return paths and pixels."""
    data = load_data(run.recipe.data, memory_budget=1 << 30)
    test = data.unseal_test()
    pixels = test.rows.gather(torch.arange(count)).numpy()
    labels = [data.classes[label] for label in test.labels[:count].tolist()]
    paths = []
    for number, (label, image) in enumerate(zip(labels, pixels, strict=True)):
        path = Path("files") / label / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
        paths.append(path)
    return paths, pixels


def evaluate_changed(run: Run, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Done:
    """Change tensors and metadata of the model file, update its hash, and evaluate it."""
    path = run.path / "model.safetensors"
    tensors, model_metadata = serialization.read_model_file(path)
    del model_metadata["sha256"], model_metadata["format"]
    change(tensors, model_metadata)
    serialization.write_model_file(path, tensors, model_metadata)
    return here("evaluate", "digits")


@cache
def calls() -> list[tuple[str, str]]:
    """Return all function calls in convlens as module and full dotted name."""
    return [
        (str(path.relative_to(ROOT)), ast.unparse(node.func))
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]


def files_calling(name: str, full_name: str = "") -> set[str]:
    """Return the modules of convlens that call a function of this name (or full dotted name)."""
    if full_name:
        return {file for file, called in calls() if called == full_name}
    return {file for file, called in calls() if called.rpartition(".")[2] == name}


# 1


def test_labels_are_matched_by_name_in_any_order_of_the_folders() -> None:
    """Numeric names are in string order in training and in numeric order in the CSV."""
    pictures(Path("train"), dict.fromkeys(NUMBERS, 12), colors=NUMBERS)
    done = here("train", "train", *SMALL, "train.epochs=30", "--no-test", "--name", "numbers")
    assert done.code == 0, done.err
    run = Run.load("numbers")
    assert run.classes == ("1", "10", "2")
    pictures(Path("new"), dict.fromkeys(NUMBERS, 5), colors=NUMBERS, first=100)
    files = [path for name in NUMBERS for path in sorted((Path("new") / name).iterdir())]
    lines = ["path,label", *(f"{path},{path.parent.name}" for path in files)]
    Path("list.csv").write_text("\n".join(lines))
    listed = here("evaluate", "numbers", "--data", "list.csv", "--json").json
    assert listed["accuracy"] == 1.0
    assert listed["classes"] == ["1", "10", "2"]
    assert [answer.label for answer in run.predict(files)] == [path.parent.name for path in files]


# 2


def test_a_missing_class_folder_shifts_no_label(tmp_path: Path) -> None:
    """By position, `green` would be evaluated as `blue`, and `red` as `green`."""
    model = constant_model(tmp_path / "greens", [0.0, 2.0, 1.0], tuple(COLORS))
    root = pictures(Path("some"), {"green": 3, "red": 1})
    got = Run(model).evaluate(data=root)
    assert (got.correct, got.n) == (3, 4)
    assert got.confusion == [[0, 0, 0], [0, 3, 0], [0, 1, 0]]
    assert got.per_class["blue"]["n"] == 0


# 3


def test_swapped_class_names_in_a_model_file_are_refused(digits: Run) -> None:
    path = digits.path / "model.safetensors"
    content = path.read_bytes()
    names = rb"\"classes\": [\"0\", \"1\""
    assert names in content
    path.write_bytes(content.replace(names, rb"\"classes\": [\"1\", \"0\"", 1))
    refused(here("evaluate", "digits"), 4, "changed or damaged")
    # One class name is missing and the hash is right: the names do not match the weights.
    path.write_bytes(content)
    refused(
        evaluate_changed(digits, lambda _, model_metadata: model_metadata["classes"].pop()),
        4,
        "cannot be used by this version",
    )


# 4


def test_test_images_among_the_training_images_are_reported() -> None:
    pictures(Path("photos/train"), dict.fromkeys(COLORS, 12))
    pictures(Path("photos/test"), dict.fromkeys(COLORS, 4), first=500)
    shutil.copy("photos/test/red/501.png", "photos/train/red/another-name.png")
    done = here("audit", "photos")
    assert done.code == 0
    assert "across splits" in done.out + done.err
    found = here("audit", "photos", "--json").json["duplicates"]
    assert (found["groups"], found["across_splits"]) == (1, 1)
    assert sorted(found["listed"][0]["splits"]) == ["test", "train"]
    # Moved into the training folder after training: the evaluation is refused.
    done = here("train", "photos", *SMALL, "train.epochs=1", "--no-test", "--name", "photos")
    assert done.code == 0, done.err
    shutil.move("photos/test/red/502.png", "photos/train/red/502.png")
    refused(here("evaluate", "photos"), 3, "its test images may be among those it was trained on")


# 5


def test_all_inputs_get_the_normalization_of_training(digits: Run) -> None:
    """Mean and standard deviation are in the model file and applied in one place of the code."""
    paths, pixels = files_of(digits, 40)
    plain = [answer.prob for answer in digits.predict(paths)]
    assert [answer.prob for answer in digits.predict(pixels)] == plain
    # Floats are expected to be in 0..1.
    assert [answer.prob for answer in digits.predict(pixels / 255.0)] == plain
    scaled_twice = pixels.astype(np.float64)
    with pytest.raises(convlens.ConvlensError, match="range of float64 images"):
        digits.predict(scaled_twice)  # 0..255 as floats
    assert files_calling("Normalize") == {"run.py"}
    content = (digits.path / "model.safetensors").read_bytes()
    mean = load_model(digits.path / "model.safetensors").preprocessing.mean[0]
    damaged = content.replace(
        f'"mean\\": [{mean}'.encode(), f'"mean\\": [{0.5:.{len(str(mean)) - 2}f}'.encode(), 1
    )
    assert damaged != content
    (digits.path / "model.safetensors").write_bytes(damaged)
    refused(here("evaluate", "digits"), 4, "changed or damaged")


# 6


def test_images_are_rotated_as_exif_says(tmp_path: Path) -> None:
    """The bright half is on the left after the rotation by EXIF, and below in the stored pixels."""
    model = sided_model(tmp_path / "sided")
    upright = np.full((8, 8, 3), 20, np.uint8)
    upright[:, :4] = 230
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    root = Path("photos")
    for name in ("left", "right"):
        (root / name).mkdir(parents=True)
    stored.save(root / "left" / "turned.png", exif=exif)
    Image.fromarray(upright).save(root / "left" / "upright.png")
    Image.fromarray(upright[:, ::-1]).save(root / "right" / "mirrored.png")
    got = Run(model).evaluate(data=root)
    assert (got.correct, got.n) == (3, 3)
    answers = Run(model).predict(root)
    assert [answer.label for answer in answers] == ["left", "left", "right"]
    assert answers[0].prob == answers[1].prob
    # Training and evaluation use the same decoder.
    split, *_ = load_external_data(
        str(root), conversion=Conversion(8, 3, "stretch"), memory_budget=1 << 30
    )
    assert torch.equal(*split.rows.gather(torch.arange(2)).unbind())


# 7


def test_the_mode_of_an_image_file_does_not_matter(tmp_path: Path) -> None:
    """The same grey image is stored as RGB, RGBA, palette, 16 bit, CMYK and grey."""
    model = brightness_model(tmp_path / "bright")
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 2 + 100
    image = Image.fromarray(grey)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    modes = {
        "grey": image,
        "rgb": image.convert("RGB"),
        "rgba": image.convert("RGBA"),
        "palette": image.convert("P"),
        "sixteen": sixteen,
        "cmyk": image.convert("RGB").convert("CMYK"),
    }
    for name, stored in modes.items():
        suffix = "tiff" if name == "cmyk" else "png"
        Path("modes/light").mkdir(parents=True, exist_ok=True)
        stored.save(Path("modes/light") / f"{name}.{suffix}")
    pictures(Path("modes"), {"dark": 1}, colors={"dark": (5, 5, 5)})
    with pytest.warns(UserWarning, match="1 of 6 images have more than 8 bits per value"):
        answers = Run(model).predict("modes/light", top_k=2)
    assert len(answers) == len(modes)
    light = 1 / (1 + np.exp(-8 * (grey.mean() / 255 - 0.5)))
    for answer in answers:
        tolerance = (
            0.02 if "cmyk" in answer.filename else 1e-5
        )  # CMYK channels are rounded to 8 bits
        assert dict(answer.top)["light"] == pytest.approx(light, abs=tolerance), answer.filename
    got = Run(model).evaluate(data="modes")
    assert got.per_class["light"] == {"n": 6, "precision": 1.0, "recall": 1.0, "f1": 1.0}


# 8


def test_red_and_blue_are_never_exchanged(tmp_path: Path) -> None:
    """Nothing reads BGR: the only decoder is Pillow, in the order red, green, blue."""
    pure = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    for name, color in pure.items():
        for number in range(8):
            path = Path("pure") / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 + number, 8), color).save(path)
    split, classes, *_ = load_external_data(
        "pure", conversion=Conversion(8, 3, "stretch"), memory_budget=1 << 30
    )
    seen = split.rows.gather(torch.arange(16)).float().mean((2, 3))
    for label, color in zip(split.labels.tolist(), seen.tolist(), strict=True):
        assert tuple(color) == pure[classes[label]]
    run_dir = brightness_model(tmp_path / "reddish", classes=("blue", "red"))
    tensors, model_metadata = serialization.read_model_file(run_dir.model_path)
    kernel = torch.tensor([1.0, 0.0, -1.0])  # red without blue, instead of the mean
    tensors["stage1.0.weight"] = kernel.view_as(tensors["stage1.0.weight"])
    run_dir.save_model(
        tensors, {k: v for k, v in model_metadata.items() if k not in ("sha256", "format")}
    )
    array = np.stack([np.full((8, 8, 3), pure[name], np.uint8) for name in ("red", "blue")])
    assert [answer.label for answer in Run(run_dir).predict(array)] == ["red", "blue"]
    assert [answer.label for answer in Run(run_dir).predict("pure/red")] == ["red"] * 8
    assert Run(run_dir).evaluate(data="pure").accuracy == 1.0
    # The shard writer opens images only to re-encode them without loss; the program that is written
    # beside an exported model cannot import the decoder, and its pixels are compared with it.
    assert files_calling("open", "Image.open") == {"data/shard_writer.py", "predict_onnx.py"}
    assert files_calling("preinit") == {"data/decode.py"}
    for name in ("imread", "decode_image", "decode_jpeg", "read_image", "cvtColor"):
        assert not files_calling(name)


# 9


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_all_inputs_are_resized_as_in_training(fit: str) -> None:
    """A checkerboard becomes grey only if the resize averages pixels."""
    board = (np.indices((60, 40)).sum(0) % 2 * 255).astype(np.uint8)
    for name, image in {"board": board, "black": board * 0}.items():
        path = Path("set") / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(image).save(path)
    split, *_ = load_external_data("set", conversion=Conversion(8, 1, fit), memory_budget=1 << 30)
    trained_on = split.rows.gather(torch.tensor([1]))[0].numpy()
    predicted_on = decode(Path("set/board/0.png"), size=8, channels=1, fit=fit)
    as_array = fit_arrays(board[None, None], size=8, channels=1, fit=fit)[0]
    np.testing.assert_array_equal(trained_on, predicted_on)
    np.testing.assert_array_equal(trained_on, as_array)
    assert 0 < trained_on[0, 4, 4] < 255
    # The plots enlarge images only to draw them.
    assert files_calling("resize") == {"data/decode.py", "plots/style.py", "predict_onnx.py"}


# 10


def test_evaluation_ignores_a_network_left_in_training_mode(digits: Run) -> None:
    loaded = load_model(digits.path / "model.safetensors")
    data = load_data(digits.recipe.data, memory_budget=1 << 30)
    normalize = loaded.preprocessing.normalize
    right, _ = split_logits(loaded.model, data.val, normalize, PLAN)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    loaded.model.train()
    forgotten, _ = split_logits(loaded.model, data.val, normalize, PLAN)
    assert torch.equal(forgotten, right)
    assert all(torch.equal(before[k], v) for k, v in loaded.model.state_dict().items())
    # The test would notice: batch statistics and dropout give other logits.
    images = normalize(data.val.rows.gather(torch.arange(len(data.val))), PLAN)
    with torch.no_grad():
        assert not torch.allclose(loaded.model(images), right, atol=0.1)


# 11


def test_a_partial_last_batch_is_neither_padded_nor_dropped(
    digits: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image counts exactly once for any number of images and any batch size."""
    loaded = load_model(digits.path / "model.safetensors")
    test = load_data(digits.recipe.data, memory_budget=1 << 30).unseal_test()
    whole, labels = split_logits(loaded.model, test, loaded.preprocessing.normalize, PLAN)
    for batch in (1, 7, 256):
        monkeypatch.setattr(inference, "MAX_BATCH", batch)
        for count in (*range(1, 51), 255, 256, 257):
            part = SplitSlice(test, 0, count)
            logits, part_labels = split_logits(
                loaded.model, part, loaded.preprocessing.normalize, PLAN
            )
            assert len(logits) == len(part_labels) == count
            assert torch.equal(part_labels, labels[:count])
            torch.testing.assert_close(logits, whole[:count], rtol=1e-5, atol=1e-5)
    assert digits.evaluate("test").n == len(test)


# 12


def test_a_misspelled_key_is_refused() -> None:
    for key, suggestion in {
        "optim.lrr=0.1": "optim.lr",
        "train.lr=0.1": "train.lr",
        "data.image_sise=32": "data.image_size",
        "learning_rate=0.1": "learning_rate",
    }.items():
        refused(here("train", "digits", key), 2, suggestion)
    Path("mine.yaml").write_text("base: mnist\noptim: {weight_decays: 0.1}\n")
    refused(here("train", "mine.yaml"), 2, "weight_decays", "weight_decay")
    with pytest.raises(convlens.ConvlensError, match="epoch"):
        convlens.train("digits", {"train.epoch": 3})
    assert not Path("models").exists()


# 13


def test_the_test_split_does_not_influence_training(digits: Run) -> None:
    """Training never uses the test split, and each evaluation of it is counted."""
    for override in ("train.monitor=test_accuracy", "train.monitor=test_loss"):
        refused(here("train", "digits", override), 2, "monitor")
    data = load_data(digits.recipe.data, memory_budget=1 << 30)
    assert not {*data.unseal_test().ids} & {*data.train.ids, *data.val.ids}
    assert [digits.evaluate("test").looks for _ in range(3)] == [1, 2, 3]
    # With other test images training chooses the same weights, bit for bit.
    pictures(Path("photos/train"), dict.fromkeys(COLORS, 12))
    chosen = []
    for first in (500, 900):
        shutil.rmtree("photos/test", ignore_errors=True)
        pictures(Path("photos/test"), dict.fromkeys(COLORS, 4), first=first)
        done = here("train", "photos", *SMALL, "train.epochs=4", "--name", f"with-{first}")
        assert done.code == 0, done.err
        chosen.append(weights(Path("models") / f"with-{first}"))
    same(*chosen)
    results = [Run.load(f"with-{first}").results[0] for first in (500, 900)]
    assert results[0]["data_fingerprint"] != results[1]["data_fingerprint"]


# 14


def test_missing_renamed_or_short_weights_are_refused(digits: Run) -> None:
    """Otherwise the layer would keep its random weights, or the head would have another size."""

    def lost(tensors: dict[str, Any], _: Any) -> None:
        tensors.pop("classifier.weight")

    def renamed(tensors: dict[str, Any], _: Any) -> None:
        tensors["module.classifier.weight"] = tensors.pop("classifier.weight")

    def shorter(tensors: dict[str, Any], _: Any) -> None:
        tensors["classifier.weight"] = tensors["classifier.weight"][:9].clone()

    whole = (digits.path / "model.safetensors").read_bytes()
    for change in (lost, renamed, shorter):
        refused(evaluate_changed(digits, change), 4, "classifier.weight")
        (digits.path / "model.safetensors").write_bytes(whole)


# 15


def test_the_loss_is_that_of_the_chosen_weights_without_regularization(digits: Run) -> None:
    """Evaluation gives the plain cross-entropy of the averaged weights of the chosen epoch."""
    epoch = json.loads((digits.path / "run.json").read_text())["kept_epoch"]
    losses = [row["val_loss"] for row in digits.metrics]
    got = digits.evaluate("val")
    assert got.loss == pytest.approx(losses[epoch - 1], abs=1e-6)
    assert all(abs(got.loss - other) > 1e-3 for n, other in enumerate(losses, 1) if n != epoch)
    loaded = load_model(digits.path / "model.safetensors")
    data = load_data(digits.recipe.data, memory_budget=1 << 30)
    logits, labels = split_logits(loaded.model, data.val, loaded.preprocessing.normalize, PLAN)
    assert got.loss == pytest.approx(cross_entropy(logits.numpy(), labels.numpy()), abs=1e-6)
    smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    assert abs(float(smoothed) - got.loss) > 0.05  # the training loss

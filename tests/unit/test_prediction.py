"""Predictions for files and arrays, in all input and output formats."""

from __future__ import annotations

import copy
import csv
import io
import os
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

from convlens import Run, predict
from convlens.data.dataset import load_external_data
from convlens.data.decode import UnreadableImage, decode
from convlens.data.input_images import collect_inputs
from convlens.device import Plan
from convlens.engine.inference import split_logits
from convlens.errors import DataError, UsageError
from convlens.metrics import softmax
from convlens.prediction import (
    Prediction,
    Predictor,
    _top_classes,
    all_probabilities,
    iter_predictions,
)
from convlens.run import LoadedModel, RunDir, load_model
from convlens.uncertainty.calibration import ModelCalibration, OutlierDetector, ReservedOutputs
from helpers.commands import (
    brightness_model,
    command,
    constant_model,
    here,
    picture,
    pictures,
    refused,
    respect_file_permissions,
    sided_model,
)

DARK, LIGHT = (60, 50, 40), (200, 210, 190)


@pytest.fixture
def model(tmp_path: Path) -> RunDir:
    return brightness_model(tmp_path / "models" / "bright")


def files() -> list[Path]:
    return [picture(Path(f"{n}.png"), c, seed=n) for n, c in enumerate([DARK, LIGHT, DARK, LIGHT])]


def sigmoid(mean: float) -> float:
    """Return the probability of `light`: the logits are (0, 8 * (mean - 0.5))."""
    return float(1 / (1 + np.exp(-8 * (mean - 0.5))))


def test_probabilities_are_those_of_the_formula(model: RunDir) -> None:
    paths = files()
    for path, prediction in zip(paths, Run(model).predict(paths, top_k=2), strict=True):
        pixels = decode(path, size=8, channels=3, fit="stretch")
        light = sigmoid(float(pixels.mean()) / 255)
        assert prediction.label == ("light" if light > 0.5 else "dark")
        assert dict(prediction.top)["light"] == pytest.approx(light, abs=1e-5)
        assert sum(prob for _, prob in prediction.top) == pytest.approx(1)


def test_files_and_arrays_give_equal_predictions(model: RunDir) -> None:
    paths = files()
    by_file = Run(model).predict(paths, top_k=2)
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    for shape in (images, np.moveaxis(images, 3, 1), images / 255.0):
        by_array = Run(model).predict(shape, top_k=2)
        assert [each.top for each in by_array] == [each.top for each in by_file]
    assert [each.filename for each in by_array] == ["0", "1", "2", "3"]


def test_predictions_agree_with_the_evaluation_of_the_same_images(model: RunDir) -> None:
    root = pictures(Path("two"), {"dark": 9, "light": 8}, colors={"dark": DARK, "light": LIGHT})
    loaded = load_model(model.model_path)
    split, classes, *_ = load_external_data(
        str(root), conversion=loaded.preprocessing.conversion, memory_budget=1 << 30
    )
    plan = Plan("cpu", "fp32", "contiguous")
    logits, labels = split_logits(loaded.model, split, loaded.preprocessing.normalize, plan)
    probs = logits.double().softmax(1).numpy()
    predictions = Run(model).predict(root, top_k=2)
    assert [each.filename for each in predictions] == [str(root / i) for i in split.ids]
    for row, prediction in zip(probs, predictions, strict=True):
        assert [dict(prediction.top)[name] for name in loaded.classes] == pytest.approx(
            row, abs=1e-6
        )
    right = sum(
        each.label == classes[label]
        for each, label in zip(predictions, labels.tolist(), strict=True)
    )
    assert Run(model).evaluate(data=root).correct == right


def test_a_prediction_does_not_depend_on_the_batch(
    model: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(model.model_path)
    images = np.random.default_rng(0).integers(0, 256, (21, 3, 8, 8), dtype=np.uint8)
    together = all_probabilities(loaded, images)
    alone = np.concatenate([all_probabilities(loaded, images[i : i + 1]) for i in range(21)])
    np.testing.assert_allclose(alone, together, atol=1e-6)
    monkeypatch.setattr("convlens.prediction.MAX_BATCH_IMAGES", 4)
    np.testing.assert_allclose(all_probabilities(loaded, images), together, atol=1e-6)
    probs = [each.prob for each in iter_predictions(loaded, collect_inputs(images))]
    assert probs == pytest.approx(together.max(1), abs=1e-6)


def test_a_pattern_without_a_match_is_an_error(model: RunDir) -> None:
    refused(here("predict", model.path, "*.jpg"), 3, "not found: *.jpg")


def test_without_any_readable_file_no_others_are_mentioned(model: RunDir) -> None:
    done = here("predict", model.path, "lost.png")
    refused(done, 3, "1 of 1 files could not be read")
    assert "others" not in done.err


def test_a_missing_file_is_reported_and_the_others_are_classified(model: RunDir) -> None:
    files()
    done = here("predict", model.path, "0.png", "lost.png", "1.png")
    refused(done, 3, "1 of 3 files could not be read; the others were classified")
    lines = done.out.splitlines()
    assert lines[1] == "lost.png  unreadable: there is no such file"
    assert [line.split()[:2] for line in (lines[0], lines[2])] == [
        ["0.png", "dark"],
        ["1.png", "light"],
    ]
    (prediction,) = Run(model).predict("lost.png")
    assert (prediction.label, prediction.error) == (None, "there is no such file")


def test_links_and_pipes_in_a_folder_are_reported_with_a_reason(model: RunDir) -> None:
    root = pictures(Path("deep"), {"a": 2})
    (root / "a" / "gone.png").symlink_to("/no/such/disk/gone.png")
    (root / "a" / "ring.png").symlink_to("ring.png")
    (root / "a" / "up").symlink_to("..")
    (root / "disk").symlink_to("/no/such/disk")
    os.mkfifo(root / "pipe.png")
    done = here("predict", model.path, root)
    refused(done, 3, "3 of 5 files could not be read")
    reasons = {line.split()[0]: line.partition("  ")[2] for line in done.out.splitlines()}
    assert reasons["deep/a/gone.png"] == "unreadable: there is no such file"
    assert "symbolic links" in reasons["deep/a/ring.png"]
    assert reasons["deep/pipe.png"] == "unreadable: it is not a regular file"
    assert "deep: skipped 1 broken links" in done.err


def test_a_folder_without_permission_is_reported(model: RunDir) -> None:
    root = pictures(Path("deep"), {"a": 2, "closed": 2})
    (root / "closed").chmod(0)
    try:
        done = command("predict", model.path, root, before=respect_file_permissions)
    finally:
        (root / "closed").chmod(0o700)
    refused(done, 3, "1 of 3 files could not be read")
    assert "deep/closed  unreadable: no permission to read it" in done.out.splitlines()


def test_csv_has_a_row_for_each_file(model: RunDir) -> None:
    done = here("predict", model.path, *files(), "--format", "csv", "-k", "2")
    assert done.code == 0
    rows = list(csv.DictReader(io.StringIO(done.out)))
    columns = ["filename", "label", "prob", "label2", "prob2", "error"]
    assert list(rows[0]) == columns
    assert [row["filename"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert [row["label"] for row in rows] == ["dark", "light", "dark", "light"]
    assert [row["label2"] for row in rows] == ["light", "dark", "light", "dark"]
    for row in rows:
        assert float(row["prob"]) + float(row["prob2"]) == pytest.approx(1, abs=2e-6)


def test_json_is_a_single_object(model: RunDir) -> None:
    predictions = here("predict", model.path, *files(), "--json").json["predictions"]
    assert predictions == here("predict", model.path, *files(), "-f", "json").json["predictions"]
    assert [each["label"] for each in predictions] == ["dark", "light", "dark", "light"]
    assert predictions[0]["top"] == [{"label": "dark", "prob": predictions[0]["prob"]}]


def test_the_table_prints_names_that_look_like_markup(tmp_path: Path) -> None:
    run_dir = constant_model(tmp_path / "odd", [1.0, 0.0], ["[red]cat[/]", "dog"])
    done = here("predict", run_dir.path, picture(Path("[bold].png"), DARK), "-k", "5")
    assert done.out.splitlines() == ["[bold].png  [red]cat[/] 73.1%  dog 26.9%"]


def test_file_names_can_be_given_on_stdin(model: RunDir) -> None:
    files()
    text = "1.png\n\n  0.png  \n"
    for names in ([], ["-"]):
        predictions = here("predict", model.path, *names, "--json", stdin=text).json["predictions"]
        assert [each["filename"] for each in predictions] == ["1.png", "0.png"]


@pytest.mark.parametrize("given", [[], ["-"]])
def test_an_empty_stdin_is_a_usage_error(model: RunDir, given: list[str]) -> None:
    for form in ("json", "table"):
        done = here("predict", model.path, *given, "--format", form, stdin=" \n\n")
        refused(done, 2, "no image was named: standard input is empty", "convlens predict digits")
        assert done.out == ""


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_unreadable_files_are_reported_and_the_others_are_classified(
    model: RunDir, form: str
) -> None:
    Path("note.png").write_text("just a text")
    Path("nil.png").write_bytes(b"")
    content = picture(Path("whole.png"), LIGHT).read_bytes()
    Path("half.png").write_bytes(content[: len(content) // 2])
    done = here("predict", model.path, "note.png", "nil.png", "whole.png", "half.png", "-f", form)
    refused(done, 3, "3 of 4 files could not be read")
    for reason in ("it is text, not an image", "empty (0 bytes)", "cut short"):
        assert reason in done.out
    assert "light" in done.out


def test_the_error_for_an_unknown_format_lists_the_formats(model: RunDir) -> None:
    refused(here("predict", model.path, "x.png", "-f", "jsn"), 2, "unknown format", "json")


def test_usage_errors(model: RunDir) -> None:
    picture(Path("a.png"), DARK)
    for arguments in (["--tpo", "2"], ["--top", "0"], ["--top", "two"], ["--tta"]):
        done = here("predict", model.path, "a.png", *arguments)
        assert done.code == 2, arguments
        assert "--t" in done.err
        assert "Traceback" not in done.err
        assert done.out == ""
    refused(here("predict", f"{model.path}s", "a.png"), 4, "no such run", "check the path")


def test_top_k_is_limited_to_the_number_of_classes(model: RunDir) -> None:
    prediction = Run(model).predict(files()[0], top_k=9)[0]
    assert [name for name, _ in prediction.top] == ["dark", "light"]


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 5, 6, 2), np.uint8),
        np.full((2, 5, 6), 16.0),
        np.full((2, 5, 6), np.nan),
        np.full((2, 5, 6), 256),
        np.full((2, 5, 6), -1),
        np.full((2, 5, 6), "a"),
        np.full((2, 5, 6), None),
        np.zeros((1, 0, 30, 3), np.uint8),
        [np.zeros((8, 9, 3)), np.full((8, 9, 3), 2.0)],
    ],
    ids=["channels", "range", "nan", "over", "under", "text", "object", "pixels", "list"],
)
def test_arrays_that_do_not_hold_images_are_refused(model: RunDir, images: Any) -> None:
    with pytest.raises(UsageError):
        Run(model).predict(images)


def in_memory(path: Path) -> dict[str, Any]:
    """Return every form of one file."""
    pixels = np.asarray(Image.open(path))
    opaque = np.full(pixels.shape[:2], 255, np.uint8)
    return {
        "text": str(path),
        "bytes": path.read_bytes(),
        "BytesIO": io.BytesIO(path.read_bytes()),
        "PIL": Image.open(path),
        "PIL, RGBA": Image.open(path).convert("RGBA"),
        "[H, W, 3]": pixels,
        "[H, W, 4]": np.dstack([pixels, opaque]),
        "[1, H, W, 3]": pixels[None],
        "[1, 3, H, W]": np.moveaxis(pixels, 2, 0)[None],
        "[1, H, W, 4]": np.dstack([pixels, opaque])[None],
        "floats": pixels / 255,
        "float32": (pixels / 255).astype(np.float32),
        "int64": pixels.astype(np.int64),
        "tensor": torch.tensor(pixels),
        "tensor, channels first": torch.tensor(pixels).movedim(2, 0)[None],
    }


@pytest.mark.parametrize("size", [8, 13])
def test_every_form_of_an_image_has_the_prediction_of_its_file(model: RunDir, size: int) -> None:
    """`size` equals that of the model, or does not."""
    run = Run(model)
    path = picture(Path("a.png"), (70, 160, 150), size=size)
    (expected,) = run.predict(path, top_k=2)
    forms = in_memory(path)
    for name, form in forms.items():
        (prediction,) = run.predict(form, top_k=2)
        assert prediction.top == expected.top, name
    together = run.predict(list(in_memory(path).values()), top_k=2)
    for name, each in zip(forms, together, strict=True):
        # A batch changes the last digits of a network's outputs.
        assert dict(each.top) == pytest.approx(dict(expected.top), abs=1e-6), name


def test_grey_images_of_every_type_have_the_prediction_of_their_file(model: RunDir) -> None:
    run = Run(model)
    path = picture(Path("grey.png"), (140,), size=11)
    pixels = np.asarray(Image.open(path))
    deep = pixels.astype(np.uint16) * 257
    Image.fromarray(deep).save("deep.png")
    (expected,) = run.predict(path, top_k=2)
    with pytest.warns(UserWarning, match="the first is deep.png"):
        assert run.predict("deep.png", top_k=2)[0].top == expected.top
    for form in (pixels, pixels[None], pixels[..., None], pixels[None, :, :, None]):
        assert run.predict(form, top_k=2)[0].top == expected.top
    assert run.predict(deep, range=(0, 65535), top_k=2)[0].top == expected.top
    assert run.predict(deep // 257 * 16, range=(0, 4080), top_k=2)[0].top == expected.top
    with pytest.raises(UsageError, match="range of uint16 images"):
        run.predict(deep)


def test_deep_files_for_a_model_of_8_bit_images_give_one_warning(model: RunDir) -> None:
    run = Run(model)
    pixels = np.random.default_rng(0).integers(0, 4096, (11, 11), np.uint16)
    Image.fromarray(pixels).save("deep.png")
    Image.fromarray(pixels.astype(np.float32)).save("deep.tif")
    picture(Path("plain.png"), DARK)
    names = ["plain.png", "deep.png", "deep.tif"]
    with pytest.warns(UserWarning, match="more than 8 bits") as caught:
        run.predict(names)
    (warning,) = caught
    assert str(warning.message).startswith(
        "2 of 3 images have more than 8 bits per value, the first is deep.png; "
    )
    assert "range=(low, high) gives the values" in str(warning.message)
    done = here("predict", model.path, *names)
    assert done.code == 0
    (line,) = (line for line in done.err.splitlines() if line.startswith("warning:"))
    assert "2 of 3 images" in line
    assert "--range LOW,HIGH" in line
    # With a range every form of the same values has the same prediction, and nothing is warned of.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forms = [*names[1:], Image.open("deep.png"), pixels, pixels.astype(np.float64)]
        tops = [run.predict(form, range=(0, 4095), top_k=2)[0].top for form in forms]
        assert run.predict("plain.png", range=(0, 4095)) == run.predict("plain.png")
    assert tops == [tops[0]] * 5
    done = here("predict", model.path, *names, "--range", "0,4095", "--json")
    assert "warning" not in done.err
    probs = [each["prob"] for each in done.json["predictions"]]
    assert probs[1:] == [pytest.approx(tops[0][0][1], abs=1e-6)] * 2
    refused(here("predict", model.path, "deep.png", "--range", "4095"), 2, "is not a range")


def test_values_that_are_not_numbers_are_black_in_files_and_arrays(model: RunDir) -> None:
    values = np.full((8, 8), 30, np.float32)
    values[:2] = np.nan
    Image.fromarray(values).save("hole.tif")
    run, outcomes = Run(model), []
    black = np.where(np.isnan(values), 20, values)
    (expected,) = run.predict(black, range=(20, 30), top_k=2)
    for form in ("hole.tif", Image.open("hole.tif"), values, values[None, None]):
        with pytest.warns(UserWarning, match=r"1 of 1 images have .* NaN or infinite \(25.0% of"):
            outcomes.append(run.predict(form, range=(20, 30), top_k=2)[0].top)
    assert outcomes == [expected.top] * 4
    with pytest.warns(UserWarning, match="NaN"):
        by_transform = run.transform("hole.tif", range=(20, 30))
    assert torch.equal(by_transform, run.transform(black, range=(20, 30)))
    with pytest.raises(UsageError, match=r"must be finite; 25.0% are NaN or infinite"):
        run.predict(values / 30)
    with pytest.raises(UsageError, match=r"must be finite; 100.0%"):
        run.predict(np.full((8, 8), np.nan), range=(0, 1))
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save("nothing.tif")
    (prediction,) = run.predict("nothing.tif")
    assert prediction.error == "none of its values is finite (all are NaN or infinity)"


def test_the_limit_of_pixels_can_be_changed(model: RunDir) -> None:
    loaded = load_model(model.model_path)
    loaded.preprocessing = replace(loaded.preprocessing, max_pixels=100)
    predictor = Predictor(loaded)
    picture(Path("a.png"), LIGHT, size=11)
    (refusal,) = predictor.predict("a.png")
    assert refusal.error == (
        "more than 100 pixels are refused (11 x 11); to raise the limit, set data.max_pixels, or "
        "--max-pixels of predict, look and serve"
    )
    assert predictor.predict("a.png", max_pixels=121)[0].label == "light"
    assert predictor.predict(Image.open("a.png"), max_pixels=121)[0].label == "light"
    assert predictor.transform("a.png", max_pixels=121).shape == (3, 8, 8)
    assert Run(model).predict("a.png", max_pixels=120)[0].error is not None
    refused(here("predict", model.path, "a.png", "--max-pixels", "120"), 3, "1 of 1 files")
    assert here("predict", model.path, "a.png", "--max-pixels", "121").code == 0
    refused(here("look", model.path, "a.png", "--max-pixels", "120"), 3, "more than 120 pixels")
    assert here("look", model.path, "a.png", "--max-pixels", "121").code == 0
    for wrong in (0, -1, 2.5, "many"):
        with pytest.raises(UsageError, match="max_pixels"):
            predictor.predict("a.png", max_pixels=wrong)  # type: ignore[arg-type]


def test_views_and_read_only_arrays_are_used_without_warnings(model: RunDir) -> None:
    run = Run(model)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    (expected,) = run.predict(pixels.copy())
    expected_tensor = run.transform(pixels)
    pixels.flags.writeable = False
    for view in (pixels, pixels[::-1][::-1], np.asfortranarray(pixels), pixels[None].data):
        array = np.asarray(view)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert run.predict(array) == [expected]
            assert torch.equal(run.transform(np.squeeze(array)), expected_tensor)


def test_a_range_in_the_model_applies_to_arrays(model: RunDir) -> None:
    loaded = load_model(model.model_path)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)
    (expected,) = Predictor(loaded).predict(pixels)
    loaded.preprocessing = replace(loaded.preprocessing, value_range=(-510.0, 510.0))
    predictor = Predictor(loaded)
    values = pixels.astype(np.float32) * 4 - 510
    Image.fromarray(values).save("deep.tif")
    (by_file,) = predictor.predict("deep.tif")
    assert by_file.top == expected.top
    assert predictor.predict(Image.open("deep.tif"))[0].top == expected.top
    assert predictor.predict(Image.fromarray(values)) == [expected]
    assert predictor.predict(values) == [expected]
    assert predictor.predict(pixels) == [expected]  # 8 bits are kept
    assert predictor.predict(values * 2, range=(-1020, 1020)) == [expected]


def test_transparent_parts_become_those_of_a_file(model: RunDir) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 9, 4), np.uint8)
    Image.fromarray(pixels).save("clear.png")
    expected = Run(model).predict("clear.png", top_k=2)[0].top
    for form in (pixels, pixels[None], np.moveaxis(pixels, 2, 0)[None], pixels / 255):
        assert Run(model).predict(form, top_k=2)[0].top == expected
    # Fully transparent black is white, as in files.
    assert Run(model).predict(np.zeros((9, 9, 4), np.uint8))[0].label == "light"


def test_transparent_parts_become_the_background_of_the_model(model: RunDir) -> None:
    loaded = load_model(model.model_path)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 9, 4), np.uint8)
    Image.fromarray(pixels).save("clear.png")
    tops = []
    for background in ("white", "#102030", "alpha"):
        loaded.preprocessing = replace(loaded.preprocessing, background=background)
        by_file, *others = Predictor(loaded).predict(
            ["clear.png", Image.fromarray(pixels), pixels, pixels[None]], top_k=2
        )
        for each in others:
            assert dict(each.top) == pytest.approx(dict(by_file.top), abs=1e-6)
        tops.append(by_file.top)
    assert len(set(tops)) == 3


def test_pil_images_are_turned_as_their_files_are(model: RunDir) -> None:
    sided = sided_model(Path("models/sided"))
    left = np.zeros((8, 8, 3), np.uint8)
    left[:, :4] = 255
    image = Image.fromarray(left)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save("turned.png", exif=exif)
    by_file = Run(sided).predict(["turned.png", left])
    assert [each.label for each in by_file] == ["right", "left"]
    opened = Image.open("turned.png")
    assert Run(sided).predict(opened)[0].label == "right"
    assert opened.size == image.size  # the caller's image stays as it is
    assert np.array_equal(np.asarray(opened), left)


def test_images_of_different_sizes_and_forms_keep_their_order(model: RunDir) -> None:
    paths = files()
    light = np.full((5, 7, 3), 220, np.uint8)
    dark_batch = np.zeros((40, 9, 8, 3), np.uint8)
    inputs = [
        paths[0],
        light,
        dark_batch,
        light[None],
        paths[1].read_bytes(),
        Image.new("L", (3, 2)),
    ]
    predictions = Run(model).predict(iter(inputs * 3))
    labels = ["dark", "light", *["dark"] * 40, "light", "light", "dark"]
    assert [each.label for each in predictions] == labels * 3
    assert [each.filename for each in predictions[:4]] == ["0.png", "1", "2", "3"]
    assert predictions[-1].filename == str(3 * 45 - 1)


def test_streams_that_cannot_be_decoded_are_reported_like_files(model: RunDir) -> None:
    content = picture(Path("a.png"), LIGHT).read_bytes()
    torn = Image.open(io.BytesIO(content[: len(content) // 2]))
    predictions = Run(model).predict([b"", b"text", content[:-20], content, torn])
    errors = [each.error for each in predictions]
    assert errors[:4] == [
        "it is empty (0 bytes)",
        "it is text, not an image",
        "the file is cut short",
        None,
    ]
    assert errors[4] == "the file is cut short"
    assert predictions[3].label == "light"


def test_an_opened_model_gives_the_predictions_of_the_run(model: RunDir) -> None:
    images = np.random.default_rng(0).integers(0, 256, (150, 9, 8, 3), np.uint8)
    opened = Run(model).open("cpu")
    expected = predict(model, images, top_k=2, tta="flip", device="cpu")
    for count in (1, 20, 150):  # fewer than a batch, and enough to time memory formats
        got = opened.predict(images[:count], top_k=2, tta="flip")
        for each, other in zip(got, expected[:count], strict=True):
            assert dict(each.top) == pytest.approx(dict(other.top), abs=1e-6)
            assert dict(each.tta_top) == pytest.approx(dict(other.tta_top), abs=1e-6)
    assert opened.predict([]) == []
    assert (opened.classes, opened.device) == (("dark", "light"), "cpu")
    assert not opened.module.training


def test_a_single_image_has_the_bits_of_a_plain_forward_pass(model: RunDir) -> None:
    """Decode, normalize, run the network, softmax, sort: nothing else may happen to an image."""
    loaded = load_model(model.model_path)
    pre, plan, opened = loaded.preprocessing, Plan("cpu", "fp32", "contiguous"), Run(model).open()
    for seed in range(3):
        image = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)
        path = Path(f"{seed}.png")
        Image.fromarray(image).save(path)
        pixels = torch.from_numpy(decode(path, size=8, channels=pre.channels, fit=pre.fit)[None])
        with torch.inference_mode():
            probs = softmax(loaded.model(pre.normalize(pixels, plan)).numpy())[0].tolist()
        ranked = sorted(zip(loaded.classes, probs, strict=True), key=lambda pair: -pair[1])
        for top_k in (1, 2):
            expected = tuple(ranked[:top_k])
            for form in (path, image):
                assert opened.predict(form, top_k=top_k)[0].top == expected
            (yielded,) = iter_predictions(loaded, path, top_k=top_k, device="cpu")
            assert yielded.top == expected


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), max_size=4))
def test_the_most_probable_class_is_the_first_of_all_in_order(weights: list[list[int]]) -> None:
    """With few values there are many ties, which the order of the classes decides."""
    probs = np.array(weights, np.float64).reshape(-1, 5)
    loaded = cast(LoadedModel, SimpleNamespace(classes=tuple("abcde")))
    expected = [sorted(zip("abcde", row, strict=True), key=lambda p: -p[1]) for row in probs]
    for k in (1, 2, 5):
        assert _top_classes(probs, k, loaded) == [tuple(row[:k]) for row in expected]


def test_predictions_are_yielded_for_every_form_of_images(model: RunDir) -> None:
    loaded = load_model(model.model_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 8, 3), np.uint8)
    expected = predict(model, images, device="cpu")
    forms: list[Any] = [images, list(images), collect_inputs(images), collect_inputs(images)[0]]
    for form in forms:
        got = list(iter_predictions(loaded, form, device="cpu", quiet=True))
        assert got == expected
    with pytest.raises(UsageError, match="'dict' is not an image"):
        list(iter_predictions(loaded, cast(Any, {"a": 1}), device="cpu"))


def test_an_opened_model_reads_its_file_once(
    model: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Run(model).open("cpu")
    model.model_path.unlink()
    assert opened.predict(np.full((8, 9, 3), 220, np.uint8))[0].label == "light"


def test_threads_share_an_opened_model(model: RunDir) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (9, 8, 3), np.uint8) for _ in range(8)]
    shared = Image.open(picture(Path("a.png"), LIGHT))  # loaded by the first thread that needs it
    opened = Run(model).open("cpu")
    expected = [opened.predict([image, shared], top_k=2) for image in images]
    shared = Image.open("a.png")
    barrier = threading.Barrier(8)

    def classify(number: int) -> list[list[Prediction]]:
        barrier.wait()
        return [opened.predict([images[number], shared], top_k=2) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for number, results in enumerate(pool.map(classify, range(8))):
            assert results == [expected[number]] * 10


def test_the_transform_makes_the_inputs_of_the_module(model: RunDir) -> None:
    run = Run(model)
    path = picture(Path("a.png"), (70, 160, 150), size=13)
    for image in (
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        np.asarray(Image.open(path)),
    ):
        tensor = run.transform(image)
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (3, 8, 8))
        with torch.no_grad():
            probs = run.module(tensor[None]).softmax(1)[0].tolist()
        (prediction,) = run.predict(image, top_k=2)
        expected = [dict(prediction.top)[name] for name in run.classes]
        assert probs == pytest.approx(expected, abs=1e-6)
    assert not run.module.training


def test_the_transform_takes_one_image(model: RunDir) -> None:
    transform = pickle.loads(pickle.dumps(Run(model).transform))  # for workers of a DataLoader
    assert transform(np.zeros((3, 8, 9), np.uint8)).shape == (3, 8, 8)  # a color image
    assert float(transform(np.full((8, 9), 16), range=(0, 16)).min()) == 1.0
    files()
    for several in (np.zeros((2, 8, 9, 3)), "?.png"):
        with pytest.raises(UsageError, match="takes one image, not"):
            transform(several)
    with pytest.raises(UnreadableImage):
        transform("lost.png")


def test_a_run_keeps_its_model_until_the_file_changes(tmp_path: Path) -> None:
    classes = ["one", "two"]
    run = Run(constant_model(tmp_path / "models" / "kept", [1.0, 0.0], classes))
    image = np.zeros((8, 9, 3), np.uint8)
    assert run.predict(image)[0].label == "one"
    module = run.module
    assert run.module is module
    with torch.no_grad():
        module.get_parameter("classifier.bias").copy_(torch.tensor([0.0, 9.0]))
    assert run.predict(image)[0].label == "one"  # the module is a copy of its own
    constant_model(tmp_path / "models" / "kept", [0.0, 1.0], classes)
    assert run.predict(image)[0].label == "two"
    assert run.module is not module
    copied = pickle.loads(pickle.dumps(run))
    assert copied.predict(image)[0].label == "two"


def test_predictions_are_short_and_show_a_table_in_notebooks(tmp_path: Path) -> None:
    run = Run(constant_model(tmp_path / "models" / "odd", [1.0, 0.0], ["<b>", "dog"]))
    good, bad = run.predict([np.zeros((8, 9, 3), np.uint8), "lost.png"], top_k=2)
    assert repr(good) == "Prediction('0', '<b>', 0.731)"
    assert repr(bad) == "Prediction('lost.png', unreadable: there is no such file)"
    assert "<td>&lt;b&gt;</td><td>73.1%</td>" in good._repr_html_()
    assert "there is no such file" in bad._repr_html_()


def test_images_of_an_array_are_numbered_across_batches(model: RunDir) -> None:
    pre = load_model(model.model_path).preprocessing
    images = np.zeros((300, pre.image_size, pre.image_size), np.uint8)  # three batches
    loaded = load_model(model.model_path)
    predictions = list(iter_predictions(loaded, collect_inputs(images), device="cpu", quiet=True))
    assert [each.filename for each in predictions] == [str(i) for i in range(300)]


def test_an_empty_array_has_no_predictions(model: RunDir) -> None:
    assert Run(model).predict(np.zeros((0, 8, 8, 3), np.uint8)) == []
    none = np.zeros((0, 3, 8, 8), np.uint8)
    assert all_probabilities(load_model(model.model_path), none).shape == (0, 2)


def test_a_gray_file_is_converted_to_the_channels_of_the_model(model: RunDir) -> None:
    path = picture(Path("grey.png"), (200,))
    assert Image.open(path).mode == "L"
    assert Run(model).predict(path)[0].label == "light"


# Calibration, abstaining, sets and unlike images. The brightness model's logits are
# (0, 8 * (mean - 0.5)), and its penultimate feature is the mean brightness.


def grays(*brightness: int) -> np.ndarray:
    return np.stack([np.full((8, 8, 3), value, np.uint8) for value in brightness])


def probability(brightness: int, temperature: float = 1.0) -> float:
    """Return the probability of `light`."""
    return float(1 / (1 + np.exp(-8 * (brightness / 255 - 0.5) / temperature)))


def calibrated(
    model: RunDir, *, temperature: float = 1.0, detector: OutlierDetector | None = None
) -> RunDir:
    """Add 100 reserved images: confidences 0.50 to 0.995, those below 0.6 wrong."""
    confidences = 0.5 + np.arange(100) / 200
    correct = confidences >= 0.6
    reserved = ReservedOutputs(
        confidences, np.where(correct, confidences, 1 - confidences), correct, candidates=1
    )
    model.add_calibration(ModelCalibration(temperature, 100, reserved, detector))
    return model


def test_temperature_changes_probabilities_but_no_label(model: RunDir) -> None:
    images = grays(10, 100, 140, 250)
    before = Run(model).predict(images, top_k=2)
    after = Run(calibrated(model, temperature=4.0)).predict(images, top_k=2)
    for value, one, other in zip((10, 100, 140, 250), before, after, strict=True):
        assert one.label == other.label
        assert dict(one.top)["light"] == pytest.approx(probability(value), abs=1e-6)
        assert dict(other.top)["light"] == pytest.approx(probability(value, 4), abs=1e-6)
    probs = all_probabilities(load_model(model.model_path), np.moveaxis(images, 3, 1))
    assert probs[:, 1].tolist() == [dict(each.top)["light"] for each in after]


def test_files_without_a_calibration_predict_as_before(model: RunDir) -> None:
    (prediction,) = Run(model).predict(grays(250))
    assert (prediction.unlike, prediction.unlike_score) == (None, None)
    picture(Path("a.png"), LIGHT)
    done = here("predict", model.path, "a.png", "--format", "csv")
    assert done.out.splitlines()[0] == "filename,label,prob,error"
    assert set(here("predict", model.path, "a.png", "--json").json["predictions"][0]) == {
        "filename",
        "label",
        "prob",
        "top",
    }


def test_unsure_images_have_no_label(model: RunDir) -> None:
    run = Run(calibrated(model))
    # 80 of 100 reserved images are correct and above 0.6; with fewer answers none is wrong.
    sure, unsure = run.predict(grays(250, 130), min_accuracy=0.9)
    assert (sure.label, sure.unsure) == ("light", False)
    assert (unsure.label, unsure.prob, unsure.unsure) == (None, None, True)
    assert unsure.top[0][0] == "light"
    for share in ("90%", "0.9", np.float32(0.9)):
        assert run.predict(grays(250, 130), min_accuracy=share) == [sure, unsure]
    for wrong in ("often", 90, True, None, [0.9]):
        for name in ("min_accuracy", "confidence", "prediction_set"):
            if wrong is not None or name == "confidence":
                with pytest.raises(UsageError, match=name):
                    run.predict(grays(250), **{"min_accuracy": 0.9, name: wrong})
    assert not any(each.unsure for each in run.predict(grays(250, 130)))
    # 90% confidence after 100 correct ones is less than 99.9%.
    with pytest.raises(UsageError, match="this model has 100"):
        run.predict(grays(250), min_accuracy=0.999)


def test_command_abstains_and_prints_sets(model: RunDir) -> None:
    calibrated(model)
    for name, value in (("a.png", 250), ("b.png", 130)):
        Image.fromarray(grays(value)[0]).save(name)
    options = ("--min-accuracy", "90%", "--prediction-set", "0.95")
    done = here("predict", model.path, "a.png", "b.png", *options)
    first, second = done.out.splitlines()
    assert first.startswith("a.png  light 97.9%")
    assert first.endswith("{light}")
    assert second.startswith("b.png  unsure (light 52.0%")
    assert second.endswith("{light, dark}")
    done = here("predict", model.path, "a.png", "b.png", *options, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["label"] for row in rows] == ["light", ""]
    assert [row["prob"] for row in rows] == [f"{probability(250):.6f}", ""]
    assert [row["unsure"] for row in rows] == ["0", "1"]
    assert [row["prediction_set"] for row in rows] == ["light", "light|dark"]
    listed = here("predict", model.path, "a.png", "b.png", *options, "--json").json["predictions"]
    assert [entry["label"] for entry in listed] == ["light", None]
    assert [entry["unsure"] for entry in listed] == [False, True]
    assert [entry["prediction_set"] for entry in listed] == [["light"], ["light", "dark"]]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--min-accuracy", "150%", "not between 0% and 100%"),
        ("--min-accuracy", "often", "--min-accuracy often: not between"),
        ("--prediction-set", "99.9%", "need at least 999 reserved validation images"),
        ("--min-accuracy", "99.9%", "needs at least 2,995 reserved validation images"),
    ],
)
def test_impossible_promises_are_refused(
    option: str, value: str, message: str, model: RunDir
) -> None:
    calibrated(model)
    picture(Path("a.png"), LIGHT)
    refused(here("predict", model.path, "a.png", option, value), 2, message)


def test_images_unlike_the_training_images_are_marked(model: RunDir) -> None:
    """The feature is one positive number, whose direction is always the same: energy decides."""
    reference = np.ones((3, 1), np.float16)
    by_energy = OutlierDetector(-1.0)
    scores = [
        each.unlike_score
        for each in Run(calibrated(model, detector=by_energy)).predict(grays(250, 20))
    ]
    # The energy of logits (0, x) is -log(1 + exp(x)).
    expected = [1 - np.log1p(np.exp(8 * (value / 255 - 0.5))) for value in (250, 20)]
    assert scores == pytest.approx(expected, abs=1e-5)
    by_features = OutlierDetector(-1.0, 0.5, 2, reference)
    found = Run(calibrated(model, detector=by_features)).predict(grays(250, 0))
    # Black has the feature 0, which has no direction: a distance of sqrt(2).
    assert [each.unlike for each in found] == [False, True]
    assert found[0].unlike_score == pytest.approx(-0.5, abs=1e-3)
    assert found[1].unlike_score == pytest.approx(np.sqrt(2) - 0.5)
    Image.fromarray(grays(0)[0]).save("a.png")
    done = here("predict", model.path, "a.png", "lost.png", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["unlike"] for row in rows] == ["1", ""]
    assert "(unlike the training images)" in here("predict", model.path, "a.png").out
    entry = here("predict", model.path, "a.png", "--json").json["predictions"][0]
    assert entry["unlike"] is True
    assert entry["unlike_score"] > 0


@pytest.mark.parametrize("uses_features", [False, True])
def test_one_file_has_the_prediction_of_a_list(model: RunDir, uses_features: bool) -> None:
    """A path and the bytes of a file take a shorter way, with the same bits."""
    detector = OutlierDetector(-1.0)
    if uses_features:
        detector = OutlierDetector(-1.0, 0.5, 2, np.ones((3, 1), np.float16))
    run = Run(calibrated(model, detector=detector))
    opened = run.open("cpu")
    picture(Path("a.png"), (90, 160, 150), size=13)
    Path("broken.png").write_bytes(b"no image")
    Path("empty.png").touch()
    Path("folder").mkdir()
    picture(Path("folder/b.png"), DARK)
    options: dict[str, Any]
    for options in ({}, {"top_k": 2}):
        by_name: list[Any] = ["a.png", Path("a.png"), "broken.png", "empty.png", "lost.png"]
        for name in [*by_name, "folder", "fold*"]:
            assert opened.predict(name, **options) == opened.predict([name], **options), name
        content = Path("a.png").read_bytes()
        assert opened.predict(content, **options) == opened.predict([content], **options)
        assert (
            opened.predict(content, **options)[0].top == opened.predict("a.png", **options)[0].top
        )
    assert opened.predict(Path("a.png"))[0].filename == "a.png"
    assert opened.predict(content)[0].filename == "0"
    with pytest.raises(DataError, match=r"not found: lost\*"):
        opened.predict("lost*")
    # A network that somebody has switched to training still predicts in eval mode.
    expected = opened.predict("a.png")
    opened.module.train()
    assert opened.predict("a.png") == expected
    assert opened.module.training


def test_one_image_is_compared_with_the_training_images_when_that_is_read(
    model: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = OutlierDetector.scores

    def counting(detector: OutlierDetector, *arguments: Any) -> Any:
        calls.append(arguments)
        return real(detector, *arguments)

    monkeypatch.setattr(OutlierDetector, "scores", counting)
    reference = np.ones((3, 1), np.float16)
    opened = Run(calibrated(model, detector=OutlierDetector(-1.0, 0.5, 2, reference))).open("cpu")
    picture(Path("a.png"), DARK)
    (prediction,) = opened.predict("a.png")
    assert prediction.label == "dark"
    assert not calls
    read = pickle.loads(pickle.dumps(prediction))
    assert len(calls) == 1
    assert read == prediction == copy.deepcopy(prediction)
    assert asdict(prediction)["unlike_score"] == prediction.unlike_score
    assert prediction.unlike is (cast(float, prediction.unlike_score) > 0)
    assert replace(prediction, unlike=None) != prediction
    assert len(calls) == 1
    # Several images are compared at once.
    several = opened.predict(["a.png", "a.png"])
    assert len(calls) == 2
    assert [each.unlike_score for each in several] == [prediction.unlike_score] * 2
    assert Prediction("a.png").unlike is None


def test_features_come_from_the_same_forward_pass(
    model: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    real = torch.nn.Module.__call__

    def counting(module: torch.nn.Module, *arguments: object, **options: object) -> object:
        if type(module).__name__ == "CNN":
            passes.append(module)
        return real(module, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", counting)
    reference = np.ones((3, 1), np.float16)
    calibrated(model, detector=OutlierDetector(-1.0, 0.5, 2, reference))
    run = Run(model)
    run.predict(grays(250))  # opens the model, which measures the batch size
    passes.clear()
    found = run.predict(grays(250, 0))
    assert len(passes) == 1
    with_views = run.predict(grays(250, 0), tta="flip")
    assert len(passes) == 3
    assert [each.unlike_score for each in with_views] == [each.unlike_score for each in found]

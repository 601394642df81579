"""Predictions for files and arrays, in all input and output formats."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convlens import Run
from convlens.data.dataset import load_external_data
from convlens.data.decode import Conversion, decode
from convlens.device import Plan
from convlens.engine.inference import split_logits
from convlens.errors import DataError, UsageError
from convlens.prediction import all_probabilities, channels_first, expand_paths, iter_predictions
from convlens.run import RunDir, load_model
from helpers.commands import (
    brightness_model,
    command,
    constant_model,
    here,
    picture,
    pictures,
    refused,
    respect_file_permissions,
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
        str(root), conversion=Conversion(8, 3, "stretch"), memory_budget=1 << 30
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
    images = np.random.default_rng(0).integers(0, 256, (21, 8, 8, 3), dtype=np.uint8)
    together = all_probabilities(loaded, images)
    alone = np.concatenate([all_probabilities(loaded, images[i : i + 1]) for i in range(21)])
    np.testing.assert_allclose(alone, together, atol=1e-6)
    monkeypatch.setattr("convlens.prediction.MAX_BATCH_IMAGES", 4)
    np.testing.assert_allclose(all_probabilities(loaded, images), together, atol=1e-6)
    probs = [each.prob for each in iter_predictions(loaded, images)]
    assert probs == pytest.approx(together.max(1), abs=1e-6)


def test_files_folders_and_globs_keep_the_given_order() -> None:
    inside = pictures(Path("deep"), {"b": 1, "a": 2})
    (inside / "notes.txt").write_text("no image")
    (inside / ".hidden.png").write_bytes(b"")
    odd = picture(Path("[x].png"), DARK)
    given = ["2.png", "deep", "[x].png", "?.png"]
    two, one = picture(Path("2.png"), DARK), picture(Path("1.png"), DARK)
    listed = ["deep/a/000.png", "deep/a/001.png", "deep/b/000.png"]
    assert expand_paths(given) == [str(two), *listed, str(odd), str(one), str(two)]
    assert expand_paths(["deep/**/*.png"]) == listed


def test_hidden_files_and_junk_folders_are_ignored() -> None:
    root = pictures(Path("deep"), {"a": 1, "a/b": 1})
    pictures(root, {"a/.ipynb_checkpoints": 1, "__MACOSX/a": 1, ".trash": 1, "b/@eaDir": 1})
    assert expand_paths(["deep"]) == ["deep/a/000.png", "deep/a/b/000.png"]
    assert expand_paths(["deep/.trash"]) == ["deep/.trash/000.png"]  # requested explicitly


def test_one_error_names_all_patterns_and_folders_without_images(model: RunDir) -> None:
    Path("empty").mkdir()
    pictures(Path("junk"), {".hidden": 1})
    with pytest.raises(DataError) as error:
        expand_paths([*files(), "*.jpg", "empty", "junk"])
    assert error.value.what == (
        "not found: *.jpg, empty (a folder without images), junk (a folder without images)"
    )
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
    for given in ([], ["-"]):
        predictions = here("predict", model.path, *given, "--json", stdin=text).json["predictions"]
        assert [each["filename"] for each in predictions] == ["1.png", "0.png"]
    for form in ("json", "table"):
        done = here("predict", model.path, "--format", form, stdin=" \n\n")
        assert done.code == 0
        assert done.err == "nothing to predict: no file was named on stdin\n"
        assert done.out == ('{"predictions": []}\n' if form == "json" else "")


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
        np.zeros((4, 4), np.uint8),
        np.zeros((2, 4, 4, 2), np.uint8),
        np.zeros((9, 12, 3), np.uint8),  # one color image, not nine gray ones
        np.full((2, 4, 4), 16.0),
        np.full((2, 4, 4), np.nan),
        np.full((2, 4, 4), 256),
        np.full((2, 4, 4), -1),
        np.full((2, 4, 4), "a"),
        np.full((2, 4, 4), None),
    ],
    ids=["2d", "channels", "one", "range", "nan", "over", "under", "text", "object"],
)
def test_arrays_that_do_not_hold_images_are_refused(model: RunDir, images: np.ndarray) -> None:
    with pytest.raises(UsageError):
        Run(model).predict(images)


def test_arrays_are_converted_to_uint8_nchw() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (5, 6, 6), dtype=np.uint8)
    np.testing.assert_array_equal(channels_first(gray), gray[:, None])
    np.testing.assert_array_equal(channels_first(gray[..., None]), gray[:, None])
    np.testing.assert_array_equal(channels_first(gray / 255), gray[:, None])
    np.testing.assert_array_equal(channels_first(gray.astype(np.int64)), gray[:, None])
    np.testing.assert_array_equal(channels_first(gray > 127), (gray > 127)[:, None] * 255)
    assert channels_first(gray).dtype == np.uint8


def test_a_list_of_arrays_is_refused_clearly(model: RunDir) -> None:
    with pytest.raises(UsageError, match="ndarray is not a path"):
        Run(model).predict([np.zeros((8, 8), np.uint8)])  # type: ignore[list-item]


def test_images_of_an_array_are_numbered_across_batches(model: RunDir) -> None:
    pre = load_model(model.model_path).preprocessing
    images = np.zeros((300, pre.image_size, pre.image_size), np.uint8)  # three batches
    loaded = load_model(model.model_path)
    predictions = list(iter_predictions(loaded, images, device="cpu", quiet=True))
    assert [each.filename for each in predictions] == [str(i) for i in range(300)]


def test_an_empty_array_has_no_predictions(model: RunDir) -> None:
    assert Run(model).predict(np.zeros((0, 8, 8, 3), np.uint8)) == []
    assert all_probabilities(load_model(model.model_path), np.zeros((0, 8, 8, 3))).shape == (0, 2)


def test_a_gray_file_is_converted_to_the_channels_of_the_model(model: RunDir) -> None:
    path = picture(Path("grey.png"), (200,))
    assert Image.open(path).mode == "L"
    assert Run(model).predict(path)[0].label == "light"

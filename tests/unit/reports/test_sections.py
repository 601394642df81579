"""Sections of the page of a run: verdict, confusion, calibration, recipe."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from convlens import recipe
from convlens.evaluation import CachedPredictions, TrainAccuracy
from convlens.metrics import summarize
from convlens.reports import sections
from convlens.reports.contents import ReportContents, gather_contents
from convlens.reports.html import Markup
from convlens.reports.sections import measure_calibration, run_verdict
from convlens.run import LoadedModel, RunDir
from convlens.uncertainty.calibration import ModelCalibration, OutlierDetector, ReservedOutputs
from helpers.reports import contents_of, split_of, two_class_contents


@pytest.mark.usefixtures("runs")
# Ids with a prefix, since the name of a section may be that of a mark (`data`).
@pytest.mark.parametrize("name", list(sections.SECTIONS), ids="section-{}".format)
def test_section_is_html_or_left_out(name: str) -> None:
    """For a complete run, one with numbers only, and one without anything."""
    render = sections.SECTIONS[name][1]
    for contents in (
        gather_contents("small", audit=True, device="cpu"),
        two_class_contents(),
        ReportContents(RunDir(Path("models/nothing"))),
    ):
        html = render(contents)
        assert html is None or (isinstance(html, Markup) and html.strip())
    if name not in sections.INSIDE_SECTIONS:
        assert render(gather_contents("small", audit=None, device="cpu")) is not None


def test_verdict_states_the_numbers() -> None:
    rows = [{"epoch": 1.0, "train_accuracy": 0.1}]  # on augmented images: not compared with
    train = TrainAccuracy(correct=999, n=1000, total=1000)
    assert run_verdict(two_class_contents(rows=rows, train_accuracy=train)) == (
        "75.0% of 4 test images are classified correctly (95% interval 30.1% to 95.4%); "
        "not distinguishable from always predicting 'a' (50.0%); "
        "24.9 points below the 99.9% on training images without augmentation (overfitting); its "
        "confidence agrees with its accuracy, as far as this many images can show."
    )
    train = TrainAccuracy(correct=1600, n=2000, total=50_000)
    assert (
        "not distinguishable from the 80.0% on 2,000 training images without augmentation"
        in run_verdict(two_class_contents(rows=rows, train_accuracy=train))
    )
    assert "training images" not in run_verdict(two_class_contents(rows=rows))


def test_the_environment_names_pretrained_weights_with_hash_and_licence() -> None:
    contents = ReportContents(RunDir(Path("models/nothing")))
    record = {"origin": "package <x> 0.1.0", "sha256": "ab" * 32, "licence": "Apache-2.0"}
    contents.metadata = {"weights": record}
    html = sections.environment_section(contents)
    assert html is not None
    for text in ("package &lt;x&gt; 0.1.0", "ab" * 32, "licence of these weights", "Apache-2.0"):
        assert text in html
    contents.metadata = {"weights": {"origin": "run x", "sha256": "ab"}, "created": "today"}
    html = sections.environment_section(contents)  # of an earlier version, without a licence
    assert html is not None
    assert "licence" not in html
    contents.metadata = {"weights": None, "created": "today"}
    html = sections.environment_section(contents)
    assert html is not None
    assert "pretrained" not in html


def test_gap_to_the_training_accuracy_follows_the_interval_of_the_difference() -> None:
    """231 of 379 against 1,184 of 1,769: z = 2.2, p = 0.03."""
    assert sections._train_gap(TrainAccuracy(1184, 1769, 1769), 231, 379) == (
        "6.0 points below the 66.9% on training images without augmentation (some overfitting)"
    )
    # The same shares of fewer training images.
    assert sections._train_gap(TrainAccuracy(67, 100, 100), 231, 379).startswith("not disting")
    assert "above the 60.0%" in sections._train_gap(TrainAccuracy(600, 1000, 1000), 380, 400)
    assert run_verdict(two_class_contents(summary=None)).startswith("Not evaluated: no images")


@pytest.mark.parametrize(
    ("confidence", "accuracy", "label"),
    [(0.9, 0.6, "overconfident"), (0.6, 0.9, "underconfident"), (0.8, 0.8, "within chance")],
)
def test_calibration_has_a_label(confidence: float, accuracy: float, label: str) -> None:
    logits = np.tile(np.log([confidence, 1 - confidence]), (1000, 1)).astype(np.float32)
    labels = (np.arange(1000) >= 1000 * accuracy).astype(np.int64)
    summary = summarize(logits, labels, ["a", "b"])
    calibration = measure_calibration(
        two_class_contents(predictions=CachedPredictions(logits, labels, ""), summary=summary)
    )
    assert calibration is not None
    assert calibration.label == label
    assert calibration.surplus == pytest.approx(confidence - accuracy, abs=1e-6)
    assert calibration.error == pytest.approx(abs(confidence - accuracy), abs=1e-6)


def test_most_frequent_confusions_come_first() -> None:
    table = np.array([[9, 2, 0], [5, 1, 0], [0, 2, 7]])
    assert sections.confused_pairs(table) == [(1, 0), (0, 1), (2, 1)]
    assert sections.confusion_cells(table) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (2, 2)]


def test_shades_follow_the_share_of_the_row() -> None:
    assert [sections.cell_shade(n, 100, True) for n in (0, 1, 50, 100)] == [0, 1, 4, 9]
    assert [sections.cell_shade(n, 100, False) for n in (0, 1, 25, 100)] == [0, 1, 4, 9]


def test_many_classes_are_a_list_and_one_class_is_a_table() -> None:
    labels = [k for k in range(110) for _ in range(2)]
    preds = [(k + 1) % 110 for k in labels]
    html = sections.confusion_section(contents_of("many", preds, labels, 110))
    assert html is not None
    assert "110 classes are too many for a readable table" in html
    assert html.count('scope="row"') == sections.MAX_PAIRS
    correct = sections.confusion_section(contents_of("correct", labels, labels, 110))
    assert correct is not None
    assert "All test images are classified correctly" in correct
    one = sections.confusion_section(contents_of("one", [0, 0], [0, 0], 1))
    assert one is not None
    assert one.count("<td") == 2  # the corner and the cell


def test_cell_shows_the_most_confident_mistakes_first() -> None:
    logits = np.array([[1, 0], [3, 0], [0, 1], [2, 0], [4, 0]], np.float32)
    labels = np.array([1, 1, 1, 0, 0])
    contents = contents_of("x", [0, 0, 1, 0, 0], labels.tolist())
    contents.predictions = CachedPredictions(logits, labels, "")
    contents.images = split_of(torch.zeros(5, 1, 4, 4, dtype=torch.uint8))
    shown = sections._cell_images(contents, [(1, 0), (0, 0)])
    assert [image[1] for image in shown["1-0"]["images"]] == ["1.png", "0.png"]
    assert [image[1] for image in shown["0-0"]["images"]] == [
        "3.png",
        "4.png",
    ]  # least confident first
    assert shown["1-0"]["images"][0][2] == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-4)


def test_changes_to_a_published_recipe_are_marked() -> None:
    published = recipe.load_recipe("mnist")
    assert sections.recipe_differences(published) == []
    changed = published.replace(**{"optim.lr": 0.123, "train.epochs": 7})
    lr, epochs = str(published.optim.lr), str(published.train.epochs)
    assert sections.recipe_differences(changed) == [
        ("optim.lr", "0.123", lr),
        ("train.epochs", "7", epochs),
    ]
    assert sections.recipe_differences(changed.model_copy(update={"name": "mine"})) == []


def test_run_names_in_commands_are_quoted() -> None:
    contents = contents_of("it's; rm -rf x", [0], [0])
    contents.recipe = recipe.load_recipe("mnist")
    html = sections.reproduce_section(contents)
    assert html is not None
    assert "convlens report &#39;it&#39;&#34;&#39;&#34;&#39;s; rm -rf x&#39;" in html


@pytest.mark.figures
def test_trust_section_states_promises_and_limits() -> None:
    random = np.random.default_rng(0)
    logits = np.stack([np.zeros(400), np.full(400, 2.0)], axis=1).astype(np.float32)
    labels = (random.random(400) < 0.9).astype(np.int64)
    calibration = ModelCalibration(
        0.5,
        100,
        ReservedOutputs(np.full(200, 0.9), np.full(200, 0.9), np.ones(200, bool), candidates=4),
        OutlierDetector(None, 0.25, 3, np.ones((50, 2), np.float16)),
    )
    loaded = LoadedModel(torch.nn.Identity(), ("a", "b"), None, {}, None, calibration)  # type: ignore[arg-type]
    contents = two_class_contents(
        predictions=CachedPredictions(logits, labels, "", 0.5),
        summary=summarize(logits, labels, ["a", "b"], 0.5),
        loaded=loaded,
    )
    html = sections.trust_section(contents)
    assert html is not None
    assert contents.summary is not None
    for number in (contents.summary["ece_uncalibrated"], contents.summary["ece"]):
        assert f"{number:.3f}" in html
    right = float(labels.mean())
    assert f"100.0% are answered, {right:.1%} of them correctly" in html
    assert "needs at least 437 reserved validation images" in html  # log(0.05 / 4) / log(0.99)
    assert f"{right:.1%} of the sets contain the class" in html
    assert "the promises of accuracy allow for that" in html
    assert "farther than 0.250 from the k-th nearest of 50 training images (k = 3)" in html
    assert "about 5% of ordinary images" in html
    assert (contents.run_dir.plots / "risk-coverage-test.png").exists()


def test_trust_section_of_an_earlier_version_promises_nothing() -> None:
    html = sections.trust_section(two_class_contents())
    assert html is not None
    assert "it can promise nothing about single images" in html
    assert "No temperature is applied" in html


@pytest.mark.usefixtures("runs")
def test_epochs_show_macro_f1_and_balanced_accuracy_where_they_were_recorded() -> None:
    contents = gather_contents("small", audit=False, device="cpu", with_images=False)
    last = contents.rows[-1]
    html = str(sections.curves_section(contents))
    assert '<th scope="col">validation macro F1</th>' in html
    assert '<th scope="col">validation balanced accuracy</th>' in html
    for key in ("val_macro_f1", "val_balanced_accuracy"):
        assert f"<td>{last[key]:.2%}</td>" in html
    for row in contents.rows:
        row["val_macro_f1"] = math.nan
        del row["val_balanced_accuracy"]
    html = str(sections.curves_section(contents))
    assert "macro F1" not in html
    assert "balanced accuracy" not in html


@pytest.mark.usefixtures("runs")
def test_trust_states_how_many_images_are_unlike_the_training_images() -> None:
    contents = gather_contents("small", audit=False, device="cpu", with_images=False)
    contents.unlike = {"marked": 3, "share": 0.25, "interval95": [0.089, 0.532], "by": "features"}
    contents.summary = {**(contents.summary or {}), "n": 12}
    html = str(sections.trust_section(contents))
    assert ("Of the test images, 25.0% are marked (3 of 12, 95% interval 8.9% to 53.2%).") in html
    contents.unlike = None
    assert "are marked (" not in str(sections.trust_section(contents))


def test_cells_can_be_buttons_without_the_images_of_the_page() -> None:
    contents = two_class_contents()
    html = sections.confusion_buttons(contents)
    assert html is not None
    assert re.findall(r'data-cell="([^"]+)"', html) == ["0-0", "1-0", "1-1"]
    assert "<script" not in html
    without_images = sections.confusion_section(contents)
    assert without_images is not None
    assert "data-cell" not in without_images
    assert sections.confusion_buttons(two_class_contents(summary=None)) is None


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_only_the_report_writes_the_figure_of_risk_over_coverage() -> None:
    contents = two_class_contents()
    figure = contents.run_dir.plots / "risk-coverage-test.png"
    shown = sections.trust_text(contents)
    assert not figure.exists()
    assert sections.trust_section(contents) == shown
    assert figure.exists()

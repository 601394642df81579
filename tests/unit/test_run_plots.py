"""The figures of a run: their names, that they can be opened, and their contents."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convlens import Run, run_plots
from convlens.run import RunDir
from helpers.commands import DIGITS, constant_model, here, pictures, refused
from helpers.support import Memory, Split

pytestmark = pytest.mark.figures


def read_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Decode every plot of a folder and return their sizes by name."""
    sizes = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            assert image.format == "PNG"
            image.load()
            sizes[path.name] = image.size
    return sizes


@pytest.mark.usefixtures("figures_of_one_pixel")
def test_figures_none_draws_only_requested_figures() -> None:
    done = here("--figures", "none", "train", *DIGITS, "--name", "bare")
    assert done.code == 0, done.err
    assert "plots" not in done.out
    table = here("train", *DIGITS, "--name", "two", "--seeds", "2", "--figures", "none")
    assert table.code == 0, table.err
    assert "plot " not in table.out
    assert not list(Path().rglob("*.png"))
    assert here("--figures", "none", "look", "bare", "test:0").code == 0
    assert list(Path("plots").rglob("*.png"))


@pytest.mark.usefixtures("figures_of_one_pixel")
def test_figures_option_works_before_and_after_the_command() -> None:
    assert here("train", *DIGITS, "--name", "bare", "--figures", "none").code == 0
    before = dict(os.environ)
    for arguments in (
        ["--figures", "pdf", "evaluate", "bare"],
        ["evaluate", "bare", "--figures", "svg"],
        ["--figures", "pdf", "evaluate", "bare", "--figures", "none"],  # the last one counts
    ):
        assert here(*arguments).code == 0
        suffixes = {path.suffix for path in Path("plots").rglob("*.*")}
        shutil.rmtree("plots", ignore_errors=True)
        last = arguments[-1] if "--figures" in arguments[1:] else arguments[1]
        assert suffixes == (set() if last == "none" else {".png", f".{last}"})
    assert dict(os.environ) == before
    refused(here("evaluate", "bare", "--figures", "gif"), 2, "unknown format of figures 'gif'")
    # An option applies to its own command only.
    Run.load("bare").evaluate("test")
    assert {path.suffix for path in Path("plots").rglob("*.*")} == {".png"}


def test_training_and_evaluation_write_their_plots() -> None:
    done = here("train", *DIGITS, "--name", "mine", "--json")
    assert done.code == 0, done.err
    sizes = read_sizes(Path("plots/mine"))
    assert set(sizes) == {
        "augmented.png",
        "confusion-test.png",
        "curves.png",
        "learning_rate.png",
        "reliability-test.png",
        "worst-test.png",
    }
    assert all(min(size) >= 300 for size in sizes.values())
    # Other evaluations write files of other names and overwrite nothing.
    before = (Path("plots/mine/confusion-test.png")).read_bytes()
    Run.load("mine").evaluate("val")
    folder = pictures(Path("other/gray digits"), {"3": 2, "7": 3})
    Run.load("mine").evaluate(data=folder)
    added = set(read_sizes(Path("plots/mine"))) - set(sizes)
    assert {"confusion-val.png", "reliability-val.png"} <= added
    assert {"confusion-test-gray-digits.png", "reliability-test-gray-digits.png"} <= added
    assert (Path("plots/mine/confusion-test.png")).read_bytes() == before


def test_run_without_augmentation_has_no_augmented_batch() -> None:
    done = here("train", *DIGITS, "augment=[]", "--no-test", "--name", "bare")
    assert done.code == 0, done.err
    assert set(read_sizes(Path("plots/bare"))) == {"curves.png", "learning_rate.png"}


def test_mixed_and_alternating_augmentations_can_be_drawn() -> None:
    ops = "augment=[AlternatingFlip, RandAugment, {Cutout: {size: 3}}, MixUp, CutMix]"
    done = here("train", *DIGITS, ops, "--no-test", "--name", "mixed")
    assert done.code == 0, done.err
    assert "augmented.png" in read_sizes(Path("plots/mixed"))


@pytest.mark.parametrize("count", [2, 200])
def test_evaluation_of_few_or_many_classes_can_be_drawn(tmp_path: Path, count: int) -> None:
    run_dir = RunDir(tmp_path / "models" / "x", tmp_path / "plots")
    random = np.random.default_rng(0)
    logits = random.normal(size=(400, count))
    labels = torch.from_numpy(random.integers(0, count, 400))
    images = torch.from_numpy(random.integers(0, 256, (400, 3, 8, 8), dtype=np.uint8))
    names = [f"a rather long name {n}" for n in range(count)]
    run_plots.plot_evaluation(run_dir, "test", Split(Memory(images), labels), logits, names)
    assert set(read_sizes(tmp_path / "plots")) == {
        "confusion-test.png",
        "reliability-test.png",
        "worst-test.png",
    }


def test_model_without_mistakes_has_no_figure_of_mistakes(tmp_path: Path) -> None:
    model = constant_model(tmp_path / "models" / "sure", [3.0, 0.0], ["cat", "dog"])
    pictures(Path("set"), {"cat": 3})
    pictures(Path("set"), {"dog": 0, "cat": 3})
    lines = [f"{p},cat" for p in sorted(Path("set").rglob("*.png"))]
    dogs = pictures(Path("dogs"), {"dog": 1})
    (dogs / "dog" / "000.png").rename("dog.png")
    Path("list.csv").write_text(
        "\n".join(
            [
                "path,label,split",
                "dog.png,dog,train",
                *[f"{line},train" for line in lines[:1]],
                *[f"{line},test" for line in lines[1:]],
            ]
        )
    )
    evaluation = Run(model).evaluate(data="list.csv")
    assert evaluation.accuracy == 1.0
    assert set(read_sizes(Path("plots/sure"))) == {
        "confusion-test-list.csv.png",
        "reliability-test-list.csv.png",
    }


def test_worst_mistakes_have_the_least_probable_true_class() -> None:
    probs = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.05, 0.9, 0.05], [0.4, 0.35, 0.25]])
    targets = np.array([0, 0, 0, 1])
    assert run_plots.worst_mistake_images(probs, targets).tolist() == [2, 1, 3]


def test_rows_become_columns() -> None:
    rows = [{"epoch": 1.0, "lr": 0.1}, {"epoch": 2.0, "lr": 0.2}]
    assert run_plots.metric_columns(rows) == {"epoch": [1.0, 2.0], "lr": [0.1, 0.2]}


def test_data_sheet_and_plots_of_several_runs_are_written() -> None:
    pictures(Path("photos"), {"red": 4, "green": 4})
    path = Path(here("audit", "photos", "--json").json["contact_sheet"])
    assert path == Path("plots/data-photos.png")
    row = {
        "epoch": 1.0,
        "train_loss": 1.0,
        "val_loss": 1.1,
        "train_accuracy": 0.5,
        "val_accuracy": 0.4,
        "lr": 0.1,
    }
    runs = [[row, row], [row, row]]
    run_plots.plot_several(Path("plots/two/seeds.png"), {"": runs}, "two", "2 seeds")
    run_plots.plot_several(Path("plots/two/all.png"), {"a": runs, "b": runs}, "two", "")
    assert set(read_sizes(Path("plots/two"))) == {"seeds.png", "all.png"}


@pytest.mark.usefixtures("figures_of_one_pixel")
def test_crops_of_another_size_are_drawn_beside_the_images() -> None:
    """A fine-tuning is trained on smaller images than it is tested on."""
    pictures(Path("photos"), {"red": 6, "green": 6}, size=64)
    crops = "augment=[RandomResizedCrop: {size: 48}]"
    done = here("train", "photos", "model.widths=[4]", crops, "train.epochs=1", "--name", "crops")
    assert done.code == 0, done.err
    assert any("augment" in name for name in read_sizes(Path("plots/crops")))

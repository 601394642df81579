"""Contracts of every entry in the registries: what is added to a registry is tested here."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from convlens import evaluation, models, optim, plots, recipe as recipes
from convlens.analysis.part_check import (
    AUGMENTATION_CHECKS,
    LOSS_CHECKS,
    NETWORK_CHECKS,
    OPTIMIZER_CHECKS,
    AugmentationCase,
    LossCase,
    NetworkCase,
    OptimizerCase,
    check_shapes,
)
from convlens.cli.results import WRITERS
from convlens.data import download
from convlens.data.sources import SOURCES, find_source
from convlens.data.transforms.pipeline import AUGMENTS, MIXES, Augmentation, Mixing
from convlens.engine.losses import LOSSES, LossInputs, build_loss, loss_options
from convlens.errors import DataError
from convlens.models import MODELS
from convlens.optim import OPTIMIZERS, SCHEDULES
from convlens.plots import PLOTS
from convlens.plots.attributions import AttributionColumn, AttributionPanel
from convlens.prediction import Prediction, PredictionColumns
from convlens.recipe import OptimConfig
from convlens.training import train
from convlens.training.resolve import validate_recipe
from helpers.support import begin, same

# Networks

# Some small networks of torchvision, and the smallest image size they accept.
TORCHVISION = {
    "mnasnet0_5": 8,
    "mobilenet_v3_small": 8,
    "shufflenet_v2_x0_5": 8,
    "squeezenet1_1": 17,
}
SMALL: dict[str, dict[str, Any]] = {"wrn": {"width": 1}}  # where the default is slow

families = pytest.mark.parametrize("name", [*MODELS, *TORCHVISION])


def build(name: str, classes: int = 5, channels: int = 3, size: int = 0) -> nn.Module:
    options = SMALL.get(name, {})
    return models.build_model(name, classes, channels, size or size_for(name), options)


def size_for(name: str) -> int:
    return 32 if name in TORCHVISION else 16


def network_case(name: str, channels: int = 3, size: int = 0) -> NetworkCase:
    return NetworkCase(
        lambda *shape: build(name, *shape), channels=channels, image_size=size or size_for(name)
    )


@families
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 9, 16, 28, 33])
def test_a_network_accepts_any_image_size(name: str, channels: int, size: int) -> None:
    if size < TORCHVISION.get(name, 0):
        pytest.skip(f"{name} needs larger images")
    check_shapes(network_case(name, channels, size))


@families
@pytest.mark.parametrize("check", [name for name in NETWORK_CHECKS if name != "export"])
def test_a_network_passes_the_checks_of_user_networks(name: str, check: str) -> None:
    """Export is tested in test_model_export.py."""
    assert NETWORK_CHECKS[check](network_case(name))


@families
def test_the_options_of_a_network_can_be_stored_as_json(name: str) -> None:
    options = {**models.model_options(name), **SMALL.get(name, {})}
    assert json.loads(json.dumps(options)) == json.loads(json.dumps(options))
    stored = json.loads(json.dumps(options))  # tuples become lists, as in a model file
    torch.manual_seed(0)
    built = models.build_model(name, 5, 3, size_for(name), stored)
    same(dict(built.state_dict()), dict(network_case(name).network().state_dict()))
    if name in MODELS:
        assert models.model_family(name).__doc__


# Augmentations

# For arguments without default.
ARGUMENTS = {"degrees": 30, "sharpness_factor": 2, "padding": 2, "size": 3}


@pytest.mark.parametrize("name", [*AUGMENTS, *MIXES])
@pytest.mark.parametrize("check", list(AUGMENTATION_CHECKS))
def test_an_augmentation_passes_the_checks_of_user_augmentations(name: str, check: str) -> None:
    table: dict[str, Augmentation | Mixing] = {**AUGMENTS, **MIXES}
    entry = table[name]
    arguments = {key: ARGUMENTS[key] for key in entry.required}
    assert AUGMENTATION_CHECKS[check](AugmentationCase(entry, arguments))


@pytest.mark.parametrize("name", list(MIXES))
@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (5, 3, 17, 17), (1, 3, 8, 8)])
@pytest.mark.parametrize("classes", [1, 4])
def test_mixing_keeps_shape_range_and_its_input(
    name: str, shape: tuple[int, ...], classes: int
) -> None:
    entry = MIXES[name]
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    labels = torch.eye(classes)[torch.arange(len(images)) % classes]
    before = images.clone(), labels.clone()

    def result(seed: int) -> tuple[Tensor, Tensor]:
        arguments = {key: ARGUMENTS[key] for key in entry.required}
        return entry(images, labels, torch.Generator().manual_seed(seed), **arguments)

    mixed, shares = result(0)
    assert mixed.shape == shape
    assert shares.shape == labels.shape
    assert mixed.dtype == shares.dtype == torch.float32
    assert (mixed.min() >= 0) & (mixed.max() <= 1)
    assert shares.min() >= 0
    torch.testing.assert_close(shares.sum(1), torch.ones(len(images)))
    torch.manual_seed(5)  # the global generator has no effect
    again = result(0)
    assert torch.equal(mixed, again[0])
    assert torch.equal(shares, again[1])
    assert len(images) == 1 or not torch.equal(mixed, result(1)[0])
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    if len(images) == 1:  # no other image to mix with
        torch.testing.assert_close(mixed, images)
        torch.testing.assert_close(shares, labels)


# Optimizers and schedules


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("check", list(OPTIMIZER_CHECKS))
def test_an_optimizer_passes_the_checks_of_user_optimizers(name: str, check: str) -> None:
    assert OPTIMIZER_CHECKS[check](OptimizerCase(OptimConfig(name=name, lr=0.05)))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_groups_of_an_optimizer_keep_their_initial_rate(name: str) -> None:
    optimizer = optim.build_optimizer(nn.Linear(4, 1), OptimConfig(name=name, lr=0.05))
    assert all(group["initial_lr"] == 0.05 for group in optimizer.param_groups)


# Losses


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("check", list(LOSS_CHECKS))
def test_a_loss_passes_the_checks_of_user_losses(name: str, check: str) -> None:
    config = OptimConfig(loss=name, label_smoothing=0.1)
    assert LOSS_CHECKS[check](LossCase(lambda counts: build_loss(LossInputs(config, counts))))


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_options_of_a_loss_can_be_stored_as_json(name: str) -> None:
    options = loss_options(name)
    assert json.loads(json.dumps(options)) == options


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.99])
def test_a_schedule_is_a_factor_from_0_to_1(name: str, warmup: float) -> None:
    factor = optim.build_schedule(OptimConfig(schedule=name, warmup=warmup))
    values = [factor(i / 1000) for i in range(1001)]
    assert all(math.isfinite(value) and -1e-12 <= value <= 1 for value in values)
    assert max(values) > 0.9


# Plots

HISTORY = {
    key: [1.0, 0.5, 0.25]
    for key in ("epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr")
}
SHEET = np.zeros((3, 3, 8, 8), np.uint8)
KERNELS = np.ones((2, 3, 5, 5), np.float32)
PANEL = plots.Panel("x", "y", KERNELS[0], (0.0, 1.0), np.zeros(3, bool), np.zeros(3, bool))
DRAWN: dict[str, Callable[..., Figure]] = {
    "curves": lambda draw: draw(HISTORY, 2, "x"),
    "seed_curves": lambda draw: draw([HISTORY, HISTORY], "x"),
    "variant_curves": lambda draw: draw({"a": [HISTORY], "b": [HISTORY, HISTORY]}, "x"),
    "differences": lambda draw: draw({"a": (0.01, (-0.01, 0.03), False)}, "x"),
    "learning_rate": lambda draw: draw(HISTORY["epoch"], HISTORY["lr"], "x"),
    "confusion": lambda draw: draw(np.eye(3, dtype=np.int64), ["a", "b", "c"], "x"),
    "reliability": lambda draw: draw([0.5, 0.9], [0.4, 1.0], [3, 4], 0.1),
    "risk_coverage": lambda draw: draw([0.5, 1.0], [0.0, 0.1], "x"),
    "accuracy_bars": lambda draw: draw(["a", "b"], [0.5, 0.6], [(0.4, 0.6), (0.5, 0.7)]),
    "contact_sheet": lambda draw: draw(SHEET, ["a", "b", "c"], "x"),
    "augmented_batch": lambda draw: draw(SHEET, SHEET, "x"),
    "worst_mistakes": lambda draw: draw(SHEET, ["a"] * 3, ["b"] * 3, [0.9] * 3, "x"),
    "label_review": lambda draw: draw(SHEET, ["a"] * 3, ["b"] * 3, [0.9] * 3, "x"),
    "neighbours": lambda draw: draw(SHEET, [["a"]] * 3, 1, "x"),
    "stage_measures": lambda draw: draw(
        [plots.StageLine("x", ["a", "b"], {"rank": [(3, 2, 4), (5, 4, 6)]})],
        {"rank": ("effective rank", "log")},
    ),
    "similarity": lambda draw: draw([[1, 0.5], [0.5, 1]], [("x", "a"), ("y", "a")], "CKA"),
    "embedding": lambda draw: draw([[0, 1], [1, 0]], [0, 1], [0, 0], ["a", "b"], "x"),
    "activations": lambda draw: draw(SHEET[0], [PANEL], "x", "y", "z"),
    "activations_side_by_side": lambda draw: draw(SHEET[0], [plots.Column("a", "b", [PANEL])]),
    "colour_filters": lambda draw: draw(KERNELS, ["1", "2"], 0.5, "x", "y"),
    "kernels": lambda draw: draw(KERNELS, ["1", "2"], 0.5, "x", "y"),
    "top_images": lambda draw: draw([SHEET], [[None] * 3], [("1", "a")], "x", "y"),
    "made_inputs": lambda draw: draw(SHEET, [("1", "peak")] * 3, "x", "y"),
    "attribution_grid": lambda draw: draw(
        [("x", "a")] * 3,
        [
            AttributionPanel(
                "m", SHEET, [AttributionColumn("M", "", np.ones((3, 4, 4)), True)], [("a", 0.9)] * 3
            )
        ],
    ),
    "attribution_sanity": lambda draw: draw(
        ["head"],
        {key: {"M": [(0.5, None)]} for key in ("spearman", "ssim")},
        {key: {"M": np.ones(3), "chance": np.ones(3)} for key in ("deletion", "insertion")},
    ),
}


@pytest.mark.parametrize("name", list(PLOTS))
def test_a_plot_is_a_new_figure_that_can_be_saved(name: str, tmp_path: Any) -> None:
    figure = DRAWN[name](PLOTS[name])
    assert isinstance(figure, Figure)
    assert DRAWN[name](PLOTS[name]) is not figure
    plots.save_figure(figure, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert PLOTS[name].__doc__


# Recipes

published = pytest.mark.parametrize("name", recipes.recipe_names())


@published
def test_a_recipe_is_described_and_valid(name: str) -> None:
    loaded = recipes.load_recipe(name)
    assert loaded.name == name
    assert 10 < len(loaded.about) < 100
    validate_recipe(loaded)
    head = recipes.recipe_text(name).splitlines()[:6]
    assert head[0].startswith("# ")
    assert any(f"convlens train {name}" in line or name == "folder" for line in head)


@published
def test_the_variants_of_a_recipe_are_valid_and_different(name: str) -> None:
    digests = {recipes.load_recipe(name).digest()}
    variants = recipes.variants(name)
    for variant in variants:
        loaded = recipes.load_recipe(name, variant=variant)
        validate_recipe(loaded)
        digests.add(loaded.digest())
    assert len(digests) >= max(1, len(variants)), "variants without effect, or two equal ones"
    assert "variants" not in recipes.load_recipe(name).model_dump()


@published
def test_a_recipe_trains_and_tests_on_a_few_images(name: str) -> None:
    digits = ["data.name=digits", "data.per_class=4"]
    few = {
        "folder": ["data.name=shapes", "data.count=80", "data.image_size=16"],
        # Convolutions without padding need more than 8 px.
        "mnist-fast": [*digits, "data.image_size=28"],
        # The stem that `auto` means at 224 px.
        "imagenet": [*digits, "data.image_size=32", "model.stem=imagenet"],
        # Large networks for 32 px, at half or a quarter of the size.
        "resnet18-best": [*digits, "data.image_size=16"],
        "tiny-best": [*digits, "data.image_size=16"],
        "pretrain": [*digits, "data.image_size=8"],
        "pretrained-best": [*digits, "data.image_size=8"],
    }.get(name, digits)
    if "data.name=digits" in few:  # testing takes most of the time
        few = [*few, "data.test_fraction=0.03"]
        few += ["data.val_fraction=0.03"] if recipes.load_recipe(name).data.validates else []
    # Pretrained weights are tested in test_pretrained.py.
    few = [*few, "model.weights=none", "train.epochs=1", "train.batch_size=24"]
    recipe = recipes.load_recipe(name, few)
    job, run_dir = begin(recipe, name)
    assert len(job.inputs.batches) >= 2
    before = {k: v.clone() for k, v in job.model.state_dict().items()}
    rows, kept = train.fit(job, run_dir)
    assert (len(rows), kept) == (1, 1)
    head = f"{models.model_parts(job.model).head}.weight"
    assert not torch.equal(before[head], job.model.get_parameter(head))
    result = evaluation.evaluate(run_dir, "test", device="cpu", quiet=True)
    assert result.n == len(job.data.unseal_test())
    assert 0 <= result.correct <= result.n
    assert math.isfinite(result.loss)
    assert recipes.load_recipe(run_dir.path / "recipe.yaml").replace() == job.recipe


# Sources

OFFLINE = ("digits", "shapes")


@pytest.mark.parametrize("name", OFFLINE)
def test_a_source_without_files_can_be_loaded(name: str) -> None:
    source = find_source(name)
    part = source.parts["train"]
    count, channels, height, width = part.images.shape
    assert count == len(part.labels) == len(part.ids) == len(set(part.ids))
    assert channels in (1, 3)
    assert height == width
    assert part.labels.dtype == np.int64
    assert set(part.labels.tolist()) == set(range(len(source.classes)))
    selected = part.images[np.array([count - 1, 0], np.int64)]
    assert selected.shape == (2, channels, height, width)
    assert selected.dtype == np.uint8
    assert selected.std() > 0


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in OFFLINE])
def test_a_failed_download_names_the_folder_for_its_files(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with socket.socket() as closed:  # a port without a server
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        download_info = dataclasses.replace(download.DOWNLOADS[name], mirrors=(url,))
        monkeypatch.setitem(download.DOWNLOADS, name, download_info)
        with pytest.raises(DataError, match=f"{name} can't be downloaded") as caught:
            find_source(name)
    folder = tmp_path / "no-data"
    assert caught.value.where.startswith(str(folder))
    assert str(folder) in caught.value.fix
    assert download_info.archives[0].file in caught.value.fix
    assert not [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


# Writers

PREDICTIONS = [
    Prediction("a,b.png", (("cat", 0.75), ("dog [bold]", 0.25))),
    Prediction("broken.png", error="cut short"),
    Prediction("ü.png", (("dog [bold]", 0.5), ("cat", 0.5))),
]


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_writer_writes_every_prediction_and_counts_the_failures(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert WRITERS[name](iter(PREDICTIONS), PredictionColumns(2)) == 1
    written = capsys.readouterr()
    assert written.err == ""
    for prediction in PREDICTIONS:
        assert prediction.filename in written.out.replace("\\u00fc", "ü")
    assert "dog [bold]" in written.out
    assert "cut short" in written.out
    assert WRITERS[name](iter(PREDICTIONS[:1]), PredictionColumns(1)) == 0


def test_csv_and_json_output_can_be_parsed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    WRITERS["csv"](iter(PREDICTIONS), PredictionColumns(2))
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["filename"] for row in rows] == [prediction.filename for prediction in PREDICTIONS]
    assert (rows[0]["label"], float(rows[0]["prob"]), rows[0]["label2"]) == (
        "cat",
        0.75,
        "dog [bold]",
    )
    assert (rows[1]["label"], rows[1]["error"]) == ("", "cut short")
    WRITERS["json"](iter(PREDICTIONS), PredictionColumns(2))
    content = json.loads(capsys.readouterr().out)
    assert content["predictions"][2]["top"][1] == {"label": "cat", "prob": 0.5}
    assert content["predictions"][1]["error"] == "cut short"

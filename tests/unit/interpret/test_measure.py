"""Measurements of runs and networks: values, figures, samples and invalid input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import convlens
from convlens.cli.look import print_measurements
from convlens.errors import ConvlensError, ModelFileError, UsageError
from convlens.interpret import features
from convlens.interpret.inputs import InspectedModel, draw_sample, open_inspected_model
from convlens.interpret.measure import NAMES, Measurements, measure
from convlens.interpret.stage_metrics import MEASURES
from convlens.utils.console import is_quiet

RUN = {"data": {"name": "digits"}, "model": {"name": "cnn", "widths": [4, 8], "depth": 1}}
OUT = Path("plots")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short trainings on all digits and one on shapes, shared by the tests here."""
    folder = tmp_path_factory.mktemp("trained")
    train = {"epochs": 2, "batch_size": 64, "memory_format": "contiguous", "precision": "fp32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (0, 1):
            convlens.train(
                {**RUN, "train": {**train, "seed": seed}}, name=f"run{seed}", quiet=True, test=False
            )
        shapes = {**RUN, "data": {"name": "shapes", "count": 300, "image_size": 16}, "train": train}
        convlens.train(shapes, name="shapes", quiet=True, test=False)
    return folder / "models"


def opened(models: Path, *names: str) -> list[InspectedModel]:
    return [open_inspected_model(str(models / name), device="cpu") for name in names]


def test_all_measures_of_several_networks_in_one_figure(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subjects = opened(models, "run0", "run1")
    result = measure(subjects, folder=OUT, images=150, learn_from=400, untrained=True, quiet=True)
    assert [n.name for n in result.networks] == ["run0", "run1", "cnn, untrained"]
    assert [n.baseline for n in result.networks] == [False, False, True]
    for network in result.networks:
        assert list(network.stages) == ["stage1", "stage2"]
        assert (network.n, network.learned, network.classes) == (150, 400, 10)
        assert all(list(values) == list(MEASURES) for values in network.stages.values())
    # Deeper stages separate the digits better and reconstruct the images worse.
    first, second = result.networks[0].stages.values()
    assert second["picture"].value < first["picture"].value  # type: ignore[operator]
    assert second["probe"].value > 0.5  # type: ignore[operator]
    untrained = result.networks[2].stages["stage2"]["separability"].value
    assert second["separability"].value > untrained  # type: ignore[operator]
    (cka,) = result.similarity
    assert cka.stages[:3] == (("run0", "stage1"), ("run0", "stage2"), ("run1", "stage1"))
    matrix = np.array(cka.matrix, dtype=float)
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(matrix.diagonal(), 1)
    assert [file.name for file in result.files] == [
        "measures.png",
        "similarity.png",
        "measures.json",
    ]
    assert json.loads((OUT / "measures.json").read_text()) == json.loads(
        json.dumps(result.to_dict())
    )
    print_measurements(result)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("run1", "stage2", "picture R²", "linear CKA", "150 val"))


def test_streamed_values_equal_those_of_one_pass_over_all_images(models: Path) -> None:
    (subject,) = opened(models, "run0")
    result = measure([subject], ["sparsity", "dead", "rank"], folder=OUT, images=10_000, quiet=True)
    sample = draw_sample(subject, "val", max_images=10_000)
    assert len(sample) == len(subject.split("val"))
    pixels = sample.split.rows.gather(sample.index)
    maps = features.layer_activations(subject.model, subject.prepared(pixels), ["stage2"])["stage2"]
    values = result.networks[0].stages["stage2"]
    assert values["sparsity"].value == pytest.approx(float((maps <= 0).double().mean()))
    assert values["dead"].details["dead"] == int((maps.amax((0, 2, 3)) == 0).sum())
    means = maps.mean((2, 3)).double()
    singular = torch.linalg.svdvals(means - means.mean(0))
    shares = singular / singular.sum()
    entropy = float(-(shares * shares.clamp(min=1e-12).log()).sum())
    assert values["rank"].value == pytest.approx(np.exp(entropy), rel=1e-3)
    assert result.similarity == ()
    assert result.networks[0].learned == 0


def test_other_data_set_has_its_own_classes_and_disjoint_samples(models: Path) -> None:
    (subject,) = opened(models, "run0")
    generator = np.random.default_rng(0)
    for name in ("left", "right"):
        Path("other", name).mkdir(parents=True)
        for i in range(40):
            pixels = generator.integers(0, 60, (8, 8), dtype=np.uint8)
            pixels[:, slice(0, 4) if name == "left" else slice(4, 8)] += 150
            Image.fromarray(pixels).save(Path("other", name, f"{i}.png"))
    sample, training = (
        draw_sample(subject, "val", data="other", max_images=999, training=x) for x in (False, True)
    )
    assert (len(sample), len(training)) == (16, 64)
    assert not set(sample.ids) & set(training.ids)
    result = measure([subject], ["probe"], folder=OUT, data="other", quiet=True)
    assert result.networks[0].classes == 2
    assert result.networks[0].stages["stage1"]["probe"].value == 1


def test_networks_with_different_data_are_measured_on_their_own(models: Path) -> None:
    subjects = opened(models, "run0", "shapes", "run0")
    names = ["separability", "similarity"]
    result = measure(subjects, names, folder=OUT, images=60, learn_from=100, quiet=True)
    assert [n.name for n in result.networks] == ["run0", "shapes", "run0 (2)"]
    assert [n.data for n in result.networks] == ["digits", "shapes", "digits"]
    assert [len(a.stages) for a in result.similarity] == [4, 2]
    assert result.similarity[0].matrix[0][2] == pytest.approx(1), "the same run twice"
    assert Path(OUT, "similarity-2.png").exists()


def test_network_of_a_library_needs_a_data_set() -> None:
    subject = open_inspected_model("squeezenet1_1:none", device="cpu")
    with pytest.raises(UsageError, match="no images of its own"):
        measure([subject], folder=OUT, quiet=True)
    subject.loaded.preprocessing = replace(subject.loaded.preprocessing, image_size=32)
    names = ["dead", "probe", "rank"]
    result = measure(
        [subject],
        names,
        folder=OUT,
        data="digits",
        images=40,
        learn_from=60,
        quiet=True,
        layers=["features.3", "features.12", "classifier"],
    )
    (network,) = result.networks
    assert list(network.stages) == ["features.3", "features.12", "classifier"]
    assert network.stages["features.12"]["rank"].details["channels"] == 512
    assert network.classes == 10


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.nan


def test_stages_that_are_nan_are_reported_and_skipped(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (subject,) = opened(models, "run0")
    subject.model.stage2 = nn.Sequential(subject.model.stage2, Broken())
    result = measure(
        [subject], folder=OUT, layers=["stage1", "stage2"], images=60, learn_from=100, quiet=True
    )
    (network,) = result.networks
    assert network.broken == ("stage2",)
    assert all(value.value is None for value in network.stages["stage2"].values())
    assert network.stages["stage1"]["probe"].value is not None
    assert result.similarity[0].stages == (("run0", "stage1"),)
    print_measurements(result)
    assert "NaN" in capsys.readouterr().out
    with pytest.raises(ModelFileError, match="run0: all activations are NaN"):
        measure([subject], ["rank"], folder=OUT, layers=["stage2"], quiet=True)


def test_very_few_images_are_measured(models: Path) -> None:
    (subject,) = opened(models, "run0")
    for images, learn_from in ((3, 8), (1, 1)):
        result = measure([subject], folder=OUT, images=images, learn_from=learn_from, quiet=True)
        assert (result.networks[0].n, result.networks[0].learned) == (images, learn_from)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names": ["prob"]}, UsageError, "unknown measurement 'prob'"),
        ({"layers": ["stage9"]}, UsageError, "no layer 'stage9'"),
        ({"images": 0}, UsageError, "images=0: must be at least 1"),
        ({"data": "nowhere"}, ConvlensError, "nowhere"),
    ],
)
def test_invalid_arguments_are_refused(
    models: Path, options: dict[str, object], error: type[ConvlensError], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure(opened(models, "run0"), folder=OUT, quiet=True, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no networks"):
        measure([], folder=OUT)


def test_run_whose_data_moved_is_refused(models: Path) -> None:
    for name in ("a", "b"):
        Path("mine", name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (16, 16), 20 * i + (name == "b")).save(Path("mine", name, f"{i}.png"))
    convlens.train("mine", {"train.epochs": 1, "model.widths": [4, 8]}, name="mine", quiet=True)
    subject = open_inspected_model("mine", device="cpu")
    Path("mine").rename("moved")
    with pytest.raises(ConvlensError, match="mine"):
        measure([subject], folder=OUT, quiet=True)


def test_python_api_is_quiet_and_returns_measurements(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = convlens.measure(
        [models / "run0", convlens.Run.load(models / "run1")], ["sparsity"], images=50
    )
    assert isinstance(result, Measurements)
    assert result.files[0] == Path("plots/look-run0-run1/measures.png")
    assert convlens.measure(models / "run0", "dead", images=50).files[0].parent.parts == (
        "plots",
        "run0",
        "look",
    )
    assert capsys.readouterr() == ("", "")
    assert NAMES[-1] == "similarity"
    assert not is_quiet()

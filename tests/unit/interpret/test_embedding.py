"""Embeddings of penultimate features, and the nearest training images by them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import convlens
from convlens.cli.look import print_embeddings, print_neighbors
from convlens.errors import DataError, ModelFileError, UsageError
from convlens.interpret.embedding import (
    EMBEDDINGS,
    embed,
    index_features,
    nearest_in_index,
    nearest_neighbors,
    pca,
)
from convlens.interpret.features import PenultimateOutputs, penultimate_features
from convlens.interpret.inputs import InspectedModel, open_inspected_model, select_pictures
from helpers.support import TINY

OUT = Path("plots")


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convlens.train(TINY, name="small", quiet=True, test=False)
    return folder / "models" / "small"


@pytest.fixture
def run(run_path: Path) -> InspectedModel:
    return open_inspected_model(str(run_path), device="cpu")


@pytest.mark.parametrize("method", list(EMBEDDINGS))
def test_embedding_is_deterministic_and_written_to_files(
    run: InspectedModel, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [
        embed(run, method, folder=OUT / str(i), split="val", images=60, quiet=True) for i in (0, 1)
    ]
    first, second = results
    np.testing.assert_array_equal(first.points, second.points)
    n = len(first.ids)
    assert first.points.shape == (n, 2)
    assert np.isfinite(first.points).all()
    rows = list(csv.DictReader((OUT / "0" / f"embedding-{method}.csv").open()))
    assert [row["id"] for row in rows] == list(first.ids)
    assert [row["class"] for row in rows] == [run.classes[i] for i in first.labels]
    wrong = sum(row["class"] != row["prediction"] for row in rows)
    assert first.to_dict()["mistakes"] == wrong
    json.dumps(first.to_dict())
    assert first.file.exists()
    print_embeddings(first)
    assert f"{wrong} mistakes" in capsys.readouterr().out


def test_pca_finds_the_directions_of_largest_variance() -> None:
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.normal(size=(5, 5)))[0]
    cloud = generator.normal(size=(400, 5)) * [9, 4, 0.1, 0.1, 0.1]
    points, words = pca(cloud @ turn.T + 7, 0)
    centered = cloud - cloud.mean(0)
    for axis in (0, 1):
        assert abs(np.corrcoef(points[:, axis], centered[:, axis])[0, 1]) > 0.99
    assert words.startswith("PCA: 8")


def test_embeddings_of_too_few_images_or_of_nan_are_refused(run: InspectedModel) -> None:
    with pytest.raises(UsageError, match="unknown embedding 'tsen'"):
        embed(run, "tsen", folder=OUT)
    with pytest.raises(DataError, match="3 images are too few"):
        embed(run, "pca", folder=OUT, images=3, quiet=True)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ModelFileError, match="NaN"):
        embed(run, "pca", folder=OUT, quiet=True)


def test_neighbors_are_those_of_a_loop_over_all_training_images(
    run: InspectedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = select_pictures(run, ["val:0", "val:3"])
    result = nearest_neighbors(run, pictures, 4, folder=OUT, quiet=True)
    train = run.split("train")
    images = (
        torch.cat([p.pixels[None] for p in pictures]),
        train.rows.gather(torch.arange(len(train))),
    )
    query, other = (next(penultimate_features(run, [each])).features.double() for each in images)
    distance = 1 - F.cosine_similarity(query[:, None], other[None], dim=2)
    for row, one in enumerate(result.found):
        order = distance[row].argsort(stable=True)[:4].tolist()
        assert [near.number for near in one.neighbors] == order
        assert [near.id for near in one.neighbors] == [train.ids[i] for i in order]
        assert [n.distance for n in one.neighbors] == pytest.approx(
            [float(distance[row, i]) for i in order], abs=1e-9
        )
        assert [n.label for n in one.neighbors] == [run.classes[train.labels[i]] for i in order]
    assert result.searched == len(train)
    print_neighbors(result)
    assert result.found[0].neighbors[0].id in capsys.readouterr().out
    json.dumps(result.to_dict())


def test_copies_are_marked_and_a_training_image_is_not_its_own_neighbor(
    run: InspectedModel,
) -> None:
    train = run.split("train")
    pixels = train.rows.gather(torch.tensor([5]))[0, 0].numpy()
    Image.fromarray(pixels).save("copy.png")
    Image.fromarray(np.clip(pixels.astype(int) + 3, 0, 255).astype(np.uint8)).save("brighter.png")
    Image.new("L", pixels.shape, 100).save("uniform.png")
    names = ["copy.png", "brighter.png", "uniform.png", "train:5"]
    result = nearest_neighbors(run, select_pictures(run, names), 3, folder=OUT, quiet=True)
    copy, brighter, uniform, itself = result.found
    assert (copy.neighbors[0].number, copy.neighbors[0].same) == (5, "identical")
    assert copy.neighbors[0].distance == pytest.approx(0, abs=1e-9)
    five = [near for near in brighter.neighbors if near.number == 5]
    assert [near.same for near in five] == ["near-identical"]
    assert {near.same for near in uniform.neighbors} == {""}
    assert 5 not in [near.number for near in itself.neighbors]
    assert (itself.label, copy.label) == (run.classes[train.labels[5]], None)


def test_index_finds_the_same_neighbors_as_the_complete_search(
    run: InspectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = select_pictures(run, ["val:0", "val:3", "train:5"])
    train = run.split("train")
    slow = nearest_neighbors(run, pictures, 4, folder=OUT, quiet=True)
    parts: list[int] = []
    index = index_features(run, train, 10_000, on_batch=lambda part: parts.append(len(part)))
    assert parts == [min(64 * n, len(train)) for n in range(1, -(-len(train) // 64) + 1)]
    assert index.numbers.tolist() == list(range(len(train)))
    for picture, expected in zip(pictures, slow.found, strict=True):
        found = nearest_in_index(run, index, picture, 4)
        assert [near.number for near in found] == [near.number for near in expected.neighbors]
        assert [near.same for near in found] == [near.same for near in expected.neighbors]
        assert [near.distance for near in found] == pytest.approx(
            [near.distance for near in expected.neighbors], abs=1e-5
        )
    sample = index_features(run, train, 20)
    assert len(sample) == 20
    assert torch.equal(sample.directions, index.directions[sample.numbers])
    monkeypatch.setattr("convlens.interpret.embedding.MAX_INDEX_BYTES", index.directions[:7].nbytes)
    assert len(index_features(run, train, 10_000)) == 7


def test_more_neighbors_than_training_images_and_missing_arguments(run: InspectedModel) -> None:
    count = len(run.split("train"))
    (one,) = nearest_neighbors(
        run, select_pictures(run, ["train:0"]), 10_000, folder=OUT, quiet=True
    ).found
    assert len(one.neighbors) == count - 1
    with pytest.raises(UsageError, match="no images"):
        nearest_neighbors(run, [], folder=OUT)
    with pytest.raises(UsageError, match="0 neighbors requested"):
        nearest_neighbors(run, select_pictures(run, ["train:0"]), 0, folder=OUT)
    squeeze = open_inspected_model("squeezenet1_1:none", device="cpu")
    Image.new("RGB", (64, 64)).save("black.png")
    with pytest.raises(UsageError, match="not a convlens run"):
        nearest_neighbors(squeeze, select_pictures(squeeze, ["black.png"]), folder=OUT)


def test_constant_features_are_refused_and_a_single_feature_is_embedded(
    run: InspectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def patch_features(width: int, scale: float) -> None:
        def noisy_features(
            subject: InspectedModel, batches: Iterable[torch.Tensor]
        ) -> Iterator[PenultimateOutputs]:
            for images in batches:
                noise = torch.randn(len(images), width) * scale
                yield PenultimateOutputs(noise + 1, torch.zeros(len(images), len(run.classes)))

        monkeypatch.setattr("convlens.interpret.embedding.penultimate_features", noisy_features)

    for method in EMBEDDINGS:
        patch_features(5, 0)  # t-SNE of them crashes the process
        with pytest.raises(DataError, match="features of all 40 images are equal"):
            embed(run, method, folder=OUT, images=40, quiet=True)
        patch_features(1, 5)
        points = embed(run, method, folder=OUT, images=40, quiet=True).points
        assert np.isfinite(points).all()

"""Maps of the last features, and the training images that are nearest by them."""

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
from convlens.interpret.embedding import EMBEDDINGS, embed, nearest_neighbors, pca
from convlens.interpret.features import PenultimateOutputs, penultimate_features
from convlens.interpret.inputs import InspectedModel, open_inspected_model, select_pictures
from helpers.support import TINY

OUT = Path("plots")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        convlens.train(TINY, name="small", quiet=True, test=False)
    return place / "models" / "small"


@pytest.fixture
def run(place: Path) -> InspectedModel:
    return open_inspected_model(str(place), on="cpu")


def test_last_features_are_what_the_head_is_given(run: InspectedModel) -> None:
    images = run.split("val").rows.gather(torch.arange(10))
    seen = list(penultimate_features(run, images.split(4)))
    features, logits = (torch.cat(parts) for parts in zip(*seen, strict=True))
    head = run.model.classifier
    torch.testing.assert_close(head(features), logits)
    with torch.inference_mode():
        torch.testing.assert_close(logits, run.model(run.prepared(images)))
    assert not head._forward_pre_hooks
    # A head that is a convolution is given maps: their means are taken.
    squeeze = open_inspected_model("squeezenet1_1:none", on="cpu")
    (found,) = penultimate_features(squeeze, [torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
    assert (found.features.shape, found.logits.shape) == ((1, 512), (1, 1000))


@pytest.mark.parametrize("method", list(EMBEDDINGS))
def test_every_embedding_is_seeded_and_written(
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


def test_pca_finds_the_directions_of_greatest_variance() -> None:
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.normal(size=(5, 5)))[0]
    cloud = generator.normal(size=(400, 5)) * [9, 4, 0.1, 0.1, 0.1]
    points, words = pca(cloud @ turn.T + 7, 0)
    centred = cloud - cloud.mean(0)
    for axis in (0, 1):
        assert abs(np.corrcoef(points[:, axis], centred[:, axis])[0, 1]) > 0.99
    assert words.startswith("PCA: 8")


def test_embeddings_that_can_not_be_made(run: InspectedModel) -> None:
    with pytest.raises(UsageError, match="unknown embedding 'tsen'"):
        embed(run, "tsen", folder=OUT)
    with pytest.raises(DataError, match="3 images make no map"):
        embed(run, "pca", folder=OUT, images=3, quiet=True)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ModelFileError, match="NaN"):
        embed(run, "pca", folder=OUT, quiet=True)


def test_neighbours_are_those_of_a_loop_over_all_training_images(
    run: InspectedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = select_pictures(run, ["val:0", "val:3"])
    result = nearest_neighbors(run, pictures, 4, folder=OUT, quiet=True)
    train = run.split("train")
    every = (
        torch.cat([p.pixels[None] for p in pictures]),
        train.rows.gather(torch.arange(len(train))),
    )
    query, other = (next(penultimate_features(run, [images])).features.double() for images in every)
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


def test_copies_are_marked_and_an_image_is_not_its_own_neighbour(run: InspectedModel) -> None:
    train = run.split("train")
    pixels = train.rows.gather(torch.tensor([5]))[0, 0].numpy()
    Image.fromarray(pixels).save("copy.png")
    Image.fromarray(np.clip(pixels.astype(int) + 3, 0, 255).astype(np.uint8)).save("brighter.png")
    Image.new("L", pixels.shape, 100).save("plain.png")
    asked = ["copy.png", "brighter.png", "plain.png", "train:5"]
    result = nearest_neighbors(run, select_pictures(run, asked), 3, folder=OUT, quiet=True)
    copy, brighter, plain, own = result.found
    assert (copy.neighbors[0].number, copy.neighbors[0].same) == (5, "identical")
    assert copy.neighbors[0].distance == pytest.approx(0, abs=1e-9)
    five = [near for near in brighter.neighbors if near.number == 5]
    assert [near.same for near in five] == ["near-identical"]
    assert {near.same for near in plain.neighbors} == {""}
    assert 5 not in [near.number for near in own.neighbors]
    assert (own.label, copy.label) == (run.classes[train.labels[5]], None)


def test_more_neighbours_than_training_images_and_none(run: InspectedModel) -> None:
    count = len(run.split("train"))
    (one,) = nearest_neighbors(
        run, select_pictures(run, ["train:0"]), 10_000, folder=OUT, quiet=True
    ).found
    assert len(one.neighbors) == count - 1
    with pytest.raises(UsageError, match="no images"):
        nearest_neighbors(run, [], folder=OUT)
    squeeze = open_inspected_model("squeezenet1_1:none", on="cpu")
    Image.new("RGB", (64, 64)).save("black.png")
    with pytest.raises(UsageError, match="no run of convlens"):
        nearest_neighbors(squeeze, select_pictures(squeeze, ["black.png"]), folder=OUT)


def test_features_that_never_change_and_a_single_one(
    run: InspectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(width: int, scale: float) -> None:
        def seen(
            subject: InspectedModel, batches: Iterable[torch.Tensor]
        ) -> Iterator[PenultimateOutputs]:
            for images in batches:
                noise = torch.randn(len(images), width) * scale
                yield PenultimateOutputs(noise + 1, torch.zeros(len(images), len(run.classes)))

        monkeypatch.setattr("convlens.interpret.embedding.penultimate_features", seen)

    for method in EMBEDDINGS:
        same(5, 0)  # t-SNE of them would end in a segmentation fault
        with pytest.raises(DataError, match="the same for all"):
            embed(run, method, folder=OUT, images=40, quiet=True)
        same(1, 5)
        points = embed(run, method, folder=OUT, images=40, quiet=True).points
        assert np.isfinite(points).all()

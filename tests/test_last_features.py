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
from convlens.errors import DataError, ModelFileError, UsageError
from convlens.inspection.embedding import EMBEDDINGS, embed, pca
from convlens.inspection.neighbours import nearest
from convlens.inspection.penultimate import Seen, penultimate
from convlens.inspection.subjects import Subject, choose_pictures, open_subject
from convlens.showing import measures as showing_measures
from support import TINY

OUT = Path("plots")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        convlens.train(TINY, name="small", quiet=True, test=False)
    return place / "models" / "small"


@pytest.fixture
def run(place: Path) -> Subject:
    return open_subject(str(place), on="cpu")


def test_last_features_are_what_the_head_is_given(run: Subject) -> None:
    images = run.split("val").rows.gather(torch.arange(10))
    seen = list(penultimate(run, images.split(4)))
    features, logits = (torch.cat(parts) for parts in zip(*seen, strict=True))
    head = run.model.classifier
    torch.testing.assert_close(head(features), logits)
    with torch.inference_mode():
        torch.testing.assert_close(logits, run.model(run.prepared(images)))
    assert not head._forward_pre_hooks
    # A head that is a convolution is given maps: their means are taken.
    squeeze = open_subject("squeezenet1_1:none", on="cpu")
    (found,) = penultimate(squeeze, [torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
    assert (found.features.shape, found.logits.shape) == ((1, 512), (1, 1000))


@pytest.mark.parametrize("method", list(EMBEDDINGS))
def test_every_embedding_is_seeded_and_written(
    run: Subject, method: str, capsys: pytest.CaptureFixture[str]
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
    showing_measures.embedded(first)
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


def test_embeddings_that_can_not_be_made(run: Subject) -> None:
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
    run: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = choose_pictures(run, ["val:0", "val:3"])
    result = nearest(run, pictures, 4, folder=OUT, quiet=True)
    train = run.split("train")
    every = (
        torch.cat([p.pixels[None] for p in pictures]),
        train.rows.gather(torch.arange(len(train))),
    )
    query, other = (next(penultimate(run, [images])).features.double() for images in every)
    distance = 1 - F.cosine_similarity(query[:, None], other[None], dim=2)
    for row, one in enumerate(result.found):
        order = distance[row].argsort(stable=True)[:4].tolist()
        assert [near.number for near in one.neighbours] == order
        assert [near.id for near in one.neighbours] == [train.ids[i] for i in order]
        assert [n.distance for n in one.neighbours] == pytest.approx(
            [float(distance[row, i]) for i in order], abs=1e-9
        )
        assert [n.label for n in one.neighbours] == [run.classes[train.labels[i]] for i in order]
    assert result.searched == len(train)
    showing_measures.neighboured(result)
    assert result.found[0].neighbours[0].id in capsys.readouterr().out
    json.dumps(result.to_dict())


def test_copies_are_marked_and_an_image_is_not_its_own_neighbour(run: Subject) -> None:
    train = run.split("train")
    pixels = train.rows.gather(torch.tensor([5]))[0, 0].numpy()
    Image.fromarray(pixels).save("copy.png")
    Image.fromarray(np.clip(pixels.astype(int) + 3, 0, 255).astype(np.uint8)).save("brighter.png")
    Image.new("L", pixels.shape, 100).save("plain.png")
    asked = ["copy.png", "brighter.png", "plain.png", "train:5"]
    result = nearest(run, choose_pictures(run, asked), 3, folder=OUT, quiet=True)
    copy, brighter, plain, own = result.found
    assert (copy.neighbours[0].number, copy.neighbours[0].same) == (5, "identical")
    assert copy.neighbours[0].distance == pytest.approx(0, abs=1e-9)
    five = [near for near in brighter.neighbours if near.number == 5]
    assert [near.same for near in five] == ["near-identical"]
    assert {near.same for near in plain.neighbours} == {""}
    assert 5 not in [near.number for near in own.neighbours]
    assert (own.label, copy.label) == (run.classes[train.labels[5]], None)


def test_more_neighbours_than_training_images_and_none(run: Subject) -> None:
    count = len(run.split("train"))
    (one,) = nearest(run, choose_pictures(run, ["train:0"]), 10_000, folder=OUT, quiet=True).found
    assert len(one.neighbours) == count - 1
    with pytest.raises(UsageError, match="no images"):
        nearest(run, [], folder=OUT)
    squeeze = open_subject("squeezenet1_1:none", on="cpu")
    Image.new("RGB", (64, 64)).save("black.png")
    with pytest.raises(UsageError, match="no run of convlens"):
        nearest(squeeze, choose_pictures(squeeze, ["black.png"]), folder=OUT)


def test_features_that_never_change_and_a_single_one(
    run: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(width: int, scale: float) -> None:
        def seen(subject: Subject, batches: Iterable[torch.Tensor]) -> Iterator[Seen]:
            for images in batches:
                noise = torch.randn(len(images), width) * scale
                yield Seen(noise + 1, torch.zeros(len(images), len(run.classes)))

        monkeypatch.setattr("convlens.inspection.embedding.penultimate", seen)

    for method in EMBEDDINGS:
        same(5, 0)  # t-SNE of them would end in a segmentation fault
        with pytest.raises(DataError, match="the same for all"):
            embed(run, method, folder=OUT, images=40, quiet=True)
        same(1, 5)
        points = embed(run, method, folder=OUT, images=40, quiet=True).points
        assert np.isfinite(points).all()

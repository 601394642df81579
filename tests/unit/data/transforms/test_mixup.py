"""MixUp and CutMix: what is drawn, each image against torchvision's, and training on mixtures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torchvision.transforms import v2

from convlens.data.transforms import mixup
from convlens.data.transforms.mixup import MixParameters
from convlens.data.transforms.pipeline import MIXES, build_pipeline
from convlens.data.transforms.random import SampleInfo
from convlens.engine import loop
from convlens.training import train
from helpers.support import PLAN, begin, tiny

names = pytest.mark.parametrize("name", list(MIXES))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 24, height: int = 9, width: int = 12) -> tuple[Tensor, Tensor]:
    """Images, and labels as probabilities of 5 classes."""
    images = torch.rand(n, 3, height, width, generator=seeded(1))
    return images, mixup.one_hot(torch.arange(n) % 5, 5)


# What is drawn


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.2, 0.5, 1.0, 3.0, 40.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    u = torch.rand(4, 40_000, generator=seeded(2))
    drawn = mixup.beta(u, alpha).double().numpy()
    assert np.isfinite(drawn).all()
    assert 0 <= drawn.min() <= drawn.max() <= 1
    # Not nearer to 0 and 1 than this: there float32 can't tell a small alpha's draws apart.
    at = np.linspace(0.001, 0.999, 999)
    seen = np.searchsorted(np.sort(drawn), at) / len(drawn)
    assert np.abs(seen - stats.beta(alpha, alpha).cdf(at)).max() < 1.63 / math.sqrt(len(drawn))


@pytest.mark.parametrize("alpha", [1e-6, 0.2, 1.0, 1e6])
def test_no_uniform_number_makes_a_share_that_is_none(alpha: float) -> None:
    ends = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    shares = mixup.beta(torch.cartesian_prod(ends, ends, ends, ends).T, alpha)
    assert torch.isfinite(shares).all()
    assert (shares >= 0).all()
    assert (shares <= 1).all()


def test_partners_are_a_permutation_and_everything_is_independent() -> None:
    images = torch.zeros(6000, 1, 20, 30)
    drawn = mixup.draw_mix(images, seeded(), alpha=1.0, p=1.0)
    assert sorted(drawn.partner.tolist()) == list(range(6000))
    assert set(drawn.y.tolist()) == set(range(20))
    assert set(drawn.x.tolist()) == set(range(30))
    together = torch.corrcoef(torch.stack([v.double() for v in drawn]))
    assert (together - torch.eye(4)).abs().max() < 0.06


@names
def test_probabilities(name: str) -> None:
    images = torch.rand(2000, 1, 8, 8, generator=seeded())
    labels = torch.eye(2000)
    for p in (0, 0.3, 1):
        mixed, _ = MIXES[name](images, labels, seeded(3), p=p)
        touched = (mixed != images).flatten(1).any(1).float().mean().item()
        # One image is its own partner; a box of CutMix may have no pixel.
        slack = 4 * math.sqrt(p * (1 - p) / 2000) + (0.12 * p if name == "CutMix" else 0.005)
        assert abs(touched - p) <= slack, (p, touched)


# Against torchvision, image by image


def pair(images: Tensor, labels: Tensor, drawn: MixParameters, i: int) -> tuple[Tensor, Tensor]:
    """Image i with its partner before it, which is whom torchvision mixes it with."""
    two = torch.stack([drawn.partner[i], torch.tensor(i)])
    return images[two], labels[two]


def test_mix_up() -> None:
    images, labels = batch()
    drawn = mixup.draw_mix(images, seeded(4), alpha=0.6, p=0.8)
    mixed, shares = mixup.apply_mixup(images, labels, drawn)
    theirs = v2.MixUp(alpha=0.6, num_classes=5)
    for i in range(len(images)):
        two, their_labels = pair(images, labels, drawn, i)
        how = {"lam": float(drawn.share[i]), "labels": their_labels, "batch_size": 2}
        torch.testing.assert_close(mixed[i], theirs.transform(two, how)[1])
        torch.testing.assert_close(shares[i], theirs.transform(their_labels, how)[1])


def box(drawn: MixParameters, i: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Torchvision's box for a share and a centre, in its words."""
    r = 0.5 * math.sqrt(1.0 - float(drawn.share[i]))
    x, y, half_w, half_h = int(drawn.x[i]), int(drawn.y[i]), int(r * width), int(r * height)
    return (
        max(x - half_w, 0),
        max(y - half_h, 0),
        min(x + half_w, width),
        min(y + half_h, height),
    )


def test_cut_mix() -> None:
    images, labels = batch(60)
    drawn = mixup.draw_mix(images, seeded(4), alpha=1.0, p=0.8)
    mixed, shares = mixup.apply_cutmix(images, labels, drawn)
    theirs = v2.CutMix(alpha=1.0, num_classes=5)
    for i in range(len(images)):
        two, their_labels = pair(images, labels, drawn, i)
        x1, y1, x2, y2 = box(drawn, i, 9, 12)
        left = 1.0 - (x2 - x1) * (y2 - y1) / (9 * 12)
        how = {"box": (x1, y1, x2, y2), "lam_adjusted": left, "labels": their_labels}
        how["batch_size"] = 2
        assert torch.equal(mixed[i], theirs.transform(two, how)[1])
        torch.testing.assert_close(shares[i], theirs.transform(their_labels, how)[1])


def test_a_label_shares_as_the_pixels_do() -> None:
    images = torch.arange(50.0).view(50, 1, 1, 1).expand(-1, 1, 8, 11)
    mixed, shares = MIXES["CutMix"](images, torch.eye(50), seeded())
    for picture, share in zip(mixed, shares, strict=True):
        pixels = torch.bincount(picture.flatten().long(), minlength=50) / 88
        torch.testing.assert_close(share, pixels)
    assert int((shares.max(1).values < 1).sum()) > 10


# In a row, and with few of everything


def mixed_twice(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    pipeline = build_pipeline([("MixUp", {"p": 0.5}), ("CutMix", {"p": 0.5})], classes=classes)
    return pipeline(images, labels, SampleInfo(torch.arange(len(images)), 1, 0), seeded(7))


def test_mixtures_can_be_mixed() -> None:
    images, labels = batch(40)
    found, shares = mixed_twice(images, labels.argmax(1), 5)
    g = seeded(7)
    once = mixup.random_mix_up(images, labels, g, p=0.5)
    expected, their_shares = mixup.random_cut_mix(*once, g, p=0.5)
    assert torch.equal(found, expected)
    assert torch.equal(shares, their_shares)
    torch.testing.assert_close(shares.sum(1), torch.ones(40))
    assert int((shares > 0).sum(1).max()) > 2


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("classes", [1, 2])
def test_one_image_or_one_class(n: int, classes: int) -> None:
    images, _ = batch(n)
    found, shares = mixed_twice(images, torch.zeros(n, dtype=torch.int64), classes)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(shares, torch.eye(classes)[:1].expand(n, -1))


def test_labels_are_not_mixed_without_the_number_of_classes() -> None:
    images, _ = batch(3)
    with pytest.raises(ValueError, match="number of classes"):
        mixed_twice(images, torch.arange(3), 0)


@names
def test_nothing_is_read_from_the_device(name: str) -> None:
    images = torch.empty(20, 3, 16, 16, device="meta")
    labels = mixup.one_hot(torch.empty(20, dtype=torch.int64, device="meta"), 4)
    mixed, shares = MIXES[name](images, labels, seeded())
    assert (mixed.shape, shares.shape) == (images.shape, (20, 4))


# Training on mixtures


def test_a_step_counts_the_likeliest_class_and_smooths_shares() -> None:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
        model.bias.zero_()
    images = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.0, 0.6]])  # the first is answered rightly
    criterion = nn.CrossEntropyLoss(label_smoothing=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = [[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]]
    result = loop.TrainLoop(model, optimizer, criterion, PLAN).train_step(images, labels)
    expected = 0.0
    for row, shares in zip(logits, labels.tolist(), strict=True):
        whole = math.log(sum(math.exp(v) for v in row))
        smooth = [0.7 * share + 0.3 / 3 for share in shares]
        expected += sum(s * (whole - v) for s, v in zip(smooth, row, strict=True)) / 2
    assert float(result.loss) == pytest.approx(expected, rel=1e-5)
    assert int(result.num_correct) == 1


@names
def test_a_network_learns_from_mixtures(name: str) -> None:
    options: tuple[Any, ...] = (
        f'augment=[{{"{name}": {{"alpha": 0.4}}}}]',
        "optim.label_smoothing=0.1",
        "train.epochs=12",
    )
    job, place = begin(tiny(*options), name)
    rows, _ = train.fit(job, place)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert 0.3 < rows[-1]["train_accuracy"] < 1
    assert rows[-1]["val_accuracy"] > 0.5

"""What alternating flips go by: a coin for each image, tossed once for all epochs."""

from __future__ import annotations

import torch
from torchvision.transforms.v2 import functional as reference

from convlens.data.transforms import geometry
from convlens.data.transforms.random import SampleInfo, random_coins


def test_alternating_flip_by_number_seed_and_epoch_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    images, numbers = torch.rand(200, 3, 4, 5, generator=generator), torch.arange(200)
    place = SampleInfo(numbers, epoch=1, seed=4)
    first = random_coins(place)
    for epoch, chosen in ((1, first), (2, ~first), (3, first), (10, ~first)):
        result = geometry.alternating_flip(images, generator, place._replace(epoch=epoch))
        slow = [
            reference.horizontal_flip(x) if c else x for x, c in zip(images, chosen, strict=True)
        ]
        assert torch.equal(result, torch.stack(slow))
    order = torch.randperm(200, generator=generator)  # whatever batch an image is in
    assert torch.equal(random_coins(place._replace(numbers=order)), first[order])


def test_coins_are_fair_and_independent() -> None:
    tosses = torch.stack(
        [random_coins(SampleInfo(torch.arange(10_000), 1, seed)) for seed in range(20)]
    )
    signs = tosses.double() * 2 - 1
    assert signs.mean(1).abs().max() < 0.045  # 4.5 standard errors
    for lag in (1, 2, 3, 4, 64, 128, 1000):
        assert (signs[:, lag:] * signs[:, :-lag]).mean(1).abs().max() < 0.045
    between = torch.corrcoef(signs) - torch.eye(20)
    assert between.abs().max() < 0.045

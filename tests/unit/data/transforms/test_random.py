"""Random numbers for each image, drawn by itself or as a row of a batch."""

from __future__ import annotations

import pytest
import torch

from convlens.data.transforms.random import (
    SampleInfo,
    SharedGenerator,
    first_fit,
    integer_below,
    random_coins,
    symmetric_range,
    uniform_between,
    uniform_numbers,
)
from convlens.distributed import Share
from helpers.augmentations import seeded


def test_random_coins_are_fair_and_independent() -> None:
    tosses = torch.stack(
        [random_coins(SampleInfo(torch.arange(10_000), 1, seed)) for seed in range(20)]
    )
    signs = tosses.double() * 2 - 1
    assert signs.mean(1).abs().max() < 0.045  # 4.5 standard errors
    for lag in (1, 2, 3, 4, 64, 128, 1000):
        assert (signs[:, lag:] * signs[:, :-lag]).mean(1).abs().max() < 0.045
    between = torch.corrcoef(signs) - torch.eye(20)
    assert between.abs().max() < 0.045


def test_rows_of_a_shared_batch_get_the_numbers_of_the_full_batch() -> None:
    images = torch.zeros(10, 1, 2, 2)
    expected = uniform_numbers(images, seeded(3), 4)
    assert expected.shape == (4, 10)
    generator = SharedGenerator()
    generator.share = Share(2, 5, 10, 0.3)
    assert torch.equal(uniform_numbers(images[2:5], generator.manual_seed(3), 4), expected[:, 2:5])
    assert torch.equal(uniform_numbers(images, generator.manual_seed(3), 4), expected)
    with pytest.raises(AssertionError, match="needs_full_batch"):
        uniform_numbers(images[2:5], generator, 1, count=12)


def test_uniform_numbers_are_scaled_to_ranges_and_integers() -> None:
    u = torch.tensor([0.0, 0.5, 0.75])
    assert uniform_between(u, (-2, 2)).tolist() == [-2, 0, 1]
    assert integer_below(u, 4).tolist() == [0, 2, 3]
    assert symmetric_range(0.25, 1.0) == (0.75, 1.25)
    assert symmetric_range([1, 2]) == (1.0, 2.0)


def test_the_first_box_that_fits_is_chosen() -> None:
    u = torch.full((20, 2), 0.5)
    u[:10, 0] = torch.tensor([0.9] * 4 + [0.16] + [0.04] * 5)  # areas of 90, 90, ..., 16, 4, ...
    u[:10, 1] = 0.9
    first, second, fits = first_fit(u, (0, 1), (1, 1), area=100, min_side=1, max_sides=(5, 5))
    assert fits.tolist() == [True, False]
    assert (float(first[0]), float(second[0])) == (4, 4)

"""Linear CKA: 1 for representations equal up to rotation and scale, 0 for independent noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convlens.interpret.streaming_stats import CKA, gram_matrix, hsic


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cka(one: Tensor, other: Tensor, size: int = 1000) -> float | None:
    similarity = CKA()
    for a, b in zip(one.split(size), other.split(size), strict=True):
        similarity.add({"a": gram_matrix(a), "b": gram_matrix(b)})
    return similarity.matrix(["a", "b"])[0][1]


def test_cka_is_invariant_to_rotation_scale_and_shift() -> None:
    maps = noise(60, 4, 3, 3)
    turn = torch.linalg.qr(noise(36, 36, seed=1)).Q
    turned = (maps.flatten(1) @ turn * 1000 + 50).reshape(60, 36, 1, 1)
    assert cka(maps, turned) == pytest.approx(1, abs=1e-5)
    assert cka(maps, turned, 20) == pytest.approx(1, abs=1e-5)


def test_cka_of_independent_noise_is_near_zero_even_in_small_batches() -> None:
    # The biased estimator gives 0.9 here: more features than images.
    found = cka(noise(1000, 400), noise(1000, 400, seed=1), 50)
    assert found == pytest.approx(0, abs=0.03)


def test_hsic_is_the_mean_over_all_quadruples_of_images() -> None:
    """The definition: a U-statistic over i, j, q, r (Song et al. 2012, equation 4)."""
    from itertools import permutations

    k, other = gram_matrix(noise(6, 3)), gram_matrix(noise(6, 2, seed=1))
    terms = [
        float(k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q]))
        for i, j, q, r in permutations(range(6), 4)
    ]
    assert float(hsic(torch.stack([k, other]))[0, 1]) == pytest.approx(sum(terms) / len(terms))


def test_streamed_cka_averages_the_batches_and_is_close_to_that_of_all_images() -> None:
    shared = noise(600, 8)
    one = shared @ noise(8, 20, seed=1) + noise(600, 20, seed=2)
    other = shared @ noise(8, 30, seed=3) + noise(600, 30, seed=4)
    whole = cka(one, other)
    assert whole is not None
    assert 0.2 < whole < 0.9
    assert cka(one, other, 100) == pytest.approx(whole, abs=0.03)
    parts = [
        hsic(torch.stack([gram_matrix(a), gram_matrix(b)]))
        for a, b in zip(one.split(100), other.split(100), strict=True)
    ]
    mean = torch.stack(parts).mean(0)
    by_hand = float(mean[0, 1] / (mean[0, 0] * mean[1, 1]).sqrt())
    assert cka(one, other, 100) == pytest.approx(by_hand)


def test_cka_of_constants_and_of_batches_below_four_images_is_none() -> None:
    assert cka(torch.full((30, 5), 0.1), noise(30, 5)) is None
    assert cka(noise(3, 5), noise(3, 5)) is None
    # A last batch of three images is skipped.
    assert cka(noise(43, 5), 2 * noise(43, 5), 20) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e5])
def test_cka_does_not_depend_on_the_scale_of_activations(scale: float) -> None:
    maps = noise(60, 20)
    assert cka(maps * scale, maps) == pytest.approx(1, abs=1e-5)
    assert cka(torch.full((60, 5), 0.1 * scale), maps) is None

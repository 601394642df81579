"""Sanity checks of attribution maps: their values, and that they detect an uninformative method."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from convlens import models
from convlens.interpret import attribution_sanity
from convlens.interpret.attribution_methods import METHODS, Method, attribution_maps
from helpers.attribution_networks import Reds, images_of, red_patch


def test_weights_are_randomized_from_the_head_down_in_a_copy() -> None:
    torch.manual_seed(0)
    model = models.build_model("cnn", 3, 3, 12, {"widths": [4, 8]}).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    changed = []
    for stage, randomized in attribution_sanity.cascading_randomization(model):
        now = randomized.state_dict()
        different = {key for key in now if not torch.equal(now[key], before[key])}
        assert not any("running" in key for key in different)
        changed.append((stage, {key.partition(".")[0] for key in different}))
    assert changed == [
        ("classifier", {"classifier"}),
        ("stage2", {"classifier", "stage2"}),
        ("stage1", {"classifier", "stage2", "stage1"}),
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    old, new = before["stage2.0.weight"], now["stage2.0.weight"]
    assert float(new.std()) == pytest.approx(float(old.std()), rel=0.2)
    again = list(attribution_sanity.cascading_randomization(model))[-1][1].state_dict()
    assert all(torch.equal(again[key], now[key]) for key in now), "the same seed, the same draws"


def test_rank_correlations_equal_scipy_and_constant_maps_are_handled() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 4, 4, generator=generator)
    second = torch.randn(3, 4, 4, generator=generator).round()  # with ties
    expected = [
        scipy.stats.spearmanr(a.abs().flatten(), b.abs().flatten()).statistic
        for a, b in zip(first, second, strict=True)
    ]
    assert attribution_sanity.rank_correlations(first, second) == pytest.approx(expected)
    assert attribution_sanity.rank_correlations(first, -3 * first) == pytest.approx([1, 1, 1])
    blank = torch.zeros(1, 4, 4)
    assert attribution_sanity.rank_correlations(first[:1], blank) == [0]
    assert math.isnan(attribution_sanity.rank_correlations(blank, first[:1])[0])


def test_ssim_is_the_mean_over_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 1, 9, 9, generator=generator).double()
    a, b = (first[0] / first.max()).numpy(), (second[0] / second.max()).numpy()
    values = []
    for i, j in itertools.product(range(3), repeat=2):
        p, q = a[i : i + 7, j : j + 7], b[i : i + 7, j : j + 7]
        cover = ((p - p.mean()) * (q - q.mean())).mean()
        top = (2 * p.mean() * q.mean() + 1e-4) * (2 * cover + 9e-4)
        values.append(top / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (p.var() + q.var() + 9e-4)))
    assert attribution_sanity.ssim(first, second) == pytest.approx([np.mean(values)])
    assert attribution_sanity.ssim(first, 5 * first) == pytest.approx([1])
    assert attribution_sanity.ssim(first[:, :2, :2], second[:, :2, :2])[0] < 1


def test_means_have_student_intervals() -> None:
    mean = attribution_sanity.mean_with_interval([1.0, 2.0, 3.0, 4.0, 5.0, math.nan])
    half = 2.776445 * math.sqrt(2.5 / 5)  # t of 4 degrees of freedom, variance 2.5
    assert (mean.value, mean.n) == (3, 5)
    assert mean.interval95 == pytest.approx((3 - half, 3 + half), abs=1e-5)
    # With two values the interval would exceed the possible range.
    two = attribution_sanity.mean_with_interval([0.1, 0.9, math.nan])
    assert (two.value, two.n, two.interval95) == (0.5, 2, None)
    assert attribution_sanity.mean_with_interval([0.5]).interval95 is None
    assert str(attribution_sanity.mean_with_interval([0.5])) == "0.50"
    assert math.isnan(attribution_sanity.mean_with_interval([math.nan]).value)


def test_cells_are_ranked_by_their_means_and_equal_ones_at_random() -> None:
    maps = torch.zeros(1, 12, 12)  # 12 pixels in 8 cells: 2, 1, 2, 1, ... wide
    maps[0, 3:5] = -1
    maps[0, 0:2, 0:2] = 5
    maps[0, 2, 2] = 7
    (ranks,) = attribution_sanity.cell_ranks(maps)
    assert sorted(ranks.tolist()) == list(range(64))
    assert int(ranks[9]) == 0, "one pixel of 7"
    assert int(ranks[0]) == 1, "four of 5"
    assert sorted(ranks.view(8, 8)[2].tolist()) == list(range(56, 64)), "rows 3 and 4 of -1"
    assert not torch.equal(ranks, attribution_sanity.cell_ranks(maps, seed=1)[0])


class Left(nn.Module):
    """The logit of class 1 is 4 times the mean of the left half of the image."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images[..., :4].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(mean), 4 * mean], 1)


def test_curves_and_areas_of_a_network_with_a_closed_form() -> None:
    images, targets = torch.ones(1, 1, 8, 8), torch.tensor([1])
    left_first = torch.arange(64).view(8, 8).T.reshape(1, 64)  # column by column
    found = attribution_sanity.perturbation_curves(
        Left(), images, targets, left_first, insert=False
    )
    assert found.shape == (1, 33)
    remaining = np.clip(1 - np.arange(33) / 16, 0, 1)
    expected = 1 / (1 + np.exp(-4 * remaining))
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    assert attribution_sanity.areas_under_curves(found)[0] == pytest.approx(
        np.trapezoid(expected, dx=1 / 32)
    )
    # The blurred image equals the image (all ones), so insertion changes nothing.
    flat = attribution_sanity.perturbation_curves(Left(), images, targets, left_first, insert=True)
    np.testing.assert_allclose(flat, expected[0])
    right_first = 63 - left_first
    later = attribution_sanity.perturbation_curves(
        Left(), images, targets, right_first, insert=False
    )
    assert (later[0, :17] == later[0, 0]).all()
    assert (
        attribution_sanity.areas_under_curves(later)[0]
        > attribution_sanity.areas_under_curves(found)[0]
    )


def edges(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """A method that shows the edges of the image and ignores the network."""
    steps = images.mean(1).diff(dim=2, prepend=images.mean(1)[..., :1])
    return steps.abs()


def test_edge_detector_fails_the_randomization_check_and_grad_cam_passes() -> None:
    torch.manual_seed(0)
    model = models.build_model("cnn", 4, 3, 32, {"widths": [8, 8, 8]}).eval()
    images, targets = images_of(6), torch.arange(6) % 4
    methods = {
        "edges": Method("Edges", edges, "grey levels"),
        "grad-cam": METHODS["grad-cam"],
    }
    maps = {
        name: attribution_maps(method, model, images, targets, "stage2")
        for name, method in methods.items()
    }
    progress: list[int] = []
    found = attribution_sanity.run_sanity_checks(
        model, images, targets, "stage2", methods, maps, progress.append
    )
    assert sum(progress) == attribution_sanity.count_progress_steps(2, 4, 6)
    edge = found.methods["edges"]
    assert [mean.value for mean in edge.spearman.values()] == pytest.approx([1, 1, 1, 1])
    assert list(edge.ssim) == ["classifier", "stage3", "stage2", "stage1"]
    assert "hardly depends on the weights" in edge.sentences()[0]
    left = list(found.methods["grad-cam"].spearman.values())[-1]
    assert abs(left.value) < 0.5
    assert "Grad-CAM: depends on the weights" in found.methods["grad-cam"].sentences()[0]


def test_occlusion_beats_random_orders() -> None:
    images = torch.cat([red_patch(), red_patch().roll(-9, 3), red_patch().roll(7, 2)])
    targets, methods = torch.ones(3, dtype=torch.int64), {"occlusion": METHODS["occlusion"]}
    model = Reds().eval()
    maps = {"occlusion": attribution_maps(methods["occlusion"], model, images, targets, "")}
    found = attribution_sanity.run_sanity_checks(model, images, targets, "", methods, maps)
    occlusion = found.methods["occlusion"]
    assert occlusion.areas["deletion"].value < found.random_areas["deletion"].value - 0.05
    assert occlusion.areas["insertion"].value > found.random_areas["insertion"].value
    gain = found.random_areas["deletion"].value - occlusion.areas["deletion"].value
    assert occlusion.gains["deletion"].value == pytest.approx(gain)
    result = found.to_dict()
    assert len(result["random"]["curves"]["deletion"]) == 33
    assert result["methods"]["occlusion"]["verdict"] == occlusion.sentences()


def test_conclusions_name_the_ignored_stages_and_uncertain_results() -> None:
    def words(*values: tuple[float, float]) -> str:
        names = ("fc", "layer2", "layer1")
        means = {
            name: attribution_sanity.MeanWithInterval(v, (v - half, v + half), 5)
            for name, (v, half) in zip(names, values, strict=True)
        }
        gains = {
            order: attribution_sanity.MeanWithInterval(0.1, (-0.1, 0.3), 5)
            for order in attribution_sanity.CURVES
        }
        checked = attribution_sanity.MethodChecks("M", means, means, gains, gains, {})
        assert "not distinguishable from random" in checked.sentences()[1]
        return checked.sentences()[0]

    assert "but hardly on those of fc to layer2 (0.80" in words((0.9, 0.1), (0.8, 0.1), (0, 0.1))
    assert words((0.9, 0.1), (0.3, 0.4), (0, 0.1)).endswith("those of fc (0.90 (0.80 to 1.00))")
    assert words((0.4, 0.2), (0.3, 0.4), (0.1, 0.1)).endswith("weights 0.10 (0.00 to 0.20))")
    assert "can't be told from 5 images (" in words((0.4, 0.2), (0.3, 0.4), (0.4, 0.2))


def test_verdicts_without_an_interval_can_not_be_told() -> None:
    few = attribution_sanity.mean_with_interval([-0.02, -0.03, -0.01])
    assert (few.n, few.interval95) == (3, None)
    assert not few.is_below(0)
    assert not few.is_above(-1)
    gains = dict.fromkeys(attribution_sanity.CURVES, few)
    checks = attribution_sanity.MethodChecks("M", {"fc": few}, {"fc": few}, gains, gains, {})
    weights, pixels = checks.sentences()
    needed = "can't be told from 3 images; 5 or more give an interval"
    assert weights == (
        f"M: whether it depends on the weights {needed} "
        "(rank correlation with random weights -0.02)"
    )
    assert pixels == (
        f"M: whether the marked pixels matter more than random ones {needed} "
        "(gain in area: deletion -0.02, insertion -0.02)"
    )

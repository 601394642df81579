"""The weighted and the focal loss: values by hand, against torch, over batches cut in parts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F

from convlens import optim
from convlens.engine.loop import TrainLoop
from convlens.engine.losses import ClassificationLoss, balanced_weights, normalized_weights
from convlens.models.cnn import CNN
from convlens.recipe import OptimConfig
from helpers.support import PLAN, same

WEIGHTS = (0.5, 3.0, 1.25)


def batch(count: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, 3, generator=generator)
    return logits, torch.randint(0, 3, (count,), generator=generator)


# Values


def test_the_weighted_loss_is_the_weighted_sum_over_the_number_of_rows() -> None:
    # By hand: probabilities (1/4, 3/4) and (4/5, 1/5), labels 1 and 0, weights 3 and 0.5.
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    loss = ClassificationLoss((0.5, 3.0))(logits, torch.tensor([1, 0]))
    assert float(loss) == pytest.approx((3 * math.log(4 / 3) + 0.5 * math.log(5 / 4)) / 2, rel=1e-6)


def test_the_focal_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    loss = ClassificationLoss(gamma=2.0)(logits, torch.tensor([0, 0]))
    expected = ((3 / 4) ** 2 * math.log(4) + (1 / 5) ** 2 * math.log(5 / 4)) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_without_weights_it_is_the_cross_entropy_of_torch(smoothing: float) -> None:
    logits, labels = batch()
    for targets in (labels, F.one_hot(labels, 3).float(), logits.flip(0).softmax(1)):
        expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        loss = ClassificationLoss((1.0, 1.0, 1.0), label_smoothing=smoothing)(logits, targets)
        torch.testing.assert_close(loss, expected)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 1000),
)
def test_it_equals_a_slow_reference(
    weights: list[float], gamma: float, smoothing: float, seed: int
) -> None:
    logits, labels = batch(5, seed)
    probs = logits.double().softmax(1)
    soft = logits.flip(0).double().softmax(1)
    expected_hard = expected_soft = 0.0
    for row in range(5):
        focal = [-((1 - p) ** gamma) * math.log(p) for p in probs[row].tolist()]
        smoothed = [(1 - smoothing) * loss + smoothing * sum(focal) / 3 for loss in focal]
        by_class = [w * loss for w, loss in zip(weights, smoothed, strict=True)]
        expected_hard += by_class[int(labels[row])] / 5
        mixed = zip(soft[row].tolist(), by_class, strict=True)
        expected_soft += sum(share * loss for share, loss in mixed) / 5
    loss = ClassificationLoss(weights, gamma=gamma, label_smoothing=smoothing)
    assert float(loss(logits, labels)) == pytest.approx(expected_hard, rel=1e-4)
    assert float(loss(logits, soft.float())) == pytest.approx(expected_soft, rel=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
def test_gradients_are_finite_for_certain_and_for_wrong_predictions(
    gamma: float, size: float
) -> None:
    logits = torch.tensor([[size, 0.0], [0.0, size], [size, size]], requires_grad=True)
    loss = ClassificationLoss((2.0, 0.5), gamma=gamma)(logits, torch.tensor([0, 0, 1]))
    loss.backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all())


def test_gradients_are_those_of_finite_differences() -> None:
    logits, labels = batch(4)
    loss = ClassificationLoss(WEIGHTS, gamma=2.0, label_smoothing=0.1).double()
    inputs = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (inputs,))


# Weights


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.repeat([0, 1, 2], [50, 7, 200])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_weights([50, 7, 200]) == pytest.approx(expected)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any))
def test_weights_have_a_mean_of_one_over_the_images(counts: list[int]) -> None:
    balanced = balanced_weights(counts)
    scaled = normalized_weights([1.0 + i for i in range(len(counts))], counts)
    for weights in (balanced, scaled):
        total = sum(w * n for w, n in zip(weights, counts, strict=True))
        assert total / sum(counts) == pytest.approx(1)
    in_total = [w * n for w, n in zip(balanced, counts, strict=True) if n]
    assert in_total == pytest.approx([in_total[0]] * len(in_total))


# One batch equals its micro-batches. (Two processes: test_data_parallel.)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("criterion", ["weighted", "focal"])
def test_one_batch_equals_three_micro_batches(criterion: str, soft: bool) -> None:
    """The weights of the micro-batches differ: a mean over weights would not add up."""
    gamma = 2.0 if criterion == "focal" else 0.0
    loss = ClassificationLoss(WEIGHTS, gamma=gamma, label_smoothing=0.1)
    images = torch.randn(13, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0] * 5 + [1] * 5 + [2] * 3)  # parts of 5, 5 and 3
    if soft:
        one_hot = F.one_hot(targets, 3).float()
        targets = one_hot.lerp(one_hot.flip(0), 0.25)
    found = {}
    for size in (0, 5):
        torch.manual_seed(1)
        model = CNN(3, 1, 8, widths=[4, 6], batch_norm=False)
        optimizer = optim.build_optimizer(model, OptimConfig(name="sgd", lr=0.1))
        loop = TrainLoop(model, optimizer, loss, replace(PLAN, micro_batch_size=size))
        result = loop.train_step(images, targets)
        found[size] = {"loss": result.loss, **model.state_dict()}
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[5][name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_with_equal_weights_is_a_step_of_cross_entropy(precision: str) -> None:
    images, targets = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
    weights = []
    for loss in (nn.CrossEntropyLoss(), ClassificationLoss((1.0, 1.0, 1.0))):
        torch.manual_seed(1)
        model = CNN(3, 1, 8, widths=[4, 6])
        optimizer = optim.build_optimizer(model, OptimConfig(name="sgd", lr=0.1))
        loop = TrainLoop(model, optimizer, loss, replace(PLAN, precision=precision))
        loop.train_step(images, targets)
        weights.append(dict(model.state_dict()))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor)


def test_the_weights_move_with_the_loss_and_are_not_trained() -> None:
    loss = ClassificationLoss(WEIGHTS)
    assert not list(loss.parameters())
    same(dict(loss.state_dict()), {"weights": torch.tensor(WEIGHTS)})

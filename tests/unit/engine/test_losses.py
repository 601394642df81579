"""The losses: values by hand, against torch, over batches cut in parts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F

from convlens import optim, user_code
from convlens.engine.loop import TrainLoop
from convlens.engine.losses import (
    AsymmetricLoss,
    ClassificationLoss,
    LogitAdjustedLoss,
    LossInputs,
    balanced_weights,
    build_loss,
    check_loss,
    class_balanced_weights,
    loss_of_guessing,
    loss_options,
    normalized_weights,
)
from convlens.errors import UsageError
from convlens.models.cnn import CNN
from convlens.recipe import OptimConfig
from convlens.user_code import UntrustedCode
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


def test_the_logit_adjusted_loss_by_hand() -> None:
    # Shares of 0.8 and 0.2 as factors: 1 * 0.8 against 3 * 0.2, so 4/7 and 3/7.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    loss = LogitAdjustedLoss([0.8, 0.2])(logits, torch.tensor([0, 1]))
    assert float(loss) == pytest.approx((math.log(7 / 4) + math.log(7 / 3)) / 2, rel=1e-6)
    # tau = 2: 0.64 against 3 * 0.04, so 16/19 and 3/19.
    loss = LogitAdjustedLoss([0.8, 0.2], tau=2)(logits, torch.tensor([0, 1]))
    assert float(loss) == pytest.approx((math.log(19 / 16) + math.log(19 / 3)) / 2, rel=1e-6)


def test_equal_shares_adjust_nothing() -> None:
    logits, labels = batch()
    loss = LogitAdjustedLoss([1 / 3] * 3, label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_the_asymmetric_loss_by_hand() -> None:
    # Probabilities 1/2, 1/4, 1/4, the label is the first class; each class has 0.3 / 3 of it.
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    loss = AsymmetricLoss(gamma_pos=1, gamma_neg=2, label_smoothing=0.3)
    expected = 0.8 * (1 / 2) * math.log(2) + 2 * 0.1 * (1 / 4) ** 2 * math.log(4)
    assert float(loss(logits, torch.tensor([0]))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma_pos", [0.0, 0.5, 2.0])
def test_the_asymmetric_loss_is_that_of_its_authors(gamma_pos: float) -> None:
    """`ASLSingleLabel` of github.com/Alibaba-MIIL/ASL, in their order of operations."""
    logits, labels = batch()
    log_probs = logits.log_softmax(1)
    is_label = F.one_hot(labels, 3)
    is_other = 1 - is_label
    probs = log_probs.exp()
    base = 1 - probs * is_label - (1 - probs) * is_other
    weighted = log_probs * base.pow(gamma_pos * is_label + 4.0 * is_other)
    smoothed = is_label * 0.9 + 0.1 / 3
    expected = -(smoothed * weighted).sum(1).mean()
    loss = AsymmetricLoss(gamma_pos=gamma_pos, gamma_neg=4.0, label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, labels), expected)


def test_without_exponents_the_asymmetric_loss_is_cross_entropy() -> None:
    logits, labels = batch()
    loss = AsymmetricLoss(gamma_pos=0, gamma_neg=0, label_smoothing=0.2)
    torch.testing.assert_close(
        loss(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.2)
    )


@pytest.mark.parametrize("loss", [AsymmetricLoss(WEIGHTS), LogitAdjustedLoss([0.7, 0.2, 0.1])])
def test_the_loss_of_a_mixed_label_is_the_mix_of_the_losses(loss: nn.Module) -> None:
    logits, labels = batch()
    others = labels.roll(1)
    mixed = 0.75 * F.one_hot(labels, 3) + 0.25 * F.one_hot(others, 3)
    expected = 0.75 * loss(logits, labels) + 0.25 * loss(logits, others)
    torch.testing.assert_close(loss(logits, mixed), expected)


# Weights


def test_class_balanced_weights_by_hand() -> None:
    # beta = 1/2: 1, 2 and 3 images count as 1, 3/2 and 7/4 images.
    weights = class_balanced_weights([1, 2, 3], 0.5)
    mean = (1 * 1 + 2 * (2 / 3) + 3 * (4 / 7)) / 6
    assert weights == pytest.approx([1 / mean, (2 / 3) / mean, (4 / 7) / mean])


def test_class_balanced_weights_are_between_equal_and_balanced_ones() -> None:
    counts = [500.0, 20.0, 0.0]
    assert class_balanced_weights(counts, 0.0) == pytest.approx([1, 1, 0])
    almost = class_balanced_weights(counts, 1 - 1e-9)
    assert almost == pytest.approx(balanced_weights(counts), rel=1e-5)


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
@pytest.mark.parametrize(
    "loss",
    [
        ClassificationLoss(WEIGHTS, label_smoothing=0.1),
        ClassificationLoss(WEIGHTS, gamma=2.0, label_smoothing=0.1),
        ClassificationLoss(class_balanced_weights([5, 5, 3], 0.9)),
        LogitAdjustedLoss([5 / 13, 5 / 13, 3 / 13], weights=WEIGHTS),
        AsymmetricLoss(WEIGHTS),
    ],
    ids=["weighted", "focal", "class_balanced", "logit_adjusted", "asymmetric"],
)
def test_one_batch_equals_three_micro_batches(loss: nn.Module, soft: bool) -> None:
    """The weights of the micro-batches differ: a mean over weights would not add up."""
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


# The registry


def build(*, counts: tuple[float, ...] = (8.0, 2.0), **values: Any) -> nn.Module:
    return build_loss(LossInputs(OptimConfig(**values), counts))


def test_options_reach_the_loss() -> None:
    loss = build(loss="class_balanced", loss_options={"beta": 0.5, "gamma": 1.5})
    assert isinstance(loss, ClassificationLoss)
    assert loss.gamma == 1.5
    assert loss.weights is not None
    assert loss.weights.tolist() == pytest.approx(class_balanced_weights([8, 2], 0.5))
    adjusted = build(loss="logit_adjusted", loss_options={"tau": 0.5})
    assert isinstance(adjusted, LogitAdjustedLoss)
    expected = [0.5 * math.log(0.8), 0.5 * math.log(0.2)]
    assert adjusted.adjustment.tolist() == pytest.approx(expected)
    asymmetric = build(loss="asymmetric", loss_options={"gamma_pos": 1}, label_smoothing=0.1)
    assert isinstance(asymmetric, AsymmetricLoss)
    assert (asymmetric.gamma_pos, asymmetric.gamma_neg) == (1, 4.0)
    assert loss_options("asymmetric") == {"gamma_pos": 0.0, "gamma_neg": 4.0}
    assert loss_options("cross_entropy") == {}


def test_a_class_without_images_has_a_finite_adjustment() -> None:
    loss = build(loss="logit_adjusted", counts=(9.0, 0.0))
    assert bool(torch.isfinite(loss(torch.zeros(1, 2), torch.tensor([1]))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "fokal"}, "unknown loss 'fokal'"),
        ({"loss": "focal", "loss_options": {"beta": 0.9}}, "focal has no option 'beta'"),
        ({"loss": "class_balanced", "loss_options": {"betta": 1}}, r"'betta' \(did you mean beta"),
        ({"loss": "class_balanced", "loss_options": {"beta": 1}}, "beta=1 is not a number"),
        ({"loss": "class_balanced", "loss_options": {"beta": "x"}}, "beta='x' is not a number"),
        ({"loss": "class_balanced", "class_weights": "auto"}, "class weights of its own"),
        ({"loss": "logit_adjusted", "loss_options": {"tau": -1}}, "tau=-1 is not a number"),
        ({"loss": "asymmetric"}, "without optim.label_smoothing"),
        ({"focal_gamma": 1.5}, "no effect with optim.loss=cross_entropy"),
    ],
)
def test_unsuitable_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_loss(OptimConfig(**values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"class_weights": "auto", "label_smoothing": 0.1}, math.log(4)),
        ({"loss": "focal", "focal_gamma": 1.0}, 0.75 * math.log(4)),
        ({"loss": "class_balanced"}, math.log(4)),
        ({"loss": "logit_adjusted"}, math.log(4)),
        # 0.85 for the label, 0.05 for each of three classes, times (1/4)^4.
        (
            {"loss": "asymmetric", "label_smoothing": 0.2},
            (0.85 + 3 * 0.05 / 4**4) * math.log(4),
        ),
    ],
)
def test_the_loss_of_guessing_by_hand(values: dict[str, Any], expected: float) -> None:
    assert loss_of_guessing(OptimConfig(**values), 4) == pytest.approx(expected)


# Losses of users

OWN = """
import torch
from torch import nn
from torch.nn import functional as F


class Loss(nn.Module):
    def __init__(self, num_classes, class_counts, label_smoothing, *, power=1.0):
        super().__init__()
        counts = torch.tensor(class_counts)
        self.register_buffer("weights", (counts.mean() / counts) ** power)
        self.given = num_classes, class_counts, label_smoothing

    def forward(self, logits, targets):
        return (F.cross_entropy(logits, targets, reduction="none") * self.weights[targets]).mean()


def loss(logits, targets, *, scale=1.0):
    return scale * F.cross_entropy(logits, targets)
"""


def test_a_loss_of_a_user_gets_the_keywords_that_it_names() -> None:
    Path("own.py").write_text(OWN)
    with user_code.trust(True):
        values = {"loss": "./own.py:Loss", "loss_options": {"power": 0.5}, "label_smoothing": 0.1}
        loss = build(counts=(9.0, 1.0), **values)
        assert loss.given == (2, [9.0, 1.0], 0.1)
        logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
        # The weights are (5/9)^0.5 and 5^0.5; the labels 1 and 0.
        expected = (5**0.5 * math.log(4 / 3) + (5 / 9) ** 0.5 * math.log(5 / 4)) / 2
        assert float(loss(logits, torch.tensor([1, 0]))) == pytest.approx(expected, rel=1e-6)
        function = build(loss="./own.py:loss", loss_options={"scale": 3.0})
        assert float(function(logits, torch.tensor([1, 1]))) == pytest.approx(
            3 * (math.log(4 / 3) + math.log(5)) / 2, rel=1e-6
        )
        with pytest.raises(UsageError, match=r"has no option 'scael' \(did you mean scale"):
            build(loss="./own.py:loss", loss_options={"scael": 3.0})
        of_torch = build(loss="torch.nn:CrossEntropyLoss", label_smoothing=0.2)
        assert isinstance(of_torch, nn.CrossEntropyLoss)
        assert of_torch.label_smoothing == 0.2
    with pytest.raises(UntrustedCode):
        build(loss="./own.py:loss")

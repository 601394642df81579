"""The forward pass of every number: eval mode, float32, whatever the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from convlens import inference
from convlens.data.batches import Normalise
from convlens.inference import batch_logits, loss_and_accuracy, probabilities, split_logits
from convlens.models.cnn import CNN
from support import PLAN, Memory, Split, Streamed, pictures

NORMALISE = Normalise([0.5], [0.25])


def trained() -> CNN:
    """A network whose norms have seen something, so that train and eval mode differ."""
    torch.manual_seed(2)
    model = CNN(3, 1, 8, widths=[4, 6], dropout=0.5).train()
    for _ in range(3):
        model(torch.randn(16, 1, 8, 8) * 3 + 1)
    return model


@pytest.mark.parametrize("mode", [True, False])
def test_inference_is_in_eval_mode_and_leaves_the_mode_as_it_was(mode: bool) -> None:
    model = trained().train(mode)
    images = pictures(10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logits = batch_logits(model, images, NORMALISE, PLAN)
    assert model.training is mode
    assert all(module.training is mode for module in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    expected = trained().eval()((images.float() / 255 - 0.5) / 0.25)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.equal(logits, batch_logits(model, images, NORMALISE, PLAN))


def test_the_mode_is_back_after_an_error() -> None:
    model = trained()
    with pytest.raises(RuntimeError):
        batch_logits(model, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), NORMALISE, PLAN)
    assert model.training


def test_logits_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = trained(), Split(Memory(pictures(50)), torch.arange(50) % 3)
    whole, labels = split_logits(model, split, NORMALISE, PLAN)
    assert whole.shape == (50, 3)
    assert torch.equal(labels, split.labels)
    for size in (1, 7, 50):
        monkeypatch.setitem(inference.LARGEST, "cpu", size)
        found, _ = split_logits(model, split, NORMALISE, PLAN)
        assert torch.allclose(found, whole, atol=1e-5)
        assert torch.equal(found.argmax(1), whole.argmax(1))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 512, 513])
def test_every_image_counts_once_and_in_order(count: int) -> None:
    images = pictures(count)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    with torch.no_grad():
        model[1].weight.zero_()[:, 0] = torch.tensor([255.0, -255.0])
    told: list[int] = []
    for rows in (Memory(images), Streamed(images)):
        split = Split(rows, torch.zeros(count, dtype=torch.int64))
        logits, _ = split_logits(model, split, Normalise([0.0], [1.0]), PLAN, advance=told.append)
        assert logits[:, 0].round().tolist() == [n % 256 for n in range(count)]
    assert sum(told) == 2 * count


def test_loss_and_accuracy_computed_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(4)]])
    loss, accuracy = loss_and_accuracy(logits, torch.tensor([0, 1, 1]))
    expected = -(math.log(1 / 2) + math.log(1 / 4) + math.log(4 / 5)) / 3
    assert loss == pytest.approx(expected, rel=1e-6)
    assert accuracy == pytest.approx(2 / 3)


def test_probabilities_are_float64_and_add_up_even_for_huge_logits() -> None:
    found = probabilities(torch.tensor([[0.0, math.log(3)], [1e30, -1e30], [3e38, 3e38]]))
    assert found.dtype == np.float64
    assert found.tolist() == [pytest.approx([0.25, 0.75]), [1.0, 0.0], [0.5, 0.5]]

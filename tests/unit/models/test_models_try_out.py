"""Building a network and running it once, as validation of a recipe does."""

from __future__ import annotations

import pytest
import torch

from convlens import models


@pytest.mark.parametrize("name", ["cnn", "fastnet", "wrn", "resnet18"])
def test_trying_out_a_network_does_not_change_the_random_state(name: str) -> None:
    before = torch.get_rng_state()
    model = models.try_out(name, 3, 32, {"dropout": 0.5} if name == "cnn" else {})
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)

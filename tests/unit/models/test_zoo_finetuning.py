"""Fine-tuning of torchvision's networks: stages, freezing, pretrained weights."""

from __future__ import annotations

import pytest
import torch

from convlens import models
from convlens.models import adapt
from convlens.models.stages import freeze, stage_of
from helpers.zoo import ONE_EACH


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_network_has_stages_in_order_and_a_head_to_train(name: str) -> None:
    with torch.device("meta"):
        model = models.build_model(name, 7, 3, 224, {})
    parts = models.model_parts(model)
    stages = stage_of(model)
    assert {*parts.stages, parts.head} >= set(stages.values())
    order = [*parts.stages, parts.head]
    # The token and positions of a ViT belong to modules around its layers.
    positions = [order.index(stages[n]) for n, _ in model.named_parameters() if "." in n]
    if not name.startswith("vit"):
        assert positions == sorted(positions)
    freeze(model, "head")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.rpartition(".")[0] for n in trained} == {parts.head}


@pytest.mark.parametrize("name", ["swin_t", "squeezenet1_1", "mnasnet0_5"])
def test_weights_of_torchvision_fit(name: str) -> None:
    from torchvision import models as torchvision_models

    original = torchvision_models.get_model(name)
    model = models.build_model(name, 7, 1, 64, {})
    fitted = adapt.fit_weights(model, original.state_dict())
    assert not fitted.left or all(n.startswith(models.model_parts(model).head) for n in fitted.left)
    assert {n.rpartition(".")[0] for n in fitted.new} == {models.model_parts(model).head}
    assert len(fitted.adapted) == 1  # the first convolution, for grey images
    state = model.state_dict()
    for key in fitted.matched:
        assert torch.equal(state[key], original.state_dict()[key])

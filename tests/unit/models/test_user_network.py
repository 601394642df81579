"""Networks of users: keywords, stages and head found, unsuitable outputs refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from convlens import models, user_code
from convlens.errors import UsageError
from convlens.models import stages
from helpers.user_parts import forget_imports, write_parts

NET = "./parts.py:Net"
HEAD = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n"


@pytest.fixture(autouse=True)
def trusted() -> Iterator[None]:
    forget_imports()
    write_parts()
    with user_code.trust(True):
        yield


def module(body: str, arguments: str = "num_classes, in_channels") -> str:
    """Write a network whose `__init__` and `forward` are the given lines; return its name."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    text = f"class Net(nn.Module):\n    def __init__(self, {arguments}):\n"
    text += f"        super().__init__()\n{lines}\n"
    Path("other.py").write_text(HEAD + text)
    return "./other.py:Net"


def test_a_network_gets_the_keywords_and_options_that_it_names() -> None:
    model = models.build_model(NET, 5, 3, 16, {"width": 4})
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert model.get_submodule("conv1").weight.shape == (4, 3, 3, 3)
    assert models.model_options(NET) == {"width": 6}
    assert json.dumps(models.model_options(NET))


def test_the_stages_are_the_children_that_are_called_before_the_head() -> None:
    model = models.build_model(NET, 5, 3, 16, {})
    assert models.model_parts(model) == stages.ModelParts(("conv1", "norm", "conv2"), "fc")
    stages.freeze(model, "conv2+")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"conv2.weight", "conv2.bias", "fc.weight", "fc.bias"}
    assert stages.frozen_prefix(model) == ["conv1", "norm"]
    assert model.training  # building does not leave it in eval mode


def test_stages_of_one_sequential_are_its_layers() -> None:
    name = module(
        "    self.net = nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(),\n"
        "        nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "        nn.Linear(6, num_classes))\n"
        "def forward(self, x):\n"
        "    return self.net(x)"
    )
    model = models.build_model(name, 4, 1, 8, {})
    assert models.model_parts(model) == stages.ModelParts(("net.0", "net.2"), "net.5")


def test_modules_that_are_not_called_are_no_stages_and_no_head() -> None:
    name = module(
        "    self.unused = nn.Sequential(nn.Conv2d(1, 2, 3))\n"
        "    self.block = nn.Sequential(nn.Conv2d(in_channels, 4, 3))\n"
        "    self.fc = nn.Linear(4, num_classes)\n"
        "    self.auxiliary = nn.Linear(4, num_classes)\n"
        "def forward(self, x):\n"
        "    return self.fc(self.block(x).mean((2, 3)))"
    )
    model = models.build_model(name, 4, 1, 8, {})
    assert models.model_parts(model) == stages.ModelParts(("block",), "fc")


def test_own_names_of_stages_and_head_have_priority() -> None:
    name = module(
        "    self.a = nn.Conv2d(in_channels, 4, 3)\n"
        "    self.b = nn.Conv2d(4, 4, 3)\n"
        "    self.out = nn.Linear(4, num_classes)\n"
        "    self.stages, self.head = ('b',), 'out'\n"
        "def forward(self, x):\n"
        "    return self.out(self.b(self.a(x)).mean((2, 3)))"
    )
    parts = models.model_parts(models.build_model(name, 4, 1, 8, {}))
    assert parts == stages.ModelParts(("b",), "out")


def test_a_network_with_a_fixed_number_of_outputs_needs_as_many_classes() -> None:
    name = module(
        "    self.fc = nn.Linear(64, 10)\ndef forward(self, x):\n    return self.fc(x.flatten(1))",
        "depth=1",
    )
    models.try_out(name, 1, 8, {})  # the classes are not known yet
    assert models.build_model(name, 10, 1, 8, {"depth": 2})(torch.zeros(2, 1, 8, 8)).shape[1] == 10
    with pytest.raises(UsageError, match=r"shape \[2, 10\] for 2 images, not \[N, 4\]"):
        models.build_model(name, 4, 1, 8, {})


def test_a_function_with_any_keywords_gets_all_of_them() -> None:
    text = "def make(**given):\n    assert given.pop('image_size') == 8\n"
    text += "    return nn.Sequential(nn.Flatten(), nn.Linear(64, given['num_classes']))\n"
    Path("other.py").write_text(HEAD + text)
    model = models.build_model("./other.py:make", 3, 1, 8, {"anything": 1})
    assert models.model_parts(model).head == "1"


def test_a_method_called_initialize_is_left_alone() -> None:
    name = module(
        "    self.fc = nn.Linear(64, num_classes)\n"
        "def initialize(self, images):\n"
        "    raise AssertionError\n"
        "def forward(self, x):\n"
        "    return self.fc(x.flatten(1))"
    )
    model = models.build_model(name, 3, 1, 8, {})
    assert isinstance(model, models.DataInitialized)
    assert not models.initializes_from_data(model)
    assert models.initializes_from_data(models.build_model("fastnet", 3, 3, 32, {}))


FC = "    self.fc = nn.Linear(64, num_classes)\ndef forward(self, x):\n    "


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{FC}return [self.fc(x.flatten(1))]", "an object of type 'list', not a tensor"),
        (f"{FC}return self.fc(x.flatten(1))[:1]", r"shape \[1, 3\] for 2 images, not \[N, 3\]"),
        (f"{FC}return self.fc(x.flatten(1)).argmax(1)", r"shape \[2\] for 2 images"),
        (f"{FC}return self.fc(x.flatten(1)).long()", "torch.int64, not floating-point"),
        (f"{FC}return self.fc(x.flatten(1)) / 0", "NaN or infinity for black images"),
        (f"{FC}return self.fc(x)", "RuntimeError: .*mat1 and mat2"),
        (f"{FC}return x.no_such_method()", "AttributeError"),
        ("    raise KeyError('width')", "KeyError: 'width'"),
        ("    self.a = 1\ndef forward(self, x):\n    return x", "no parameters to train"),
        (
            "    self.scale = nn.Parameter(torch.ones(3))\n"
            "def forward(self, x):\n    return x.mean((1, 2, 3))[:, None] * self.scale",
            "has 3 outputs, so it has no head",
        ),
    ],
)
def test_unsuitable_networks_are_refused(body: str, message: str) -> None:
    name = module(body)
    with pytest.raises(UsageError, match=message):
        models.build_model(name, 3, 1, 8, {})
    with pytest.raises(UsageError):
        models.try_out(name, 1, 8, {})


def test_an_error_names_the_line_of_the_file() -> None:
    name = module("    self.fc = nn.Linear(64, num_classes)\n    self.width = 1 / 0")
    with pytest.raises(UsageError) as caught:
        models.build_model(name, 3, 1, 8, {})
    assert caught.value.where == "other.py, line 9"
    Path("other.py").write_text("Net = lambda: 3")
    with pytest.raises(UsageError, match="returned an object of type 'int'"):
        models.build_model(name, 3, 1, 8, {})


def test_unknown_options_are_refused_with_near_misses() -> None:
    with pytest.raises(UsageError, match=r"has no option 'widht' \(did you mean width\?\)"):
        models.build_model(NET, 5, 3, 16, {"widht": 4})
    needs = module(f"{FC}return self.fc(x.flatten(1))", "num_classes, depth")
    with pytest.raises(UsageError, match="needs a value for depth"):
        models.build_model(needs, 3, 1, 8, {})


def test_weights_are_those_of_the_seed() -> None:
    torch.manual_seed(1)
    first = models.build_model(NET, 5, 3, 16, {})
    torch.manual_seed(1)
    net = next(m for n, m in sys.modules.items() if n.startswith(user_code.MODULE_PREFIX)).Net
    plain: nn.Module = net(num_classes=5, in_channels=3)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])

"""`convlens check`: good parts pass, and each check finds the mistake that it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from convlens import user_code
from convlens.analysis.part_check import (
    DATASET_CHECKS,
    LOSS_CHECKS,
    NETWORK_CHECKS,
    OPTIMIZER_CHECKS,
    CheckFailed,
    LossCase,
    NetworkCase,
    check_part,
    recognize_kind,
)
from convlens.errors import UsageError
from helpers.commands import here, refused
from helpers.user_parts import forget_imports, write_parts

HEAD = """\
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

"""


@pytest.fixture(autouse=True)
def parts() -> None:
    forget_imports()
    write_parts()


def write(text: str, name: str = "part") -> str:
    Path("other.py").write_text(HEAD + text)
    return f"./other.py:{name}"


def failed(part: str, **options: str) -> dict[str, str]:
    """Return what the failed checks of a part found; each says what to do."""
    results = check_part(part, **options).results
    assert all(result.passed or result.fix for result in results)
    return {result.name: result.found for result in results if not result.passed}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Net", "network"),
        ("scaled_cross_entropy", "loss"),
        ("SignDescent", "optimizer"),
        ("darken", "augmentation"),
        ("swap_halves", "augmentation"),
    ],
)
def test_good_parts_pass(name: str, kind: str) -> None:
    state = torch.random.get_rng_state()
    result = check_part(f"./parts.py:{name}")
    assert result.kind == kind
    assert not [each for each in result.results if not each.passed]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert user_code.trusted() is False


def test_the_command_prints_a_table_and_ends_with_code_1_if_a_check_fails() -> None:
    done = here("check", "./parts.py:Net", "width=4")
    assert done.code == 0, done.err
    assert "conv1, norm, conv2" in done.out
    assert f"{len(NETWORK_CHECKS)} of {len(NETWORK_CHECKS)} checks passed" in done.out
    bad = write("def part(logits, targets):\n    return F.cross_entropy(logits, targets) * 0")
    done = here("check", bad, "--json")
    assert done.code == 1
    assert not done.json["passed"]
    by_name = {each["name"]: each for each in done.json["results"]}
    assert by_name["mean over rows"]["passed"]
    assert not by_name["learning"]["passed"]
    assert "do: check its sign" in here("check", bad).out


def test_what_cannot_be_checked_is_a_usage_error() -> None:
    refused(here("check", "./none.py:Net"), 2, "cannot be read")
    refused(here("check", "./parts.py:Nett"), 2, "did you mean Net?")
    refused(here("check", "./parts.py:Net", "--kind", "netwrok"), 2, "did you mean network?")
    refused(here("check", "./parts.py:Net", "width"), 2, "write KEY=VALUE")
    unclear = write("def part(a, b, c):\n    return a")
    with pytest.raises(UsageError, match="not clear what"):
        check_part(unclear)
    with user_code.trust(True):
        assert recognize_kind("./parts.py:Net") == "network"


# Networks, each with one mistake


def network(forward: str, layers: str = "") -> str:
    return write(
        "class part(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(in_channels, 4, 3)\n"
        f"        self.fc = nn.Linear(4, num_classes)\n{layers}"
        f"    def forward(self, x):\n{forward}"
    )


NETWORKS = {
    "batch independence": (
        "        h = self.conv(x).mean((2, 3))\n        return self.fc(h - h.mean(0))",
        "",
    ),
    "batch of one": (
        "        return self.fc(self.conv(x).mean((2, 3)).squeeze())",
        "",
    ),
    "gradients": (
        "        return self.fc(self.conv(x).mean((2, 3)))",
        "        self.unused = nn.Linear(3, 3)\n",
    ),
    "determinism": (
        "        return self.fc(F.dropout(self.conv(x), 0.5).mean((2, 3)))",
        "",
    ),
    "input": ("        x += 1\n        return self.fc(self.conv(x).mean((2, 3)))", ""),
    "model file": (
        "        self.calls = self.calls + float(self.training)\n"
        "        return self.fc(self.conv(x).mean((2, 3))) + self.calls",
        "        self.calls = 0.0\n",
    ),
    "export": (
        "        h = self.conv(x).mean((2, 3))\n"
        "        return self.fc(h if float(h.sum()) > 0 else h + 1)",
        "",
    ),
    "learning": (
        "        return self.fc(self.conv(x).mean((2, 3))) * 0 + self.fc.bias.detach()",
        "",
    ),
}


@pytest.mark.parametrize("check", list(NETWORKS))
def test_a_check_finds_the_mistake_of_a_network(check: str) -> None:
    assert check in failed(network(*NETWORKS[check]))


def test_outputs_of_another_type_or_shape_are_found() -> None:
    class Half(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.fc = nn.Linear(3, classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(images.mean((2, 3))).half()

    case = NetworkCase(lambda classes, channels, size: Half(classes))
    with pytest.raises(CheckFailed, match=r"torch\.float16 in train mode"):
        NETWORK_CHECKS["shape and type"](case)
    wrong = NetworkCase(lambda classes, channels, size: nn.Flatten())
    with pytest.raises(CheckFailed, match=r"\[3, 3072\] for 3 images"):
        NETWORK_CHECKS["shape and type"](wrong)


# Losses, optimizers, augmentations and data sets, each with one mistake


def test_a_weighted_mean_of_torch_does_not_add_up() -> None:
    case = LossCase(lambda counts: nn.CrossEntropyLoss(torch.arange(1.0, 1 + len(counts))))
    with pytest.raises(CheckFailed, match="parts of a batch do not add up") as caught:
        LOSS_CHECKS["mean over rows"](case)
    assert "number of rows" in caught.value.fix


def test_a_loss_with_unstable_gradients_is_found() -> None:
    text = "def part(logits, targets):\n"
    text += "    return -logits.softmax(1).log().gather(1, targets[:, None]).mean()"
    assert set(failed(write(text))) == {"mixed labels", "certain predictions"}


OPTIMIZERS = {
    "learning": "p.add_(p.grad, alpha=group['lr'])",
    "learning rate": "p.sub_(p.grad, alpha=0.01)",
    "state": "self.n = getattr(self, 'n', 0) + 1; p.sub_(p.grad, alpha=group['lr'] / self.n)",
}


@pytest.mark.parametrize("check", list(OPTIMIZER_CHECKS))
def test_a_check_finds_the_mistake_of_an_optimizer(check: str) -> None:
    text = (
        "class part(torch.optim.Optimizer):\n"
        "    def __init__(self, params, lr):\n        super().__init__(params, {'lr': lr})\n"
        "    @torch.no_grad()\n    def step(self, closure=None):\n"
        "        for group in self.param_groups:\n            for p in group['params']:\n"
        f"                {OPTIMIZERS[check]}"
    )
    assert check in failed(write(text))


AUGMENTATIONS = {
    "images": "return images * 2",
    "input": "return images.mul_(0.5)",
    "generator": "return images * torch.rand(1)",
}


@pytest.mark.parametrize("check", list(AUGMENTATIONS))
def test_a_check_finds_the_mistake_of_an_augmentation(check: str) -> None:
    text = f"def part(images, generator):\n    {AUGMENTATIONS[check]}"
    assert set(failed(write(text))) == {check}


def test_data_sets_are_read_twice() -> None:
    good = "def part():\n    return [(np.full((8, 8), i, np.uint8), i % 2) for i in range(6)]"
    assert failed(write(good)) == {}
    forget_imports()
    growing = (
        "calls = []\n\ndef part():\n    calls.append(1)\n"
        "    return [(np.full((8, 8), i + len(calls), np.uint8), i % 2) for i in range(6)]"
    )
    assert set(failed(write(growing))) == {"repeatable"}
    single = "def part():\n    return [(np.full((8, 8), i, np.uint8), 0) for i in range(6)]"
    assert failed(write(single)) == {"splits and classes": "1 class"}
    assert list(DATASET_CHECKS) == ["splits and classes", "repeatable"]

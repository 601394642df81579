"""A file with parts of a user, which leaves a trace when it is imported."""

from __future__ import annotations

import sys
from pathlib import Path

from convlens.user_code import MODULE_PREFIX

TRACE = Path("imported")
PARTS = """\
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

Path("imported").touch()


class Net(nn.Module):
    def __init__(self, num_classes, in_channels, width=6):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


def scaled_cross_entropy(logits, targets, scale=2.0):
    return scale * F.cross_entropy(logits, targets)


class SignDescent(torch.optim.Optimizer):
    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr})
        self.beta = beta

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - self.beta)
                parameter.sub_(average.sign(), alpha=group["lr"])


def darken(images, generator, *, most=0.5):
    share = torch.rand(len(images), 1, 1, 1, generator=generator).to(images)
    return images * (1 - most * share)


def swap_halves(images, labels, generator):
    half = images.shape[3] // 2
    other = torch.randperm(len(images), generator=generator)
    mixed = torch.cat([images[..., :half], images[other][..., half:]], 3)
    return mixed, labels.lerp(labels[other], 0.5)
"""


def write_parts(path: str = "parts.py", text: str = PARTS) -> Path:
    """Write the file and return its path."""
    file = Path(path)
    file.write_text(text)
    return file


def forget_imports() -> None:
    """Remove the trace, and the modules of user code that this process has imported."""
    TRACE.unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.startswith(MODULE_PREFIX)]:
        del sys.modules[name]

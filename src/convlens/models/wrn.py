"""The wrn family: wide residual networks for small images (Zagoruyko & Komodakis 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from convlens.errors import UsageError


class WRN(nn.Module):
    """WRN-`depth`-`width`: a 3x3 convolution, three groups of pre-activation blocks, a classifier.

    The groups have 16, 32 and 64 times `width` channels, the second and third halve the image,
    and each has `(depth - 4) / 6` blocks of norm, ReLU, convolution, norm, ReLU, dropout,
    convolution (arXiv:1605.07146, table 1 and figure 1d). Convolutions start as the paper's
    code has them: normal with variance 2 / (kernel^2 * output channels). Images
    `[N, channels, S, S]`, made for S = 32, give logits `[N, classes]`.

    Args:
        depth: 10, 16, 22, 28, 34, 40, ...
        width: factor on the channels; WRN-16-8 has 11.0M weights, WRN-28-10 36.5M.
        dropout: probability between the two convolutions of a block (0.3 in the paper).

    Raises:
        UsageError: an option that can't be.
    """

    stages = ("conv", "group1", "group2", "group3")
    head = "classifier"

    def __init__(
        self,
        classes: int,
        channels: int,
        image_size: int,
        *,
        depth: int = 16,
        width: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(depth, width, dropout)
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        inputs = 16
        for number, stride in enumerate((1, 2, 2), start=1):
            outputs = 16 * width * 2 ** (number - 1)
            blocks = [PreActivation(inputs, outputs, stride, dropout)]
            more = (depth - 4) // 6 - 1
            blocks += [PreActivation(outputs, outputs, 1, dropout) for _ in range(more)]
            self.add_module(f"group{number}", nn.Sequential(*blocks))
            inputs = outputs
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        for name in self.stages:
            maps = self.get_submodule(name)(maps)
        logits: Tensor = self.classifier(F.relu(self.norm(maps)).mean((2, 3)))
        return logits


class PreActivation(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions, and a sum with the input.

    Where shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, maps: Tensor) -> Tensor:
        active = F.relu(self.norm1(maps))
        around = maps if self.shortcut is None else self.shortcut(active)
        inner = self.dropout(F.relu(self.norm2(self.conv1(active))))
        result: Tensor = around + self.conv2(inner)
        return result


def _check(depth: int, width: int, dropout: float) -> None:
    problems = []
    if depth < 10 or (depth - 4) % 6:
        problems.append(f"model.depth={depth}: 6 n + 4, that is 10, 16, 22, 28, ...")
    if depth > 1500:  # it would be built for hours before anything else was said
        problems.append(f"model.depth={depth}: at most 1500")
    if width < 1:
        problems.append(f"model.width={width}: a positive number")
    if not 0 <= dropout < 1:
        problems.append(f"model.dropout={dropout}: a probability from 0 to below 1")
    if problems:
        raise UsageError("; ".join(problems))

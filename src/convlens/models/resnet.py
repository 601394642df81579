"""Residual networks: ResNet-18, -34 and -50, and wide ResNets for small images (wrn).

The ResNets (He et al., "Deep Residual Learning for Image Recognition", 2016) are those of
torchvision with a stem chosen by image size. Parameters keep their names, so torchvision's weights
fit. The wide ResNets follow Zagoruyko & Komodakis, "Wide Residual Networks", 2016.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from convlens.errors import UsageError, lookup

# Stem: kernel size and stride of the first convolution, and whether 3x3 max pooling follows it.
STEMS: dict[str, tuple[int, int, bool]] = {
    "imagenet": (7, 2, True),
    "half": (3, 1, True),
    "cifar": (3, 1, False),
}
MAX_WRN_DEPTH = 1500


def stem_for(image_size: int) -> str:
    """Return the stem that `auto` selects for an image size.

    With the ImageNet stem, a 32 px image is a single pixel in the last stage. It takes a fifteenth
    of the CIFAR stem's time and loses 15 points of accuracy (BENCHMARKS.md).
    """
    if image_size <= 48:
        return "cifar"
    return "half" if image_size <= 96 else "imagenet"


class ResNet(resnet.ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet; maps images `[N, channels, S, S]` to logits `[N, classes]`.

    Args:
        stem: `imagenet` (7x7 convolution of stride 2, then pooling), `half` (3x3, then pooling),
            `cifar` (3x3 only), or `auto`: chosen by image size.
        dropout: dropout probability after each ReLU of the residual blocks.
        zero_init: initialize the last norm of each block with 0, so that the block starts as the
            identity (Goyal et al. 2017).

    Raises:
        UsageError: an unsuitable option.
    """

    stages = ("maxpool", "layer1", "layer2", "layer3", "layer4")
    head = "fc"
    block: type[resnet.BasicBlock | resnet.Bottleneck] = resnet.BasicBlock
    depths = (2, 2, 2, 2)

    def __init__(
        self,
        classes: int,
        channels: int,
        image_size: int,
        *,
        stem: str = "auto",
        dropout: float = 0.0,
        zero_init: bool = False,
    ) -> None:
        if not 0 <= dropout < 1:
            raise UsageError(f"model.dropout={dropout}: must be a probability below 1")
        stem = stem_for(image_size) if stem == "auto" else stem
        kernel, stride, has_pooling = lookup(STEMS, stem, "model.stem")
        super().__init__(self.block, list(self.depths), classes, zero_init_residual=zero_init)
        if (channels, kernel) != (3, 7):
            self.conv1 = nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False)
            # The same initialization as in torchvision's constructor.
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if not has_pooling:
            self.maxpool = nn.Identity()
        if dropout:
            for module in self.modules():
                if isinstance(module, resnet.BasicBlock | resnet.Bottleneck):
                    # The block calls this module after each norm but the last, and after the
                    # sum. It has no parameters, so names of parameters do not change.
                    module.relu = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(dropout))


class ResNet18(ResNet):
    """ResNet-18: two basic blocks in each stage. Options as in `ResNet`."""


class ResNet34(ResNet):
    """ResNet-34: 3, 4, 6 and 3 basic blocks. Options as in `ResNet`."""

    depths = (3, 4, 6, 3)


class ResNet50(ResNet):
    """ResNet-50: 3, 4, 6 and 3 bottleneck blocks. Options as in `ResNet`."""

    block = resnet.Bottleneck
    depths = (3, 4, 6, 3)


class WRN(nn.Module):
    """WRN-`depth`-`width`: a 3x3 convolution, three groups of pre-activation blocks, a classifier.

    The groups have 16, 32 and 64 times `width` channels; the second and third halve the image.
    Each has `(depth - 4) / 6` blocks of norm, ReLU, convolution, norm, ReLU, dropout, convolution
    (arXiv:1605.07146, table 1 and figure 1d). Convolutions are initialized as in the paper's code:
    normal with variance 2 / (kernel^2 * output channels). Maps images `[N, channels, S, S]` to
    logits `[N, classes]`; designed for S = 32.

    Args:
        depth: 10, 16, 22, 28, 34, 40, ...
        width: factor on the channels; WRN-16-8 has 11.0M weights, WRN-28-10 has 36.5M.
        dropout: dropout probability between the two convolutions of a block (0.3 in the paper).

    Raises:
        UsageError: an unsuitable option.
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
        _check_wrn(depth, width, dropout)
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        inputs = 16
        for number, stride in enumerate((1, 2, 2), start=1):
            outputs = 16 * width * 2 ** (number - 1)
            blocks = [PreActivation(inputs, outputs, stride, dropout)]
            further_blocks = (depth - 4) // 6 - 1
            blocks += [PreActivation(outputs, outputs, 1, dropout) for _ in range(further_blocks)]
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
    """Pre-activation block: norm and ReLU before each of two 3x3 convolutions, and a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes_shape = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes_shape else None

    def forward(self, maps: Tensor) -> Tensor:
        activated = F.relu(self.norm1(maps))
        shortcut = maps if self.shortcut is None else self.shortcut(activated)
        hidden = self.dropout(F.relu(self.norm2(self.conv1(activated))))
        result: Tensor = shortcut + self.conv2(hidden)
        return result


def _check_wrn(depth: int, width: int, dropout: float) -> None:
    problems = []
    if depth < 10 or (depth - 4) % 6:
        problems.append(f"model.depth={depth}: must be 6 n + 4, i.e. 10, 16, 22, 28, ...")
    if depth > MAX_WRN_DEPTH:  # would take hours to build before any other error
        problems.append(f"model.depth={depth}: at most {MAX_WRN_DEPTH}")
    if width < 1:
        problems.append(f"model.width={width}: must be positive")
    if not 0 <= dropout < 1:
        problems.append(f"model.dropout={dropout}: must be a probability below 1")
    if problems:
        raise UsageError("; ".join(problems))

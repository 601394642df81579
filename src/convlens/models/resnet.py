"""ResNet-18, -34 and -50: torchvision's own definitions and names, with a stem that fits the image.

He et al., "Deep Residual Learning for Image Recognition", 2016. torchvision's weights fit, since
no parameter has another name here.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet

from convlens.errors import UsageError
from convlens.names import pick

# Stem: kernel and stride of the first convolution, and whether a 3x3 max pooling halves after it.
STEMS: dict[str, tuple[int, int, bool]] = {
    "imagenet": (7, 2, True),
    "half": (3, 1, True),
    "cifar": (3, 1, False),
}


def stem_for(image_size: int) -> str:
    """The stem that `auto` means: a quarter of the sides must leave something to look at.

    With the ImageNet stem a 32 px image is down to one pixel in the last stage. That costs a
    fifteenth of the CIFAR stem's time, and 15 points of accuracy (BENCHMARKS.md).
    """
    if image_size <= 48:
        return "cifar"
    return "half" if image_size <= 96 else "imagenet"


class ResNet(resnet.ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet for images `[N, channels, S, S]`; gives logits `[N, classes]`.

    Args:
        stem: `imagenet` (7x7 convolution of stride 2, then pooling), `half` (3x3, then pooling),
            `cifar` (3x3 alone), or `auto` by the image size.
        dropout: probability of dropping an activation after each ReLU of the residual blocks.
        zero_init: start each block's last norm at 0, so that the block begins as the identity
            (Goyal et al. 2017).

    Raises:
        UsageError: an option that can't be.
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
            raise UsageError(f"model.dropout={dropout}: a probability from 0 to below 1")
        chosen = stem_for(image_size) if stem == "auto" else stem
        kernel, stride, pools = pick(STEMS, chosen, "model.stem")
        super().__init__(self.block, list(self.depths), classes, zero_init_residual=zero_init)
        if (channels, kernel) != (3, 7):
            self.conv1 = nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False)
            # As torchvision's constructor has just done with the one that this replaces.
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if not pools:
            self.maxpool = nn.Identity()
        if dropout:
            for module in self.modules():
                if isinstance(module, resnet.BasicBlock | resnet.Bottleneck):
                    # One module that the block calls after each of its norms but the last, and
                    # after the sum. It has no parameters, so that no name changes.
                    module.relu = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(dropout))


class ResNet18(ResNet):
    """ResNet-18: two basic blocks in each stage. Options as of `ResNet`."""


class ResNet34(ResNet):
    """ResNet-34: 3, 4, 6 and 3 basic blocks. Options as of `ResNet`."""

    depths = (3, 4, 6, 3)


class ResNet50(ResNet):
    """ResNet-50: 3, 4, 6 and 3 bottleneck blocks. Options as of `ResNet`."""

    block = resnet.Bottleneck
    depths = (3, 4, 6, 3)

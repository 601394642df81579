"""The fastnet family: frozen patch whitening, early pooling, identity initialization.

Follows airbench94 and airbench96 (K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU",
arXiv:2404.00498). The whitening first layer is by D. Page ("How to train your ResNet", 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convlens.errors import UsageError, lookup
from convlens.models.cnn import ACTIVATIONS

PATCH_SIZE = 2
# Added to the eigenvalues (in units of normalized pixels squared), so that directions in which
# patches hardly vary, mostly noise of the camera and of JPEG, are not scaled up to full strength.
WHITEN_EPS = 5e-4
# Values of patches that are extracted at once: 32 MB of float64.
CHUNK_VALUES = 1 << 22


class FastNet(nn.Module):
    """Whitened 2x2 patches, blocks that halve the image, global max pooling, a classifier.

    The first layer projects each 2x2 patch on plus and minus the eigenvectors of the training
    images' patches, scaled to unit variance: `8 * channels` frozen filters with a trained bias.
    `initialize` computes the filters; `build_training_job` calls it. A block is convolution, max
    pooling, norm and activation, then `depth - 1` times convolution, norm and activation. In a
    block of three convolutions, a residual connection skips the last two, and is added before
    the last activation (airbench96). All convolutions start as the identity on their first
    channels. Maps images `[N, channels, S, S]` to logits `[N, classes]`.

    Args:
        widths: output channels of each block.
        depth: convolutions in each block, 2 or 3.
        batch_norm_momentum: weight of the newest batch in the running statistics. The norms have
            no scale: their weight is frozen at 1.
        activation: `gelu`, `silu` or `relu`.
        scale: factor on the logits, by default 1 / (channels of the last block). The head's
            weights start with a standard deviation of `1 / (channels * scale)`, so the initial
            logits do not depend on the scale. It sets how fast the head learns (with SGD, with
            the square of the scale).

    Raises:
        UsageError: an unsuitable option.
    """

    head = "classifier"

    def __init__(
        self,
        classes: int,
        channels: int,
        image_size: int,
        *,
        widths: Sequence[int] = (64, 256, 256),
        depth: int = 2,
        batch_norm_momentum: float = 0.4,
        activation: str = "gelu",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        _check(widths, depth, batch_norm_momentum, scale)
        lookup(ACTIVATIONS, activation, "model.activation")
        filters = 2 * channels * PATCH_SIZE**2
        self.whiten = nn.Conv2d(channels, filters, PATCH_SIZE)
        self.whiten.weight.requires_grad_(False)
        self.whiten.bias = nn.Parameter(torch.zeros(filters))
        self.activation = ACTIVATIONS[activation]()
        blocks = [f"block{i + 1}" for i in range(len(widths))]
        self.stages: tuple[str, ...] = ("whiten", *blocks)
        inputs, size = filters, image_size - PATCH_SIZE + 1
        for name, width in zip(blocks, widths, strict=True):
            halves = size > 1  # a single pixel can't be halved
            block = Block(inputs, width, depth, halves, batch_norm_momentum, activation)
            self.add_module(name, block)
            inputs, size = width, size // 2 if halves else size
        self.scale = 1 / inputs if scale is None else scale
        self.classifier = nn.Linear(inputs, classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=1 / (inputs * self.scale))

    def initialize(self, images: Tensor) -> None:
        """Set the whitening filters from normalized training images, float32 `[N, C, H, W]`."""
        with torch.no_grad():
            self.whiten.weight.copy_(whitening_filters(images, PATCH_SIZE, WHITEN_EPS))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.activation(self.whiten(images))
        for name in self.stages[1:]:
            maps = self.get_submodule(name)(maps)
        logits: Tensor = self.classifier(maps.amax((2, 3)))
        return logits * self.scale


class Block(nn.Module):
    """Convolution, max pooling, norm and activation, then one or two more convolutions."""

    def __init__(
        self, inputs: int, width: int, depth: int, halves: bool, momentum: float, activation: str
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width)
        self.pool = nn.MaxPool2d(2) if halves else nn.Identity()
        self.norm1 = _norm(width, momentum)
        self.conv2 = _convolution(width, width)
        self.norm2 = _norm(width, momentum)
        self.depth = depth
        if depth == 3:
            self.conv3 = _convolution(width, width)
            self.norm3 = _norm(width, momentum)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.activation(self.norm1(self.pool(self.conv1(maps))))
        out = self.norm2(self.conv2(maps))
        if self.depth == 3:
            out = self.norm3(self.conv3(self.activation(out))) + maps
        result: Tensor = self.activation(out)
        return result


def whitening_filters(images: Tensor, patch: int, eps: float) -> Tensor:
    """Compute filters `[2D, C, patch, patch]`, D = C * patch^2, that whiten the patches of images.

    The first D filters are `e_i / sqrt(v_i + eps)` for eigenvectors `e_i` and eigenvalues `v_i` of
    the covariance of all patches, smallest first; the others are their negatives. Computed in
    double precision on the device of `images`; the result is on the CPU.

    Args:
        images: float32 `[N, C, H, W]`.
    """
    count, channels, height, width = images.shape
    size = channels * patch**2
    sums = torch.zeros(size, dtype=torch.float64, device=images.device)
    products = torch.zeros(size, size, dtype=torch.float64, device=images.device)
    chunk_size = max(1, CHUNK_VALUES // (size * height * width))
    for chunk in images.split(chunk_size):
        patches = nn.functional.unfold(chunk.double(), patch)  # [N, D, patches per image]
        flat = patches.transpose(0, 1).reshape(size, -1)
        sums += flat.sum(1)
        products += flat @ flat.T
    num_patches = count * (height - patch + 1) * (width - patch + 1)
    mean = sums / num_patches
    covariance = products / num_patches - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance.cpu())  # 12 x 12: too small for a GPU
    # Rounding may give a value just below 0 where patches don't vary at all.
    filters = (vectors / (values.clamp(min=0) + eps).sqrt()).T
    return torch.cat([filters, -filters]).reshape(-1, channels, patch, patch).float()


def _convolution(inputs: int, width: int) -> nn.Conv2d:
    """3x3 convolution without bias, the identity on its first channels and random on the others."""
    layer = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[:inputs])
    return layer


def _norm(width: int, momentum: float) -> nn.BatchNorm2d:
    """Batch norm with the scale frozen at 1."""
    layer = nn.BatchNorm2d(width, momentum=momentum)
    layer.weight.requires_grad_(False)
    return layer


def _check(widths: Sequence[int], depth: int, momentum: float, scale: float | None) -> None:
    problems = []
    if not widths or min(widths) < 1:
        problems.append(f"model.widths={list(widths)}: needs one or more positive numbers")
    if depth not in (2, 3):
        problems.append(f"model.depth={depth}: a block has 2 or 3 convolutions")
    if not 0 < momentum <= 1:
        problems.append(f"model.batch_norm_momentum={momentum}: must be above 0 and at most 1")
    if scale is not None and not 0 < scale < float("inf"):
        problems.append(f"model.scale={scale}: must be positive, or none for 1 / channels")
    if problems:
        raise UsageError("; ".join(problems))

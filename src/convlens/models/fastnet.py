"""The fastnet family: frozen patch whitening, blocks that pool early, identity initialisation.

After airbench94 and airbench96 (K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU",
arXiv:2404.00498); the whitening first layer is D. Page's ("How to train your ResNet", 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convlens.errors import UsageError, lookup
from convlens.models.cnn import ACTIVATIONS

PATCH = 2
# Added to the eigenvalues (in units of normalised pixels squared): directions in which patches
# hardly vary, mostly noise of the camera and of JPEG, are not blown up to full strength.
WHITEN_EPS = 5e-4
# Patches are cut out this many values at a time, so that memory stays small (32 MB of float64).
CHUNK = 1 << 22


class FastNet(nn.Module):
    """Whitened 2x2 patches, blocks that halve the image, the maximum over what is left.

    The first layer projects each 2x2 patch on plus and minus the eigenvectors of the training
    images' patches, scaled to unit variance: `8 * channels` frozen filters, of which only the
    bias is trained. `initialize` computes them; `preparing.prepare` calls it. A block is
    convolution, max pooling, norm, activation and then `depth - 1` times convolution, norm,
    activation, the last activation of a block of three after a residual sum around its last two
    convolutions (airbench96). All convolutions start as the identity on their first channels.
    Images `[N, channels, S, S]` give logits `[N, classes]`.

    Args:
        widths: output channels of each block.
        depth: convolutions in each block, 2 or 3.
        batch_norm_momentum: weight of the newest batch in the running statistics; the norms
            have no scale (their weight is frozen at 1).
        activation: `gelu`, `silu` or `relu`.
        scale: factor on the logits, by default 1 / (channels of the last block). The head starts
            with weights of deviation `1 / (channels * scale)`: the first logits are the same for
            any scale, which thus sets how fast the head learns (by SGD with its square).

    Raises:
        UsageError: an option that can't be.
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
        filters = 2 * channels * PATCH**2
        self.whiten = nn.Conv2d(channels, filters, PATCH)
        self.whiten.weight.requires_grad_(False)
        self.whiten.bias = nn.Parameter(torch.zeros(filters))
        self.activation = ACTIVATIONS[activation]()
        blocks = [f"block{i + 1}" for i in range(len(widths))]
        self.stages: tuple[str, ...] = ("whiten", *blocks)
        inputs, size = filters, image_size - PATCH + 1
        for name, width in zip(blocks, widths, strict=True):
            halves = size > 1  # a single pixel can't be halved
            block = Block(inputs, width, depth, halves, batch_norm_momentum, activation)
            self.add_module(name, block)
            inputs, size = width, size // 2 if halves else size
        self.scale = 1 / inputs if scale is None else scale
        self.classifier = nn.Linear(inputs, classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=1 / (inputs * self.scale))

    def initialize(self, images: Tensor) -> None:
        """Sets the whitening filters from normalised training images float32 `[N, C, H, W]`."""
        with torch.no_grad():
            self.whiten.weight.copy_(whitening_filters(images, PATCH, WHITEN_EPS))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.activation(self.whiten(images))
        for name in self.stages[1:]:
            maps = self.get_submodule(name)(maps)
        logits: Tensor = self.classifier(maps.amax((2, 3)))
        return logits * self.scale


class Block(nn.Module):
    """Convolution, pooling, norm, activation; then 1 or 2 more convolutions at half the size."""

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
    """Filters `[2D, C, patch, patch]`, D = C * patch^2, whose outputs are white on `images`.

    The first D are `e_i / sqrt(v_i + eps)` for eigenvectors `e_i` and eigenvalues `v_i` of the
    covariance of all patches, smallest first; the others are their negatives. Computed in double
    precision on the images' device; the filters are on the CPU.
    """
    count, channels, height, width = images.shape
    size = channels * patch**2
    total = torch.zeros(size, dtype=torch.float64, device=images.device)
    squares = torch.zeros(size, size, dtype=torch.float64, device=images.device)
    at_once = max(1, CHUNK // (size * height * width))
    for part in images.split(at_once):
        patches = nn.functional.unfold(part.double(), patch)  # [N, D, places]
        flat = patches.transpose(0, 1).reshape(size, -1)
        total += flat.sum(1)
        squares += flat @ flat.T
    places = count * (height - patch + 1) * (width - patch + 1)
    mean = total / places
    covariance = squares / places - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance.cpu())  # 12 x 12: no work for a GPU
    # Rounding may leave a value just below 0 where patches don't vary at all.
    filters = (vectors / (values.clamp(min=0) + eps).sqrt()).T
    return torch.cat([filters, -filters]).reshape(-1, channels, patch, patch).float()


def _convolution(inputs: int, width: int) -> nn.Conv2d:
    """3x3 without bias; passes its first channels through, the others start at random."""
    layer = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[:inputs])
    return layer


def _norm(width: int, momentum: float) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(width, momentum=momentum)
    layer.weight.requires_grad_(False)
    return layer


def _check(widths: Sequence[int], depth: int, momentum: float, scale: float | None) -> None:
    problems = []
    if not widths or min(widths) < 1:
        problems.append(f"model.widths={list(widths)}: needs one or more positive numbers")
    if depth not in (2, 3):
        problems.append(f"model.depth={depth}: 2 or 3 convolutions in a block")
    if not 0 < momentum <= 1:
        problems.append(f"model.batch_norm_momentum={momentum}: above 0, at most 1")
    if scale is not None and not 0 < scale < float("inf"):
        problems.append(f"model.scale={scale}: a positive number, or none for 1 / channels")
    if problems:
        raise UsageError("; ".join(problems))

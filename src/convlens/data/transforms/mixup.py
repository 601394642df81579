"""MixUp and CutMix: augmentations that mix pairs of images of a batch, and their labels.

As in `geometry.py`, `draw_mix` draws one set of numbers per image, `apply_mixup` and `apply_cutmix`
apply given numbers, and `random_*` does both. Every image is mixed with a partner from a
permutation of the batch and has its own share (torchvision draws one share for the whole batch).
The partner may be the image itself; then nothing changes.

Images are float32 `[N, C, H, W]` in [0, 1], labels class probabilities, float32 `[N, K]`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from convlens.data.transforms.color import erase
from convlens.data.transforms.random import CropBoxes, integer_below, uniform_numbers


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Convert labels, int64 `[N]`, to probabilities, float32 `[N, K]`; probabilities stay.

    `F.one_hot` checks the values of the labels, which would synchronize with a GPU.
    """
    if labels.ndim == 2:
        return labels
    return (labels.unsqueeze(1) == torch.arange(classes, device=labels.device)).float()


def beta(u: Tensor, alpha: float) -> Tensor:
    """Turn uniform numbers, float32 `[4, N]`, into N draws from Beta(alpha, alpha), alpha > 0.

    Beta(a + 1, a + 1) in closed form (Ulrich 1984; Devroye, Non-Uniform Random Variate
    Generation, 1986, section IX.4), and Gamma(a) = Gamma(a + 1) * U^(1 / a) for both gamma
    variables whose quotient gives a beta variable. Computed in logits, since U^(1 / a) underflows
    for small alpha. There is no rejection, so four numbers are always enough and every device
    gives the same result.
    """
    u = u.clamp_min(2.0**-25)  # half of the smallest number above 0 that `torch.rand` returns
    radius = (1 - u[0] ** (2 / (2 * alpha + 1))).sqrt()
    middle = 0.5 + 0.5 * radius * torch.cos(2 * math.pi * u[1])
    return (torch.logit(middle, eps=1e-7) + (u[2].log() - u[3].log()) / alpha).sigmoid()


class MixParameters(NamedTuple):
    """How each of N images is mixed."""

    partner: Tensor  # int64 [N], a permutation
    share: Tensor  # float32 [N], weight of the image itself; 1 if it is not mixed
    y: Tensor  # float32 [N], row and column of the center of CutMix's box
    x: Tensor


def draw_mix(
    images: Tensor, generator: torch.Generator, *, alpha: float, p: float
) -> MixParameters:
    """Draw partners, shares (from Beta(alpha, alpha) with probability `p`, else 1) and centers."""
    height, width = images.shape[-2:]
    u = uniform_numbers(images, generator, 8)
    share = torch.where(u[1] < p, beta(u[4:], alpha), 1.0)
    return MixParameters(
        u[0].argsort(), share, integer_below(u[2], height), integer_below(u[3], width)
    )


def apply_mixup(images: Tensor, labels: Tensor, drawn: MixParameters) -> tuple[Tensor, Tensor]:
    """Average each image and its label with its partner's, weighted by its share."""
    partners = images.index_select(0, drawn.partner)
    mixed = partners.lerp_(images, drawn.share.view(-1, 1, 1, 1))
    return mixed, _mix_labels(labels, drawn.partner, drawn.share)


def cutmix_boxes(images: Tensor, drawn: MixParameters) -> CropBoxes:
    """Return the boxes to paste: 1 - share of the area, cut off at the edges of the image."""
    height, width = images.shape[-2:]
    half = (1 - drawn.share).sqrt() / 2
    sides = []
    for center, size in ((drawn.y, height), (drawn.x, width)):
        radius = (half * size).floor()
        start = (center - radius).clamp_min(0)
        sides.append((start, (center + radius).clamp_max(size) - start))
    (top, box_height), (left, box_width) = sides
    return CropBoxes(top, left, box_height, box_width)


def apply_cutmix(images: Tensor, labels: Tensor, drawn: MixParameters) -> tuple[Tensor, Tensor]:
    """Paste a box of its partner into each image; labels are weighted by the actual areas."""
    boxes = cutmix_boxes(images, drawn)
    mixed = erase(images, boxes, images.index_select(0, drawn.partner))
    area = boxes.height * boxes.width / (images.shape[-2] * images.shape[-1])
    return mixed, _mix_labels(labels, drawn.partner, 1 - area)


def _mix_labels(labels: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    return labels.index_select(0, partner).lerp_(labels, share.view(-1, 1))


def random_mix_up(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    alpha: float = 1.0,
    p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Average each image with another one with probability `p` (arXiv:1710.09412)."""
    return apply_mixup(images, labels, draw_mix(images, generator, alpha=alpha, p=p))


def random_cut_mix(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    alpha: float = 1.0,
    p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Paste a box of another image into each image with probability `p` (arXiv:1905.04899)."""
    return apply_cutmix(images, labels, draw_mix(images, generator, alpha=alpha, p=p))

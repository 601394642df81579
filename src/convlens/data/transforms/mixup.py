"""Augmentations that mix the images of a batch in pairs, and their labels with them.

The same pairs of functions as in `geometry.py`: `draw_mix` makes one set of numbers per image,
`mix_up` and `cut_mix` apply given numbers, `random_*` joins the two. Every image is mixed with a
partner from a permutation of the batch, by a share of its own (torchvision draws one share for
the whole batch). A partner may be the image itself; then nothing changes.

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
    """int64 `[N]` to float32 `[N, K]`; probabilities stay as they are.

    `F.one_hot` looks at the labels to check them, for which a GPU would have to be waited for.
    """
    if labels.ndim == 2:
        return labels
    return (labels.unsqueeze(1) == torch.arange(classes, device=labels.device)).float()


def beta(u: Tensor, alpha: float) -> Tensor:
    """Uniform numbers float32 `[4, N]` to N draws from Beta(alpha, alpha), for any alpha > 0.

    Beta(a + 1, a + 1) in closed form (Ulrich 1984; Devroye, Non-Uniform Random Variate
    Generation, 1986, section IX.4), and Gamma(a) = Gamma(a + 1) * U^(1 / a) for both gammas of
    which a beta is the quotient. In logits, since U^(1 / a) of a small alpha underflows. Nothing
    is rejected, so four numbers always do, and every device gives the same.
    """
    u = u.clamp_min(2.0**-25)  # half of the smallest number above 0
    radius = (1 - u[0] ** (2 / (2 * alpha + 1))).sqrt()
    middle = 0.5 + 0.5 * radius * torch.cos(2 * math.pi * u[1])
    return (torch.logit(middle, eps=1e-7) + (u[2].log() - u[3].log()) / alpha).sigmoid()


class MixParameters(NamedTuple):
    """How each of N images is mixed."""

    partner: Tensor  # int64 [N], a permutation
    share: Tensor  # float32 [N]: of the image itself; 1 in those left alone
    y: Tensor  # float32 [N]: CutMix's centre, row and column
    x: Tensor


def draw_mix(
    images: Tensor, generator: torch.Generator, *, alpha: float, p: float
) -> MixParameters:
    """Partners, shares from Beta(alpha, alpha) with probability `p` and else 1, and centres."""
    height, width = images.shape[-2:]
    u = uniform_numbers(images, generator, 8)
    share = torch.where(u[1] < p, beta(u[4:], alpha), 1.0)
    return MixParameters(
        u[0].argsort(), share, integer_below(u[2], height), integer_below(u[3], width)
    )


def apply_mixup(images: Tensor, labels: Tensor, drawn: MixParameters) -> tuple[Tensor, Tensor]:
    """Each image and its label averaged with its partner's, weighted by its share."""
    others = images.index_select(0, drawn.partner)
    pictures = others.lerp_(images, drawn.share.view(-1, 1, 1, 1))
    return pictures, _mix_batch(labels, drawn.partner, drawn.share)


def cutmix_boxes(images: Tensor, drawn: MixParameters) -> CropBoxes:
    """What is pasted: squares (of the image's shape) of 1 - share of the area, cut at its edges."""
    height, width = images.shape[-2:]
    half = (1 - drawn.share).sqrt() / 2
    sides = []
    for centre, size in ((drawn.y, height), (drawn.x, width)):
        reach = (half * size).floor()
        start = (centre - reach).clamp_min(0)
        sides.append((start, (centre + reach).clamp_max(size) - start))
    (top, high), (left, wide) = sides
    return CropBoxes(top, left, high, wide)


def apply_cutmix(images: Tensor, labels: Tensor, drawn: MixParameters) -> tuple[Tensor, Tensor]:
    """A box of each image's partner is pasted into it; labels share as the areas really do."""
    pasted = cutmix_boxes(images, drawn)
    pictures = erase(images, pasted, images.index_select(0, drawn.partner))
    area = pasted.height * pasted.width / (images.shape[-2] * images.shape[-1])
    return pictures, _mix_batch(labels, drawn.partner, 1 - area)


def _mix_batch(labels: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    return labels.index_select(0, partner).lerp_(labels, share.view(-1, 1))


def random_mix_up(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    alpha: float = 1.0,
    p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Averages each image with another one with probability `p` (arXiv:1710.09412)."""
    return apply_mixup(images, labels, draw_mix(images, generator, alpha=alpha, p=p))


def random_cut_mix(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    alpha: float = 1.0,
    p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Pastes a box of another image into each image with probability `p` (arXiv:1905.04899)."""
    return apply_cutmix(images, labels, draw_mix(images, generator, alpha=alpha, p=p))

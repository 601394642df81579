"""Test-time augmentation: the views of an image that a network is asked about, and their mean.

Logits are averaged, not probabilities: softmax of mean logits is the geometric mean of the views'
probabilities, renormalised. A class that one view all but rules out stays ruled out, which an
arithmetic mean would forget; and cross entropy is convex in the logits, so that the loss of the
mean is never above the mean loss of the views. The published records average logits, too.

A mirror image must not change the class: these views are wrong for text, digits and the like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn import functional as F

from convlens.names import pick

# Weights (they add up to one) and images `[B, C, H, W]` of the same shape, one view at a time so
# that no more than one is in memory. The first view is the images as they are.
Views = Callable[[Tensor], Iterator[tuple[float, Tensor]]]


def flip(images: Tensor) -> Iterator[tuple[float, Tensor]]:
    """The images and their mirror images, half each; float `[B, C, H, W]`."""
    yield 0.5, images
    yield 0.5, images.flip(-1)


def flip_shifts(images: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Six views: half the weight on the untranslated pair of `flip`, half on two translated pairs.

    They are translated up-left and down-right, with reflect padding, by one pixel at 32 pixels
    (Jordan 2024, arXiv:2404.00498, multi-crop evaluation). Other sizes are our generalisation:
    `shift(size)` pixels. Float `[B, C, H, W]`; each pair is an image and its mirror image.
    """
    by = shift(images.shape[-1])
    height, width = images.shape[-2:]
    padded = F.pad(images, (by, by, by, by), mode="reflect")
    up_left = padded[..., 2 * by :, 2 * by :]
    down_right = padded[..., :height, :width]
    for weight, moved in ((0.5, images), (0.25, up_left), (0.25, down_right)):
        for _, view in flip(moved):
            yield weight / 2, view


def shift(size: int) -> int:
    """Pixels of translation for images of `size` pixels: size / 32, halves up, at least 1."""
    return max(1, (size + 16) // 32)


VIEWS: dict[str, Views] = {"flip": flip, "flip+shifts": flip_shifts}


def chosen(name: str | None) -> Views | None:
    """The views of that name; None for None.

    Raises:
        UsageError: no such views, with near misses.
    """
    return None if name is None else pick(VIEWS, name, "test-time augmentation")


def averaged(
    forward: Callable[[Tensor], Tensor], images: Tensor, views: Views
) -> tuple[Tensor, Tensor]:
    """Plain logits and the weighted mean over all views, both float32 `[B, K]`.

    `images` are normalised ones, `[B, C, H, W]`. The plain view is one of the views, so it costs
    no pass of its own; each view is a pass over the same batch size, so that the plain logits are
    bit for bit those without test-time augmentation.
    """
    pairs = views(images)
    weight, view = next(pairs)
    plain = forward(view).float()
    total = weight * plain
    for weight, view in pairs:
        total += weight * forward(view).float()
    return plain, total

"""Shared by the tests of attribution_methods and others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = 32


PATCH = (slice(8, 14), slice(20, 26))  # rows and columns where the evidence is


class Reds(nn.Module):
    """Class 1 is how much red there is above grey, class 0 how much blue: seen place by place.

    The stage's two maps are 8x8: mean redness and blueness of 4x4 pixels, never negative.
    """

    stages, head = ("stage",), "classifier"

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(True), nn.AvgPool2d(4))
        self.classifier = nn.Linear(2, 2)
        with torch.no_grad():
            kernel = torch.tensor([[1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]])
            self.stage[0].weight.copy_(kernel[:, :, None, None])
            self.classifier.weight.copy_(torch.tensor([[-5.0, 9.0], [9.0, -5.0]]))
            self.classifier.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.stage(images).mean((2, 3)))
        return logits


def red_patch() -> Tensor:
    """Grey noise with a red square, `[1, 3, 32, 32]`; grey is 0."""
    generator = torch.Generator().manual_seed(0)
    images = (0.1 * torch.randn(1, 1, SIZE, SIZE, generator=generator)).repeat(1, 3, 1, 1)
    images[:, 0, PATCH[0], PATCH[1]] = 2.0
    return images


def images_of(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))

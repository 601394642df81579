"""A network whose attribution is known, and images for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = 32  # pixels
PATCH = (slice(8, 14), slice(20, 26))  # rows and columns where the evidence is


class Reds(nn.Module):
    """Class 1 has evidence where pixels are redder than grey, class 0 where they are bluer.

    The two maps of the stage are 8 x 8: mean redness and blueness of 4 x 4 pixels, at least 0.
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
    """Return grey noise (grey is 0) with a red square, `[1, 3, 32, 32]`."""
    generator = torch.Generator().manual_seed(0)
    images = (0.1 * torch.randn(1, 1, SIZE, SIZE, generator=generator)).repeat(1, 3, 1, 1)
    images[:, 0, PATCH[0], PATCH[1]] = 2.0
    return images


def images_of(count: int = 3, seed: int = 1) -> Tensor:
    """Return normal noise, `[count, 3, 32, 32]`."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))

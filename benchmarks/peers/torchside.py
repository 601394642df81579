"""Shared by the PyTorch peers: the network and the usual input pipelines.

The variants are `pil`, PIL images through torchvision's transforms as in tutorials; `v2`, uint8
tensors through its v2 transforms; and `tensors`, a TensorDataset that was normalized once (without
augmentation). `2 workers` and `channels_last` may follow. All but `pil` use torch's fused Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms
from torchvision.transforms import v2

from convlens import models
from turns import Row

CROP = {"padding": 2, "padding_mode": "reflect"}


def variants(row: Row) -> list[str]:
    """Return the variants of the PyTorch peers."""
    loaded = ["pil", "pil, 2 workers", "v2", "v2, 2 workers", "v2, 2 workers, channels_last"]
    if row.augment:
        return loaded
    return ["tensors", "tensors, channels_last", "v2, 2 workers", "pil", "pil, 2 workers"]


def workers(variant: str) -> dict[str, Any]:
    """Return the arguments of DataLoader for worker processes."""
    return {"num_workers": 2, "persistent_workers": True} if "workers" in variant else {}


def network(row: Row, variant: str) -> nn.Module:
    images, _ = row.load()
    model = models.build_model(row.net, 10, row.channels, images.shape[1], row.options)
    row.check(sum(p.numel() for p in model.parameters() if p.requires_grad))
    if "channels_last" in variant:
        model = model.to(memory_format=torch.channels_last)
    return model


def adam(model: nn.Module, row: Row, variant: str) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=row.lr, fused=fused(variant))


def fused(variant: str) -> bool | None:
    return None if variant.startswith("pil") else True


def normalized(row: Row) -> tuple[Tensor, Tensor]:
    """Return all images as one float32 tensor `[N, C, H, W]`, and their labels."""
    pixels, labels = raw(row)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (row.mean, row.std))
    return (pixels / 255 - mean) / std, labels


def raw(row: Row) -> tuple[Tensor, Tensor]:
    """Return all images as one uint8 tensor `[N, C, H, W]`, and their labels."""
    images, labels = row.load()
    pixels = torch.from_numpy(images)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels)


def dataset(row: Row, variant: str) -> Dataset[tuple[Tensor, Any]]:
    if variant.startswith("pil"):
        return Pictures(row)
    return PixelTensors(row) if variant.startswith("v2") else TensorDataset(*normalized(row))


class Pictures(Dataset[tuple[Tensor, int]]):
    """Like torchvision's MNIST and CIFAR10: an array whose images are converted to PIL images."""

    def __init__(self, row: Row) -> None:
        self.data, labels = row.load()
        self.targets = labels.tolist()
        changes = [transforms.RandomCrop(self.data.shape[1], **CROP)]
        changes.append(transforms.RandomHorizontalFlip())
        self.transform = transforms.Compose(
            [
                *(changes if row.augment else []),
                transforms.ToTensor(),
                transforms.Normalize(row.mean, row.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


class PixelTensors(Dataset[tuple[Tensor, Tensor]]):
    """uint8 tensors through torchvision's v2 transforms."""

    def __init__(self, row: Row) -> None:
        self.data, self.targets = raw(row)
        changes = [v2.RandomCrop(self.data.shape[2], **CROP), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(
            [
                *(changes if row.augment else []),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(row.mean, row.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.data[index]), self.targets[index]

"""A fine-tuning loop as timm's and torchvision's tutorials write it.

All layers are trained by AdamW with a one-cycle schedule, label smoothing, random resized crops and
mirroring, and a `DataLoader` with two workers. The weights of the last epoch are used.
"""

from __future__ import annotations

import time

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from photographs_task import MEAN, STD, TIMED_BATCHES, TIMED_SIZE, read_task, size_and_epochs

BATCH, LR = 32, 1e-3
RESERVE = 4.0  # seconds for the end of the process

END = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


class Images(Dataset):
    """Image files with their labels."""

    def __init__(self, items: list[tuple[str, int]], transform: v2.Transform) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def train_loader(items: list[tuple[str, int]], size: int) -> DataLoader:
    augment = v2.Compose(
        [v2.RandomResizedCrop(size, scale=(0.4, 1.0)), v2.RandomHorizontalFlip(), *END]
    )
    return DataLoader(
        Images(items, augment),
        BATCH,
        shuffle=True,
        num_workers=2,
        drop_last=len(items) > BATCH,
        persistent_workers=True,
    )


def plain_transform(size: int) -> v2.Transform:
    return v2.Compose([v2.Resize(size), v2.CenterCrop(size), *END])


def main() -> None:
    task = read_task()
    items = task.images
    model = task.network()
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        loss = loss_function(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    # Some batches with a learning rate of 0 are timed, with the waiting for them.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    times, start = [], time.perf_counter()
    for images, labels in train_loader(items["train"], TIMED_SIZE):
        step(images, labels)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        if len(times) == TIMED_BATCHES:
            break
    model.load_state_dict(state)  # the statistics of batch norm have moved
    batches = max(1, len(items["train"]) // BATCH)
    # The test has no backward pass and counts as a half.
    size, epochs = size_and_epochs(
        times, batches, task.left() - RESERVE, other_batches=len(items["test"]) / BATCH / 2
    )

    train = train_loader(items["train"], size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=epochs * len(train), pct_start=0.25
    )
    for _ in range(epochs):
        model.train()
        for images, labels in train:
            step(images, labels)
            schedule.step()
    model.eval()
    test = DataLoader(Images(items["test"], plain_transform(size)), BATCH, num_workers=2)
    with torch.no_grad():
        predicted = [int(k) for images, _ in test for k in model(images).argmax(1)]
    task.write(predicted, epochs=epochs, size=size)


if __name__ == "__main__":
    main()

"""A fine-tuning loop as timm's and torchvision's tutorials write it.

All layers are trained by AdamW with a one-cycle schedule; random resized crops and mirroring;
`DataLoader` with two workers. The weights of the last epoch are used.
"""

from __future__ import annotations

import time

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from photographs import MEAN, STD, read_task

SIZE, BATCH, LR = 160, 32, 1e-3
RESERVE = 4.0  # seconds for the end of the process


class Images(Dataset):
    def __init__(self, items: list[tuple[str, int]], transform: v2.Transform) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def main() -> None:
    task = read_task()
    end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augmented = v2.Compose(
        [v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0)), v2.RandomHorizontalFlip(), *end]
    )
    plain = v2.Compose([v2.Resize(SIZE), v2.CenterCrop(SIZE), *end])
    train = DataLoader(
        Images(task.images["train"], augmented),
        BATCH,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
    )
    test = DataLoader(Images(task.images["test"], plain), BATCH, num_workers=2)
    model = task.network()
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        loss = loss_function(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    # The first batches give the number of epochs; they are trained with a learning rate of 0.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    times = []
    for number, (images, labels) in enumerate(train):
        start = time.perf_counter()
        step(images, labels)
        times.append(time.perf_counter() - start)
        if number == 4:
            break
    model.load_state_dict(state)  # batch norm statistics
    seconds = sorted(times)[2] * 1.05
    test_seconds = len(test) * seconds / 2
    steps = int((task.left() - test_seconds - RESERVE) / seconds)
    epochs = max(1, steps // len(train))
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
    with torch.no_grad():
        predicted = [int(k) for images, _ in test for k in model(images).argmax(1)]
    task.write(predicted, epochs=epochs, size=SIZE)


if __name__ == "__main__":
    main()

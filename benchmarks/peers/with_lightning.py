"""Lightning: a LightningModule and a Trainer with everything but training turned off."""

from __future__ import annotations

import logging
import warnings

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchside
from turns import Row, Turns, serve


class Classifier(lightning.LightningModule):
    def __init__(self, row: Row, variant: str) -> None:
        super().__init__()
        self.row, self.variant = row, variant
        self.model = torchside.network(row, variant)
        self.objective = nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return self.objective(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torchside.adam(self.model, self.row, self.variant)


class Lap(lightning.Callback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.turns.epoch()


def train(row: Row, variant: str, turns: Turns) -> None:
    loader = DataLoader(
        torchside.dataset(row, variant),
        batch_size=row.batch,
        shuffle=True,
        **torchside.workers(variant),
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Lap(turns)],
    )
    trainer.fit(Classifier(row, variant), loader)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    serve(train, torchside.variants, ["lightning", "torch"])

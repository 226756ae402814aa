"""A small regression model and its data, for tests that go through the command line."""

import os
import signal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.utils.data import DataLoader


class ToyModule(LightningModule):
    """One linear layer with dropout, so that the random state matters too."""

    def __init__(self, width: int = 4, learning_rate: float = 0.05, options: dict[str, int] | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.dropout(self.layer(batch["x"]), 0.1).sub(batch["y"]).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch["x"]).sub(batch["y"]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.layer(batch["x"]).sub(batch["y"]).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


class ResumableLoader(DataLoader):
    """A loader in fixed order that knows where it was."""

    position = 0

    def __iter__(self):
        # lightning never asks for more than the last batch, so the end of an epoch shows here
        start = self.position % len(self)
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.position = number + 1
                yield batch

    def state_dict(self):
        return {"position": self.position % len(self)}

    def load_state_dict(self, state):
        self.position = state["position"]


class ToyData(LightningDataModule):
    """Batches of a fixed linear relation."""

    def __init__(self, width: int = 4, num_batches: int = 12, batch_size: int = 3, validate: bool = True):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more")
        self.width, self.num_batches, self.batch_size, self.validate = width, num_batches, batch_size, validate

    def _rows(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.num_batches * self.batch_size, self.width, generator=generator)
        return [{"x": row, "y": row.sum(0, keepdim=True)} for row in x]

    def train_dataloader(self):
        return ResumableLoader(self._rows(0), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self._rows(1), batch_size=self.batch_size) if self.validate else []

    def test_dataloader(self):
        return DataLoader(self._rows(2), batch_size=self.batch_size)


class SignalAt(Callback):
    """Sends this process a signal, or raises, at a training or validation batch."""

    def __init__(self, step: int, what: str = "SIGTERM", where: str = "train"):
        self.step, self.what, self.where = step, what, where

    def _act(self):
        if self.what == "error":
            raise RuntimeError("the step failed")
        os.kill(os.getpid(), getattr(signal, self.what))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.where == "train" and trainer.global_step == self.step:
            self._act()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        # between backward and the update
        if self.where == "update" and trainer.global_step == self.step:
            self._act()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.where == "val" and trainer.global_step == self.step and batch_idx == 1:
            self._act()

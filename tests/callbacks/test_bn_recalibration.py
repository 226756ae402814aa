"""Recalibration changes running statistics alone, to those of the trained weights over the whole data."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from tenfold.callbacks import BatchNormRecalibration, RunCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

INPUTS = 3 + 2 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(INPUTS)


class Toy(pl.LightningModule):
    def __init__(self, norm=True):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 1)]
        self.model = nn.Sequential(*(layers if norm else layers[:2]))

    def training_step(self, batch, batch_idx):
        loss = self.model(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/mean", self.model[2].running_mean.mean())
        self.log("val/stuck", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Before(pl.Callback):
    """Parameters as the optimiser left them."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.state = {name: value.clone() for name, value in pl_module.named_parameters()}


def fit(folder, *callbacks, module=None, **options):
    module = module or Toy()
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
           "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder} | options,
        callbacks=list(callbacks),
    )  # fmt: skip
    loader = DataLoader(DATA, batch_size=10)
    trainer.fit(module, loader, DataLoader(DATA, batch_size=10))
    return module, trainer


@pytest.mark.parametrize("options", [{}, {"max_epochs": -1, "max_steps": 8}], ids=["by epochs", "by steps"])
def test_a_cumulative_pass_gives_the_means_over_batches_without_dropout(options, tmp_path):
    before = Before()
    callback = BatchNormRecalibration(passes=1, average="cumulative")
    module, trainer = fit(tmp_path, before, callback, **options)
    norm = module.model[2]
    with torch.no_grad():
        hidden = module.model[0](INPUTS)
    # batches of equal size: the mean of means is the mean
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked == 4
    for name, value in module.named_parameters():
        assert torch.equal(value, before.state[name]), name
    assert all(part.training for part in module.modules())
    # the last validation has seen it
    assert float(trainer.callback_metrics["val/mean"]) == pytest.approx(float(norm.running_mean.mean()), rel=1e-5)


def test_ten_exponential_passes_by_hand(tmp_path):
    class Fixed(Toy):
        def recalibration_step(self, batch):
            self.model(batch[0])

    module, _ = fit(tmp_path, BatchNormRecalibration(), module=Fixed(), max_epochs=1)
    norm = module.model[2]
    with torch.no_grad():
        hidden = module.model[0](INPUTS)
    # after 40 batches what was there before counts 0.9 ** 40 = 1.5 %
    deviation = hidden.std(0) / 10**0.5
    assert ((norm.running_mean - hidden.mean(0)).abs() < 3 * deviation).all()
    assert norm.num_batches_tracked == 4 + 10 * 4
    torch.testing.assert_close(norm.running_var, hidden.var(0), rtol=0.4, atol=0)


def test_the_checkpoint_of_the_run_holds_it(tmp_path):
    checkpoint = RunCheckpoint(str(tmp_path))
    # the checkpoint callback is moved last by Lightning
    module, _ = fit(tmp_path, checkpoint, BatchNormRecalibration(passes=1, average="cumulative"),
                    enable_checkpointing=True, max_epochs=-1, max_steps=4)  # fmt: skip
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["model.2.running_mean"], module.model[2].running_mean)


def test_training_that_ends_early_is_recalibrated_too(tmp_path):
    checkpoint = RunCheckpoint(str(tmp_path))
    stop = EarlyStopping("val/stuck", patience=1)
    callback = BatchNormRecalibration(passes=1, average="cumulative")
    module, trainer = fit(tmp_path, checkpoint, stop, callback, enable_checkpointing=True, max_epochs=9)
    assert trainer.current_epoch < 8
    with torch.no_grad():
        expected = module.model[0](INPUTS).mean(0)
    torch.testing.assert_close(module.model[2].running_mean, expected)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["model.2.running_mean"], module.model[2].running_mean)


def test_max_batches_bounds_a_pass(tmp_path):
    module, _ = fit(tmp_path, BatchNormRecalibration(passes=3, max_batches=2), max_epochs=1)
    assert module.model[2].num_batches_tracked == 4 + 3 * 2
    # a trial run tries it once
    module, _ = fit(tmp_path, BatchNormRecalibration(passes=3), fast_dev_run=True)
    assert module.model[2].num_batches_tracked == 1 + 1


def test_two_processes_get_the_statistics_of_all_data(tmp_path, monkeypatch):
    from lightning.pytorch.strategies import DDPStrategy

    class Told(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            state = {name: value.clone() for name, value in pl_module.state_dict().items()}
            torch.save(state, f"{trainer.default_root_dir}/{trainer.global_rank}.pt")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    fit(tmp_path, Told(), BatchNormRecalibration(passes=1, average="cumulative"), devices=2, strategy=strategy)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    hidden = INPUTS @ one["model.0.weight"].T + one["model.0.bias"]
    for state in (one, two):
        torch.testing.assert_close(state["model.2.running_mean"], hidden.mean(0))
        # each batch's own variance plus that of the two processes' means
        torch.testing.assert_close(state["model.2.running_var"], hidden.var(0), rtol=0.25, atol=0)
    assert torch.equal(one["model.2.running_var"], two["model.2.running_var"])


def test_refusals(tmp_path):
    for options, message in (
        ({"passes": 0}, "passes is 0; it must be at least 1"),
        ({"max_batches": 0}, "max_batches is 0; it must be at least 1"),
        ({"average": "mean"}, "average 'mean' is not one of exponential, cumulative"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchNormRecalibration(**options)
    with pytest.raises(ValueError, match="this one has none; leave it out"):
        fit(tmp_path, BatchNormRecalibration(), module=Toy(norm=False))

"""Lambda from the optimiser step, the end of the old norms, resumption, validation of both branches, refusals."""

import copy
import itertools
import math
import os

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from tenfold.callbacks import PRepBNSchedule
from tenfold.callbacks.slab_schedule import blend_at
from tenfold.lightning_modules import ProgressiveNorm, RepBatchNorm
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(48, 4, generator=GENERATOR)
DATA = TensorDataset(INPUTS, INPUTS @ torch.randn(4, 2, generator=GENERATOR))


class Toy(pl.LightningModule):
    def __init__(self, *, recompute=False):
        super().__init__()
        torch.manual_seed(1)
        blends = [ProgressiveNorm(nn.LayerNorm(6), RepBatchNorm(6)) for _ in range(2)]
        self.model = nn.Sequential(nn.Linear(4, 6), blends[0], nn.GELU(), nn.Linear(6, 6), blends[1], nn.Linear(6, 2))
        self.recompute = recompute
        self.seen = []

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False) if self.recompute and self.training else self.model(x)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, *(float(part.blend) for part in self.blends())))
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.mse_loss(self(batch[0]), batch[1]), batch_size=len(batch[0]))

    def blends(self):
        return [part for part in self.modules() if isinstance(part, ProgressiveNorm)]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def trainer_for(folder, callbacks, **options):
    return pl.Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "max_epochs": -1, "logger": pl.loggers.CSVLogger(folder),
            "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "default_root_dir": folder,
        }
        | options,
        callbacks=callbacks,
    )  # fmt: skip


def loader(batch_size=8):
    return DataLoader(DATA, batch_size=batch_size)


def fit(folder, schedule, *, recompute=False, batch_size=8, ckpt_path=None, validate=False, **options):
    module = Toy(recompute=recompute)
    trainer = trainer_for(folder, [schedule], **options)
    trainer.fit(module, loader(batch_size), loader() if validate else None, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def test_values_of_the_two_decays():
    linear = [blend_at(s, warmup_steps=3, decay_steps=5) for s in range(12)]
    assert linear[:4] == [1.0] * 4
    assert linear[3:9] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0], abs=1e-12)
    # the last step before the end has 1/T, and the end is exact
    assert linear[7] == pytest.approx(1 / 5)
    assert linear[8:] == [0.0] * 4
    cosine = [blend_at(s, warmup_steps=0, decay_steps=6, decay="cosine") for s in range(8)]
    assert cosine == pytest.approx([(1 + math.cos(math.pi * min(s, 6) / 6)) / 2 for s in range(8)], abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(cosine))


def test_lambda_counts_optimiser_steps_under_accumulation_and_recomputation(tmp_path):
    expected = {step: blend_at(step, warmup_steps=1, decay_steps=4) for step in range(7)}
    for options in ({}, {"recompute": True}, {"accumulate_grad_batches": 3, "batch_size": 4}):
        module, _ = fit(tmp_path, PRepBNSchedule(warmup_steps=1, decay_steps=4), max_steps=7, **options)
        assert {row[0] for row in module.seen} == set(expected)
        for step, *values in module.seen:
            assert values == pytest.approx([expected[step]] * 2, abs=1e-7), options
        batches = module.blends()[0].new_norm.bn.num_batches_tracked
        # one step of warm-up that the statistics do not see
        assert batches == 6 * options.get("accumulate_grad_batches", 1)


def test_the_default_is_four_fifths_of_what_follows_warm_up(tmp_path):
    schedule = PRepBNSchedule(warmup_steps=2)
    fit(tmp_path, schedule, max_steps=12)
    assert schedule.state_dict() == {"decay_steps": 8, "warmup_steps": 2, "decay": "linear"}


def test_old_norms_leave_model_and_optimiser_and_training_goes_on(tmp_path):
    module, trainer = fit(tmp_path, PRepBNSchedule(decay_steps=3), max_steps=6)
    assert all(blend.old_norm is None for blend in module.blends())
    optimizer = trainer.optimizers[0]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters()} == {id(p) for p in optimizer.state}
    # the same as a loop written out
    other = Toy()
    steps = torch.optim.AdamW(other.parameters(), lr=0.05)
    for step, batch in zip(range(6), list(loader()), strict=True):
        for blend in other.blends():
            blend.set_blend(max(0.0, 1 - step / 3))
        steps.zero_grad(set_to_none=True)
        nn.functional.mse_loss(other.model(batch[0]), batch[1]).backward()
        if step >= 3:
            for blend in other.blends():
                for parameter in blend.old_norm.parameters():
                    parameter.grad = None
        steps.step()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name


@pytest.mark.filterwarnings("ignore:lambda reaches 0")
@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_continued_run_ends_where_an_uninterrupted_one_does(at, tmp_path):
    # the continuation would take another share of its steps: the saved length counts
    first = PRepBNSchedule(warmup_steps=1, decay_steps=7)
    whole, _ = fit(tmp_path, first, max_steps=12, batch_size=48)
    _, trainer = fit(tmp_path, PRepBNSchedule(warmup_steps=1, decay_steps=7), max_steps=at, batch_size=48)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = PRepBNSchedule(warmup_steps=1)
    rest, _ = fit(tmp_path, second, max_steps=12, batch_size=48, ckpt_path=tmp_path / "half.ckpt")
    assert [row[0] for row in rest.seen] == list(range(at, 12))
    assert [row for row in whole.seen if row[0] >= at] == rest.seen
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_resuming_after_the_end_of_the_old_norms(tmp_path):
    options = {"batch_size": 48}
    whole, _ = fit(tmp_path, PRepBNSchedule(decay_steps=2), max_steps=6, **options)
    _, trainer = fit(tmp_path, PRepBNSchedule(decay_steps=2), max_steps=4, **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    options["ckpt_path"] = tmp_path / "half.ckpt"
    rest, _ = fit(tmp_path, PRepBNSchedule(decay_steps=2), max_steps=6, **options)
    assert set(rest.state_dict()) == set(whole.state_dict())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_another_length_on_resumption_is_told(tmp_path):
    _, trainer = fit(tmp_path, PRepBNSchedule(decay_steps=6), max_steps=8, batch_size=48)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.warns(UserWarning, match="decay_steps 9 differs from the checkpoint's 6; 9 counts now"):
        fit(tmp_path, PRepBNSchedule(decay_steps=9), max_steps=10, batch_size=48, ckpt_path=tmp_path / "half.ckpt")


@pytest.mark.filterwarnings("ignore:lambda reaches 0")
def test_logged_values(tmp_path):
    module, trainer = fit(tmp_path, PRepBNSchedule(decay_steps=8), max_steps=3)
    found = trainer.logged_metrics
    assert float(found["prepbn/lambda"]) == pytest.approx(1 - 2 / 8)
    new = [blend.new_norm for blend in module.blends()]
    gaps = [float(blend.branch_gap) for blend in module.blends()]
    assert float(found["prepbn/branch_gap"]) == pytest.approx(sum(gaps) / 2)
    assert float(found["prepbn/branch_gap_max"]) == pytest.approx(max(gaps))
    assert float(found["prepbn/eta"]) == pytest.approx(sum(n.eta.item() for n in new) / 2)
    deviations = torch.cat([n.bn.running_var.sqrt() for n in new])
    assert float(found["prepbn/running_std_min"]) == pytest.approx(float(deviations.min()))
    assert float(found["prepbn/running_std_max"]) == pytest.approx(float(deviations.max()))
    _, trainer = fit(tmp_path, PRepBNSchedule(decay_steps=2), max_steps=4)
    found = trainer.logged_metrics
    assert float(found["prepbn/lambda"]) == 0
    assert math.isnan(float(found["prepbn/branch_gap"]))


def losses(module):
    """Validation loss of the batch norms, and of the blend, over all data."""
    found = []
    for shown in (False, True):
        for blend in module.blends():
            blend.evaluate_blend = shown
        with torch.no_grad():
            found.append(float(nn.functional.mse_loss(module.eval()(DATA.tensors[0]), DATA.tensors[1])))
    for blend in module.blends():
        blend.evaluate_blend = False
    return found


@pytest.mark.filterwarnings("ignore:lambda reaches 0")
@pytest.mark.parametrize("validate", ["bn", "blend", "both"])
def test_validation_shows_what_was_asked_for(validate, tmp_path):
    schedule = PRepBNSchedule(decay_steps=8, validate=validate)
    module, trainer = fit(tmp_path, schedule, max_steps=6, validate=True)
    bn, blend = losses(copy.deepcopy(module))
    assert abs(bn - blend) > 1e-3
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    expected = {"bn": {"val/loss": bn}, "blend": {"val/loss": blend}}
    expected["both"] = expected["bn"] | {"val_blend/loss": blend}
    assert metrics == pytest.approx(expected[validate], rel=1e-5)
    assert not any(part.evaluate_blend for part in module.blends())


def test_a_schedule_that_ends_after_training_is_told(tmp_path):
    message = r"lambda reaches 0 at step 6, training ends after 6: .* shorten decay_steps \(5\) or warmup_steps \(1\)"
    with pytest.warns(UserWarning, match=message):
        module, _ = fit(tmp_path, PRepBNSchedule(warmup_steps=1, decay_steps=5), max_steps=6)
    assert module.blends()[0].blend_state()[0] == pytest.approx(0.2)


def test_refusals(tmp_path):
    for options, message in (
        ({"warmup_steps": -1}, "warmup_steps -1 is below 0"),
        ({"decay_steps": 0}, "decay_steps 0 is below 1"),
        ({"decay_share": 1.5}, r"decay_share 1.5 is not above 0 and at most 1"),
        ({"decay": "step"}, "decay 'step' is not one of linear, cosine"),
        ({"validate": "all"}, "validate 'all' is not one of bn, blend, both"),
    ):
        with pytest.raises(ValueError, match=message):
            PRepBNSchedule(**options)
    module = Toy()
    module.model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="this one has none; set `norm: prepbn`, call replace_norms"):
        trainer_for(tmp_path, [PRepBNSchedule()], max_steps=1).fit(module, loader())
    with pytest.raises(ValueError, match="the trainer has no end to take decay_share of; set decay_steps, or max_s"):
        fit(tmp_path, PRepBNSchedule(), max_steps=-1)


class Told(PRepBNSchedule):
    """Writes what each process ends with."""

    def on_train_end(self, trainer, pl_module):
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        torch.save({"state": state, "seen": pl_module.seen}, f"{trainer.default_root_dir}/{trainer.global_rank}.pt")


def test_two_processes_wait_for_no_parameter_and_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    os.environ.pop("MASTER_PORT", None)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", find_unused_parameters=False)
    trainer = trainer_for(
        tmp_path, [Told(warmup_steps=2, decay_steps=2)], max_steps=7, devices=2, strategy=strategy, logger=False
    )
    trainer.fit(Toy(), loader(4))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["seen"] == two["seen"]
    assert [row[1] for row in one["seen"]] == [1, 1, 1, 0.5, 0, 0, 0]
    assert not any("old_norm" in name for name in one["state"])
    for name, value in one["state"].items():
        if "running" not in name:
            assert torch.equal(value, two["state"][name]), name

"""SLABLightning through fit, checkpoint, resumption and export: a preset, and a pretrained Llama."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from tenfold.callbacks import BatchNormRecalibration, PRepBNSchedule, RunCheckpoint
from tenfold.experiments.model_source import load_source
from tenfold.lightning_modules import ProgressiveNorm, SLABLightning
from tenfold.lightning_modules.slab import fused_model, statistics_norms
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

# some runs stop in the blend on purpose
pytestmark = pytest.mark.filterwarnings("ignore:lambda reaches 0")
SMALL = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


class Data(LightningDataModule):
    def train_dataloader(self):
        ids = torch.randint(61, (8, 12), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=8)

    val_dataloader = train_dataloader


def fit(folder, module, steps, *, ckpt_path=None, schedule=True, **options):
    callbacks = [RunCheckpoint(str(folder))]
    if schedule:
        callbacks += [PRepBNSchedule(warmup_steps=1, decay_steps=3, validate="both")]
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, log_every_n_steps=1, num_sanity_val_steps=0,
        callbacks=[*callbacks, *options.pop("callbacks", [])], **options,
    )  # fmt: skip
    # the network is made in fit
    torch.manual_seed(0)
    trainer.fit(module, datamodule=Data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.fixture
def pretrained(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def module_for(kind, pretrained, **options):
    how = {"pretrained": pretrained} if kind == "llama" else {"model": {**SMALL, "norm": "prepbn"}}
    return SLABLightning(**how, learning_rate=0.01, total_steps=6, **options)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "recomputed"])
@pytest.mark.parametrize("kind", ["decoder", "llama"])
def test_a_run_is_continued_exactly_and_its_checkpoint_is_fused(kind, options, pretrained, tmp_path):
    whole, part, rest = (module_for(kind, pretrained, **options) for _ in range(3))
    fit(tmp_path / "whole", whole, 6)
    # half-way in the blend
    fit(tmp_path / "part", part, 3)
    assert part.model.model.norm.blend_state()[0] == pytest.approx(2 / 3)
    fit(tmp_path / "rest", rest, 6, ckpt_path=tmp_path / "part" / "last.ckpt")
    assert set(rest.state_dict()) == set(whole.state_dict())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    # the checkpoint as `tenfold export` reads it
    trained = load_source(str(tmp_path / "whole" / "last.ckpt")).model
    blends = [norm for norm in trained.modules() if isinstance(norm, ProgressiveNorm)]
    assert len(blends) == 5
    assert all(norm.old_norm is None for norm in blends)
    fused_model(trained).save_pretrained(tmp_path / "fused")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert statistics_norms(loaded) == []
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(loaded(ids).logits, whole.model.eval()(ids).logits, rtol=0, atol=1e-5)


def test_a_checkpoint_from_the_blend_is_read_with_its_lambda(pretrained, tmp_path):
    module = module_for("decoder", pretrained)
    fit(tmp_path, module, 3)
    trained = load_source(str(tmp_path / "last.ckpt")).model
    assert trained.model.norm.blend_state() == (pytest.approx(2 / 3, abs=1e-7), False)
    with pytest.raises(ValueError, match=r"model.layers.0.attention_norm is still in the blend, lambda 0.6667"):
        fused_model(trained)


def test_both_branches_are_validated_and_recalibration_changes_statistics_alone(pretrained, tmp_path):
    module = module_for("decoder", pretrained)
    trainer = fit(tmp_path, module, 3, callbacks=[BatchNormRecalibration(passes=2)])
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    batch = next(iter(Data().train_dataloader()))

    def loss():
        with torch.no_grad():
            return float(module.model.eval()(input_ids=batch["input_ids"], labels=batch["labels"]).loss)

    assert found["val/loss"] == pytest.approx(loss(), rel=1e-5)
    for norm in module._blends():
        norm.evaluate_blend = True
    assert found["val_blend/loss"] == pytest.approx(loss(), rel=1e-5)
    plain = module_for("decoder", pretrained)
    fit(tmp_path / "plain", plain, 3)
    others = plain.state_dict()
    changed = {
        name.rpartition(".")[2] for name, value in module.state_dict().items() if not torch.equal(value, others[name])
    }
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_norms_of_a_pretrained_model_can_stay(pretrained, tmp_path):
    module = module_for("llama", pretrained, exclude=["model.norm"], momentum=0.3)
    fit(tmp_path, module, 1)
    assert len(module._blends()) == 4
    assert {norm.new_norm.bn.momentum for norm in module._blends()} == {0.3}


def test_refusals(pretrained, tmp_path):
    with pytest.raises(ValueError, match="needs `norm: prepbn`, the configuration has 'rmsnorm'; change it"):
        fit(tmp_path, SLABLightning(model=dict(SMALL)), 1)
    with pytest.raises(ValueError, match=r"5 progressive norms and no schedule: .* add the callback PRepBNSchedule"):
        fit(tmp_path, module_for("decoder", pretrained), 1, schedule=False)

"""MemoryFormerLightning: which parameters are stepped how, memory, a whole small run."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tenfold.lightning_modules import MemoryFormerLightning, MemoryLayer
from tenfold.lightning_modules.memoryformer import sizes
from torch.utils.data import DataLoader

FIELDS: dict[str, Any] = {
    "preset": "memoryformer-tiny",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_options": {"num_bits": 4},
    "feed_forward_options": {"num_bits": 4, "extra_bits": 1},
}


class Text(pl.LightningDataModule):
    """Random sequences."""

    vocab_size = 61

    def train_dataloader(self) -> Any:
        ids = torch.randint(61, (8, 12), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "labels": row, "num_bytes": torch.tensor(30)} for row in ids]
        return DataLoader(rows, batch_size=2)

    val_dataloader = train_dataloader


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", **(quiet | {"max_steps": 4, "enable_checkpointing": False} | options))


def fitted(**options: Any) -> tuple[MemoryFormerLightning, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    module, run = MemoryFormerLightning(FIELDS, learning_rate=1e-3, weight_decay=0.1, **options), trainer()
    run.fit(module, Text())
    return module, run


def groups_by_parameter(module: Any, run: Any) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        names[id(p)]: (group["initial_lr"], group["weight_decay"])
        for group in run.optimizers[0].param_groups
        for p in group["params"]
    }


def test_tables_have_three_times_the_learning_rate_and_no_decay():
    module, run = fitted()
    found = groups_by_parameter(module, run)
    assert found.keys() == {name for name, _ in module.named_parameters()}
    tables = {f"{name}.table" for name, part in module.named_modules() if isinstance(part, MemoryLayer)}
    assert len(tables) == 6
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(3e-3 if name in tables else 1e-3), name
        assert decay == (0.1 if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 0.0), name


def test_the_released_recipe_multiplies_everything_and_decays_tables():
    module, run = fitted(recipe="released", table_learning_rate_multiplier=2.0)
    for name, (rate, decay) in groups_by_parameter(module, run).items():
        assert rate == pytest.approx(2e-3), name
        matrix = dict(module.named_parameters())[name].dim() >= 2
        assert decay == (0.1 if matrix else 0.0), name


def test_options_of_the_tables_reach_the_optimiser():
    module, run = fitted(table_learning_rate_multiplier=1.5, table_weight_decay=0.05)
    rate, decay = groups_by_parameter(module, run)["model.model.layers.1.feed_forward.second.table"]
    assert (rate, decay) == (pytest.approx(1.5e-3), 0.05)


def test_rows_that_no_token_reached_stay_as_they_were_and_others_move():
    pl.seed_everything(0, verbose=False)
    module = MemoryFormerLightning(FIELDS, learning_rate=1e-3)
    module.configure_model()
    layer = module.model.model.layers[0].attention.qkv_proj.memory
    before, used = layer.table.detach().clone(), torch.zeros(len(layer.table), dtype=torch.bool)

    def note(part: MemoryLayer, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = part.buckets(inputs[0]) + torch.arange(part.num_tables) * 2**part.num_bits
        used[rows.flatten()] = True

    layer.register_forward_pre_hook(note)
    trainer(limit_val_batches=0).fit(module, Text())
    moved = (layer.table.detach() != before).any(dim=1)
    assert 0 < used.sum() < len(used)
    assert torch.equal(moved, used)


def test_it_learns_and_resumes_to_the_same_bits(tmp_path):
    pl.seed_everything(0, verbose=False)
    module = MemoryFormerLightning(FIELDS, learning_rate=3e-2, total_steps=30)
    whole = trainer(max_steps=30)
    whole.fit(module, Text())
    assert float(whole.callback_metrics["train/loss"]) < 3.5 < float(torch.tensor(61.0).log())
    pl.seed_everything(0, verbose=False)
    first = MemoryFormerLightning(FIELDS, learning_rate=3e-2, total_steps=30)
    run = trainer(max_steps=12)
    run.fit(first, Text())
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = MemoryFormerLightning(FIELDS, learning_rate=3e-2, total_steps=30)
    trainer(max_steps=30).fit(again, Text(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for one, other in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)


class TestBadInput:
    def test_training_that_does_not_fit_is_refused_with_its_bytes(self, monkeypatch):
        monkeypatch.setattr(sizes, "available_bytes", lambda device="cpu": 30 * 10**9)
        module = MemoryFormerLightning("memoryformer-small")
        message = r"training 1,945,939,200 parameters .*takes 31,135,027,200 bytes \(31\.1 GB\), cpu has 30,000,000,000"
        with pytest.raises(ValueError, match=message):
            module.configure_model()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"recipe": "paper"}, "unknown recipe 'paper'; there are tables, released"),
            ({"table_learning_rate_multiplier": 0.0}, "must be above 0"),
            ({"table_weight_decay": -0.1}, "at least 0"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            MemoryFormerLightning(FIELDS, **options)

    def test_weights_that_diverged_are_told_as_such(self):
        module = MemoryFormerLightning(FIELDS)
        module.configure_model()
        with torch.no_grad():
            module.model.model.layers[0].attention.qkv_proj.memory.table.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"activations are NaN or infinite.*the training diverged"):
            module.model(input_ids=torch.zeros(1, 3, dtype=torch.int64))

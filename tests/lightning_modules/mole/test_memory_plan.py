"""The plan that is printed before training: counts of the paper's sizes, and bytes of a small model as it trains."""

import logging

import pytest
import torch
from lightning.pytorch import Trainer
from tenfold.lightning_modules import DecoderForCausalLM, MoLELightning, decoder_config
from tenfold.lightning_modules.mole.memory_plan import exchange_bytes, training_plan
from torch.utils.data import DataLoader


@pytest.mark.parametrize(
    ("preset", "parameters", "dense", "row"),
    [
        ("mole-160m-4e", 388_759_296, 162_220_800, 73_728),
        ("mole-160m-16e", 1_068_347_136, 162_220_800, 294_912),
        ("mole-410m-16e", 3_626_705_920, 405_062_656, 786_432),
        ("mole-1b-4e", 3_159_066_624, 1_011_419_136, 262_144),
    ],
)
def test_the_papers_sizes(preset: str, parameters: int, dense: int, row: int) -> None:
    config = decoder_config(preset)
    with torch.device("meta"):
        plan = training_plan(DecoderForCausalLM(config), tokens_per_micro_batch=16384)
    experts = config.feed_forward_options["num_experts"]
    assert plan.parameters == parameters
    # what is neither dense nor a router
    assert plan.expert_parameters == parameters - dense - config.num_hidden_layers * experts * config.hidden_size
    assert plan.state_bytes == 16 * parameters
    assert plan.table_row_bytes == row
    assert plan.table_bytes == 50304 * row
    assert plan.sharded_state_bytes(1) == plan.state_bytes
    assert plan.sharded_state_bytes(8) == pytest.approx(16 * parameters / 8, rel=1e-6)
    # two nodes of four: dense weights on each node
    rest = parameters - plan.expert_parameters
    assert plan.sharded_state_bytes(8, replicas=2) == pytest.approx(
        16 * (plan.expert_parameters / 8 + rest / 4), rel=1e-6
    )
    if preset == "mole-160m-16e":
        # hidden activations of width 3072 before and after GELU, and outputs of width 768
        assert plan.expert_activation_bytes == 16384 * 16 * (3072 + 3072 + 768) * 2
        assert "17.09 GB of weights" in plan.describe()
        assert "sharded over 8 processes 2.14 GB each" in plan.describe(8)
        # 12 layers, sums and their gradients of seven other processes; 7/8 of the experts' weights three times
        sent = 12 * 2 * 7 * 16384 * 768 * 2
        fsdp = 3 * 2 * plan.expert_parameters * 7 // 8
        assert f"each process sends {sent / 1e9:.3f} GB per micro-batch for them" in plan.describe(8, group_size=8)
        assert f"where FSDP alone would send {fsdp / 1e9:.3f} GB" in plan.describe(8, group_size=8)
        assert "on 8 processes 2.14 GB each; experts divided by 8" in plan.describe(8, group_size=8)
        assert "on 8 processes 2.14 GB each; experts divided by 1:" in plan.describe(8, group_size=1)


def test_a_ring_sends_every_other_process_its_sums() -> None:
    # four processes, 1000 tokens each: three quarters of the sums of 4000 tokens go out
    assert exchange_bytes(768, 1000, 4) == 4000 * 768 * 2 * 3 // 4


def test_it_is_said_before_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    fields = {"preset": "mole-tiny-4e", "vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2}
    module = MoLELightning(fields | {"num_hidden_layers": 2})
    ids = torch.randint(40, (4, 8))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)
    options = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(**options, enable_progress_bar=False, enable_model_summary=False)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, loader)
    said = [record.message for record in caplog.records if "weights, gradients and AdamW state" in record.message]
    count = sum(p.numel() for p in module.parameters())
    assert len(said) == 1
    assert said[0].startswith(f"{count:,} parameters")
    state = trainer.optimizers[0].state_dict()["state"]
    moments = sum(value.nbytes for entry in state.values() for value in entry.values() if value.dim())
    # weights and gradients, and the moments that AdamW made
    assert training_plan(module.model).state_bytes == 2 * 4 * count + moments

"""CausalLMModule and MoLELightning: what is logged, how parameters are stepped, what a checkpoint gives back."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tenfold.lightning_modules import CausalLMModule, MoLELightning
from tenfold.lightning_modules.decoder import DecoderForCausalLM
from tenfold.lightning_modules.language_model import cosine_with_warmup
from torch.utils.data import DataLoader

FIELDS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MODULES: dict[str, Callable[..., CausalLMModule]] = {
    "dense": lambda **options: CausalLMModule({"preset": "dense-tiny", **FIELDS}, **options),
    "moe": lambda **options: CausalLMModule({"preset": "moe-tiny-10e", **FIELDS}, **options),
    "mole": lambda **options: MoLELightning({"preset": "mole-tiny-4e", **FIELDS}, **options),
}


class RaggedText(LightningDataModule):
    """Random sequences whose labels are missing in places, in batches of different sizes."""

    def __init__(self, vocab_size: int = 61, with_bytes: bool = True, batch_size: int = 3) -> None:
        super().__init__()
        self.vocab_size, self.batch_size = vocab_size, batch_size
        generator = torch.Generator().manual_seed(2)
        self.rows = []
        for length in torch.randint(1, 12, (10,), generator=generator).tolist():
            ids = torch.randint(61, (13,), generator=generator)
            labels = ids.clone()
            labels[length:] = -100
            labels[0] = -100
            row = {"input_ids": ids, "labels": labels}
            if with_bytes:
                row["num_bytes"] = torch.randint(20, 60, (), generator=generator)
            self.rows.append(row)

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Recorder(Callback):
    """Keeps what was logged in every training step, and the optimiser's learning rate of that step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.learning_rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    options = {"max_steps": 6, "max_epochs": -1, "limit_val_batches": 0} | options
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, default_root_dir=folder, callbacks=list(callbacks), **options,
    )  # fmt: skip


def build(name: str, **options: Any) -> CausalLMModule:
    torch.manual_seed(0)
    return MODULES[name](**options)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("name", MODULES)
def test_evaluation_equals_a_float64_computation(name: str, split: str, tmp_path: Path) -> None:
    data, module = RaggedText(), build(name)
    run = trainer(tmp_path, limit_val_batches=1.0)
    (metrics,) = (run.validate if split == "val" else run.test)(module, datamodule=data, verbose=False)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for row in data.rows:
            logits = module.model(row["input_ids"][None]).logits[0].double().numpy()
            for t in range(1, 13):
                label = int(row["labels"][t])
                if label != -100:
                    nats += float(np.logaddexp.reduce(logits[t - 1]) - logits[t - 1, label])
                    tokens += 1
    num_bytes = sum(int(row["num_bytes"]) for row in data.rows)
    assert tokens < 120
    assert set(metrics) == {f"{split}/loss", f"{split}/perplexity", f"{split}/bits_per_byte"}
    assert metrics[f"{split}/loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert metrics[f"{split}/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert metrics[f"{split}/bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    # sums start anew
    (again,) = (run.validate if split == "val" else run.test)(module, datamodule=data, verbose=False)
    assert again == metrics


def test_without_byte_counts_there_are_no_bits_per_byte(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_val_batches=1.0)
    (metrics,) = run.validate(build("dense"), datamodule=RaggedText(with_bytes=False), verbose=False)
    assert set(metrics) == {"val/loss", "val/perplexity"}


def test_prediction_is_the_log_probability_of_every_label(tmp_path: Path) -> None:
    data, module = RaggedText(), build("dense")
    found = torch.cat(trainer(tmp_path).predict(module, datamodule=data))
    assert found.shape == (10, 12)
    for row, values in zip(data.rows, found, strict=True):
        log_probabilities = module.model(row["input_ids"][None]).logits[0].log_softmax(-1)
        for t in range(1, 13):
            label = int(row["labels"][t])
            expected = 0.0 if label == -100 else log_probabilities[t - 1, label].item()
            assert values[t - 1].item() == pytest.approx(expected, abs=1e-5)


def test_diverged_evaluation_is_refused(tmp_path: Path) -> None:
    module, data = build("dense", vocab_size=61), RaggedText()
    module.configure_model()
    torch.nn.init.constant_(module.model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="the val loss is nan: the training diverged; lower the learning rate"):
        trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)


@pytest.mark.parametrize("name", MODULES)
def test_training_loss_leaves_auxiliary_losses_out(name: str, tmp_path: Path) -> None:
    data, module, recorder = RaggedText(), build(name), Recorder()
    run = trainer(tmp_path, recorder, max_steps=1)
    module._trainer = run
    run.datamodule = data
    module.configure_model()
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        output = module.model.train()(input_ids=batch["input_ids"], labels=batch["labels"])
        logits, labels = output.logits[:, :-1].double(), batch["labels"][:, 1:]
        chosen = logits.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    expected = -(chosen[labels != -100]).mean().item()
    run.fit(module, datamodule=data)
    logged = recorder.steps[0]
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)
    extra = {"dense": set(), "moe": {"train/z_loss", "train/load_balance_loss"}, "mole": set()}[name]
    ratio = {"train/tokens_per_distinct_id"} if name == "mole" else set()
    assert set(logged) == {"train/loss", "train/learning_rate"} | extra | ratio
    for key in extra:
        value = output.auxiliary_losses[key.removeprefix("train/")].item()
        assert value > 1e-3
        assert logged[key] == pytest.approx(value, rel=1e-5)
    if ratio:
        ids = batch["input_ids"]
        assert logged["train/tokens_per_distinct_id"] == pytest.approx(ids.numel() / len(set(ids.flatten().tolist())))


def test_auxiliary_losses_are_trained_on(tmp_path: Path) -> None:
    """A load-balance weight changes the router's first step."""
    routers = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        options = {"num_experts": 4, "load_balance_loss_weight": weight}
        module = CausalLMModule({**FIELDS, "feed_forward": "moe", "feed_forward_options": options}, learning_rate=1e-2)
        trainer(tmp_path, max_steps=2).fit(module, datamodule=RaggedText())
        routers.append(module.model.model.layers[0].feed_forward.router.weight.detach())
    assert not torch.equal(*routers)


@pytest.mark.parametrize(("accumulate", "max_steps"), [(1, 10), (2, 5)])
def test_learning_rate_follows_the_closed_form(accumulate: int, max_steps: int, tmp_path: Path) -> None:
    recorder = Recorder()
    module = build("dense", learning_rate=3e-3, warmup_ratio=0.4, min_learning_rate_ratio=0.2)
    run = trainer(tmp_path, recorder, max_steps=max_steps, accumulate_grad_batches=accumulate)
    run.fit(module, datamodule=RaggedText())
    warmup = round(0.4 * max_steps)
    expected = []
    for step in range(max_steps):
        if step < warmup:
            expected.append(3e-3 * (step + 1) / warmup)
        else:
            angle = math.pi * (step - warmup) / (max_steps - warmup)
            expected.append(3e-3 * (0.2 + 0.8 * (1 + math.cos(angle)) / 2))
    assert recorder.learning_rates == pytest.approx(expected, rel=1e-12)
    assert recorder.steps[0]["train/learning_rate"] == pytest.approx(expected[0], rel=1e-6)


def test_schedule_has_its_own_length_when_told(tmp_path: Path) -> None:
    recorder = Recorder()
    module = build("dense", total_steps=4, warmup_ratio=0.0, min_learning_rate_ratio=0.1)
    trainer(tmp_path, recorder, max_steps=6).fit(module, datamodule=RaggedText())
    assert recorder.learning_rates[4:] == pytest.approx([6e-5, 6e-5])
    assert recorder.learning_rates[2] == pytest.approx(6e-4 * 0.55)


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_schedule_rises_once_then_falls_and_stays(warmup_steps: int) -> None:
    values = [cosine_with_warmup(step, warmup_steps=warmup_steps, total_steps=30, min_ratio=0.1) for step in range(40)]
    top = max(0, warmup_steps - 1)
    assert values[top] == max(values) == 1
    assert all(one < other for one, other in pairwise(values[: top + 1]))
    assert all(one >= other for one, other in pairwise(values[warmup_steps:]))
    assert values[30:] == pytest.approx([0.1] * 10)


@pytest.mark.parametrize("name", MODULES)
def test_vectors_are_not_decayed(name: str, tmp_path: Path) -> None:
    data = RaggedText()
    # no warm-up: the first step already has the full learning rate; its decay multiplies matrices by 1 - lr * decay
    module = build(name, weight_decay=0.5, learning_rate=1e-3, warmup_ratio=0.0)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, datamodule=data)
    decayed, kept = run.optimizers[0].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    assert {p.dim() for p in kept["params"]} == {1}
    assert min(p.dim() for p in decayed["params"]) == 2
    assert {id(p) for p in decayed["params"] + kept["params"]} == {id(p) for p in module.parameters()}
    assert decayed["betas"] == (0.9, 0.95)
    assert decayed["eps"] == 1e-8


def test_one_step_equals_adamw_by_hand(tmp_path: Path) -> None:
    data, module = RaggedText(), build("dense", weight_decay=0.5, learning_rate=1e-2, warmup_ratio=0.0, vocab_size=61)
    module.configure_model()
    before = {name: value.detach().clone().double() for name, value in module.model.named_parameters()}
    batch = next(iter(data.train_dataloader()))
    module.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    gradients = {name: value.grad.clone().double() for name, value in module.model.named_parameters()}
    module.zero_grad()
    trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    for name, value in module.model.named_parameters():
        # in the first step both moments, corrected for their start at zero, are the gradient and its square
        g, decay = gradients[name], 0.5 if value.dim() > 1 else 0.0
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * g / (g.abs() + 1e-8)
        large = g.abs() > 1e-6
        torch.testing.assert_close(value.detach().double()[large], expected[large], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_gradients_are_clipped_in_every_precision(precision: Any, tmp_path: Path) -> None:
    norms = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            found = [p.grad.float().norm() for p in pl_module.parameters() if p.grad is not None]
            if found:
                norms.append(torch.stack(found).norm().item())

    run = trainer(tmp_path, Norms(), max_steps=3, precision=precision, gradient_clip_val=1e-3)
    run.fit(build("mole"), datamodule=RaggedText())
    assert len(norms) >= 2
    assert norms == pytest.approx([1e-3] * len(norms), rel=0.02)


@pytest.mark.parametrize(("multiple", "rows"), [(1, 61), (8, 64), (50, 100)])
def test_vocabulary_comes_from_the_data_module(multiple: int, rows: int, tmp_path: Path) -> None:
    module = build("dense", pad_vocab_to_multiple_of=multiple)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=RaggedText())
    assert module.model.config.vocab_size == module.hparams["vocab_size"] == rows
    # padding rows are never a target and get no probability mass from the data, but they are there
    assert module.model.lm_head.out_features == rows


def test_special_ids_come_from_the_tokenizer(tiny_tokenizer: Any, tmp_path: Path) -> None:
    data = RaggedText(vocab_size=len(tiny_tokenizer.tokenizer))
    data.tokenizer = tiny_tokenizer.tokenizer
    module, run = build("dense"), trainer(tmp_path, max_steps=1)
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    # without the data module, the checkpoint says them
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    ids = (tiny_tokenizer.tokenizer.eos_token_id, tiny_tokenizer.tokenizer.pad_token_id)
    for model in (module.model, loaded.model):
        assert (model.config.eos_token_id, model.config.pad_token_id) == ids
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == ids
        assert model.config.vocab_size == 320


def test_a_vocabulary_below_the_tokenizers_is_refused(tmp_path: Path) -> None:
    for module in (build("dense", vocab_size=60), CausalLMModule({**FIELDS, "vocab_size": 60})):
        with pytest.raises(ValueError, match=r"vocabulary has 60 rows, the tokenizer has 61 entries; raise vocab_size"):
            trainer(tmp_path).fit(module, datamodule=RaggedText())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: CausalLMModule("dense-tini"), "unknown preset 'dense-tini'; nearest: dense-tiny"),
        (lambda: CausalLMModule({"hiden_size": 8}), "unknown field of the model 'hiden_size'; nearest: hidden_size"),
        (lambda: CausalLMModule({**FIELDS, "norm": "rms"}), "unknown norm 'rms'; nearest: rmsnorm"),
        (lambda: MoLELightning("dense-tiny"), "MoLELightning needs feed_forward 'mole', 'dense-tiny' has 'dense'"),
        (lambda: MoLELightning(recipe="papers"), "unknown recipe 'papers'; there are code, paper"),  # type: ignore[arg-type]
    ],
)
def test_unknown_names_are_refused(module: Callable[[], CausalLMModule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module().configure_model()


def test_a_trainer_without_end_needs_a_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the trainer has no end .* set one, or total_steps"):
        trainer(tmp_path, max_steps=-1).fit(build("dense"), datamodule=RaggedText())


@pytest.mark.parametrize(
    ("options", "weight_decay", "rotated"),
    [
        ({}, 0.1, 8),
        ({"recipe": "code"}, 0.1, 8),
        ({"recipe": "paper"}, 0.01, 2),
        ({"recipe": "paper", "weight_decay": 0.3}, 0.3, 2),
        ({"recipe": "paper", "weight_decay": 0.0}, 0.0, 2),
    ],
)
def test_recipes_set_decay_and_rotary_fraction(
    options: dict[str, Any], weight_decay: float, rotated: int, tmp_path: Path
) -> None:
    module = build("mole", **options)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, datamodule=RaggedText())
    assert run.optimizers[0].param_groups[0]["weight_decay"] == weight_decay
    assert 2 * len(module.model.model.rotary.inv_freq) == rotated


def test_an_explicit_rotary_fraction_wins_over_the_recipe(tmp_path: Path) -> None:
    rope = {"partial_rotary_factor": 0.5, "rope_theta": 123.0}
    module = MoLELightning({"preset": "mole-tiny-4e", **FIELDS, "rope_parameters": rope}, recipe="paper")
    trainer(tmp_path, max_steps=1).fit(module, datamodule=RaggedText())
    assert module.model.config.rope_parameters == {"rope_type": "default", **rope}


# one matrix over everything that trains: fast_dev_run, save, load, resume


@pytest.mark.parametrize("name", MODULES)
def test_fast_dev_run(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, fast_dev_run=True, max_steps=-1, limit_val_batches=1.0)
    run.fit(build(name), datamodule=RaggedText())
    assert math.isfinite(run.callback_metrics["train/loss"])
    assert math.isfinite(run.callback_metrics["val/bits_per_byte"])


@pytest.mark.parametrize("name", MODULES)
def test_checkpoint_loads_without_pickle_and_without_data(name: str, tmp_path: Path) -> None:
    options = {"recipe": "paper"} if name == "mole" else {"weight_decay": 0.2}
    module, run = build(name, learning_rate=1e-3, **options), trainer(tmp_path, max_steps=2)
    run.fit(module, datamodule=RaggedText())
    run.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["vocab_size"] == 61
    assert all(not key.startswith("model._orig_mod") for key in content["state_dict"])
    loaded = type(module).load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.hparams["weight_decay"] == {"mole": 0.01}.get(name, 0.2)
    assert loaded.model.config.to_dict() == module.model.config.to_dict()
    ids = RaggedText().rows[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, module.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("name", MODULES)
def test_resumed_run_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    # all rows are one batch: where a loader resumes is the data module's concern
    data = RaggedText(batch_size=10)
    whole = Recorder()
    module = build(name, learning_rate=1e-2, total_steps=8)
    trainer(tmp_path, whole, Save(), max_steps=8).fit(module, datamodule=data)
    rest = Recorder()
    resumed = MODULES[name](learning_rate=1e-2, total_steps=8)
    trainer(tmp_path, rest, max_steps=8).fit(
        resumed, datamodule=data, ckpt_path=tmp_path / "four.ckpt", weights_only=True
    )
    assert len(rest.steps) == 4
    assert rest.steps == whole.steps[4:]
    assert rest.learning_rates == whole.learning_rates[4:]
    for one, other in zip(resumed.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", MODULES)
def test_training_starts_from_a_pretrained_folder(name: str, tmp_path: Path) -> None:
    source = build(name)
    trainer(tmp_path, max_steps=1).fit(source, datamodule=RaggedText())
    source.model.to(torch.bfloat16).save_pretrained(tmp_path / "folder")
    started = CausalLMModule(pretrained=str(tmp_path / "folder"))
    started.configure_model()
    assert type(started.model) is DecoderForCausalLM
    assert started.model.training
    for one, other in zip(started.model.parameters(), source.model.parameters(), strict=True):
        # stored in 16 bits, trained in 32
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())
    trainer(tmp_path, max_steps=1).fit(started, datamodule=RaggedText())
    with pytest.raises(ValueError, match="vocabulary has 61 rows, the tokenizer has 62 entries"):
        trainer(tmp_path).fit(CausalLMModule(pretrained=str(tmp_path / "folder")), datamodule=RaggedText(62))


@pytest.mark.parametrize("name", MODULES)
def test_activation_checkpointing_leaves_the_curve_as_it_is(name: str, tmp_path: Path) -> None:
    curves = []
    for checkpointing in (False, True):
        recorder = Recorder()
        module = build(name, learning_rate=1e-2, gradient_checkpointing=checkpointing)
        trainer(tmp_path, recorder, max_steps=4).fit(module, datamodule=RaggedText())
        assert module.model.model.gradient_checkpointing == checkpointing
        curves.append(recorder.steps)
    assert curves[0] == curves[1]


@pytest.mark.slow  # the compiler takes about a minute
@pytest.mark.parametrize("name", ["dense", "mole"])
def test_compiled_module_trains_to_the_same_losses(name: str, tmp_path: Path) -> None:
    curves, keys = [], []
    for compiled in (False, True):
        recorder = Recorder()
        module = build(name, learning_rate=1e-3, compile=compiled)
        trainer(tmp_path, recorder, max_steps=3).fit(module, datamodule=RaggedText())
        curves.append([step["train/loss"] for step in recorder.steps])
        keys.append(list(module.state_dict()))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert keys[0] == keys[1]

"""Throughput, plain lines, previews and step seeds on a small language model."""

import json
import re
import types

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from tenfold.callbacks import GenerationPreview, PlainProgress, StepSeed, TokenThroughput
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH = 2, 8


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Module(LightningModule):
    def __init__(self, vocab_size, clock=None, seconds=1.0):
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
        self.model, self.clock, self.seconds = LlamaForCausalLM(config), clock, seconds
        self.drawn = []

    def training_step(self, batch, batch_idx):
        if self.clock:
            self.clock.now += self.seconds
        self.drawn.append((torch.rand(()).item(), self.trainer.global_step))
        loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if self.clock:
            self.clock.now += 1000.0
        self.log("val/loss", self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def _loader(self):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(len(self.tokenizer), (12 * BATCH, LENGTH), generator=generator)
        return DataLoader([{"input_ids": row} for row in rows], batch_size=BATCH, generator=generator)

    train_dataloader = val_dataloader = lambda self: self._loader()


@pytest.fixture
def fit(tmp_path, tiny_tokenizer):
    def run(*callbacks, clock=None, seconds=1.0, **options):
        module = Module(len(tiny_tokenizer.tokenizer), clock, seconds)
        logger = CSVLogger(tmp_path, name="logs")
        seen = []
        logger.log_metrics = lambda metrics, step=None: seen.append((step, dict(metrics)))
        trainer = Trainer(
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **{"max_steps": 8, "log_every_n_steps": 1, "limit_val_batches": 1, **options},
        )
        trainer.fit(module, datamodule=Data(tiny_tokenizer.tokenizer))
        return types.SimpleNamespace(module=module, trainer=trainer, logged=seen, folder=tmp_path)

    return run


def values(result, name):
    return [metrics[name] for _, metrics in result.logged if name in metrics]


def test_throughput_counts_tokens_and_leaves_validation_out(fit, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("tenfold.callbacks.throughput.time", clock)
    # half a second a step; each validation takes a thousand
    result = fit(TokenThroughput(window=3), clock=clock, seconds=0.5, val_check_interval=2)
    speeds = values(result, "perf/tokens_per_s")
    assert len(speeds) == 8
    assert speeds == pytest.approx([BATCH * LENGTH / 0.5] * 8)
    assert values(result, "perf/step_ms") == pytest.approx([500.0] * 8)


def test_the_batches_of_one_optimiser_step_add_up(fit, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("tenfold.callbacks.throughput.time", clock)
    result = fit(TokenThroughput(), clock=clock, seconds=0.5, accumulate_grad_batches=2, max_steps=4)
    assert values(result, "perf/step_ms") == pytest.approx([1000.0] * 4)
    assert values(result, "perf/tokens_per_s") == pytest.approx([BATCH * LENGTH / 0.5] * 4)


def test_the_window_slides(fit, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("tenfold.callbacks.throughput.time", clock)
    lengths = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(Module, "on_before_zero_grad", lambda self, _: setattr(clock, "now", clock.now + next(lengths)))
    result = fit(TokenThroughput(window=2), clock=clock, seconds=0.0)
    assert values(result, "perf/step_ms") == pytest.approx([1000 * s for s in (1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5)])


def test_throughput_says_what_batch_it_needs():
    callback = TokenThroughput()
    module = types.SimpleNamespace(device=torch.device("cpu"))
    trainer = types.SimpleNamespace(global_step=1)
    with pytest.raises(ValueError, match=r"needs a batch with `input_ids`, got \['pixel_values'\]"):
        callback.on_train_batch_end(trainer, module, None, {"pixel_values": torch.ones(1)}, 0)


def test_plain_lines(fit, capsys):
    fit(PlainProgress(every_n_steps=3), val_check_interval=4)
    lines = capsys.readouterr().out.splitlines()
    heads = [re.sub(r"  [\d.]+ s.*", "", line) for line in lines]
    assert heads == ["train step 3/8", "val step 4/8", "train step 6/8", "train step 8/8", "val step 8/8"]
    assert re.fullmatch(r"train step 3/8  [\d.]+ s  train/loss [\d.]+", lines[0])
    assert re.fullmatch(r"val step 4/8  [\d.]+ s  val/loss [\d.]+", lines[1])


def test_plain_lines_come_once_per_accumulated_step(fit, capsys):
    fit(PlainProgress(every_n_steps=1), accumulate_grad_batches=3, max_steps=3, limit_val_batches=0)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "train step 1/3",
        "train step 2/3",
        "train step 3/3",
    ]


def test_previews_are_the_greedy_continuation_and_change_nothing(fit, tiny_tokenizer):
    preview = GenerationPreview(["The lookup", "A router"], max_new_tokens=5)
    result = fit(preview, val_check_interval=4)
    plain = fit(val_check_interval=4)
    rows = [json.loads(line) for line in (result.folder / "logs/version_0/generations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(s, p) for s in (4, 8) for p in preview.prompts]

    tokenizer, model = tiny_tokenizer.tokenizer, result.module.model.eval()
    for row in rows[2:]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(5):
            # the plain way: the whole text through the model for every token
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert row["text"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert result.module.drawn == plain.module.drawn
    for one, two in zip(result.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(one, two)


def test_sampled_previews_repeat_and_leave_the_generators_alone(fit):
    first = fit(GenerationPreview(["The"], temperature=1.0, seed=3), val_check_interval=4)
    second = fit(GenerationPreview(["The"], temperature=1.0, seed=3), val_check_interval=4)
    texts = [(r.folder / f"logs/version_{n}/generations.jsonl").read_text() for n, r in enumerate((first, second))]
    assert texts[0] == texts[1]
    assert first.module.drawn == fit(val_check_interval=4).module.drawn


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GenerationPreview("The"), "prompts is 'The'; give a list"),
        (lambda: GenerationPreview([]), "give a list of one or more"),
        (lambda: GenerationPreview(max_new_tokens=0), "at least 1 token"),
        (lambda: GenerationPreview(temperature=-1.0), "temperature is -1.0"),
        (lambda: PlainProgress(every_n_steps=0), "every_n_steps is 0"),
        (lambda: TokenThroughput(window=0), "window is 0"),
        (lambda: TokenThroughput(log_every_n_steps=0), "log_every_n_steps is 0"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_preview_needs_a_model_that_generates():
    module = types.SimpleNamespace(model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"`\.model` can generate"):
        GenerationPreview().setup(types.SimpleNamespace(), module, "fit")


def test_step_seeds_depend_on_the_step_alone(fit):
    def numbers(result):
        return [value for value, _ in result.module.drawn]

    torch.manual_seed(1)
    first = fit(StepSeed(seed=5))
    torch.manual_seed(2)
    # more validations draw more numbers in between
    second = fit(StepSeed(seed=5), val_check_interval=2)
    assert numbers(first) == numbers(second)
    assert len(set(numbers(first))) == 8
    assert not set(numbers(first)) & set(numbers(fit(StepSeed(seed=6))))

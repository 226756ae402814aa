"""The study of SLAB's controls: runs on small pictures and texts, what diverges, the benchmark's rows and picture."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tenfold.experiments.bench import slab_quality
from tenfold.experiments.bench.registry import BENCHES, Settings
from tenfold.experiments.slab import controls, quality
from torch import nn

STUDY = replace(quality.QUICK, image_steps=6, image_learning_rate=1e-2, recalibration_passes=3, test_fraction=0.4)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes that brightness tells apart, in place of the assets."""
    rng = np.random.default_rng(0)
    for name, centre in (("dark", 60), ("light", 190)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(centre - 50, centre + 50, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    options = {"data": str(tmp_path / "pictures"), "image_size": 8, "num_channels": 1, "flip": 0.0}
    monkeypatch.setattr(quality, "IMAGES", {"mnist": options})


@pytest.fixture
def texts(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few sentences in place of Wikipedia, and no lm-eval."""
    from tenfold.datamodules import TextDataModule

    rows = [{"text": f"Number {n} is followed by number {n + 1}, and {n * n} is its square."} for n in range(400)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def small(study: Any, seed: int, *, tokenizer: str, batch_size: int) -> TextDataModule:
        data = TextDataModule(
            str(tmp_path / "data.jsonl"),
            tokenizer=str(tiny_tokenizer.folder),
            sequence_length=study.sequence_length,
            batch_size=batch_size,
            seed=seed,
            cache=str(tmp_path / "cache"),
        )
        data.prepare_data()
        data.setup("fit")
        return data

    monkeypatch.setattr(controls, "text_data", small)
    monkeypatch.setattr(controls, "task_scores", lambda model, data, count: {"norms": norms_of(model)})


def norms_of(model: nn.Module) -> list[str]:
    return [type(part).__name__ for part in model.modules() if "Norm" in type(part).__name__]


def test_score_counts_images(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    class Fixed(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            return type("Output", (), {"logits": logits[pixel_values]})

    batches = [{"pixel_values": part, "labels": labels[part]} for part in torch.arange(7).split(3)]
    found = controls.classified(Fixed(), batches)
    right = [int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True)]
    assert found["accuracy"] == pytest.approx(sum(right) / 7)
    expected = -logits.double().softmax(-1).log()[range(7), labels].mean()
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("norm", quality.IMAGE_NORMS)
def test_picture_runs_are_scored_at_each_stage(norm: str, pictures: None, tmp_path: Path) -> None:
    result = quality.run_one(f"mnist-{norm}", 0, STUDY, tmp_path / "runs")
    assert result["diverged_at"] is None
    assert 20 <= result["test_images"] <= 44
    if norm == "layernorm":
        assert set(result["scores"]) == {"trained"}
        return
    trained, recalibrated, fused = (result["scores"][stage] for stage in controls.STAGES)
    assert trained["loss"] != recalibrated["loss"], "the statistics have moved"
    assert fused["loss"] == pytest.approx(recalibrated["loss"], rel=1e-5)
    assert fused["accuracy"] == pytest.approx(recalibrated["accuracy"], abs=1.5 / result["test_images"])
    # two norms of the block and the last one
    assert result["fusion"]["norms"] == 3
    assert 0 < result["fusion"]["max_abs_logit_diff"] < 1e-5


def test_runs_differ_by_seed_alone_and_are_kept(pictures: None, tmp_path: Path) -> None:
    first = quality.run_one("mnist-prepbn", 0, STUDY, tmp_path)
    timeless = {
        name: value for name, value in quality.result_of("mnist-prepbn", 0, STUDY).items() if "seconds" not in name
    }
    assert timeless.items() <= first.items()
    assert quality.run_one("mnist-prepbn", 0, STUDY, tmp_path) == first
    assert quality.run_one("mnist-prepbn", 1, STUDY, tmp_path)["scores"] != first["scores"]
    with pytest.raises(ValueError, match="unknown variant 'mnist-groupnorm'; there are "):
        quality.run_one("mnist-groupnorm", 0, STUDY, tmp_path)


def test_diverged_training_is_a_result(pictures: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tenfold.lightning_modules import ImageClassificationModule

    step = ImageClassificationModule.training_step

    def broken(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = step(self, batch, batch_idx)
        return loss * math.nan if self.trainer.global_step == 2 else loss

    monkeypatch.setattr(ImageClassificationModule, "training_step", broken)
    result = quality.run_one("mnist-batchnorm", 0, STUDY, tmp_path)
    # the third step
    assert result["diverged_at"] == 3
    assert result["scores"] == {}
    assert "fusion" not in result
    assert quality.run_one("mnist-batchnorm", 0, STUDY, tmp_path) == result


def test_weights_without_a_number_are_found_in_evaluation(pictures: None, tmp_path: Path) -> None:
    # the last step's update is never followed by a loss
    result = quality.run_one(
        "mnist-batchnorm", 0, replace(STUDY, image_steps=1, image_learning_rate=math.inf), tmp_path
    )
    assert result["diverged_at"] == "evaluation"
    assert set(result["scores"]) == {"trained", "recalibrated"}
    assert result["scores"]["trained"]["loss"] is None


@pytest.mark.parametrize("norm", quality.TEXT_NORMS)
def test_text_runs_end_without_norms(norm: str, texts: None, tmp_path: Path) -> None:
    result = quality.run_one(f"text-{norm}", 0, quality.QUICK, tmp_path / "runs")
    assert result["diverged_at"] is None
    if norm == "rmsnorm":
        assert set(result["scores"]) == {"trained"}
        assert result["tasks"]["norms"]
        return
    assert result["tasks"]["norms"] == [], "lm-eval scores the fused form"
    assert result["scores"]["fused"]["bits_per_byte"] == pytest.approx(
        result["scores"]["recalibrated"]["bits_per_byte"], rel=1e-5
    )
    assert result["fusion"]["max_abs_logit_diff"] < 1e-4


def test_pretrained_runs(texts: None, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tiny_tokenizer.tokenizer.save_pretrained(tmp_path / "llama")
    study = replace(quality.QUICK, pretrained=str(tmp_path / "llama"), pretrained_steps=5)
    found = {kind: quality.run_one(f"smollm2-{kind}", 0, study, tmp_path / "runs") for kind in quality.PRETRAINED}
    assert {kind: list(result["scores"]) for kind, result in found.items()} == {
        "original": ["trained"],
        "fine-tuned": ["trained"],
        "prepbn": list(controls.STAGES),
    }
    bits = {kind: result["scores"]["trained"]["bits_per_byte"] for kind, result in found.items()}
    assert len(set(bits.values())) == 3
    # the tied output layer leaves the last norm an affine
    assert found["prepbn"]["fusion"]["affine"] == ["model.norm"]
    fused, plain = (found["prepbn"]["scores"][stage]["loss"] for stage in ("fused", "recalibrated"))
    assert fused == pytest.approx(plain, rel=1e-5)


# the benchmark


def result(accuracies: Iterator[float] | list[float], **fields: Any) -> dict[str, Any]:
    scores = {
        stage: {"accuracy": value, "loss": 1.0} for stage, value in zip(controls.STAGES, accuracies, strict=False)
    }
    return {"parameters": 10, "diverged_at": None, "scores": scores, **fields}


RESULTS = {
    "emoji-layernorm": [result([0.5]), result([0.7])],
    "emoji-batchnorm": [result([], diverged_at=4), result([0.1, 0.2, 0.3], fusion={"max_abs_logit_diff": 1e-6})],
    "emoji-prepbn": [
        result([0.5, 0.6, 0.6], fusion={"max_abs_logit_diff": 1e-6}),
        result([0.6, 0.8, 0.9], fusion={"max_abs_logit_diff": 3e-6}),
    ],
}


def test_rows_are_means_over_runs_that_did_not_diverge() -> None:
    rows = {(row.case.split()[0], row.metric): row for row in slab_quality.group_rows("emoji", RESULTS)}
    assert rows["emoji-batchnorm", "diverged_runs"].value == 1
    assert rows["emoji-prepbn", "diverged_runs"].value == 0
    fused = rows["emoji-prepbn", "accuracy fused"]
    assert (fused.value, fused.spread, fused.repeats) == pytest.approx((0.75, 0.3, 2))
    assert (fused.peer, fused.peer_value) == ("emoji-layernorm", 0.6)
    assert fused.ratio == pytest.approx(0.75 / 0.6)
    assert rows["emoji-batchnorm", "accuracy trained"].value == 0.1
    assert rows["emoji-prepbn", "max_abs_logit_diff fused"].value == 3e-6
    own = rows["emoji-layernorm", "accuracy trained"]
    assert (own.peer, own.peer_value, own.ratio) == (None, None, None)


def test_text_rows_carry_bits_and_scores() -> None:
    tasks = {
        "wikipedia_bits_per_byte": {"bits_per_byte,none": 2.0},
        "wikipedia_title_cloze": {"acc,none": 0.5},
    }

    def text(bits: float, factor: float) -> dict[str, Any]:
        scored = {task: {key: factor * value for key, value in values.items()} for task, values in tasks.items()}
        scores = {"trained": {"bits_per_byte": bits, "loss": 1.0}}
        return {"parameters": 1, "diverged_at": None, "scores": scores, "tasks": scored}

    results = {"text-rmsnorm": [text(2.0, 1.0)], "text-repbn": [text(2.5, 1.25)]}
    rows = {(row.case.split()[0], row.metric): row for row in slab_quality.group_rows("text", results)}
    # more bits are worse, more right answers are better
    assert rows["text-repbn", "bits_per_byte trained"].ratio == pytest.approx(2.0 / 2.5)
    assert rows["text-repbn", "wikipedia_bits_per_byte"].ratio == pytest.approx(1 / 1.25)
    assert rows["text-repbn", "wikipedia_title_cloze"].ratio == pytest.approx(1.25)


def test_bench_names_missing_assets_and_draws_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "slab-quality" in BENCHES
    present = {"asset:emoji"}
    monkeypatch.setattr(slab_quality, "find_asset", lambda name: tmp_path if name in present else None)
    monkeypatch.setattr(slab_quality, "FOLDER", tmp_path / "runs")
    asked = []

    class Kept:
        def all(self, names: list[str], seeds: tuple[int, ...]) -> dict[str, Any]:
            asked.append((names, tuple(seeds)))
            return {name: RESULTS[name] for name in names}

    monkeypatch.setattr(slab_quality, "runs", lambda study, folder: Kept())
    rows = list(slab_quality.run(Settings(quick=True)))
    assert asked == [(["emoji-layernorm", "emoji-prepbn"], (0,))]
    assert [row.reason for row in rows if row.reason] == [
        "mnist-5k not there: tenfold assets get mnist-5k",
        "wikipedia-summaries not there: tenfold assets get wikipedia-summaries",
        "smollm2-135m and wikipedia-summaries not there: tenfold assets get smollm2-135m wikipedia-summaries",
    ]
    with Image.open(tmp_path / "runs" / "slab-quality.png") as picture:
        assert picture.size[0] > 100


def test_every_group_names_what_it_compares_with_first() -> None:
    assert [names[0] for names in quality.GROUPS.values()] == [
        "emoji-layernorm",
        "mnist-layernorm",
        "text-rmsnorm",
        "smollm2-original",
    ]
    assert sum(map(len, quality.GROUPS.values())) == 16
    assert quality.Study().digest != quality.QUICK.digest

"""From pictures to plain and fused classifiers through the commands; and what they refuse."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tenfold.experiments.cli import main
from tenfold.lightning_modules import ImageClassificationModule
from transformers import AutoModelForImageClassification

CONFIG = """
trainer:
  accelerator: cpu
  max_steps: {steps}
  num_sanity_val_steps: 0
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks: [{callbacks}]
model:
  class_path: ImageClassificationModule
  init_args:
    model:
      architecture: deit
      patch_size: 4
      hidden_sizes: [16]
      depths: [2]
      num_heads: [2]
      pooling: mean
      norm: {norm}
    learning_rate: 1.0e-2
data:
  class_path: ImageDataModule
  init_args:
    data: {data}
    image_size: 8
    num_channels: 1
    batch_size: 8
    val_fraction: 0.2
    test_fraction: 0.0
    augment: false
"""


def trained(folder: Path, name: str, norm: str, callbacks: str, steps: int = 6) -> str:
    """The checkpoint of a short run."""
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (folder / "pictures" / label).mkdir(parents=True, exist_ok=True)
        for number in range(20):
            pixels = rng.integers(0 if label == "dark" else 128, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / label / f"{number}.png")
    config = folder / f"{name}.yaml"
    config.write_text(CONFIG.format(data=folder / "pictures", norm=norm, callbacks=callbacks, steps=steps))
    run = [f"--run.root={folder}", "--run.experiment=e", f"--run.name={name}"]
    assert main(["fit", "--config", str(config), *run]) == 0
    return str(folder / "e" / name / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def finished(folder: Path) -> str:
    return trained(folder, "finished", "prepbn", "PRepBNSchedule, BatchNormRecalibration")


@pytest.fixture(scope="module")
def blending(folder: Path) -> str:
    schedule = "{class_path: PRepBNSchedule, init_args: {decay_steps: 5}}"
    return trained(folder, "blending", "prepbn", schedule, steps=3)


def logits(model: torch.nn.Module) -> torch.Tensor:
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits


@pytest.mark.parametrize("source", ["checkpoint", "folder"])
def test_fused_folder_has_no_norm_and_the_same_logits(
    source: str, finished: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = finished
    if source == "folder":
        model = str(tmp_path / "plain")
        assert main(["export", "--model", finished, "--output", model]) == 0
    capsys.readouterr()
    assert main(["export", "--form", "fused", "--model", model, "--output", str(tmp_path / "fused")]) == 0
    said = capsys.readouterr().out
    # two in each block, and the last one
    assert "5 of 5 norms folded into linear layers" in said
    difference = re.search(r"logits on random images differ by (\S+) at most", said)
    assert difference
    assert 0 < float(difference[1]) < 1e-5
    assert "tokenizer" not in said
    fused = AutoModelForImageClassification.from_pretrained(tmp_path / "fused")
    assert not [name for name, part in fused.named_modules() if "Norm" in type(part).__name__]
    module = ImageClassificationModule.load_from_checkpoint(finished, weights_only=True)
    torch.testing.assert_close(logits(fused), logits(module.model), atol=1e-5, rtol=1e-5)


def test_plain_folder_is_the_trained_model(finished: str, tmp_path: Path) -> None:
    assert main(["export", "--model", finished, "--output", str(tmp_path / "plain")]) == 0
    assert main(["export", "--dtype", "float16", "--model", finished, "--output", str(tmp_path / "half")]) == 0
    module = ImageClassificationModule.load_from_checkpoint(finished, weights_only=True)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain), logits(module.model))
    half = AutoModelForImageClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--form", "lookup"], "--form lookup is for language models"),
        (["--form", "memory"], "--form memory is for language models"),
        (["--form", "fused", "--tokenizer", "bpe:300"], "--tokenizer is for language models"),
        (["--tokenizer", "bpe:300"], "--tokenizer is for language models"),
        (["--form", "fused", "--untie-head"], "--untie-head is for language models"),
        (["--form", "fused", "--dtype", "float16"], "--dtype float16 is not for --form fused"),
    ],
)
def test_what_does_not_fit_a_classifier_is_refused(
    options: list[str], message: str, finished: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    capsys.readouterr()
    assert main(["export", "--model", finished, "--output", str(output), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not output.exists()


@pytest.mark.filterwarnings("ignore:lambda reaches 0 at step 5, training ends after 3")
def test_model_in_the_blend_is_not_fused_but_exported_plain(
    blending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["export", "--form", "fused", "--model", blending, "--output", str(tmp_path / "fused")]) == 2
    assert "still in the blend, lambda" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
    assert main(["export", "--model", blending, "--output", str(tmp_path / "plain")]) == 0
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    module = ImageClassificationModule.load_from_checkpoint(blending, weights_only=True)
    assert torch.equal(logits(plain), logits(module.model))
    assert main(["export", "--form", "fused", "--model", str(tmp_path / "plain"), "--output", str(tmp_path / "f")]) == 2
    assert "still in the blend, lambda" in capsys.readouterr().err


def test_layernorm_is_no_norm_to_fuse(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained(folder, "layernorm", "layernorm", "", steps=1)
    capsys.readouterr()
    assert main(["export", "--form", "fused", "--model", checkpoint, "--output", str(tmp_path / "fused")]) == 2
    assert "has no norm that can be fused; train it with `norm: prepbn`" in capsys.readouterr().err


def test_classifier_of_another_type_is_exported_plain_and_not_fused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    assert main(["export", "--model", str(tmp_path / "vit"), "--output", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main(["export", "--form", "fused", "--model", str(tmp_path / "vit"), "--output", str(tmp_path / "f")]) == 2
    assert "this is a ViTForImageClassification" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_commands_for_text_refuse_classifiers(
    kind: str, finished: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = finished
    if kind == "folder":
        model = str(tmp_path / "plain")
        assert main(["export", "--model", finished, "--output", model]) == 0
    capsys.readouterr()
    assert main(["generate", "--model", model, "--prompt", "x"]) == 2
    assert "an image classifier; a language model is needed here" in capsys.readouterr().err

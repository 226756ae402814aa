"""The classifier's loss, metrics, recalibration and whole training on digits, up to the fused model."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tenfold.callbacks import BatchNormRecalibration, PRepBNSchedule
from tenfold.datamodules import ImageDataModule
from tenfold.lightning_modules import ImageClassificationModule
from tenfold.lightning_modules.slab import fused_classifier, statistics_norms

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "patch_size": 2,
    "hidden_sizes": [32],
    "depths": [2],
    "num_heads": [4],
    "pooling": "mean",
    "norm": "prepbn",
    "attention": "simplified_linear",
}


def digits(**options: Any) -> ImageDataModule:
    defaults: dict[str, Any] = {
        "image_size": 8,
        "num_channels": 1,
        "batch_size": 64,
        "augment": False,
        "mixup": 0.0,
        "cutmix": 0.0,
        "crop_ratio": 1.0,
    }
    return ImageDataModule("packaged:digits", **(defaults | options))


def trainer(**options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(defaults | options))


def test_prepbn_from_training_to_the_fused_model(tmp_path: Path) -> None:
    pl.seed_everything(0)
    data, model = digits(), ImageClassificationModule(SMALL, learning_rate=3e-3)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [PRepBNSchedule(), BatchNormRecalibration(passes=1), saving]
    run = trainer(max_epochs=6, callbacks=callbacks, enable_checkpointing=True)
    run.fit(model, data)
    # chance is 0.1; 0.81 where this was written
    assert run.callback_metrics["val/accuracy"] > 0.6
    assert not [name for name, _ in model.named_parameters() if "old_norm" in name]
    again = ImageClassificationModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    batch = next(iter(data.test_dataloader()))
    logits = model.eval()(batch["pixel_values"])
    assert torch.equal(again(batch["pixel_values"]), logits)
    fused = fused_classifier(model.model)
    assert statistics_norms(fused) == []
    torch.testing.assert_close(fused(batch["pixel_values"]).logits, logits, rtol=1e-4, atol=1e-4)


def test_loss_is_cross_entropy_with_smoothed_shares() -> None:
    torch.manual_seed(0)
    model = ImageClassificationModule(
        {**SMALL, "norm": "layernorm", "num_labels": 5, "num_channels": 1, "image_size": 8}, label_smoothing=0.2
    )
    model.configure_model()
    model._trainer = trainer()
    model._trainer.strategy.connect(model)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    model._trainer.strategy._optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
    x, shares = torch.randn(4, 1, 8, 8), torch.rand(4, 5).softmax(-1)
    loss = model.training_step({"pixel_values": x, "labels": shares}, 0)
    smooth = 0.8 * shares + 0.2 / 5
    torch.testing.assert_close(loss, -(smooth * model(x).log_softmax(-1)).sum(-1).mean())
    hard = model.training_step({"pixel_values": x, "labels": torch.tensor([0, 3, 2, 4])}, 0)
    smooth = 0.8 * torch.eye(5)[[0, 3, 2, 4]] + 0.2 / 5
    torch.testing.assert_close(hard, -(smooth * model(x).log_softmax(-1)).sum(-1).mean())


def test_metrics_count_every_image_once() -> None:
    pl.seed_everything(0)
    data = digits(eval_batch_size=50)
    model = ImageClassificationModule({**SMALL, "norm": "layernorm"})
    run = trainer()
    found = run.test(model, data, verbose=False)[0]
    batches = list(data.test_dataloader())
    x, labels = (torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "labels"))
    assert len(x) % 50
    with torch.no_grad():
        logp = model.eval()(x).log_softmax(-1)
    assert found["test/accuracy"] == pytest.approx(float((logp.argmax(-1) == labels).double().mean()))
    assert found["test/loss"] == pytest.approx(float(-logp[torch.arange(len(x)), labels].mean()), rel=1e-5)


def test_recalibration_sees_unmixed_images() -> None:
    """The first norm's running mean is that of the plain training images' embeddings."""
    pl.seed_everything(0)
    data = digits(augment=True, mixup=0.8, batch_size=100, val_fraction=0.0)
    model = ImageClassificationModule({**SMALL, "norm": "repbn"}, learning_rate=1e-4)
    callback = BatchNormRecalibration(passes=1, average="cumulative")
    run = trainer(max_steps=2, callbacks=[callback])
    run.fit(model, data)
    dataset = data._dataset("train")
    assert dataset is not None
    x = torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])
    with torch.no_grad():
        tokens, _ = model.model.stages[0].embedding(x)
    found = model.model.stages[0].blocks[0].norm1.bn
    # the last, incomplete batch is left out
    torch.testing.assert_close(found.running_mean, tokens.mean((0, 1)), rtol=0.02, atol=0.02)
    # mixing would leave the mean and shrink the variance
    torch.testing.assert_close(found.running_var, tokens.flatten(0, 1).var(0), rtol=0.05, atol=1e-4)


def test_sizes_come_from_the_data_and_are_kept() -> None:
    model = ImageClassificationModule(SMALL)
    run = trainer(fast_dev_run=True)
    run.validate(model, digits(), verbose=False)
    config = model.model.config
    assert (config.num_labels, config.image_size, config.num_channels) == (10, 8, 1)
    assert model.hparams["model"]["num_labels"] == 10


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has 4 classes, the data 10"):
        trainer(fast_dev_run=True).fit(ImageClassificationModule({**SMALL, "num_labels": 4}), digits())


def test_weight_decay_spares_vectors_and_tables() -> None:
    model = ImageClassificationModule({**SMALL, "image_size": 8, "num_channels": 1})
    run = trainer(max_steps=1)
    model._trainer = run
    run.strategy.connect(model)
    model.configure_model()
    model.hparams["total_steps"] = 10
    decayed, spared = model.configure_optimizers()["optimizer"].param_groups
    linear = {module.weight for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
    assert set(decayed["params"]) == linear
    assert set(decayed["params"]) | set(spared["params"]) == set(model.parameters())
    assert decayed["weight_decay"] == 0.05
    assert spared["weight_decay"] == 0.0

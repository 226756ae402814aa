"""Images from every kind of source, their splits, mixing, resuming, and what is refused."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tenfold.datamodules import ImageDataModule
from tenfold.datamodules.image_mixing import Mixing
from tenfold.datamodules.image_sources import ImageSet, open_images

CLASSES = ["ant", "bee", "cat"]


def pictures(number: int = 30) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(CLASSES[i % 3], rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)) for i in range(number)]


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_folder(root: Path, items: list[tuple[str, np.ndarray]]) -> Path:
    for number, (name, pixels) in enumerate(items):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number:03d}.png").write_bytes(png(pixels))
    return root


def write_tar(path: Path, items: list[tuple[str, np.ndarray]], label: str = "cls") -> Path:
    with tarfile.open(path, "w") as archive:
        for number, (name, pixels) in enumerate(items):
            text = name if label == "cls" else json.dumps({"label": name})
            for ending, content in (("png", png(pixels)), (label, text.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, items: list[tuple[str, np.ndarray]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": png(pixels), "path": None}, "label": name} for name, pixels in items]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def content(images: ImageSet) -> list[tuple[str, bytes]]:
    """Class and pixels of each image, in an order that no source has a say in."""
    pairs = [
        (images.classes[label], np.asarray(images.read(index)).tobytes()) for index, label in enumerate(images.labels)
    ]
    return sorted(pairs)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


# sources


@pytest.mark.parametrize("kind", ["folder", "tar-cls", "tar-json", "parquet"])
def test_every_source_gives_the_same_images(kind: str, tmp_path: Path) -> None:
    items = pictures()
    path = {
        "folder": lambda: write_folder(tmp_path / "images", items),
        "tar-cls": lambda: write_tar(tmp_path / "a.tar", items),
        "tar-json": lambda: write_tar(tmp_path / "a.tar", items, "json"),
        "parquet": lambda: write_parquet(tmp_path / "a.parquet", items),
    }[kind]()
    images = open_images(str(path))[None]
    assert list(images.classes) == CLASSES
    assert content(images) == sorted((name, pixels.tobytes()) for name, pixels in items)
    assert len(set(images.keys)) == 30


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_named_splits_are_kept(kind: str, tmp_path: Path) -> None:
    items, names = pictures(), {"train": slice(0, 18), "validation": slice(18, 24), "test": slice(24, 30)}
    for name, part in names.items():
        if kind == "folder":
            write_folder(tmp_path / name, items[part])
        elif kind == "tar":
            write_tar(tmp_path / f"{name}-0.tar", items[part])
        else:
            write_parquet(tmp_path / f"{name}-00000-of-00001.parquet", items[part])
    sets = open_images(str(tmp_path))
    assert set(sets) == {"train", "val", "test"}
    for split, part in zip(("train", "val", "test"), names.values(), strict=True):
        assert content(sets[split]) == sorted((name, pixels.tobytes()) for name, pixels in items[part])


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    images, digits = open_images("packaged:digits")[None], load_digits()
    assert images.labels.tolist() == digits.target.tolist()
    read = np.stack([np.asarray(images.read(index)) for index in range(0, 1797, 100)])
    np.testing.assert_allclose(read / 255 * 16, digits.images[::100], atol=0.04)


def test_numbers_as_classes_are_sorted_by_value(tmp_path: Path) -> None:
    items = [(str(number), pixels) for number, (_, pixels) in enumerate(pictures(12))]
    images = open_images(str(write_tar(tmp_path / "a.tar", items)))[None]
    assert list(images.classes) == [str(number) for number in range(12)]
    assert images.labels.tolist() == list(range(12))


def test_emoji_package(tmp_path: Path) -> None:
    folder = tmp_path / "img" / "google" / "64"
    folder.mkdir(parents=True)
    records = [
        ("a.png", "Food & Drink", True),
        ("b.png", "Activities", True),
        ("c.png", "Component", True),
        ("d.png", "Activities", False),
    ]
    for number, (name, _, _) in enumerate(records):
        (folder / name).write_bytes(png(np.full((64, 64, 4), number, dtype=np.uint8)))
    rows = [{"image": name, "category": category, "has_img_google": has} for name, category, has in records]
    (tmp_path / "emoji.json").write_text(json.dumps(rows))
    images = open_images(str(tmp_path))[None]
    assert list(images.keys) == ["a.png", "b.png"]
    assert list(images.classes) == ["Activities", "Food & Drink"]
    assert images.labels.tolist() == [1, 0]


# splits and batches


def plain(data: str, **options: Any) -> ImageDataModule:
    defaults: dict[str, Any] = {
        "image_size": 8,
        "num_channels": 3,
        "batch_size": 4,
        "augment": False,
        "mixup": 0.0,
        "cutmix": 0.0,
        "crop_ratio": 1.0,
    }
    module = ImageDataModule(data, **(defaults | options))
    module.setup("fit")
    return module


def test_hash_of_the_name_splits_and_other_images_change_nothing(tmp_path: Path) -> None:
    items = pictures(60)
    first = plain(str(write_folder(tmp_path / "a", items)), val_fraction=0.3, test_fraction=0.3)
    second = plain(str(write_folder(tmp_path / "b", items[:45])), val_fraction=0.3, test_fraction=0.3)
    names = {split: set(images.keys) for split, images in first._splits.items()}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 60
    assert all(8 < len(part) < 40 for part in names.values())
    for split, images in second._splits.items():
        assert set(images.keys) <= names[split]


def test_evaluation_batches_are_whole_and_normalised() -> None:
    module = plain("packaged:digits", num_channels=1, batch_size=64, mean=(0.25,), std=(0.5,))
    batches = list(module.val_dataloader())
    images = module._splits["val"]
    pixels = np.stack([np.asarray(images.read(index)) for index in range(len(images.labels))]) / 255
    x = torch.cat([batch["pixel_values"] for batch in batches])
    torch.testing.assert_close(x[:, 0], torch.tensor((pixels - 0.25) / 0.5, dtype=torch.float32))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == images.labels.tolist()


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    options: dict[str, Any] = {"num_channels": 1, "augment": True}
    data = plain("packaged:digits", **options)._dataset("train")
    other = plain("packaged:digits", seed=1, **options)._dataset("train")
    assert data is not None
    assert other is not None
    first = data[(3, 7)]["pixel_values"]
    data[(0, 0)], torch.rand(3)
    assert torch.equal(data[(3, 7)]["pixel_values"], first)
    assert not torch.equal(data[(4, 7)]["pixel_values"], first)
    assert not torch.equal(other[(3, 7)]["pixel_values"], first)


def test_plain_numbers_are_seen_as_in_evaluation() -> None:
    augmented = plain("packaged:digits", num_channels=1, augment=True, mixup=0.8)
    data, still = augmented._dataset("train"), plain("packaged:digits", num_channels=1)._dataset("train")
    assert data is not None
    assert still is not None
    assert torch.equal(data[5]["pixel_values"], still[5]["pixel_values"])
    batch = augmented.train_dataloader().collate_fn([data[5], data[6]])
    assert batch["labels"].dtype == torch.int64


# mixing


def items(number: int, epoch: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.rand(3, 10, 8, generator=generator), "label": i % 4, "place": (epoch, i)}
        for i in range(number)
    ]


def test_mixup_mixes_images_and_labels_alike() -> None:
    batch = items(5)
    x = torch.stack([item["pixel_values"] for item in batch])
    hot = torch.eye(4)[[item["label"] for item in batch]]
    out = Mixing(mixup=0.8, num_classes=4)(batch)
    # item 0 has class 0, item 4 too; item 1 has 1 and item 3 has 3
    share = out["labels"][1, 1]
    assert 0 < share < 1
    torch.testing.assert_close(out["labels"], share * hot + (1 - share) * hot.flip(0))
    torch.testing.assert_close(out["pixel_values"], share * x + (1 - share) * x.flip(0))


def test_cutmix_labels_are_shares_of_pixels() -> None:
    shares = []
    for epoch in range(40):
        batch = items(4, epoch)
        x = torch.stack([item["pixel_values"] for item in batch])
        out = Mixing(cutmix=1.0, num_classes=4)(batch)
        stayed = (out["pixel_values"] == x).all(1).float()
        came = (out["pixel_values"] == x.flip(0)).all(1)
        assert ((stayed > 0) | came).all()
        torch.testing.assert_close(out["labels"][0, 0], stayed[0].mean())
        torch.testing.assert_close(out["labels"][0, 3], 1 - stayed[0].mean())
        shares.append(float(stayed[0].mean()))
    assert min(shares) < 0.5
    assert len(set(shares)) > 10


def test_both_are_drawn_and_a_batch_repeats() -> None:
    mixing = Mixing(mixup=0.8, cutmix=1.0, num_classes=4)
    kinds = []
    for epoch in range(40):
        batch = items(4, epoch)
        out, again = mixing(batch), mixing(batch)
        assert torch.equal(out["pixel_values"], again["pixel_values"])
        x = torch.stack([item["pixel_values"] for item in batch])
        kinds.append(bool(((out["pixel_values"] == x) | (out["pixel_values"] == x.flip(0))).all()))
    assert 8 < sum(kinds) < 32


# resuming


class Recorder(pl.LightningModule):
    """Records what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[bytes, bytes]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(tuple(batch[name].numpy().tobytes() for name in ("pixel_values", "labels")))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, steps: int, ckpt_path: Path | None = None, num_workers: int = 0) -> list[tuple[bytes, bytes]]:
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
    )
    data = ImageDataModule(
        "packaged:digits", image_size=8, num_channels=1, batch_size=400, val_fraction=0.0, num_workers=num_workers
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model.seen


# an epoch has four batches: the middle of the first, its end, the middle of the second
@pytest.mark.parametrize(("stop", "num_workers"), [(2, 0), (4, 0), (6, 0), (6, 1)])
def test_resumed_training_sees_the_same_batches(stop: int, num_workers: int, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 7)
    assert len(set(whole)) == 7
    assert fit(tmp_path / "first", stop) == whole[:stop]
    rest = fit(tmp_path / "second", 7, tmp_path / "first" / f"step={stop}.ckpt", num_workers)
    assert rest == whole[stop:]


def test_an_epoch_that_lightning_counts_empty_does_not_change_the_next() -> None:
    options: dict[str, Any] = {"num_channels": 1, "augment": True, "batch_size": 700}
    loader = plain("packaged:digits", **options).train_dataloader()
    list(loader)
    again = plain("packaged:digits", **options).train_dataloader()
    again.load_state_dict(loader.state_dict())
    again.sampler.set_epoch(2)
    loader.sampler.set_epoch(1)
    for expected, found in zip(loader, again, strict=True):
        assert torch.equal(found["pixel_values"], expected["pixel_values"])


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.5}, "val_fraction 1.5 is not between 0 and 1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"num_channels": 2}, "num_channels 2 is not 1"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"scale": (0.0, 1.0)}, r"scale \(0.0, 1.0\)"),
        ({"magnitude": 11}, "magnitude 11 is not between 0 and 10"),
        ({"mixup": -1}, "mixup -1"),
        ({"crop_ratio": 0}, "crop_ratio 0"),
        ({"mean": (0.5,)}, "mean has 1 values for 3 channels"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**options)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a folder"):
        open_images(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no class folders with images"):
        open_images(str(tmp_path))
    with pytest.raises(ValueError, match="packaged:cifar is not known; there is packaged:digits"):
        open_images("packaged:cifar")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"x.txt is no folder and no .tar or .parquet"):
        open_images(str(tmp_path / "x.txt"))
    (tmp_path / "bad.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"bad.tar is no uncompressed tar file"):
        open_images(str(tmp_path / "bad.tar"))


def test_sources_that_do_not_fit_together(tmp_path: Path) -> None:
    items = pictures(6)
    write_folder(tmp_path / "a" / "train", items)
    write_folder(tmp_path / "a" / "val", items[:1])
    with pytest.raises(ValueError, match=r"do not have the same classes \(train 3, val 1\)"):
        open_images(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "b" / "train-0.tar", items)
    write_tar(tmp_path / "b" / "part.tar", items)
    with pytest.raises(ValueError, match=r"part.tar begins with no split's name while others do"):
        open_images(str(tmp_path / "b"))
    with pytest.raises(ValueError, match="no column 'picture'; there are image, label"):
        open_images(str(write_parquet(tmp_path / "c.parquet", items)), image_field="picture")


def test_unreadable_image_and_missing_label_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", pictures(3))
    (tmp_path / "a" / "ant" / "000.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"ant/000.png is no readable image"):
        open_images(str(tmp_path / "a"))[None].read(0)
    write_tar(tmp_path / "b.tar", pictures(2), "txt")
    with pytest.raises(ValueError, match=r"000 has no label; a sample is key.jpg with key.cls"):
        open_images(str(tmp_path / "b.tar"))

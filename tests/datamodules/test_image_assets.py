"""Packaged pictures: what is taken from small archives of the real layouts, and the real ones where they are."""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tenfold.datamodules import ImageDataModule
from tenfold.datamodules.image_assets import write_digits, write_emoji, write_stamps
from tenfold.datamodules.image_sources import open_images


def png(value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((64, 64, 4), value, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_rows(path: Path, rows: np.ndarray) -> Path:
    with gzip.open(path, "wt") as out:
        np.savetxt(out, rows, fmt="%d", delimiter=",")
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_digits_keep_their_pixels_and_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.integers(0, 256, (20, 784)), rng.permutation(20)[:, None] % 10], axis=1)
    (tmp_path / "out").mkdir()
    write_digits([write_rows(tmp_path / "rows.csv.gz", rows)], tmp_path / "out")
    images = open_images(str(tmp_path / "out"))[None]
    assert list(images.classes) == [str(n) for n in range(10)]
    assert len(images.labels) == 20
    for index, (key, label) in enumerate(zip(images.keys, images.labels, strict=True)):
        row = rows[int(key.rpartition("/")[2].removesuffix(".png"))]
        assert label == row[-1]
        np.testing.assert_array_equal(np.asarray(images.read(index)), row[:-1].reshape(28, 28))


@pytest.mark.parametrize("columns", [784, 786])
def test_rows_of_another_length_are_refused(columns: int, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv.gz", np.zeros((2, columns), dtype=int))
    with pytest.raises(ValueError, match=f"784 pixels and a digit: {columns} columns"):
        write_digits([path], tmp_path)


def test_emoji_are_taken_from_the_npm_package(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "category": "Flags"}, {"image": "b.png", "category": "Objects"}]
    members = {
        "package/emoji.json": json.dumps(rows).encode(),
        "package/LICENSE": b"MIT",
        "package/img/google/64/a.png": png(1),
        "package/img/google/64/b.png": png(2),
        "package/img/google/sheets/64.png": b"large",
    }
    (tmp_path / "out").mkdir()
    write_emoji([tar_of(tmp_path / "emoji.tgz", members)], tmp_path / "out")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"emoji.json", "img/google/64/a.png", "img/google/64/b.png"}
    images = open_images(str(tmp_path / "out"))[None]
    assert [images.classes[label] for label in images.labels] == ["Flags", "Objects"]
    assert np.asarray(images.read(1)).max() == 2
    with pytest.raises(ValueError, match=r"holds no emoji\.json: another package"):
        write_emoji([tar_of(tmp_path / "other.tgz", {"package/x": b"y"})], tmp_path / "out2")
    (tmp_path / "broken.tgz").write_bytes((tmp_path / "emoji.tgz").read_bytes()[:200])
    with pytest.raises(ValueError, match="no whole npm package"):
        write_emoji([tmp_path / "broken.tgz"], tmp_path / "out3")


def test_path_out_of_the_archive_is_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "evil.tgz", {"package/img/google/64/../../../../evil.png": b"x"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="leads out of the archive"):
        write_emoji([path], tmp_path / "out")
    assert not (tmp_path / "evil.png").exists()


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """A Debian package of the layout of tuxpaint-stamps-default."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    tree = tmp_path / "tree"
    root = tree / "usr/share/tuxpaint/stamps"
    files = {
        root / "animals/mammals/fox.png": png(3),
        root / "animals/mammals/fox.txt": b"A fox.\nde.utf8=Ein Fuchs.\n",
        root / "animals/mammals/fox_desc.ogg": b"sound",
        root / "town/sign.png": png(4),
        root / "town/tower.svg": b"<svg/>",
        root / "town/tower.txt": b"A tower.",
        tree / "usr/share/doc/tuxpaint-stamps-default/copyright": b"GPL-2",
        tree / "DEBIAN/control": b"Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m <m@example.org>\n"
        b"Description: d\n",
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    subprocess.run(["dpkg-deb", "--build", str(tree), str(tmp_path / "s.deb")], check=True, capture_output=True)
    return tmp_path / "s.deb"


def test_stamps_are_taken_from_the_debian_package(stamps: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_stamps([stamps], out)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "animals/mammals/fox.png",
        "town/sign.png",
        "captions.json",
        "copyright",
    }
    assert json.loads((out / "captions.json").read_text()) == {"animals/mammals/fox.png": "A fox."}
    images = open_images(str(out))[None]
    assert [images.classes[label] for label in images.labels] == ["animals", "town"]


def test_damaged_debian_package_and_missing_unpacker_are_told(
    stamps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.deb"
    broken.write_bytes(stamps.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"no whole Debian package|a damaged or another package") as raised:
        write_stamps([broken], tmp_path)
    assert "\n" not in str(raised.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="needs dpkg-deb"):
        write_stamps([stamps], tmp_path)


@pytest.mark.parametrize(
    ("name", "images", "classes", "size"),
    [("mnist-5k", 5000, 10, 28), ("emoji", 1906, 9, 32), ("tuxpaint-stamps", 796, 16, 32)],
)
def test_real_assets_feed_the_data_module(
    name: str, images: int, classes: int, size: int, require_asset: Callable[[str], Path]
) -> None:
    require_asset(name)
    data = ImageDataModule(f"asset:{name}", image_size=size, batch_size=4)
    data.setup("fit")
    assert data.num_classes == classes
    splits = [loader.dataset for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert sum(map(len, splits)) == images
    batch = next(iter(data.train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, size, size)
    assert float(batch["pixel_values"].std()) > 0.1

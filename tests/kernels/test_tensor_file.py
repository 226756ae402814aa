"""Tensor files: what goes in comes out, whatever is altered is named, and a failed write leaves no trace."""

import errno
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tenfold.kernels.tensor_file import TensorFile, TensorFileWriter, tensor_file

MAGIC = b"TENFTEST"
DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32,
]  # fmt: skip


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern, NaNs among them."""
    count = int(np.prod(shape)) * dtype.itemsize
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def write_file(path: Path, tensors: dict[str, torch.Tensor], **options) -> None:
    parts = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    with TensorFileWriter(path, magic=MAGIC, version=1, parts=parts, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def open_file(path: Path) -> TensorFile:
    return TensorFile(path, magic=MAGIC, version=1)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 100)


@pytest.fixture
def three_parts(tmp_path, small_chunks) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {
        "first": random_bits(torch.float32, 10, 7),
        "second": random_bits(torch.int16, 3000),
        "third": random_bits(torch.uint8, 5),
    }
    path = tmp_path / "three.bin"
    write_file(path, tensors)
    return path, tensors


def test_every_dtype_returns_bit_for_bit(tmp_path):
    tensors = {str(dtype): random_bits(dtype, 3, 5, 7) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "last is empty": torch.empty(0)}
    write_file(tmp_path / "all.bin", tensors, metadata={"name": "größe", "nested": {"a": [1, 2.5, None]}})
    file = open_file(tmp_path / "all.bin")
    assert file.metadata == {"name": "größe", "nested": {"a": [1, 2.5, None]}}
    file.verify()
    for name, tensor in tensors.items():
        assert (file.dtype(name), file.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        assert bits(file.read(name)) == bits(tensor)
        assert bits(file.memory_map(name)) == bits(tensor)


def test_parts_start_at_page_boundaries_in_file_order(three_parts):
    path, tensors = three_parts
    file, raw = open_file(path), path.read_bytes()
    offsets = [file.offset(name) for name in tensors]
    assert offsets == sorted(offsets)
    assert all(offset % 4096 == 0 and offset > 0 for offset in offsets)
    assert len(raw) % 4096 == 0
    for name, tensor in tensors.items():
        data = bits(tensor)[2]
        assert raw[file.offset(name) : file.offset(name) + len(data)] == data


def test_pieces_of_any_size_give_the_same_file(tmp_path, three_parts):
    path, tensors = three_parts
    parts = {"first": ("float32", (10, 7)), "second": ("int16", (3000,)), "third": ("uint8", (5,))}
    with TensorFileWriter(tmp_path / "pieces.bin", magic=MAGIC, version=1, parts=parts) as writer:
        for row in tensors["first"]:
            writer.write("first", row)
        for piece in tensors["second"].split([1, 49, 51, 2899, 0]):
            writer.write("second", piece.numpy())
        read_only = tensors["third"].numpy()
        read_only.flags.writeable = False
        writer.write("third", read_only)
    assert (tmp_path / "pieces.bin").read_bytes() == path.read_bytes()


def test_non_contiguous_values_are_written_row_major(tmp_path):
    values = torch.arange(12, dtype=torch.float32).view(3, 4).t()
    write_file(tmp_path / "t.bin", {"a": values})
    assert torch.equal(open_file(tmp_path / "t.bin").read("a"), values)


def test_chunk_size_is_read_from_the_file(three_parts, monkeypatch):
    path, tensors = three_parts
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 2**20)
    file = open_file(path)
    file.verify()
    assert bits(file.read("second")) == bits(tensors["second"])


def test_header_layout_is_as_documented(three_parts):
    path, _ = three_parts
    raw = path.read_bytes()
    magic, version, length = struct.unpack("<8sII", raw[:16])
    assert (magic, version) == (MAGIC, 1)
    assert struct.unpack("<I", raw[16 + length : 20 + length])[0] == zlib.crc32(raw[: 16 + length])


@pytest.mark.parametrize(
    ("part", "byte", "chunk"), [("first", 0, 0), ("second", 250, 2), ("second", 5999, 59), ("third", 4, 0)]
)
def test_altered_data_is_named_by_part_and_chunk(three_parts, part, byte, chunk):
    path, tensors = three_parts
    offset = open_file(path).offset(part) + byte
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)
    file = open_file(path)
    expected = re.escape(f"part {part!r}, chunk {chunk} fails its checksum")
    with pytest.raises(ValueError, match=expected):
        file.verify()
    with pytest.raises(ValueError, match=expected):
        file.read(part)
    for other in set(tensors) - {part}:
        assert bits(file.read(other)) == bits(tensors[other])


def test_truncated_file_is_refused_at_every_length(three_parts):
    path, _ = three_parts
    raw = path.read_bytes()
    cut = path.with_name("cut.bin")
    for length in [0, 5, 16, 17, 400, 4095, 4096, 8192, len(raw) - 4096, len(raw) - 1]:
        cut.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"truncated|not a file of this kind"):
            open_file(cut)
    cut.write_bytes(raw + b"x")
    with pytest.raises(ValueError, match="truncated or altered"):
        open_file(cut)


def test_file_cut_while_open_is_noticed(three_parts):
    path, _ = three_parts
    file = open_file(path)
    os.truncate(path, file.offset("second") + 150)
    with pytest.raises(ValueError, match="part 'second', chunk 1"):
        file.read("second")
    with pytest.raises(ValueError, match="part 'second', chunk 1"):
        file.verify()


def test_altered_header_is_refused_at_every_byte(three_parts):
    path, _ = three_parts
    raw = path.read_bytes()
    length = struct.unpack("<I", raw[12:16])[0]
    altered = path.with_name("altered.bin")
    for at in [12, 13, 16, 20, 16 + length // 2, 15 + length, 16 + length, 19 + length]:
        changed = bytearray(raw)
        changed[at] ^= 4
        altered.write_bytes(changed)
        with pytest.raises(ValueError, match="header is truncated or altered"):
            open_file(altered)


def test_other_kinds_and_versions_are_refused(three_parts):
    path, _ = three_parts
    with pytest.raises(ValueError, match=r"does not start with b'OTHERONE'"):
        TensorFile(path, magic=b"OTHERONE", version=1)
    with pytest.raises(ValueError, match="layout version 1, this release reads 2"):
        TensorFile(path, magic=MAGIC, version=2)
    with pytest.raises(FileNotFoundError):
        open_file(path.with_name("none.bin"))


def test_file_without_parts(tmp_path):
    write_file(tmp_path / "none.bin", {}, metadata={"a": 1})
    assert open_file(tmp_path / "none.bin").metadata == {"a": 1}
    with open(tmp_path / "none.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="truncated or altered"):
        open_file(tmp_path / "none.bin")


def test_memory_map_never_writes_to_the_file(three_parts):
    path, tensors = three_parts
    before = path.read_bytes()
    mapped = open_file(path).memory_map("first")
    mapped.fill_(7.0)
    assert path.read_bytes() == before
    assert bits(open_file(path).memory_map("first")) == bits(tensors["first"])


PARTS = {"a": ("float32", (4,)), "b": ("int32", (2,))}


def write_pieces(path, pieces) -> None:
    with TensorFileWriter(path, magic=MAGIC, version=1, parts=PARTS) as writer:
        for name, values in pieces:
            writer.write(name, values)


WRONG_WRITES = {
    "out of order": ([("b", torch.zeros(2, dtype=torch.int32))], "part 'b' written where 'a' was due"),
    "unknown": ([("c", torch.zeros(1))], "part 'c' written where 'a' was due"),
    "unknown and empty": ([("c", torch.zeros(0))], "part 'c' written where 'a' was due"),
    "back again": (
        [("a", torch.zeros(4)), ("b", torch.zeros(1, dtype=torch.int32)), ("a", torch.zeros(1))],
        "part 'a' written where 'b' was due",
    ),
    "after the end": (
        [("a", torch.zeros(4)), ("b", torch.zeros(2, dtype=torch.int32)), ("b", torch.zeros(1, dtype=torch.int32))],
        "part 'b' written where 'nothing' was due",
    ),
    "too many": ([("a", torch.zeros(5))], "part 'a' gets 20 bytes, 16 are left"),
    "too few": ([("a", torch.zeros(3))], "part 'a' lacks 4 bytes"),
    "last part missing": ([("a", torch.zeros(4))], "part 'b' lacks 8 bytes"),
    "dtype": ([("a", torch.zeros(4, dtype=torch.float64))], "part 'a' holds float32, got torch.float64"),
}


@pytest.mark.parametrize("case", WRONG_WRITES)
def test_wrong_writes_are_refused_and_keep_the_old_file(tmp_path, case):
    writes, message = WRONG_WRITES[case]
    path = tmp_path / "x.bin"
    path.write_bytes(b"the previous file")
    with pytest.raises(ValueError, match=re.escape(message)):
        write_pieces(path, writes)
    assert path.read_bytes() == b"the previous file"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_exception_in_the_body_leaves_nothing(tmp_path):
    def interrupted():
        yield "a", torch.zeros(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pieces(tmp_path / "x.bin", interrupted())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{"magic": b"SHORT"}, {"parts": {"a": ("complex64", (1,))}}])
def test_bad_declarations_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"magic must have 8 bytes|dtype 'complex64' is not one of"):
        TensorFileWriter(tmp_path / "x.bin", **({"magic": MAGIC, "version": 1, "parts": PARTS} | options))


class FullDisk:
    """A file that takes so many bytes and then reports what a full disk reports."""

    def __init__(self, file, room: int, code: int) -> None:
        self.file, self.room, self.code = file, room, code

    def write(self, data) -> int:
        if len(data) > self.room:
            raise OSError(self.code, os.strerror(self.code))
        self.room -= len(data)
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()
        # a buffered file flushes again when it is closed
        raise OSError(self.code, os.strerror(self.code))

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 20, 30], ids=["first write", "second part", "header"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_file_and_bytes_and_keeps_the_old_file(tmp_path, monkeypatch, room, code):
    path = tmp_path / "x.bin"
    path.write_bytes(b"the previous file")
    real = open

    def full(name, mode="r", *args):
        file = real(name, mode, *args)
        return FullDisk(file, room, code) if "w" in mode else file

    monkeypatch.setattr(tensor_file, "open", full, raising=False)
    needed = TensorFileWriter(path, magic=MAGIC, version=1, parts=PARTS).num_bytes
    with pytest.raises(OSError, match=rf"{path} needs {needed} bytes, \d+ are free") as caught:
        write_pieces(path, [("a", torch.zeros(4)), ("b", torch.zeros(2, dtype=torch.int32))])
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"the previous file"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_other_write_errors_keep_their_name(tmp_path, monkeypatch):
    real = open
    monkeypatch.setattr(tensor_file, "open", lambda *args: FullDisk(real(*args), 0, errno.EIO), raising=False)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_pieces(tmp_path / "x.bin", [("a", torch.zeros(4))])
    assert os.listdir(tmp_path) == []


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    parts = {"a": ("uint8", (10_000,))}
    with (
        pytest.raises(OSError, match=r"x.bin needs 16384 bytes, 5000 are free"),
        TensorFileWriter(tmp_path / "x.bin", magic=MAGIC, version=1, parts=parts),
    ):
        pytest.fail("entered")
    assert os.listdir(tmp_path) == []

"""Every place that holds records gives the bytes of the file, counts what it takes, and says what went wrong."""

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tenfold.kernels.row_storage import STORAGES, RowRegion, RowStream, open_rows, resident
from tenfold.kernels.row_storage.direct import DirectRows, aligned_buffer

PLACES = [storage for storage in STORAGES if storage != "pinned"]
CPU = torch.device("cpu")


def make_file(
    folder: Path, *, num_rows: int, stride: int, row: int, offset: int = 4096
) -> tuple[RowRegion, np.ndarray]:
    """A file of random records; the rows as they were written."""
    rows = np.random.default_rng(0).integers(0, 256, (num_rows, stride), dtype=np.uint8)
    path = folder / f"rows-{stride}"
    path.write_bytes(bytes(offset) + rows.tobytes())
    return RowRegion(path, offset, num_rows, stride, row), rows


def open_region(region: RowRegion, storage: str, rows: np.ndarray):
    return open_rows(region, storage, load=lambda: torch.from_numpy(rows.copy()))


@pytest.mark.parametrize("storage", PLACES)
@pytest.mark.parametrize(("stride", "row"), [(8192, 8192), (4096, 4000), (1544, 1544), (514, 513)])
def test_hundred_thousand_rows_with_repetitions_are_the_files(
    storage: str, stride: int, row: int, tmp_path: Path
) -> None:
    region, expected = make_file(tmp_path, num_rows=300, stride=stride, row=row)
    count = 100_000 if stride in (1544, 4096) else 5_000
    ids = np.random.default_rng(1).integers(0, 300, count)
    with open_region(region, storage, expected) as rows:
        for start in range(0, count, 25_000):
            some = ids[start : start + 25_000]
            buffer = aligned_buffer(len(some), row)
            rows.request(some, buffer).wait()
            assert np.array_equal(buffer, expected[some, :row])
        if storage != "direct":
            assert rows.bytes_read == count * row


@pytest.mark.parametrize("storage", PLACES)
@pytest.mark.parametrize("limit_bytes", [2**28, 40_000, 0])
def test_layers_come_in_order_whatever_the_limit(storage: str, limit_bytes: int, tmp_path: Path) -> None:
    layers, layer_bytes = 6, 3072
    region, expected = make_file(tmp_path, num_rows=50, stride=20480, row=layers * layer_bytes)
    ids = torch.tensor([3, 49, 0, 17, 18])
    with open_region(region, storage, expected) as rows:
        seen = []
        stream = RowStream(
            rows,
            ids,
            num_parts=layers,
            part_bytes=layer_bytes,
            limit_bytes=limit_bytes,
            check=lambda layer, part: seen.append((layer, part.copy())),
        )
        for layer in range(layers):
            wanted = expected[ids, layer * layer_bytes : (layer + 1) * layer_bytes]
            for _ in range(2):
                assert np.array_equal(stream.part(layer).numpy(), wanted)
            assert seen[-1][0] == layer
            assert np.array_equal(seen[-1][1], wanted)
        if storage == "direct" and limit_bytes < 2**20:
            with pytest.raises(ValueError, match="layer 0 was asked for out of order"):
                stream.part(0)


def test_staging_holds_two_chunks_at_most(tmp_path: Path) -> None:
    region, expected = make_file(tmp_path, num_rows=10, stride=12288, row=12288)
    with open_region(region, "direct", expected) as rows:
        stream = RowStream(rows, torch.arange(10), num_parts=12, part_bytes=1024, limit_bytes=60_000)
        sizes = []
        for layer in range(12):
            stream.part(layer)
            # what lies in the buffers, without the rounding of a row to pages
            sizes.append(sum(chunk.buffer.numel() for chunk in stream._chunks.values()))
        assert max(sizes) <= 60_000
        assert sorted(set(sizes)) == [20_480, 40_960]


def test_direct_reads_count_the_blocks_that_the_device_gives(tmp_path: Path) -> None:
    region, expected = make_file(tmp_path, num_rows=40, stride=1544, row=1544)
    ids = np.array([0, 1, 7, 39])
    with open_region(region, "direct", expected) as rows:
        unit = rows.alignment_bytes
        rows.request(ids, aligned_buffer(4, 1544)).wait()
        blocks = 0
        for row in ids:
            first = (4096 + row * 1544) // unit
            last = -(-(4096 + (row + 1) * 1544) // unit)
            # the file ends within the last block
            blocks += min(last * unit, 4096 + 40 * 1544) - first * unit
        assert rows.bytes_read == blocks
    region, expected = make_file(tmp_path, num_rows=40, stride=8192, row=8192)
    with open_region(region, "direct", expected) as rows:
        # in three parts: whole blocks, each once
        pending = rows.request(ids, aligned_buffer(4, 8192), cuts=[4096])
        pending.wait(4096)
        pending.wait()
        assert rows.bytes_read == 4 * 8192


def test_what_comes_first_can_be_used_before_the_rest_is_there(tmp_path: Path) -> None:
    import threading

    region, expected = make_file(tmp_path, num_rows=4, stride=8192, row=8192)
    with open_region(region, "direct", expected) as rows:
        gate, read_into = threading.Event(), rows.read_into

        def slow(numbers: list[int], out: np.ndarray, start: int) -> int:
            if start >= 4096:
                assert gate.wait(20)
            return read_into(numbers, out, start)

        rows.read_into = slow
        buffer = aligned_buffer(2, 8192)
        pending = rows.request(np.array([2, 3]), buffer, cuts=[4096])
        pending.wait(4000)
        assert np.array_equal(buffer[:, :4096], expected[2:4, :4096])
        assert rows.bytes_read == 2 * 4096
        gate.set()
        pending.wait()
        assert np.array_equal(buffer, expected[2:4])


@pytest.mark.parametrize("where", ["open", "first read"])
def test_a_file_system_without_direct_reads_is_announced(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    region, expected = make_file(tmp_path, num_rows=9, stride=1544, row=1544)
    real_open, real_read = os.open, os.preadv

    def refuse_open(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    def refuse_read(descriptor, buffers, offset):
        if offset in (512, 4096) and len(buffers[0]) in (512, 4096):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(descriptor, buffers, offset)

    if where == "open":
        monkeypatch.setattr(os, "open", refuse_open)
    else:
        monkeypatch.setattr(os, "preadv", refuse_read)
    with pytest.warns(UserWarning, match="refuses direct reads .* reading through the file cache instead"):
        rows = open_region(region, "direct", expected)
    assert not rows.is_direct
    buffer = aligned_buffer(3, 1544)
    rows.request(np.array([8, 0, 5]), buffer).wait()
    assert np.array_equal(buffer, expected[[8, 0, 5]])
    assert rows.bytes_read == 3 * 1544
    rows.close()


def test_direct_reads_work_here_without_a_warning(tmp_path: Path) -> None:
    region, expected = make_file(tmp_path, num_rows=9, stride=4096, row=4096)
    try:
        os.close(os.open(region.path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the temporary folder has no direct reads")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_region(region, "direct", expected).is_direct


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV])
def test_a_device_that_vanishes_is_an_error_with_record_and_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    region, expected = make_file(tmp_path, num_rows=9, stride=4096, row=4096)
    rows = open_region(region, "direct", expected)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    stream = RowStream(rows, torch.tensor([2, 5]), num_parts=2, part_bytes=2048)
    with pytest.raises(OSError, match=r"reading record 2 of .*rows-4096 failed: .*; check that the device") as caught:
        stream.part(0)
    assert caught.value.errno == number
    assert rows.bytes_read == 0
    rows.close()


def test_a_file_that_is_cut_short_while_open(tmp_path: Path) -> None:
    region, expected = make_file(tmp_path, num_rows=9, stride=4096, row=4096)
    direct, mapped = (open_region(region, storage, expected) for storage in ("direct", "mmap"))
    os.truncate(region.path, region.start(6))
    with pytest.raises(OSError, match="ends within record 7: it was cut short"):
        direct.request(np.array([7]), aligned_buffer(1, 4096)).wait()
    with pytest.raises(OSError, match="has 28672 bytes where the table needs 40960: it was cut short"):
        mapped.prefetch([0])
    direct.close()
    mapped.close()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    region, expected = make_file(tmp_path, num_rows=9, stride=8192, row=8192)
    rows, real = open_region(region, "direct", expected), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:4096]], offset))
    buffer = aligned_buffer(2, 8192)
    rows.request(np.array([1, 8]), buffer).wait()
    assert np.array_equal(buffer, expected[[1, 8]])
    assert rows.bytes_read == 2 * 8192
    rows.close()


def test_dropping_the_file_cache_changes_no_byte(tmp_path: Path) -> None:
    region, expected = make_file(tmp_path, num_rows=30, stride=4096, row=4096)
    with open_region(region, "mmap", expected) as rows:
        for _ in range(2):
            rows.drop_file_cache()
            rows.prefetch([4, 29])
            assert np.array_equal(rows.resident[[4, 29]].numpy(), expected[[4, 29]])


class TestPinned:
    """Page-locked memory without a GPU at hand: the checks, and what the system may answer."""

    def region(self, tmp_path: Path) -> tuple[RowRegion, np.ndarray]:
        return make_file(tmp_path, num_rows=9, stride=4096, row=4096)

    def test_without_a_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="'pinned' locks host memory for a CUDA device, and torch sees none; use"):
            open_region(self.region(tmp_path)[0], "pinned", None)

    def test_the_limit_is_checked_before_anything_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        region, _ = self.region(tmp_path)
        with pytest.raises(ValueError, match="would lock 36864 bytes of memory, the limit is 36863; raise the limit"):
            open_rows(region, "pinned", load=lambda: pytest.fail("read"), pinned_limit_bytes=36863)

    def test_the_limit_is_half_of_the_memory(self) -> None:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
        assert resident.pin_limit() == pytest.approx(kilobytes * 1024 / 2, rel=1e-3)
        assert resident.pin_limit(5) == 5

    def test_a_refusal_of_the_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

        def refuse(self):
            raise RuntimeError("CUDA error: out of memory\nmore")

        monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
        region, rows = self.region(tmp_path)
        with pytest.raises(ValueError, match=r"refused to lock 36864 bytes of memory \(CUDA error: out of memory\)"):
            open_region(region, "pinned", rows)

    def test_what_was_locked_is_read_like_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
        region, expected = self.region(tmp_path)
        with open_region(region, "pinned", expected) as rows:
            buffer = aligned_buffer(2, 4096)
            rows.request(np.array([3, 8]), buffer).wait()
            assert np.array_equal(buffer, expected[[3, 8]])


def test_unknown_storage(tmp_path: Path) -> None:
    region, expected = make_file(tmp_path, num_rows=2, stride=512, row=512)
    with pytest.raises(ValueError, match="storage 'tape' is not one of memory, pinned, mmap, direct"):
        open_region(region, "tape", expected)
    with pytest.raises(ValueError, match="num_workers 0 is below 1"):
        DirectRows(region, num_workers=0)

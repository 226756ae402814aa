"""One table from every place that can hold it: the same rows, the same text, counted bytes, clear errors."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tenfold.kernels.quantised_rows import RowLayout
from tenfold.kernels.tensor_file import TensorFileWriter
from tenfold.lightning_modules import DecoderForCausalLM, decoder_config
from tenfold.lightning_modules.mole.convert import TableError, compare_loss, export_lookup
from tenfold.lightning_modules.mole.table import MAGIC, TABLE_FILE, VERSION, LookupTable, row_checksums, table_metadata
from transformers import AutoModelForCausalLM

PLACES = ("memory", "mmap", "direct")
KINDS = ("none", "int8", "nf4", "nf3")


def write_random_table(path: Path, layout: RowLayout, num_rows: int) -> torch.Tensor:
    """A table file of random values; the values as they were given to it."""
    shape = (num_rows, layout.num_layers, layout.num_experts, layout.hidden_size)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    records = torch.cat([layout.encode(values[:, layer]) for layer in range(layout.num_layers)], dim=1)
    plain = layout.quantisation == "none"
    padded = torch.nn.functional.pad(records, (0, -records.shape[1] % 4096 if plain else 0))
    element = getattr(torch, layout.dtype)
    writer = TensorFileWriter(
        path,
        magic=MAGIC,
        version=VERSION,
        parts={
            "rows": (layout.dtype, (num_rows, padded.shape[1] // element.itemsize)),
            "layer_crc32": ("uint32", (num_rows, layout.num_layers)),
        },
        metadata=table_metadata(num_rows, layout, layout.dtype),
    )
    with writer:
        writer.write("rows", padded.view(element))
        writer.write("layer_crc32", row_checksums(padded, layout))
    return values


def layout_of(kind: Any) -> RowLayout:
    # float32 rows of 4096 bytes: whole pages, as all rows of the paper's sizes are
    return RowLayout.of((4, 4, 64), kind, dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_hundred_thousand_rows_with_repetitions_are_the_same_everywhere(kind: str, tmp_path: Path) -> None:
    layout = layout_of(kind)
    values = write_random_table(tmp_path / "t", layout, 700)
    draws = torch.from_numpy(np.random.default_rng(3).zipf(1.3, 100_000) % 700)
    expected = None
    for place in PLACES:
        table = LookupTable.open(tmp_path / "t", place)
        read, requested = [], 0
        for ids in draws.split(2_000):
            distinct, inverse = torch.unique(ids, return_inverse=True)
            read.append(table.rows(distinct)[inverse[::20]])
            requested += len(distinct)
        rows = torch.cat(read)
        if expected is None:
            expected = rows
            if kind == "none":
                assert torch.equal(rows, torch.cat([values[ids[::20]] for ids in draws.split(2_000)]))
        assert torch.equal(rows, expected)
        if kind == "none" or place != "direct":
            # a repeated id is read once per pass, and what is counted is the formula's
            assert table.bytes_read == requested * layout.record_bytes
        else:
            unit = table.source.alignment_bytes
            assert requested * layout.record_bytes < table.bytes_read < requested * (layout.record_bytes + 2 * unit)
        table.close()


@pytest.mark.parametrize("place", PLACES)
def test_bytes_of_a_row_at_the_papers_size(place: str, tmp_path: Path) -> None:
    # 160M-4E: L * N * d * 2 bytes, and a quarter of it with NF4
    layers, experts, width = 12, 4, 768
    layout = RowLayout.of((layers, experts, width), dtype="bfloat16")
    write_random_table(tmp_path / "t", layout, 9)
    table = LookupTable.open(tmp_path / "t", place)
    for number in range(1, 5):
        table.rows(torch.tensor([number]))
        assert table.bytes_read == number * layers * experts * width * 2
    table.close()
    quantised = RowLayout.of((layers, experts, width), "nf4")
    write_random_table(tmp_path / "q", quantised, 9)
    assert (tmp_path / "q").stat().st_size <= 9 * 18_528 + 3 * 4096


def make(**fields: Any) -> DecoderForCausalLM:
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    model = DecoderForCausalLM(decoder_config("mole-tiny-4e", **(options | fields)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_says_the_same_from_everywhere(kind: Any, tmp_path: Path) -> None:
    model, error = make(), TableError()
    export_lookup(model, tmp_path / "x", quantisation=kind, error=error)
    ids = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(1))
    start, options = ids[:, :4], {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones(3, 4)}
    lookup = load(tmp_path / "x")
    logits, text = lookup(ids).logits, lookup.generate(start, **options)
    for place in ("memory", "direct"):
        lookup.use_storage(place)
        assert lookup.model.table.storage == place
        assert torch.equal(lookup(ids).logits, logits)
        assert torch.equal(lookup.generate(start, **options), text)
    # what is stored is off by what the export said, no more and no less
    stored = lookup.model.table.rows(torch.arange(64))
    embedding = model.get_input_embeddings().weight
    exact = torch.stack([layer.feed_forward.lookup(embedding) for layer in model.model.layers], dim=1)
    difference = stored.float() - exact
    assert error.relative_rms == pytest.approx((difference.norm() / exact.norm()).item(), rel=1e-4)
    assert error.max_abs == pytest.approx(difference.abs().max().item(), rel=1e-4)
    low, high = {"none": (1e-4, 4e-3), "int8": (1e-3, 0.01), "nf4": (0.05, 0.13), "nf3": (0.1, 0.22)}[kind]
    assert low < error.relative_rms < high
    losses = compare_loss(model, lookup, [ids[0], ids[1, :9]])
    expected = [
        torch.nn.functional.cross_entropy(
            torch.cat([m(ids[:1]).logits[0, :-1], m(ids[1:2, :9]).logits[0, :-1]]), torch.cat([ids[0, 1:], ids[1, 1:9]])
        ).item()
        for m in (model, lookup)
    ]
    assert list(losses.values()) == pytest.approx(expected, rel=1e-5)


def test_a_table_of_another_quantisation_than_the_model_says(tmp_path: Path) -> None:
    export_lookup(make(), tmp_path / "nf4", quantisation="nf4")
    export_lookup(make(), tmp_path / "none", dtype="float32")
    assert json.loads((tmp_path / "nf4" / "config.json").read_text())["table_quantisation"] == "nf4"
    shutil.copy(tmp_path / "nf4" / TABLE_FILE, tmp_path / "none" / TABLE_FILE)
    with pytest.raises(ValueError, match="is quantised as 'nf4', the model's configuration says 'none'; take"):
        load(tmp_path / "none")


def test_a_table_whose_header_does_not_fit_its_rows(tmp_path: Path) -> None:
    nf4, nf3 = (RowLayout.of((2, 4, 32), kind) for kind in ("nf4", "nf3"))
    for number, (dtype, width, metadata) in enumerate(
        [
            ("uint8", nf4.record_bytes, table_metadata(5, nf3, "uint8")),
            ("float32", 1024, table_metadata(5, nf4, "uint8")),
            ("uint8", nf4.record_bytes, table_metadata(4, nf4, "uint8")),
        ]
    ):
        parts = {"rows": (dtype, (5, width)), "layer_crc32": ("uint32", (5, 2))}
        writer = TensorFileWriter(tmp_path / str(number), magic=MAGIC, version=VERSION, parts=parts, metadata=metadata)
        with writer:
            writer.write("rows", torch.zeros(5, width, dtype=getattr(torch, dtype)))
            writer.write("layer_crc32", np.zeros((5, 2), dtype=np.uint32))
        with pytest.raises(ValueError, match=r"header says quantisation 'nf\d' with \d+ bytes of uint8 per row, the"):
            LookupTable.open(tmp_path / str(number))


def test_a_vocabulary_that_was_resized_after_the_export(tmp_path: Path) -> None:
    export_lookup(make(), tmp_path / "x")
    lookup = load(tmp_path / "x")
    lookup.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="the embedding has 70 rows, the table 64: the vocabulary was resized after"):
        lookup(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="the embedding is not the one that"):
        lookup.save_pretrained(tmp_path / "y")


@torch.no_grad()
def test_a_device_that_vanishes_while_the_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_lookup(make(), tmp_path / "x", dtype="float32")
    lookup, ids = load(tmp_path / "x", table_storage="direct"), torch.arange(12).view(2, 6)
    expected = load(tmp_path / "x")(ids).logits
    assert torch.equal(lookup(ids).logits, expected)
    read = os.preadv
    left = [3]

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match=r"reading record \d+ of .* failed: .*; check that the device is") as caught:
        lookup(ids)
    assert caught.value.errno == errno.EIO
    # it is back
    monkeypatch.setattr(os, "preadv", read)
    assert torch.equal(lookup(ids).logits, expected)


@torch.no_grad()
def test_memory_that_cannot_be_locked_leaves_the_table_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_lookup(make(), tmp_path / "x", dtype="float32")
    lookup, ids = load(tmp_path / "x"), torch.arange(12).view(2, 6)
    expected = lookup(ids).logits
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="limit"):
        lookup.use_storage("pinned", pinned_limit_bytes=1000)
    assert lookup.model.table.storage == "mmap"
    assert torch.equal(lookup(ids).logits, expected)


def test_ids_beyond_the_table(tmp_path: Path) -> None:
    write_random_table(tmp_path / "t", layout_of("none"), 7)
    with pytest.raises(ValueError, match="token id 7 has no row in t, which holds 7; export the table again"):
        LookupTable.open(tmp_path / "t").rows(torch.tensor([3, 7]))


def test_a_view_of_the_whole_table_needs_plain_addressable_values(tmp_path: Path) -> None:
    write_random_table(tmp_path / "plain", layout_of("none"), 7)
    write_random_table(tmp_path / "nf4", layout_of("nf4"), 7)
    assert LookupTable.open(tmp_path / "plain").values.shape == (7, 4, 4, 64)
    for name, place in (("plain", "direct"), ("nf4", "memory")):
        with pytest.raises(ValueError, match="cannot be viewed as a tensor"):
            _ = LookupTable.open(tmp_path / name, place).values


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_pass_for_a_gpu_copies_layer_by_layer_in_turn_into_two_buffers(
    kind: Any, tmp_path: Path, stand_in_for_cuda: list[str]
) -> None:
    values = write_random_table(tmp_path / "t", layout_of(kind), 30)
    table = LookupTable.open(tmp_path / "t", "direct")
    reference = LookupTable.open(tmp_path / "t", "memory")
    from tenfold.kernels.row_storage.device_stream import DeviceStaging
    from tenfold.kernels.row_storage.stream import RowStream

    staging, layout = DeviceStaging(torch.device("cpu")), table.layout
    sizes = {"num_parts": layout.num_layers, "part_bytes": layout.layer_bytes}
    addresses = []
    for ids in ([1, 2, 29], [4, 7, 8], [0, 1, 3], [9, 10]):
        rows = torch.tensor(ids)
        stream = staging.begin(RowStream(table.source, rows, **sizes), num_rows=len(ids), **sizes)
        for layer in range(layout.num_layers):
            part = stream.part(layer)
            assert torch.equal(layout.decode(part), reference.rows(rows, layer))
            addresses.append(part.data_ptr()) if layer == 0 else None
    assert addresses[0] == addresses[2] != addresses[1] == addresses[3]
    assert values.shape[0] == 30
    # the third pass writes into the first one's buffer: after what used it, and after its copies were done
    assert stand_in_for_cuda.count("synchronize") == 2 * layout.num_layers
    assert "copies waits for current" in stand_in_for_cuda
    assert "current waits for copies" in stand_in_for_cuda


@pytest.fixture
def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Streams and events that write down what they are asked to do."""
    import contextlib

    said: list[str] = []

    class Event:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def synchronize(self) -> None:
            said.append("synchronize")

    class Stream:
        def __init__(self, name: Any = "copies") -> None:
            self.name = name if isinstance(name, str) else "copies"

        def record_event(self) -> Event:
            return Event(self.name)

        def wait_event(self, event: Event) -> None:
            said.append(f"{self.name} waits for {event.stream}")

    current = Stream("current")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return said

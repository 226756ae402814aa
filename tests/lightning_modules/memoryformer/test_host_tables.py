"""Stored tables in host memory or behind a memory map: the same bits, nothing registered, damaged files told."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.inference.evals.loading import load_model
from tenfold.lightning_modules import DecoderForCausalLM, MemoryLayer
from tenfold.lightning_modules.decoder import decoder_config
from tenfold.lightning_modules.memoryformer.inference import MemoryFormerConfig, export_tables, table_storage
from transformers import AutoModelForCausalLM

FIELDS = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))


def _is_mapped(records):
    address = records.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return line.endswith(".safetensors")
    raise AssertionError("no such address")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    model = DecoderForCausalLM(decoder_config("memoryformer-tiny", **FIELDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made = {}
    for name in ("float16", "int8"):
        made[name] = tmp_path_factory.mktemp(name)
        export_tables(model, made[name], table_format=name)
    return made


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of memory maps")
@pytest.mark.parametrize("storage", ["memory", "mmap"])
@pytest.mark.parametrize("table_format", ["float16", "int8"])
def test_outputs_are_those_of_tables_on_the_device(folders, storage, table_format, tmp_path):
    there = AutoModelForCausalLM.from_pretrained(folders[table_format])
    here = AutoModelForCausalLM.from_pretrained(folders[table_format], table_storage=storage)
    assert here.config.table_storage == storage
    with torch.no_grad():
        assert torch.equal(here(IDS).logits, there(IDS).logits)
    assert torch.equal(
        here.generate(IDS[:, :3], max_new_tokens=6, do_sample=False),
        there.generate(IDS[:, :3], max_new_tokens=6, do_sample=False),
    )
    # a move or a cast of the model finds no tables
    assert not [name for name, _ in here.named_buffers() if name.endswith("records")]
    layer = here.to("meta").model.layers[0].feed_forward.first
    assert layer.host_records.device.type == "cpu"
    assert _is_mapped(layer.host_records) == (storage == "mmap")


def test_a_model_with_host_tables_is_saved_whole(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["int8"], table_storage="mmap")
    model.save_pretrained(tmp_path)
    one, other = load_file(folders["int8"] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_loaded_meanwhile_has_its_tables_there(folders):
    with table_storage("mmap"):
        inside = load_model(folders["int8"])
    outside = load_model(folders["int8"])
    assert (inside.config.table_storage, outside.config.table_storage) == ("mmap", "device")
    inside.use_storage("mmap")
    with pytest.raises(ValueError, match="are in 'device'; load it with table_storage='memory'"):
        outside.use_storage("memory")
    with torch.no_grad():
        assert torch.equal(inside(IDS).logits, outside(IDS).logits)


def test_an_input_on_another_device_crosses_over(monkeypatch):
    layer = MemoryLayer(8, 6, num_bits=4, table_format="float16", table_on_host=True, initialise=False, bias=False)
    layer.hold_on_host(torch.randn(32, 6).half().view(torch.uint8))
    plain = MemoryLayer(8, 6, num_bits=4, table_format="float16", initialise=False, bias=False)
    plain.records.copy_(layer.host_records)
    x = torch.randn(3, 8)
    moved = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(tuple(self.shape)) or real(self))
    assert torch.equal(layer(x), plain(x))
    # the input, not the table's rows
    assert moved == [(3, 8)]


@pytest.fixture
def copied(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders["int8"], folder)
    return folder


class TestBadInput:
    def load(self, folder, message, **options):
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(folder, **{"table_storage": "mmap", **options})

    def test_places(self, copied):
        self.load(copied, "storage 'pinned' is for MoLE's tables.*use 'memory' or 'mmap'", table_storage="pinned")
        with pytest.raises(ValueError, match="table_storage 'disk' is not one of device, memory, mmap"):
            MemoryFormerConfig(**FIELDS, table_storage="disk")

    def test_a_missing_table(self, copied):
        state = load_file(copied / "model.safetensors")
        del state["model.layers.1.feed_forward.second.records"]
        save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
        self.load(copied, r"the table model\.layers\.1\.feed_forward\.second\.records is missing")

    def test_a_table_of_another_configuration(self, copied):
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(config | {"table_format": "float16"}))
        message = re.escape("is U8 [1024, 104], its configuration needs U8 [1024, 192]")
        self.load(copied, message)

    def test_a_file_that_was_cut_short(self, copied):
        from tenfold.lightning_modules.memoryformer.host_tables import RecordFiles

        path = copied / "model.safetensors"
        last, (_, _, entry) = max(RecordFiles(copied)._places.items(), key=lambda item: item[1][2]["data_offsets"])
        last_shape = tuple(entry["shape"])
        assert RecordFiles(copied).records(last, last_shape, "mmap").shape == last_shape
        content = path.read_bytes()
        path.write_bytes(content[:-1000])
        with pytest.raises(ValueError, match=r"ends at [\d,]+: it was cut short"):
            RecordFiles(copied).records(last, last_shape, "mmap")
        path.write_bytes(content[:50])
        with pytest.raises(ValueError, match="has no safetensors header"):
            RecordFiles(copied)
        path.unlink()
        with pytest.raises(ValueError, match=r"has no \*\.safetensors with tables"):
            RecordFiles(copied)

    def test_a_layer_without_its_table(self):
        layer = MemoryLayer(8, 6, num_bits=4, table_format="int8", table_on_host=True, initialise=False)
        with pytest.raises(ValueError, match="none was given"):
            layer(torch.zeros(8))
        with pytest.raises(ValueError, match=r"takes a table of \[32, 14\] bytes, on the host: True; got \[32, 6\]"):
            layer.hold_on_host(torch.zeros(32, 6, dtype=torch.uint8))

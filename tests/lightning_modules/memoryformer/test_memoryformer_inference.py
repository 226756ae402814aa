"""Stored tables: what they compute, how large they are, and files that do not belong together."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.kernels.hash_gather import dequantise_rows
from tenfold.lightning_modules import DecoderForCausalLM, MemoryFormerForCausalLM, MemoryLayer
from tenfold.lightning_modules.decoder import decoder_config
from tenfold.lightning_modules.memoryformer.inference import MemoryFormerConfig, export_tables
from transformers import AutoModelForCausalLM

FIELDS = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = DecoderForCausalLM(decoder_config("memoryformer-tiny", **FIELDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("table_format", "error"), [("float16", 3e-4), ("int8", 1e-2)])
def test_the_folder_loads_with_the_auto_class_and_holds_the_rounded_tables(trained, tmp_path, table_format, error):
    found = export_tables(trained, tmp_path, table_format=table_format)
    assert 0 < found["relative_rms_error"] < error
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MemoryFormerForCausalLM
    # the training form with the tables rounded by hand
    for name, layer in loaded.named_modules():
        if isinstance(layer, MemoryLayer):
            table = trained.get_submodule(name).table.detach()
            if table_format == "float16":
                table.copy_(table.half().float())
                assert torch.equal(layer.records.view(torch.float16).float(), table)
            else:
                table.copy_(dequantise_rows(layer.records))
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (loaded(ids).logits - trained(ids).logits).norm() / trained(ids).logits.norm()
    # halves are added in float32 and rounded once per layer
    assert difference < (2e-2 if table_format == "float16" else 1e-4)
    out = loaded.generate(ids[:, :2], max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 7)


def test_bytes_of_the_stored_tables_are_the_closed_form(trained, tmp_path):
    rows = 4 * 256, 4 * 256, 4 * 1024
    widths = 96, 40, 32
    (tmp_path / "half").mkdir()
    (tmp_path / "int8").mkdir()
    half = export_tables(trained, tmp_path / "half", table_format="float16")
    int8 = export_tables(trained, tmp_path / "int8", table_format="int8")
    assert half["table_bytes"] == 2 * sum(r * 2 * w for r, w in zip(rows, widths, strict=True))
    assert int8["table_bytes"] == 2 * sum(r * (w + 8) for r, w in zip(rows, widths, strict=True))
    assert half["training_table_bytes"] == 2 * half["table_bytes"]
    state = load_file(tmp_path / "int8" / "model.safetensors")
    assert sum(v.nbytes for n, v in state.items() if n.endswith("records")) == int8["table_bytes"]
    # a cast of the model does not touch the tables
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16)
    assert loaded.model.layers[0].feed_forward.first.records.dtype == torch.uint8
    assert loaded.lm_head.weight.dtype == torch.bfloat16


class TestBadInput:
    def change(self, folder, **fields):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"table_format": "float16"}, "6 weights are mismatched for its configuration, first model.layers.0.atten"),
            ({"projection_options": {"num_bits": 4}}, "2 weights are mismatched"),
            ({"num_hidden_layers": 3}, "weights are missing for its configuration"),
            ({"num_hidden_layers": 1}, "weights are unexpected for its configuration"),
        ],
    )
    def test_tables_of_another_configuration(self, trained, tmp_path, fields, message):
        export_tables(trained, tmp_path)
        self.change(tmp_path, **fields)
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_a_file_without_one_of_its_tables(self, trained, tmp_path):
        export_tables(trained, tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        del state["model.layers.1.feed_forward.second.records"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 weights are missing .* model.layers.1.feed_forward.second.records"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_models_without_tables_and_unknown_formats(self, trained, tmp_path):
        dense = DecoderForCausalLM(decoder_config("dense-tiny", **FIELDS))
        with pytest.raises(ValueError, match=r"only a decoder with memory layers .* feed_forward 'dense'"):
            export_tables(dense, tmp_path)
        with pytest.raises(ValueError, match="table_format 'nf4' is not one of float16, int8"):
            export_tables(trained, tmp_path, table_format="nf4")
        with pytest.raises(ValueError, match="table_format 'nf4' is not one of float16, int8"):
            MemoryFormerConfig(table_format="nf4")

    def test_stored_tables_are_not_exported_again(self, trained, tmp_path):
        export_tables(trained, tmp_path)
        with pytest.raises(ValueError, match="stored as int8 already"):
            export_tables(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)

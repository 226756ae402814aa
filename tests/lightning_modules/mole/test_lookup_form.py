"""The lookup form beyond equality: rounding bounds, precision and tying of the source, checks while reading, files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.kernels.tensor_file import TensorFile
from tenfold.lightning_modules.decoder import DecoderForCausalLM
from tenfold.lightning_modules.language_model import num_parameters
from tenfold.lightning_modules.mole import MoLELookupConfig, MoLELookupForCausalLM
from tenfold.lightning_modules.mole.convert import export_lookup
from tenfold.lightning_modules.mole.table import MAGIC, TABLE_FILE, VERSION, LookupTable
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

Model = Callable[..., DecoderForCausalLM]
Ids = Callable[..., Tensor]
STORAGES = ("memory", "mmap", "direct")


def load(folder: Path, **options: Any) -> MoLELookupForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def folder(small_model: Model, tmp_path: Path) -> Path:
    """A lookup form in float32."""
    export_lookup(small_model("mole", dtype=torch.float32), tmp_path / "lookup", dtype="float32")
    return tmp_path / "lookup"


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"norm": "layernorm", "attention_bias": True, "mlp_bias": True}, id="layernorm-bias"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"gated_feed_forward": True, "hidden_act": "silu", "num_key_value_heads": 2}, id="gated-gqa"),
        pytest.param({"rope_parameters": {"partial_rotary_factor": 0.5}, "norm_eps": 0.05}, id="half-rotary-eps"),
    ],
)
@torch.no_grad()
def test_forms_agree_whatever_the_decoder_is(
    fields: dict[str, Any], small_model: Model, token_ids: Ids, tmp_path: Path
) -> None:
    model, ids = small_model("mole", **fields), token_ids(2, 12)
    export_lookup(model, tmp_path / "x", dtype="float64")
    lookup = load(tmp_path / "x")
    assert type(lookup) is MoLELookupForCausalLM
    assert lookup.dtype == torch.float64
    assert (lookup(ids).logits - model(ids).logits).abs().max() <= 1e-10
    # tied weights stay one parameter, in both forms
    assert (lookup.lm_head.weight is lookup.model.embed_tokens.weight) == bool(fields.get("tie_word_embeddings"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == bool(fields.get("tie_word_embeddings"))


@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_special_ids_and_the_ends_of_the_vocabulary(storage: str, small_model: Model, tmp_path: Path) -> None:
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 60}
    model = small_model("mole", **special)
    export_lookup(model, tmp_path / "x", dtype="float64")
    lookup = load(tmp_path / "x", table_storage=storage)
    ids = torch.tensor([[60, 60, 0, 5, 5, 1, 59], [0, 5, 1, 1, 60, 0, 60]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    assert (lookup(ids).logits - model(ids).logits).abs().max() <= 1e-10
    found, expected = lookup(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    assert (found - expected).abs().max() <= 1e-10
    assert (lookup.config.bos_token_id, lookup.config.eos_token_id, lookup.config.pad_token_id) == (0, 1, 60)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(lookup.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize(("dtype", "roundoff"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 2**-24)])
@torch.no_grad()
def test_a_layer_differs_by_no_more_than_the_rounding_of_its_rows(
    dtype: str, roundoff: float, small_model: Model, token_ids: Ids, tmp_path: Path
) -> None:
    model, ids = small_model("mole"), token_ids(2, 12)
    export_lookup(model, tmp_path / "x", dtype=dtype)
    lookup = load(tmp_path / "x")
    u = torch.randn(2, 12, 32, dtype=torch.float64)
    embeddings = model.get_input_embeddings()(ids)
    differences = []
    for index in range(2):
        layer, other = model.model.layers[index].feed_forward, lookup.model.layers[index].feed_forward
        found = other(u, lookup.model.token_context(ids, embeddings, None))
        expected = layer(u, model.model.token_context(ids, embeddings, None))
        gates = layer.router(u).softmax(-1)
        values = layer.lookup(embeddings.view(-1, 32)).view(2, 12, 3, 32)
        # every value is rounded once: |error| <= sum_j g_j * roundoff * |v_j|
        bound = roundoff * (gates.unsqueeze(-1) * values.abs()).sum(2)
        differences.append((found - expected).abs())
        assert (differences[-1] <= bound * (1 + 1e-9) + 1e-12).all()
    # the bound is met closely, so the table has this precision and no better
    assert max(difference.max().item() for difference in differences) > 0.05 * roundoff


@torch.no_grad()
def test_a_16_bit_model_has_its_table_computed_in_float32(small_model: Model, tmp_path: Path) -> None:
    model = small_model("mole", dtype=torch.bfloat16)
    export_lookup(model, tmp_path / "x", dtype="float32")
    lookup = load(tmp_path / "x")
    assert lookup.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16
    exact = model.double()
    for index, layer in enumerate(exact.model.layers):
        expected = layer.feed_forward.lookup(exact.get_input_embeddings().weight)
        torch.testing.assert_close(lookup.model.table.values[:, index].double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_memory_and_mmap_are_the_same_bit_for_bit(folder: Path, token_ids: Ids) -> None:
    memory, mapped = load(folder, table_storage="memory"), load(folder)
    assert (memory.model.table.storage, mapped.model.table.storage) == ("memory", "mmap")
    draws = np.random.default_rng(0).integers(0, 61, 5000)
    ids = torch.from_numpy(draws)
    assert torch.equal(memory.model.table.rows(ids), mapped.model.table.rows(ids))
    assert torch.equal(memory.model.table.rows(ids, 1), mapped.model.table.rows(ids, 1))
    assert torch.equal(memory(token_ids(2, 12)).logits, mapped(token_ids(2, 12)).logits)
    assert memory.model.table.bytes_read == mapped.model.table.bytes_read


@torch.no_grad()
def test_counts_of_parameters_loaded_and_offloaded(folder: Path, small_model: Model) -> None:
    layers, experts, d, width, vocabulary = 2, 3, 32, 20, 61
    model, lookup = small_model("mole"), load(folder)
    resident = num_parameters([lookup])
    # what leaves: the routed experts and their norms
    assert num_parameters([model]) - resident == layers * (2 * experts * width * d + d)
    assert lookup.model.table.values.numel() == vocabulary * layers * experts * d
    assert lookup.model.table.row_bytes == layers * experts * d * 4
    # a decoding step reads the row of one token in one piece, and a prompt every distinct row once
    table = lookup.model.table
    cache = lookup(torch.tensor([[4, 9, 4, 4]]), use_cache=True).past_key_values
    assert table.bytes_read == 2 * table.row_bytes
    for step in range(1, 4):
        lookup(torch.tensor([[4]]), past_key_values=cache, use_cache=True)
        assert table.bytes_read == (2 + step) * table.row_bytes


def test_every_row_starts_on_a_page_of_the_file(folder: Path) -> None:
    table = LookupTable.open(folder / TABLE_FILE)
    file = TensorFile(folder / TABLE_FILE, magic=MAGIC, version=VERSION)
    stride = table.values.stride(0) * table.values.itemsize
    raw = np.fromfile(folder / TABLE_FILE, dtype=np.uint8)
    for index in (0, 1, 17, 60):
        start = file.offset("rows") + index * stride
        assert start % 4096 == 0
        stored = torch.from_numpy(raw[start : start + table.row_bytes].copy()).view(torch.float32)
        assert torch.equal(stored, table.values[index].flatten())
        # the padding is zero, so that the same model gives the same file
        assert not raw[start + table.row_bytes : start + stride].any()


def alter(folder: Path, token_id: int, layer_offset: int = 0) -> None:
    path = folder / TABLE_FILE
    table = LookupTable.open(path)
    offset = TensorFile(path, magic=MAGIC, version=VERSION).offset("rows")
    with open(path, "r+b") as file:
        file.seek(offset + token_id * table.values.stride(0) * 4 + layer_offset + 13)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


@torch.no_grad()
def test_an_altered_row_is_noticed_before_it_is_used(folder: Path) -> None:
    alter(folder, 23)
    with pytest.raises(ValueError, match="part 'rows', chunk 0 fails its checksum"):
        load(folder, table_storage="memory")
    lookup = load(folder)
    lookup(torch.tensor([[1, 22, 24]]))
    for _ in range(2):
        with pytest.raises(ValueError, match="the row of token id 23 fails its checksum in layer 0: altered; export"):
            lookup(torch.tensor([[1, 23]]))
    with pytest.raises(ValueError, match="token id 23"):
        lookup.model.table.rows(torch.tensor([23]))
    # every layer has a checksum of its own: the other one is whole
    lookup.model.table.rows(torch.tensor([23]), 1)
    with pytest.raises(ValueError, match="part 'rows', chunk 0 fails its checksum"):
        lookup.model.table.verify()


@torch.no_grad()
def test_every_layer_of_a_row_is_checked_when_it_is_read(folder: Path) -> None:
    # a layer is 3 experts of width 32 in float32
    alter(folder, 23, layer_offset=3 * 32 * 4)
    table = load(folder).model.table
    table.rows(torch.tensor([23]), 0)
    with pytest.raises(ValueError, match="the row of token id 23 fails its checksum in layer 1: altered"):
        table.rows(torch.tensor([23]), 1)


def test_verify_accepts_what_was_written(folder: Path) -> None:
    load(folder).model.table.verify()


def test_files_of_another_kind_are_no_table(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a file of this kind"):
        LookupTable.open(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        LookupTable.open(tmp_path / "nowhere")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_loading_is_strict_about_the_weights(change: str, folder: Path) -> None:
    path, name = folder / "model.safetensors", "model.layers.1.feed_forward.router.weight"
    weights = load_file(path)
    if change == "missing":
        del weights[name]
    else:
        name = "model.layers.7.feed_forward.router.weight"
        weights[name] = torch.zeros(3, 32)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has {change} weights for its configuration: {name}"):
        load(folder)


def test_loading_info_is_handed_on(folder: Path) -> None:
    lookup, info = load(folder, output_loading_info=True)
    assert lookup.model.table is not None
    assert not info["missing_keys"]


def test_a_folder_without_the_embedding_is_refused(folder: Path) -> None:
    from tenfold.lightning_modules.mole.lookup import check_embedding

    table = LookupTable.open(folder / TABLE_FILE)
    weights = load_file(folder / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds model\.embed_tokens\.weight, which lookup_table"):
        check_embedding(folder, table)


def test_model_without_a_table_says_so(folder: Path) -> None:
    lookup = MoLELookupForCausalLM(AutoConfig.from_pretrained(folder))
    assert type(lookup.config) is MoLELookupConfig
    with pytest.raises(ValueError, match="no lookup table is attached"):
        lookup(torch.tensor([[1, 2]]))


@torch.no_grad()
def test_saving_links_or_copies_the_table(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup, ids = load(folder), torch.arange(12).view(2, 6)
    lookup.save_pretrained(tmp_path / "linked")
    assert (tmp_path / "linked" / TABLE_FILE).samefile(folder / TABLE_FILE)
    # onto itself: the table stays
    lookup.save_pretrained(folder)
    assert torch.equal(load(folder)(ids).logits, lookup(ids).logits)

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    lookup.save_pretrained(tmp_path / "copied")
    copy = tmp_path / "copied" / TABLE_FILE
    assert not copy.samefile(folder / TABLE_FILE)
    assert copy.read_bytes() == (folder / TABLE_FILE).read_bytes()
    assert torch.equal(load(tmp_path / "copied")(ids).logits, lookup(ids).logits)


def test_a_failing_copy_leaves_an_older_table_alone(
    folder: Path, small_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_lookup(small_model("mole", seed=5, dtype=torch.float32), tmp_path / "older", dtype="float32")
    before = (tmp_path / "older" / TABLE_FILE).read_bytes()

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    def half(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:5000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(OSError, match="No space left"):
        load(folder).save_pretrained(tmp_path / "older")
    assert (tmp_path / "older" / TABLE_FILE).read_bytes() == before
    assert not [path for path in (tmp_path / "older").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("change", ["cast", "trained"])
def test_a_changed_embedding_is_not_saved_beside_its_stale_table(change: str, folder: Path, tmp_path: Path) -> None:
    if change == "cast":
        lookup = load(folder, dtype=torch.bfloat16)
    else:
        lookup = load(folder)
        with torch.no_grad():
            lookup.get_input_embeddings().weight[3] += 0.1
    with pytest.raises(ValueError, match=r"the embedding is not the one that .* was made from: it was trained or cast"):
        lookup.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_cast_model_computes_with_the_table(folder: Path, token_ids: Ids) -> None:
    ids = token_ids(2, 9)
    with torch.no_grad():
        expected, found = load(folder)(ids).logits, load(folder, dtype=torch.bfloat16)(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


def test_table_with_other_sizes_is_refused_by_attach(folder: Path, small_config: Callable[..., Any]) -> None:
    fields = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    table = LookupTable.open(folder / TABLE_FILE)
    for change in ({"num_experts": 4}, {"num_hidden_layers": 3}, {"hidden_size": 64}, {"vocab_size": 62}):
        config = MoLELookupConfig(**(fields | {"num_experts": 3} | change))
        with pytest.raises(ValueError, match=r"holds \[vocabulary, layers, experts, width\] \[61, 2, 3, 32\]"):
            MoLELookupForCausalLM(config).attach_table(table)

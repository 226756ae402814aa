"""What MoLE's export and its lookup form refuse, each in one line, with nothing left behind."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.kernels.tensor_file import TensorFileWriter
from tenfold.lightning_modules import DecoderForCausalLM, decoder_config
from tenfold.lightning_modules.mole.convert import export_lookup
from tenfold.lightning_modules.mole.lookup import TABLE_FILE
from transformers import AutoModelForCausalLM


def make(**fields: Any) -> DecoderForCausalLM:
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}
    return DecoderForCausalLM(decoder_config("mole-tiny-4e", **(options | fields))).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good lookup form."""
    export_lookup(make(), tmp_path / "good", dtype="float32")
    return tmp_path / "good"


def refused(
    model: DecoderForCausalLM, tmp_path: Path, match: str, error: type[Exception] = ValueError, **options: Any
) -> None:
    target = tmp_path / "out" / "model"
    with pytest.raises(error, match=match) as raised:
        export_lookup(model, target, **options)
    assert "\n" not in str(raised.value)
    assert not target.exists()
    left = list(target.parent.iterdir()) if target.parent.exists() else []
    assert left == [], f"left behind: {left}"


def test_noise_on_the_embedding_path(tmp_path: Path) -> None:
    refused(make(embedding_dropout=0.1), tmp_path, "embedding_dropout 0.1")
    hooked = make()
    hooked.get_input_embeddings().register_forward_hook(lambda module, args, out: out + torch.rand_like(out))
    refused(hooked, tmp_path, "a hook on the embedding")
    clipped = make()
    clipped.get_input_embeddings().max_norm = 1.0
    refused(clipped, tmp_path, "max_norm on the embedding")
    dense = DecoderForCausalLM(decoder_config("dense-tiny", vocab_size=64))
    refused(dense, tmp_path, "this one is 'dense'")


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.model.layers[1].feed_forward.lookup.experts.down[2].fill_(1e6)
        model.model.layers[1].feed_forward.lookup.experts.up[2].fill_(1.0)
    refused(
        model, tmp_path, r"expert 2 of layer 1 gives .* limit of float16 is .*; export as bfloat16", dtype="float16"
    )
    with torch.no_grad():
        model.model.layers[0].feed_forward.lookup.experts.up[3, 0, 0] = float("nan")
    refused(model, tmp_path, "expert 3 of layer 0 gives nan for token id 0", dtype="float32")


def test_memory_limit_below_one_id(tmp_path: Path) -> None:
    refused(make(), tmp_path, "memory limit of 1000 bytes is below", memory_limit_bytes=1000)


def test_full_disk_before_and_during(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
        refused(make(), tmp_path, "needs .* bytes, 1,?000 .*free", OSError)
    written = 0

    def write(self: Any, *args: Any) -> None:
        nonlocal written
        written += 1
        if written == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        original(self, *args)

    original = TensorFileWriter.write
    monkeypatch.setattr(TensorFileWriter, "write", write)
    refused(make(), tmp_path, "No space left on device", OSError, memory_limit_bytes=200_000)
    assert written == 2


def test_taken_folder(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ValueError, match="exists; name a new folder"):
        export_lookup(make(), folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_embeddings_instead_of_ids(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match="takes no inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("storage", ["mmap", "memory"])
def test_truncated_table(folder: Path, storage: str) -> None:
    table = folder / TABLE_FILE
    table.write_bytes(table.read_bytes()[:-4096])
    with pytest.raises(ValueError, match="truncated or altered"):
        load(folder, table_storage=storage)


def test_altered_table(folder: Path) -> None:
    table = folder / TABLE_FILE
    content = bytearray(table.read_bytes())
    content[4096 + 100] ^= 1
    table.write_bytes(content)
    with pytest.raises(ValueError, match="fails its checksum"):
        load(folder, table_storage="memory")
    content[40] ^= 1
    table.write_bytes(content)
    with pytest.raises(ValueError, match="header is truncated or altered"):
        load(folder, table_storage="mmap")


def test_missing_table(folder: Path) -> None:
    (folder / TABLE_FILE).unlink()
    with pytest.raises(ValueError, match=r"has no lookup_table\.tenfold; make it with"):
        load(folder)


def test_table_of_another_vocabulary(folder: Path, tmp_path: Path) -> None:
    export_lookup(make(vocab_size=80), tmp_path / "other", dtype="float32")
    shutil.copy(tmp_path / "other" / TABLE_FILE, folder / TABLE_FILE)
    with pytest.raises(
        ValueError, match=r"holds \[vocabulary, layers, experts, width\] \[80, 2, 4, 32\], the model needs \[64"
    ):
        load(folder)


def test_table_from_before_further_training(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][3, 3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="made from another embedding"):
        load(folder)


def test_unknown_storage(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"table_storage": "tape"}))
    with pytest.raises(ValueError, match="'tape' is not one of memory, pinned, mmap, direct"):
        load(folder)


def test_saving_again_takes_the_table_along(folder: Path, tmp_path: Path) -> None:
    ids = torch.arange(20).view(2, 10)
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: decoder_config("mole-160-4e"), "unknown preset 'mole-160-4e'; nearest: mole-160m-4e"),
        (lambda: decoder_config("dense-tiny", feed_forward="mol"), "unknown feed-forward 'mol'; nearest: mole"),
        (lambda: make(feed_forward_options={"num_expert": 4}), "takes no option 'num_expert'; nearest: num_experts"),
        (lambda: make(feed_forward_options={"num_experts": 0}), "num_experts 0 is below 1"),
        (lambda: decoder_config("dense-tiny", hidden_size=130), "not a multiple of num_attention_heads"),
    ],
)
def test_unknown_names_and_sizes(build: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()

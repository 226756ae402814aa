"""GGUF files written here, converted, and compared with transformers models that hold the same weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="extra `data`")

from tenfold.datamodules.gguf_conversion import convert_gguf  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """The tokenizer that the file is to describe, built with the library alone."""
    tokenizer = Tokenizer(models.BPE())
    # trained without splitting digits, so that the vocabulary has merges which splitting must keep from being used
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(x, special=True, normalized=False) for x in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the rain in spain 1234 stays mainly in the plain, the train 1234 too"] * 3, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def small(kind: str, *, tied: bool = True) -> Any:
    options: dict[str, Any] = {
        "vocab_size": 304,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**options))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            # norms away from one and biases away from zero, so that a forgotten one shows
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
    return model.eval()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to pairs side by side, one row at a time."""
    out = np.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for pair in range(size // 2):
            for half in range(2):
                out[head * size + 2 * pair + half] = weight[head * size + half * (size // 2) + pair]
    return out


def write(
    path: Path,
    model: Any,
    bpe: Tokenizer,
    *,
    head: np.ndarray | None = None,
    pre: str = "smollm",
    architecture: str | None = None,
    quantized: bool = False,
) -> Path:
    config = model.config
    kind = config.model_type
    writer = gguf.GGUFWriter(path, architecture or kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    padding = [f"[PAD{n}]" for n in range(len(vocabulary), config.vocab_size)]
    tokens = [token for token, _ in vocabulary] + padding
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 5 if t in padding else 1 for t in tokens])
    merges = json.loads(bpe.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, values: np.ndarray) -> None:
        if quantized and values.ndim == 2:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)

    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name == "model.embed_tokens.weight":
            add("token_embd.weight", values)
        elif name == "model.norm.weight":
            add("output_norm.weight", values)
        elif name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, suffix = rest.rsplit(".", 1)
            if kind == "llama" and module.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
                values = interleave(values, heads)
            add(f"blk.{layer}.{NAMES[module]}.{suffix}", values)
    if head is not None:
        writer.add_tensor("output.weight", head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(path: Path, folder: Path, **options: Any) -> Any:
    folder.mkdir()
    convert_gguf(path, folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


IDS = torch.arange(40).reshape(2, 20) * 7 % 300


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_are_those_of_the_model_with_the_same_weights(kind: str, bpe: Tokenizer, tmp_path: Path) -> None:
    model = small(kind)
    loaded = converted(write(tmp_path / "m.gguf", model, bpe), tmp_path / "out")
    assert type(loaded) is type(model)
    assert loaded.config.tie_word_embeddings
    assert loaded.num_parameters() == model.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    assert (loaded.generation_config.eos_token_id, loaded.config.pad_token_id) == (2, 2)


def test_quantised_weights_are_put_back_exactly(bpe: Tokenizer, tmp_path: Path) -> None:
    model = small("llama")
    path = write(tmp_path / "m.gguf", model, bpe, quantized=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                kind = gguf.GGMLQuantizationType.Q8_0
                parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)))
        expected = model(IDS).logits
        torch.testing.assert_close(converted(path, tmp_path / "a")(IDS).logits, expected, rtol=0, atol=1e-6)
    half = converted(path, tmp_path / "b", dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_two_roundings_of_one_matrix_are_tied_to_the_finer(bpe: Tokenizer, tmp_path: Path) -> None:
    model = small("qwen2")
    exact = model.get_input_embeddings().weight.detach().numpy().copy()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.randn(304, 64) * 0.001)
    path = write(tmp_path / "m.gguf", model, bpe, head=exact, quantized=True)
    loaded = converted(path, tmp_path / "out")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert np.array_equal(loaded.get_input_embeddings().weight.detach().numpy(), exact)


def test_another_output_matrix_stays_untied(bpe: Tokenizer, tmp_path: Path) -> None:
    model = small("llama", tied=False)
    head = model.get_output_embeddings().weight.detach().numpy()
    loaded = converted(write(tmp_path / "m.gguf", model, bpe, head=head), tmp_path / "out")
    assert not loaded.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


def test_tokenizer_splits_as_the_original(bpe: Tokenizer, tmp_path: Path) -> None:
    converted(write(tmp_path / "m.gguf", small("llama"), bpe), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == bpe.get_vocab_size(), "places that the file marks unused are left out"
    for text in ("the rain, 1234 größe\n\n\t日本 🙂", "<|im_start|>spain<|im_end|>", "  spaces  ", ""):
        assert tokenizer(text).input_ids == bpe.encode(text).ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "rain"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "rain"


def test_unknown_kinds_are_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    model = small("llama")
    with pytest.raises(ValueError, match="pre-tokenizer 'strange'; known are smollm and qwen2"):
        converted(write(tmp_path / "a.gguf", model, bpe, pre="strange"), tmp_path / "a")
    with pytest.raises(ValueError, match="architecture 'gemma3'; known are llama, qwen2"):
        converted(write(tmp_path / "b.gguf", model, bpe, architecture="gemma3"), tmp_path / "b")
    (tmp_path / "c.gguf").write_bytes(b"no such format at all")
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        converted(tmp_path / "c.gguf", tmp_path / "c")

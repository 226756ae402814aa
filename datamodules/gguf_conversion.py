"""A GGUF file into a transformers folder: config, safetensors, tokenizer, chat template.

Weights and tokenizer are built here from the fields of the file. The loaders of transformers differ from release to
release (some keep the weights packed and cannot save them), and the tokenizer they derive can have more entries than
the embedding and split text in another way.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

_ARCHITECTURES = ("llama", "qwen2")
_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# token types of the GGUF specification
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
# the published pre-tokenizer expression of Qwen2
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert_gguf(path: Path, folder: Path, *, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write model and tokenizer of a GGUF file as a transformers folder.

    Embedding and output matrix: where the file stores both, they are two roundings of one matrix in the models that
    Tenfold packages (published with tied embeddings). Both are then tied to the one that has more bits per weight,
    which also gives the published parameter count. If the two differ by more than rounding they stay apart.

    Args:
        path: the GGUF file; architecture llama or qwen2.
        folder: an existing, empty folder.
        dtype: type of the saved weights. float32 holds de-quantised values exactly.

    Raises:
        ValueError: not a GGUF file, or an architecture or a tokenizer of a kind not known here.
        ModuleNotFoundError: the package `gguf` is missing (extra `data`).
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        reader = GGUFReader(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable GGUF file: {error}") from error
    tokenizer = tokenizer_from_gguf(reader)
    config = config_from_gguf(reader)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{path}: the tokenizer has {len(tokenizer)} entries, the embedding only {config.vocab_size}")
    state = dict(_state(reader, config, getattr(torch, dtype)))
    config.tie_word_embeddings = _tie(state, reader)
    config.dtype = getattr(torch, dtype)
    special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    for key, value in special.items():
        setattr(config, key, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    with _without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def config_from_gguf(reader: "GGUFReader") -> "PreTrainedConfig":
    """The transformers config that a GGUF file describes.

    Raises:
        ValueError: an architecture other than llama and qwen2, or rotary scaling, which is not read.
    """
    from transformers import AutoConfig

    architecture = _field(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"the GGUF file has architecture {architecture!r}; known are {', '.join(_ARCHITECTURES)}")

    def field(name: str, default: Any = None) -> Any:
        return _field(reader, f"{architecture}.{name}", default)

    if field("rope.scaling.type", "none") != "none":
        raise ValueError(f"the GGUF file has rotary scaling {field('rope.scaling.type')!r}, which is not read")
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    return AutoConfig.for_model(
        architecture,
        vocab_size=int(embedding.shape[1]),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv", field("attention.head_count")),
        max_position_embeddings=field("context_length"),
        # stored as float32; the published value is the short decimal
        rms_norm_eps=float(f"{field('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base", 10000.0)},
    )


def _state(
    reader: "GGUFReader", config: "PreTrainedConfig", dtype: "torch.dtype"
) -> Iterator[tuple[str, "torch.Tensor"]]:
    import numpy as np
    import torch
    from gguf import dequantize

    for tensor in reader.tensors:
        # a file may carry the table of rotary frequencies, which follows from the config
        if tensor.name == "rope_freqs.weight":
            continue
        if tensor.name in _TOP_LEVEL:
            name, kind = _TOP_LEVEL[tensor.name], ""
        else:
            _, layer, kind, suffix = tensor.name.split(".")
            if kind not in _IN_BLOCK:
                raise ValueError(f"the GGUF file has a tensor {tensor.name!r}, which these architectures do not use")
            name = f"model.layers.{layer}.{_IN_BLOCK[kind]}.{suffix}"
        # a copy: what is stored as float32 comes back as a read-only view of the file
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if config.model_type == "llama" and kind in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
            values = _half_split_rotation(values, heads)
        yield name, values.to(dtype).contiguous()


def _half_split_rotation(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Reorder rows from the rotary layout of GGUF (pairs side by side) to that of transformers (two halves)."""
    per_head = weight.shape[0] // heads
    pairs = weight.reshape(heads, per_head // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tie(state: dict[str, "torch.Tensor"], reader: "GGUFReader") -> bool:
    """Make embedding and head one matrix where they are roundings of one; says whether they are."""
    import torch

    head, rows = state.get("lm_head.weight"), state["model.embed_tokens.weight"]
    if head is None:
        return True
    if head.shape != rows.shape:
        return False
    # rows of tokens that never occur can be anything, so the median is compared
    if torch.nn.functional.cosine_similarity(rows.float(), head.float(), dim=1).median().item() < 0.98:
        return False
    bits = {tensor.name: tensor.n_bytes / tensor.n_elements for tensor in reader.tensors}
    if bits["output.weight"] > bits["token_embd.weight"]:
        state["model.embed_tokens.weight"] = head
    return True


def _field(reader: "GGUFReader", name: str, default: Any = None) -> Any:
    found = reader.fields.get(name)
    return default if found is None else found.contents()


def tokenizer_from_gguf(reader: "GGUFReader") -> "PreTrainedTokenizerFast":
    """Byte-level BPE tokenizer from vocabulary, merges and token types of a GGUF file.

    Raises:
        ValueError: the file's tokenizer is not byte-level BPE, or its pre-tokenizer is not known here.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(name: str, default: Any = None) -> Any:
        return _field(reader, f"tokenizer.{name}", default)

    kind, pre = field("ggml.model"), field("ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(f"the GGUF file has a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') is read")
    tokens, types = field("ggml.tokens"), field("ggml.token_type")
    vocabulary = {
        token: index for index, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != _UNUSED
    }
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if pre == "smollm":
        words: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    elif pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        words = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        raise ValueError(f"the GGUF file has pre-tokenizer {pre!r}; known are smollm and qwen2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    added = zip(tokens, types, strict=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in added if k == _CONTROL])
    added = zip(tokens, types, strict=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in added if k == _USER_DEFINED])

    def token_of(role: str) -> str | None:
        index = field(f"ggml.{role}_token_id")
        return None if index is None else tokens[index]

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token_of("bos"),
        eos_token=token_of("eos"),
        unk_token=token_of("unknown"),
        pad_token=token_of("padding") or token_of("eos"),
        model_max_length=_field(reader, f"{_field(reader, 'general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = field("chat_template")
    return wrapped

"""Re-parameterise a trained MoLE: stream the routed experts' outputs for every token id into a lookup table.

The table is built by calling the training modules themselves (norm, then experts), in fp32 or better, chunk by chunk of
the vocabulary, and cast once.
"""

import copy
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels.tensor_file import TensorFileWriter
from ...kernels.tensor_file.tensor_file import ALIGNMENT_BYTES
from ..decoder.modeling import DecoderForCausalLM
from .lookup import MAGIC, TABLE_FILE, VERSION, LookupTable, MoLELookupConfig, MoLELookupForCausalLM, tensor_digest
from .modeling import MoLEFeedForward

TableDtype = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TablePlan:
    """What an export will take.

    chunk_ids: token ids per chunk; working_bytes: memory for one chunk, the model aside; file_bytes: size of the rows
    with padding; row_bytes: bytes of one row without padding.
    """

    chunk_ids: int
    working_bytes: int
    file_bytes: int
    row_bytes: int


def check_lookup_ready(model: Any) -> list[MoLEFeedForward]:
    """The MoLE layers of a model whose experts are a function of the token id alone.

    Raises:
        ValueError: no MoLE layers, or anything that changes the embedding on its way to the experts.
    """
    layers = [layer.feed_forward for layer in model.model.layers] if isinstance(model, DecoderForCausalLM) else []
    if not layers or not all(isinstance(layer, MoLEFeedForward) for layer in layers):
        slot = getattr(getattr(model, "config", None), "feed_forward", type(model).__name__)
        raise ValueError(f"only a decoder with feed_forward 'mole' has a lookup form, this one is {slot!r}")
    embedding = model.get_input_embeddings()
    noise = {
        f"embedding_dropout {model.config.embedding_dropout}": model.config.embedding_dropout > 0,
        f"an embedding of type {type(embedding).__name__}": type(embedding) is not nn.Embedding,
        "max_norm on the embedding": getattr(embedding, "max_norm", None) is not None,
        "a hook on the embedding (NEFTune or the like)": bool(embedding._forward_hooks or embedding._forward_pre_hooks),
    }
    for what, found in noise.items():
        if found:
            raise ValueError(f"the model has {what}: its experts do not depend on the token id alone; train without it")
    return layers


def plan_table(model: Any, dtype: TableDtype, memory_limit_bytes: int) -> TablePlan:
    """Chunk size, working memory and file size for a memory limit.

    Raises:
        ValueError: the limit does not hold the work for a single id.
    """
    layers, config = check_lookup_ready(model), model.config
    num_experts, width, d = layers[0].lookup.experts.up.shape
    itemsize = getattr(torch, dtype).itemsize
    compute = max(4, model.get_input_embeddings().weight.itemsize)
    row_bytes = len(layers) * num_experts * d * itemsize
    padded = -(-row_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    # per id: the row; its embedding, and the norm's temporaries; two hidden activations; two copies of one layer's
    # output. Beside them one layer's weights, which a 16-bit model needs in both types for a moment
    per_id = padded + compute * (4 * d + num_experts * (2 * width + 2 * d))
    stored = model.get_input_embeddings().weight.itemsize
    fixed = (compute if stored == compute else compute + stored) * 2 * num_experts * width * d
    if memory_limit_bytes < fixed + per_id:
        raise ValueError(
            f"the memory limit of {memory_limit_bytes} bytes is below the {fixed + per_id} that one layer's experts "
            f"and a single id need; raise it"
        )
    chunk_ids = min(config.vocab_size, (memory_limit_bytes - fixed) // per_id)
    return TablePlan(chunk_ids, fixed + chunk_ids * per_id, config.vocab_size * padded, row_bytes)


@torch.no_grad()
def table_chunks(model: Any, dtype: TableDtype, plan: TablePlan) -> Iterator[Tensor]:
    """Rows of consecutive ids in `dtype`, padded to the file's alignment: each (at most chunk_ids, padded row).

    A chunk is valid until the next one: they share their memory.

    Raises:
        ValueError: a value is not finite or outside the range of `dtype`; the message says where.
    """
    layers, embedding = check_lookup_ready(model), model.get_input_embeddings().weight
    compute = embedding.dtype if embedding.dtype in (torch.float32, torch.float64) else torch.float32
    target = getattr(torch, dtype)
    limit = torch.finfo(target).max
    num_experts, _, d = layers[0].lookup.experts.up.shape
    size = num_experts * d
    rows = torch.zeros(plan.chunk_ids, plan.file_bytes // len(embedding) // target.itemsize, dtype=target)
    for start in range(0, len(embedding), plan.chunk_ids):
        ids = embedding[start : start + plan.chunk_ids].to(compute)
        for index, layer in enumerate(layers):
            lookup = layer.lookup if embedding.dtype == compute else copy.deepcopy(layer.lookup).to(compute)
            values = lookup(ids)  # (ids, N, d)
            bad = ~(values.abs() <= limit)  # also true for nan
            if bad.any():
                row, expert, _ = bad.nonzero()[0].tolist()
                value = values[row, expert][bad[row, expert]][0].item()
                fix = "export as bfloat16 or float32" if abs(value) < float("inf") else "the weights are damaged"
                raise ValueError(
                    f"expert {expert} of layer {index} gives {value} for token id {start + row}, "
                    f"the limit of {dtype} is {limit:.4g}; {fix}"
                )
            rows[: len(ids), index * size : (index + 1) * size] = values.flatten(1)
            # the next layer's would be beside them
            del lookup, values, bad
        yield rows[: len(ids)]


def write_table(
    model: Any,
    path: Path,
    *,
    dtype: TableDtype = "bfloat16",
    memory_limit_bytes: int = 2**30,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the table file and return its metadata.

    Args:
        model: training form.
        path: final name; nothing is there before the table is complete.
        dtype: element type of the table.
        memory_limit_bytes: bound on the working memory, the model aside.
        progress: called with the number of ids just written after each chunk.

    Raises:
        ValueError: see `check_lookup_ready`, `plan_table` and `table_chunks`.
        OSError: the disk has less room than the table needs.
    """
    layers, config = check_lookup_ready(model), model.config
    plan = plan_table(model, dtype, memory_limit_bytes)
    num_experts, width, d = layers[0].lookup.experts.up.shape
    padded = plan.file_bytes // config.vocab_size // getattr(torch, dtype).itemsize
    table_inputs = {"model.embed_tokens.weight": model.get_input_embeddings().weight} | {
        f"model.layers.{index}.feed_forward.lookup.{name}": tensor
        for index, layer in enumerate(layers)
        for name, tensor in layer.lookup.named_parameters()
    }
    metadata = {
        "shape": [config.vocab_size, len(layers), num_experts, d],
        "layout": "[vocab, layer, expert, hidden]",
        "dtype": dtype,
        "expert_intermediate_size": width,
        "hidden_act": config.hidden_act,
        "norm_eps": config.norm_eps,
        "digests": {name: tensor_digest(tensor) for name, tensor in table_inputs.items()},
    }
    writer = TensorFileWriter(
        path,
        magic=MAGIC,
        version=VERSION,
        parts={"rows": (dtype, (config.vocab_size, padded)), "row_crc32": ("uint32", (config.vocab_size,))},
        metadata=metadata,
    )
    checksums: list[int] = []
    with writer:
        for rows in table_chunks(model, dtype, plan):
            writer.write("rows", rows)
            checksums += map(zlib.crc32, rows.view(torch.uint8).numpy())
            if progress is not None:
                progress(len(rows))
        writer.write("row_crc32", np.array(checksums, dtype=np.uint32))
    return metadata


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` on success and is removed on failure.

    Raises:
        ValueError: `path` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists; name a new folder or remove it")
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def export_lookup(
    model: Any,
    folder: Path,
    *,
    tokenizer: Any = None,
    dtype: TableDtype = "bfloat16",
    memory_limit_bytes: int = 2**30,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the lookup form of a model as a folder that `AutoModelForCausalLM` loads; returns the table's metadata.

    Args:
        model: training form.
        folder: new folder for `config.json`, `model.safetensors` and the table.
        tokenizer: saved beside them when given.
        dtype: element type of the table; the other weights keep theirs.
        memory_limit_bytes: bound on the working memory, the model aside.
        progress: called with the number of ids just written after each chunk.

    Raises:
        ValueError: see `write_table`; or the folder exists.
        OSError: the disk has less room than the table needs.
    """
    layers = check_lookup_ready(model)
    with new_folder(folder) as temporary:
        metadata = write_table(
            model, temporary / TABLE_FILE, dtype=dtype, memory_limit_bytes=memory_limit_bytes, progress=progress
        )
        fields = model.config.to_dict()
        for name in ("model_type", "feed_forward", "feed_forward_options", "architectures", "transformers_version"):
            fields.pop(name, None)
        config = MoLELookupConfig(**fields, num_experts=layers[0].router.out_features)
        with torch.device("meta"):
            lookup = MoLELookupForCausalLM(config)
        kept = {name: tensor for name, tensor in model.state_dict().items() if ".feed_forward.lookup." not in name}
        lookup.load_state_dict(kept, strict=True, assign=True)
        lookup.generation_config = model.generation_config
        lookup.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return metadata


@torch.no_grad()
def compare_forms(
    training: Any, lookup: Any, input_ids: Tensor, *, num_greedy_tokens: int = 0
) -> dict[str, float | int]:
    """Largest difference of logits on `input_ids` (B, T), and how many greedy tokens are the same from the start.

    The continuation runs from the first id of each sequence, with the cache, for `num_greedy_tokens` per sequence.
    """
    difference = (training(input_ids).logits - lookup(input_ids).logits).abs().max().item()
    result: dict[str, float | int] = {"max_abs_logit_diff": difference}
    if num_greedy_tokens:
        options: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": num_greedy_tokens,
            "min_new_tokens": num_greedy_tokens,
        }
        start = input_ids[:, :1]
        mask = torch.ones_like(start)
        one = training.generate(start, attention_mask=mask, **options)
        other = lookup.generate(start, attention_mask=mask, **options)
        same = (one == other)[:, 1:].long().cumprod(dim=1)
        result |= {"identical_greedy_tokens": int(same.sum()), "greedy_tokens": same.numel()}
    return result


def count_bytes_per_token(lookup: Any, token_id: int, num_tokens: int = 16) -> dict[str, float]:
    """Bytes that decoding really reads per token at batch 1, and the formula L * N * d * bytes per value."""
    table: LookupTable = lookup.model.table
    before = table.bytes_read
    start = torch.tensor([[token_id]], device=lookup.device)
    lookup.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
    )
    # the last generated token is never fed back
    return {"counted": (table.bytes_read - before) / num_tokens, "formula": table.row_bytes}

"""Re-parameterise a trained MoLE: stream the routed experts' outputs for every token id into a lookup table.

The table is built by calling the training modules themselves (norm, then experts), in fp32 or better, chunk by chunk of
the vocabulary, and cast once.
"""

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.quantised_rows import Quantisation, RowLayout
from ...kernels.tensor_file import TensorFileWriter
from ...kernels.tensor_file.tensor_file import ALIGNMENT_BYTES
from ..decoder.modeling import DecoderForCausalLM
from .adapter import ATTRIBUTE, TableSource, adapter_source
from .lookup import MoLELookupConfig, MoLELookupForCausalLM, tensor_digest
from .modeling import MoLEFeedForward
from .table import MAGIC, TABLE_FILE, VERSION, LookupTable, row_checksums, table_metadata

# temporaries per value while a layer is quantised
QUANTISING_BYTES = 24
TableDtype = Literal["float64", "float32", "bfloat16", "float16"]
ScaleDtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class TablePlan:
    """What an export will take.

    chunk_ids: token ids per chunk; working_bytes: memory for one chunk, the model aside; file_bytes: size of the rows
    with padding; layout: of one row.
    """

    chunk_ids: int
    working_bytes: int
    file_bytes: int
    layout: RowLayout

    @property
    def row_bytes(self) -> int:
        """Bytes of one row without padding."""
        return self.layout.record_bytes


class TableError:
    """What rounding or quantising did to a table, added up chunk by chunk."""

    def __init__(self) -> None:
        self._squares = self._signal = 0.0
        self.max_abs = 0.0

    def add(self, values: Tensor, stored: Tensor) -> None:
        """Compare values with what was stored for them."""
        difference = stored.to(values.dtype) - values
        self._squares += difference.square().sum(dtype=torch.float64).item()
        self._signal += values.square().sum(dtype=torch.float64).item()
        self.max_abs = max(self.max_abs, difference.abs().max().item())

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error over that of the values."""
        return (self._squares / self._signal) ** 0.5 if self._signal else 0.0


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


def table_source(model: Any) -> TableSource:
    """The source of a model's table: its MoLE layers, or the lookup experts that were added to it.

    Raises:
        ValueError: see `check_lookup_ready`.
    """
    if hasattr(model, ATTRIBUTE):
        return adapter_source(model)
    layers, config = check_lookup_ready(model), model.config
    embedding = model.get_input_embeddings().weight
    digested = {"model.embed_tokens.weight": embedding} | {
        f"model.layers.{index}.feed_forward.lookup.{name}": tensor
        for index, layer in enumerate(layers)
        for name, tensor in layer.lookup.named_parameters()
    }
    num_experts, width, d = layers[0].lookup.experts.up.shape
    settings = {"expert_intermediate_size": width, "hidden_act": config.hidden_act, "norm_eps": config.norm_eps}
    return TableSource([layer.lookup for layer in layers], embedding, (num_experts, width, d), digested, settings)


def plan_table(
    model: Any,
    dtype: TableDtype,
    memory_limit_bytes: int,
    *,
    quantisation: Quantisation = "none",
    scale_dtype: ScaleDtype = "float16",
) -> TablePlan:
    """Chunk size, working memory and file size for a memory limit.

    Raises:
        ValueError: the limit does not hold the work for a single id, or the sizes cannot be quantised.
    """
    source = table_source(model)
    num_experts, width, d = source.sizes
    layout = RowLayout.of((len(source.lookups), num_experts, d), quantisation, dtype=dtype, scale_dtype=scale_dtype)
    stored = next(source.lookups[0].parameters()).itemsize
    compute = max(4, stored)
    stride = layout.record_bytes
    if quantisation == "none":
        stride += -stride % ALIGNMENT_BYTES
    # per id: the row; its embedding, and the norm's temporaries; two hidden activations; two copies of one layer's
    # output. Beside them one layer's weights, which a 16-bit model needs in both types for a moment
    working = compute * num_experts * (2 * width + 2 * d)
    if quantisation != "none":
        # after the activations: one layer's output, scaled, as codes, as bits, and read back for the error
        working = max(working, (compute + QUANTISING_BYTES) * num_experts * d)
    per_id = stride + 4 * compute * d + working
    fixed = (compute if stored == compute else compute + stored) * 2 * num_experts * width * d
    if memory_limit_bytes < fixed + per_id:
        raise ValueError(
            f"the memory limit of {memory_limit_bytes} bytes is below the {fixed + per_id} that one layer's experts "
            f"and a single id need; raise it"
        )
    num_rows = len(source.inputs)
    chunk_ids = min(num_rows, (memory_limit_bytes - fixed) // per_id)
    return TablePlan(chunk_ids, fixed + chunk_ids * per_id, num_rows * stride, layout)


@torch.no_grad()
def table_chunks(model: Any, plan: TablePlan, *, error: TableError | None = None) -> Iterator[Tensor]:
    """Rows of consecutive ids as bytes, padded to the file's alignment: each (at most chunk_ids, padded row) uint8.

    A chunk is valid until the next one: they share their memory.

    Raises:
        ValueError: a value is not finite or outside the range of the table's type; the message says where.
    """
    source, layout = table_source(model), plan.layout
    inputs, stored = source.inputs, next(source.lookups[0].parameters()).dtype
    compute = stored if stored in (torch.float32, torch.float64) else torch.float32
    plain = layout.quantisation == "none"
    target = getattr(torch, layout.dtype if plain else "float32")
    limit = torch.finfo(target).max
    size = layout.layer_bytes
    rows = torch.zeros(plan.chunk_ids, plan.file_bytes // len(inputs), dtype=torch.uint8)
    for start in range(0, len(inputs), plan.chunk_ids):
        ids = inputs[start : start + plan.chunk_ids]
        ids = ids.to(compute) if ids.is_floating_point() else ids
        for index, module in enumerate(source.lookups):
            lookup = module if stored == compute else copy.deepcopy(module).to(compute)
            values = lookup(ids)  # (ids, N, d)
            bad = ~(values.abs() <= limit)  # also true for nan
            if bad.any():
                row, expert, _ = bad.nonzero()[0].tolist()
                value = values[row, expert][bad[row, expert]][0].item()
                fix = "export as bfloat16 or float32" if abs(value) < float("inf") else "the weights are damaged"
                raise ValueError(
                    f"expert {expert} of layer {index} gives {value} for token id {start + row}, "
                    f"the limit of {str(target).removeprefix('torch.')} is {limit:.4g}; {fix}"
                )
            part = rows[: len(ids), index * size : (index + 1) * size]
            if plain:
                part.view(target)[:] = values.flatten(1)
            else:
                part[:] = layout.encode(values)
            if error is not None:
                error.add(values, layout.decode(part))
            # the next layer's would be beside them
            del lookup, values, bad
        yield rows[: len(ids)]


def write_table(
    model: Any,
    path: Path,
    *,
    dtype: TableDtype = "bfloat16",
    quantisation: Quantisation = "none",
    scale_dtype: ScaleDtype = "float16",
    memory_limit_bytes: int = 2**30,
    progress: Callable[[int], None] | None = None,
    error: TableError | None = None,
) -> dict[str, Any]:
    """Write the table file and return its metadata.

    Args:
        model: training form.
        path: final name; nothing is there before the table is complete.
        dtype: element type of the table when it is not quantised.
        quantisation: `int8`, `nf4` (blocks of 768) or `nf3` (blocks of 128), see `RowLayout`.
        scale_dtype: type of the blocks' scales.
        memory_limit_bytes: bound on the working memory, the model aside.
        progress: called with the number of ids just written after each chunk.
        error: gets what storing did to the values.

    Raises:
        ValueError: see `check_lookup_ready`, `plan_table` and `table_chunks`.
        OSError: the disk has less room than the table needs.
    """
    source = table_source(model)
    plan = plan_table(model, dtype, memory_limit_bytes, quantisation=quantisation, scale_dtype=scale_dtype)
    layout, num_rows = plan.layout, len(source.inputs)
    digests = {name: tensor_digest(tensor) for name, tensor in source.digested.items()}
    metadata = table_metadata(num_rows, layout, layout.dtype) | source.settings | {"digests": digests}
    stride = plan.file_bytes // num_rows
    element = getattr(torch, layout.dtype)
    writer = TensorFileWriter(
        path,
        magic=MAGIC,
        version=VERSION,
        parts={
            "rows": (layout.dtype, (num_rows, stride // element.itemsize)),
            "layer_crc32": ("uint32", (num_rows, layout.num_layers)),
        },
        metadata=metadata,
    )
    checksums: list[Any] = []
    with writer:
        for rows in table_chunks(model, plan, error=error):
            writer.write("rows", rows.view(element))
            checksums.append(row_checksums(rows, layout))
            if progress is not None:
                progress(len(rows))
        for part in checksums:
            writer.write("layer_crc32", part)
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
    quantisation: Quantisation = "none",
    **options: Any,
) -> dict[str, Any]:
    """Write the lookup form of a model as a folder that `AutoModelForCausalLM` loads; returns the table's metadata.

    Args:
        model: training form.
        folder: new folder for `config.json`, `model.safetensors` and the table.
        tokenizer: saved beside them when given.
        quantisation: of the table; the other weights keep their type.
        **options: as for `write_table`.

    Raises:
        ValueError: see `write_table`; or the folder exists.
        OSError: the disk has less room than the table needs.
    """
    layers = check_lookup_ready(model)
    with new_folder(folder) as temporary:
        metadata = write_table(model, temporary / TABLE_FILE, quantisation=quantisation, **options)
        fields = model.config.to_dict()
        for name in ("model_type", "feed_forward", "feed_forward_options", "architectures", "transformers_version"):
            fields.pop(name, None)
        num_experts = layers[0].router.out_features
        config = MoLELookupConfig(**fields, num_experts=num_experts, table_quantisation=quantisation)
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


@torch.no_grad()
def compare_loss(training: Any, lookup: Any, sequences: Iterable[Tensor]) -> dict[str, float]:
    """Next-token loss in nats of both forms on token sequences (T,), mean over all predicted tokens."""
    sums = {"experts": 0.0, "lookup": 0.0}
    count = 0
    for sequence in sequences:
        ids = sequence.unsqueeze(0).to(training.device)
        for name, model in (("experts", training), ("lookup", lookup)):
            logits = model(ids).logits[0, :-1].float()
            sums[name] += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return {name: total / count for name, total in sums.items()}


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

"""The decoders that `tenfold bench mole` compares, random weights, with tables and experts in files."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...kernels.quantised_rows import RowLayout
from ...kernels.tensor_file import TensorFileWriter
from ...lightning_modules.decoder import DecoderForCausalLM, decoder_config
from ...lightning_modules.mole.lookup import MoLELookupConfig, MoLELookupForCausalLM
from ...lightning_modules.mole.offloaded_experts import ExpertCache, offload_experts, write_experts
from ...lightning_modules.mole.table import MAGIC, VERSION, LookupTable, row_checksums, table_metadata
from .number_formats import compute_dtype, dtype_name

# rows of a benchmark's table repeat after so many: their content does not matter, their place does
DIFFERENT_ROWS = 256


class Rival(NamedTuple):
    """A model, and where it reads from while it runs, if anywhere."""

    model: Any
    source: Any


def write_random_table(path: Path, config: Any, num_experts: int, *, seed: int) -> LookupTable:
    """A table file of a configuration's size."""
    element, dtype = compute_dtype(), dtype_name()
    layout = RowLayout.of((config.num_hidden_layers, num_experts, config.hidden_size), dtype=dtype)
    stride = layout.record_bytes + -layout.record_bytes % 4096
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(DIFFERENT_ROWS, layout.record_bytes // element.itemsize, generator=generator) * 0.02
    rows = torch.zeros(DIFFERENT_ROWS, stride // element.itemsize, dtype=element)
    rows[:, : values.shape[1]] = values
    checksums = row_checksums(rows.view(torch.uint8), layout)
    writer = TensorFileWriter(
        path,
        magic=MAGIC,
        version=VERSION,
        parts={
            "rows": (dtype, (config.vocab_size, rows.shape[1])),
            "layer_crc32": ("uint32", (config.vocab_size, layout.num_layers)),
        },
        metadata=table_metadata(config.vocab_size, layout, dtype),
    )
    counts = [min(DIFFERENT_ROWS, config.vocab_size - at) for at in range(0, config.vocab_size, DIFFERENT_ROWS)]
    with writer:
        for count in counts:
            writer.write("rows", rows[:count])
        for count in counts:
            writer.write("layer_crc32", checksums[:count])
    return LookupTable.open(path)


def dense_model(preset: str, **fields: Any) -> DecoderForCausalLM:
    """A dense decoder in evaluation mode."""
    model: Any = DecoderForCausalLM(decoder_config(preset, **fields))
    return model.to(compute_dtype()).eval()


def lookup_model(dense: DecoderForCausalLM, path: Path, num_experts: int, storage: Any) -> Rival:
    """The dense decoder's weights with a router per layer and a table: what a step computes beside the dense model."""
    fields = dense.config.to_dict()
    for name in ("model_type", "feed_forward", "feed_forward_options", "architectures", "transformers_version"):
        fields.pop(name, None)
    # the routers are drawn here, and must be the same whatever the storage
    torch.manual_seed(0)
    model: Any = MoLELookupForCausalLM(MoLELookupConfig(**fields, num_experts=num_experts))
    model.to(compute_dtype())
    own = {name.replace(".feed_forward.", ".feed_forward.shared."): value for name, value in dense.state_dict().items()}
    model.load_state_dict(own, strict=False, assign=True)
    table = LookupTable.open(path, storage)
    model.attach_table(table)
    return Rival(model.eval(), table.source)


def moe_model(preset: str, path: Path | None, **fields: Any) -> DecoderForCausalLM:
    """A MoE decoder; its experts are also written to a file."""
    model: Any = DecoderForCausalLM(decoder_config(preset, **fields))
    model.to(compute_dtype()).eval()
    if path is not None:
        write_experts(model, path)
    return model


def offloaded_model(resident: DecoderForCausalLM, path: Path, **options: Any) -> tuple[Rival, ExpertCache]:
    """The MoE decoder again, all but its experts shared with the resident one, these read from the file."""
    config: Any = resident.config
    with torch.device("meta"):
        model: Any = DecoderForCausalLM(config)
    model.load_state_dict(resident.state_dict(), assign=True)
    # buffers are no part of the state, and were made on no device
    model.model.rotary = resident.model.rotary
    cache = offload_experts(model.eval(), path, **options)
    return Rival(model, cache.source), cache

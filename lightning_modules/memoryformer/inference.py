"""MemoryFormer for inference: tables as float16 or 8-bit rows, in a model folder of its own type."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ...kernels.hash_gather import dequantise_rows
from ..decoder.configuration import DecoderConfig
from ..decoder.modeling import DecoderForCausalLM, DecoderModel
from .host_tables import RecordFiles
from .layer import MemoryLayer

TableStorage = Literal["device", "memory", "mmap"]
StoredFormat = Literal["float16", "int8"]
HUB_OPTIONS = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")


_STORAGE: ContextVar[TableStorage | None] = ContextVar("memory_table_storage", default=None)


@contextmanager
def table_storage(storage: TableStorage) -> Iterator[None]:
    """Tables of models that are loaded meanwhile lie there, whatever their configuration says."""
    token = _STORAGE.set(storage)
    try:
        yield
    finally:
        _STORAGE.reset(token)


def _check_storage(storage: str) -> None:
    if storage in ("pinned", "direct"):
        raise ValueError(
            f"storage {storage!r} is for MoLE's tables, whose rows are known before the first layer; those of "
            f"MemoryFormer are gathered by the CPU: use 'memory' or 'mmap'"
        )
    if storage not in get_args(TableStorage):
        raise ValueError(f"table_storage {storage!r} is not one of {', '.join(get_args(TableStorage))}")


class MemoryFormerConfig(DecoderConfig):
    """A `DecoderConfig` whose memory layers hold their tables as bytes.

    Args:
        table_format: `float16`, or `int8` for rows of 8-bit codes with a scale and an offset each.
        table_storage: `device` has tables beside the other weights; `memory` in host memory, `mmap` in the file behind
            a memory map, where the CPU gathers from them wherever the rest of the model is.

    Raises:
        ValueError: an unknown format or storage.
    """

    model_type = "tenfold-memoryformer"

    projection: str = "memory"
    feed_forward: str = "memory"
    table_format: str = "int8"
    table_storage: str = "device"

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the format's name, then the decoder's fields."""
        if self.table_format not in get_args(StoredFormat):
            raise ValueError(f"table_format {self.table_format!r} is not one of {', '.join(get_args(StoredFormat))}")
        _check_storage(self.table_storage)
        super().__post_init__(**kwargs)


class MemoryFormerModel(DecoderModel):
    """The decoder without its output layer.

    Args:
        config: sizes and format.
    """

    config_class = MemoryFormerConfig


class MemoryFormerForCausalLM(DecoderForCausalLM):
    """MemoryFormer in its inference form; loads with `AutoModelForCausalLM` and is strict about its files.

    Args:
        config: sizes and format.
    """

    config_class = MemoryFormerConfig
    _model_class = MemoryFormerModel

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load the model.

        Raises:
            ValueError: a table is missing, or has another size or form than the configuration says.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True
        storage = _STORAGE.get()
        if storage is not None and isinstance(kwargs.get("config"), MemoryFormerConfig):
            kwargs["config"].table_storage = storage
        elif storage is not None:
            kwargs["table_storage"] = storage
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        _check_storage(model.config.table_storage)
        on_host = model.config.table_storage != "device"
        for problem in ("mismatched", "missing", "unexpected"):
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info[f"{problem}_keys"])
            # tables on the host are left to us
            names = [name for name in names if not (on_host and problem == "unexpected" and name.endswith(".records"))]
            if names:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {len(names)} weights are {problem} for its configuration, first "
                    f"{names[0]}; take configuration and tables from the same `tenfold export`"
                )
        if on_host:
            options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
            model._open_tables(RecordFiles.find(str(pretrained_model_name_or_path), **options))
        return loaded if with_info else model

    def _open_tables(self, files: RecordFiles) -> None:
        """Give every memory layer its table, in memory or mapped.

        Raises:
            ValueError: one is missing or has another size.
        """
        for name, layer in memory_layers(self).items():
            layer.hold_on_host(files.records(f"{name}.records", layer.records_shape, self.config.table_storage))

    def use_storage(self, storage: TableStorage) -> None:
        """Check that tables lie where a caller wants them.

        Raises:
            ValueError: they lie elsewhere; where they lie is said when the model is loaded.
        """
        _check_storage(storage)
        if storage != self.config.table_storage:
            raise ValueError(
                f"the tables of this model are in {self.config.table_storage!r}; load it with table_storage={storage!r}"
            )


def memory_layers(model: Any) -> dict[str, MemoryLayer]:
    """The memory layers of a model by name.

    Raises:
        ValueError: there are none, or they are not trainable tables.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MemoryLayer)}
    if not layers or not isinstance(model, DecoderForCausalLM):
        slot = getattr(getattr(model, "config", None), "feed_forward", type(model).__name__)
        raise ValueError(f"only a decoder with memory layers has quantised tables, this one has feed_forward {slot!r}")
    return layers


@torch.no_grad()
def export_tables(
    model: Any, folder: str | os.PathLike[str], *, table_format: StoredFormat = "int8", tokenizer: Any = None
) -> dict[str, float]:
    """Write a trained MemoryFormer with stored tables as a folder that `AutoModelForCausalLM` loads.

    Args:
        model: training form.
        folder: an existing, empty folder.
        table_format: of the tables; the other weights keep their type.
        tokenizer: saved beside the model when given.

    Returns:
        `table_bytes`, `training_table_bytes` and `relative_rms_error` of the stored values.

    Raises:
        ValueError: no memory layers, or values that the format can't hold.
    """
    if table_format not in get_args(StoredFormat):
        raise ValueError(f"table_format {table_format!r} is not one of {', '.join(get_args(StoredFormat))}")
    layers = memory_layers(model)
    fields = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "table_format", "table_storage"):
        fields.pop(name, None)
    with torch.device("meta"):
        stored = MemoryFormerForCausalLM(MemoryFormerConfig(**fields, table_format=table_format))
    state = model.state_dict()
    squares = signal = 0.0
    before = after = 0
    for name, layer in layers.items():
        table = state.pop(f"{name}.table", None)
        records = layer.encode(table_format)
        assert table is not None
        before, after = before + table.nbytes, after + records.nbytes
        for start in range(0, len(table), 4096):
            values, part = table[start : start + 4096].double(), records[start : start + 4096]
            difference = decode(part, table_format).double() - values
            squares += difference.square().sum().item()
            signal += values.square().sum().item()
        state[f"{name}.records"] = records
    stored.load_state_dict(state, strict=True, assign=True)
    stored.generation_config = model.generation_config
    stored.save_pretrained(Path(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(Path(folder))
    error = (squares / signal) ** 0.5 if signal else 0.0
    return {"table_bytes": after, "training_table_bytes": before, "relative_rms_error": error}


def decode(records: torch.Tensor, table_format: StoredFormat) -> torch.Tensor:
    """Rows (R, bytes) uint8 as values (R, H)."""
    return dequantise_rows(records) if table_format == "int8" else records.view(torch.float16)


AutoConfig.register(MemoryFormerConfig.model_type, MemoryFormerConfig, exist_ok=True)
AutoModel.register(MemoryFormerConfig, MemoryFormerModel, exist_ok=True)
AutoModelForCausalLM.register(MemoryFormerConfig, MemoryFormerForCausalLM, exist_ok=True)

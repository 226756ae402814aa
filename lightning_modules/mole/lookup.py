"""MoLE in its lookup form: routed experts replaced by rows of a table on disk or in memory (arXiv 2503.15798, 3.3).

`table[i, l, j, :]` is what expert j of layer l gives for token id i. The row of one id is contiguous and starts on a
page of the file, so one token needs one read, known before the first layer runs.
"""

import hashlib
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import cached_file

from ...kernels.tensor_file import TensorFile
from ..decoder.configuration import DecoderConfig
from ..decoder.feed_forward import DenseFeedForward
from ..decoder.modeling import DecoderForCausalLM, DecoderModel
from ..decoder.slots import FEED_FORWARDS
from ..decoder.tokens import TokenContext
from .modeling import combine, router_gates

TABLE_FILE = "lookup_table.tenfold"
MAGIC = b"TF-MoLE\0"
VERSION = 1
EMBEDDING = "model.embed_tokens.weight"
HUB_OPTIONS = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")
# above this many bytes of distinct rows in one forward pass, each layer reads its own slice of the rows
WHOLE_ROWS_LIMIT_BYTES = 2**30


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values, row-major, with its dtype and shape."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype}{tuple(flat.shape)}".encode())
    digest.update(memoryview(flat.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


class LookupTable:
    """Rows by token id, with a count of the bytes that were read.

    Args:
        file: an opened table file.
        storage: `memory` reads the whole table and checks it; `mmap` leaves it on disk, reads the pages of the rows
            that are asked for, and checks a row when it is first read.
    """

    def __init__(self, file: TensorFile, storage: Literal["memory", "mmap"]) -> None:
        if storage not in ("memory", "mmap"):
            raise ValueError(f"table_storage {storage!r} is neither 'memory' nor 'mmap'")
        self.path, self.metadata, self.storage = file.path, file.metadata, storage
        self._file = file
        padded = file.read("rows") if storage == "memory" else file.memory_map("rows")  # (V, padded row)
        self._row_bytes = padded.view(torch.uint8).numpy()
        self._row_checksums = file.read("row_crc32").numpy()
        # a table in memory was checked as a whole
        self._checked = np.full(len(padded), storage == "memory")
        num_layers, num_experts, hidden_size = self.metadata["shape"][1:]
        row = num_layers * num_experts * hidden_size
        self.values = padded[:, :row].unflatten(1, (num_layers, num_experts, hidden_size))  # (V, L, N, d)
        self.bytes_read = 0

    @classmethod
    def open(cls, path: str | os.PathLike[str], storage: Literal["memory", "mmap"] = "mmap") -> Self:
        """Open a table file.

        Raises:
            ValueError: another kind of file, truncated or altered.
            FileNotFoundError: there is none.
        """
        return cls(TensorFile(path, magic=MAGIC, version=VERSION), storage)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Vocabulary rows, layers, experts, width."""
        return tuple(self.metadata["shape"])

    @property
    def row_bytes(self) -> int:
        """Bytes read for one token: L * N * d * bytes per value."""
        return self.values[0].numel() * self.values.itemsize

    def rows(self, ids: Tensor, layer: int | None = None) -> Tensor:
        """Rows of distinct ids: (U,) to (U, L, N, d), or to (U, N, d) for one layer. Counts the bytes.

        Raises:
            ValueError: a memory-mapped row is not the one that was written.
        """
        index = ids.cpu()
        self._check_rows(index.numpy())
        rows = self.values[index] if layer is None else self.values[index, layer]
        self.bytes_read += rows.numel() * rows.itemsize
        return rows

    def _check_rows(self, ids: np.ndarray) -> None:
        for index in ids[~self._checked[ids]].tolist():
            if zlib.crc32(self._row_bytes[index]) != self._row_checksums[index]:
                raise ValueError(
                    f"{self.path}: the row of token id {index} fails its checksum: altered; export the table again"
                )
            self._checked[index] = True

    def verify(self) -> None:
        """Read the whole file once and compare its checksums.

        Raises:
            ValueError: a part of it differs.
        """
        self._file.verify()


class MoLELookupConfig(DecoderConfig):
    """A `DecoderConfig` whose routed experts come from `lookup_table.tenfold` in the model's folder.

    Args:
        num_experts: routed experts per layer, N.
        table_storage: `mmap` leaves the table on disk, `memory` reads it whole.
    """

    model_type = "tenfold-mole-lookup"

    feed_forward: str = "mole_lookup"
    num_experts: int = 4
    table_storage: str = "mmap"


class MoLELookupFeedForward(nn.Module):
    """`shared(u) + sum_j g_j(u) row[l, j]`: the router and the shared expert stay, the routed experts are read.

    Args:
        config: sizes.
        layer_index: place in the stack.
    """

    def __init__(self, config: MoLELookupConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.shared = DenseFeedForward(config, layer_index)
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, hidden_states: Tensor, tokens: TokenContext) -> Tensor:
        """Map the normalised residual stream (B, T, d) to (B, T, d)."""
        gates = router_gates(self.router, hidden_states)  # (B, T, N)
        shared = self.shared(hidden_states)
        values = tokens.shared["rows"](self.layer_index).to(shared.dtype)  # (U, N, d)
        return shared + combine(values, gates, tokens).view(shared.shape).to(shared.dtype)


class MoLELookupModel(DecoderModel):
    """The decoder without its output layer, with a table attached.

    Args:
        config: sizes.
    """

    config_class = MoLELookupConfig

    def __init__(self, config: MoLELookupConfig) -> None:
        super().__init__(config)
        self.table: LookupTable | None = None

    def token_context(
        self, input_ids: Tensor | None, embeddings: Tensor, attention_mask: Tensor | None
    ) -> TokenContext:
        """Ask for all rows of the pass before the first layer runs.

        Raises:
            ValueError: embeddings without ids, or no table attached.
        """
        if input_ids is None:
            raise ValueError(
                "the lookup form of MoLE reads its experts by token id and takes no inputs_embeds; "
                "pass input_ids, or use the training form"
            )
        table = self.table
        if table is None:
            raise ValueError("no lookup table is attached; load the model with from_pretrained or call attach_table")
        tokens = super().token_context(input_ids, embeddings, attention_mask)
        ids, device = tokens.distinct.ids, embeddings.device
        if len(ids) * table.row_bytes <= WHOLE_ROWS_LIMIT_BYTES:
            rows = table.rows(ids).to(device)
            tokens.shared["rows"] = lambda layer: rows[:, layer]
        else:
            tokens.shared["rows"] = lambda layer: table.rows(ids, layer).to(device)
        return tokens


class MoLELookupForCausalLM(DecoderForCausalLM):
    """MoLE after re-parameterisation. `AutoModelForCausalLM.from_pretrained(folder, table_storage="memory")` loads it.

    Args:
        config: sizes.
    """

    config_class = MoLELookupConfig
    _model_class = MoLELookupModel

    def attach_table(self, table: LookupTable) -> None:
        """Use this table.

        Raises:
            ValueError: its vocabulary, layers, experts or width are not the model's.
        """
        config = self.config
        expected = (config.vocab_size, config.num_hidden_layers, config.num_experts, config.hidden_size)
        if table.shape != expected:
            raise ValueError(
                f"{table.path} holds [vocabulary, layers, experts, width] {list(table.shape)}, the model needs "
                f"{list(expected)}; export the table from this model"
            )
        self.model.table = table

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load the model and open its table; strict about both (see `attach_table` and `LookupTable.open`).

        Raises:
            ValueError: the table is missing, altered, of another shape, or was made from another embedding; or the
                other weights are not those of the configuration.
        """
        with_info = kwargs.pop("output_loading_info", False)
        location = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        folder = str(pretrained_model_name_or_path)
        for problem in ("missing", "unexpected", "mismatched"):
            names = sorted(str(name) for name in info[f"{problem}_keys"])
            if names:
                raise ValueError(f"{folder} has {problem} weights for its configuration: {', '.join(names[:3])}")
        path: str | None
        if os.path.isdir(folder):
            path = os.path.join(folder, location.get("subfolder", ""), TABLE_FILE)
        else:
            path = cached_file(folder, TABLE_FILE, _raise_exceptions_for_missing_entries=False, **location)
        if path is None or not os.path.isfile(path):
            raise ValueError(f"{folder} has no {TABLE_FILE}; make it with `tenfold export --form lookup`")
        table = LookupTable.open(path, model.config.table_storage)
        model.attach_table(table)
        check_embedding(Path(path).parent, table)
        return loaded if with_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the model and put its table beside it (a hard link where the file system allows one).

        Raises:
            ValueError: the embedding was trained or cast since the table was made.
        """
        table = self.model.table
        if table is None:
            return super().save_pretrained(save_directory, *args, **kwargs)
        embedding: Any = self.get_input_embeddings()
        if tensor_digest(embedding.weight) != table.metadata["digests"][EMBEDDING]:
            raise ValueError(
                f"the embedding is not the one that {table.path} was made from: it was trained or cast since; load the "
                f"model without dtype to save it, or export the training form again"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / TABLE_FILE
        if not kwargs.get("is_main_process", True) or (target.exists() and target.samefile(table.path)):
            return None
        # the name is taken over by a whole file only
        temporary = target.with_name(f".{TABLE_FILE}.{os.getpid()}.tmp")
        try:
            try:
                os.link(table.path, temporary)
            except OSError:
                shutil.copyfile(table.path, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return None


def check_embedding(folder: Path, table: LookupTable) -> None:
    """Compare the saved embedding with the one that the table was made from.

    Raises:
        ValueError: they differ, so that the table is stale.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if EMBEDDING in file.keys():  # noqa: SIM118 (not a dict)
                if tensor_digest(file.get_tensor(EMBEDDING)) != table.metadata["digests"][EMBEDDING]:
                    raise ValueError(
                        f"{table.path} was made from another embedding than {path.name} holds; export the table again"
                    )
                return
    raise ValueError(f"no safetensors file in {folder} holds {EMBEDDING}, which {table.path.name} is checked against")


FEED_FORWARDS.register("mole_lookup")(MoLELookupFeedForward)
AutoConfig.register(MoLELookupConfig.model_type, MoLELookupConfig, exist_ok=True)
AutoModel.register(MoLELookupConfig, MoLELookupModel, exist_ok=True)
AutoModelForCausalLM.register(MoLELookupConfig, MoLELookupForCausalLM, exist_ok=True)

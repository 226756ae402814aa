"""MoLE in its lookup form: routed experts replaced by rows of a table on disk or in memory (arXiv 2503.15798, 3.3)."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import cached_file

from ...kernels.row_storage import STORAGES, Storage
from ..decoder.configuration import DecoderConfig
from ..decoder.feed_forward import DenseFeedForward
from ..decoder.modeling import DecoderForCausalLM, DecoderModel
from ..decoder.slots import FEED_FORWARDS
from ..decoder.tokens import TokenContext
from .modeling import router_gates
from .table import TABLE_FILE, LookupTable
from .table_pass import begin_pass

EMBEDDING = "model.embed_tokens.weight"
HUB_OPTIONS = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values, row-major, with its dtype and shape."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype}{tuple(flat.shape)}".encode())
    digest.update(memoryview(flat.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


_STORAGE: ContextVar[Storage | None] = ContextVar("table_storage", default=None)


@contextmanager
def table_storage(storage: Storage) -> Iterator[None]:
    """Tables of models that are loaded meanwhile are read from here, whatever their configuration says."""
    token = _STORAGE.set(storage)
    try:
        yield
    finally:
        _STORAGE.reset(token)


class MoLELookupConfig(DecoderConfig):
    """A `DecoderConfig` whose routed experts come from `lookup_table.tenfold` in the model's folder.

    Args:
        num_experts: routed experts per layer, N.
        table_storage: where rows are read from: `memory`, `pinned`, `mmap` or `direct`, see `LookupTable`.
        table_quantisation: how the table is stored: `none`, `int8`, `nf4` or `nf3`.

    Raises:
        ValueError: an unknown storage.
    """

    model_type = "tenfold-mole-lookup"

    feed_forward: str = "mole_lookup"
    num_experts: int = 4
    table_storage: str = "mmap"
    table_quantisation: str = "none"

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the storage's name, then the decoder's fields."""
        if self.table_storage not in STORAGES:
            raise ValueError(f"table_storage {self.table_storage!r} is not one of {', '.join(STORAGES)}")
        super().__post_init__(**kwargs)


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
        routed = tokens.shared["routed"](self.layer_index, gates.reshape(-1, gates.shape[-1]))
        return shared + routed.view(shared.shape).to(shared.dtype)


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
        num_rows = len(self.get_input_embeddings().weight)  # type: ignore[arg-type]
        if num_rows != table.shape[0]:
            raise ValueError(
                f"the embedding has {num_rows} rows, the table {table.shape[0]}: the vocabulary was resized after the "
                f"export; resize the training form and export it again"
            )
        tokens = super().token_context(input_ids, embeddings, attention_mask)
        tokens.shared["routed"] = begin_pass(table, input_ids.reshape(-1), embeddings.device)
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
            ValueError: its quantisation, vocabulary, layers, experts or width are not the model's.
        """
        config = self.config
        expected = (config.vocab_size, config.num_hidden_layers, config.num_experts, config.hidden_size)
        stored = table.layout.quantisation
        if stored != config.table_quantisation:
            raise ValueError(
                f"{table.path} is quantised as {stored!r}, the model's configuration says "
                f"{config.table_quantisation!r}; take configuration and table from the same export"
            )
        if table.shape != expected:
            raise ValueError(
                f"{table.path} holds [vocabulary, layers, experts, width] {list(table.shape)}, the model needs "
                f"{list(expected)}; export the table from this model"
            )
        self.model.table = table

    def use_storage(self, storage: Storage, *, pinned_limit_bytes: int | None = None) -> None:
        """Read the table from another place from now on; the count of bytes begins anew.

        Raises:
            ValueError: an unknown storage, or memory that cannot be locked.
        """
        before = self.model.table
        if before is None:
            raise ValueError("no lookup table is attached; load the model with from_pretrained or call attach_table")
        self.attach_table(LookupTable.open(before.path, storage, pinned_limit_bytes=pinned_limit_bytes))
        before.close()

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
        table = LookupTable.open(path, _STORAGE.get() or model.config.table_storage)
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

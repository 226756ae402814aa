"""A model with added lookup experts as a folder: the plain model, the routers, and the table beside them."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ...kernels.row_storage import Storage
from .adapter import ATTRIBUTE, KEY_EMBEDDING, AdaptedFeedForward, AdapterConfig, adapted_layers, add_lookup_experts
from .convert import new_folder, write_table
from .lookup import tensor_digest
from .table import TABLE_FILE, LookupTable

CONFIG_FILE, ROUTERS_FILE = "lookup_adapter.json", "lookup_routers.safetensors"


def export_adapted(model: Any, folder: Path, *, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    """Write a model with added experts: `config.json` and weights of the plain model, the routers, and the table.

    The folder also loads as the plain model, without its experts, with any `from_pretrained`.

    Args:
        model: from `add_lookup_experts`, trained.
        folder: new folder.
        tokenizer: saved beside it when given.
        **options: as for `write_table`.

    Returns:
        The table's metadata.

    Raises:
        ValueError: no experts were added; see also `write_table`.
        OSError: the disk has less room than the table needs.
    """
    layers = adapted_layers(model)
    config: AdapterConfig = getattr(model, ATTRIBUTE).config
    with new_folder(folder) as temporary:
        metadata = write_table(model, temporary / TABLE_FILE, **options)
        plain = {
            name.replace(".base.", "."): tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(ATTRIBUTE) and not _is_added(name, model)
        }
        model.save_pretrained(temporary, state_dict=plain)
        save_file(
            {str(layer.place): layer.router.weight.detach().contiguous() for layer in layers}, temporary / ROUTERS_FILE
        )
        (temporary / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return metadata


def _is_added(name: str, model: Any) -> bool:
    path = name.split(".")
    for end, part in enumerate(path[1:], start=1):
        if part in ("router", "lookup"):
            return isinstance(model.get_submodule(".".join(path[:end])), AdaptedFeedForward)
    return False


def load_adapted(folder: Path, *, storage: Storage = "mmap", **options: Any) -> Any:
    """Load what `export_adapted` wrote; experts are read from the table.

    Args:
        folder: the folder.
        storage: where rows are read from, see `LookupTable`.
        **options: for `from_pretrained`.

    Raises:
        ValueError: the table is of another model, or stale.
        FileNotFoundError: a file is missing.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it is no model with added lookup experts")
    fields = json.loads(path.read_text(encoding="utf-8"))
    config = AdapterConfig(**(fields | {"layers": fields["layers"] and tuple(fields["layers"])}))
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    table = LookupTable.open(folder / TABLE_FILE, storage)
    if table.metadata["adapter"] != json.loads(json.dumps(config.to_dict())):
        raise ValueError(f"{table.path} was made with other settings than {CONFIG_FILE} says; export the model again")
    embedding: Any = model.get_input_embeddings().weight
    stated = table.metadata["digests"].get(KEY_EMBEDDING)
    if config.key == "token_id":
        if len(embedding) != table.shape[0]:
            raise ValueError(
                f"the embedding has {len(embedding)} rows, the table {table.shape[0]}: the vocabulary was resized "
                f"after the export; export the trained model again"
            )
        # a model that is cast on loading cannot be compared
        if stated is not None and "dtype" not in options and tensor_digest(embedding) != stated:
            raise ValueError(f"{table.path} was made from another embedding than the model has; export it again")
    adapter = add_lookup_experts(model, config)
    routers = load_file(folder / ROUTERS_FILE)
    adapter.table, adapter.key_embedding = table, None
    for layer in adapted_layers(model):
        layer.lookup = None
        layer.router.weight.data.copy_(routers[str(layer.place)])
    return model.eval()

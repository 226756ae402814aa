"""What each trained form costs: parameters, bytes on disk, bytes and time per decoded token."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ..model_source import load_source

NUM_TOKENS = 64
NUM_REPEATS = 7


def storage_bytes(folder: Path) -> int:
    """Bytes of weights and tables in a model folder."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.tenfold") for file in folder.glob(pattern))


def activated_parameters(model: Any) -> int:
    """Parameters that one decoded token is multiplied with; of the embedding, one row; tables count as nothing."""
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        total -= embedding.numel() - embedding.shape[1]
    for layer in model.model.layers:
        experts = getattr(layer.feed_forward, "experts", None)
        if experts is not None:
            num_experts, top_k = layer.feed_forward.num_experts, layer.feed_forward.top_k
            total -= sum(p.numel() for p in experts.parameters()) * (num_experts - top_k) // num_experts
    return total


def table_bytes(model: Any) -> int:
    """Bytes of a lookup table that one token reads; 0 for the other forms."""
    table = getattr(model.model, "table", None)
    return 0 if table is None else table.row_bytes


@torch.no_grad()
def decode_ms_per_token(models: dict[str, Any], device: str = "cpu") -> dict[str, dict[str, float]]:
    """Milliseconds per token of greedy decoding at batch 1: median and quartile range, the forms taking turns."""

    def once(model: Any) -> float:
        start = torch.zeros(1, 1, dtype=torch.long, device=device)
        begin = time.perf_counter()
        model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            min_new_tokens=NUM_TOKENS,
            max_new_tokens=NUM_TOKENS,
        )
        return (time.perf_counter() - begin) * 1000 / NUM_TOKENS

    for model in models.values():
        once(model)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(NUM_REPEATS):
        for name, model in models.items():
            times[name].append(once(model))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: {"median": q[1], "spread": q[2] - q[0]} for name, q in quartiles.items()}


def measure_forms(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Costs of each form by name."""
    models = {name: load_source(str(folder)).model for name, folder in folders.items()}
    times = decode_ms_per_token(models)
    return {
        name: {
            "parameters": sum(p.numel() for p in model.parameters()),
            "activated_parameters": activated_parameters(model),
            "storage_bytes": storage_bytes(folders[name]),
            "table_bytes_per_token": table_bytes(model),
            "decode_ms_per_token": times[name],
        }
        for name, model in models.items()
    }

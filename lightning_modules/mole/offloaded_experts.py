"""The rival: a sparse mixture of experts whose experts stay on disk, read through the same storages as MoLE's tables.

What systems for offloaded experts do is done here: an LRU cache of experts per layer, reads of what a layer lacks while
the experts at hand compute, and reads for the next layer ahead of time, guessed with that layer's router on this
layer's hidden state (arXiv 2312.17238, section 3.2).
"""

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.row_storage import PendingRows, RowRegion, RowStorage, Storage, open_rows
from ...kernels.row_storage.direct import aligned_buffer
from ...kernels.tensor_file import TensorFile, TensorFileWriter
from ...kernels.tensor_file.tensor_file import ALIGNMENT_BYTES
from ..decoder.feed_forward import MoEFeedForward
from ..decoder.modeling import DecoderForCausalLM
from ..decoder.tokens import TokenContext

MAGIC = b"TF-MoEX\0"
VERSION = 1
# one expert is read by several threads, in pieces of this size
PIECE_BYTES = 2**20


class _Entry(NamedTuple):
    buffer: np.ndarray
    pending: PendingRows


class ExpertCache:
    """Experts by layer and number: the most recently used of each layer in memory, the others read on demand.

    Args:
        source: records `layer * num_experts + expert`, each an expert's `up` (D, d) and then its `down` (d, D).
        sizes: layers, experts, d and D.
        dtype: of the weights.
        capacity: experts kept in memory per layer; a step that needs more holds them while the layer runs.
    """

    def __init__(
        self, source: RowStorage, sizes: tuple[int, int, int, int], dtype: torch.dtype, *, capacity: int
    ) -> None:
        if capacity < 0:
            raise ValueError(f"capacity {capacity} is below 0")
        self.source, self.sizes, self.dtype, self.capacity = source, sizes, dtype, capacity
        self._entries: list[OrderedDict[int, _Entry]] = [OrderedDict() for _ in range(sizes[0])]
        self.hits = self.misses = 0

    def fetch(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Begin to read the experts that are not in memory; returns these. All become the most recently used."""
        entries, missing = self._entries[layer], []
        row_bytes = self.source.region.row_bytes
        for expert in experts:
            if expert not in entries:
                buffer = aligned_buffer(1, row_bytes)
                number = np.array([layer * self.sizes[1] + expert])
                cuts = range(PIECE_BYTES, row_bytes, PIECE_BYTES)
                entries[expert] = _Entry(buffer, self.source.request(number, buffer, cuts=cuts))
                missing.append(expert)
            entries.move_to_end(expert)
        return missing

    def weights(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """`up` and `down` of an expert that was fetched; waits for them."""
        entry = self._entries[layer][expert]
        entry.pending.wait()
        return self._split(torch.from_numpy(entry.buffer[0]))

    def _split(self, record: Tensor) -> tuple[Tensor, Tensor]:
        _, _, d, width = self.sizes
        up, down = record.view(self.dtype)[: 2 * width * d].split(width * d)
        return up.view(width, d), down.view(d, width)

    def release(self, layer: int) -> None:
        """Forget the least recently used experts of a layer beyond the capacity."""
        entries = self._entries[layer]
        while len(entries) > self.capacity:
            _, entry = entries.popitem(last=False)
            # its buffer must not be given back while a thread writes to it
            entry.pending.wait()


class InPlaceExperts(ExpertCache):
    """Experts used where the memory map has them: the system's file cache is the cache, and nothing is copied."""

    def fetch(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Let the system begin to read the experts."""
        chosen = list(experts)
        self.source.prefetch([layer * self.sizes[1] + expert for expert in chosen])
        return []

    def weights(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Views of `up` and `down`; touching them reads their pages."""
        records = self.source.resident
        assert records is not None
        record = records[layer * self.sizes[1] + expert, : self.source.region.row_bytes]
        self.source.count(record.nbytes)
        return self._split(record)

    def release(self, layer: int) -> None:
        """Nothing is held."""


class OffloadedMoEFeedForward(nn.Module):
    """`MoEFeedForward` for inference with its experts elsewhere; the same sums in the same order.

    Args:
        layer: whose router and settings are taken over.
        index: place in the stack.
        cache: gives the experts.
        following: the next layer's router, by which its experts are guessed and read ahead; None for no guess.
    """

    def __init__(self, layer: MoEFeedForward, index: int, cache: ExpertCache, following: nn.Module | None) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.act = layer.num_experts, layer.top_k, layer.experts.act
        self.router, self.index, self.cache = layer.router, index, cache
        # in a list, so that it is not counted as a part of this layer
        self._following = [following]

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, tokens: TokenContext) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router(x)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        weights, chosen = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        rows = order // self.top_k
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        needed = [expert for expert, count in enumerate(counts) if count]
        missing = set(self.cache.fetch(self.index, needed))
        self.cache.misses += len(missing)
        self.cache.hits += len(needed) - len(missing)
        router = self._following[0]
        if router is not None:
            guessed = router(x).topk(self.top_k, dim=-1).indices
            self.cache.fetch(self.index + 1, torch.unique(guessed).tolist())
        inputs = dict(zip(needed, x[rows].split([counts[expert] for expert in needed]), strict=True))
        outputs = {}
        # what is in memory first, while the rest is read
        for expert in sorted(needed, key=lambda expert: (expert in missing, expert)):
            up, down = self.cache.weights(self.index, expert)
            outputs[expert] = F.linear(self.act(F.linear(inputs[expert], up)), down)
        self.cache.release(self.index)
        out = torch.cat([outputs[expert] for expert in needed])
        out = out * weights.reshape(-1)[order, None].to(out.dtype)
        y = torch.zeros_like(x, dtype=out.dtype).index_add(0, rows, out)
        return y.view(hidden_states.shape).to(hidden_states.dtype)


def _moe_layers(model: Any) -> list[MoEFeedForward]:
    layers = [layer.feed_forward for layer in model.model.layers] if isinstance(model, DecoderForCausalLM) else []
    if not layers or not all(isinstance(layer, MoEFeedForward) for layer in layers):
        raise ValueError("only a decoder with feed_forward 'moe' has experts to offload")
    return layers


@torch.no_grad()
def write_experts(model: Any, path: Path) -> None:
    """Write all experts of a MoE decoder, one record each, in the type of the model.

    Raises:
        ValueError: the model is no MoE.
        OSError: the disk has no room.
    """
    layers = _moe_layers(model)
    up = layers[0].experts.up
    values = 2 * up.shape[1] * up.shape[2]
    padded = values + -values % (ALIGNMENT_BYTES // up.itemsize)
    dtype = str(up.dtype).removeprefix("torch.")
    sizes = [len(layers), up.shape[0], up.shape[2], up.shape[1]]
    writer = TensorFileWriter(
        path,
        magic=MAGIC,
        version=VERSION,
        parts={"rows": (dtype, (sizes[0] * sizes[1], padded))},
        metadata={"sizes": sizes, "dtype": dtype},
    )
    with writer:
        for layer in layers:
            for one, other in zip(layer.experts.up, layer.experts.down, strict=True):
                writer.write("rows", F.pad(torch.cat([one.flatten(), other.flatten()]), (0, padded - values)))


def offload_experts(
    model: Any,
    path: Path,
    *,
    storage: Storage = "direct",
    experts_in_memory: int = 2,
    read_ahead: bool = True,
    in_place: bool = False,
) -> ExpertCache:
    """Take the experts out of a MoE decoder and read them from a file that `write_experts` made; for inference.

    Args:
        model: changed in place.
        path: the file.
        storage: where experts are read from.
        experts_in_memory: size of the LRU cache, per layer.
        read_ahead: guess the next layer's experts and read them early.
        in_place: use the experts where a memory map has them (`mmap`), with the file cache in place of the LRU cache.

    Raises:
        ValueError: the model is no MoE, or of other sizes than the file.
    """
    layers = _moe_layers(model)
    if in_place and storage != "mmap":
        raise ValueError(f"in_place needs storage 'mmap', not {storage!r}")
    file = TensorFile(path, magic=MAGIC, version=VERSION)
    up = layers[0].experts.up
    sizes, found = (len(layers), up.shape[0], up.shape[2], up.shape[1]), tuple(file.metadata["sizes"])
    if found != sizes or file.dtype("rows") != up.dtype:
        raise ValueError(
            f"{path} holds layers, experts, width, hidden width {list(found)} in {file.metadata['dtype']}, the model "
            f"has {list(sizes)} in {str(up.dtype).removeprefix('torch.')}; write its own experts"
        )
    num_rows, width = file.shape("rows")
    region = RowRegion(
        file.path, file.offset("rows"), num_rows, width * up.itemsize, 2 * up.shape[1] * up.shape[2] * up.itemsize
    )
    source = open_rows(region, storage, load=lambda: file.read("rows").view(torch.uint8))
    kind = InPlaceExperts if in_place else ExpertCache
    cache = kind(source, sizes, up.dtype, capacity=experts_in_memory)
    routers = [*(layer.router for layer in layers[1:]), None]
    for index, (block, router) in enumerate(zip(model.model.layers, routers, strict=True)):
        block.feed_forward = OffloadedMoEFeedForward(layers[index], index, cache, router if read_ahead else None)
    return cache

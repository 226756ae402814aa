"""Memory layers and MemoryFormer's fully-connected part against `nn.Linear`, the plain torch composition, and dense.

`layer_ms`: one layer d -> d with 8 bits. `projections_ms`: query, key and value, d -> 3 d, one hash. `block_ms`: the
fully-connected part of a block: those and the two feed-forward layers, with the norm between, against the four
attention projections and a feed-forward of 4 d with GELU (no norms before it, no attention on either side).

Calls go through copies of the weights, so many that the dense ones together exceed the last-level cache, as the layers
of a model do; tables exceed it anyway. Inputs change from call to call, or rows would stay in the cache. Peers compute
something else (a dense layer) or, for `torch_composition`, the same: that one is compared with ours before it is timed.
On the CPU ours runs on the C++ kernels, which are built first where they can be; `torch_path` is ours without them.

Training steps of tables: `memoryformer_optimizer.py`.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.native_build import cpu_kernels, without_cpu_kernels
from ...lightning_modules.memoryformer.layer import MemoryLayer
from ...lightning_modules.memoryformer.sizes import BlockSizes, check_memory, dense_multiply_adds, table_values
from .memoryformer_optimizer import rows as optimizer_rows
from .native import build_for
from .number_formats import fast_bfloat16
from .registry import Settings
from .rows import Row, compare, missing_peer, ratio
from .timing import copying, measure, require_same

NUM_BITS, EXTRA_BITS = 8, 2
TOKENS = (1, 8, 18, 64, 512, 2048)
WIDTHS = (512, 768, 1024)
BOUND = "copy of the bytes that must be read"
# what the dense weights of all copies take together: above the last-level caches of today's servers
WORKING_SET_BYTES = 400 * 10**6
INPUTS = 16


def run(settings: Settings) -> Iterator[Row]:
    """Rows for every width, number of tokens, part and peer."""
    yield from build_for(settings)
    widths, tokens = ((1024,), (1, 8, 64)) if settings.quick else (WIDTHS, TOKENS)
    for d in widths:
        for part in ("layer", "projections", "block"):
            yield from _part_rows(part, d, tokens, settings)
        yield from _count_rows(d, tokens)
    yield from optimizer_rows(settings)


def _count_rows(d: int, tokens: tuple[int, ...]) -> Iterator[Row]:
    """What the method saves and costs on paper: no measurement."""
    sizes = BlockSizes(d, NUM_BITS, EXTRA_BITS)
    dense_bytes = 2 * dense_multiply_adds(d, 1)
    for count in tokens:
        case = f"d={d} tokens={count}"
        ours, dense = sizes.multiply_adds(count), dense_multiply_adds(d, count)
        yield Row(case, "block_multiply_adds", ours, "count", peer="dense", peer_value=dense, ratio=ratio(ours, dense))
        # no row is read twice: as many bytes as this only while tokens are few
        ours = min(count * sizes.bytes_per_token(), 2 * sizes.table_values)
        yield Row(
            case, "block_bytes_16_bit", ours, "B", peer="dense", peer_value=dense_bytes, ratio=ratio(ours, dense_bytes)
        )
    held = 2 * sizes.table_values
    yield Row(
        f"d={d}", "block_weight_bytes_16_bit", held, "B", peer="dense", peer_value=dense_bytes,
        ratio=ratio(held, dense_bytes),
    )  # fmt: skip


def torch_composition(x: Tensor, table: Tensor, bias: Tensor, num_bits: int) -> Tensor:
    """The layer as one writes it first: signs to codes, a product of sigmoids, gather, multiply, sum."""
    z = x.unflatten(-1, (-1, num_bits))  # (T, K, tau)
    powers = 2 ** torch.arange(num_bits - 1, -1, -1, device=x.device)
    codes = ((z >= 0).long() * powers).sum(-1)
    weights = torch.sigmoid(2 * z.abs()).prod(-1)
    rows = table.view(z.shape[1], 1 << num_bits, -1)[torch.arange(z.shape[1], device=x.device), codes]  # (T, K, H)
    return (rows * weights.unsqueeze(-1)).sum(1) + bias


class _MemoryBlock(nn.Module):
    """The fully-connected part of a MemoryFormer block; attention itself is left out of both sides."""

    def __init__(self, d: int, table_format: Any) -> None:
        super().__init__()
        inner = BlockSizes(d, NUM_BITS, EXTRA_BITS).inner_width
        self.qkv = _memory(d, 3 * d, NUM_BITS, table_format)
        self.first = _memory(d, inner, NUM_BITS, table_format)
        self.norm = nn.LayerNorm(inner)
        self.second = _memory(inner, d, NUM_BITS + EXTRA_BITS, table_format)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.qkv(x), self.second(self.norm(self.first(x)))


class _DenseBlock(nn.Module):
    """The fully-connected part of a dense block."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x), self.out(x), self.down(F.gelu(self.up(x)))


class _Composed(nn.Module):
    """A module of memory layers, each as the plain composition."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Any:
        def apply(layer: Any, values: Tensor) -> Tensor:
            return torch_composition(values, layer.table, layer.bias, layer.num_bits)

        ours: Any = self.ours
        if isinstance(ours, MemoryLayer):
            return apply(ours, x)
        return apply(ours.qkv, x), apply(ours.second, ours.norm(apply(ours.first, x)))


def _memory(num_in: int, num_out: int, num_bits: int, table_format: Any) -> MemoryLayer:
    layer = MemoryLayer(num_in, num_out, num_bits=num_bits, table_format=table_format, initialise=False)
    assert layer.bias is not None
    nn.init.normal_(layer.bias, std=0.02)
    if layer.table is not None:
        nn.init.normal_(layer.table, std=0.1)
    else:
        # numbers of a trained table's size: bytes at random would be halves at random, infinite ones among them
        values = torch.randn(4096, num_out) * 0.1
        trained = MemoryLayer(8, num_out, num_bits=12, initialise=False)
        trained.table = nn.Parameter(values)
        records = trained.encode(table_format)
        for start in range(0, len(layer.records), len(records)):
            part = layer.records[start : start + len(records)]
            part.copy_(records[: len(part)])
    return layer


def _make(part: str, d: int, table_format: Any) -> nn.Module:
    if part == "block":
        return _MemoryBlock(d, table_format)
    return _memory(d, d if part == "layer" else 3 * d, NUM_BITS, table_format)


def _make_dense(part: str, d: int) -> nn.Module:
    return _DenseBlock(d) if part == "block" else nn.Linear(d, d if part == "layer" else 3 * d)


def _values(part: str, d: int) -> tuple[int, int, int]:
    """Table values, dense values, and table values that one token reads."""
    sizes = BlockSizes(d, NUM_BITS, EXTRA_BITS)
    if part == "block":
        return sizes.table_values, dense_multiply_adds(d, 1), sizes.bytes_per_token(1)
    width = d if part == "layer" else 3 * d
    return table_values(d, width, NUM_BITS), d * width, sizes.num_tables * width


def _turning(modules: list[nn.Module], inputs: list[Tensor]) -> Callable[[], Any]:
    """A call that takes the next copy of the weights and the next input each time."""
    turn = itertools.cycle(list(itertools.product(inputs, modules)))

    def call() -> Any:
        x, module = next(turn)
        return module(x)

    return call


def _without_kernels(call: Callable[[], Any]) -> Callable[[], Any]:
    def torch_path() -> Any:
        with without_cpu_kernels():
            return call()

    return torch_path


def _part_rows(part: str, d: int, tokens: tuple[int, ...], settings: Settings) -> Iterator[Row]:
    torch.manual_seed(settings.seed)
    table_numbers, dense_numbers, read = _values(part, d)
    budget = WORKING_SET_BYTES // (8 if settings.quick else 1)
    copies = max(1, min(16, budget // (4 * table_numbers)))
    dense_copies = max(2, budget // (4 * dense_numbers))
    check_memory(
        copies * table_numbers * 7 + dense_copies * dense_numbers * 6,
        f"the benchmark's weights at d={d}",
        settings.device,
    )
    with torch.device(settings.device), torch.no_grad():
        ours = {name: [_make(part, d, name) for _ in range(copies)] for name in ("parameter", "float16", "int8")}
        dense = [_make_dense(part, d) for _ in range(dense_copies)]
        half = [_make_dense(part, d).bfloat16() for _ in range(2 * dense_copies)] if fast_bfloat16() else []
    composed: list[nn.Module] = [_Composed(module) for module in ours["parameter"]]
    peer = "linear" if part == "layer" else "dense"
    for count in tokens:
        case = f"d={d} tokens={count}"
        generator = torch.Generator().manual_seed(settings.seed)
        inputs = [torch.randn(count, d, generator=generator).to(settings.device) for _ in range(INPUTS)]
        calls = {
            "ours": _turning(ours["parameter"], inputs),
            "float16": _turning(ours["float16"], inputs),
            "int8": _turning(ours["int8"], inputs),
            peer: _turning(dense, inputs),
            "copy": copying(4 * min(count * read, table_numbers), settings.device),
        }
        reasons = {}
        if half:
            calls[f"{peer}_bfloat16"] = _turning(half, [x.bfloat16() for x in inputs])
        else:
            reasons[f"{peer}_bfloat16"] = "this CPU has no instructions for bfloat16: torch's products take far longer"
        peers = [peer, f"{peer}_bfloat16", "torch_composition"]
        if settings.device == "cpu" and cpu_kernels() is not None:
            calls["torch_path"] = _without_kernels(_turning(ours["parameter"], inputs))
            peers.append("torch_path")
        # the composition holds all rows of all tokens, three times over
        held = 3 * 4 * count * read
        if held >= 10**9:
            reasons["torch_composition"] = f"would hold {held:,} bytes"
        with torch.no_grad():
            if "torch_composition" not in reasons:
                calls["torch_composition"] = _turning(composed, inputs)
                _check(case, ours["parameter"][0], composed[0], inputs[0])
            timings = measure(calls, device=settings.device, repeats=settings.repeats, seed=settings.seed, warmup=2)
        bound: dict[str, Any] = {"bound": BOUND, "bound_value": timings["copy"].median_ms}
        metric = f"{part}_ms"
        for name in peers:
            row = compare(case, metric, timings["ours"], peer=name, theirs=timings.get(name), **bound)
            yield row if name in timings else missing_peer(row, name, reasons[name])
        for name in ("float16", "int8"):
            for other in (*peers[:2], "torch_composition"):
                if other in timings:
                    yield compare(f"{case} tables={name}", metric, timings[name], peer=other, theirs=timings[other])


def _check(case: str, ours: nn.Module, composed: nn.Module, x: Tensor) -> None:
    """The composition must give our numbers; behind the second hash a few values near zero may fall the other way."""
    one, other = ours(x), composed(x)
    one, other = (one, other) if isinstance(one, Tensor) else (one[0], other[0])
    require_same(case, "torch_composition", [other], [one], 1e-5)

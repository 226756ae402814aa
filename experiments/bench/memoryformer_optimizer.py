"""A training step of one table: AdamW with dense gradients against sparse ones and rules that step used rows only.

`table_step_ms`: forward, backward and optimiser step of one table, for tokens that are drawn anew in every call.
`table_training_bytes`: gradient and optimiser state as they lie after it, counted from the tensors. The first step of
`lazy_adam` must give AdamW's table, or nothing is reported. Random keys reach more rows than those of real text do, so
that the share of used rows is what the sparse side has at worst.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.hash_gather import hash_gather, num_tables, weighted_gather_sparse_grad
from ...kernels.weighted_gather import weighted_gather
from ...lightning_modules.memoryformer.row_optimizer import STATE_VALUES, RowWiseOptimizer
from ...lightning_modules.memoryformer.sizes import check_memory
from .registry import Settings
from .rows import Row, compare, ratio
from .timing import measure, require_same

INPUTS = 8


class TableCase(NamedTuple):
    """One table and the tokens of a step.

    name: for the case; rows, columns: of the table; tokens: per step; num_bits: of the sign hash, None for random rows;
    terms: rows per token.
    """

    name: str
    rows: int
    columns: int
    tokens: int
    num_bits: int | None
    terms: int


def hashed(width: int, columns: int, num_bits: int, tokens: int) -> TableCase:
    """A memory layer's table."""
    terms = num_tables(width, num_bits)
    return TableCase(f"hash tau={num_bits}", terms << num_bits, columns, tokens, num_bits, terms)


CASES = (
    hashed(512, 512, 8, 2048),
    hashed(512, 512, 12, 2048),
    # two orders of n-grams with two hashes each
    TableCase("ngram", 4 * 32768, 512, 2048, None, 4),
    TableCase("ngram", 4 * 32768, 512, 16384, None, 4),
)
QUICK = (hashed(64, 64, 8, 256), TableCase("ngram", 4 * 4096, 64, 256, None, 4))


def rows(settings: Settings) -> Iterator[Row]:
    """Rows for every table and rule."""
    for case in QUICK if settings.quick else CASES:
        yield from _case_rows(case, settings)


def _inputs(case: TableCase, settings: Settings) -> list[Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    if case.num_bits is not None:
        shape = case.tokens, case.terms * case.num_bits
        return [torch.randn(*shape, generator=generator).to(settings.device) for _ in range(INPUTS)]
    each = case.rows // case.terms
    first = torch.arange(0, case.rows, each)
    draws = (torch.randint(each, (case.tokens, case.terms), generator=generator) for _ in range(INPUTS))
    return [(draw + first).to(settings.device) for draw in draws]


def _gather(case: TableCase, table: Tensor, keys: Tensor, *, sparse: bool) -> Tensor:
    if case.num_bits is not None:
        return hash_gather(keys, table, case.num_bits, sparse_grad=sparse)
    weights = torch.ones(keys.shape, device=table.device)
    return weighted_gather_sparse_grad(table, keys, weights) if sparse else weighted_gather(table, keys, weights)


def _trainer(
    case: TableCase, start: Tensor, rule: str, inputs: list[Tensor], grad: Tensor
) -> tuple[nn.Parameter, Any, Callable[[], None]]:
    """A table, its optimiser, and a call that makes one step."""
    table = nn.Parameter(start.clone())
    if rule == "adamw":
        optimizer: Any = torch.optim.AdamW([table], lr=1e-3, weight_decay=0.0, fused=True)
    else:
        optimizer = RowWiseOptimizer([{"params": [table], "row_rule": rule}], lr=1e-3)
    turn = itertools.cycle(inputs)

    def step() -> None:
        optimizer.zero_grad()
        _gather(case, table, next(turn), sparse=rule != "adamw").backward(grad)
        optimizer.step()

    return table, optimizer, step


def _held_bytes(table: nn.Parameter, optimizer: Any) -> int:
    """Gradient and optimiser state."""
    assert table.grad is not None
    parts = [table.grad._indices(), table.grad._values()] if table.grad.is_sparse else [table.grad]
    return sum(part.nbytes for part in [*parts, *optimizer.state[table].values()])


def _case_rows(case: TableCase, settings: Settings) -> Iterator[Row]:
    values = case.rows * case.columns
    # four tables: each with a gradient and what its rule keeps
    check_memory(
        4 * values * (8 + 2 + sum(STATE_VALUES.values())),
        f"the benchmark's tables of {values:,} values",
        settings.device,
    )
    generator = torch.Generator().manual_seed(settings.seed)
    start = (0.02 * torch.randn(case.rows, case.columns, generator=generator)).to(settings.device)
    grad = torch.randn(case.tokens, case.columns, generator=generator).to(settings.device)
    inputs = _inputs(case, settings)
    made = {rule: _trainer(case, start, rule, inputs, grad) for rule in ("adamw", *STATE_VALUES)}
    for _, _, step in made.values():
        step()
    sparse = made["lazy_adam"][0].grad
    assert sparse is not None
    used = sparse._values().shape[0] / case.rows
    label = f"{case.name} rows={case.rows} columns={case.columns} tokens={case.tokens} used={used:.0%}"
    require_same(label, "adamw", [made["adamw"][0] - start], [made["lazy_adam"][0] - start], 1e-3)
    held = {rule: _held_bytes(table, optimizer) for rule, (table, optimizer, _) in made.items()}
    calls = {rule: step for rule, (_, _, step) in made.items()}
    timings = measure(calls, device=settings.device, repeats=min(settings.repeats, 9), seed=settings.seed, warmup=1)
    for rule in STATE_VALUES:
        where = f"{label} rule={rule}"
        yield compare(where, "table_step_ms", timings[rule], peer="adamw", theirs=timings["adamw"])
        yield Row(
            where, "table_training_bytes", held[rule], "B", peer="adamw", peer_value=held["adamw"],
            ratio=ratio(held[rule], held["adamw"]),
        )  # fmt: skip

"""`MemoryLayer`: hash tables in place of `nn.Linear`, in training and in inference form."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import initialization

from ...kernels.hash_gather import (
    MAX_BITS,
    Weighting,
    hash_gather,
    hash_gather_int8,
    num_tables,
    quantise_rows,
    sign_hash,
)
from .sharding import gather_columns

Remainder = Literal["pad", "refuse"]
TableFormat = Literal["parameter", "float16", "int8"]
BIAS_STD = 0.001


class MemoryLayer(nn.Module):
    """`y = sum_k w_k T_k[code_k] + bias`: sub-vectors of the input choose and weigh one row of a table each.

    Usable wherever `nn.Linear(in_features, out_features)` is. Source: arXiv 2411.12992, section 2.2; the released
    code weights otherwise, see `sign_hash`. Where a value crosses zero the output jumps; the input's gradient flows
    through the weights only.

    Args:
        in_features: width of the input, d.
        out_features: width of the output, h.
        bias: add a learned vector; the released code always does.
        num_bits: values per sub-vector, tau; there are K = ceil(d / tau) tables of 2^tau rows.
        weighting: `paper`, or `l1` (released code; worse in `experiments/memoryformer`, Quality).
        temperature: t of the weights.
        remainder: what becomes of a width that tau does not divide: `pad` makes the last sub-vector shorter (its table
            keeps 2^tau rows, of which 2^(d mod tau) can be reached), `refuse` raises.
        table_format: `parameter` to train; `float16` or `int8` (rows of 8-bit codes with their own scale) hold the
            tables as bytes for inference.
        init_std: standard deviation of the tables' initial values.
        initialise: fill the parameters now; models that do so themselves pass False.
        table_on_host: leave a stored table out of the module: it is given by `hold_on_host` and stays in host memory
            wherever the module goes; the CPU hashes and gathers.
        sparse_grad: give the table a sparse gradient of the rows that were used, as `nn.Embedding(sparse=True)` does.

    Raises:
        ValueError: tau is not 1 to 16, or does not divide the width and `remainder` is `refuse`; an unknown name.
    """

    records: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_bits: int = 8,
        weighting: Weighting = "paper",
        temperature: float = 1.0,
        remainder: Remainder = "pad",
        table_format: TableFormat = "parameter",
        init_std: float = 0.02,
        initialise: bool = True,
        table_on_host: bool = False,
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        check_options(in_features, num_bits, weighting, remainder, table_format)
        self.in_features, self.out_features, self.num_bits = in_features, out_features, num_bits
        self.weighting, self.temperature, self.table_format = weighting, temperature, table_format
        self.num_tables, self.init_std = num_tables(in_features, num_bits), init_std
        self.sparse_grad = sparse_grad
        num_rows = self.num_tables << num_bits
        self.table: nn.Parameter | None = None
        # bytes: a cast of the model leaves them alone
        self.records_shape = num_rows, out_features + 8 if table_format == "int8" else 2 * out_features
        self.table_on_host, self._host_records = table_on_host, torch.empty(0, dtype=torch.uint8)
        if table_format == "parameter":
            self.table = nn.Parameter(torch.empty(num_rows, out_features))
        elif not table_on_host:
            self.register_buffer("records", torch.zeros(*self.records_shape, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        if initialise:
            self.initialise(init_std)

    @torch.no_grad()
    def initialise(self, initializer_range: float) -> None:
        """Tables from N(0, init_std^2), the bias from N(0, 0.001^2), as in the released code."""
        if self.table is not None:
            initialization.normal_(self.table, std=self.init_std)
        if self.bias is not None:
            initialization.normal_(self.bias, std=BIAS_STD)

    def buckets(self, x: Tensor) -> Tensor:
        """Buckets (..., K) in [0, 2^tau) that an input (..., d) falls into."""
        rows, _ = sign_hash(x.detach(), self.num_bits, weighting=self.weighting, temperature=self.temperature)
        return rows % (1 << self.num_bits)

    @property
    def reachable_buckets(self) -> list[int]:
        """Rows of each table that an input can reach: 2^tau, fewer for a shorter last sub-vector."""
        last = self.in_features - (self.num_tables - 1) * self.num_bits
        return [1 << self.num_bits] * (self.num_tables - 1) + [1 << last]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features).

        Raises:
            ValueError: on the CPU, x holds NaN or infinity; or its width is another one.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input has {x.shape[-1]} values per token, this layer takes {self.in_features}")
        how: dict[str, Any] = {"weighting": self.weighting, "temperature": self.temperature}
        if isinstance(self.table, DTensor):
            out = gather_columns(self.table, x, lambda table, x: hash_gather(x, table, self.num_bits, **how))
        elif self.table is not None:
            out = hash_gather(x, self.table, self.num_bits, sparse_grad=self.sparse_grad, **how)
        elif self.table_on_host:
            # inputs and outputs cross over, not the rows, which are many more bytes
            out = self._gather_stored(x.cpu(), self.host_records, how).to(x.device)
        else:
            out = self._gather_stored(x, self.records, how)
        # a sum in float32 meets an input under autocast, or tables of another type than the activations
        out = out.to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def _gather_stored(self, x: Tensor, records: Tensor, how: dict[str, Any]) -> Tensor:
        if self.table_format == "int8":
            return hash_gather_int8(x, records, self.num_bits, **how)
        return hash_gather(x, records.view(torch.float16), self.num_bits, **how)

    @property
    def host_records(self) -> Tensor:
        """The stored table in host memory.

        Raises:
            ValueError: none was given.
        """
        if not self._host_records.numel():
            raise ValueError("this layer's table is to lie on the host and none was given; use from_pretrained")
        return self._host_records

    def hold_on_host(self, records: Tensor) -> None:
        """Use this stored table (rows, bytes), in memory or mapped.

        Raises:
            ValueError: the layer keeps its table itself, or the table has another shape.
        """
        if not self.table_on_host or records.shape != self.records_shape or records.dtype != torch.uint8:
            raise ValueError(
                f"this layer takes a table of {list(self.records_shape)} bytes, on the host: {self.table_on_host}; got "
                f"{list(records.shape)} {records.dtype}"
            )
        self._host_records = records

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # a loader asks before it is given
        if self._host_records.numel():
            destination[f"{prefix}records"] = self.host_records

    @torch.no_grad()
    def encode(self, table_format: TableFormat) -> Tensor:
        """The trained tables as the bytes of an inference form, (rows, bytes) uint8.

        Raises:
            ValueError: there are no trained tables here, or a value does not fit the form.
        """
        if self.table is None:
            raise ValueError(f"these tables are stored as {self.table_format} already; export the trained model")
        if table_format == "int8":
            return quantise_rows(self.table)
        limit = torch.finfo(torch.float16).max
        if not bool((self.table.abs() <= limit).all()):
            raise ValueError(
                f"a table holds values that are not finite or above {limit:.0f}; export as int8, or train again"
            )
        return self.table.half().view(torch.uint8)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_bits={self.num_bits}, num_tables={self.num_tables}, weighting={self.weighting!r}, "
            f"table_format={self.table_format!r}"
        )


def check_options(in_features: int, num_bits: int, weighting: str, remainder: str, table_format: str) -> None:
    """Check what does not depend on data, before tables of a wrong size are made.

    Raises:
        ValueError: see `MemoryLayer`.
    """
    for name, value, known in (
        ("weighting", weighting, Weighting),
        ("remainder", remainder, Remainder),
        ("table_format", table_format, TableFormat),
    ):
        if value not in get_args(known):
            raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, get_args(known)))}")
    if not isinstance(num_bits, int) or isinstance(num_bits, bool) or not 1 <= num_bits <= MAX_BITS:
        raise ValueError(
            f"num_bits {num_bits} is not between 1 and {MAX_BITS}; tables have 2^num_bits rows, 8 is the paper's choice"
        )
    if remainder == "refuse" and in_features % num_bits:
        raise ValueError(
            f"{num_bits} bits do not divide a width of {in_features}; use a width of "
            f"{in_features - in_features % num_bits}, other bits, or remainder: pad"
        )

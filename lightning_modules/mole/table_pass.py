"""One forward pass over a lookup table: from rows and gates to each layer's routed sum."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.quantised_rows import RowLayout, weighted_gather_records
from ...kernels.row_storage import RowStream
from .table import LookupTable

# up to here the rows of a pass are taken apart once, for all layers: a decoding step is then one product per layer, and
# the calls around it would otherwise cost more than the sums
SMALL_PASS_VALUES = 2**20
Routed = Callable[[int, Tensor], Tensor]


class FewTokens:
    """Rows of a decoding step, taken apart when the first layer asks for them: until then they may be on their way.

    Args:
        stream: the rows, distinct.
        inverse: (T,) which of them each token uses.
        layout: of the records.
    """

    def __init__(self, stream: RowStream, inverse: Tensor, layout: RowLayout) -> None:
        self._stream, self._inverse, self._layout = stream, inverse, layout
        self._layers: tuple[Tensor, ...] = ()

    def routed(self, layer: int, gates: Tensor) -> Tensor:
        """`sum_n gates[t, n] * row[t, layer, n]`: (T, N) to (T, d)."""
        if not self._layers:
            dtype = torch.float64 if "float64" in (self._layout.dtype, str(gates.dtype)[6:]) else torch.float32
            rows = self._layout.decode_record(self._stream.whole()).index_select(0, self._inverse)
            # (L, T, N, d), or for one token (L, N, d)
            values = rows.to(dtype).transpose(0, 1).contiguous()
            self._layers = values.squeeze(1).unbind() if len(gates) == 1 else values.unbind()
        values = self._layers[layer]
        gates = gates.to(values.dtype)
        return torch.mm(gates, values) if values.dim() == 2 else torch.bmm(gates.unsqueeze(1), values).squeeze(1)


def begin_pass(table: LookupTable, keys: Tensor, device: torch.device) -> Routed:
    """Ask for the rows of a pass; the result gives a layer's routed sum (T, d) for gates (T, N), in layer order.

    Args:
        table: the table.
        keys: (T,) token ids, or other keys of the table.
        device: where gates are.

    Raises:
        ValueError: see `LookupTable.begin_pass`.
    """
    layout, resident = table.layout, table.on_device(device)
    if resident is not None:
        # the GPU addresses rows by token id: nothing is copied, and no id is looked at
        size = layout.layer_bytes
        return lambda layer, gates: weighted_gather_records(
            resident[:, layer * size : (layer + 1) * size], keys, gates, layout
        )
    distinct, inverse = torch.unique(keys, return_inverse=True)
    stream = table.begin_pass(distinct, device)
    few = len(keys) * layout.num_layers * layout.layer_values <= SMALL_PASS_VALUES
    if few and isinstance(stream, RowStream) and stream.arrives_at_once:
        return FewTokens(stream, inverse, layout).routed
    return lambda layer, gates: weighted_gather_records(stream.part(layer), inverse, gates, layout)

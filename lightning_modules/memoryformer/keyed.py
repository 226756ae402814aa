"""Tables keyed by token ids or by hashed n-grams: what came after MemoryFormer and MoLE, as configurations.

`token_id`, gate `none`: one learned vector per id and layer (Gemma 3n's per-layer embeddings, full width).
`token_id`, several heads, gate `softmax`: MoLE's table learned directly (arXiv 2503.15798, without the experts).
`ngram_hash`, gate `sigmoid`: hashed 2- and 3-grams gated by the hidden state (Engram, arXiv 2601.07372, simplified).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import initialization

from ...kernels.hash_gather import weighted_gather_sparse_grad
from ...kernels.weighted_gather import weighted_gather
from ..decoder.configuration import DecoderConfig
from ..decoder.feed_forward import DenseFeedForward
from ..decoder.tokens import TokenContext
from .sharding import gather_columns

# odd constants of 64-bit multiplicative hashing (golden ratio, splitmix64), as signed numbers
_STEP, _MIX = -7046029254386353131, -7723592293110705685


def ngram_rows(ids: Tensor, num_tokens: int, orders: Sequence[int], num_heads: int, num_rows: int) -> Tensor:
    """Rows (B, T, len(orders) * num_heads) of the n-grams that end at the last T of (B, S) ids.

    Each order and head has `num_rows` rows of its own and its own hash. Equal n-grams have equal rows; an id of -1
    stands for none.
    """
    columns = []
    for index, order in enumerate(orders):
        for head in range(num_heads):
            term = index * num_heads + head
            state = torch.full_like(ids[:, ids.shape[1] - num_tokens :], term + 1) * _STEP
            for back in range(order - 1, -1, -1):
                end = ids.shape[1] - back
                state = (state ^ (ids[:, end - num_tokens : end] + 2)) * _MIX
                # the shift keeps the sign's copies out
                state = state ^ ((state >> 29) & (2**35 - 1))
            columns.append((state & (2**62 - 1)).remainder(num_rows) + term * num_rows)
    return torch.stack(columns, dim=-1)


class KeyedMemory(nn.Module):
    """`dense(u) + sum_m g_m(u) T[row_m]`: rows chosen by token ids, weighed by the hidden state u.

    Args:
        config: the decoder's.
        layer_index: place in the stack.
        key: `token_id`, or `ngram_hash` of the last few ids.
        orders: lengths of the n-grams.
        num_heads: rows per id, or hashes per n-gram length.
        num_rows: rows per hash; the vocabulary's size for `token_id`.
        gate: of the rows: `sigmoid` or `softmax` of a linear map of u, or `none`.
        beside_dense: keep the dense feed-forward beside the tables.

    Raises:
        ValueError: an option out of range or of the other key.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer_index: int,
        *,
        key: Literal["token_id", "ngram_hash"] = "ngram_hash",
        orders: Sequence[int] = (2, 3),
        num_heads: int = 1,
        num_rows: int | None = None,
        gate: Literal["none", "sigmoid", "softmax"] = "sigmoid",
        beside_dense: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or not orders or min(orders) < 1:
            raise ValueError(f"num_heads {num_heads} and orders {list(orders)} must be whole numbers above 0")
        if gate not in ("none", "sigmoid", "softmax"):
            raise ValueError(f"gate {gate!r} is not one of 'none', 'sigmoid', 'softmax'")
        if key == "token_id" and num_rows is not None:
            raise ValueError(f"key 'token_id' has a row per id of the vocabulary; leave num_rows {num_rows} out")
        if key == "ngram_hash" and (num_rows is None or num_rows < 1):
            raise ValueError(f"key 'ngram_hash' needs num_rows above 0 (rows per hash, such as 65536), got {num_rows}")
        self.key, self.orders, self.num_heads, self.gate = key, tuple(orders), num_heads, gate
        self.num_rows = config.vocab_size if num_rows is None else num_rows
        self.num_terms = num_heads * (len(self.orders) if key == "ngram_hash" else 1)
        self.table = nn.Parameter(torch.empty(self.num_terms * self.num_rows, config.hidden_size))
        self.router = nn.Linear(config.hidden_size, self.num_terms, bias=False) if gate != "none" else None
        self.dense = DenseFeedForward(config, layer_index) if beside_dense else None
        # set by a trainer whose optimiser wants it, see `MemoryLayer`
        self.sparse_grad = False

    @property
    def reads_history(self) -> bool:
        """Whether the decoder has to tell what came before the current tokens."""
        return self.key == "ngram_hash"

    @torch.no_grad()
    def initialise(self, initializer_range: float) -> None:
        """Rows from N(0, initializer_range^2)."""
        initialization.normal_(self.table, std=initializer_range)

    def rows(self, tokens: TokenContext) -> Tensor:
        """Rows (B, T, M) of the current tokens; layers with the same keys share them.

        Raises:
            ValueError: the model was given embeddings in place of ids.
        """
        if tokens.input_ids is None:
            raise ValueError("keys made of token ids need input_ids; the model was given inputs_embeds")
        if self.key == "token_id":
            return tokens.input_ids.unsqueeze(-1) + torch.arange(
                0, self.num_terms * self.num_rows, self.num_rows, device=tokens.input_ids.device
            )
        name = f"ngram_rows {self.orders} {self.num_heads} {self.num_rows}"
        if name not in tokens.shared:
            ids = tokens.ids_with_history(max(self.orders) - 1)
            num_tokens = tokens.input_ids.shape[1]
            tokens.shared[name] = ngram_rows(ids, num_tokens, self.orders, self.num_heads, self.num_rows)
        return tokens.shared[name]

    def forward(self, hidden_states: Tensor, tokens: TokenContext) -> Tensor:
        """Map the normalised residual stream (B, T, d) to (B, T, d)."""
        rows = self.rows(tokens)
        if self.router is None:
            weights = torch.ones(rows.shape, dtype=self.table.dtype, device=rows.device)
        else:
            logits = self.router(hidden_states)
            weights = logits.sigmoid() if self.gate == "sigmoid" else logits.softmax(-1)
        weights = weights.to(self.table.dtype)
        if isinstance(self.table, DTensor):
            out = gather_columns(self.table, weights, lambda table, weights: weighted_gather(table, rows, weights))
        elif self.sparse_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out = weighted_gather_sparse_grad(self.table, rows, weights)
        else:
            out = weighted_gather(self.table, rows, weights)
        out = out.to(hidden_states.dtype)
        return out if self.dense is None else out + self.dense(hidden_states, tokens)

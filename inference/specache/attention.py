"""The attention of a decoding pass over packed tokens, exact rows, the residual and the pass's own tokens.

Shapes: B sequences, H query heads, N key/value heads, G = H / N, Q queries, D channels, W slots.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...kernels.low_bit_kv import packed_scores, packed_weighted_sum, unpack
from ...kernels.low_bit_kv.reference import accumulation_dtype
from .device_store import DeviceStore
from .options import SpeCacheOptions
from .plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from .decoding_cache import DecodingCache

IMPLEMENTATION = "specache"
# the library's attention, with a look at the prompt's queries and keys
OBSERVED = "specache_observed"
_ACTIVE: ContextVar["DecodingCache | None"] = ContextVar("active_specache", default=None)
# what models hand to an attention function that changes the result, and that is not in the method
_UNSUPPORTED = ("s_aux", "position_bias", "sliding_window")


@contextmanager
def specache_attention(model: "PreTrainedModel", implementation: str = IMPLEMENTATION) -> "Iterator[None]":
    """Have a model attend through the cache of the pass it is in; its own implementation is put back at the end.

    Args:
        model: A decoder that calls the registered attention interface.
        implementation: `IMPLEMENTATION`, or `OBSERVED` for a prefill.
    """
    previous = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@contextmanager
def attending(cache: "DecodingCache") -> "Iterator[None]":
    """Name the cache of this thread's forward pass, which models do not hand to their attention."""
    token = _ACTIVE.set(cache)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _registered_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What models call: (B, H, Q, D) queries to (B, Q, H, D)."""
    cache = _ACTIVE.get()
    if cache is None:
        raise ValueError(
            "attention implementation 'specache' works only inside specache_generate; "
            "choose another one with model.set_attn_implementation('sdpa')"
        )
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise ValueError(
                f"layer {cache.current_layer} uses {name} in its attention, which {type(cache).__name__} does not have"
            )
    return cache.attend(module, query, scaling=scaling, softcap=softcap), None


def _observed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As the library's "sdpa"; the cache of the pass sees queries (B, H, Q, D) and keys (B, N, T, D)."""
    cache = _ACTIVE.get()
    if cache is None:
        raise ValueError(f"attention implementation {OBSERVED!r} works only inside specache_generate")
    if softcap is not None:
        raise ValueError(f"{type(cache).__name__} cannot observe a model that caps its attention scores")
    cache.observe(query, key, scaling=scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)


def _registered_mask(*_: Any, **__: Any) -> None:
    """No mask from the model's columns: `Plan.allowed` is explicit, in slots, and the same for all layers."""


AttentionInterface.register(IMPLEMENTATION, _registered_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _registered_mask)
AttentionInterface.register(OBSERVED, _observed_attention)
AttentionMaskInterface.register(OBSERVED, sdpa_mask)


class LayerAttention:
    """One layer's pass: scores, weights, the choice of rows, and the output.

    Args:
        store: The layer's tensors.
        plan: The pass, on the layer's device.
        options: The method's settings.
        query: (B, H, Q, D).
        key: (B, N, Q, D), this pass's own.
        value: The same.
        scaling: Factor on the scores; None for `D ** -0.5`.
        softcap: Scores are bent to within ±softcap, as in Gemma 2.
    """

    def __init__(
        self,
        store: DeviceStore,
        plan: Plan,
        options: SpeCacheOptions,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> None:
        self.store, self.plan, self.options = store, plan, options
        self.key, self.value, self.softcap = key, value, softcap
        self.batch, self.num_heads, self.num_queries, self.head_dim = key.shape
        self.groups = query.shape[1] // self.num_heads
        self.factor = self.head_dim**-0.5 if scaling is None else scaling
        self.query = query
        # rows of one key/value head: query heads of its group times queries
        self.rows = query.reshape(self.batch, self.num_heads, self.groups * self.num_queries, self.head_dim)

    def weights(self, *, use_fetched: bool) -> torch.Tensor:
        """Softmax weights (B, N, G * Q, W) in the accumulation dtype, every stored token at its slot."""
        plan, store, dtype = self.plan, self.store, accumulation_dtype(self.query.dtype)
        num_rows, width = self.rows.shape[2], plan.width
        # one spare column takes what must not be written
        buffer = torch.empty(self.batch, self.num_heads, num_rows, width + 1, dtype=dtype, device=self.query.device)
        buffer[..., plan.num_packed_keys :] = -torch.inf
        fetched = use_fetched and store.indices.shape[2] > 0
        packed_scores(
            self.rows,
            store.keys.first(plan.num_packed_keys),
            plan.key_lengths,
            factor=self.factor,
            indices=store.indices if fetched else None,
            rows=store.fetched[:, :, :, 0] if fetched else None,
            out=buffer,
            backend=self.options.backend,
        )
        residual = self.rows.to(dtype) @ store.residual_keys.to(dtype).transpose(2, 3) * self.factor
        buffer.scatter_(3, plan.residual_key_places.expand(residual.shape), residual)
        own = self.rows.to(dtype) @ self.key.to(dtype).transpose(2, 3) * self.factor
        own.unflatten(2, (self.groups, self.num_queries)).masked_fill_(plan.future, -torch.inf)
        buffer.scatter_(3, plan.own_places.expand(own.shape), own)
        scores = buffer[..., :width]
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
            # the cap has made finite scores of slots that hold nothing
            split = scores.unflatten(2, (self.groups, self.num_queries))
            split.masked_fill_(~plan.allowed.unsqueeze(2), -torch.inf)
        scores.sub_(scores.amax(3, keepdim=True)).exp_()
        return scores.div_(scores.sum(3, keepdim=True))

    def output(self, weights: torch.Tensor, *, use_fetched: bool) -> torch.Tensor:
        """Attention output (B, H, Q, D) from the weights."""
        plan, store, dtype = self.plan, self.store, weights.dtype
        fetched = use_fetched and store.indices.shape[2] > 0
        total = packed_weighted_sum(
            weights,
            store.values.first(plan.num_packed_values),
            plan.value_lengths,
            indices=store.indices if fetched else None,
            rows=store.fetched[:, :, :, 1] if fetched else None,
            backend=self.options.backend,
        )
        places = plan.residual_value_places
        # places of the residual that were never filled hold zeros: any weight will do for them
        chosen = weights.gather(3, places.clamp_max(plan.width - 1).expand(*weights.shape[:3], -1))
        total += chosen @ store.residual_values.to(dtype)
        own = weights.gather(3, plan.own_places.expand(*weights.shape[:3], -1))
        total += own @ self.value.to(dtype)
        return total.reshape(self.batch, -1, self.num_queries, self.head_dim).to(self.query.dtype)

    def choose(self, weights: torch.Tensor, query: int, *, before_commit: bool) -> torch.Tensor:
        """Indices (B, N, K) of the rows that a query wants exact, -1 where there are fewer candidates.

        The weights of the query heads that share a key/value head are averaged (the authors' rebuttal), one set of
        indices per key/value head. Candidates are the tokens that will be low-bit when the rows are used: a token of
        this pass never is, unless its commit fills the residual.

        Args:
            weights: As `weights` gives them.
            query: Which of the pass's queries chooses.
            before_commit: The rows are for this pass, not for the next.
        """
        select_residual = self.options.select_residual
        plan, num_entries = self.plan, self.store.indices.shape[2]
        mean = weights.unflatten(2, (self.groups, self.num_queries))[:, :, :, query].mean(2)  # (B, N, W)
        lengths = plan.lengths if before_commit else plan.lengths_after
        num_candidates = plan.num_candidates(max(lengths), select_residual=select_residual)
        mean = mean[..., :num_candidates]
        limits = plan.candidates(before_commit=before_commit, select_residual=select_residual).view(-1, 1, 1)
        mean = mean.masked_fill(torch.arange(num_candidates, device=mean.device) >= limits, -1.0)
        found = mean.topk(min(num_entries, num_candidates), dim=2, sorted=False)
        indices = torch.where(found.values >= 0, found.indices, -1).int()
        return torch.nn.functional.pad(indices, (0, num_entries - indices.shape[2]), value=-1)

    def dense(self, *, use_fetched: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, N, W, D) of this layer alone, exact rows in their slots."""
        plan, store = self.plan, self.store
        built = []
        for part, packed, residual, own, lengths, num_packed, residual_places in (
            (
                0,
                store.keys,
                store.residual_keys,
                self.key,
                plan.key_lengths,
                plan.num_packed_keys,
                plan.residual_key_places,
            ),
            (
                1,
                store.values,
                store.residual_values,
                self.value,
                plan.value_lengths,
                plan.num_packed_values,
                plan.residual_value_places,
            ),
        ):
            rows = own.new_zeros(self.batch, self.num_heads, plan.width + 1, self.head_dim)
            rows[:, :, :num_packed] = unpack(packed.first(num_packed))
            if use_fetched and store.indices.shape[2]:
                valid = (store.indices >= 0) & (store.indices < lengths.view(-1, 1, 1))
                places = torch.where(valid, store.indices, plan.width).long()
                _scatter_rows(rows, places, store.fetched[:, :, :, part])
            for places, source in ((residual_places, residual), (plan.own_places, own)):
                _scatter_rows(rows, places[:, 0].expand(-1, self.num_heads, -1), source)
            built.append(rows[:, :, :-1])
        return built[0], built[1]

    def dense_weights(self, keys: torch.Tensor) -> torch.Tensor:
        """As `weights`, from dense keys."""
        dtype = accumulation_dtype(self.query.dtype)
        scores = self.rows.to(dtype) @ keys.to(dtype).transpose(2, 3) * self.factor
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        split = scores.unflatten(2, (self.groups, self.num_queries))
        split.masked_fill_(~self.plan.allowed.unsqueeze(2), -torch.inf)
        return scores.softmax(3)

    def dense_output(self, module: torch.nn.Module, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """As `output`, by the library's own attention: (B, H, Q, D)."""
        if self.softcap is not None:
            weights = self.dense_weights(keys)
            total = weights @ values.to(weights.dtype)
            return total.reshape(self.batch, -1, self.num_queries, self.head_dim).to(self.query.dtype)
        # a mask that hides nothing is left out, as the models do: it would choose another kernel
        hides = self.num_queries > 1 or len(set(self.plan.lengths)) > 1
        mask = self.plan.allowed if hides else None
        out, _ = sdpa_attention_forward(module, self.query, keys, values, mask, scaling=self.factor)
        return out.transpose(1, 2)


def _scatter_rows(rows: torch.Tensor, places: torch.Tensor, source: torch.Tensor) -> None:
    """`rows[b, n, places[b, n, k]] = source[b, n, k]`."""
    rows.scatter_(2, places.unsqueeze(3).expand(source.shape), source)

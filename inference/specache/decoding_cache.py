"""What the decoding loop needs of a cache that attends by itself: passes, lengths, padding, and refusals."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .attention import attending
from .plan import Phase, Plan
from .statistics import SpeCacheStatistics
from .support import check_model


class DecodingCache(Cache):
    """A cache for `specache_generate`: it stores what the model hands it, and answers the model's queries itself.

    Args:
        config: The decoder's configuration.
        layers: One per layer of the model.

    Attributes:
        config: The decoder's configuration.
        statistics: Forward passes, bytes moved, hits.
        current_layer: The layer whose keys and values came last.
    """

    layers: list[Any]

    # whether a step carries a guess at the next token, how guesses are drawn, and from which seed
    speculative = False
    greedy_guesses = False
    speculation_seed = 0
    # whether a prompt may come in parts: what is stored must give the earlier tokens back exactly
    takes_parts = True
    # whether the prompt's queries are needed too
    observes_prefill = False

    def __init__(self, config: PreTrainedConfig, layers: list[Any]) -> None:
        self.config = config
        super().__init__(layers=layers)
        self.statistics = SpeCacheStatistics()
        self.current_layer = 0
        self._forget()

    def _forget(self) -> None:
        self._lengths: list[int] = []
        self._padding: tuple[int, ...] = ()
        self._columns = 0
        self._capacity = 0
        self._plan: Plan | None = None

    @property
    def _plan_residual(self) -> int:
        return 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed columns, padding included, as in the attention mask. A speculative token never counts."""
        return self._columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a layer's new keys and values (B, N, Q, D); called by the model.

        Returns:
            In a prefill all keys and values in full precision, (B, N, columns, D); in decoding the new ones.

        Raises:
            ValueError: The call did not come from `specache_generate`, or the shapes are not the configuration's.
        """
        name = type(self).__name__
        if self._plan is None:
            raise ValueError(
                f"{name} decodes in passes of its own: use "
                f"model.generate(..., past_key_values={name}(model.config), custom_generate=specache_generate)"
            )
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"layer {layer_idx} has keys {tuple(key_states.shape)} and values {tuple(value_states.shape)}: "
                f"{name} needs them of one size"
            )
        self.current_layer = layer_idx
        layer = self.layers[layer_idx]
        if self._plan.phase == "prefill":
            return layer.prefill(key_states, value_states, self._plan)
        layer.own = (key_states, value_states)
        return key_states, value_states

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Not possible: what was quantised or dropped cannot come back."""
        raise ValueError(
            f"{type(self).__name__} cannot remove tokens: assisted decoding and cropping need another cache"
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Not supported: beams would move the whole store at every step."""
        raise ValueError(f"{type(self).__name__} does not support beam search: use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported."""
        raise ValueError(f"{type(self).__name__} cannot repeat sequences: expand the inputs before the prefill")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not supported."""
        raise ValueError(f"{type(self).__name__} cannot drop sequences of a batch: start a new cache")

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        self.close()
        for layer in self.layers:
            layer.reset()
        self.statistics = SpeCacheStatistics()
        self._forget()

    def close(self) -> None:
        """End what runs beside the computation."""

    @property
    def padding(self) -> tuple[int, ...]:
        """Padding columns left of each sequence."""
        return self._padding

    @property
    def lengths(self) -> tuple[int, ...]:
        """Committed tokens of each sequence, padding not counted."""
        return tuple(self._lengths)

    @property
    def capacity(self) -> int:
        """Tokens per sequence that there is room for."""
        return self._capacity

    @property
    def device_bytes(self) -> int:
        """Bytes that the cache holds on the device, counted over its tensors."""
        raise NotImplementedError

    @property
    def host_bytes(self) -> int:
        """Bytes that the cache holds on the host."""
        return 0

    def reserve(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Take memory for a whole generation of `capacity` tokens per sequence."""
        raise NotImplementedError

    @contextmanager
    def forward_pass(
        self,
        phase: Phase,
        num_queries: int,
        *,
        device: torch.device,
        padding: tuple[int, ...] | None = None,
    ) -> Iterator[Plan]:
        """One forward pass of the model; lengths advance when it ends without an error.

        Args:
            phase: What the pass is for.
            num_queries: Columns that the model is given.
            device: The device of the model's inputs.
            padding: In the first prefill: padding columns left of each sequence.
        """
        if self._plan is not None:
            raise ValueError(
                f"this {type(self).__name__} is already inside a forward pass: give every generation its own cache"
            )
        if not self._lengths:
            assert padding is not None, "the first pass tells the padding"
            self._lengths, self._padding = [0] * len(padding), padding
        self._plan = Plan(phase, tuple(self._lengths), num_queries, self._plan_residual, self._padding, device)
        try:
            with attending(self):
                yield self._plan
        finally:
            plan, self._plan = self._plan, None
            for layer in self.layers:
                layer.own = None
        if phase == "prefill":
            self._columns += num_queries
            self._lengths = [max(self._columns - pad, 0) for pad in self._padding]
            self.statistics.prefills += 1
        elif plan.commits:
            self._columns += 1
            self._lengths = [length + 1 for length in self._lengths]
            self.statistics.steps += 1
        else:
            self.statistics.pre_decodes += 1

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, *, scaling: float | None, softcap: float | None
    ) -> torch.Tensor:
        """One layer's decoding attention and what follows from it: (B, H, Q, D) to (B, Q, H, D)."""
        plan, layer = self._plan, self.layers[self.current_layer]
        assert plan is not None, "attention was called outside a forward pass"
        output = layer.attend(module, query, plan.on(query.device), scaling=scaling, softcap=softcap)
        return output.transpose(1, 2).contiguous()

    def observe(self, query: torch.Tensor, key: torch.Tensor, *, scaling: float | None) -> None:
        """One layer's queries and keys of a prefill, where `observes_prefill` asks for them."""
        plan = self._plan
        assert plan is not None, "attention was called outside a forward pass"
        self.layers[self.current_layer].observe(query, key, plan.on(query.device), scaling=scaling)

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that this cache was not made for, or whose attention cannot be routed to it.

        Raises:
            ValueError: It has other layers, or does not call the registered attention interface.
        """
        check_model(model, self.config, type(self).__name__)

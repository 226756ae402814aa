"""MoLE experts added to an existing decoder, such as a pretrained transformers model: train them, export a table.

Every chosen layer gets `sum_j g_j(u) v_j(key)` beside its feed-forward, with u the feed-forward's input. The experts'
last matrices start at zero, so that the model starts as it was. Beyond the paper (arXiv 2503.15798), which trains MoLE
from scratch with token ids as keys.
"""

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...kernels.weighted_gather import sort_segments, weighted_gather_groups
from .keys import Key, keys_of
from .modeling import LookupExperts, router_gates
from .table import LookupTable
from .table_pass import begin_pass

ATTRIBUTE = "lookup_adapter"
KEY_EMBEDDING = "key_embedding"


class TableSource(NamedTuple):
    """What rows are computed from.

    lookups: per layer a module from inputs (U, d) to rows (U, N, d); inputs: one row per key, (K, d) floating point, or
    for rows that are learned directly the keys (K,); sizes: experts, their hidden width and d; digested: by name,
    everything that the rows depend on; settings: for the header.
    """

    lookups: list[nn.Module]
    inputs: Tensor
    sizes: tuple[int, int, int]
    digested: dict[str, Tensor]
    settings: dict[str, Any]


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter adds.

    Attributes:
        num_experts: N per layer.
        intermediate_size: hidden width of an expert.
        layers: layers that get experts; all by default.
        key: `token_id`, whose experts read the model's own embedding, or `ngram_hash`, with an embedding of its own.
        num_keys: rows for `ngram_hash`.
        ngram_order: ids in an n-gram.
        values: `experts` computes rows from the key's embedding, `table` learns them directly, without experts.

    Raises:
        ValueError: a number is out of range, or a name unknown.
    """

    num_experts: int = 4
    intermediate_size: int = 512
    layers: tuple[int, ...] | None = None
    key: Key = "token_id"
    num_keys: int = 65536
    ngram_order: int = 2
    values: Literal["experts", "table"] = "experts"

    def __post_init__(self) -> None:
        for name in ("num_experts", "intermediate_size", "num_keys", "ngram_order"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        if self.key not in ("token_id", "ngram_hash"):
            raise ValueError(f"key {self.key!r} is neither 'token_id' nor 'ngram_hash'")
        if self.values not in ("experts", "table"):
            raise ValueError(f"values {self.values!r} is neither 'experts' nor 'table'")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


# the n-gram key that the study of experiments/mole compares with; a bucket per twelve tokens of a small vocabulary
PRESETS = {
    "token": AdapterConfig(),
    "bigram": AdapterConfig(key="ngram_hash", num_keys=49152, ngram_order=2),
    "trigram": AdapterConfig(key="ngram_hash", num_keys=49152, ngram_order=3),
}


class TableValues(nn.Module):
    """Rows that are learned directly: what is left of a MoLE layer when its experts are removed.

    Args:
        num_keys: rows.
        num_experts: N.
        hidden_size: d.
    """

    def __init__(self, num_keys: int, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(num_keys, num_experts, hidden_size))

    def forward(self, keys: Tensor) -> Tensor:
        """Keys (U,) to (U, N, d)."""
        return self.rows.index_select(0, keys)


class AdaptedFeedForward(nn.Module):
    """A feed-forward with a routed sum beside it.

    Args:
        base: the feed-forward.
        router: (d) to (N).
        lookup: experts or rows; None once a table is attached.
        place: the layer's number among those of the adapter.
        adapter: knows the keys of the pass.
    """

    def __init__(
        self, base: nn.Module, router: nn.Linear, lookup: nn.Module | None, place: int, adapter: "LookupAdapter"
    ) -> None:
        super().__init__()
        self.base, self.router, self.lookup, self.place = base, router, lookup, place
        # in a list, so that it is no submodule of its own part
        self._adapter = [adapter]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The feed-forward's output (B, T, d) plus the routed sum."""
        out = self.base(hidden_states, *args, **kwargs)
        gates = router_gates(self.router, hidden_states)
        routed = self._adapter[0].routed(self, gates.reshape(-1, gates.shape[-1]))
        return out + routed.view(out.shape).to(out.dtype)


class LookupAdapter(nn.Module):
    """Takes note of the keys of each forward pass and gives layers their routed sums. Made by `add_lookup_experts`.

    Args:
        config: what is added.
        num_layers: layers with experts.
        hidden_size: d.
        num_embeddings: rows of the model's embedding.
    """

    def __init__(self, config: AdapterConfig, num_layers: int, hidden_size: int, num_embeddings: int) -> None:
        super().__init__()
        self.config, self.num_layers, self.hidden_size = config, num_layers, hidden_size
        self.num_keys = num_embeddings if config.key == "token_id" else config.num_keys
        own = config.key == "ngram_hash" and config.values == "experts"
        self.key_embedding = nn.Embedding(config.num_keys, hidden_size) if own else None
        self.table: LookupTable | None = None
        self._keys: Tensor = torch.empty(0, dtype=torch.int64)
        self._inverse: Tensor = self._keys
        self._embed: list[nn.Module] = []
        self._segments: Any = None
        self._routed: Any = None

    def begin_pass(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward hook of the model's body: find the keys, and ask for their rows where there is a table.

        Raises:
            ValueError: there are embeddings and no ids.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("lookup experts are found by token id and take no inputs_embeds; pass input_ids")
        config = self.config
        wanted = kwargs.get("use_cache")
        uses_cache = base.config.use_cache if wanted is None else wanted
        missing = kwargs.get("past_key_values") is None and not base.training
        if config.key == "ngram_hash" and uses_cache and missing:
            # made here: the ids that it holds must be known from the first
            kwargs = kwargs | {"past_key_values": DynamicCache(config=base.config)}
        keys = keys_of(
            ids,
            config.key,
            order=config.ngram_order,
            num_keys=self.num_keys,
            cache=kwargs.get("past_key_values"),
            mask=kwargs.get("attention_mask"),
        )
        if self.table is not None:
            self._routed = begin_pass(self.table, keys.reshape(-1), ids.device)
            return args, kwargs
        self._keys, inverse = torch.unique(keys, return_inverse=True)
        self._inverse, self._segments = inverse.reshape(-1), None
        self._embed = [self.key_embedding or base.get_input_embeddings()]
        return args, kwargs

    def routed(self, layer: AdaptedFeedForward, gates: Tensor) -> Tensor:
        """`sum_j g_j v_j` for (B * T, N) gates."""
        if self.table is not None:
            return self._routed(layer.place, gates)
        assert layer.lookup is not None
        from_table = isinstance(layer.lookup, TableValues)
        values = layer.lookup(self._keys if from_table else self._embed[0](self._keys))
        if self._segments is None and torch.is_grad_enabled():
            self._segments = sort_segments(self._inverse, len(self._keys))
        return weighted_gather_groups(
            values, self._inverse, gates, segments=self._segments if torch.is_grad_enabled() else None
        )


def _feed_forward_name(layer: nn.Module) -> str:
    for name in ("mlp", "feed_forward"):
        if isinstance(getattr(layer, name, None), nn.Module):
            return name
    raise ValueError(f"{type(layer).__name__} has no feed-forward called mlp or feed_forward")


def add_lookup_experts(model: Any, config: AdapterConfig, *, freeze: bool = True) -> LookupAdapter:
    """Add experts to a causal language model, in place.

    Args:
        model: any transformers model whose body is `model.model` with `layers`, each with an `mlp` (or `feed_forward`).
        config: what is added.
        freeze: leave only what is added trainable.

    Raises:
        ValueError: the model has such experts, or another shape of body, or a layer that does not exist is named.
    """
    body = getattr(model, "model", None)
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or body is None:
        raise ValueError(f"{type(model).__name__} has no model.layers to add experts to")
    if hasattr(model, ATTRIBUTE):
        raise ValueError("the model has lookup experts; load the plain one to add others")
    chosen = range(len(layers)) if config.layers is None else config.layers
    for index in chosen:
        if not 0 <= index < len(layers):
            raise ValueError(f"layer {index} does not exist, the model has {len(layers)}")
    text = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    device, dtype, d = embedding.weight.device, embedding.weight.dtype, text.hidden_size
    if freeze:
        model.requires_grad_(False)
    adapter = LookupAdapter(config, len(chosen), d, len(embedding.weight))
    if adapter.key_embedding is not None:
        nn.init.normal_(adapter.key_embedding.weight, std=embedding.weight.detach().float().std().item())
    sizes: Any = SimpleNamespace(
        hidden_size=d,
        norm_eps=getattr(text, "rms_norm_eps", getattr(text, "norm_eps", 1e-5)),
        hidden_act="gelu",
    )
    for place, index in enumerate(chosen):
        router = nn.Linear(d, config.num_experts, bias=False)
        nn.init.normal_(router.weight, std=0.02)
        lookup: nn.Module
        if config.values == "table":
            lookup = TableValues(adapter.num_keys, config.num_experts, d)
        else:
            lookup = LookupExperts(sizes, config.num_experts, config.intermediate_size)
            nn.init.normal_(lookup.experts.up, std=0.02)
            nn.init.zeros_(lookup.experts.down)
        name = _feed_forward_name(layers[index])
        wrapped = AdaptedFeedForward(getattr(layers[index], name), router, lookup, place, adapter)
        wrapped.router.to(device, dtype)
        lookup.to(device, dtype)
        setattr(layers[index], name, wrapped)
    setattr(model, ATTRIBUTE, adapter.to(device, dtype))
    body.register_forward_pre_hook(adapter.begin_pass, with_kwargs=True)
    return adapter


def adapted_layers(model: Any) -> list[AdaptedFeedForward]:
    """The layers that were given experts, in order.

    Raises:
        ValueError: there are none.
    """
    found = [module for module in model.modules() if isinstance(module, AdaptedFeedForward)]
    if not found:
        raise ValueError("the model has no lookup experts; add them with add_lookup_experts")
    return sorted(found, key=lambda layer: layer.place)


def added_parameters(model: Any) -> dict[str, nn.Parameter]:
    """What `add_lookup_experts` added, by name."""
    marks = (".router.", ".lookup.", f"{ATTRIBUTE}.")
    inside = tuple(
        name for name, module in model.named_modules() if isinstance(module, (AdaptedFeedForward, LookupAdapter))
    )
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(inside) and any(mark in name for mark in marks) and ".base." not in name
    }


def adapter_source(model: Any) -> TableSource:
    """What the table of a model with added experts is computed from."""
    adapter: LookupAdapter = getattr(model, ATTRIBUTE)
    layers = adapted_layers(model)
    lookups = [layer.lookup for layer in layers if layer.lookup is not None]
    if not lookups:
        raise ValueError("the experts of this model are a table already; export the model that was trained")
    first = lookups[0]
    digested = {
        f"{layer.place}.{name}": tensor
        for layer in layers
        for name, tensor in layer.lookup.named_parameters()  # type: ignore[union-attr]
    }
    inputs: Tensor
    if isinstance(first, TableValues):
        inputs, width = torch.arange(adapter.num_keys), 0
    else:
        assert isinstance(first, LookupExperts)
        embedding: Any = adapter.key_embedding or model.get_input_embeddings()
        inputs, width = embedding.weight, first.experts.up.shape[1]
        digested[KEY_EMBEDDING] = inputs
    sizes = (adapter.config.num_experts, width, adapter.hidden_size)
    return TableSource(lookups, inputs, sizes, digested, {"adapter": adapter.config.to_dict()})

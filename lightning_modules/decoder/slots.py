"""Registry of what can fill the decoder's slots. A method registers its own builders from its `modeling.py`.

Builders get the `DecoderConfig`, the place in the model, and the slot's options as keyword arguments:

- norm: `build(config, size, **options) -> Module` mapping (..., size) to (..., size)
- projection: `build(config, in_features, out_features, bias, **options) -> Module`
- attention projection, in place of the projection: `build(config, in_features, (query, key, value widths), bias,
  **options) -> Module` mapping (..., in_features) to the three at once; attention then has no output projection
- feed-forward: `build(config, layer_index, **options) -> Module`, called as `module(hidden_states, tokens)` with the
  normalised residual stream (B, T, d) and the `TokenContext` of the forward pass
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Registry:
    """Named builders of one kind of slot.

    Args:
        kind: what the slot is called in messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._builders: dict[str, Callable[..., nn.Module]] = {}

    def register(self, name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
        """Decorator that makes a builder known under `name`."""

        def add(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
            self._builders[name] = builder
            return builder

        return add

    def __contains__(self, name: str) -> bool:
        return name in self._builders

    def check(self, name: str) -> None:
        """Raise a ValueError with the nearest names when nothing is registered under `name`."""
        if name not in self._builders:
            near = difflib.get_close_matches(str(name), self._builders, n=3, cutoff=0.4) or sorted(self._builders)
            raise ValueError(f"unknown {self.kind} {name!r}; nearest: {', '.join(near)}")

    def build(self, name: str, *args: Any, **options: Any) -> nn.Module:
        """Build what is registered under `name`; an option that it does not take is a ValueError."""
        self.check(name)
        builder = self._builders[name]
        # what the decoder itself passes is no option
        known = list(inspect.signature(builder).parameters)[len(args) :]
        for option in options:
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
                hint = f"; nearest: {near[0]}" if near else ""
                raise ValueError(f"{self.kind} {name!r} takes no option {option!r}{hint}")
        return builder(*args, **options)


NORMS = Registry("norm")
PROJECTIONS = Registry("projection")
ATTENTION_PROJECTIONS = Registry("projection")
FEED_FORWARDS = Registry("feed-forward")


@NORMS.register("rmsnorm")
def _rmsnorm(config: Any, size: int) -> nn.Module:
    return nn.RMSNorm(size, eps=config.norm_eps)


@NORMS.register("layernorm")
def _layernorm(config: Any, size: int) -> nn.Module:
    return nn.LayerNorm(size, eps=config.norm_eps)


@PROJECTIONS.register("linear")
def _linear(config: Any, in_features: int, out_features: int, bias: bool) -> nn.Module:
    return nn.Linear(in_features, out_features, bias=bias)

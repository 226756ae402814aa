"""Mixture of Lookup Experts (arXiv 2503.15798): the feed-forward slot in its training form.

Every routed expert reads the embedding of the token, not its hidden state, so its output depends on the token id alone
and can be written into a table after training (`convert.py`, `lookup.py`). All experts are active; the router reads the
normalised hidden state. There is no load-balance loss, capacity limit or noise.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels.weighted_gather import weighted_gather_groups
from ..decoder.configuration import DecoderConfig
from ..decoder.feed_forward import DenseFeedForward, StackedExperts
from ..decoder.modeling import DecoderForCausalLM
from ..decoder.slots import FEED_FORWARDS
from ..decoder.tokens import TokenContext
from .divided_experts import POOLED, DividedExperts


def router_gates(router: nn.Module, hidden_states: Tensor) -> Tensor:
    """Softmax over all experts in fp32 (fp64 for fp64 models): (..., d) to (..., N)."""
    logits = router(hidden_states)
    return logits.softmax(dim=-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


class LookupExperts(nn.Module):
    """The part of a MoLE layer that becomes a table: one norm and N experts on the embedding output.

    Args:
        config: sizes, norm and activation.
        num_experts: routed experts, N.
        intermediate_size: hidden width of a routed expert, D_r.
    """

    def __init__(self, config: DecoderConfig, num_experts: int, intermediate_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.experts = StackedExperts(num_experts, config.hidden_size, intermediate_size, config.hidden_act)

    def forward(self, embeddings: Tensor) -> Tensor:
        """v[u, j] = W2_j gelu(W1_j rmsnorm(e[u])): (U, d) to (U, N, d)."""
        return self.experts(self.norm(embeddings))


class MoLEFeedForward(nn.Module):
    """`shared(u) + sum_j g_j(u) v_j(e)`, section 3.2 and appendix pseudocode of the paper.

    u is the normalised residual stream, e the raw embedding output of the same token, g the router's softmax.

    Args:
        config: sizes; the shared expert is the dense feed-forward of `intermediate_size`.
        layer_index: place in the stack.
        num_experts: routed experts, N.
        expert_intermediate_size: hidden width of a routed expert, D_r; `intermediate_size` by default.
        expert_evaluation: `distinct` evaluates the experts once per distinct id of the micro-batch and gathers; it is
            exact. `naive` evaluates them for every token, as the released code does; it is also what a caller who
            passes `inputs_embeds` gets.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer_index: int,
        *,
        num_experts: int = 4,
        expert_intermediate_size: int | None = None,
        expert_evaluation: Literal["distinct", "naive"] = "distinct",
    ) -> None:
        super().__init__()
        if expert_evaluation not in ("distinct", "naive"):
            raise ValueError(f"expert_evaluation {expert_evaluation!r} is neither 'distinct' nor 'naive'")
        if num_experts < 1:
            raise ValueError(
                f"num_experts {num_experts} is below 1; use feed_forward: dense for a model without experts"
            )
        self.expert_evaluation = expert_evaluation
        self.shared = DenseFeedForward(config, layer_index)
        self.router = nn.Linear(config.hidden_size, num_experts, bias=False)
        self.lookup = LookupExperts(config, num_experts, expert_intermediate_size or config.intermediate_size)

    def forward(self, hidden_states: Tensor, tokens: TokenContext) -> Tensor:
        """Map the normalised residual stream (B, T, d) to (B, T, d)."""
        gates = router_gates(self.router, hidden_states)  # (B, T, N)
        shared = self.shared(hidden_states)
        if self.expert_evaluation == "naive" or tokens.input_ids is None:
            values = self.lookup(tokens.embeddings.reshape(-1, tokens.embeddings.shape[-1]))  # (B*T, N, d)
            routed = torch.einsum("tn,tnd->td", gates.reshape(-1, gates.shape[-1]).to(values.dtype), values)
        elif isinstance(self.lookup.experts, DividedExperts):
            pooled = tokens.shared[POOLED]
            values = self.lookup(pooled.embeddings)  # (U, N / P, d)
            routed = self.lookup.experts.combine(values, gates.reshape(-1, gates.shape[-1]), pooled)
        else:
            values = self.lookup(tokens.distinct.embeddings)  # (U, N, d)
            routed = combine(values, gates, tokens)
        return shared + routed.view(shared.shape).to(shared.dtype)


def combine(values: Tensor, gates: Tensor, tokens: TokenContext) -> Tensor:
    """`out[t] = sum_j gates[t, j] * values[inverse[t], j]`: values (U, N, d), gates (B, T, N), out (B*T, d)."""
    # one sort serves the backward passes of all layers
    segments = tokens.segments if torch.is_grad_enabled() and values.requires_grad else None
    return weighted_gather_groups(
        values, tokens.distinct.inverse, gates.reshape(-1, gates.shape[-1]), segments=segments
    )


class MoLEForCausalLM(DecoderForCausalLM):
    """`DecoderForCausalLM` for configurations with `feed_forward: mole`, for users who like to name the class.

    Args:
        config: a decoder configuration with the MoLE slot.

    Raises:
        ValueError: the configuration has another feed-forward.
    """

    def __init__(self, config: DecoderConfig) -> None:
        if config.feed_forward != "mole":
            raise ValueError(
                f"MoLEForCausalLM needs feed_forward 'mole', the configuration has {config.feed_forward!r}"
            )
        super().__init__(config)


FEED_FORWARDS.register("mole")(MoLEFeedForward)

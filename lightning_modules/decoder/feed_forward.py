"""Feed-forward slots that belong to no method: dense, and the sparse mixture of experts that papers compare with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration import DecoderConfig
from .slots import FEED_FORWARDS
from .tokens import TokenContext


class DenseFeedForward(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` with `gated_feed_forward`.

    Args:
        config: sizes, activation and bias.
        layer_index: place in the stack.
    """

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        super().__init__()
        d, hidden = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(d, hidden, bias=config.mlp_bias) if config.gated_feed_forward else None
        self.up = nn.Linear(d, hidden, bias=config.mlp_bias)
        self.down = nn.Linear(hidden, d, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, tokens: TokenContext | None = None) -> Tensor:
        """Map (..., d) to (..., d)."""
        if self.gate is not None:
            return self.down(self.act(self.gate(hidden_states)) * self.up(hidden_states))
        return self.down(self.act(self.up(hidden_states)))


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the router (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        logits: (T, N), before the softmax.
        mask: (T,) bool, False at padding.
    """
    squares = torch.logsumexp(logits, dim=-1) ** 2
    return squares.mean() if mask is None else squares[mask].mean()


def load_balance_loss(probabilities: Tensor, chosen: Tensor, mask: Tensor | None = None) -> Tensor:
    """N times the sum over experts of (share of assignments) x (mean probability), 1 when balanced.

    Switch Transformer (arXiv 2101.03961, eq. 4 to 6); shares are of all top-k assignments.

    Args:
        probabilities: (T, N) router softmax.
        chosen: (T, k) expert indices.
        mask: (T,) bool, False at padding.
    """
    if mask is not None:
        probabilities, chosen = probabilities[mask], chosen[mask]
    num_experts = probabilities.shape[-1]
    counts = torch.bincount(chosen.reshape(-1), minlength=num_experts).to(probabilities.dtype)
    return num_experts * torch.sum(counts / chosen.numel() * probabilities.mean(dim=0))


class MoEFeedForward(nn.Module):
    """Sparse mixture of ungated experts, top-k of a softmax router with renormalised weights (Mixtral's routing).

    This is the baseline of MoLE's paper (arXiv 2503.15798, section 4.1): no shared expert, k = 2, expert width half
    of the dense feed-forward, z-loss 0.001 and load-balance loss 0.01. deviation: the released evaluation code takes
    the top 10; this follows the paper.

    Args:
        config: sizes and activation.
        layer_index: place in the stack.
        num_experts: experts, N.
        num_experts_per_token: experts used for each token, k.
        expert_intermediate_size: hidden width of an expert; half of `intermediate_size` by default.
        z_loss_weight: weight of `router_z_loss`.
        load_balance_loss_weight: weight of `load_balance_loss`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer_index: int,
        *,
        num_experts: int = 10,
        num_experts_per_token: int = 2,
        expert_intermediate_size: int | None = None,
        z_loss_weight: float = 0.001,
        load_balance_loss_weight: float = 0.01,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_token <= num_experts:
            raise ValueError(
                f"num_experts_per_token {num_experts_per_token} is not between 1 and {num_experts} experts"
            )
        width = expert_intermediate_size or config.intermediate_size // 2
        self.num_experts, self.top_k = num_experts, num_experts_per_token
        self.loss_weights = {"z_loss": z_loss_weight, "load_balance_loss": load_balance_loss_weight}
        self.router = nn.Linear(config.hidden_size, num_experts, bias=False)
        self.experts = StackedExperts(num_experts, config.hidden_size, width, config.hidden_act)

    def forward(self, hidden_states: Tensor, tokens: TokenContext) -> Tensor:
        """Map (B, T, d) to (B, T, d); adds the weighted auxiliary losses to `tokens` while training."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, d)
        logits = self.router(x)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        probabilities = logits.softmax(dim=-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)  # (T, k)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training:
            mask = None if tokens.attention_mask is None else tokens.attention_mask.reshape(-1).bool()
            tokens.add_loss("z_loss", self.loss_weights["z_loss"] * router_z_loss(logits, mask))
            balance = load_balance_loss(probabilities, chosen, mask)
            tokens.add_loss("load_balance_loss", self.loss_weights["load_balance_loss"] * balance)
        # one stable sort groups the assignments by expert, so that each expert sees one contiguous slice
        order = chosen.reshape(-1).argsort(stable=True)
        rows = order // self.top_k
        counts = torch.bincount(chosen.reshape(-1), minlength=self.num_experts).tolist()
        out = torch.cat(self.experts.each(x[rows].split(counts)))
        out = out * weights.reshape(-1)[order, None].to(out.dtype)
        y = torch.zeros_like(x, dtype=out.dtype).index_add(0, rows, out)
        return y.view(hidden_states.shape).to(hidden_states.dtype)


class StackedExperts(nn.Module):
    """N ungated two-layer experts of the same size, without bias, their weights stacked.

    Args:
        num_experts: N.
        hidden_size: width of inputs and outputs, d.
        intermediate_size: hidden width of one expert, D.
        hidden_act: activation by its transformers name.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.act = ACT2FN[hidden_act]

    def each(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Expert j on `inputs[j]`, (..., d) each."""
        # unbind: indexing would give every expert a gradient of the size of the whole stack
        weights = zip(inputs, self.up.unbind(), self.down.unbind(), strict=True)
        return [F.linear(self.act(F.linear(x, up)), down) for x, up, down in weights]

    def forward(self, x: Tensor) -> Tensor:
        """Every expert on every row: (U, d) to (U, N, d)."""
        num_experts, width, d = self.up.shape
        hidden = self.act(F.linear(x, self.up.reshape(num_experts * width, d)))  # (U, N * D)
        hidden = hidden.view(-1, num_experts, width).transpose(0, 1)  # (N, U, D)
        return torch.bmm(hidden, self.down.transpose(1, 2)).transpose(0, 1)  # (U, N, d)


FEED_FORWARDS.register("dense")(DenseFeedForward)
FEED_FORWARDS.register("moe")(MoEFeedForward)

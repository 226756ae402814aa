"""What training a MoLE preset takes: parameters, bytes of state, and what splitting the experts would send.

All experts are active and read nothing but token ids, so expert parallelism needs no routing: each of P processes holds
N/P experts of every layer, computes its part of `sum_j g_j v_j` for all tokens of the group, and one all-reduce of
(tokens, d) per layer and direction adds the parts. Tensor parallelism (the experts' hidden width divided by P) ends in
the same all-reduce. Neither is implemented here: `fsdp` shards the same state with Lightning alone.
"""

from dataclasses import dataclass
from typing import Any

# float32 weight, gradient and two moments
STATE_BYTES = 16


@dataclass(frozen=True)
class TrainingPlan:
    """Closed forms; nothing is measured.

    Attributes:
        parameters: all of them.
        expert_parameters: of the routed experts and their norms, which become the table.
        state_bytes: weights, gradients and AdamW's moments in float32, on one process.
        expert_activation_bytes: hidden activations and outputs of one layer's experts for one micro-batch with no id
            repeated, 16 bits; divide by tokens per distinct id.
        table_row_bytes: of the exported table, 16 bits.
        table_bytes: all its rows.
    """

    parameters: int
    expert_parameters: int
    state_bytes: int
    expert_activation_bytes: int
    table_row_bytes: int
    table_bytes: int

    def sharded_state_bytes(self, num_processes: int, *, experts_only: bool = False) -> int:
        """State on each process: everything sharded (`fsdp`), or the experts alone (expert or tensor parallelism)."""
        kept = self.parameters - self.expert_parameters if experts_only else 0
        return STATE_BYTES * (kept + -(-(self.parameters - kept) // num_processes))

    def describe(self, num_processes: int = 1) -> str:
        """One paragraph for a log."""
        text = (
            f"{self.parameters:,} parameters, {self.expert_parameters:,} of them in routed experts; "
            f"{self.state_bytes / 1e9:.2f} GB of weights, gradients and AdamW state; experts' activations up to "
            f"{self.expert_activation_bytes / 1e9:.2f} GB per layer and micro-batch, divided by tokens per distinct "
            f"id; table {self.table_bytes / 1e9:.2f} GB, {self.table_row_bytes:,} bytes per token"
        )
        if num_processes > 1:
            sharded = self.sharded_state_bytes(num_processes) / 1e9
            divided = self.sharded_state_bytes(num_processes, experts_only=True) / 1e9
            text += f"; on {num_processes} processes {sharded:.2f} GB each with fsdp, {divided:.2f} GB with the experts"
            text += " divided"
        return text


def training_plan(model: Any, *, tokens_per_micro_batch: int = 0) -> TrainingPlan:
    """The plan of a MoLE decoder, which may live on the meta device.

    Args:
        model: the training form.
        tokens_per_micro_batch: of one process.
    """
    layers = [layer.feed_forward for layer in model.model.layers]
    num_experts, width, d = layers[0].lookup.experts.up.shape
    parameters = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for layer in layers for p in layer.lookup.parameters())
    row = len(layers) * num_experts * d * 2
    return TrainingPlan(
        parameters=parameters,
        expert_parameters=experts,
        state_bytes=STATE_BYTES * parameters,
        # before and after the activation, and the output
        expert_activation_bytes=tokens_per_micro_batch * num_experts * (2 * width + d) * 2,
        table_row_bytes=row,
        table_bytes=row * model.config.vocab_size,
    )


def all_reduce_bytes(hidden_size: int, num_tokens: int, num_processes: int, *, value_bytes: int = 2) -> int:
    """Bytes that each process sends per layer and direction when the experts are divided (ring all-reduce)."""
    return 2 * num_tokens * hidden_size * value_bytes * (num_processes - 1) // num_processes

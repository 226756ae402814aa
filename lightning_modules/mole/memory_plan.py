"""What training a MoLE preset takes: parameters, bytes of state per process, and what the processes send each other.

All experts are active and read nothing but token ids, so dividing them needs no routing (`divided_experts.py`): each of
P processes evaluates its part of the experts for the tokens of all, and a reduce-scatter of (P * tokens, d) per layer,
in the backward pass an all-gather of as much, gives every process the sums of its own. FSDP alone shards the same
state, but every process then gathers all experts' weights, twice, and adds up gradients of that size.
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
        num_layers: layers.
        hidden_size: d.
        tokens_per_micro_batch: of one process.
    """

    parameters: int
    expert_parameters: int
    state_bytes: int
    expert_activation_bytes: int
    table_row_bytes: int
    table_bytes: int
    num_layers: int
    hidden_size: int
    tokens_per_micro_batch: int = 0

    def sharded_state_bytes(self, num_processes: int, *, replicas: int = 1) -> int:
        """State on each process: all of it sharded, what is no expert over `num_processes / replicas` only."""
        dense = self.parameters - self.expert_parameters
        return STATE_BYTES * (-(-self.expert_parameters // num_processes) - (-dense * replicas // num_processes))

    def describe(self, num_processes: int = 1, *, group_size: int | None = None) -> str:
        """One paragraph for a log.

        Args:
            num_processes: over which the state is sharded.
            group_size: processes that `divide_experts` divides the experts over; without it the text says what
                sharding and dividing over all processes would take.
        """
        text = (
            f"{self.parameters:,} parameters, {self.expert_parameters:,} of them in routed experts; "
            f"{self.state_bytes / 1e9:.2f} GB of weights, gradients and AdamW state; experts' activations up to "
            f"{self.expert_activation_bytes / 1e9:.2f} GB per layer and micro-batch, divided by tokens per distinct "
            f"id; table {self.table_bytes / 1e9:.2f} GB, {self.table_row_bytes:,} bytes per token"
        )
        if num_processes > 1:
            group = group_size or num_processes
            # with a group of one, everything is sharded over the other dimension
            replicas = num_processes // group if group > 1 else 1
            each = self.sharded_state_bytes(num_processes, replicas=replicas) / 1e9
            sent, gathered = self.exchanged_bytes(group) / 1e9, self.gathered_bytes(num_processes) / 1e9
            if group_size:
                text += (
                    f"; on {num_processes} processes {each:.2f} GB each; experts divided by {group}: each process "
                    f"sends {sent:.3f} GB per micro-batch for them, where FSDP alone would send {gathered:.3f} GB"
                )
            else:
                text += (
                    f"; sharded over {num_processes} processes {each:.2f} GB each: with fsdp each sends {gathered:.3f} "
                    f"GB per micro-batch for the experts, with ModelParallelStrategy, which divides them, {sent:.3f} GB"
                )
        return text

    def exchanged_bytes(self, num_processes: int) -> int:
        """Bytes that each of P processes sends per micro-batch of 16-bit sums when experts are divided."""
        return 2 * self.num_layers * exchange_bytes(self.hidden_size, self.tokens_per_micro_batch, num_processes)

    def gathered_bytes(self, num_processes: int) -> int:
        """Bytes that each process sends per micro-batch under FSDP: weights for both passes, and gradients, 16 bits."""
        return 3 * 2 * self.expert_parameters * (num_processes - 1) // num_processes


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
        num_layers=len(layers),
        hidden_size=d,
        tokens_per_micro_batch=tokens_per_micro_batch,
    )


def exchange_bytes(hidden_size: int, num_tokens: int, num_processes: int, *, value_bytes: int = 2) -> int:
    """Bytes that each process sends per layer and direction when the experts are divided.

    Ring reduce-scatter of the sums for the tokens of all; in the backward pass an all-gather of as much. Gates and ids
    are left out: N and 1 values per token where these are d.

    Args:
        hidden_size: d.
        num_tokens: of one process.
        num_processes: that divide the experts.
        value_bytes: of the sums.
    """
    return num_tokens * hidden_size * value_bytes * (num_processes - 1)

"""Routed experts divided over the processes of a device mesh: what training a model with 16 experts per layer needs.

All experts are active, and read nothing but token ids. So no expert's weights have to travel, and no token has to be
routed: the processes of a group put their token ids together, each evaluates its part of the experts once per distinct
id of the group, and one reduce-scatter per layer adds up `sum_j g_j v_j`. Both ways of dividing end in that same sum:

* `experts`: each process has N/P whole experts, and gets their gates for all tokens of the group.
* `width`: each process has all experts with 1/P of their hidden width, and gets all gates.

Everything else is left to FSDP (`fully_shard`) over the same processes. Beyond the paper (arXiv 2503.15798), which
trains data-parallel only.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ...kernels.weighted_gather import Segments, sort_segments, weighted_gather_groups
from ..decoder.feed_forward import StackedExperts
from ..decoder.modeling import DecoderForCausalLM
from ..decoder.tokens import TokenContext

Division = Literal["experts", "width"]
POOLED = "pooled_tokens"


class PooledTokens(NamedTuple):
    """The tokens of all processes of a group.

    embeddings: (U, d) of the distinct ids; inverse: (P * R,) which of them each token is, process after process;
    segments: their sort, for the backward passes of all layers; num_rows: R, tokens per process with padding.
    """

    embeddings: Tensor
    inverse: Tensor
    segments: Segments | None
    num_rows: int


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


class DividedExperts(StackedExperts):
    """This process's part of the experts of a layer; its parameters are DTensors of the whole.

    Gradients of a group's tokens meet here, whereas everything else sees those of its own process's and is averaged by
    FSDP. Their mean takes a factor 1/P for these weights, and none for what the experts read.

    Args:
        whole: the experts, alike on all processes; rank 0's are taken.
        mesh: one-dimensional.
        division: which dimension is divided.

    Raises:
        ValueError: the dimension does not divide by the number of processes.
    """

    def __init__(self, whole: StackedExperts, mesh: DeviceMesh, division: Division) -> None:
        nn.Module.__init__(self)
        num_experts, width, _ = whole.up.shape
        size = num_experts if division == "experts" else width
        if size % mesh.size():
            what = "experts" if division == "experts" else "hidden units of an expert"
            raise ValueError(f"{size} {what} do not divide by {mesh.size()} processes; use a divisor of {size}")
        self.mesh, self.division, self.act = mesh, division, whole.act
        up, down = (Shard(0), Shard(0)) if division == "experts" else (Shard(1), Shard(2))
        self.up = nn.Parameter(distribute_tensor(whole.up.data, mesh, [up]))
        self.down = nn.Parameter(distribute_tensor(whole.down.data, mesh, [down]))

    def forward(self, x: Tensor) -> Tensor:
        """(U, d) to this process's experts' outputs (U, N / P, d), or its part of all outputs (U, N, d)."""
        size = self.mesh.size()
        part: Any = _Part(_local(self.up), _local(self.down), self.act)
        values = StackedExperts.forward(part, _ScaleGradient.apply(x, float(size)))
        return _ScaleGradient.apply(values, 1 / size)

    def combine(self, values: Tensor, gates: Tensor, pooled: PooledTokens) -> Tensor:
        """`sum_j g_j v_j` of this process's T tokens: values from `forward`, gates (T, N), out (T, d)."""
        mesh, num_tokens = self.mesh, len(gates)
        gates = nn.functional.pad(gates, (0, 0, 0, pooled.num_rows - num_tokens))
        every: Any = DTensor.from_local(gates, mesh, [Shard(0)])
        if self.division == "experts":
            gates = every.redistribute(placements=[Shard(1)]).to_local()
        else:
            # every process knows the inner products of its part of the values only
            gates = every.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        sums = weighted_gather_groups(values, pooled.inverse, gates.contiguous(), segments=pooled.segments)
        total: Any = DTensor.from_local(sums, mesh, [Partial()])
        return total.redistribute(placements=[Shard(0)]).to_local()[:num_tokens]


class _Part(NamedTuple):
    up: Tensor
    down: Tensor
    act: Any


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def pool_tokens(tokens: TokenContext, embed: Any, mesh: DeviceMesh, *, even: bool) -> PooledTokens:
    """Put the ids of a group together.

    Args:
        tokens: of this process's pass.
        embed: the embedding.
        mesh: of the group.
        even: every process has as many tokens; else they tell each other, and the shorter ones are padded.

    Raises:
        ValueError: there are embeddings and no ids.
    """
    if tokens.input_ids is None:
        raise ValueError("divided experts are found by token id and take no inputs_embeds; pass input_ids")
    ids = tokens.input_ids.reshape(-1)
    num_rows = len(ids)
    if not even:
        num_rows = int(_gather(torch.tensor([num_rows], device=ids.device), mesh).max())
        ids = torch.cat([ids, ids[:1].expand(num_rows - len(ids))])
    distinct, inverse = torch.unique(_gather(ids, mesh), return_inverse=True)
    segments = sort_segments(inverse, len(distinct)) if torch.is_grad_enabled() else None
    return PooledTokens(embed(distinct), inverse, segments, num_rows)


def _gather(values: Tensor, mesh: DeviceMesh) -> Tensor:
    every: Any = DTensor.from_local(values, mesh, [Shard(0)])
    return every.full_tensor()


def divide_experts(model: Any, mesh: DeviceMesh, *, division: Division = "experts") -> None:
    """Divide a MoLE decoder's experts over a mesh, and shard everything else with FSDP; in place, for training.

    Each process keeps 1/P of all weights, gradients and optimiser state, of P in the last dimension of the mesh. Over
    the first dimension of a two-dimensional mesh both are replicated (dense weights) or sharded further (experts).
    Batches differ between all processes, and have as many tokens each while training.

    Args:
        model: the training form, on the device of the mesh.
        mesh: named dimensions; the last one is the group that divides the experts, where links are fastest.
        division: `experts`, whole experts per process, or `width`, all experts in part.

    Raises:
        ValueError: no MoLE decoder, experts evaluated per token, or sizes that do not divide.
    """
    from .modeling import MoLEFeedForward

    layers = [layer.feed_forward for layer in model.model.layers] if isinstance(model, DecoderForCausalLM) else []
    if not layers or not all(isinstance(layer, MoLEFeedForward) for layer in layers):
        raise ValueError("only a decoder with feed_forward 'mole' has experts to divide")
    if any(layer.expert_evaluation != "distinct" for layer in layers):
        raise ValueError("experts that are evaluated for every token cannot be divided; use expert_evaluation distinct")
    names: Any = mesh.mesh_dim_names
    group, outer = mesh[names[-1]], mesh[names[0]] if mesh.ndim == 2 and mesh.size(0) > 1 else None
    for layer in layers:
        layer.lookup.experts = DividedExperts(layer.lookup.experts, group, division)
    divided = {p for layer in layers for p in layer.lookup.experts.parameters()}
    if outer is not None:
        for layer in layers:
            fully_shard(layer.lookup.experts, mesh=outer)
    dense = group if outer is None else outer if group.size() == 1 else mesh
    for block in model.model.layers:
        fully_shard(block, mesh=dense, ignored_params=divided)
    fully_shard(model, mesh=dense, ignored_params=divided)
    body = model.model
    plain_context = body.token_context

    def token_context(input_ids: Tensor | None, embeddings: Tensor, attention_mask: Tensor | None) -> TokenContext:
        tokens = plain_context(input_ids, embeddings, attention_mask)
        # before the first layer, whose checkpoint it would otherwise belong to
        tokens.shared[POOLED] = pool_tokens(tokens, body.get_input_embeddings(), group, even=body.training)
        return tokens

    body.token_context = token_context


def whole_model(model: Any) -> DecoderForCausalLM | None:
    """The model that `divide_experts` divided, in one piece on rank 0's CPU, for export; None on other ranks.

    All processes have to call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    whole = DecoderForCausalLM(model.config).to(model.dtype)
    whole.load_state_dict(state)
    return whole.train(model.training)

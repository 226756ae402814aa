"""FlashNorm (arXiv 2407.09577), the exact rival of fused norms in language models: RMSNorm folded as far as it goes.

The norm's weight goes into the linear layers that read it, and these divide by the root mean square after their
product, so that product and mean square may run side by side. Exact, without training; but the mean square is still
computed. A peer and no option for users: torch.compile fuses the same operations and leaves the weights as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InverseRMS(nn.Module):
    """In a norm's place: hands its input on, and keeps `1 / rms(x)` for the layers that read it.

    Args:
        eps: added to the mean square.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.inverse: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to itself."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.inverse = torch.rsqrt(x.to(dtype).square().mean(-1, keepdim=True) + self.eps).to(x.dtype)
        return x


class DeferredLinear(nn.Module):
    """`(W diag(g)) x / rms(x) + bias`.

    Args:
        linear: W and bias.
        weight: (C,) g, the norm's.
        source: what stands in the norm's place.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, source: InverseRMS) -> None:
        super().__init__()
        folded = linear.weight.double() * weight.double()
        self.weight, self.bias = nn.Parameter(folded.to(linear.weight.dtype)), linear.bias
        # the model has it as a module of its own
        self._source = (source,)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., out)."""
        inverse = self._source[0].inverse
        assert inverse is not None
        out = F.linear(x, self.weight) * inverse
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def defer_norms(model: Any) -> None:
    """Do this to every block of a transformers Llama, in place.

    The last norm stays: its reader, the output layer, has many more channels to divide than it has to read, and
    shares its weight with the embedding.
    """
    for layer in model.model.layers:
        for name, owner, readers in (
            ("input_layernorm", layer.self_attn, ("q_proj", "k_proj", "v_proj")),
            ("post_attention_layernorm", layer.mlp, ("gate_proj", "up_proj")),
        ):
            norm = getattr(layer, name)
            source = InverseRMS(norm.variance_epsilon)
            for reader in readers:
                setattr(owner, reader, DeferredLinear(getattr(owner, reader), norm.weight, source))
            setattr(layer, name, source)

from .causal import causal_linear_attention
from .ops import Backend, Order, cheaper_order, linear_attention
from .reference import linear_attention_reference

__all__ = [
    "Backend",
    "Order",
    "causal_linear_attention",
    "cheaper_order",
    "linear_attention",
    "linear_attention_reference",
]

"""Named decoder sizes. A method adds its own with `register_preset`.

Sizes are those of MoLE's paper (arXiv 2503.15798, table of model architectures), which trains dense and MoE baselines
of its own: 50 304 vocabulary rows, RMSNorm, sequential residuals, untied embeddings, normal initialisation with
standard deviation 0.01 (released training command).
"""

from collections.abc import Iterable
from typing import Any

from .configuration import DecoderConfig, check_name

PRESETS: dict[str, dict[str, Any]] = {}


def register_preset(name: str, **fields: Any) -> None:
    """Make `decoder_config(name)` return a `DecoderConfig` with these fields."""
    if name in PRESETS:
        raise ValueError(f"preset {name!r} is registered twice")
    PRESETS[name] = fields


def check_fields(names: Iterable[str]) -> None:
    """Raise a ValueError for a name that is no field of `DecoderConfig`: transformers would keep it and say nothing."""
    for name in names:
        check_name("field of the model", name, DecoderConfig.__dataclass_fields__)


def decoder_config(name: str, **overrides: Any) -> DecoderConfig:
    """The preset's configuration, with single fields replaced.

    Raises:
        ValueError: no such preset or field; the message has the nearest names.
    """
    check_name("preset", name, PRESETS)
    check_fields(overrides)
    return DecoderConfig(**(PRESETS[name] | overrides))


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 1024},
    "small": {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8},
    "160m": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "410m": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
    "1b": {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 8},
}
# tiny and small are ours, for CPUs and for one GPU: they take the initialisation that suits their width
for _size, _fields in SIZES.items():
    _fields["initializer_range"] = 0.02 if _size in ("tiny", "small") else 0.01
    register_preset(f"dense-{_size}", **_fields)
# the paper's baselines: as many training parameters as MoLE with 4 and with 16 experts
for _size, _num_experts in (
    *((size, 10) for size in SIZES),
    ("160m", 34),
    ("410m", 34),
):
    register_preset(
        f"moe-{_size}-{_num_experts}e",
        **SIZES[_size],
        feed_forward="moe",
        feed_forward_options={"num_experts": _num_experts, "num_experts_per_token": 2},
    )

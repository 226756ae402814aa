"""MoLE's sizes, and the two sets of settings in which its paper and its released code differ."""

from typing import Any

from ..decoder.presets import SIZES, register_preset

# of the paper's sizes, 16 experts were not trained at 1B
for _size, _num_experts in (*((size, 4) for size in SIZES), ("tiny", 16), ("160m", 16), ("410m", 16)):
    register_preset(
        f"mole-{_size}-{_num_experts}e",
        **SIZES[_size],
        feed_forward="mole",
        feed_forward_options={"num_experts": _num_experts},
    )

# `code`: the released training command and the inference model that the published checkpoints load into.
# `paper`: the appendix of arXiv 2503.15798. Everything else is the same in both.
RECIPES: dict[str, dict[str, Any]] = {
    "code": {"weight_decay": 0.1, "partial_rotary_factor": 1.0},
    "paper": {"weight_decay": 0.01, "partial_rotary_factor": 0.25},
}
LEARNING_RATES = {"160m": 6.0e-4, "410m": 3.0e-4, "1b": 3.0e-4}

"""A Llama of SmolLM2-135M's shape: RMSNorm, FlashNorm, PRepBN unfused and fused; decoding steps and prefill.

All decode into a static cache, which the compiler needs: a step writes the same place of it every time.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from ...lightning_modules.slab import fused_model, replace_norms
from .registry import Settings
from .rows import Row
from .slab_flash_norm import defer_norms
from .slab_forms import LIMITS, Forms, dtype_of, matmul, matmul_bound, operations, settle
from .timing import copying, measure

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
QUICK: dict[str, Any] = SMOLLM2_135M | {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
PROMPT_TOKENS, PREFILL_TOKENS = 32, 256
PEERS = ("rmsnorm_eager", "rmsnorm_compiled", "flashnorm", "prepbn_unfused")
WEIGHTS_BOUND = "copy of the weights' bytes"


def make_models(settings: Settings) -> dict[str, Any]:
    """The forms by name, with the same random weights."""
    torch.manual_seed(settings.seed)
    plain: Any = LlamaForCausalLM(LlamaConfig(**(QUICK if settings.quick else SMOLLM2_135M)))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    plain = plain.to(settings.device, dtype_of(settings)).eval()
    flash, unfused = copy.deepcopy(plain), copy.deepcopy(plain)
    defer_norms(flash)
    replace_norms(unfused)
    settle(unfused, settings.seed)
    return {"rmsnorm": plain, "flashnorm": flash, "prepbn_unfused": unfused, "fused": fused_model(unfused)}


def language_rows(settings: Settings) -> Iterator[Row]:
    """Rows of decoding at batches of 1 and 8, and of prefill."""
    name, models = "llama_tiny" if settings.quick else "smollm2_135m", make_models(settings)
    for batch in (1, 8):
        torch._dynamo.reset()
        calls = {form: decoding_step(model, batch, settings) for form, model in models.items()}
        kinds = ("rmsnorm", "fused") if batch == 1 else ()
        compiled = {form: decoding_step(models[form], batch, settings, compiled=True) for form in kinds}
        case = f"{name} decode batch={batch}"
        yield from _rows(case, "decode_ms_per_step", calls, compiled, models, ("tokens_per_s", batch), settings)
    torch._dynamo.reset()
    ids = _ids(models["rmsnorm"], (1, PREFILL_TOKENS), settings)
    calls = {form: prefill(model, ids) for form, model in models.items()}
    compiled = {form: prefill(torch.compile(models[form], dynamic=False), ids) for form in ("rmsnorm", "fused")}
    case = f"{name} prefill tokens={PREFILL_TOKENS} batch=1"
    yield from _rows(case, "prefill_ms", calls, compiled, models, ("tokens_per_s", PREFILL_TOKENS), settings)


def _ids(model: Any, shape: tuple[int, int], settings: Settings) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(settings.device)


def prefill(model: Callable[..., Any], ids: Tensor) -> Callable[[], Tensor]:
    """Logits of the last of all tokens, without a cache."""
    return lambda: model(ids, use_cache=False, logits_to_keep=1).logits


@torch.no_grad()
def decoding_step(model: Any, batch: int, settings: Settings, *, compiled: bool = False) -> Callable[[], Tensor]:
    """Logits of one token per sequence after a prompt, always the same."""
    ids = _ids(model, (batch, PROMPT_TOKENS + 1), settings)
    cache: Any = StaticCache(model.config, max_cache_len=2 * PROMPT_TOKENS)
    model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    run: Any = torch.compile(model, dynamic=False) if compiled else model
    token, place = ids[:, -1:], torch.full((batch, 1), PROMPT_TOKENS, device=ids.device)

    def step() -> Tensor:
        out = run(token, position_ids=place, past_key_values=cache, use_cache=True).logits
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT_TOKENS)
        return out

    return step


@torch.no_grad()
def _rows(
    case: str,
    metric: str,
    calls: dict[str, Callable[[], Tensor]],
    compiled: dict[str, Callable[[], Tensor]],
    models: dict[str, nn.Module],
    per_second: tuple[str, int],
    settings: Settings,
) -> Iterator[Row]:
    forms = Forms(case, LIMITS[dtype_of(settings)])
    forms.add("rmsnorm_eager", calls["rmsnorm"])
    forms.add("flashnorm", calls["flashnorm"], same_as="rmsnorm_eager")
    forms.add("prepbn_unfused", calls["prepbn_unfused"])
    forms.add("fused", calls["fused"], same_as="prepbn_unfused")
    forms.add_compiled("rmsnorm_compiled", compiled.get("rmsnorm"), same_as="rmsnorm_eager", settings=settings)
    forms.add_compiled("fused_compiled", compiled.get("fused"), same_as="fused", settings=settings)
    decoding = metric.startswith("decode")
    num_bytes = sum(p.numel() * p.itemsize for p in models["fused"].parameters())
    num_operations = operations(forms.calls["fused"])
    limit = copying(num_bytes, settings.device) if decoding else matmul(settings)
    timings = measure(
        {**forms.calls, "limit": limit}, device=settings.device, repeats=settings.repeats, warmup=1, seed=settings.seed
    )
    bound = {"bound": WEIGHTS_BOUND, "bound_value": timings["limit"].median_ms}
    if not decoding:
        bound = matmul_bound(num_operations, timings["limit"])
    yield from forms.rows(case, metric, "fused", PEERS, timings, per_second=per_second, **bound)
    yield from forms.rows(
        f"{case} compiled", metric, "fused_compiled", PEERS[:2], timings, per_second=per_second, **bound
    )

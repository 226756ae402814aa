"""DeiT-T and Swin-T at 224 x 224: fused against LayerNorm and unfused, with softmax and with linear attention.

`norms_pct` is the share of the eager LayerNorm model's time that its norms take when they run alone on inputs of their
shapes: leaving norms out cannot win more than that.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...lightning_modules.slab import fused_classifier
from ...lightning_modules.vision import VisionForImageClassification, vision_config
from .registry import Settings
from .rows import Row
from .slab_forms import LIMITS, Forms, dtype_of, matmul, matmul_bound, operations, settle
from .timing import measure

MODELS = {"deit_t": "deit-t", "swin_t": "swin-t"}
# SLAB's own: linear attention in all of DeiT, and in the first two of Swin's stages
LINEAR: dict[str, dict[str, Any]] = {
    "deit_t": {"attention": "simplified_linear", "pooling": "mean"},
    "swin_t": {"attention": ["simplified_linear", "simplified_linear", "softmax", "softmax"]},
}
IMAGE = 224


class Setting(NamedTuple):
    """A batch and how it is timed."""

    batch: int
    repeats: int
    single_calls: bool


def image_rows(settings: Settings) -> Iterator[Row]:
    """Rows for every model and batch."""
    if settings.quick:
        plan = [("deit_t", Setting(1, 3, single_calls=True))]
    else:
        large = settings.repeats if settings.device == "cuda" else 5
        plan = [
            ("deit_t", Setting(1, settings.repeats, single_calls=False)),
            ("deit_t", Setting(64, large, single_calls=settings.device != "cuda")),
            ("swin_t", Setting(1, settings.repeats, single_calls=False)),
            ("swin_t", Setting(64, large if settings.device == "cuda" else 3, single_calls=settings.device != "cuda")),
        ]
    for name, setting in plan:
        # compiled code is kept per function, and only so much of it
        torch._dynamo.reset()
        yield from _rows(name, setting, settings)


def make(name: str, norm: str, settings: Settings, **fields: Any) -> VisionForImageClassification:
    """A classifier with random weights; the same for the same fields."""
    torch.manual_seed(settings.seed)
    model: Any = VisionForImageClassification(vision_config(MODELS[name], norm=norm, **fields))
    settle(model, settings.seed)
    return model.to(settings.device, dtype_of(settings)).eval()


def logits(model: Callable[..., Any], x: Tensor) -> Callable[[], Tensor]:
    """The timed call."""
    return lambda: model(x).logits


@torch.no_grad()
def _rows(name: str, setting: Setting, settings: Settings) -> Iterator[Row]:
    case = f"{name} batch={setting.batch}"
    dtype = dtype_of(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(setting.batch, 3, IMAGE, IMAGE, generator=generator).to(settings.device, dtype)
    plain, unfused = make(name, "layernorm", settings), make(name, "prepbn", settings)
    linear = make(name, "prepbn", settings, **LINEAR[name])
    fused, slab = fused_classifier(unfused), fused_classifier(linear)
    forms = Forms(case, LIMITS[dtype])
    forms.add("layernorm_eager", logits(plain, x))
    forms.add("prepbn_unfused", logits(unfused, x))
    forms.add("fused", logits(fused, x), same_as="prepbn_unfused")
    forms.add("slab_unfused", logits(linear, x))
    forms.add("slab", logits(slab, x), same_as="slab_unfused")
    del forms.calls["slab_unfused"]
    for kind, model in (("layernorm", plain), ("fused", fused), ("slab", slab)):
        eager = "layernorm_eager" if kind == "layernorm" else kind
        chosen = setting.batch == 1 or kind != "slab"
        compiled = logits(torch.compile(model, dynamic=False), x) if chosen else None
        forms.add_compiled(f"{kind}_compiled", compiled, same_as=eager, settings=settings)
    counts = {form: operations(forms.calls[form]) for form in ("fused", "slab")}
    calls = {**forms.calls, "norms": norms_alone(plain, x), "matmul": matmul(settings)}
    timings = measure(
        calls, device=settings.device, repeats=setting.repeats, warmup=1, single_calls=setting.single_calls,
        seed=settings.seed,
    )  # fmt: skip
    bounds = {form: matmul_bound(count, timings["matmul"]) for form, count in counts.items()}
    options: dict[str, Any] = {"timings": timings, "per_second": ("images_per_s", setting.batch)}
    peers = ("layernorm_eager", "layernorm_compiled", "prepbn_unfused")
    yield from forms.rows(case, "latency_ms", "fused", peers, **options, **bounds["fused"])
    yield from forms.rows(f"{case} compiled", "latency_ms", "fused_compiled", peers[:2], **options, **bounds["fused"])
    case = f"{case} attention=simplified_linear"
    yield from forms.rows(case, "latency_ms", "slab", (*peers[:2], "fused"), **options, **bounds["slab"])
    yield from forms.rows(f"{case} compiled", "latency_ms", "slab_compiled", peers[:2], **options, **bounds["slab"])
    share = 100 * timings["norms"].median_ms / timings["layernorm_eager"].median_ms
    yield Row(f"{name} batch={setting.batch}", "norms_pct", share, "%", repeats=setting.repeats)


@torch.no_grad()
def norms_alone(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """All LayerNorms of a model on inputs of the shapes that they get in it."""
    found: list[tuple[nn.Module, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append((module, torch.empty_like(inputs[0])))

    hooks = [part.register_forward_pre_hook(record) for part in model.modules() if isinstance(part, nn.LayerNorm)]
    model(x)
    for hook in hooks:
        hook.remove()
    # norms of one shape share an input, as large ones would not fit together
    shared: dict[torch.Size, Tensor] = {}
    pairs = [(norm, shared.setdefault(like.shape, torch.randn_like(like))) for norm, like in found]
    found.clear()

    def call() -> None:
        for norm, values in pairs:
            norm(values)

    return call

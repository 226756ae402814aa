"""The SLAB benchmark: the rows that anyone may look for, reasons, bounds by count; FlashNorm equals RMSNorm."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tenfold.experiments.bench import slab, slab_attention, slab_forms, slab_images, slab_language
from tenfold.experiments.bench.registry import Settings
from tenfold.experiments.bench.rows import Row
from tenfold.experiments.bench.slab_flash_norm import DeferredLinear, InverseRMS, defer_norms
from tenfold.experiments.bench.slab_forms import Forms, operations
from tenfold.experiments.bench.timing import Timing, WrongResult
from tenfold.lightning_modules.vision import VisionConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

QUICK = Settings("cpu", quick=True, seed=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers of two small layers in the published ones' place."""

    def small(preset: str, **fields: object) -> VisionConfig:
        sizes = {"hidden_sizes": [12], "depths": [2], "num_heads": [3], "patch_size": 8}
        return VisionConfig(image_size=32, num_labels=5, **sizes, **fields)

    monkeypatch.setattr(slab_images, "vision_config", small)
    monkeypatch.setattr(slab_images, "IMAGE", 32)


def test_quick_rows_carry_the_agreed_names(small_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = list(slab.run(QUICK))

    def peers(case: str, metric: str) -> set[str | None]:
        return {row.peer for row in rows if (row.case, row.metric) == (case, metric)}

    assert peers("deit_t batch=1", "latency_ms") == {"layernorm_eager", "layernorm_compiled", "prepbn_unfused"}
    linear = "deit_t batch=1 attention=simplified_linear"
    assert peers(linear, "latency_ms") == {"layernorm_eager", "layernorm_compiled", "fused"}
    assert peers("deit_t batch=1", "images_per_s") == {"layernorm_eager", "prepbn_unfused"}
    for count in (196, 784, 3136):
        assert peers(f"tokens={count}", "attention_ms") == {"softmax"}
    for case, metric in (
        ("decode batch=1", "decode_ms_per_step"),
        ("decode batch=8", "decode_ms_per_step"),
        ("prefill tokens=256 batch=1", "prefill_ms"),
    ):
        assert peers(f"llama_tiny {case}", metric) == set(slab_language.PEERS)
    for row in rows:
        if row.reason is not None:
            assert row.ratio is None
            assert "compiled" in f"{row.case} {row.peer}"
            assert row.reason == slab_forms.NO_COMPILER
        elif row.metric.endswith("_ms") or row.metric.endswith("_per_step"):
            assert row.ratio == pytest.approx(row.peer_value / row.value)
            assert row.bound_value > 0
        elif row.metric.endswith("_per_s"):
            assert row.ratio == pytest.approx(row.value / row.peer_value)
    share = next(row for row in rows if row.metric == "norms_pct")
    assert 0 < share.value < 100
    assert (tmp_path / "runs/bench/slab/attention_growth.png").stat().st_size > 10_000


def test_a_fused_model_that_differs_is_not_timed(small_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = slab_images.fused_classifier

    def wrong(model: nn.Module) -> nn.Module:
        fused = real(model)
        with torch.no_grad():
            fused.stages[0].blocks[1].fc1.weight.mul_(1.1)
        return fused

    setting = slab_images.Setting(1, 1, single_calls=True)
    assert list(slab_images._rows("deit_t", setting, QUICK))
    monkeypatch.setattr(slab_images, "fused_classifier", wrong)
    with pytest.raises(WrongResult, match="deit_t batch=1: result 0 of fused differs"):
        list(slab_images._rows("deit_t", setting, QUICK))


def test_a_missing_compiler_gives_rows_with_the_reason(small_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(model: nn.Module, **options: object) -> object:
        def call(*arguments: object) -> None:
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    setting = slab_images.Setting(1, 1, single_calls=True)
    rows = list(slab_images._rows("deit_t", setting, dataclasses.replace(QUICK, quick=False)))
    found = [row for row in rows if row.reason is not None]
    assert {row.reason for row in found} == {"does not run here: no C++ compiler"}
    assert [(row.case, row.peer) for row in found] == [
        ("deit_t batch=1", "layernorm_compiled"),
        ("deit_t batch=1 compiled", None),
        ("deit_t batch=1 attention=simplified_linear", "layernorm_compiled"),
        ("deit_t batch=1 attention=simplified_linear compiled", None),
    ]


def test_shapes_that_are_not_compiled_say_so() -> None:
    forms = Forms("c", 1e-4)
    forms.add_compiled("slab_compiled", None, same_as="slab", settings=dataclasses.replace(QUICK, quick=False))
    (row,) = forms.rows("c compiled", "latency_ms", "slab_compiled", ("layernorm_eager",), {})
    assert (row.peer, row.reason) == (None, "compiled at a batch of 1 alone")


def test_compiled_stands_against_compiled_and_rates_are_per_second() -> None:
    forms = Forms("c", 1e-4)
    timings = {"fused_compiled": Timing(50.0, 5.0, 3), "layernorm_eager": Timing(200.0, 1.0, 3)}
    timings["layernorm_compiled"] = Timing(75.0, 1.0, 3)
    peers = ("layernorm_eager", "layernorm_compiled")
    rows = list(
        forms.rows("c compiled", "latency_ms", "fused_compiled", peers, timings, per_second=("images_per_s", 4))
    )
    assert rows[1] == Row("c compiled", "latency_ms", 50.0, "ms", "layernorm_compiled", 75.0, 1.5, None, None, 3, 5.0)
    assert rows[2] == Row(
        "c compiled", "images_per_s", 80.0, "images/s", "layernorm_eager", 20.0, 4.0, None, None, 3, 8.0
    )
    assert len(rows) == 4


def test_operations_of_linear_attention_are_linear() -> None:
    counted = []
    for count in (196, 784):
        side = int(count**0.5)
        layer = slab_attention.SimplifiedLinearAttention(96, num_heads=3, grid=(side, side)).eval()
        x = torch.randn(1, count, 96)
        counted.append(operations(lambda layer=layer, x=x: layer(x)))
        # projections; k^T v; q S with the normaliser's column; 5 x 5 per channel
        by_hand = 2 * count * (96 * 288 + 96 * 96 + 96 * 32 + 96 * 33 + 96 * 25)
        assert counted[-1] == by_hand
    assert counted[1] == 4 * counted[0]
    # softmax counts whole matrices of weights, whichever kernel would run
    query = torch.randn(1, 2, 64, 8)
    attend = nn.functional.scaled_dot_product_attention
    assert operations(lambda: attend(query, query, query)) == 2 * 2 * 2 * 64 * 64 * 8


def test_growth_is_the_exponent_at_the_end() -> None:
    linear = {1: Timing(5.0, 0.0, 1), 10: Timing(10.0, 0.0, 1), 40: Timing(40.0, 0.0, 1)}
    softmax = {count: Timing(float(count**2), 0.0, 1) for count in linear}
    row = slab_attention.growth_row(linear, softmax)
    assert (row.case, row.value, row.peer_value) == ("tokens=10..40", pytest.approx(1.0), pytest.approx(2.0))


@pytest.mark.parametrize("bias", [False, True])
def test_flash_norm_is_rms_norm(bias: bool) -> None:
    torch.manual_seed(0)
    norm, linear = nn.RMSNorm(6, eps=1e-3).double(), nn.Linear(6, 5, bias=bias).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    source = InverseRMS(1e-3)
    deferred = DeferredLinear(linear, norm.weight, source)
    torch.testing.assert_close(deferred(source(x)), linear(norm(x)), rtol=1e-12, atol=1e-12)


class ExactRMSNorm(nn.Module):
    """The formula; transformers' own norm computes in float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def test_a_llama_with_deferred_norms_is_the_llama() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**slab_language.QUICK)).double().eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            nn.init.normal_(module.weight)
            model.set_submodule(name, ExactRMSNorm(module))
    deferred = copy.deepcopy(model)
    defer_norms(deferred)
    kinds = [type(part).__name__ for part in deferred.modules()]
    assert (kinds.count("InverseRMS"), kinds.count("DeferredLinear"), kinds.count("ExactRMSNorm")) == (4, 10, 1)
    ids = torch.randint(256, (2, 9))
    torch.testing.assert_close(deferred(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)


def test_steps_go_on_where_the_prompt_ended_each_time() -> None:
    model = slab_language.make_models(QUICK)["rmsnorm"]
    step = slab_language.decoding_step(model, 2, QUICK)
    with torch.no_grad():
        first, again = step(), step()
        ids = slab_language._ids(model, (2, slab_language.PROMPT_TOKENS + 1), QUICK)
        whole = model(ids).logits[:, -1:]
    torch.testing.assert_close(first, whole)
    assert torch.equal(first, again)

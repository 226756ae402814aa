"""Linear attention: every path against a loop over queries and keys in float64, outputs and gradients."""

import os
import subprocess
import sys

import pytest
import torch
from tenfold.kernels.linear_attention import (
    causal_linear_attention,
    cheaper_order,
    linear_attention,
    linear_attention_reference,
)

# large enough to be seen
EPS = 0.05
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# largest relative RMS error
TOLERANCE = {F64: 1e-12, F32: 2e-6, F16: 5e-3, BF16: 1e-2}


def by_hand(q, k, v, *, causal=False):
    """One query and one key at a time; (H, N, d), (H, M, d), (H, M, e)."""
    heads = []
    for head in range(len(q)):
        rows = []
        for i in range(q.shape[1]):
            last = i + k.shape[1] - q.shape[1] if causal else k.shape[1] - 1
            weights = [(q[head, i].clamp_min(0) * k[head, j].clamp_min(0)).sum() for j in range(last + 1)]
            rows.append(sum(w * v[head, j] for j, w in enumerate(weights)) / (sum(weights) + EPS))
        heads.append(torch.stack(rows))
    return torch.stack(heads)


def make(heads, n, m, d, e, dtype=F64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, n, d), (heads, m, d), (heads, m, e), (heads, n, e))
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=F64).to(device, dtype) for shape in shapes)
    return *(x.requires_grad_() for x in (q, k, v)), grad


def rms_error(found, expected):
    assert found.shape == expected.shape
    found, expected = found.detach().double().cpu(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def compare(op, case, dtype, device="cpu", **how):
    q, k, v, grad = make(*case, dtype, device)
    exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    expected = by_hand(*exact, **how)
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double().cpu()))
    out = op(q, k, v)
    assert out.dtype == dtype
    for found, value in zip((out, *torch.autograd.grad(out, (q, k, v), grad)), wanted, strict=True):
        assert found.dtype == dtype
        assert rms_error(found, value) < TOLERANCE[dtype]


CASES = {
    "H2-N9-M9-d4-e4": (2, 9, 9, 4, 4),
    "H1-N1-M1-d3-e5": (1, 1, 1, 3, 5),
    "H1-N5-M37-d7-e3": (1, 5, 37, 7, 3),
    "H1-N35-M6-d18-e17": (1, 35, 6, 18, 17),
}
needs_gpu = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"backend": "reference"}, F64),
        ({"order": "key_value"}, F64),
        ({"order": "query_key"}, F64),
        ({}, F32),
        ({}, F16),
        ({}, BF16),
    ],
    ids=str,
)
def test_output_and_gradients_equal_a_loop_over_pairs(options, dtype, case):
    compare(lambda q, k, v: linear_attention(q, k, v, eps=EPS, **options), case, dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU instead")
def test_the_interpreted_kernels_equal_a_loop_over_pairs(dtype, case):
    pytest.importorskip("triton")
    compare(lambda q, k, v: linear_attention(q, k, v, eps=EPS, order="key_value", backend="triton"), case, dtype)


@needs_gpu
@pytest.mark.parametrize("case", [*CASES.values(), (6, 300, 1100, 64, 64), (3, 3136, 3136, 32, 32)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_kernels_equal_the_reference_on_a_gpu(dtype, case):
    q, k, v, grad = make(*case, dtype, "cuda")
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = linear_attention_reference(*exact)
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    out = linear_attention(q, k, v, order="key_value", backend="triton")
    for found, value in zip((out, *torch.autograd.grad(out, (q, k, v), grad)), wanted, strict=True):
        assert rms_error(found, value.cpu()) < max(TOLERANCE[dtype], 1e-5)


def test_both_orders_agree_in_float32():
    q, k, v, _ = make(3, 50, 50, 16, 16, F32)
    one, other = (linear_attention(q, k, v, order=order) for order in ("key_value", "query_key"))
    assert rms_error(one, other.double()) < 1e-6


@pytest.mark.parametrize(
    ("sizes", "order"),
    [((9, 9, 8, 8), "key_value"), ((8, 8, 8, 8), "query_key"), ((3136, 20, 64, 64), "query_key"),
     ((3136, 65, 64, 64), "key_value"), ((10, 10, 4, 64), "key_value")],
    ids=str,
)  # fmt: skip
def test_the_order_with_fewer_products_is_taken(sizes, order):
    n, m, d, e = sizes
    costs = {"query_key": n * m * d + n * m * e, "key_value": m * d * e + n * d * e}
    assert costs[order] == min(costs.values())
    assert cheaper_order(*sizes) == order


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_query_without_positive_values_gives_zero(backend):
    q, k, v, _ = make(1, 4, 6, 4, 4, F32)
    q = q.detach()
    q[0, 2] = -1.0
    q.requires_grad_()
    out = linear_attention(q, k, v, backend=backend, order="key_value")
    assert (out[0, 2] == 0).all()
    out.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.parametrize("op", [linear_attention, causal_linear_attention])
def test_sums_beyond_float16_stay_finite(op):
    q = torch.full((1, 2048, 16), 30.0, dtype=F16)
    v = torch.full((1, 2048, 16), 100.0, dtype=F16)
    # the sum of 2048 keys of 30 is 61 440, that of products with queries far beyond the largest half
    with torch.autocast("cpu", dtype=torch.float16):
        out = op(q, q, v)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
@pytest.mark.parametrize("case", [(2, 9, 9, 4, 5), (1, 13, 13, 3, 2), (2, 4, 11, 4, 4), (1, 1, 7, 4, 4)], ids=str)
def test_the_causal_form_equals_a_loop_over_pairs(case, chunk):
    def op(q, k, v):
        return causal_linear_attention(q, k, v, eps=EPS, chunk_size=chunk)

    compare(op, case, F64, causal=True)
    compare(lambda q, k, v: linear_attention_reference(q, k, v, eps=EPS, causal=True), case, F64, causal=True)


def test_the_causal_form_in_float32():
    compare(
        lambda q, k, v: causal_linear_attention(q, k, v, eps=EPS, chunk_size=8), (1, 30, 30, 4, 4), F32, causal=True
    )


def test_leading_dimensions_and_strides_do_not_matter():
    q, k, v, _ = make(6, 7, 7, 4, 4)
    expected = linear_attention(q, k, v).view(2, 3, 7, 4)
    apart = [x.view(2, 3, 7, 4).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for backend in ("torch", "triton", "reference"):
        torch.testing.assert_close(linear_attention(*apart, order="key_value", backend=backend), expected)


def test_no_tokens():
    q, k, v, _ = make(2, 0, 5, 4, 3)
    for backend in ("torch", "triton", "reference"):
        assert linear_attention(q, k, v, order="key_value", backend=backend).shape == (2, 0, 3)
    assert causal_linear_attention(q, k, v).shape == (2, 0, 3)


def test_refusals():
    q, k, v, _ = make(1, 4, 6, 4, 4)
    for arguments, options, message in (
        ((q, k, v), {"order": "value_key"}, "order 'value_key' is not one of"),
        ((q, k, v), {"backend": "cuda"}, "backend 'cuda' is not one of"),
        ((q, k, v), {"backend": "triton", "order": "query_key"}, "has the order key_value alone"),
        ((q, k[:, :5], v), {}, "do not fit as"),
        ((q, k[0], v), {}, "must be"),
        ((q, k.float(), v), {}, "one floating point dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_attention(*arguments, **options)
    wide = torch.zeros(1, 300, 200)
    with pytest.raises(ValueError, match="widths up to 128, got 200; use 'torch'"):
        linear_attention(wide, wide, wide, backend="triton")
    with pytest.raises(ValueError, match="6 queries have only 4 keys"):
        causal_linear_attention(k, q, q)
    with pytest.raises(ValueError, match="chunk_size 0 is below 1"):
        causal_linear_attention(q, k, v, chunk_size=0)


def test_without_the_interpreter_a_cpu_takes_torch():
    code = (
        "import torch; from tenfold.kernels.linear_attention import linear_attention as f\n"
        "x = torch.randn(1, 40, 4); print(f(x, x, x).shape)\n"
        "try: f(x, x, x, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "torch.Size([1, 40, 4])" in done.stdout
    assert "needs CUDA tensors" in done.stdout

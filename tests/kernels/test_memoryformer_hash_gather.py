"""Sign hash and memory layer against brute force: loops over bits, a softmax over all patterns, a one-hot product."""

import itertools
import math

import pytest
import torch
from tenfold.kernels.hash_gather import (
    dequantise_rows,
    hash_gather,
    hash_gather_int8,
    num_tables,
    quantise_rows,
    sign_hash,
)
from tenfold.kernels.hash_gather.ops import weight_gradient
from tenfold.kernels.hash_gather.reference import split

WEIGHTINGS = ("paper", "l1")
BACKENDS = ("reference", "cpu", "triton")


def brute_force(x, num_bits, weighting="paper", temperature=1.0):
    """Rows and weights of one token by loops; the weight is the largest of a softmax over all sign patterns."""
    rows, weights = [], []
    for k, chunk in enumerate(x.double().split(num_bits)):
        code = 0
        for value in chunk.tolist():
            code = 2 * code + (value >= 0)
        # a short last sub-vector is followed by ones
        code = (code + 1) * 2 ** (num_bits - len(chunk)) - 1
        patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(chunk))), dtype=torch.float64)
        p = torch.softmax(patterns @ chunk / temperature, 0).max()
        rows.append(k * 2**num_bits + code)
        weights.append(p * chunk.abs().sum() if weighting == "l1" else p)
    return torch.tensor(rows), torch.stack(weights)


def one_hot_product(x, table, num_bits, weighting="paper", temperature=1.0):
    """(T, R) matrix of weights at the rows' places, times the table, in float64."""
    matrix = torch.zeros(len(x), len(table), dtype=torch.float64)
    for t, token in enumerate(x):
        rows, weights = brute_force(token, num_bits, weighting, temperature)
        matrix[t, rows] = weights
    return matrix @ table.double()


def case(num_tokens, width, num_bits, num_cols, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, width, generator=generator).to(dtype)
    table = torch.randn(num_tables(width, num_bits) << num_bits, num_cols, generator=generator).to(dtype)
    return x, table


def away_from_zero(x, distance=0.05):
    return torch.where(x.abs() < distance, x.sign().where(x != 0, 1) * distance, x)


def rms_error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ([0.7, -0.1], 2),
        ([-0.5, 0.2], 1),
        ([0.4, -0.6], 2),
        ([-1.1, -2.7, 0.6], 1),
        ([3.4, -1.9, -2.3], 4),
        ([3.1, 0.6, 0.1], 7),
        ([0.0, -1.0], 2),
        ([-0.0, -1.0], 2),
        ([-1.0, -0.0], 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_index_vectors_most_significant_bit_first(values, code, dtype):
    rows, _ = sign_hash(torch.tensor([values], dtype=dtype), len(values))
    assert rows.tolist() == [[code]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_takes_zero_as_positive(backend):
    x = torch.tensor([[0.0, -0.0, -1.0, 2.0], [-1.0, 0.0, -0.0, -2.0]])
    table = torch.eye(8)[:, :8]
    out = hash_gather(x, table, 2, weighting="paper", backend=backend)
    assert [sorted(row.nonzero().flatten().tolist()) for row in out] == [[3, 4 + 1], [1, 4 + 2]]


@pytest.mark.parametrize("num_bits", [1, 2, 5, 8, 10])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_paper_weight_is_the_largest_of_the_softmax_over_all_patterns(num_bits, temperature):
    x = torch.randn(3, 4 * num_bits, dtype=torch.float64, generator=torch.Generator().manual_seed(num_bits))
    rows, weights = sign_hash(x, num_bits, weighting="paper", temperature=temperature)
    for token, found_rows, found in zip(x, rows, weights, strict=True):
        expected_rows, expected = brute_force(token, num_bits, "paper", temperature)
        assert torch.equal(found_rows, expected_rows)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_large_halves_do_not_overflow(backend, weighting):
    x = torch.tensor([[1e4, -1e4, 1e4, 1e4, -1e4, 1e4, -1e4, -1e4]], dtype=torch.float16)
    out = hash_gather(x, torch.ones(256, 3), 8, weighting=weighting, backend=backend)
    torch.testing.assert_close(out, torch.full((1, 3), 8e4 if weighting == "l1" else 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_bits", [3, 8])
@pytest.mark.parametrize("width", [24, 26])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_closed_form_gradients_equal_autograd(num_bits, width, weighting, temperature):
    x, table = case(5, width, num_bits, 7, torch.float64)
    grad = torch.randn(5, 7, dtype=torch.float64)
    results = []
    for backend in ("reference", "cpu"):
        leaves = x.clone().requires_grad_(), table.clone().requires_grad_()
        out = hash_gather(leaves[0], leaves[1], num_bits, weighting=weighting, temperature=temperature, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for ours, autograd in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-11, atol=1e-12)
    # the expression itself, against the page's formula written value by value
    z, padding = split(x[:1], num_bits)
    chunk = z[0, 0]
    p = math.prod(1 / (1 + math.exp(-2 * abs(v) / temperature)) for v in chunk.tolist())
    slopes = [2 / temperature / (1 + math.exp(2 * abs(v) / temperature)) for v in chunk.tolist()]
    norm = chunk.abs().sum().item()
    expected = [
        math.copysign(1, v) * p * (1 + norm * s if weighting == "l1" else s)
        for v, s in zip(chunk.tolist(), slopes, strict=True)
    ]
    found = weight_gradient(z, padding, weighting, temperature)[0, 0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_away_from_sign_boundaries(weighting, backend):
    x, table = case(2, 3, 2, 2, torch.float64)
    inputs = away_from_zero(x).requires_grad_(), table.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: hash_gather(a, b, 2, weighting=weighting, backend=backend), inputs, eps=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_jumps_where_a_value_crosses_zero(backend):
    # documented: the bucket gets no gradient, so the function is not continuous there
    x, table = case(1, 4, 4, 3, torch.float64)
    below, above = x.clone(), x.clone()
    below[0, 2], above[0, 2] = -1e-12, 1e-12
    rows = [sign_hash(values, 4)[0].item() for values in (below, above)]
    assert rows[0] ^ rows[1] == 2
    outs = [hash_gather(values, table, 4, weighting="paper", backend=backend) for values in (below, above)]
    weight = sign_hash(above, 4, weighting="paper")[1].item()
    torch.testing.assert_close(outs[1] - outs[0], weight * (table[rows[1]] - table[rows[0]])[None])
    assert (outs[1] - outs[0]).norm() > 0.01
    leaf = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(hash_gather(leaf, table, 4, backend=backend).sum(), leaf)
    assert torch.equal(grad, torch.zeros_like(grad))


SHAPES = [
    (1, 8, 8, 1),  # one table
    (3, 15, 3, 50),  # an odd number of tables, a width that 64 does not divide
    (1, 9, 3, 70),
    (5, 10, 4, 33),  # a last sub-vector of two values
    (4, 3, 5, 5),  # less than one sub-vector
    (6, 6, 2, 130),
    (2, 17, 1, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_a_one_hot_matrix_product(shape, weighting, backend, dtype):
    num_tokens, width, num_bits, num_cols = shape
    x, table = case(num_tokens, width, num_bits, num_cols, dtype)
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    expected = one_hot_product(x, table, num_bits, weighting, 1.3)
    with torch.no_grad():
        out = hash_gather(x, table, num_bits, weighting=weighting, temperature=1.3, backend=backend)
    assert out.dtype == dtype
    assert rms_error(out, expected) < limit
    leaves = x.clone().requires_grad_(), table.clone().requires_grad_()
    grad = torch.randn(num_tokens, num_cols, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = hash_gather(*leaves, num_bits, weighting=weighting, temperature=1.3, backend=backend)
    assert rms_error(out, expected) < limit
    found = torch.autograd.grad(out, leaves, grad)
    exact = x.double().requires_grad_(), table.double().requires_grad_()
    out = hash_gather(*exact, num_bits, weighting=weighting, temperature=1.3, backend="reference")
    for ours, theirs in zip(found, torch.autograd.grad(out, exact, grad.double()), strict=True):
        assert rms_error(ours, theirs) < limit


@pytest.mark.parametrize("shape", [(20, 24, 4, 37), (33, 26, 8, 20), (1, 7, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_tiled_form_equals_the_other(shape, dtype):
    pytest.importorskip("triton")
    from tenfold.kernels.hash_gather import triton_hash_gather

    num_tokens, width, num_bits, num_cols = shape
    x, table = case(num_tokens, width, num_bits, num_cols, dtype)
    for weighting in WEIGHTINGS:
        out, rows = triton_hash_gather.forward(x, table, num_bits, weighting, 0.9, tiled=True)
        assert torch.equal(rows, sign_hash(x, num_bits)[0])
        limit = 1e-6 if dtype == torch.float32 else 5e-3
        assert rms_error(out, one_hot_product(x, table, num_bits, weighting, 0.9)) < limit


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backward_is_bit_identical_and_closer_than_adding_halves(backend):
    # two buckets take thousands of hits each, as in training
    generator = torch.Generator().manual_seed(0)
    num_tokens = 3000 if backend == "cpu" else 200
    x = (torch.rand(num_tokens, 2, generator=generator) + 0.5).half()
    grad = torch.rand(num_tokens, 4, generator=generator).half()
    table = torch.randn(4, 4, generator=generator).half()
    results = []
    for _ in range(2):
        leaves = x.clone().requires_grad_(), table.clone().requires_grad_()
        results.append(torch.autograd.grad(hash_gather(*leaves, 2, backend=backend), leaves, grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    rows, weights = sign_hash(x.double(), 2)
    exact = torch.zeros(4, 4, dtype=torch.float64).index_add(0, rows.flatten(), weights * grad.double())
    # what the released scatter does: one half-precision sum per row
    halves = torch.zeros(4, 4, dtype=torch.float16)
    for row, product in zip(rows.flatten().tolist(), weights.half() * grad, strict=True):
        halves[row] += product
    ours, baseline = rms_error(results[0][1], exact), rms_error(halves, exact)
    assert ours < 5e-4
    assert baseline > (4 if backend == "cpu" else 2) * ours


def test_layers_that_share_their_input_are_one_gather():
    x, table = case(6, 20, 5, 12)
    parts = table.split([6, 4, 2], dim=1)
    together = hash_gather(x, table, 5).split([6, 4, 2], dim=1)
    for one, all_in_one in zip(parts, together, strict=True):
        torch.testing.assert_close(hash_gather(x, one.contiguous(), 5), all_in_one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_single_token_on_several_threads(threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # odd number of tables, wide enough to be dealt out
        x, table = case(1, 75, 3, 1500, dtype)
        with torch.no_grad():
            out = hash_gather(x, table, 3)
    finally:
        torch.set_num_threads(before)
    assert rms_error(out, one_hot_product(x, table, 3)) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("shape", [(1, 24, 8, 50), (5, 26, 4, 33), (3, 16, 4, 3000)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_bit_tables(shape, backend):
    num_tokens, width, num_bits, num_cols = shape
    x, table = case(num_tokens, width, num_bits, num_cols)
    records = quantise_rows(table)
    assert records.shape == (len(table), num_cols + 8)
    decoded = dequantise_rows(records)
    # half a step of 255
    spread = table.amax(1) - table.amin(1)
    assert bool(((decoded - table).abs().amax(1) <= spread / 255 * 0.501 + 1e-6).all())
    out = hash_gather_int8(x, records, num_bits, backend=backend)
    assert rms_error(out, one_hot_product(x, decoded, num_bits)) < 1e-5


def test_rows_of_one_value_survive_eight_bits():
    table = torch.tensor([[0.0, 0.0], [3.5, 3.5], [-2.0, 1.0]])
    torch.testing.assert_close(dequantise_rows(quantise_rows(table)), table, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_more_than_two_dimensions(backend):
    x, table = case(6, 10, 4, 5)
    assert hash_gather(x[:0], table, 4, backend=backend).shape == (0, 5)
    out = hash_gather(x.view(2, 3, 10), table, 4, backend=backend)
    torch.testing.assert_close(out.view(6, 5), hash_gather(x, table, 4, backend=backend))


class TestBadInput:
    @pytest.mark.parametrize("num_bits", [0, 17, -1, 2.5])
    def test_bits_out_of_range(self, num_bits):
        with pytest.raises(ValueError, match=rf"num_bits {num_bits} is not between 1 and 16"):
            sign_hash(torch.randn(1, 34), num_bits)

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_activations_that_are_not_finite(self, backend, value):
        x, table = case(3, 8, 4, 2)
        x[1, 5] = value
        with pytest.raises(ValueError, match=r"1 of 24 activations are NaN or infinite"):
            hash_gather(x, table, 4, backend=backend)

    def test_nan_stays_in_the_table_and_reaches_the_output_in_the_compiled_kernel(self):
        x, table = case(2, 8, 4, 2)
        x[1, 5] = math.nan
        out = hash_gather(x, table, 4, backend="triton")
        assert torch.isfinite(out[0]).all()
        assert torch.isnan(out[1]).all()

    def test_a_table_of_another_size(self):
        x, table = case(2, 8, 4, 2)
        with pytest.raises(ValueError, match=r"must be \(32, H\) floating point.*got \(31, 2\)"):
            hash_gather(x, table[1:], 4)
        with pytest.raises(ValueError, match=r"must be \(32, H \+ 8\) uint8"):
            hash_gather_int8(x, quantise_rows(table[1:]), 4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weighting": "l2"}, "weighting 'l2' is not one of 'l1', 'paper'"),
            ({"temperature": 0.0}, "temperature 0.0 is not a number above 0"),
            ({"backend": "cuda"}, "backend 'cuda' is not one of"),
        ],
    )
    def test_other_options(self, options, message):
        x, table = case(2, 8, 4, 2)
        with pytest.raises(ValueError, match=message):
            hash_gather(x, table, 4, **options)

    def test_gradients_of_eight_bit_tables(self):
        x, table = case(2, 8, 4, 2)
        with pytest.raises(ValueError, match="8-bit tables give no gradients"):
            hash_gather_int8(x.requires_grad_(), quantise_rows(table), 4)

    def test_values_that_eight_bits_cannot_hold(self):
        with pytest.raises(ValueError, match="not finite"):
            quantise_rows(torch.tensor([[1.0, math.inf]]))

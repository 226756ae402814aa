"""All paths of weighted_gather against an independent formulation: a dense one-hot matrix product in float64."""

import os
import subprocess
import sys

import pytest
import torch
from tenfold.kernels.weighted_gather import sort_segments, weighted_gather, weighted_gather_groups

needs_gpu = pytest.mark.gpu
without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# largest relative RMS error of a result
TOLERANCE = {FLOAT64: 1e-13, FLOAT32: 1e-6, FLOAT16: 5e-3, BFLOAT16: 1e-2}


def gpu_case(*values):
    return pytest.param(*values, marks=[needs_gpu, without_gpu])


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float(((actual - expected).pow(2).mean() / expected.pow(2).mean().clamp_min(1e-300)).sqrt())


def one_hot_product(table, indices, weights):
    """(T, M), (T, M) as a dense (T, R) matrix times the table."""
    matrix = torch.zeros(indices.shape[0], table.shape[0], dtype=table.dtype)
    return matrix.scatter_add(1, indices, weights) @ table


def expected_results(table, indices, weights, grad):
    """Output and both gradients in float64 on the CPU."""
    grouped = table.dim() == 3
    leaf = table.detach().double().cpu().requires_grad_()
    factors = weights.detach().double().cpu().requires_grad_()
    indices = indices.cpu()
    if grouped:
        indices = indices[:, None] * table.shape[1] + torch.arange(table.shape[1])
    out = one_hot_product(leaf.reshape(-1, table.shape[-1]), indices, factors)
    return out, *torch.autograd.grad(out, (leaf, factors), grad.double().cpu())


def make_case(shape, dtype, weights_dtype, device="cpu", seed=0):
    """`shape` = (U, N or None, H, T, M): grouped when N is given, then M is N."""
    groups, rows, columns, tokens, terms = shape
    generator = torch.Generator().manual_seed(seed)
    # some rows are used more often than others, many not at all; with many tokens most terms use row 0
    skew = 12 if 100 <= tokens < 1000 else 2
    if rows is None:
        table = torch.randn(groups, columns, generator=generator)
        indices = (torch.rand(tokens, terms, generator=generator).pow(skew) * groups).long()
    else:
        table = torch.randn(groups, rows, columns, generator=generator)
        indices = (torch.rand(tokens, generator=generator).pow(skew) * groups).long()
    weights = torch.randn(tokens, terms, generator=generator)
    grad = torch.randn(tokens, columns, generator=generator)
    return (
        table.to(device, dtype).requires_grad_(),
        indices.to(device),
        weights.to(device, weights_dtype).requires_grad_(),
        grad.to(device, dtype),
    )


def op_for(table):
    return weighted_gather if table.dim() == 2 else weighted_gather_groups


SHAPES = {
    "R7-H5-T9-M3": (7, None, 5, 9, 3),
    "R1-H1-T1-M1": (1, None, 1, 1, 1),
    "R20-H70-T4-M17": (20, None, 70, 4, 17),
    "R40-H20-T110-M2-frequent": (40, None, 20, 110, 2),
    "U6-N4-H48-T10": (6, 4, 48, 10, 4),
    "U5-N3-H67-T1": (5, 3, 67, 1, 3),
    "R9-H40-T1-M5": (9, None, 40, 1, 5),
    "U6-N8-H512-T9": (6, 8, 512, 9, 8),
    "U50-N3-H9-T190-frequent": (50, 3, 9, 190, 3),
    "U3-N10-H33-T12": (3, 10, 33, 12, 10),
}
BIG_SHAPES = {
    "U1500-N4-H768-T4096": (1500, 4, 768, 4096, 4),
    "U700-N16-H1000-T3000": (700, 16, 1000, 3000, 16),
    "R2048-H512-T512-M64": (2048, None, 512, 512, 64),
}
PATHS = [
    ("reference", "cpu", FLOAT64, FLOAT64),
    ("reference", "cpu", BFLOAT16, FLOAT32),
    ("cpu", "cpu", FLOAT64, FLOAT64),
    ("cpu", "cpu", FLOAT32, FLOAT32),
    ("cpu", "cpu", FLOAT16, FLOAT16),
    ("cpu", "cpu", BFLOAT16, BFLOAT16),
    ("cpu", "cpu", BFLOAT16, FLOAT32),
    ("cpu", "cpu", FLOAT32, BFLOAT16),
]
INTERPRETER_PATHS = [
    ("triton", "cpu", FLOAT32, FLOAT32),
    ("triton", "cpu", FLOAT16, FLOAT16),
    ("triton", "cpu", FLOAT16, FLOAT32),
    ("triton", "cpu", FLOAT64, FLOAT64),
]
GPU_PATHS = [
    ("triton", "cuda", FLOAT32, FLOAT32),
    ("triton", "cuda", BFLOAT16, BFLOAT16),
    ("triton", "cuda", BFLOAT16, FLOAT32),
    ("triton", "cuda", FLOAT16, FLOAT32),
]
CASES = (
    [pytest.param(*path, shape, id=f"{path[0]}-{path[2]}-{path[3]}-{name}".replace("torch.", ""))
     for path in PATHS for name, shape in SHAPES.items()]
    + [pytest.param(*path, shape, id=f"interpreter-{path[2]}-{path[3]}-{name}".replace("torch.", ""),
                    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU instead"))
       for path in INTERPRETER_PATHS for name, shape in SHAPES.items() if shape[2] < 200]
    + [pytest.param(*path, shape, id=f"gpu-{path[2]}-{path[3]}-{name}".replace("torch.", ""),
                    marks=[needs_gpu, without_gpu])
       for path in GPU_PATHS for name, shape in (SHAPES | BIG_SHAPES).items()]
)  # fmt: skip


@pytest.mark.parametrize(("backend", "device", "dtype", "weights_dtype", "shape"), CASES)
def test_output_and_gradients_equal_one_hot_product(backend, device, dtype, weights_dtype, shape):
    if backend == "triton":
        pytest.importorskip("triton")
    table, indices, weights, grad = make_case(shape, dtype, weights_dtype, device)
    out = op_for(table)(table, indices, weights, backend=backend)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out, (table, weights), grad)
    assert (grads[0].dtype, grads[1].dtype) == (dtype, weights_dtype)
    expected = expected_results(table, indices, weights, grad)
    assert rms_error(out, expected[0]) < TOLERANCE[dtype]
    assert rms_error(grads[0], expected[1]) < TOLERANCE[dtype]
    assert rms_error(grads[1], expected[2]) < TOLERANCE[weights_dtype]


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("table_dtype", [FLOAT16, BFLOAT16])
def test_float32_weights_are_not_rounded_to_the_tables_16_bits(backend, table_dtype):
    if backend == "triton" and table_dtype == BFLOAT16 and not torch.cuda.is_available():
        pytest.skip("the interpreter computes wrongly in bfloat16")
    weights = torch.tensor([[1 + 2**-12, -1.0]] * 3, requires_grad=True)
    table = torch.ones(2, 8, dtype=table_dtype, requires_grad=True)
    out = weighted_gather(table, torch.tensor([[0, 1]] * 3), weights, backend=backend)
    assert torch.equal(out, torch.full((3, 8), 2**-12, dtype=table_dtype))
    grad = torch.tensor([[0.5], [0.5], [-1.0]], dtype=table_dtype).expand(3, 8)
    weights_grad = torch.autograd.grad(out, weights, grad)[0]
    assert torch.equal(weights_grad, torch.tensor([[4.0, 4.0], [4.0, 4.0], [-8.0, -8.0]]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("grouped", [False, True])
def test_gradcheck(backend, grouped):
    table, indices, weights, _ = make_case((5, 3 if grouped else None, 4, 6, 3), FLOAT64, FLOAT64)
    assert torch.autograd.gradcheck(lambda t, w: op_for(t)(t, indices, w, backend=backend), (table, weights))


DETERMINISM = [("cpu", "cpu", FLOAT32), ("triton", "cpu", FLOAT32), gpu_case("triton", "cuda", BFLOAT16)]


@pytest.mark.parametrize(("backend", "device", "dtype"), DETERMINISM)
@pytest.mark.parametrize("shape", [(30, None, 9, 100, 2), (30, 4, 9, 140, 4)], ids=["rows", "groups"])
def test_backward_is_bit_identical_over_runs(backend, device, dtype, shape):
    table, indices, weights, grad = make_case(shape, dtype, FLOAT32, device)
    runs = []
    for _ in range(2):
        out = op_for(table)(table, indices, weights, backend=backend)
        runs.append((out, *torch.autograd.grad(out, (table, weights), grad)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("shape", [(4, None, 20, 30, 2), (3, 4, 20, 30, 4)], ids=["rows", "groups"])
def test_shared_segments_change_nothing(backend, shape):
    table, indices, weights, grad = make_case(shape, FLOAT32, FLOAT32)
    segments = sort_segments(indices, shape[0])
    plain = op_for(table)(table, indices, weights, backend=backend)
    shared = op_for(table)(table, indices, weights, backend=backend, segments=segments)
    for first, second in zip(
        torch.autograd.grad(plain, (table, weights), grad),
        torch.autograd.grad(shared, (table, weights), grad),
        strict=True,
    ):
        assert torch.equal(first, second)


def test_segments_of_another_call_are_refused():
    table, indices, weights, _ = make_case((4, None, 8, 6, 2), FLOAT32, FLOAT32)
    with pytest.raises(ValueError, match=r"segments hold 12 terms of 5 groups, this call has 12 of 4"):
        weighted_gather(table, indices, weights, segments=sort_segments(indices, 5))


@pytest.mark.parametrize("num_terms", [0, 1, 63, 64, 65, 1000])
def test_split_plan_covers_every_term_of_long_segments_once(num_terms):
    ids = torch.cat([torch.full((num_terms,), 2), torch.tensor([0, 0, 4])])
    segments = sort_segments(ids, 6)
    plan = segments.split_plan
    for group in range(6):
        begin, end = int(segments.offsets[group]), int(segments.offsets[group + 1])
        covered = list(range(begin, min(end, begin + plan.split_terms)))
        for slot in range(int(plan.slot_offsets[group]), int(plan.slot_offsets[group + 1])):
            piece = list(range(int(plan.slot_begins[slot]), int(plan.slot_ends[slot])))
            assert 0 < len(piece) <= plan.split_terms
            covered += piece
        assert covered == list(range(begin, end))
        assert torch.equal(segments.order[begin:end], (ids == group).nonzero().flatten())


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_leading_dimensions_and_small_integer_indices(backend):
    table, indices, weights, _ = make_case((9, None, 6, 10, 3), FLOAT32, FLOAT32)
    flat = weighted_gather(table, indices, weights, backend="reference")
    shaped = weighted_gather(table, indices.int().view(2, 5, 3), weights.view(2, 5, 3), backend=backend)
    torch.testing.assert_close(shaped, flat.view(2, 5, 6))
    groups = table.detach().view(3, 3, 6)
    ids = torch.tensor([[2, 0], [1, 1]], dtype=torch.uint8)
    out = weighted_gather_groups(groups, ids, weights[:4].view(2, 2, 3), backend=backend)
    torch.testing.assert_close(out, (groups[ids.long()] * weights[:4].view(2, 2, 3, 1)).sum(2))
    # one token without a leading dimension
    one = weighted_gather_groups(groups, ids[0, 0], weights[0], backend=backend)
    torch.testing.assert_close(one, weights[0] @ groups[2])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_non_contiguous_inputs(backend, tokens):
    generator = torch.Generator().manual_seed(1)
    layers = torch.randn(6, 3, 4, 10, generator=generator)
    ids = torch.randint(0, 6, (2 * tokens,), generator=generator)[::2]
    weights = torch.randn(4, tokens, generator=generator).t()
    tables = {
        "a layer's slice": layers[:, 1],
        "part of the columns": layers[:, 1, :, 2:9],
        "rows reversed in memory order": layers[:, 1].transpose(0, 1).contiguous().transpose(0, 1),
        "columns apart": layers.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)[:, 0],
        "gaps between groups": torch.randn(6 * 45).as_strided((6, 4, 10), (45, 10, 1)),
        "one group for all": layers[:1, 0].expand(6, 4, 10),
    }
    for name, table in tables.items():
        leaf, factors = table.detach().requires_grad_(), weights.detach().requires_grad_()
        out = weighted_gather_groups(leaf, ids, factors, backend=backend)
        # a sum hands down an expanded gradient without strides
        grads = torch.autograd.grad(out.sum(), (leaf, factors))
        expected = expected_results(table, ids, weights, torch.ones(tokens, table.shape[-1]))
        for actual, wanted in zip((out, *grads), expected, strict=True):
            torch.testing.assert_close(actual, wanted.to(actual.dtype), msg=lambda text, name=name: f"{name}: {text}")
    flat = layers[0, 0].t()  # (10, 4) with a column stride
    indices = torch.randint(0, 10, (tokens, 4), generator=generator)
    out = weighted_gather(flat, indices, weights, backend=backend)
    torch.testing.assert_close(out, (flat[indices] * weights.unsqueeze(-1)).sum(1))


def test_a_layers_slice_is_not_copied(monkeypatch):
    table = torch.randn(50, 3, 4, 512)[:, 1]
    seen = []
    bag = torch.embedding_bag
    monkeypatch.setattr(torch, "embedding_bag", lambda *args: seen.append(args[0]) or bag(*args))
    weighted_gather_groups(table, torch.arange(50), torch.randn(50, 4))
    assert seen[0].untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


@pytest.mark.parametrize("weights_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        ((7, 8, 768, 40, 8), 3),
        ((50, None, 512, 40, 9), 2),
        ((7, 8, 1040, 40, 8), 5),
        ((7, 8, 256, 40, 8), 1),
        # no pieces of a multiple of 16 columns
        ((7, 8, 1000, 40, 8), 1),
        # few terms
        ((7, 7, 768, 40, 7), 1),
    ],
    ids=str,
)
def test_wide_rows_of_large_calls_are_summed_in_pieces(shape, pieces, weights_dtype, monkeypatch):
    from tenfold.kernels.weighted_gather import cpu_weighted_gather

    monkeypatch.setattr(cpu_weighted_gather, "_PIECES_FROM_VALUES", 40 * shape[4] * shape[2])
    widths = []
    bag = torch.embedding_bag
    monkeypatch.setattr(torch, "embedding_bag", lambda *args: widths.append(args[0].shape[1]) or bag(*args))
    dtype = FLOAT32 if weights_dtype == FLOAT32 else BFLOAT16
    for table_dtype in {dtype, BFLOAT16}:
        table, indices, weights, grad = make_case(shape, table_dtype, weights_dtype)
        op = weighted_gather if shape[1] is None else weighted_gather_groups
        out = op(table.detach(), indices, weights.detach())
        assert rms_error(out, expected_results(table, indices, weights, grad)[0]) < TOLERANCE[table_dtype]
        assert widths.pop() == shape[2] // pieces
    # a layer's slice of a larger table, in place; one value less, and nothing is cut
    table = torch.randn(7, 2, 8, 768)[:, 1]
    ids, weights = torch.randint(7, (200,)), torch.randn(200, 8)
    out = weighted_gather_groups(table, ids, weights)
    torch.testing.assert_close(out, torch.einsum("tn,tnh->th", weights, table[ids]))
    assert widths.pop() == 256
    monkeypatch.setattr(cpu_weighted_gather, "_PIECES_FROM_VALUES", 200 * 8 * 768 + 1)
    weighted_gather_groups(table, ids, weights)
    assert widths.pop() == 768


def test_a_bad_index_of_a_large_call_is_named(monkeypatch):
    from tenfold.kernels.weighted_gather import cpu_weighted_gather

    monkeypatch.setattr(cpu_weighted_gather, "_PIECES_FROM_VALUES", 1)
    for bad in (-1, 7):
        ids = torch.zeros(100, dtype=torch.int64)
        ids[50] = bad
        with pytest.raises(ValueError, match=f"ids holds {bad}, the table's rows go from 0 to 6"):
            weighted_gather_groups(torch.randn(7, 8, 768), ids, torch.randn(100, 8))


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize(("tokens", "terms"), [(0, 3), (4, 0)])
def test_empty_inputs_give_zeros_and_zero_gradients(backend, tokens, terms):
    table = torch.randn(5, 8, requires_grad=True)
    weights = torch.randn(tokens, terms, requires_grad=True)
    out = weighted_gather(table, torch.zeros(tokens, terms, dtype=torch.int64), weights, backend=backend)
    assert torch.equal(out, torch.zeros(tokens, 8))
    out.sum().backward()
    assert torch.equal(table.grad, torch.zeros(5, 8))
    assert weights.grad.shape == (tokens, terms)
    groups = torch.randn(5, terms, 8)
    assert weighted_gather_groups(groups, torch.zeros(tokens, dtype=torch.int64), weights, backend=backend).shape == (
        tokens,
        8,
    )


def test_only_the_needed_gradient_is_computed(monkeypatch):
    from tenfold.kernels.weighted_gather import cpu_weighted_gather

    table, indices, weights, grad = make_case((4, None, 6, 5, 2), FLOAT32, FLOAT32)
    monkeypatch.setattr(cpu_weighted_gather, "grad_table", lambda *_, **__: pytest.fail("not needed"))
    weighted_gather(table.detach(), indices, weights).backward(grad)
    assert weights.grad is not None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16])
@pytest.mark.parametrize("bad", [-1, 6, 10**6])
@pytest.mark.parametrize("tokens", [1, 4])
def test_index_out_of_range_is_named(backend, dtype, bad, tokens):
    indices = torch.zeros(tokens, 2, dtype=torch.int64)
    indices[-1, -1] = bad
    weights = torch.ones(tokens, 2, dtype=dtype)
    with pytest.raises(ValueError, match=rf"indices holds {bad}, the table's rows go from 0 to 5"):
        weighted_gather(torch.ones(6, 3, dtype=dtype), indices, weights, backend=backend)
    table = torch.ones(6, 4, 2, 3, dtype=dtype)[:, 1]
    with pytest.raises(ValueError, match=rf"ids holds {bad}, the table's rows go from 0 to 5"):
        weighted_gather_groups(table, indices[:, -1], weights, backend=backend)


BAD_ARGUMENTS = {
    "table shape": ((torch.ones(2, 2, 2), torch.zeros(1, 2).long(), torch.ones(1, 2)), {}, "table must be"),
    "weights shape": ((torch.ones(2, 2), torch.zeros(1, 2).long(), torch.ones(1, 3)), {}, "must both be"),
    "float indices": ((torch.ones(2, 2), torch.zeros(1, 2), torch.ones(1, 2)), {}, "indices must be integers"),
    "integer table": ((torch.ones(2, 2).long(), torch.zeros(1, 2).long(), torch.ones(1, 2)), {}, "floating point"),
    "devices": ((torch.ones(2, 2), torch.zeros(1, 2).long(), torch.ones(1, 2, device="meta")), {}, "one device"),
    "backend": ((torch.ones(2, 2), torch.zeros(1, 2).long(), torch.ones(1, 2)), {"backend": "cuda"}, "is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(case):
    arguments, options, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        weighted_gather(*arguments, **options)


def test_groups_refuse_weights_of_another_width():
    with pytest.raises(ValueError, match=r"weights must be \(5, 3\).*got \(5, 4\)"):
        weighted_gather_groups(torch.ones(2, 3, 4), torch.zeros(5).long(), torch.ones(5, 4))


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_autocast_leaves_precision_alone(backend, tokens):
    table, ids, weights, grad = make_case((4, 3, 64, tokens, 3), FLOAT32, FLOAT32)
    plain = weighted_gather_groups(table, ids, weights, backend=backend)
    expected = torch.autograd.grad(plain, (table, weights), grad)
    with torch.autocast("cpu", dtype=BFLOAT16):
        out = weighted_gather_groups(table, ids, weights, backend=backend)
        grads = torch.autograd.grad(out, (table, weights), grad)
    for actual, wanted in zip((out, *grads), (plain, *expected), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("share", [False, True])
def test_compiled_whole_graph_equals_eager(backend, share):
    table, ids, weights, grad = make_case((4, 3, 16, 6, 3), FLOAT32, FLOAT32)
    segments = sort_segments(ids, 4) if share else None

    def call(table, ids, weights):
        return weighted_gather_groups(table, ids, weights.softmax(-1), backend=backend, segments=segments) * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = []
    for function in (call, compiled):
        out = function(table, ids, weights)
        results.append((out, *torch.autograd.grad(out, (table, weights), grad)))
    for actual, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("grouped", [False, True])
def test_custom_operator_passes_torchs_own_check(grouped):
    table, indices, weights, _ = make_case((5, 3 if grouped else None, 8, 6, 3), FLOAT32, FLOAT32)
    weighted_gather  # noqa: B018 (registers the operator)
    torch.library.opcheck(
        torch.ops.tenfold.weighted_gather.default, (table, indices, weights, None, None, grouped, "cpu")
    )


def test_works_on_the_cpu_outside_interpreter_mode():
    program = (
        "import torch\n"
        "from tenfold.kernels.weighted_gather import weighted_gather\n"
        "table = torch.randn(5, 4, requires_grad=True)\n"
        "out = weighted_gather(table, torch.tensor([[1, 3]]), torch.tensor([[2.0, -1.0]]))\n"
        "torch.testing.assert_close(out[0], 2 * table[1] - table[3])\n"
        "out.sum().backward()\n"
        "try:\n"
        "    weighted_gather(table, torch.tensor([[1]]), torch.ones(1, 1), backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "backend 'triton' needs CUDA tensors, these are on cpu" in run.stdout


def test_default_device_does_not_matter():
    table, ids, weights, grad = make_case((4, 3, 16, 70, 3), FLOAT32, FLOAT32)
    with torch.device("meta"):
        out = weighted_gather_groups(table, ids, weights)
        grads = torch.autograd.grad(out, (table, weights), grad)
    expected = expected_results(table, ids, weights, grad)
    for actual, wanted in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(actual, wanted.float())


def test_forward_under_inference_mode_leaves_training_alone():
    table, ids, weights, grad = make_case((4, 3, 512, 37, 3), FLOAT32, FLOAT32)
    with torch.inference_mode():
        first = weighted_gather_groups(table, ids, weights)
    out = weighted_gather_groups(table, ids, weights)
    assert torch.equal(first, out)
    out.backward(grad)
    assert weights.grad is not None

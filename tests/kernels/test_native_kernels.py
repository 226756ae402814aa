"""The C++ CPU kernels against float64 formulations of their own, and what happens where they cannot be built."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from tenfold.kernels.hash_gather import cpu_hash_gather, hash_gather, hash_gather_int8, quantise_rows, sign_hash
from tenfold.kernels.native_build import build_cpu_kernels, cpu_kernels, library
from tenfold.kernels.weighted_gather import (
    cpu_weighted_gather,
    native_weighted_gather,
    sort_segments,
    weighted_gather,
    weighted_gather_groups,
)

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FLOAT64: 1e-13, FLOAT32: 1e-6, FLOAT16: 5e-3, BFLOAT16: 1e-2}


@pytest.fixture(scope="session")
def built() -> ctypes.CDLL:
    if not sys.platform.startswith("linux") or not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs Linux and a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        # kept between runs: the name says what it was built from
        patch.setenv("TENFOLD_CACHE", str(Path(tempfile.gettempdir(), f"tenfold-tests-{os.getuid()}")))
        patch.delenv("CXX", raising=False)
        path = build_cpu_kernels()
    library.forget()
    return library._load(path)


@pytest.fixture
def native(built, monkeypatch):
    monkeypatch.setattr(library, "_looked", True)
    monkeypatch.setattr(library, "_library", built)
    for place, name in (
        (cpu_weighted_gather, "_bag"),
        (cpu_weighted_gather, "_rows_and_terms"),
        (cpu_hash_gather, "hash_rows"),
        (cpu_hash_gather, "forward"),
        (cpu_hash_gather, "forward_int8"),
    ):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("the torch path ran"))


@pytest.fixture
def threads(monkeypatch):
    """Three threads, for small shapes, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(native_weighted_gather, "_SERIAL_VALUES", 1)
    yield
    torch.set_num_threads(before)


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def expected_results(table, rows, weights, grad):
    """Output and both gradients, each by its definition, as sums over a one-hot (T, M, R) tensor in float64."""
    values, factors, grad = table.detach().double(), weights.detach().double(), grad.double()
    one_hot = torch.nn.functional.one_hot(rows, len(values)).double()
    return (
        torch.einsum("tm,tmr,rh->th", factors, one_hot, values),
        torch.einsum("tm,tmr,th->rh", factors, one_hot, grad),
        torch.einsum("th,tmr,rh->tm", grad, one_hot, values),
    )


# groups U, rows per group N or None, columns H, tokens T, terms M; the last have rows that most terms use
SHAPES = {
    "R7-H5-T9-M3": (7, None, 5, 9, 3),
    "R1-H1-T1-M1": (1, None, 1, 1, 1),
    "R20-H70-T4-M17": (20, None, 70, 4, 17),
    "R9-H197-T1-M6": (9, None, 197, 1, 6),
    "U6-N4-H48-T10": (6, 4, 48, 10, 4),
    "U5-N3-H67-T1": (5, 3, 67, 1, 3),
    "U6-N8-H512-T7": (6, 8, 512, 7, 8),
    "U3-N10-H33-T12": (3, 10, 33, 12, 10),
    "R40-H36-T500-M2-frequent": (40, None, 36, 500, 2),
    "U50-N3-H9-T390-frequent": (50, 3, 9, 390, 3),
}
DTYPES = [
    (FLOAT32, FLOAT32), (FLOAT64, FLOAT64), (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16), (BFLOAT16, FLOAT32),
    (FLOAT32, BFLOAT16), (FLOAT16, FLOAT32), (BFLOAT16, FLOAT16), (FLOAT64, FLOAT32), (FLOAT32, FLOAT64),
]  # fmt: skip


def make_case(shape, dtype=FLOAT32, weights_dtype=FLOAT32):
    groups, rows, columns, tokens, terms = shape
    generator = torch.Generator().manual_seed(1)
    table = torch.randn((groups, columns) if rows is None else (groups, rows, columns), generator=generator)
    drawn = torch.rand((tokens, terms) if rows is None else (tokens,), generator=generator)
    indices = (drawn.pow(12 if tokens > 100 else 2) * groups).long()
    weights = torch.randn(tokens, terms, generator=generator)
    grad = torch.randn(tokens, columns, generator=generator)
    leaves = table.to(dtype).requires_grad_(), weights.to(weights_dtype).requires_grad_()
    return leaves[0], indices, leaves[1], grad.to(dtype)


def run(table, indices, weights, grad, **options):
    op = weighted_gather if table.dim() == 2 else weighted_gather_groups
    out = op(table, indices, weights, **options)
    return out.detach(), *torch.autograd.grad(out, (table, weights), grad)


def as_rows(table, indices):
    if table.dim() == 2:
        return table, indices
    return table.flatten(0, 1), indices[:, None] * table.shape[1] + torch.arange(table.shape[1])


@pytest.mark.parametrize(("dtype", "weights_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_their_definitions(native, threads, shape, dtype, weights_dtype):
    table, indices, weights, grad = make_case(SHAPES[shape], dtype, weights_dtype)
    results = run(table, indices, weights, grad)
    assert [result.dtype for result in results] == [dtype, dtype, weights_dtype]
    rows, terms = as_rows(table, indices)
    expected = expected_results(rows, terms, weights, grad)
    assert error_of(results[0], expected[0]) < TOLERANCE[dtype]
    assert error_of(results[1].view(rows.shape), expected[1]) < TOLERANCE[dtype]
    summed_in = FLOAT64 if dtype == FLOAT64 else FLOAT32
    assert error_of(results[2], expected[2]) < max(TOLERANCE[weights_dtype], TOLERANCE[summed_in])


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_every_16_bit_value_and_sums_of_two_are_rounded_as_torch_rounds_them(native, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    table = torch.stack([values, values[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]])
    ones = torch.ones(1, 2)
    alone = weighted_gather(table, torch.tensor([[0]]), ones[:, :1])[0]
    assert torch.equal(alone.isnan(), values.isnan())
    assert torch.equal(alone.nan_to_num(1.5), values.nan_to_num(1.5))
    both = weighted_gather(table, torch.tensor([[0, 1]]), ones)[0]
    expected = (table[0].float() + table[1].float()).to(dtype)
    assert torch.equal(both.isnan(), expected.isnan())
    assert torch.equal(both.nan_to_num(1.5), expected.nan_to_num(1.5))


@pytest.mark.parametrize("shape", ["R40-H36-T500-M2-frequent", "U50-N3-H9-T390-frequent", "R9-H197-T1-M6"])
def test_the_same_bits_again_and_with_any_number_of_threads(native, shape, monkeypatch):
    monkeypatch.setattr(native_weighted_gather, "_SERIAL_VALUES", 1)
    case = make_case(SHAPES[shape])
    before, runs = torch.get_num_threads(), []
    for count in (1, 2, 5, 5):
        torch.set_num_threads(count)
        runs.append(run(*case))
    torch.set_num_threads(before)
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            assert torch.equal(first, second)


def test_sorts_as_torch_does(native):
    ids = torch.randint(0, 30, (7, 200), generator=torch.Generator().manual_seed(2)).int()
    segments = sort_segments(ids, 33)
    values, order = ids.flatten().long().sort(stable=True)
    assert torch.equal(segments.order, order)
    assert torch.equal(segments.offsets, torch.searchsorted(values, torch.arange(34)))
    with pytest.raises(ValueError, match="ids holds 29, the table's rows go from 0 to 28"):
        sort_segments(ids, 29)


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
@pytest.mark.parametrize("tokens", [1, 40])
def test_an_index_out_of_range_is_named(native, threads, bad, tokens):
    for at in {0, tokens // 2, tokens - 1}:
        indices = torch.zeros(tokens, 5, dtype=torch.int64)
        indices[at, -1] = bad
        with pytest.raises(ValueError, match=rf"indices holds {bad}, the table's rows go from 0 to 5"):
            weighted_gather(torch.ones(6, 3), indices, torch.ones(tokens, 5))
        with pytest.raises(ValueError, match=rf"ids holds {bad}, the table's rows go from 0 to 5"):
            weighted_gather_groups(torch.ones(6, 2, 3), indices[:, -1], torch.ones(tokens, 2))


@pytest.mark.parametrize("tokens", [1, 5])
def test_non_contiguous_inputs(native, tokens):
    generator = torch.Generator().manual_seed(1)
    layers = torch.randn(6, 3, 4, 10, generator=generator)
    ids = torch.randint(0, 6, (2 * tokens,), generator=generator)[::2]
    weights = torch.randn(4, tokens, generator=generator).t()
    tables = [
        layers[:, 1],
        layers[:, 1, :, 2:9],
        layers[:, 1].transpose(0, 1).contiguous().transpose(0, 1),
        layers.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)[:, 0],
        torch.randn(6 * 45, generator=generator).as_strided((6, 4, 10), (45, 10, 1)),
        layers[:1, 0].expand(6, 4, 10),
    ]
    for table in tables:
        leaf, factors = table.detach().requires_grad_(), weights.detach().requires_grad_()
        # an expanded gradient without strides
        results = run(leaf, ids, factors, torch.ones(()).expand(tokens, table.shape[-1]))
        rows, terms = as_rows(table, ids)
        expected = expected_results(rows, terms, weights, torch.ones(tokens, table.shape[-1]))
        for actual, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(actual.reshape(wanted.shape), wanted.float())
    flat = layers[0, 0].t()
    indices = torch.randint(0, 10, (tokens, 4), generator=generator)
    torch.testing.assert_close(weighted_gather(flat, indices, weights), (flat[indices] * weights.unsqueeze(-1)).sum(1))


@pytest.mark.parametrize("shape", ["R20-H70-T4-M17", "U6-N4-H48-T10", "R1-H1-T1-M1"])
def test_a_large_gradient_on_fresh_pages_is_the_same(native, shape, monkeypatch):
    groups, *rest = SHAPES[shape]
    case = make_case((groups * 200, *rest))
    plain = run(*case)
    monkeypatch.setattr(native_weighted_gather, "_MAPPED_BYTES", 0)
    empty, size = torch.empty, case[0].shape
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k) if a[0] != size else pytest.fail("not mapped"))
    mapped = run(*case)
    for first, second in zip(plain, mapped, strict=True):
        assert torch.equal(first, second)
    # it behaves as any tensor does once the rest is gone
    gradient, wanted = mapped[1], plain[1] * 2
    del mapped
    assert torch.equal(gradient.mul_(2), wanted)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_sixteen_bits_are_rounded_as_torch_rounds(native, dtype):
    table = torch.tensor([0.0, -0.0, 1.0, 3.14159, 65504.0, 6e-8, float("inf"), float("nan"), -2.5e-5] * 40).to(dtype)
    factor = torch.tensor([1 + 2**-9 + 2**-20])
    out = weighted_gather(table[None], torch.zeros(1, 1, dtype=torch.int64), factor[None])
    wanted = (table.float() * factor).to(dtype)
    assert torch.equal(torch.nan_to_num(out[0], nan=7.0), torch.nan_to_num(wanted, nan=7.0))
    # float32 weights enter unrounded
    weights = torch.tensor([[1 + 2**-12, -1.0]])
    out = weighted_gather(torch.ones(2, 8, dtype=dtype), torch.tensor([[0, 1]]), weights)
    assert torch.equal(out, torch.full((1, 8), 2**-12, dtype=dtype))


@pytest.mark.parametrize(("tokens", "terms"), [(0, 3), (4, 0)])
def test_empty_inputs_give_zeros(native, tokens, terms):
    table = torch.randn(5, 8, requires_grad=True)
    weights = torch.randn(tokens, terms, requires_grad=True)
    out, grad, _ = run(table, torch.zeros(tokens, terms, dtype=torch.int64), weights, torch.ones(tokens, 8))
    assert torch.equal(out, torch.zeros(tokens, 8))
    assert torch.equal(grad, torch.zeros(5, 8))
    assert hash_gather(torch.zeros(0, 8), torch.ones(4 * 4, 3), 2).shape == (0, 3)


def test_compiled_whole_graph_equals_eager(native):
    table, ids, weights, grad = make_case(SHAPES["U6-N4-H48-T10"])

    def call(table, ids, weights):
        return weighted_gather_groups(table, ids, weights.softmax(-1)) * 2

    torch._dynamo.reset()
    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        out = function(table, ids, weights)
        results.append((out, *torch.autograd.grad(out, (table, weights), grad)))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted)


# the hash


def expected_hash(x, num_bits, weighting, temperature):
    """Rows and weights by the softmax over all sign patterns, in float64: the pattern of the signs is the largest."""
    width = x.shape[-1]
    values = x.double()
    rows, weights = [], []
    for start in range(0, width, num_bits):
        z = values[:, start : start + num_bits]
        bits = torch.cat([z >= 0, torch.ones(len(z), num_bits - z.shape[1], dtype=torch.bool)], 1)
        code = sum(bits[:, i].long() * 2 ** (num_bits - 1 - i) for i in range(num_bits))
        patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=FLOAT64)] * z.shape[1]).view(-1, z.shape[1])
        p = torch.softmax(z @ patterns.T / temperature, -1).amax(-1)
        rows.append(code + start // num_bits * 2**num_bits)
        weights.append(p * z.abs().sum(-1) if weighting == "l1" else p)
    return torch.stack(rows, 1), torch.stack(weights, 1)


# tokens, width, bits, columns
HASHES = [
    (1, 24, 8, 40), (1, 1030, 10, 130), (3, 20, 8, 70), (5, 35, 3, 16), (2, 7, 1, 5), (1, 5, 5, 1), (9, 26, 12, 17),
    # wide enough for a hash on several threads
    (1, 4100, 4, 40), (2, 4099, 4, 70),
]  # fmt: skip


@pytest.mark.parametrize("weighting", ["l1", "paper"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", HASHES, ids=str)
def test_hash_equals_the_softmax_over_all_patterns(native, threads, shape, weighting, temperature):
    tokens, width, bits, _ = shape
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(3))
    x[0, 0], x[-1, -1] = 0.0, -0.0
    rows, weights = sign_hash(x, bits, weighting=weighting, temperature=temperature)
    expected_rows, expected_weights = expected_hash(x, bits, weighting, temperature)
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(weights, expected_weights.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16, "int8"], ids=str)
@pytest.mark.parametrize("shape", HASHES, ids=str)
def test_hash_and_gather_equal_a_one_hot_product(native, threads, shape, dtype):
    tokens, width, bits, columns = shape
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(tokens, width, generator=generator)
    table = torch.randn(-(-width // bits) << bits, columns, generator=generator)
    rows, weights = expected_hash(x, bits, "l1", 1.5)
    if dtype == "int8":
        out = hash_gather_int8(x, quantise_rows(table), bits, weighting="l1", temperature=1.5)
        # 8-bit codes written out again from their definition
        low, high = table.double().aminmax(dim=1, keepdim=True)
        scale = ((high - low) / 255).clamp_min(1e-300)
        table, tolerance = ((table.double() - low) / scale).round() * scale + low, 1e-4
    else:
        table = table.to(dtype)
        out = hash_gather(x, table, bits, weighting="l1", temperature=1.5)
        assert out.dtype == dtype
        tolerance = {FLOAT32: 3e-6}.get(dtype, TOLERANCE[dtype])
    one_hot = torch.zeros(tokens, len(table), dtype=FLOAT64).scatter_add(1, rows, weights)
    assert error_of(out, one_hot @ table.double()) < tolerance


def test_large_and_small_values_neither_overflow_nor_lose_their_weight(native):
    x = torch.tensor([[6e4, -6e4, 1e-8, -1e-8], [-3e38, 1e-38, 0.0, -0.0]])
    rows, weights = sign_hash(x, 2, weighting="l1")
    assert rows.tolist() == [[2, 5 + 1], [1, 4 + 3]]
    torch.testing.assert_close(weights, torch.tensor([[1.2e5, 0.5e-8], [1.5e38, 0.0]]))
    assert torch.equal(
        hash_gather(x[:1].half(), torch.ones(8, 3), 2), hash_gather(x[:1].half().float(), torch.ones(8, 3), 2)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weighting", ["l1", "paper"])
def test_values_without_a_bucket_are_refused(native, threads, bad, weighting):
    for at in (0, 17, 29):
        x = torch.randn(4, 30)
        x[2, at] = bad
        with pytest.raises(ValueError, match="1 of 120 activations are NaN or infinite"):
            hash_gather(x, torch.randn(4 << 8, 6), 8, weighting=weighting)
        with pytest.raises(ValueError, match="1 of 120 activations are NaN or infinite"):
            sign_hash(x, 8, weighting=weighting)
        with pytest.raises(ValueError, match="1 of 120 activations are NaN or infinite"):
            hash_gather_int8(x, quantise_rows(torch.randn(4 << 8, 6)), 8, weighting=weighting)


def test_tables_of_which_columns_are_a_part(native):
    whole = torch.randn(3 << 4, 40)
    x = torch.randn(2, 12)
    part = hash_gather(x, whole[:, 7:29], 4)
    torch.testing.assert_close(part, hash_gather(x, whole, 4)[:, 7:29])
    turned = whole.t().contiguous().t()
    assert torch.equal(hash_gather(x, turned, 4), hash_gather(x, whole, 4))


def test_gradients_of_the_hash_go_through_autograd_and_the_kernels(built, monkeypatch):
    x = torch.randn(5, 20, requires_grad=True)
    table = torch.randn(4 << 6, 9, requires_grad=True)
    results = []
    for chosen in (None, built):
        monkeypatch.setattr(library, "_looked", True)
        monkeypatch.setattr(library, "_library", chosen)
        out = hash_gather(x, table, 6)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, table))))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


# which path runs


def forgotten(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(library, "_looked", False)
    monkeypatch.setattr(library, "_library", None)


def test_a_mode_that_watches_operators_sees_them(built, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(library, "_looked", True)
    monkeypatch.setattr(library, "_library", built)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        weighted_gather(torch.ones(3, 4), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
    assert any("bag" in name or "bmm" in name for name in seen)
    assert cpu_kernels() is built


def test_unset_uses_what_was_built_and_never_builds(built, monkeypatch, tmp_path):
    forgotten(monkeypatch, TENFOLD_CPU_KERNELS="auto", TENFOLD_CACHE=tmp_path)
    monkeypatch.setattr(library, "_compile", lambda path: pytest.fail("a build by surprise"))
    assert cpu_kernels() is None
    path = library._path()
    path.parent.mkdir()
    shutil.copy(built._name, path)
    forgotten(monkeypatch)
    assert cpu_kernels() is not None
    forgotten(monkeypatch, TENFOLD_CPU_KERNELS="off")
    assert cpu_kernels() is None
    forgotten(monkeypatch, TENFOLD_CPU_KERNELS="on")
    with pytest.raises(ValueError, match="TENFOLD_CPU_KERNELS=on is not one of auto, build, off"):
        cpu_kernels()


def test_another_source_processor_or_compiler_is_another_library(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    first = library._path()
    monkeypatch.setattr(library, "_processor", lambda: "another")
    second = library._path()
    monkeypatch.setenv("CXX", "clang++-99")
    third = library._path()
    monkeypatch.setattr(library, "_KERNELS", tmp_path)
    for name in (*library._SOURCES, *library._HEADERS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("int nothing;\n")
    assert len({first, second, third, library._path()}) == 4


@pytest.mark.parametrize("what", ["no compiler", "compiler fails", "cache is a file", "damaged library"])
def test_falls_back_and_says_so_once(what, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    forgotten(monkeypatch, TENFOLD_CPU_KERNELS="build", TENFOLD_CACHE=cache)
    monkeypatch.delenv("CXX", raising=False)
    if what == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
        message = "need a C\\+\\+ compiler: install g\\+\\+ or clang\\+\\+"
    elif what == "compiler fails":
        monkeypatch.setenv("CXX", f"{sys.executable} -c exit('no_such_option')")
        message = "cannot build the CPU kernels: (?s:.*)no_such_option"
    elif what == "cache is a file":
        cache.write_text("")
        monkeypatch.setenv("CXX", "true")
        message = "cannot be built into .*cache"
    else:
        path = library._path()
        path.parent.mkdir(parents=True)
        path.write_bytes(b"not a library")
        message = "; the torch paths"
    table, indices, weights, _ = make_case(SHAPES["R7-H5-T9-M3"])
    with pytest.warns(RuntimeWarning, match=message):
        out = weighted_gather(table, indices, weights)
    torch.testing.assert_close(out, (table[indices] * weights.unsqueeze(-1)).sum(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighted_gather(table, indices, weights)
    if what in ("no compiler", "compiler fails"):
        with pytest.raises(RuntimeError, match=message):
            build_cpu_kernels()
        assert not list(cache.rglob("*.so"))


def test_an_import_builds_nothing_and_a_process_without_a_compiler_works(tmp_path):
    program = (
        "import torch\n"
        "from tenfold.kernels.hash_gather import hash_gather\n"
        "from tenfold.kernels.native_build import library\n"
        "assert not library._looked\n"
        "for _ in range(2):\n"
        "    out = hash_gather(torch.tensor([[1.0, -1.0]]), torch.eye(4), 2, weighting='paper')\n"
        "assert library._looked and library._library is None\n"
        "assert out.argmax() == 2, out\n"
    )
    environment = os.environ | {"TENFOLD_CPU_KERNELS": "build", "TENFOLD_CACHE": str(tmp_path), "CXX": "/no/compiler"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the torch paths of the CPU kernels run instead") == 1
    assert not list(tmp_path.rglob("*.so"))

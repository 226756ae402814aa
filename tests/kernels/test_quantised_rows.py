"""Code books, sizes and codes of quantised rows against the papers' figures and plain arithmetic; the sum over them."""

import math

import pytest
import torch
from tenfold.kernels.quantised_rows import RowLayout, normal_float_levels, weighted_gather_records

KINDS = ("int8", "nf4", "nf3")
# QLoRA, arXiv 2305.14314, appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
SIZES = {"160m": (12, 768), "410m": (24, 1024), "1b": (16, 2048)}


def test_nf4_is_the_published_table() -> None:
    assert normal_float_levels(4).tolist() == NF4


def test_nf3_is_the_same_construction_with_eight_levels() -> None:
    levels = normal_float_levels(3).double()
    assert len(levels) == 8
    assert levels[3] == 0
    assert (levels[0], levels[-1]) == (-1, 1)
    # back to probabilities: even steps on both sides of one half, 3 below and 4 above
    outermost = 1 - (1 / 16 + 1 / 14) / 2
    largest = math.sqrt(2) * torch.erfinv(torch.tensor(2 * outermost - 1, dtype=torch.float64))
    probabilities = 0.5 * (1 + torch.erf(levels * largest / math.sqrt(2)))
    below, above = torch.linspace(1 - outermost, 0.5, 4), torch.linspace(0.5, outermost, 5)
    assert (probabilities - torch.cat([below, above[1:]]).double()).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("kind", "scale_dtype", "percent"),
    [("nf4", "float16", 25.13), ("nf4", "float32", 25.26), ("nf3", "float16", 19.53), ("int8", "float16", 50.78)],
)
def test_sizes_are_those_of_the_paper(kind: str, scale_dtype: str, percent: float) -> None:
    # arXiv 2503.15798 gives 25.3 % and 19.5 %, which fit different scales
    for size in ("160m", "410m", "1b"):
        for experts in (4, 16):
            layers, width = SIZES[size]
            plain = RowLayout.of((layers, experts, width), dtype="float16")
            layout = RowLayout.of((layers, experts, width), kind, scale_dtype=scale_dtype)
            assert plain.record_bytes == layers * experts * width * 2
            # where a layer is no multiple of the block, its last block is shorter
            exact = layout.layer_values % layout.block_size == 0
            found = 100 * layout.record_bytes / plain.record_bytes
            assert found == pytest.approx(percent, abs=0.005 if exact else 0.04)


def test_rows_in_bytes() -> None:
    # pages of 4096 bytes: 18, 72, 48, 192, 64
    plain = {
        ("160m", 4): 73_728,
        ("160m", 16): 294_912,
        ("410m", 4): 196_608,
        ("410m", 16): 786_432,
        ("1b", 4): 262_144,
    }
    for (size, experts), expected in plain.items():
        layers, width = SIZES[size]
        assert RowLayout.of((layers, experts, width), dtype="bfloat16").record_bytes == expected
        assert expected % 4096 == 0
    assert RowLayout.of((12, 4, 768), "nf4").record_bytes == 18_528
    assert RowLayout.of((12, 4, 768), "nf3").record_bytes == 14_400


def levels_of(kind: str) -> torch.Tensor:
    return torch.arange(-127, 128) / 127 if kind == "int8" else normal_float_levels(4 if kind == "nf4" else 3)


def by_hand(values: torch.Tensor, kind: str, block: int, scale_dtype: torch.dtype) -> torch.Tensor:
    """Nearest level times scale, block by block and value by value, in float64."""
    levels = levels_of(kind).double()
    out = torch.empty_like(values, dtype=torch.float64)
    for row, target in zip(values.double(), out, strict=True):
        for start in range(0, len(row), block):
            part = row[start : start + block]
            scale = part.abs().max().to(scale_dtype).double()
            for place, value in enumerate(part):
                nearest = (levels * scale - value).abs().argmin()
                target[start + place] = levels[nearest] * scale
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [16, 37, 1000])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_values_become_the_nearest_level_times_the_scale(kind: str, block: int, scale_dtype: str) -> None:
    layout = RowLayout.of((2, 3, 32), kind, block_size=block, scale_dtype=scale_dtype)
    values = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50, 4]).view(
        4, 1, 1
    )
    values[3, 1] = 0
    encoded = layout.encode(values)
    assert encoded.shape == (4, layout.layer_bytes)
    assert encoded.dtype == torch.uint8
    expected = by_hand(values.flatten(1), kind, block, getattr(torch, scale_dtype)).view(4, 3, 32)
    assert (layout.decode(encoded) - expected).abs().max() <= 1e-6 * values.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_coding_what_was_decoded_changes_nothing(kind: str) -> None:
    layout = RowLayout.of((1, 4, 96), kind)
    values = torch.randn(500, 4, 96, generator=torch.Generator().manual_seed(1))
    once = layout.encode(values)
    assert torch.equal(layout.encode(layout.decode(once)), once)


def test_codes_lie_where_the_layout_says() -> None:
    layout = RowLayout.of((1, 1, 16), "nf4", block_size=16)
    values = torch.tensor(NF4).roll(3).view(1, 1, 16) * 2
    packed = layout.encode(values)[0]
    codes = [int(byte) >> shift & 15 for byte in packed[:8] for shift in (0, 4)]
    assert codes == [(index - 3) % 16 for index in range(16)]
    assert packed[8:].view(torch.float16).tolist() == [2.0]
    layout = RowLayout.of((1, 1, 16), "nf3", block_size=16)
    values = normal_float_levels(3).repeat(2).view(1, 1, 16)
    word = int.from_bytes(bytes(layout.encode(values)[0][:3].tolist()), "little")
    assert [word >> shift & 7 for shift in range(0, 24, 3)] == list(range(8))


@pytest.mark.parametrize("kind", KINDS)
def test_errors_shrink_with_the_bits(kind: str) -> None:
    layout = RowLayout.of((1, 4, 768), kind)
    values = torch.randn(20, 4, 768, generator=torch.Generator().manual_seed(2))
    error = (layout.decode(layout.encode(values)) - values).norm() / values.norm()
    # a normal distribution over 8-, 4- and 3-bit levels
    low, high = {"int8": (0.003, 0.01), "nf4": (0.08, 0.12), "nf3": (0.15, 0.22)}[kind]
    assert low < error < high


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("kind", ["int8", "nf4", "nf3", "float16", "float32"])
@pytest.mark.parametrize("shape", [(7, 3, 32, 5), (4, 4, 80, 1), (2, 16, 16, 9)], ids=str)
def test_the_sum_equals_decoding_first(backend: str, kind: str, shape: tuple[int, ...]) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    records, experts, width, tokens = shape
    how = {"dtype": kind} if "float" in kind else {"quantisation": kind, "block_size": 48}
    layout = RowLayout.of((2, experts, width), **how)
    generator = torch.Generator().manual_seed(3)
    stored = layout.encode(torch.randn(records, experts, width, generator=generator))
    # one layer's slice of longer records
    held = torch.full((records, 3 * layout.layer_bytes), 255, dtype=torch.uint8)
    held[:, layout.layer_bytes : 2 * layout.layer_bytes] = stored
    part = held[:, layout.layer_bytes : 2 * layout.layer_bytes]
    ids = torch.randint(records, (tokens,), generator=generator)
    weights = torch.rand(tokens, experts, generator=generator)
    out = weighted_gather_records(part, ids, weights, layout, backend=backend)
    expected = torch.einsum("tn,tnd->td", weights.double(), layout.decode(stored)[ids].double())
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 1e-5


def test_gates_keep_their_gradient_and_float64_its_precision() -> None:
    layout = RowLayout.of((1, 3, 16), "nf4", block_size=16)
    values = torch.randn(5, 3, 16)
    records, ids = layout.encode(values), torch.tensor([[0, 4], [1, 1]])
    weights = torch.rand(2, 2, 3, dtype=torch.float64, requires_grad=True)
    out = weighted_gather_records(records, ids, weights, layout)
    assert out.shape == (2, 2, 16)
    assert out.dtype == torch.float64
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert (grad - layout.decode(records).double()[ids].sum(-1)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"quantisation": "nf5"}, "quantisation 'nf5' is not one of none, int8, nf4, nf3"),
        ({"quantisation": "nf3", "shape": (1, 3, 8)}, "3 experts of width 8 do not fill whole 16-bit words with nf3"),
        ({"quantisation": "nf4", "scale_dtype": "bfloat16"}, "scale_dtype 'bfloat16' is neither"),
        ({"quantisation": "nf4", "block_size": 0}, "block_size 0 is below 1"),
    ],
)
def test_layouts_that_cannot_be(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RowLayout.of(arguments.pop("shape", (1, 4, 16)), **arguments)


def test_what_a_scale_cannot_hold_is_refused() -> None:
    values = torch.full((1, 4, 16), 1e5)
    with pytest.raises(ValueError, match=r"largest value 100000 is outside the range of torch.float16 scales; use"):
        RowLayout.of((1, 4, 16), "nf4").encode(values)
    layout = RowLayout.of((1, 4, 16), "nf4", scale_dtype="float32")
    assert torch.equal(layout.decode(layout.encode(values)), values)


def test_files_of_another_code_book_are_refused() -> None:
    metadata = RowLayout.of((1, 4, 16), "nf4").metadata()
    assert RowLayout.from_metadata((1, 4, 16), "uint8", metadata) == RowLayout.of((1, 4, 16), "nf4")
    with pytest.raises(ValueError, match="codes are of the book 'nf4-2', this release reads 'nf4-1'"):
        RowLayout.from_metadata((1, 4, 16), "uint8", metadata | {"code_book": "nf4-2"})


def test_wrong_shapes_are_refused() -> None:
    layout = RowLayout.of((1, 4, 16), "nf4")
    with pytest.raises(ValueError, match=r"records must be \(U, 34\) uint8 with weights \(..., 4\)"):
        weighted_gather_records(torch.zeros(2, 33, dtype=torch.uint8), torch.zeros(1), torch.zeros(1, 4), layout)
    records = torch.zeros(2, 34, dtype=torch.uint8)
    for backend in ("cpu", "triton"):
        with pytest.raises(ValueError, match="holds 2, the table's rows go from 0 to 1"):
            weighted_gather_records(records, torch.tensor([2]), torch.zeros(1, 4), layout, backend=backend)

"""Packed keys and values: against loops over groups in float64, backend against backend, and edge cases."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from tenfold.kernels.low_bit_kv import LowBit, pack, packed_bytes, packed_scores, packed_weighted_sum, unpack
from tenfold.kernels.low_bit_kv.reference import packed_scores_reference, packed_weighted_sum_reference

# kernel tests on a GPU are marked below; on a CPU the same bodies run in Triton's interpreter
TRITON_DTYPES = [torch.float32, torch.float16]


def looped_levels(x: np.ndarray, bits: int, group_size: int, per: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and dequantised values of x (B, N, T, D) in float64, one group at a time, from the published formulas."""
    codes = np.zeros(x.shape, dtype=np.int64)
    values = np.zeros(x.shape)
    axis, size = (2, group_size) if per == "channel" else (3, group_size)
    moved = np.moveaxis(x, axis, -1)
    moved_codes, moved_values = np.moveaxis(codes, axis, -1), np.moveaxis(values, axis, -1)
    for place in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], size):
            group = moved[place][start : start + size]
            if rule == "kivi":
                levels = np.linspace(group.min(), group.max(), 2**bits)
            else:
                part = (group.max() - group.min()) / 2**bits
                levels = group.min() + part * (np.arange(2**bits) + 0.5)
            nearest = np.abs(group[:, None] - levels).argmin(1)
            moved_codes[place][start : start + size] = nearest
            moved_values[place][start : start + size] = levels[nearest]
    return codes, values


def codes_by_hand(packed: LowBit) -> np.ndarray:
    """Read every code bit by bit from the documented layout."""
    raw = packed.codes.cpu().numpy()
    num_bytes = raw.shape[3]
    out = np.zeros((*raw.shape[:3], packed.num_channels), dtype=np.int64)
    for channel in range(packed.num_channels):
        plane, byte = divmod(channel, num_bytes)
        out[..., channel] = (raw[..., byte] >> (plane * packed.bits)) & (2**packed.bits - 1)
    return out


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rule", ["kivi", "centred"])
@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "channels", "group_size"), [(64, 64, 32), (37, 20, 8), (5, 7, 16)])
def test_levels_are_the_published_ones(
    tokens: int, channels: int, group_size: int, bits: int, per: str, rule: str
) -> None:
    x = normal(2, 2, tokens, channels)
    packed = pack(x, bits=bits, group_size=group_size, per=per, rule=rule)
    codes, values = looped_levels(x.numpy(), bits, group_size, per, rule)
    assert (codes_by_hand(packed) == codes).all()
    torch.testing.assert_close(unpack(packed), torch.from_numpy(values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [64, 80, 96, 128])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_code_survives_packing_and_the_size_is_the_formula(bits: int, channels: int) -> None:
    # integers from 0 to 2**bits - 1 in every group are their own KIVI codes
    codes = torch.randint(0, 2**bits, (2, 3, 50, channels), generator=torch.Generator().manual_seed(1)).float()
    codes[..., ::16], codes[..., 1::16] = 0, 2**bits - 1
    packed = pack(codes, bits=bits, group_size=16, per="token", rule="kivi")
    assert torch.equal(unpack(packed), codes)
    assert packed.codes.dtype == torch.uint8
    for per in ("channel", "token"):
        halves = pack(codes.half(), bits=bits, group_size=32, per=per)
        expected = packed_bytes(50, channels, bits=bits, group_size=32, per=per, itemsize=2)
        assert halves.nbytes == 2 * 3 * expected
    # codes alone: 16 / bits times smaller than 16-bit numbers
    assert packed.codes.nbytes * 16 == codes.half().nbytes * bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["kivi", "centred"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rounding_error_is_within_half_a_step(bits: int, rule: str, dtype: torch.dtype) -> None:
    x = normal(2, 2, 96, 40, dtype=dtype, seed=3)
    packed = pack(x, bits=bits, group_size=32, per="channel", rule=rule)
    step = packed.scale.double().repeat_interleave(32, 2)
    # scale, zero and the result are rounded to the storage dtype; README.md derives the bound
    slack = 2 * torch.finfo(dtype).eps * x.double().abs().amax()
    assert ((unpack(packed).double() - x.double()).abs() <= step / 2 + slack * 2**bits).all()


def test_one_bit_levels_lie_at_a_quarter_and_three_quarters_and_extremes_are_clamped() -> None:
    x = torch.tensor([0.0, 1.0, 0.2, 0.8, 0.49, 0.51, 0.0, 1.0], dtype=torch.float64).view(1, 1, 8, 1)
    packed = pack(x, bits=1, group_size=8, per="channel")
    assert unpack(packed).flatten().tolist() == [0.25, 0.75, 0.25, 0.75, 0.25, 0.75, 0.25, 0.75]
    kivi = pack(x, bits=1, group_size=8, per="channel", rule="kivi")
    assert set(unpack(kivi).flatten().tolist()) == {0.0, 1.0}


def test_the_one_bit_rule_has_the_smaller_error_on_gaussian_groups() -> None:
    # a property of the method: KIVI's two levels are the extremes of the group, which inflates what is in between
    x = normal(1, 1, 64 * 64, 8, seed=5)
    errors = {
        rule: (unpack(pack(x, bits=1, group_size=64, per="channel", rule=rule)) - x).square().mean().item()
        for rule in ("kivi", "centred")
    }
    assert errors["centred"] == pytest.approx(0.50, abs=0.03)
    assert errors["kivi"] == pytest.approx(2.73, abs=0.12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.0, -3.25, 6e-8, 60000.0])
def test_constant_groups_are_exact(value: float, dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 32, 4), value).to(dtype)
    for bits in (1, 2, 4):
        assert torch.equal(unpack(pack(x, bits=bits, group_size=32, per="channel")), x)


def test_the_widest_range_of_half_precision_stays_finite() -> None:
    x = torch.tensor([65504.0, -65504.0] * 16).half().view(1, 1, 32, 1)
    for rule in ("kivi", "centred"):
        assert torch.isfinite(unpack(pack(x, bits=1, group_size=32, per="channel", rule=rule))).all()


class AttentionCase:
    """Packed keys and values, queries, lengths and replaced rows."""

    def __init__(
        self,
        *,
        bits: int,
        dtype: torch.dtype,
        shape: tuple[int, int, int, int] = (2, 2, 75, 24),
        num_rows: int = 3,
        num_entries: int = 6,
        group_size: int = 32,
        device: str = "cpu",
    ) -> None:
        batch, heads, tokens, channels = shape
        self.keys = normal(*shape, dtype=dtype, seed=10).to(device)
        self.values = normal(*shape, dtype=dtype, seed=11).to(device)
        self.query = normal(batch, heads, num_rows, channels, dtype=dtype, seed=12).to(device)
        self.lengths = torch.tensor([tokens, max(tokens - 11, 1)][:batch], device=device)
        generator = torch.Generator().manual_seed(13)
        shortest = int(self.lengths.min())
        picks = [torch.randperm(shortest, generator=generator)[:num_entries] for _ in range(batch * heads)]
        self.indices = torch.stack(picks).view(batch, heads, -1).int().to(device)
        if num_entries > 2:
            # entries that must be ignored: none, one past the sequence's end
            self.indices[0, 0, 1] = -1
            self.indices[-1, -1, 2] = int(self.lengths[-1])
        places = self.indices.clamp(0, tokens - 1).long().unsqueeze(3).expand(-1, -1, -1, channels)
        self.key_rows, self.value_rows = self.keys.gather(2, places), self.values.gather(2, places)
        self.packed_keys = pack(self.keys, bits=bits, group_size=group_size, per="channel")
        self.packed_values = pack(self.values, bits=bits, group_size=group_size, per="token")
        self.weights = normal(batch, heads, num_rows, tokens + 4, seed=14).abs()
        self.weights = self.weights.to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)

    def scores_by_hand(self, factor: float) -> np.ndarray:
        """Every score from float64 loops over the published levels."""
        keys = unpack(self.packed_keys).double().cpu().numpy().copy()
        return self._looped(keys, self.key_rows, lambda b, h: self.query[b, h].double().cpu().numpy() * factor)

    def _looped(self, dense: np.ndarray, rows: torch.Tensor, query) -> np.ndarray:
        batch, heads, tokens, _ = dense.shape
        out = np.full((batch, heads, self.query.shape[2], tokens), -np.inf)
        for b in range(batch):
            length = int(self.lengths[b])
            for h in range(heads):
                for entry, token in enumerate(self.indices[b, h].tolist()):
                    if 0 <= token < length:
                        dense[b, h, token] = rows[b, h, entry].double().cpu().numpy()
                for t in range(length):
                    out[b, h, :, t] = query(b, h) @ dense[b, h, t]
        return out

    def sum_by_hand(self) -> np.ndarray:
        values = unpack(self.packed_values).double().cpu().numpy().copy()
        batch, heads, _, channels = values.shape
        out = np.zeros((batch, heads, self.query.shape[2], channels))
        for b in range(batch):
            for h in range(heads):
                for entry, token in enumerate(self.indices[b, h].tolist()):
                    if 0 <= token < int(self.lengths[b]):
                        values[b, h, token] = self.value_rows[b, h, entry].double().cpu().numpy()
                for t in range(int(self.lengths[b])):
                    out[b, h] += self.weights[b, h, :, t].double().cpu().numpy()[:, None] * values[b, h, t]
        return out

    def scores(self, backend: str, **options) -> torch.Tensor:
        return packed_scores(
            self.query,
            self.packed_keys,
            self.lengths,
            factor=0.3,
            indices=self.indices,
            rows=self.key_rows,
            backend=backend,
            **options,
        )

    def sum(self, backend: str) -> torch.Tensor:
        return packed_weighted_sum(
            self.weights,
            self.packed_values,
            self.lengths,
            indices=self.indices,
            rows=self.value_rows,
            backend=backend,
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_scores_and_sums_equal_loops_in_float64(bits: int, backend: str) -> None:
    case = AttentionCase(bits=bits, dtype=torch.float64)
    torch.testing.assert_close(case.scores(backend), torch.from_numpy(case.scores_by_hand(0.3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(case.sum(backend), torch.from_numpy(case.sum_by_hand()), rtol=1e-12, atol=1e-12)


def test_the_cpu_path_works_through_many_tiles_in_all_16_bit_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    from tenfold.kernels.low_bit_kv import cpu_low_bit_kv

    monkeypatch.setattr(cpu_low_bit_kv, "_TILE_VALUES", 2 * 2 * 24 * 32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        case = AttentionCase(bits=2, dtype=dtype, shape=(2, 2, 203, 24))
        # the reference rounds keys and values to 16 bits, this path does not
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 5e-2}
        torch.testing.assert_close(case.scores("cpu"), case.scores("reference"), **tolerance)
        torch.testing.assert_close(case.sum("cpu"), case.sum("reference"), **tolerance)


def test_ops_take_either_axis_for_keys_and_values() -> None:
    case = AttentionCase(bits=2, dtype=torch.float64)
    case.packed_keys, case.packed_values = (
        pack(case.keys, bits=2, group_size=32, per="token"),
        pack(case.values, bits=2, group_size=32, per="channel"),
    )
    for backend in ("cpu", "reference"):
        expected = torch.from_numpy(case.scores_by_hand(0.3))
        torch.testing.assert_close(case.scores(backend), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(case.sum(backend), torch.from_numpy(case.sum_by_hand()), rtol=1e-12, atol=1e-12)


def test_scores_are_written_into_the_first_columns_of_a_wider_buffer() -> None:
    case = AttentionCase(bits=2, dtype=torch.float32)
    for backend in ("cpu", "reference", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("cpu",):
        out = torch.full((2, 2, 3, 80), 7.0)
        result = case.scores(backend, out=out)
        assert result is out
        assert (out[..., 75:] == 7).all()
        torch.testing.assert_close(out[..., :75], case.scores("reference"), rtol=1e-5, atol=1e-5)


def test_references_pass_gradients_to_queries_weights_and_exact_rows() -> None:
    case = AttentionCase(bits=2, dtype=torch.float64, shape=(2, 1, 16, 8), num_rows=2, num_entries=3, group_size=4)
    inside = torch.arange(16) < case.lengths.view(-1, 1, 1, 1)

    def scores(query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found = packed_scores_reference(query, case.packed_keys, case.lengths, indices=case.indices, rows=rows)
        return found.masked_fill(~inside, 0.0)

    def total(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return packed_weighted_sum_reference(weights, case.packed_values, case.lengths, indices=case.indices, rows=rows)

    assert torch.autograd.gradcheck(scores, (case.query.requires_grad_(), case.key_rows.requires_grad_()))
    assert torch.autograd.gradcheck(total, (case.weights.requires_grad_(), case.value_rows.requires_grad_()))


def needs_triton(device: str) -> str:
    pytest.importorskip("triton")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: a GPU is here")
    return device


SMALL = [
    pytest.param((2, 2, 75, 24), 3, 6, id="B2-N2-T75-D24"),
    pytest.param((1, 1, 1, 80), 1, 1, id="B1-N1-T1-D80"),
    pytest.param((2, 1, 130, 64), 17, 5, id="B2-N1-T130-D64-M17"),
]


def check_triton(shape, rows: int, entries: int, *, bits: int, dtype: torch.dtype, device: str, group: int) -> None:
    x = normal(*shape, dtype=dtype, seed=20).to(device)
    for per in ("channel", "token"):
        for given in (x, x.transpose(2, 3).contiguous().transpose(2, 3)):
            ours = pack(given, bits=bits, group_size=group, per=per, backend="triton")
            theirs = pack(x, bits=bits, group_size=group, per=per, backend="reference")
            assert torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.scale, theirs.scale)
    case = AttentionCase(
        bits=bits, dtype=dtype, shape=shape, num_rows=rows, num_entries=entries, group_size=group, device=device
    )
    for ours, theirs in (
        (case.scores("triton"), case.scores("reference")),
        (case.sum("triton"), case.sum("reference")),
    ):
        if dtype == torch.float32:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        else:
            inside = torch.isfinite(theirs)
            assert torch.equal(inside, torch.isfinite(ours))
            error = (ours - theirs)[inside].square().mean().sqrt() / theirs[inside].square().mean().sqrt()
            assert error < (5e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("shape", "rows", "entries"), SMALL)
def test_triton_equals_the_reference(shape, rows: int, entries: int, bits: int, dtype: torch.dtype) -> None:
    check_triton(shape, rows, entries, bits=bits, dtype=dtype, device=needs_triton("cpu"), group=32)


def test_triton_with_groups_that_are_no_power_of_two_and_with_views_of_larger_storage() -> None:
    check_triton((2, 1, 50, 20), 3, 4, bits=2, dtype=torch.float32, device=needs_triton("cpu"), group=12)
    case = AttentionCase(bits=2, dtype=torch.float32)
    storage = LowBit.empty(2, 2, 160, 24, bits=2, group_size=32, per="channel", dtype=torch.float32, device="cpu")
    storage.write(case.packed_keys, slice(None), 0)
    expected = case.scores("reference")
    case.packed_keys = storage.first(75)
    torch.testing.assert_close(case.scores("triton"), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.scores("cpu"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "rows", "entries"),
    [*SMALL, pytest.param((2, 8, 4096, 128), 8, 64, id="B2-N8-T4096-D128")],
)
def test_triton_equals_the_reference_on_a_gpu(shape, rows: int, entries: int, bits: int, dtype: torch.dtype) -> None:
    check_triton(shape, rows, entries, bits=bits, dtype=dtype, device="cuda", group=64)


def test_nothing_packed_gives_empty_scores_and_zero_sums() -> None:
    empty = pack(torch.zeros(1, 2, 0, 8), bits=2, group_size=4, per="channel")
    lengths = torch.zeros(1, dtype=torch.int64)
    assert packed_scores(torch.ones(1, 2, 3, 8), empty, lengths).shape == (1, 2, 3, 0)
    assert torch.equal(packed_weighted_sum(torch.ones(1, 2, 3, 5), empty, lengths), torch.zeros(1, 2, 3, 8))


def test_a_sequence_of_length_zero_scores_minus_infinity_and_sums_to_zero() -> None:
    x = normal(2, 1, 8, 8, dtype=torch.float32)
    packed = pack(x, bits=2, group_size=4, per="channel")
    lengths = torch.tensor([0, 8])
    for backend in ("cpu", "reference"):
        scores = packed_scores(torch.ones(2, 1, 1, 8), packed, lengths, backend=backend)
        assert torch.isinf(scores[0]).all()
        assert torch.isfinite(scores[1]).all()
        weights = torch.full((2, 1, 1, 8), torch.nan)
        weights[1] = 1
        assert (packed_weighted_sum(weights, packed, lengths, backend=backend)[0] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits is 3; codes of 1, 2 and 4 bits"),
        ({"group_size": 0}, "group_size is 0; it must be at least 1"),
        ({"per": "head"}, "per is 'head'"),
        ({"rule": "mid"}, "rule is 'mid'"),
        ({"backend": "cuda"}, "backend 'cuda' is not one of"),
        ({"x": torch.zeros(2, 3)}, r"x must be \(B, N, T, D\), got \(2, 3\)"),
        ({"x": torch.zeros(1, 1, 2, 2, dtype=torch.int32)}, "x must be floating point, got torch.int32"),
    ],
)
def test_pack_names_what_is_wrong(change: dict, message: str) -> None:
    options = {"x": torch.zeros(1, 1, 4, 4), "bits": 2, "group_size": 2, "per": "token", **change}
    with pytest.raises(ValueError, match=message):
        pack(options.pop("x"), **options)


def test_attention_ops_name_what_is_wrong() -> None:
    case = AttentionCase(bits=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="indices and rows belong together"):
        packed_scores(case.query, case.packed_keys, case.lengths, indices=case.indices)
    with pytest.raises(ValueError, match="must agree in batch and heads"):
        packed_scores(case.query[:1], case.packed_keys, case.lengths)
    with pytest.raises(ValueError, match="query has 23 channels, the packed keys have 24"):
        packed_scores(case.query[..., 1:], case.packed_keys, case.lengths)
    with pytest.raises(ValueError, match="weights has 74 columns for 75 packed tokens"):
        packed_weighted_sum(case.weights[..., :74], case.packed_values, case.lengths)
    with pytest.raises(ValueError, match="out must be"):
        case.scores("cpu", out=torch.zeros(2, 2, 3, 10))


def test_on_a_cpu_without_the_interpreter_the_ops_fall_back_and_a_forced_triton_is_refused() -> None:
    program = """
        import torch
        from tenfold.kernels.low_bit_kv import pack, packed_scores
        x = torch.randn(1, 1, 64, 16)
        packed = pack(x, bits=2, group_size=32, per="channel")
        print(packed_scores(x[:, :, :2], packed, torch.tensor([64])).shape)
        try:
            pack(x, bits=2, group_size=32, per="channel", backend="triton")
        except ValueError as error:
            print(error)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment, check=True
    )
    assert "torch.Size([1, 1, 2, 64])" in done.stdout
    assert "needs" in done.stdout

"""MemoryLayer as a drop-in module, its sizes to the digit, and what it refuses."""

import math

import pytest
import torch
from tenfold.lightning_modules import MemoryLayer
from tenfold.lightning_modules.memoryformer.sizes import (
    BlockSizes,
    attention_multiply_adds,
    available_bytes,
    check_memory,
    dense_multiply_adds,
    table_values,
)
from torch import nn


def by_hand(layer, x):
    """The layer's formula, value by value, in float64."""
    tau, out = layer.num_bits, []
    for token in x.reshape(-1, x.shape[-1]).tolist():
        y = layer.bias.detach().double().clone() if layer.bias is not None else torch.zeros(layer.out_features).double()
        for k in range(math.ceil(len(token) / tau)):
            chunk = token[k * tau : (k + 1) * tau]
            bits = "".join("1" if v >= 0 else "0" for v in chunk).ljust(tau, "1")
            p = math.prod(1 / (1 + math.exp(-2 * abs(v) / layer.temperature)) for v in chunk)
            weight = p * sum(map(abs, chunk)) if layer.weighting == "l1" else p
            y = y + weight * layer.table[k * 2**tau + int(bits, 2)].detach().double()
        out.append(y)
    return torch.stack(out).view(*x.shape[:-1], layer.out_features)


@pytest.mark.parametrize(
    ("in_features", "out_features", "options"),
    [
        (24, 10, {"num_bits": 8}),
        (24, 10, {"num_bits": 4, "weighting": "paper", "temperature": 0.5}),
        (26, 7, {"num_bits": 8, "bias": False}),
        (51, 52, {"num_bits": 10, "weighting": "paper"}),
    ],
)
def test_equals_the_formula_and_fits_where_linear_does(in_features, out_features, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, in_features), nn.LayerNorm(in_features))
    x = torch.randn(2, 3, in_features)
    layer = MemoryLayer(in_features, out_features, **options)
    assert layer(x).shape == nn.Linear(in_features, out_features)(x).shape
    torch.testing.assert_close(layer(x).double(), by_hand(layer, x), rtol=1e-5, atol=1e-6)
    nn.Sequential(model, layer)(x).square().sum().backward()
    for parameter in (*model.parameters(), *layer.parameters()):
        assert parameter.grad.abs().max() > 0


def test_the_default_is_the_papers_weighting_and_the_initialisation_the_released_one():
    torch.manual_seed(0)
    layer = MemoryLayer(64, 256)
    assert (layer.weighting, layer.temperature, layer.num_bits, layer.num_tables) == ("paper", 1.0, 8, 8)
    assert layer.table.std().item() == pytest.approx(0.02, rel=0.01)
    assert layer.bias.std().item() == pytest.approx(0.001, rel=0.2)
    assert layer.table.shape == (8 * 256, 256)


def test_mean_weights_of_both_forms():
    # E[p] and E[p |z|_1] for z ~ N(0, 1), as derived in the method's notes
    from tenfold.kernels.hash_gather import sign_hash

    z = torch.randn(200_000, 10, generator=torch.Generator().manual_seed(0))
    for num_bits, paper, l1 in ((8, 0.134, 0.966), (10, 0.081, 0.731)):
        for weighting, mean in (("paper", paper), ("l1", l1)):
            found = sign_hash(z[:, :num_bits], num_bits, weighting=weighting)[1].mean().item()
            assert found == pytest.approx(mean, rel=0.006)


def test_buckets_and_those_that_can_be_reached():
    layer = MemoryLayer(7, 2, num_bits=3)
    assert layer.reachable_buckets == [8, 8, 2]
    x = torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    found = layer.buckets(x)
    assert found.shape == (500, 3)
    assert [len(found[:, k].unique()) for k in range(3)] == layer.reachable_buckets


@pytest.mark.parametrize("table_format", ["float16", "int8"])
def test_stored_tables_compute_the_same_and_survive_a_cast(table_format):
    torch.manual_seed(0)
    trained = MemoryLayer(40, 24, num_bits=4)
    stored = MemoryLayer(40, 24, num_bits=4, table_format=table_format)
    stored.records.copy_(trained.encode(table_format))
    stored.bias = trained.bias
    x = torch.randn(5, 40)
    with torch.no_grad():
        difference = (stored(x) - trained(x)).norm() / trained(x).norm()
        assert 0 < difference < (1e-3 if table_format == "float16" else 1e-2)
        expected = stored(x)
        cast = stored.to(torch.bfloat16)
        assert cast.records.dtype == torch.uint8
        assert (cast(x.bfloat16()).float() - expected).norm() / expected.norm() < 0.1


def test_the_layer_compiles_whole_and_runs_under_autocast():
    torch.manual_seed(0)
    layer, x = MemoryLayer(26, 10, num_bits=4), torch.randn(5, 26, requires_grad=True)
    wanted = layer.table, layer.bias, x
    expected = layer(x)
    gradients = torch.autograd.grad(expected.square().sum(), wanted)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = compiled(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.square().sum(), wanted), gradients, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_sizes_of_one_layer_to_the_digit():
    # fp16 bytes at d = 512; the last with 510 inputs and 512 outputs
    found = [2 * table_values(width, 512, tau) for tau, width in ((4, 512), (8, 512), (10, 510))]
    assert found == [2_097_152, 16_777_216, 53_477_376]


def test_sizes_of_the_feed_forward_to_the_digit():
    found = [2 * BlockSizes(512, 8, extra).feed_forward_values for extra in range(4)]
    assert found == [33_554_432, 52_428_800, 88_080_384, 157_286_400]


def test_multiply_adds_to_the_digit():
    s, widths = 2048, (512, 768, 1024)
    assert [dense_multiply_adds(d, s) for d in widths] == [6_442_450_944, 14_495_514_624, 25_769_803_776]
    assert [attention_multiply_adds(d, s) for d in widths] == [4_294_967_296, 6_442_450_944, 8_589_934_592]
    assert [BlockSizes(d).paper_multiply_adds(s) for d in widths] == [402_653_184, 905_969_664, 1_610_612_736]
    assert [BlockSizes(d).multiply_adds(s) for d in widths] == [357_826_560, 800_980_992, 1_420_296_192]
    d = s
    total = BlockSizes(d).paper_multiply_adds(s) + attention_multiply_adds(d, s)
    assert total / (dense_multiply_adds(d, s) + attention_multiply_adds(d, s)) == pytest.approx(0.196, abs=5e-4)


def test_table_values_and_bytes_per_token_of_a_block():
    for d, values, bytes_per_token in ((512, 69_206_016, 344_064), (768, 155_713_536, 774_144), (1024, 276_824_064, 0)):
        assert BlockSizes(d).table_values == values == 264 * d * d
        assert BlockSizes(d).bytes_per_token() == (bytes_per_token or 1_376_256) == 1.3125 * d * d


class TestBadInput:
    def test_a_width_that_the_bits_do_not_divide_can_be_refused(self):
        message = "10 bits do not divide a width of 512; use a width of 510, other bits, or remainder: pad"
        with pytest.raises(ValueError, match=message):
            MemoryLayer(512, 512, num_bits=10, remainder="refuse")
        assert MemoryLayer(12, 2, num_bits=5).num_tables == 3

    @pytest.mark.parametrize("num_bits", [17, 0, 3.0, True])
    def test_bits_out_of_range(self, num_bits):
        with pytest.raises(ValueError, match=f"num_bits {num_bits} is not between 1 and 16"):
            MemoryLayer(64, 64, num_bits=num_bits)

    @pytest.mark.parametrize("option", ["weighting", "remainder", "table_format"])
    def test_unknown_names(self, option):
        with pytest.raises(ValueError, match=f"{option} 'x' is not one of"):
            MemoryLayer(16, 16, **{option: "x"})

    @pytest.mark.parametrize("value", [math.nan, -math.inf])
    def test_activations_that_are_not_finite(self, value):
        x = torch.ones(2, 16)
        x[0, 3] = value
        with pytest.raises(ValueError, match="1 of 32 activations are NaN or infinite"):
            MemoryLayer(16, 4)(x)

    def test_an_input_of_another_width(self):
        with pytest.raises(ValueError, match="the input has 15 values per token, this layer takes 16"):
            MemoryLayer(16, 4)(torch.ones(2, 15))

    def test_more_bytes_than_the_machine_has(self):
        available = available_bytes()
        if available is None:
            pytest.skip("this system does not tell how much memory it has")
        check_memory(available // 4, "little")
        with pytest.raises(ValueError, match=r"much takes 1,000,000,000,000,000 bytes .* cpu has [\d,]+ left"):
            check_memory(10**15, "much")

    def test_values_that_halves_cannot_hold(self):
        layer = MemoryLayer(8, 2)
        with torch.no_grad():
            layer.table[3, 1] = 1e6
        with pytest.raises(ValueError, match="above 65504"):
            layer.encode("float16")
        with pytest.raises(ValueError, match="stored as int8 already"):
            MemoryLayer(8, 2, table_format="int8").encode("int8")

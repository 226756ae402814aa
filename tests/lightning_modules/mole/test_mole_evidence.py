"""MoLE against its own formulas: lookup equals experts, distinct equals naive, dataflow, counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.kernels.tensor_file import TensorFile
from tenfold.lightning_modules import DecoderForCausalLM, decoder_config
from tenfold.lightning_modules.mole.convert import compare_forms, count_bytes_per_token, export_lookup
from tenfold.lightning_modules.mole.modeling import MoLEFeedForward
from tenfold.lightning_modules.mole.table import MAGIC, TABLE_FILE, VERSION
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

V = 211


def make(seed: int = 0, **fields: Any) -> DecoderForCausalLM:
    """A small MoLE with weights wide enough that text varies and experts matter."""
    torch.manual_seed(seed)
    options = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "vocab_size": V}
    model = DecoderForCausalLM(decoder_config("mole-tiny-4e", **(options | fields)))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "down" not in name else 0.15)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def lookup_form(model: DecoderForCausalLM, folder: Path, dtype: str, **options: Any) -> Any:
    export_lookup(model, folder, dtype=dtype, memory_limit_bytes=4 * 2**20)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, **options).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    """Repeated ids, the first and the last row of the vocabulary among them."""
    ids = torch.randint(0, V, (3, 24), generator=torch.Generator().manual_seed(1))
    ids[0, 5], ids[1, 7], ids[2, :4] = V - 1, 0, 9
    return ids


@torch.no_grad()
@pytest.mark.parametrize("storage", ["mmap", "memory"])
def test_lookup_equals_experts_in_double_precision(tmp_path: Path, ids: torch.Tensor, storage: str) -> None:
    model = make().double()
    lookup = lookup_form(model, tmp_path / "x", "float64", table_storage=storage)
    expected = model(ids).logits
    assert (lookup(ids).logits - expected).abs().max() <= 1e-10
    # token by token with the cache
    past, steps = None, []
    for t in range(ids.shape[1]):
        out = lookup(ids[:, t : t + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    assert (torch.cat(steps, dim=1) - expected).abs().max() <= 1e-10
    # left padding
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for form in (model, lookup):
        got = form(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        assert (got - expected).abs().max() <= 1e-10


@torch.no_grad()
def test_every_row_of_the_table_is_the_experts_output(tmp_path: Path) -> None:
    model = make().double()
    lookup = lookup_form(model, tmp_path / "x", "float64")
    embedding = model.get_input_embeddings().weight
    for index, layer in enumerate(model.model.layers):
        part = layer.feed_forward.lookup
        m = embedding * torch.rsqrt(embedding.pow(2).mean(-1, keepdim=True) + 1e-5) * part.norm.weight
        for expert in range(4):
            hidden = F.gelu(m @ part.experts.up[expert].T)
            expected = hidden @ part.experts.down[expert].T
            got = lookup.model.table.values[:, index, expert]
            assert (got - expected).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_lookup_equals_experts_in_single_precision(tmp_path: Path, ids: torch.Tensor, dtype: str, bound: float) -> None:
    model = make()
    lookup = lookup_form(model, tmp_path / "x", dtype)
    expected = model(ids).logits
    error = (lookup(ids).logits - expected).norm() / expected.norm()
    assert error <= bound
    if dtype != "float32":
        # the table's rounding is there: an exact result would mean that it was not used
        assert error > bound / 200


@torch.no_grad()
def test_a_thousand_greedy_tokens_are_the_same(tmp_path: Path) -> None:
    model = make(max_position_embeddings=2048)
    lookup = lookup_form(model, tmp_path / "x", "float32")
    result = compare_forms(model, lookup, torch.arange(8)[:, None] * 25, num_greedy_tokens=130)
    assert result["identical_greedy_tokens"] == result["greedy_tokens"] == 1040
    text = model.generate(torch.tensor([[3]]), attention_mask=torch.ones(1, 1), do_sample=False, max_new_tokens=130)
    assert len(text.unique()) > 20, "a constant text would prove little"


def reference_mole(layer: MoLEFeedForward, u: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """The layer from the formulas, token by token and expert by expert."""
    out = torch.empty_like(u)
    up, down, norm = layer.lookup.experts.up, layer.lookup.experts.down, layer.lookup.norm
    for b in range(u.shape[0]):
        for t in range(u.shape[1]):
            logits = layer.router.weight @ u[b, t]
            g = torch.exp(logits - logits.max())
            g = g / g.sum()
            m = e[b, t] / torch.sqrt((e[b, t] ** 2).mean() + norm.eps) * norm.weight
            y = layer.shared.down.weight @ F.gelu(layer.shared.up.weight @ u[b, t])
            for j in range(len(g)):
                y = y + g[j] * (down[j] @ F.gelu(up[j] @ m))
            out[b, t] = y
    return out


@pytest.mark.parametrize("evaluation", ["distinct", "naive"])
def test_layer_equals_the_formulas(ids: torch.Tensor, evaluation: str) -> None:
    options = {"num_experts": 4, "expert_evaluation": evaluation, "expert_intermediate_size": 40}
    model = make(feed_forward_options=options).double()
    layer = model.model.layers[1].feed_forward
    embeddings = model.get_input_embeddings()(ids)
    u = torch.randn(3, 24, 48, dtype=torch.float64)
    tokens = model.model.token_context(ids, embeddings, None)
    with torch.no_grad():
        assert (layer(u, tokens) - reference_mole(layer, u, embeddings)).abs().max() < 1e-12


def gradients(model: DecoderForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def pair(**fields: Any) -> tuple[DecoderForCausalLM, DecoderForCausalLM]:
    one = make(feed_forward_options={"num_experts": 4, "expert_evaluation": "distinct"}, **fields)
    two = make(feed_forward_options={"num_experts": 4, "expert_evaluation": "naive"}, **fields)
    two.load_state_dict(one.state_dict())
    return one, two


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_distinct_equals_naive_with_all_gradients(ids: torch.Tensor, checkpointing: bool) -> None:
    one, two = (model.double() for model in pair())
    if checkpointing:
        one.gradient_checkpointing_enable()
    (logits, grads), (expected_logits, expected) = gradients(one, ids), gradients(two, ids)
    assert (logits - expected_logits).abs().max() <= 1e-10
    assert grads.keys() == expected.keys()
    for name in ("router.weight", "experts.up", "experts.down", "lookup.norm.weight", "embed_tokens.weight"):
        assert any(key.endswith(name) for key in grads), name
    for key, grad in expected.items():
        assert grad.abs().max() > 0, f"{key} has no gradient to compare"
        assert (grads[key] - grad).abs().max() <= 1e-10, key


def test_twenty_steps_of_training_agree(ids: torch.Tensor) -> None:
    curves = []
    for model in pair():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        losses = []
        for step in range(20):
            loss = model(ids.roll(step, 1), labels=ids.roll(step, 1)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0] - 0.1, "the curve has to move"
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=0)


@torch.no_grad()
def test_experts_see_the_token_and_nothing_else(ids: torch.Tensor) -> None:
    model = make()
    layer = model.model.layers[1].feed_forward
    seen: dict[str, torch.Tensor] = {}
    layer.lookup.register_forward_hook(lambda module, args, out: seen.__setitem__("v", out))
    layer.router.register_forward_hook(lambda module, args, out: seen.__setitem__("g", out))
    model(ids[:1])
    _, inverse = torch.unique(ids[:1], return_inverse=True)
    values, gates = seen["v"][inverse[0]], seen["g"]
    changed = ids[:1].clone()
    changed[0, 3] = (changed[0, 3] + 1) % V
    model(changed)
    _, inverse = torch.unique(changed, return_inverse=True)
    later = slice(4, None)
    assert torch.equal(seen["v"][inverse[0]][later], values[later]), "v at later positions changed"
    assert not torch.equal(seen["g"][0, later], gates[0, later]), "g at later positions did not change"
    assert torch.equal(seen["g"][0, :3], gates[0, :3]), "attention is causal"


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("dense-160m", 162_220_800),
        ("mole-160m-4e", 388_759_296),
        ("mole-160m-16e", 1_068_347_136),
        ("dense-410m", 405_062_656),
        ("mole-410m-4e", 1_210_491_904),
        ("mole-410m-16e", 3_626_705_920),
        ("dense-1b", 1_011_419_136),
        ("mole-1b-4e", 3_159_066_624),
    ],
)
def test_parameter_counts_are_the_papers(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = DecoderForCausalLM(decoder_config(preset))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("preset", "row_bytes"), [("mole-160m-4e", 73_728), ("mole-410m-16e", 786_432)])
def test_rows_have_the_published_size(preset: str, row_bytes: int) -> None:
    from tenfold.lightning_modules.mole.convert import plan_table

    with torch.device("meta"):
        model = DecoderForCausalLM(decoder_config(preset))
    plan = plan_table(model, "float16", 2**32)
    assert plan.row_bytes == row_bytes
    assert plan.file_bytes == row_bytes * 50_304
    assert row_bytes % 4096 == 0


@torch.no_grad()
def test_bytes_read_are_those_of_the_distinct_tokens(tmp_path: Path, ids: torch.Tensor) -> None:
    model = make()
    lookup = lookup_form(model, tmp_path / "x", "bfloat16")
    row = 3 * 4 * 48 * 2
    assert count_bytes_per_token(lookup, 7) == {"counted": row, "formula": row}
    table = lookup.model.table
    before = table.bytes_read
    lookup(ids)
    assert table.bytes_read - before == len(ids.unique()) * row


def test_rows_start_on_pages_and_chunks_do_not_matter(tmp_path: Path) -> None:
    model = make()
    contents = []
    for limit in (2**20, 2**26):
        export_lookup(model, tmp_path / str(limit), dtype="float32", memory_limit_bytes=limit)
        file = TensorFile(tmp_path / str(limit) / TABLE_FILE, magic=MAGIC, version=VERSION)
        assert file.offset("rows") % 4096 == 0
        assert file.shape("rows")[1] * 4 % 4096 == 0
        contents.append(file.read("rows"))
    torch.testing.assert_close(contents[0], contents[1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_large_passes_read_layer_by_layer_with_the_same_result(
    tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup = lookup_form(make(), tmp_path / "x", "float32", table_storage="direct")
    few = lookup(ids).logits
    # rows taken apart once for all layers, as in decoding, and layer by layer, as for a prompt
    monkeypatch.setattr("tenfold.lightning_modules.mole.table_pass.SMALL_PASS_VALUES", 0)
    whole = lookup(ids).logits
    assert (few - whole).abs().max() < 1e-5
    before = lookup.model.table.bytes_read
    monkeypatch.setattr("tenfold.lightning_modules.mole.table.STAGING_BYTES", 0)
    assert torch.equal(lookup(ids).logits, whole)
    # a layer is no whole number of blocks here: those at its ends are read with it, and counted
    assert lookup.model.table.bytes_read - before >= len(ids.unique()) * lookup.model.table.row_bytes

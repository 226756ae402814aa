"""Experts added to other models: nothing changes at the start, only they train, the table says what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.lightning_modules import DecoderForCausalLM, decoder_config
from tenfold.lightning_modules.mole.adapter import (
    AdapterConfig,
    adapted_layers,
    add_lookup_experts,
    added_parameters,
)
from tenfold.lightning_modules.mole.adapter_files import export_adapted, load_adapted
from tenfold.lightning_modules.mole.keys import keys_of, ngram_keys
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

V, D = 67, 32
CONFIGS = {
    "experts": AdapterConfig(num_experts=4, intermediate_size=20),
    "some layers": AdapterConfig(num_experts=2, intermediate_size=8, layers=(2, 0)),
    "table": AdapterConfig(num_experts=4, values="table"),
    "bigram": AdapterConfig(num_experts=4, intermediate_size=20, key="ngram_hash", num_keys=41),
    "trigram table": AdapterConfig(num_experts=2, key="ngram_hash", num_keys=97, ngram_order=3, values="table"),
}


def llama(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | tokens | fields))).eval()


def filled(model: Any, config: AdapterConfig) -> Any:
    """With experts whose weights are away from where they start."""
    add_lookup_experts(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in added_parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_starts_as_the_model_was_and_trains_nothing_else(config: AdapterConfig) -> None:
    model, ids = llama(), draw(2, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(ids).logits
    add_lookup_experts(model, config)
    assert torch.equal(model(ids).logits, expected)
    added = added_parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(added)
    layers = 3 if config.layers is None else len(config.layers)
    keys = V if config.key == "token_id" else config.num_keys
    count = layers * config.num_experts * D
    if config.values == "table":
        count += layers * keys * config.num_experts * D
    else:
        count += layers * (2 * config.num_experts * config.intermediate_size * D + D)
        count += keys * D if config.key == "ngram_hash" else 0
    assert sum(p.numel() for p in added.values()) == count
    optimizer = torch.optim.AdamW(list(added.values()), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(12):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    after = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def brute_force(model: Any, ids: torch.Tensor, config: AdapterConfig) -> torch.Tensor:
    """Logits with every expert evaluated for every position on its own, in a copy of the plain model."""
    plain = llama()
    keys = keys_of(ids, config.key, order=config.ngram_order, num_keys=config.num_keys)
    layers = sorted(range(3)) if config.layers is None else list(config.layers)
    for place, index in enumerate(layers):
        part = adapted_layers(model)[place]
        embedding = model.lookup_adapter.key_embedding or model.get_input_embeddings()

        def add(
            module: Any, args: Any, out: torch.Tensor, part: Any = part, embedding: Any = embedding
        ) -> torch.Tensor:
            gates = (args[0] @ part.router.weight.T).softmax(-1)
            total = out.clone()
            for b in range(ids.shape[0]):
                for t in range(ids.shape[1]):
                    if config.values == "table":
                        values = part.lookup.rows[keys[b, t]]
                    else:
                        e = embedding.weight[keys[b, t]]
                        m = e / (e.square().mean() + 1e-6).sqrt() * part.lookup.norm.weight
                        hidden = torch.nn.functional.gelu(part.lookup.experts.up @ m)
                        values = torch.stack([w @ h for w, h in zip(part.lookup.experts.down, hidden, strict=True)])
                    total[b, t] += gates[b, t] @ values
            return total

        plain.model.layers[index].mlp.register_forward_hook(add)
    return plain(ids).logits


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_add_the_routed_sum(config: AdapterConfig) -> None:
    model, ids = filled(llama(), config), draw(2, 7)
    assert (model(ids).logits - brute_force(model, ids, config)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_says_what_the_experts_say(config: AdapterConfig, quantisation: Any, tmp_path: Path) -> None:
    model, ids = filled(llama(tie_word_embeddings=config.layers is not None), config), draw(2, 12)
    options = {"dtype": "float32"} if quantisation == "none" else {"quantisation": quantisation}
    export_adapted(model, tmp_path / "x", **options)
    for storage in ("mmap", "direct"):
        lookup = load_adapted(tmp_path / "x", storage=storage)
        assert not [name for name, p in lookup.named_parameters() if ".lookup." in name or "key_embedding" in name]
        difference = (lookup(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
        assert difference < (1e-5 if quantisation == "none" else 0.15)
    start, settings = ids[:, :4], {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones(2, 4)}
    if quantisation == "none":
        assert torch.equal(lookup.generate(start, **settings), model.generate(start, **settings))
    # and without its experts it is the plain model
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    expected = llama(tie_word_embeddings=config.layers is not None)
    assert torch.equal(plain(ids).logits, expected(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bigram", "trigram table", "experts"])
def test_decoding_step_by_step_equals_the_whole_sequence(name: str) -> None:
    model, ids = filled(llama(), CONFIGS[name]), draw(3, 10)
    whole = model(ids, use_cache=False).logits
    out = model(ids[:, :4], use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    for start, end in ((4, 5), (5, 8), (8, 10)):
        parts.append(model(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4
    # cut back and continued in another way, then with the beams in another order
    cache.crop(-4)
    other = torch.cat([ids[:, :6], ids[:, 2:4]], dim=1)
    again = model(ids[:, 2:4], past_key_values=cache, use_cache=True).logits
    assert (again - model(other, use_cache=False).logits[:, 6:]).abs().max() < 1e-4
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    beams = torch.cat([other[[2, 0, 0]], ids[:, :1]], dim=1)
    step = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
    assert (step - model(beams, use_cache=False).logits[:, -1:]).abs().max() < 1e-4


@torch.no_grad()
def test_beams_and_padding_with_ngrams() -> None:
    model, ids = filled(llama(), CONFIGS["trigram table"]), draw(2, 6)
    settings = {"do_sample": False, "max_new_tokens": 8, "num_beams": 3}
    one = model.generate(ids[:1], attention_mask=torch.ones(1, 6), **settings)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 6)], dim=1).long()
    two = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(one[:, 6:], two[:, 9:])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 3:]
    assert (found - model(ids[:1], use_cache=False).logits).abs().max() < 1e-4


def test_keys_of_ngrams() -> None:
    ids = draw(2, 500)
    ids[:, 100:103] = ids[:, 200:203]
    keys = keys_of(ids, "ngram_hash", order=2, num_keys=1000)
    assert keys.shape == ids.shape
    assert keys.min() >= 0
    assert keys.max() < 1000
    assert torch.equal(keys[:, 101:103], keys[:, 201:203])
    # the key of a position depends on its own id and the one before, and on nothing else
    changed = ids.clone()
    changed[:, 50] = (changed[:, 50] + 1) % V
    differs = keys_of(changed, "ngram_hash", order=2, num_keys=1000) != keys
    assert differs[:, 50:52].all()
    assert not differs[:, :50].any()
    assert not differs[:, 52:].any()
    # order matters, and keys are spread evenly: chi-square over all pairs
    pairs = torch.cartesian_prod(torch.arange(200), torch.arange(200))
    all_keys = ngram_keys(pairs, order=2, num_keys=64).flatten()
    assert ngram_keys(torch.tensor([[3, 5]]), order=2, num_keys=10**9) != ngram_keys(
        torch.tensor([[5, 3]]), order=2, num_keys=10**9
    )
    counts = torch.bincount(all_keys, minlength=64).double()
    chi_square = ((counts - 625) ** 2 / 625).sum()
    assert 20 < chi_square < 130


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: AdapterConfig(num_experts=0), "num_experts 0 is below 1"),
        (lambda: AdapterConfig(key="word"), "key 'word' is neither 'token_id' nor 'ngram_hash'"),
        (lambda: AdapterConfig(values="rows"), "values 'rows' is neither"),
        (lambda: add_lookup_experts(llama(), AdapterConfig(layers=(3,))), "layer 3 does not exist, the model has 3"),
        (lambda: add_lookup_experts(torch.nn.Linear(2, 2), AdapterConfig()), r"Linear has no model\.layers"),
        (lambda: adapted_layers(llama()), "has no lookup experts; add them"),
        (lambda: add_lookup_experts(filled(llama(), AdapterConfig()), AdapterConfig()), "has lookup experts; load"),
    ],
)
def test_what_cannot_be_added(build: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    model = filled(llama(), CONFIGS["bigram"])
    with pytest.raises(ValueError, match="take no inputs_embeds; pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, D))
    foreign = llama()(draw(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache holds 4 tokens whose ids are not known"):
        model(draw(1, 1), past_key_values=foreign, use_cache=True)
    with pytest.raises(FileNotFoundError, match=r"has no lookup_adapter\.json: it is no model with added lookup"):
        load_adapted(tmp_path)


def test_a_stale_or_resized_table_is_refused(tmp_path: Path) -> None:
    model = filled(llama(), CONFIGS["experts"])
    export_adapted(model, tmp_path / "x", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    with torch.no_grad():
        plain.get_input_embeddings().weight[3] += 1
    plain.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="made from another embedding than the model has; export it again"):
        load_adapted(tmp_path / "x")
    plain.resize_token_embeddings(V + 3)
    plain.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match=f"the embedding has {V + 3} rows, the table {V}: the vocabulary was resized"):
        load_adapted(tmp_path / "x")


@torch.no_grad()
def test_the_projects_own_decoder_takes_them_too() -> None:
    torch.manual_seed(0)
    fields = {"vocab_size": V, "hidden_size": D, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = DecoderForCausalLM(decoder_config("dense-tiny", **fields)).eval()
    expected = model(draw(2, 5)).logits
    add_lookup_experts(model, CONFIGS["bigram"], freeze=False)
    assert torch.equal(model(draw(2, 5)).logits, expected)
    assert all(p.requires_grad for p in model.parameters())

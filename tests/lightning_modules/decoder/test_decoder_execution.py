"""Cache, padding, attention implementations, checkpointing and compilation change nothing in the result."""

from collections.abc import Callable

import pytest
import torch
from tenfold.lightning_modules.decoder import DecoderForCausalLM
from torch import Tensor
from transformers import DynamicCache

SLOTS = ("dense", "moe", "mole")
Model = Callable[..., DecoderForCausalLM]
Ids = Callable[..., Tensor]


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 4, 2]], ids=["token-by-token", "chunks"])
def test_cached_steps_give_the_logits_of_one_pass(
    slot: str, steps: list[int], small_model: Model, token_ids: Ids
) -> None:
    model, ids = small_model(slot, num_key_value_heads=2), token_ids(2, 12)
    cache, parts = DynamicCache(config=model.config), []
    for part in ids.split(steps, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=0, atol=1e-10)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_changes_nothing(slot: str, attention: str, small_model: Model, token_ids: Ids) -> None:
    # transformers' eager attention fills float64 masks with a number that its float32 softmax does not hold
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    tolerance = 1e-10 if attention == "sdpa" else 1e-5
    model, ids = small_model(slot, dtype=dtype), token_ids(3, 10)
    model.set_attn_implementation(attention)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 8)):
        ids[row, :padding] = 60
        mask[row, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    # counted from the padding, positions shift: the same but for the rounding of float32 angles
    shifted = model(ids, attention_mask=mask).logits
    for row, padding in enumerate((0, 3, 8)):
        alone = model(ids[row : row + 1, padding:]).logits[0]
        torch.testing.assert_close(logits[row, padding:], alone, rtol=0, atol=tolerance)
        torch.testing.assert_close(shifted[row, padding:], alone, rtol=0, atol=1e-4)
    assert logits.isfinite().all()


def test_sdpa_and_eager_agree_on_logits_and_gradients(small_model: Model, token_ids: Ids) -> None:
    ids, results = token_ids(2, 9), {}
    for attention in ("sdpa", "eager"):
        model = small_model(num_key_value_heads=2)
        model.set_attn_implementation(attention)
        output = model(ids, output_attentions=attention == "eager")
        output.logits.square().mean().backward()
        results[attention] = [output.logits, *(p.grad for p in model.parameters())]
    for one, other in zip(results["sdpa"], results["eager"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # rows of the attention weights are distributions over the past
    (weights, _) = output.attentions
    assert weights.shape == (2, 4, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9, dtype=weights.dtype), rtol=0, atol=1e-6)
    assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("slot", SLOTS)
def test_greedy_generation_is_the_same_with_and_without_cache_and_padded(
    slot: str, small_model: Model, token_ids: Ids
) -> None:
    model, ids = small_model(slot, dtype=torch.float32), token_ids(2, 6)
    options = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": 60}
    ids[1, :2] = 60
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert cached.shape == (2, 36)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    alone = model.generate(ids[1:, 2:], attention_mask=mask[1:, 2:], **options)
    assert torch.equal(cached[1:, 2:], alone)
    # by hand, from logits of full passes
    text = ids[:1]
    for _ in range(30):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached[:1], text)
    assert len(text[0, 6:].unique()) > 5


@pytest.mark.parametrize("slot", ["dense", "mole"])
def test_embeddings_in_place_of_ids(slot: str, small_model: Model, token_ids: Ids) -> None:
    model, ids = small_model(slot), token_ids(2, 8)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits, rtol=0, atol=1e-10)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_logits_to_keep(small_model: Model, token_ids: Ids) -> None:
    model, ids = small_model(), token_ids(2, 8)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    positions = torch.tensor([1, 6])
    torch.testing.assert_close(model(ids, logits_to_keep=positions).logits, logits[:, positions])
    assert logits.shape == (2, 8, 61)


@pytest.mark.parametrize("slot", [*SLOTS, "naive-mole"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_gives_the_same_gradients(
    slot: str, dropout: float, small_model: Model, token_ids: Ids
) -> None:
    fields = {"feed_forward_options": {"expert_evaluation": "naive"}} if slot == "naive-mole" else {}
    model, ids = small_model(slot.removeprefix("naive-"), attention_dropout=dropout, **fields).train(), token_ids(2, 9)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        return [output.loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    expected = gradients()
    assert all(gradient.abs().max() > 0 for gradient in expected)
    calls = []
    handle = model.model.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    model._set_gradient_checkpointing(
        True, lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    )
    found = gradients()
    handle.remove()
    # once forward and once more in the backward pass
    assert len(calls) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_reentrant_checkpointing_is_refused(small_model: Model) -> None:
    model = small_model("mole")
    # the name in newer releases of transformers, and the one in older ones
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    with pytest.raises(ValueError, match="pass use_reentrant=False"):
        enable({"use_reentrant": True})
    enable({"use_reentrant": False})
    assert model.model.gradient_checkpointing


@pytest.mark.slow  # the compiler takes about a minute
@pytest.mark.parametrize("slot", SLOTS)
def test_compiled_network_gives_the_same_loss_and_gradients(slot: str, small_model: Model, token_ids: Ids) -> None:
    model, ids = small_model(slot, dtype=torch.float32).train(), token_ids(2, 9)

    def results() -> list[Tensor]:
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    expected = results()
    keys = list(model.state_dict())
    model.compile()
    for one, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("slot", ["moe", "mole"])
def test_autocast_keeps_router_probabilities_in_float32(slot: str, small_model: Model, token_ids: Ids) -> None:
    model, ids = small_model(slot, dtype=torch.float32, initializer_range=0.1), token_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    expected = model(ids).logits
    # bfloat16 has 8 significant bits: two per cent of the largest logit is a few roundings
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()

"""Caches by name, as a command line asks for them."""

import pytest
import torch
from tenfold.inference import SpeCache, build_cache
from tenfold.inference.specache import CACHES, SpeCacheOptions, specache_generate
from transformers import DynamicCache


def test_every_option_of_the_method_is_offered_with_its_default() -> None:
    offered = {option.name: option for option in CACHES["specache"].options}
    defaults = vars(SpeCacheOptions())
    assert set(offered) == set(defaults)
    assert {name: option.default for name, option in offered.items()} == {n: defaults[n] for n in offered}
    assert offered["bits"].type is int
    assert offered["measure"].type is bool
    assert offered["rule"].choices == ("kivi", "centred")
    assert offered["host_limit_bytes"].type is int
    assert all(option.help for choice in CACHES.values() for option in choice.options)


@pytest.mark.parametrize("name", ["full", "kivi", "exact-fetch", "specache"])
def test_what_is_built_decodes(tiny_llama, prompt, name: str) -> None:
    model, ids = tiny_llama(), prompt()
    options = {} if name == "full" else {"residual_length": 128, "group_size": 32}
    cache, arguments = build_cache(name, model.config, **options)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, **arguments)
    assert arguments["past_key_values"] is cache
    assert ("custom_generate" in arguments) == isinstance(cache, SpeCache)
    # nothing leaves a residual of 128 tokens: every cache is the full one
    assert torch.equal(out, model.generate(ids, max_new_tokens=6, do_sample=False))


def test_names_stand_for_the_methods_they_say(tiny_llama) -> None:
    config = tiny_llama().config
    kivi, arguments = build_cache("kivi", config, bits=1)
    assert (kivi.options.mode, kivi.options.rule, kivi.options.residual_length) == ("low_bit_only", "kivi", 128)
    assert arguments["custom_generate"] is specache_generate
    assert build_cache("exact-fetch", config)[0].options.mode == "exact_fetch"
    assert type(build_cache("full", config)[0]) is DynamicCache


def test_kivi_and_specache_have_the_same_device_bytes_but_for_the_indices(tiny_llama) -> None:
    from tenfold.inference.specache import CacheShape

    config = tiny_llama().config
    shape = CacheShape.of(config, torch.float16)
    # 64 + 64 against 128: what the paper compares
    kivi = shape.device_bytes(build_cache("kivi", config)[0].options, 1, 4096)
    ours = shape.device_bytes(build_cache("specache", config)[0].options, 1, 4096)
    # 64 more tokens are also low-bit here, and rows have indices
    assert kivi < ours < 1.03 * kivi


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("specash", {}, r"unknown cache 'specash': use one of full, .*did you mean specache\?"),
        ("specache", {"bit": 2}, r"cache 'specache' has no option 'bit': it takes bits, .*did you mean bits\?"),
        ("specache", {"rule": "mid"}, "rule of cache 'specache' is 'mid'; use one of kivi, centred"),
        ("specache", {"bits": 5}, "bits is 5; the device copy can have 1, 2 or 4 bits"),
        ("kivi", {"top_k": 4}, "cache 'kivi' has no option 'top_k'"),
        ("full", {"bits": 2}, "cache 'full' has no option 'bits': it takes none"),
    ],
)
def test_wrong_names_and_options_are_told(tiny_llama, name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_cache(name, tiny_llama().config, **options)


def test_facts_add_counts_and_keep_the_largest_sizes() -> None:
    from tenfold.inference.specache import add_facts

    one = {"batches": 1, "device_bytes": 10, "steps": 3, "speculated": 4, "speculation_hits": 1, "wanted_rows": 0}
    two = {"batches": 1, "device_bytes": 7, "steps": 5, "speculated": 6, "speculation_hits": 4, "wanted_rows": 0}
    total = add_facts([one, two])
    assert total["device_bytes"] == 10
    assert (total["batches"], total["steps"], total["speculation_hit_ratio"]) == (2, 8, 0.5)
    assert "coverage_ratio" not in total
    # facts of facts: a ratio is never added
    assert add_facts([total, one])["speculation_hit_ratio"] == round(6 / 14, 6)


def test_what_is_missing_on_this_machine_is_told(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    from tenfold.inference.specache import registry

    monkeypatch.setattr(registry, "_installed", lambda _: False)
    with pytest.raises(ValueError, match="cache 'quantized' needs the package hqq, which is not installed"):
        build_cache("quantized", tiny_llama().config)
    with pytest.raises(ValueError, match="needs the package optimum-quanto"):
        build_cache("quantized", tiny_llama().config, quantizer="quanto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cache 'offloaded' needs a CUDA device"):
        build_cache("offloaded", tiny_llama().config)


def test_groups_that_hqq_cannot_cut_are_refused_before_a_prompt_is_read(tiny_llama, monkeypatch) -> None:
    from tenfold.inference.specache import registry

    monkeypatch.setattr(registry, "_installed", lambda _: True)
    with pytest.raises(ValueError, match=r"q_group_size is 7; for hqq it must divide the \d+ key channels"):
        build_cache("quantized", tiny_llama().config, q_group_size=7)

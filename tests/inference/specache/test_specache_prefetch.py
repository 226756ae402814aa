"""Fetching beside the computation: the same numbers as fetching at once, however slow, and errors that surface."""

import threading
import time

import pytest
import torch
from tenfold.inference.specache import SpeCache, decode_logits, specache_generate
from tenfold.inference.specache.host_store import HostRows

SMALL = {"residual_length": 16, "group_size": 8, "top_k": 4, "bits": 1}


def run(model, ids, given, mask, **options):
    cache = SpeCache(model.config, **SMALL, **options)
    logits = decode_logits(model, ids, given, cache=cache, attention_mask=mask)
    stored = [tensor.clone() for layer in range(2) for tensor in cache.full_precision(layer)]
    cache.close()
    return logits, stored, cache


@pytest.mark.parametrize("mode", ["speculative", "exact_fetch", "low_bit_only"])
@pytest.mark.parametrize("delay", [0.0, 0.003])
def test_a_worker_thread_changes_nothing_even_when_the_host_is_slow(
    tiny_llama, prompt, monkeypatch, delay, mode
) -> None:
    model, ids, given = tiny_llama(), prompt(), prompt(length=40, seed=4)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    at_once = run(model, ids, given, mask, mode=mode, prefetch="sync")
    threads = set()
    gather, append = HostRows.gather, HostRows.append

    def slow_gather(self, indices, out):
        threads.add(threading.current_thread().name)
        time.sleep(delay)
        gather(self, indices, out)

    def slow_append(self, row, slots):
        threads.add(threading.current_thread().name)
        time.sleep(delay / 2)
        append(self, row, slots)

    monkeypatch.setattr(HostRows, "gather", slow_gather)
    monkeypatch.setattr(HostRows, "append", slow_append)
    beside = run(model, ids, given, mask, mode=mode, prefetch="async")
    assert torch.equal(at_once[0], beside[0])
    assert all(torch.equal(a, b) for a, b in zip(at_once[1], beside[1], strict=True))
    assert len(threads) == 1
    assert next(iter(threads)).startswith("specache")


@pytest.mark.gpu
def test_streams_on_a_gpu_change_nothing(tiny_llama, prompt) -> None:
    model, ids, given = tiny_llama().cuda(), prompt().cuda(), prompt(length=40, seed=4).cuda()
    mask = torch.ones_like(ids)
    results = [run(model, ids, given, mask, prefetch=how, measure=how == "async") for how in ("sync", "async")]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert results[1][2].statistics.exposed_wait_seconds >= 0
    assert results[1][2].layers[0].host.rows.is_pinned()


def test_an_error_of_the_worker_reaches_the_caller(tiny_llama, prompt, monkeypatch) -> None:
    model, ids = tiny_llama(), prompt()

    def broken(self, indices, out):
        raise OSError("bus error")

    monkeypatch.setattr(HostRows, "gather", broken)
    cache = SpeCache(model.config, prefetch="async", **SMALL)
    with pytest.raises(OSError, match="bus error"):
        model.generate(ids, max_new_tokens=5, past_key_values=cache, custom_generate=specache_generate)
    cache.close()


def test_the_worker_ends_with_the_cache(tiny_llama, prompt) -> None:
    def workers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("specache")]

    model, ids = tiny_llama(), prompt()
    cache = SpeCache(model.config, prefetch="async", **SMALL)
    model.generate(ids, max_new_tokens=5, past_key_values=cache, custom_generate=specache_generate)
    assert len(workers()) == 1
    del cache
    assert workers() == []


def test_rows_come_back_as_they_were_stored_key_beside_value() -> None:
    generator = torch.Generator().manual_seed(0)
    store = HostRows(3, 11, 2, 5, dtype=torch.float32, pinned=False)
    tokens = torch.randn(11, 3, 2, 2, 5, generator=generator)
    # sequences of different lengths: the first is two tokens ahead
    for step in range(9):
        store.append(tokens[step], [step + 2, step, step])
    indices = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(6)]).view(3, 2, 4)
    indices[1, 0, 2] = -1
    out = torch.empty(3, 2, 4, 2, 5)
    shifted = indices + torch.tensor([2, 0, 0]).view(3, 1, 1) * (indices >= 0)
    store.gather(shifted, out)
    for sequence in range(3):
        for head in range(2):
            for entry, token in enumerate(indices[sequence, head].tolist()):
                if token >= 0:
                    assert torch.equal(out[sequence, head, entry], tokens[token, sequence, head])
    # one run of memory per token and head
    assert store.rows.stride()[3:] == (5, 1)


def test_waits_hits_and_coverage_are_counted(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt()
    exact = SpeCache(model.config, measure=True, residual_length=16, group_size=1, top_k=4)
    model.generate(ids, max_new_tokens=30, past_key_values=exact, custom_generate=specache_generate)
    statistics = exact.statistics
    # the copy loses nothing, so the guess is the next token, and it chose what that token chooses
    assert statistics.speculation_hit_ratio == 1.0
    assert statistics.coverage_ratio == 1.0
    assert statistics.speculated == 29 * 2
    assert statistics.wanted_rows == 29 * 2 * 2 * 2 * 4
    assert statistics.wait_seconds >= 0
    lossy = SpeCache(model.config, measure=True, **SMALL)
    model.generate(ids, max_new_tokens=30, past_key_values=lossy, custom_generate=specache_generate)
    assert 0 < lossy.statistics.coverage_ratio < 1
    assert SpeCache(model.config).statistics.speculation_hit_ratio is None

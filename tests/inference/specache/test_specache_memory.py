"""Bytes: on the device against the formula and the paper's ratios, on the host, moved per step, and refused."""

import pytest
import torch
from tenfold.inference.specache import CacheShape, SpeCache, SpeCacheOptions, decode_logits, specache_generate
from tenfold.inference.specache.host_store import available_host_bytes, check_host_memory


def reachable_tensor_bytes(cache: SpeCache, *, host: bool) -> int:
    """Bytes of every distinct tensor storage that can be reached from the layers, by walking their attributes."""
    seen, total, stack = set(), 0, []
    for layer in cache.layers:
        stack.append(layer.host if host else layer.store)
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        elif hasattr(item, "__dict__") and not isinstance(item, SpeCacheOptions):
            stack.extend(vars(item).values())
    return total


@pytest.mark.parametrize("mode", ["speculative", "low_bit_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "group", "head_dim"), [(1, 64, 64), (2, 32, 64), (4, 16, 20), (1, 8, 12)])
def test_device_and_host_bytes_are_the_formula_to_the_byte(
    tiny_llama, prompt, bits, group, head_dim, dtype, mode
) -> None:
    model, ids = tiny_llama(dtype=dtype, head_dim=head_dim), prompt(batch=3, length=150)
    cache = SpeCache(model.config, bits=bits, group_size=group, residual_length=64, top_k=10, mode=mode)
    model.generate(ids, max_new_tokens=9, past_key_values=cache, custom_generate=specache_generate)
    shape = CacheShape.of(model.config, dtype)
    assert cache.capacity == 158
    # written out: codes, scales and zeros of keys and values, the residual, the fetched rows with their indices
    e, heads, layers, batch = dtype.itemsize, 2, 2, 3
    code = -(-head_dim * bits // 8)
    keys = 128 * code + 2 * e * (128 // group) * head_dim
    values = (158 - 64) * (code + 2 * e * -(-head_dim // group))
    rows = 10 * (2 * head_dim * e + 4) if mode == "speculative" else 0
    expected = batch * heads * layers * (keys + values + 2 * 64 * head_dim * e + rows)
    assert cache.device_bytes == shape.device_bytes(cache.options, 3, 158) == expected
    assert reachable_tensor_bytes(cache, host=False) == expected
    host = 2 * e * heads * head_dim * layers * batch * 158
    assert cache.host_bytes == shape.host_bytes(3, 158) == host
    assert reachable_tensor_bytes(cache, host=True) == host


@pytest.mark.parametrize(
    ("length", "bits", "group", "ratio"),
    [
        (4096, 2, 32, 0.22),
        (4096, 2, 64, 0.19),
        (4096, 1, 32, 0.15),
        (4096, 1, 64, 0.125),
        (8192, 2, 32, 0.20),
        (8192, 2, 64, 0.17),
        (8192, 1, 32, 0.14),
        (8192, 1, 64, 0.11),
        (32768, 2, 32, 0.19),
        (32768, 2, 64, 0.16),
        (32768, 1, 32, 0.13),
        (32768, 1, 64, 0.10),
    ],
)
def test_the_papers_ratios_of_device_to_full_bytes(length: int, bits: int, group: int, ratio: float) -> None:
    shape = CacheShape(num_layers=32, num_heads=8, head_dim=128, itemsize=2)
    options = SpeCacheOptions(bits=bits, group_size=group)
    found = shape.device_bytes(options, 1, length) / shape.full_bytes(1, length)
    assert found == pytest.approx(ratio, abs=0.006)
    # the closed form: (b + 32 / g) / 16 of what left the residual, plus R + k exact tokens
    closed = ((bits + 32 / group) / 16 * (length - 64) + 64 + 64) / length
    # it leaves out the indices, and the block of keys that is still in the residual is counted twice
    assert found == pytest.approx(closed, abs=2e-3)


@pytest.mark.parametrize(
    ("layers", "heads", "head_dim", "mebibytes"), [(32, 8, 128, 8), (32, 32, 128, 32), (24, 2, 64, 0.75)]
)
def test_bytes_fetched_per_step_at_known_shapes(layers: int, heads: int, head_dim: int, mebibytes: float) -> None:
    shape = CacheShape(num_layers=layers, num_heads=heads, head_dim=head_dim, itemsize=2)
    assert shape.fetched_bytes_per_step(SpeCacheOptions(), 1, 8192) == mebibytes * 2**20


def test_bytes_moved_are_counted_and_are_those_of_the_formula(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(dtype=torch.bfloat16), prompt(batch=2, length=40)
    for mode, fetches in (("speculative", 20 + 1), ("exact_fetch", 20), ("low_bit_only", 0)):
        cache = SpeCache(model.config, top_k=6, residual_length=8, group_size=8, mode=mode)
        model.generate(ids, max_new_tokens=21, past_key_values=cache, custom_generate=specache_generate)
        shape = CacheShape.of(model.config, torch.bfloat16)
        assert cache.statistics.bytes_to_device == fetches * shape.fetched_bytes_per_step(cache.options, 2, 60)
        indices = fetches * 2 * 2 * 2 * 6 * 4
        assert cache.statistics.bytes_to_host == shape.host_bytes(2, 60) + indices


def test_few_candidates_take_no_more_rows_than_the_context(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt(length=20)
    cache = SpeCache(model.config)
    model.generate(ids, max_new_tokens=5, past_key_values=cache, custom_generate=specache_generate)
    assert cache.layers[0].store.fetched.shape[2] == 24


def test_a_host_store_that_does_not_fit_is_refused_with_its_size_before_the_prefill(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt(length=100)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    need = 2 * 4 * 2 * 16 * 2 * 2 * 109
    for limit in (need - 1, need):
        cache = SpeCache(model.config, host_limit_bytes=limit)
        if limit < need:
            message = f"2 sequences of 109 tokens needs {need} bytes of host memory, host_limit_bytes is {limit}"
            with pytest.raises(ValueError, match=message):
                model.generate(ids, max_new_tokens=10, past_key_values=cache, custom_generate=specache_generate)
            assert passes == []
            assert cache.host_bytes == 0
        else:
            model.generate(ids, max_new_tokens=10, past_key_values=cache, custom_generate=specache_generate)
            assert cache.host_bytes == need


def test_without_a_limit_what_the_system_has_available_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from tenfold.inference.specache import host_store

    monkeypatch.setattr(host_store, "available_host_bytes", lambda: 1000)
    check_host_memory(900, None, "it")
    with pytest.raises(ValueError, match="it needs 901 bytes of host memory, 1000 are available"):
        check_host_memory(901, None, "it")
    # the user knows better
    check_host_memory(5000, 5000, "it")
    monkeypatch.setattr(host_store, "available_host_bytes", lambda: None)
    check_host_memory(10**15, None, "it")


def test_available_memory_is_what_the_system_says() -> None:
    psutil = pytest.importorskip("psutil")
    found = available_host_bytes()
    if found is not None:
        assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_the_dense_copy_of_a_layer_is_never_held(tiny_llama, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    # on the packed path no tensor as large as a layer's full-precision keys appears in decoding
    from tenfold.kernels.low_bit_kv import cpu_low_bit_kv
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not function.is_view:
                    self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
            return result

    monkeypatch.setattr(cpu_low_bit_kv, "_TILE_VALUES", 64 * 2 * 64)
    model, ids = tiny_llama(head_dim=64, num_attention_heads=2, max_position_embeddings=4096), prompt(1, 2048)
    full = 2048 * 2 * 64 * 4
    sizes = {}
    for attention in ("packed", "dense"):
        cache = SpeCache(model.config, attention=attention, top_k=8)
        mode = Largest()
        forward = SpeCache.forward_pass

        def watched(self, phase, *args, mode=mode, forward=forward, **kwargs):
            if phase == "pre_decode":
                mode.__enter__()
            return forward(self, phase, *args, **kwargs)

        monkeypatch.setattr(SpeCache, "forward_pass", watched)
        try:
            decode_logits(model, ids, prompt(1, 3, seed=4), cache=cache)
        finally:
            mode.__exit__(None, None, None)
        monkeypatch.setattr(SpeCache, "forward_pass", forward)
        sizes[attention] = mode.bytes
    assert sizes["dense"] >= full
    assert sizes["packed"] < full / 4

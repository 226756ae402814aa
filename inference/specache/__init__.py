"""SpeCache (arXiv 2503.16163): keys and values in host memory, a low-bit copy and a few exact rows on the device."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accounting": ["CacheShape"],
        "budget": ["equal_bytes_options"],
        "cache": ["SpeCache"],
        "decoding_cache": ["DecodingCache"],
        "eviction": ["HeavyHitterCache", "WindowCache"],
        "facts": ["add_facts", "cache_facts", "facts_line", "tensor_bytes"],
        "generation": ["decode_logits", "generate_with_specache", "specache_generate"],
        "lm": ["SpeCacheLM"],
        "options": ["SpeCacheOptions"],
        "recorded": ["RecordedPrompt", "decode_recorded", "record_prompt"],
        "registry": ["CACHES", "CacheChoice", "CacheOption", "build_cache"],
        "session": ["SpeCacheSession"],
        "statistics": ["SpeCacheStatistics"],
    },
)

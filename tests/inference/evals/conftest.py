"""A tiny random Llama, held-out documents and the shipped tasks built from them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = (
    "river stone market bridge engine garden winter letter copper island signal harbour forest museum "
    "violin planet castle meadow tunnel candle basket mirror desert lantern orchard pebble"
)
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def documents() -> list[dict[str, str]]:
    """Thirty made-up articles of different lengths, one of them longer than the model's context."""
    rows = []
    for number in range(30):
        title = f"{WORDS[number % 26].title()} {WORDS[(number * 7 + 3) % 26].title()}"
        if number % 10 == 4:
            title += " (place)"
        name = title.removesuffix(" (place)")
        body = " ".join(WORDS[(number * 5 + step * 11) % 26] for step in range(14 + 3 * (number % 5)))
        rows.append({"title": title, "text": f"{name} is known for its {body}. {name}'s visitors: {number * 37}."})
    rows[5]["text"] += " " + " ".join(WORDS * 6)
    return rows


@pytest.fixture(scope="session")
def make_llama(tiny_tokenizer: Any) -> Callable[..., Any]:
    """Builds a two-layer Llama with the tiny tokenizer's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "vocab_size": len(tiny_tokenizer.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 0,
            # large enough for scores to depend on the input
            "initializer_range": 0.2,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()

    return make


@pytest.fixture(scope="session")
def llama(make_llama: Callable[..., Any]) -> Any:
    return make_llama()


@pytest.fixture
def own_llama(llama: Any) -> Any:
    """A copy whose weights a test may change."""
    return copy.deepcopy(llama)


@pytest.fixture(scope="session")
def model_folder(llama: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama.save_pretrained(folder)
    tiny_tokenizer.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wikipedia_data(documents: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tenfold.inference import build_wikipedia_tasks

    folder = tmp_path_factory.mktemp("wikipedia")
    build_wikipedia_tasks(documents, folder, max_characters=200)
    return folder

"""Small decoders with random weights that the tests of SpeCache share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny operations: a second thread only waits, and on a busy machine it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sharpen(model: PreTrainedModel, factor: float = 6.0) -> PreTrainedModel:
    """Larger query and key weights: attention looks at few tokens, as in a trained model."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(factor)
            elif "v_proj" in name or "o_proj" in name:
                weight.mul_(factor / 2)
    return model


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a tiny Llama: grouped-query attention 4/2, two layers."""

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float32, sharp: bool = True, **changes) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": 83,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            **changes,
        }
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).eval()
        return sharpen(model) if sharp else model

    return make


@pytest.fixture(scope="session")
def prompt() -> Callable[..., torch.Tensor]:
    """Makes random prompts (batch, length) without padding or end tokens."""

    def make(batch: int = 2, length: int = 70, seed: int = 1, vocabulary: int = 83) -> torch.Tensor:
        return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make

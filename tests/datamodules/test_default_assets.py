"""The assets that `make setup` fetches, as they are on this machine."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

Finder = Callable[[str], Path]


def test_smollm2_tokenizer_fits_the_embedding_and_round_trips(require_asset: Finder) -> None:
    folder = require_asset("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert len(tokenizer) == config.vocab_size == 49152
    for text in ("The capital of France is Paris.", "def f(a):\n\treturn 'é' + \"日本 🙂\"", "  1234.5  \n\n", ""):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert all(i < 49152 for i in ids)
    # single digits, and no token put in front
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234").input_ids) == ["1", "2", "3", "4"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.eval
def test_smollm2_answers(require_asset: Finder) -> None:
    from transformers import AutoModelForCausalLM

    folder = require_asset("smollm2-135m")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0]).startswith(
        "The capital of France is Paris."
    )


def test_summaries_are_whole(require_asset: Finder) -> None:
    folder = require_asset("wikipedia-summaries")
    rows = [json.loads(line) for line in (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 10_033
    assert all(row.keys() == {"title", "text"} and row["text"].strip() for row in rows)
    assert "CC-BY-SA" in json.loads((folder / "asset.json").read_text())["licence"]

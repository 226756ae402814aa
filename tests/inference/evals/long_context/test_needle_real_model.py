"""A real model finds real needles: prompt, chat template and scoring fit together."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tenfold.inference.evals import evaluate_model
from tenfold.inference.evals.long_context import LongContextOptions


@pytest.mark.slow
@pytest.mark.eval
def test_smollm2_finds_the_needle(require_asset: Callable[[str], Path]) -> None:
    model, summaries = require_asset("smollm2-135m"), require_asset("wikipedia-summaries")
    with open(summaries / "documents.jsonl", encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    found = evaluate_model(
        model,
        tasks=["needle"],
        long_context=LongContextOptions(lengths=[640], depths=[0, 10, 20], documents=documents),
        apply_chat_template=True,
        device="cpu",
        bootstrap_iters=0,
    )
    assert found is not None
    told = found["tenfold"]["long_context"]["needle"]
    assert told["sets"]["needle"] == 100.0
    assert told["longest_prompt_tokens"] <= 640 - 32

"""A real language model, fine-tuned for a few steps on real text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tenfold.callbacks.excp import ExCPOptions, decode, encode

pytestmark = pytest.mark.slow


def test_fine_tuning_saves_are_forty_times_smaller_at_half_a_step_of_error(
    require_asset: Callable[[str], Path],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = require_asset("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with (require_asset("wikipedia-summaries") / "documents.jsonl").open() as lines:
        text = "\n\n".join(json.loads(next(lines))["text"] for _ in range(60))
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    # the upper third, as the whole would take 8 GB
    model.requires_grad_(False)
    for layer in model.model.layers[20:]:
        layer.requires_grad_(True)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-5)
    generator = torch.Generator().manual_seed(0)
    reference, last, read = None, None, None
    for step in range(1, 7):
        start = int(torch.randint(0, len(tokens) - 129, (1,), generator=generator))
        batch = tokens[None, start : start + 128]
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        if step % 2:
            continue
        checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [optimiser.state_dict()]}
        encoded = encode(checkpoint, reference, ExCPOptions(), previous_weights=last)
        report = encoded.report
        if reference is None:
            assert report.ratio > 2
        else:
            assert report.ratio > 40
            assert report.largest_error_over_step <= 0.5
            assert report.total.update_ratio <= 1.5
            assert report.payload_bytes < 1.02 * report.total.bound_bytes
        # checks every tensor against the writer's, by checksum
        _, read = decode(encoded, read)
        reference = encoded.reference
        last = {name: weight.clone() for name, weight in model.state_dict().items()}

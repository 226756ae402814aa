"""Bucket use in the report: counts of whoever runs meanwhile, against counting each layer's inputs by hand."""

import json

import pytest
import torch
from tenfold.experiments import bucket_report
from tenfold.experiments.bucket_report import add_bucket_use, counting_buckets, has_hash_tables
from tenfold.lightning_modules import DecoderForCausalLM, MemoryLayer
from tenfold.lightning_modules.decoder import decoder_config

FIELDS = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    options = {"projection_options": {"num_bits": 4}, "feed_forward_options": {"num_bits": 4, "extra_bits": 1}}
    return DecoderForCausalLM(decoder_config("memoryformer-tiny", **FIELDS, **options)).eval()


@pytest.fixture
def inputs(model):
    """What each memory layer is given, by name."""
    found = {name: [] for name, part in model.named_modules() if isinstance(part, MemoryLayer)}
    for name in found:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: found[name].append(given[0].detach())
        )
    return found


def _by_hand(layer, given):
    counts = torch.zeros(layer.num_tables, 2**layer.num_bits, dtype=torch.int64)
    for x in given:
        for token in x.reshape(-1, x.shape[-1]).tolist():
            for table in range(layer.num_tables):
                part = token[table * layer.num_bits : (table + 1) * layer.num_bits]
                counts[table, int("".join("1" if value >= 0 else "0" for value in part), 2)] += 1
    return counts


def test_counts_are_those_of_the_layers_inputs(model, inputs):
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    uses = {}
    with counting_buckets(uses), torch.no_grad():
        model(ids)
        model(ids[:, :3])
    given = {name: list(values) for name, values in inputs.items()}
    with torch.no_grad():
        model(ids)
    assert uses.keys() == {name.removeprefix("model.") for name in given}
    for name, values in given.items():
        layer = model.get_submodule(name)
        assert torch.equal(uses[name.removeprefix("model.")].counts, _by_hand(layer, values)), name


def test_counting_stops_where_entropy_is_exact_enough(model, monkeypatch):
    monkeypatch.setattr(bucket_report, "MAX_POSITIONS", 8)
    uses = {}
    with counting_buckets(uses), torch.no_grad():
        for _ in range(5):
            model(torch.arange(6).unsqueeze(0))
    assert {int(use.counts[0].sum()) for use in uses.values()} == {12}


def test_the_section_has_the_picture_and_a_row_per_layer(model, tmp_path):
    uses = {}
    with counting_buckets(uses), torch.no_grad():
        model(torch.arange(61).unsqueeze(0))
    results = {"results": {}, "tenfold": {"model": "m"}, "configs": {}, "versions": {}, "n-shot": {}}
    values = add_bucket_use(results, uses, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Bucket use</h2>" in page
    assert "hits relative to even use" in page
    use = uses["layers.0.feed_forward.first"]
    assert "<td>layers.0.feed_forward.first</td>" in page
    written = json.loads((tmp_path / "bucket_use.json").read_text())
    row = next(row for row in written["layers"] if row["layer"] == "layers.0.feed_forward.first")
    assert row["dead_rows"] == int((use.counts == 0).sum())
    shares = torch.cat([part.entropy_share for part in uses.values()])
    assert values["buckets/entropy_share"] == written["buckets/entropy_share"] == pytest.approx(float(shares.mean()))


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"projection": "memory"}, True),
        ({"feed_forward": "memory"}, True),
        ({"feed_forward": "memory", "feed_forward_options": {"key": "ngram_hash"}}, False),
        ({"feed_forward": "dense"}, False),
        ([], False),
    ],
)
def test_which_models_have_hash_tables(tmp_path, fields, answer):
    assert not has_hash_tables(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert has_hash_tables(tmp_path) == answer

"""From text to stored tables and a score, through the commands; the benchmark's rows; what they refuse."""

import json
import os
from pathlib import Path

import pytest
import torch
from tenfold.experiments.bench import memoryformer, memoryformer_optimizer, memoryformer_quality
from tenfold.experiments.bench.registry import BENCHES, Settings
from tenfold.experiments.bench.timing import WrongResult
from tenfold.experiments.cli import main
from tenfold.experiments.memoryformer import quality
from tenfold.lightning_modules.memoryformer import row_optimizer

CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 3
  val_check_interval: 3
  check_val_every_n_epoch: null
  limit_val_batches: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: BucketUse
model:
  class_path: MemoryFormerLightning
  init_args:
    model:
      preset: memoryformer-tiny
      num_hidden_layers: 2
      hidden_size: 32
      num_attention_heads: 2
      projection_options: {{num_bits: 4}}
      feed_forward_options: {{num_bits: 4, extra_bits: 1}}
data:
  class_path: TextDataModule
  init_args:
    data: {data}
    tokenizer: bpe:300
    sequence_length: 32
    batch_size: 2
    val_fraction: 0.2
    test_fraction: 0.2
    cache: {cache}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short run with its plain form, and tables in both stored forms."""
    folder = tmp_path_factory.mktemp("run")
    source = Path(os.__file__).parent / "argparse.py"
    rows = [{"text": part} for part in source.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(data=folder / "data.jsonl", cache=folder / "cache"), encoding="utf-8")
    assert main(["fit", "--config", str(config), f"--run.root={folder}", "--run.experiment=e", "--run.name=n"]) == 0
    model = str(folder / "e" / "n" / "checkpoints" / "last.ckpt")
    assert main(["export", "--model", model, "--output", str(folder / "plain")]) == 0
    assert main(["export", "--form", "memory", "--model", model, "--output", str(folder / "int8")]) == 0
    half = ["export", "--form", "memory", "--dtype", "float16", "--model", model, "--output", str(folder / "half")]
    assert main(half) == 0
    return folder


def test_buckets_were_counted_beside_the_metrics(run):
    (line,) = next((run / "e" / "n").rglob("bucket_use.jsonl")).read_text().splitlines()
    found = json.loads(line)
    assert set(found["tables"]) == {
        f"layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("attention.qkv_proj.memory", "feed_forward.first", "feed_forward.second")
    }
    assert 0 < found["buckets/entropy_share_min"] <= found["buckets/entropy_share"] <= 1


def test_every_form_generates_and_the_stored_ones_are_smaller(run, capsys):
    for name in ("plain", "half", "int8"):
        capsys.readouterr()
        assert main(["generate", "--model", str(run / name), "--prompt", "def ", "--max-new-tokens", "8"]) == 0
        assert "def " in capsys.readouterr().out
    sizes = [sum(f.stat().st_size for f in (run / n).glob("*.safetensors")) for n in ("plain", "half", "int8")]
    assert sizes[0] > sizes[1] > sizes[2]


def test_tables_stay_on_the_host_where_asked(run, tmp_path, capsys):
    command = ["generate", "--model", str(run / "int8"), "--prompt", "def ", "--max-new-tokens", "8"]
    said = []
    for storage in ([], ["--storage", "memory"], ["--storage", "mmap"]):
        capsys.readouterr()
        assert main([*command, *storage]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    assert main([*command, "--storage", "direct"]) == 2
    assert "storage 'direct' is for MoLE's tables" in capsys.readouterr().err
    scoring = ["evaluate", "--model", str(run / "plain"), "--tasks", "wikipedia_bits_per_byte", "--storage", "mmap"]
    assert main([*scoring, "--data-dir", str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    assert "is not the folder of a lookup form or of stored tables" in capsys.readouterr().err


def test_the_stored_forms_are_scored_by_evaluate(run, tmp_path):
    pytest.importorskip("lm_eval")
    from tenfold.inference import build_wikipedia_tasks
    from tenfold.inference.evals.loading import load_model

    names = [f"{first}{second}" for first in ("Alba", "Bren", "Cald") for second in ("mere", "ford", "wick", "ton")]
    body = "is a small town beside a slow river, known for its bridge, its market and old mills."
    build_wikipedia_tasks([{"title": name, "text": f"{name} {body}"} for name in names], tmp_path / "data")
    scores, ids = {}, torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))
    for name in ("plain", "half", "int8"):
        output = tmp_path / name
        task = ["--tasks", "wikipedia_bits_per_byte", "--data-dir", str(tmp_path / "data"), "--limit", "2"]
        place = ["--storage", "mmap"] if name == "int8" else []
        assert main(["evaluate", "--model", str(run / name), *task, *place, "--output", str(output)]) == 0
        page = (output / "report.html").read_text(encoding="utf-8")
        assert "Bucket use" in page
        assert page.count("<svg") == 2
        assert "layers.1.feed_forward.second" in page
        buckets = json.loads((output / "bucket_use.json").read_text())
        assert len(buckets["layers"]) == 6
        results = json.loads(next(output.rglob("results*.json")).read_text(encoding="utf-8"))
        scores[name] = results["results"]["wikipedia_bits_per_byte"]["bits_per_byte,none"]
        with torch.no_grad():
            logits = load_model(run / name)(ids).logits
        if name == "plain":
            exact = logits
            continue
        # where rounding turns the sign of a value near zero, the next layer takes another row
        assert 0 < (logits - exact).norm() / exact.norm() < (0.1 if name == "half" else 0.3)
        assert scores[name] == pytest.approx(scores["plain"], rel=0.02)


def test_tables_of_another_configuration_end_with_status_2(run, tmp_path, capsys):
    import shutil

    folder = tmp_path / "changed"
    shutil.copytree(run / "int8", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"table_format": "float16"}))
    assert main(["generate", "--model", str(folder), "--prompt", "a"]) == 2
    assert "weights are mismatched for its configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bfloat16"], "--dtype bfloat16 is no form of stored tables"),
        (["--quantisation", "nf4"], "--quantisation is for --form lookup"),
    ],
)
def test_refusals_of_the_export(run, tmp_path, capsys, options, message):
    command = ["export", "--form", "memory", "--model", str(run / "plain"), "--output", str(tmp_path / "x"), *options]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("has_fast_bfloat16", [True, False])
def test_the_benchmark_has_the_rows_that_readers_look_for(has_fast_bfloat16, monkeypatch):
    monkeypatch.setattr(memoryformer, "fast_bfloat16", lambda: has_fast_bfloat16)
    monkeypatch.setattr(memoryformer, "WORKING_SET_BYTES", 10**6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "memoryformer" in BENCHES
    assert memoryformer.WIDTHS == (512, 768, 1024)
    assert memoryformer.TOKENS == (1, 8, 18, 64, 512, 2048)
    settings = Settings("cpu", quick=True)
    rows = [row for part in ("layer", "block") for row in memoryformer._part_rows(part, 32, (1, 5), settings)]
    for part, dense in (("layer", "linear"), ("block", "dense")):
        for tokens in (1, 5):
            own = [r for r in rows if r.case == f"d=32 tokens={tokens}" and r.metric == f"{part}_ms"]
            assert {row.peer for row in own} == {dense, f"{dense}_bfloat16", "torch_composition"}
            assert all(row.value > 0 and row.bound_value > 0 for row in own)
            without = [] if has_fast_bfloat16 else [f"{dense}_bfloat16"]
            assert [row.peer for row in own if row.peer_value is None and "no instructions" in row.reason] == without
            assert sum(row.peer_value is None for row in own) == len(without)
            for tables in ("float16", "int8"):
                assert any(row.case == f"d=32 tokens={tokens} tables={tables}" for row in rows)


def test_counted_rows_are_the_closed_forms():
    rows = {(row.case, row.metric): row for row in memoryformer._count_rows(1024, (1, 2048))}
    one = rows["d=1024 tokens=2048", "block_multiply_adds"]
    assert (one.value, one.peer_value) == (1_420_296_192, 25_769_803_776)
    one = rows["d=1024 tokens=1", "block_bytes_16_bit"]
    assert (one.value, one.peer_value) == (1_376_256, 25_165_824)
    # distinct bytes saturate at the tables' size
    assert rows["d=1024 tokens=2048", "block_bytes_16_bit"].value == 553_648_128
    assert rows["d=1024", "block_weight_bytes_16_bit"].ratio == pytest.approx(1 / 22)


def test_optimiser_rows_count_what_lies_in_memory():
    case = memoryformer_optimizer.TableCase("ngram", 4 * 64, 8, 16, None, 4)
    rows = {}
    for row in memoryformer_optimizer._case_rows(case, Settings("cpu", quick=True)):
        assert row.peer == "adamw"
        rows[row.case.rsplit("rule=")[-1], row.metric] = row
    assert {rule for rule, _ in rows} == {"lazy_adam", "rowwise_adam", "rowwise_adagrad"}
    values = 256 * 8
    for (rule, metric), row in rows.items():
        if metric == "table_step_ms":
            assert row.ratio == row.peer_value / row.value
            continue
        # a gradient and two moments of float32, and the step
        assert row.peer_value == 4 * (3 * values + 1)
        # sparse: its rows and their numbers
        used = row.value - 4 * (
            {"lazy_adam": 2 * values, "rowwise_adam": values + 256, "rowwise_adagrad": 256}[rule] + 1
        )
        assert used % (8 * 4 + 8) == 0
        assert 0 < used // (8 * 4 + 8) <= 64


def test_a_rule_that_is_wrong_is_not_timed(monkeypatch):
    case = memoryformer_optimizer.hashed(16, 4, 4, 8)
    monkeypatch.setattr(row_optimizer, "used_rows", lambda grad: (torch.tensor([1]), torch.ones(1, 4)))
    with pytest.raises(WrongResult, match="adamw differs from ours"):
        next(memoryformer_optimizer._case_rows(case, Settings("cpu", quick=True)))


def test_the_study_keeps_its_runs_and_compares_at_equal_bytes(tmp_path, monkeypatch, require_asset):
    require_asset("wikipedia-summaries")
    monkeypatch.setattr(memoryformer_quality, "FOLDER", tmp_path)
    settings = Settings("cpu", quick=True)
    rows = list(memoryformer_quality.run(settings))
    metrics = {row.metric for row in rows if row.case.startswith("tau-8")}
    assert metrics == {"bits_per_byte", "buckets_entropy_share", "buckets_dead_rows_share"}
    (own,) = [row for row in rows if row.case.startswith("tau-8") and row.metric == "bits_per_byte"]
    assert own.peer == "dense"
    assert own.ratio == own.peer_value / own.value
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(files) == 2
    assert list(memoryformer_quality.run(settings)) == rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == files
    with pytest.raises(ValueError, match="unknown variant 'tau-5'"):
        quality.run_one("tau-5", 0, quality.QUICK, tmp_path)


def test_variants_of_the_study_are_models():
    study = quality.Study()
    found = {name: quality.num_parameters(quality.fields_of(name, study, 4096)) for name in quality.VARIANTS}
    # one row of two matrices of each layer is as close as a width can come
    assert abs(found["dense-equal-bytes"] - found["tau-8"]) < 2 * study.hidden_size * study.num_layers
    assert found["tau-10"] > found["tau-8"] > found["tau-4"]
    assert found["extra-3"] > found["tau-8"] > found["extra-1"] > found["extra-0"]
    assert found["rate-1x"] == found["weighting-paper"] == found["tau-8"]

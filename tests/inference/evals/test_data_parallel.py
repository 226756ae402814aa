import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tenfold.inference import evaluate_model
from tenfold.inference.evals import select_tasks
from tenfold.inference.evals.distributed import Processes
from tenfold.inference.evals.harness import _check_sizes

TASKS = ["wikipedia_bits_per_byte", "wikipedia_title_cloze", "continue_text"]
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from tenfold.inference import evaluate_model
model, data, tasks, output, limit = sys.argv[1:]
results = evaluate_model(
    model, tasks={tasks!r}, shipped_data_dir=data, include_path=tasks, output_dir=output, limit=int(limit)
)
print("RESULTS" if results is not None else "NOTHING", flush=True)
"""
TASK = """
task: continue_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{extract}}}}"
doc_to_target: "{{{{title}}}}"
generation_kwargs: {{max_gen_toks: 6, do_sample: false, until: ["\\n\\n"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def run(script: Path, num_processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return subprocess.run([*launcher, script, *map(str, arguments)], capture_output=True, text=True, timeout=240)


@pytest.fixture
def script(tmp_path: Path, wikipedia_data: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    path = wikipedia_data / "wikipedia_title_cloze" / "test.jsonl"
    (tmp_path / "tasks" / "continue_text.yaml").write_text(TASK.format(path=path))
    script = tmp_path / "score.py"
    script.write_text(SCRIPT.format(tasks=TASKS))
    return script


def test_two_processes_score_as_one(model_folder: Path, wikipedia_data: Path, script: Path, tmp_path: Path) -> None:
    # an odd number of documents: one process has one more, and the other pads
    alone: dict[str, Any] | None = evaluate_model(
        model_folder, tasks=TASKS, shipped_data_dir=wikipedia_data, include_path=tmp_path / "tasks", limit=9
    )
    assert alone is not None
    done = run(script, 2, model_folder, wikipedia_data, tmp_path / "tasks", tmp_path / "out", 9)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["NOTHING", "RESULTS"]
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["tenfold"]["world_size"] == 2
    assert stored["tenfold"]["data"] == alone["tenfold"]["data"]
    assert stored["n-samples"] == alone["n-samples"]
    for task in TASKS:
        for key, value in alone["results"][task].items():
            expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert stored["results"][task][key] == expected, (task, key)
        lines = (tmp_path / "out" / f"samples_{task}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["doc_id"] for row in rows] == [row["doc_id"] for row in alone["samples"][task]]
        for row, other in zip(rows, alone["samples"][task], strict=True):
            assert row["arguments"] == json.loads(json.dumps(other["arguments"]))
    texts = [json.loads(line)["resps"] for line in (tmp_path / "out" / "samples_continue_text.jsonl").open()]
    assert texts == [row["resps"] for row in alone["samples"]["continue_text"]]


def test_refuses_more_processes_than_documents(wikipedia_data: Path) -> None:
    with select_tasks(TASKS[:1], data_dirs=[wikipedia_data]) as selection:
        _check_sizes(selection, 2, Processes(world_size=2))
        _check_sizes(selection, 0.05, Processes(world_size=2))
        with pytest.raises(ValueError, match="has 1 documents to score for 2 processes"):
            _check_sizes(selection, 1, Processes(world_size=2))
        with pytest.raises(ValueError, match="has 30 documents to score for 31 processes"):
            _check_sizes(selection, None, Processes(rank=30, world_size=31))

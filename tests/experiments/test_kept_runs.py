"""Runs of a study: trained once whoever asks, kept whole, spread over processes, damaged files told."""

import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from tenfold.experiments.kept_runs import KeptRuns, mean_and_spread, settings_digest
from tenfold.experiments.memoryformer import quality as memoryformer_quality
from tenfold.experiments.mole import quality as mole_quality


@dataclass(frozen=True)
class Settings:
    steps: int = 3
    widths: tuple[int, ...] = (1, 2)


def _study(folder: Path, trained: list, lines: list[str] | None = None, settings: Settings | None = None) -> KeptRuns:
    def train(variant: str, seed: int) -> dict[str, float]:
        trained.append((variant, seed))
        return {"loss": len(variant) + seed}

    report = (lines if lines is not None else []).append
    return KeptRuns(folder, settings or Settings(), train, report, poll_seconds=0.01)


def test_runs_are_trained_once_seed_by_seed_and_told(tmp_path):
    trained, lines = [], []
    found = _study(tmp_path, trained, lines).all(["aa", "b"], [3, 1])
    assert trained == [("aa", 3), ("b", 3), ("aa", 1), ("b", 1)]
    assert {name: [run["loss"] for run in runs] for name, runs in found.items()} == {"aa": [5, 3], "b": [4, 2]}
    assert lines[2] == "run 3 of 4: aa, seed 1: trained in 0 s"
    again, lines = [], []
    assert _study(tmp_path, again, lines).all(["aa", "b"], [3, 1]) == json.loads(json.dumps(found))
    assert again == []
    assert lines[2] == "run 3 of 4: aa, seed 1: kept"
    # other settings are other runs
    _study(tmp_path, again, settings=Settings(4)).get("aa", 3)
    assert again == [("aa", 3)]


def test_the_file_is_named_after_the_settings(tmp_path):
    study = _study(tmp_path, [])
    study.get("b", 7)
    canonical = '{"steps": 3, "widths": [1, 2]}'
    path = tmp_path / hashlib.sha256(canonical.encode()).hexdigest()[:12] / "b-7.json"
    result = json.loads(path.read_text())
    assert (result["variant"], result["seed"], result["loss"]) == ("b", 7, 8)
    assert result["study"] == {"steps": 3, "widths": [1, 2]}
    assert {"torch", "threads"} <= set(result)


def test_digests_of_the_two_studies_stay(tmp_path):
    """Folders with runs of hours carry these names."""
    assert mole_quality.Study().digest == settings_digest(mole_quality.Study()) == "0715a49989fd"
    assert memoryformer_quality.Study().digest == "15d3fcff0c99"
    for quality in (mole_quality, memoryformer_quality):
        path = quality.runs(quality.Study(), tmp_path).path("dense", 2)
        assert path == tmp_path / quality.Study().digest / "dense-2.json"


@pytest.mark.parametrize("content", ['{"variant": "b", "se', "", '{"seed": 1}', "[]", '{"variant": "b", "seed": 2}'])
def test_a_damaged_file_or_one_of_another_run_is_told_before_anything_is_trained(tmp_path, content):
    trained = []
    study = _study(tmp_path, trained)
    path = study.path("b", 1)
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"b-1\.json: .*delete it to train this run again"):
        study.all(["a", "b"], [0, 1])
    assert trained == []
    assert path.read_text() == content


def test_a_run_that_fails_leaves_no_file_and_those_before_it_stay(tmp_path):
    def train(variant: str, seed: int) -> dict[str, float]:
        if variant == "bad":
            raise ValueError("diverged")
        return {}

    study = KeptRuns(tmp_path, Settings(), train, lambda line: None)
    with pytest.raises(ValueError, match="diverged"):
        study.all(["good", "bad"], [0])
    assert [path.name for path in study.path("good", 0).parent.glob("*.json")] == ["good-0.json"]
    # its lock is free: whoever comes next may train it
    assert _study(tmp_path, []).get("bad", 0)["loss"] == 3


def test_what_another_has_finished_meanwhile_is_taken(tmp_path):
    trained, lines, inside, may_end = [], [], threading.Event(), threading.Event()

    def slow(variant: str, seed: int) -> dict[str, float]:
        inside.set()
        assert may_end.wait(20)
        return {"loss": 41}

    other = threading.Thread(target=KeptRuns(tmp_path, Settings(), slow, lambda line: None).get, args=("a", 0))
    other.start()
    assert inside.wait(20)

    def report(line: str) -> None:
        lines.append(line)
        may_end.set()

    def train(variant: str, seed: int) -> dict[str, float]:
        trained.append(variant)
        return {"loss": 1}

    found = KeptRuns(tmp_path, Settings(), train, report, poll_seconds=0.01).all(["a", "b"], [0])
    other.join()
    # it does not wait for the first while there is a second to do
    assert trained == ["b"]
    assert found["a"][0]["loss"] == 41
    assert lines == ["run 1 of 2: b, seed 0: trained in 0 s", "run 2 of 2: a, seed 0: kept by another process"]


PROGRAM = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from tenfold.experiments.kept_runs import KeptRuns

@dataclass(frozen=True)
class Settings:
    steps: int = 3

folder, name = Path(sys.argv[1]), sys.argv[2]

def train(variant, seed):
    time.sleep(0.05)
    return {"by": name}

print("ready", flush=True)
sys.stdin.readline()
found = KeptRuns(folder, Settings(), train, lambda line: print(line), poll_seconds=0.01).all("abcdef", [0, 1])
print([[run["by"] for run in runs] for runs in found.values()])
"""


def test_two_processes_share_a_study(tmp_path):
    command, pipes = (
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
    )
    pair = [subprocess.Popen([*command, name], text=True, **pipes) for name in ("one", "two")]
    for process in pair:
        assert process.stdout.readline() == "ready\n"
    for process in pair:
        process.stdin.write("go\n")
        process.stdin.flush()
    lines = [process.communicate(timeout=60)[0].splitlines() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    # both saw the same results, and each run was trained by exactly one
    assert lines[0][-1] == lines[1][-1]
    assert sum("trained in" in line for part in lines for line in part) == 12
    assert "one" in lines[0][-1]
    assert "two" in lines[0][-1]


def test_mean_and_spread():
    assert mean_and_spread([3.0, 1.0, 2.5]) == (6.5 / 3, 2.0)

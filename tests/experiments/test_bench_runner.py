"""The arithmetic of benchmark rows, fair timing, refusal of wrong peers, and the JSON and lines that users read."""

import json
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from tenfold.experiments.bench import environment as environment_module
from tenfold.experiments.bench import registry, runner, timing, weighted_gather
from tenfold.experiments.bench.registry import Settings
from tenfold.experiments.bench.rows import Row, compare, missing_peer, ratio
from tenfold.experiments.bench.timing import Timing, WrongResult, measure, relative_error, require_same, summarise
from tenfold.experiments.commands import bench as command

# design.md, section 3, "Bench JSON"
ROW_KEYS = {
    "case", "metric", "value", "unit", "peer", "peer_value", "ratio", "bound", "bound_value", "repeats", "spread",
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "peer_value", "higher_is_better", "expected"),
    [(2.0, 6.0, False, 3.0), (6.0, 2.0, False, 1 / 3), (6.0, 2.0, True, 3.0), (2.0, 6.0, True, 1 / 3)],
)
def test_ratio_above_one_means_ours_is_better(value, peer_value, higher_is_better, expected):
    assert ratio(value, peer_value, higher_is_better=higher_is_better) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "higher"), [((0.0, 1.0), False), ((1.0, 0.0), True)])
def test_ratio_to_zero_is_not_a_number(values, higher):
    assert ratio(*values, higher_is_better=higher) is None


def test_compare_keeps_both_numbers_and_the_bound():
    row = compare(
        "T=1", "forward_ms", Timing(2.0, 0.5, 9), peer="them", theirs=Timing(3.0, 0.1, 9), bound="copy", bound_value=1.0
    )
    assert row == Row("T=1", "forward_ms", 2.0, "ms", "them", 3.0, 1.5, "copy", 1.0, 9, 0.5, None)


def test_missing_peer_has_a_reason_and_no_number():
    row = missing_peer(
        compare("c", "m", Timing(2.0, 0.5, 9), peer="x", theirs=Timing(1.0, 0.0, 9)), "y", "not installed"
    )
    assert (row.peer, row.peer_value, row.ratio, row.reason, row.value) == ("y", None, None, "not installed", 2.0)


def test_summary_is_median_and_interquartile_range():
    samples = [5.0, 1.0, 9.0, 3.0, 7.0, 100.0]
    lower, _, upper = torch.quantile(torch.tensor(samples), torch.tensor([0.25, 0.5, 0.75])).tolist()
    assert summarise(samples) == (statistics.median(samples), pytest.approx(upper - lower), 6)
    assert summarise([4.0]) == Timing(4.0, 0.0, 1)


def test_measure_interleaves_in_changing_order_and_sums_up_each_callable(monkeypatch):
    clock, calls = [0.0], []

    def work(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    result = measure({"a": work("a", 0.002), "b": work("b", 0.008)}, repeats=12, warmup=1, min_sample_ms=1.0)
    assert result["a"] == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-9), 12)
    assert result["b"] == (pytest.approx(8.0), pytest.approx(0.0, abs=1e-9), 12)
    rounds = [tuple(calls[at : at + 2]) for at in range(len(calls) - 24, len(calls), 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}


def test_short_calls_are_repeated_within_a_sample(monkeypatch):
    clock, count = [0.0], [0]

    def call():
        count[0] += 1
        clock[0] += 0.0001

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    result = measure({"a": call}, repeats=2, warmup=0, min_sample_ms=1.0)
    assert result["a"].median_ms == pytest.approx(0.1)
    assert count[0] == 3 + 2 * 10


def test_relative_error_is_rms_and_infinite_for_nonsense():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.3, 0.4]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([float("nan"), 0.0]), expected) == float("inf")
    assert relative_error(torch.zeros(3), expected) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


@pytest.mark.parametrize(
    "theirs",
    [(torch.ones(3), torch.ones(2) * 1.1), (torch.ones(3),), (torch.ones(3), torch.tensor([1.0, float("nan")]))],
)
def test_wrong_peer_is_refused(theirs):
    with pytest.raises(WrongResult, match=r"T=4: .*peer.*nothing is reported"):
        require_same("T=4", "peer", theirs, (torch.ones(3), torch.ones(2)), 1e-3)


def small_cases(monkeypatch):
    monkeypatch.setattr(weighted_gather, "TRAINING", [weighted_gather.Shape(6, 3, 8, 10, 3)])
    monkeypatch.setattr(weighted_gather, "DECODING", [weighted_gather.Shape(20, None, 8, 2, 5)])
    # the compiler takes long and is not what is tested
    monkeypatch.setattr(weighted_gather.torch, "compile", lambda function, **_: function)


QUICK = Settings(quick=True)


def test_weighted_gather_rows_carry_the_agreed_names(monkeypatch):
    small_cases(monkeypatch)
    results, refusals = runner.run_benches(["weighted-gather"], QUICK)
    assert refusals == []
    [result] = results
    assert set(result) == {"bench", "environment", "rows"}
    assert result["bench"] == "weighted-gather"
    names = [(row["case"], row["metric"], row["peer"]) for row in result["rows"]]
    assert names == [
        (case, metric, peer)
        for case in ("U=6 N=3 H=8 T=10 float32", "R=20 H=8 T=2 M=5 float32")
        for metric in ("forward_ms", "backward_ms")
        for peer in ("embedding_bag", "gather_sum", "compiled")
    ]
    for row in result["rows"]:
        assert set(row) >= ROW_KEYS
        assert row["ratio"] == pytest.approx(row["peer_value"] / row["value"])
        assert row["bound_value"] > 0


def test_weighted_gather_peers_agree_with_float64(monkeypatch):
    small_cases(monkeypatch)
    for shape in weighted_gather.TRAINING + weighted_gather.DECODING:
        inputs = weighted_gather.make_inputs(shape, torch.float64, QUICK)
        matrix = torch.zeros(shape.tokens, inputs.table.shape[0], dtype=torch.float64)
        matrix.scatter_add_(1, inputs.indices, inputs.weights)
        for op in weighted_gather.make_ops(inputs, shape).values():
            torch.testing.assert_close(op(inputs.table, inputs.weights), matrix @ inputs.table)


def test_least_bytes_counts_used_rows_once():
    shape = weighted_gather.Shape(50, 2, 8, 6, 2)
    inputs = weighted_gather.make_inputs(shape, torch.float32, QUICK)
    inputs = inputs._replace(indices=torch.tensor([[0, 1], [0, 1], [4, 5]] * 2))
    # 4 rows, 6 outputs of 8 values, 12 weights, 6 ids; backward writes the whole table's gradient
    forward = 4 * 8 * 4 + 6 * 8 * 4 + 12 * 4 + 6 * 8
    assert weighted_gather.least_bytes(inputs, "forward_ms") == forward
    assert weighted_gather.least_bytes(inputs, "backward_ms") == forward + 100 * 8 * 4


def test_peer_that_cannot_run_gives_rows_with_the_reason(monkeypatch):
    small_cases(monkeypatch)

    def no_compiler(function, **_):
        def call(*_):
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(weighted_gather.torch, "compile", no_compiler)
    found = [row for row in weighted_gather.run(QUICK) if row.peer == "compiled"]
    assert len(found) == 4
    for row in found:
        assert (row.peer_value, row.ratio) == (None, None)
        assert row.reason == "does not run here: no C++ compiler"


def test_wrong_peer_stops_its_benchmark_and_nothing_is_written(monkeypatch, tmp_path, capsys):
    small_cases(monkeypatch)
    monkeypatch.setattr(
        weighted_gather, "gather_sum", lambda table, weights, indices: table[indices].sum(-2) * weights.sum()
    )
    status = command.main(["weighted-gather", "--quick", "--device", "cpu", "--json", str(tmp_path / "r.json")])
    assert status == 1
    assert "nothing is reported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_refusal_keeps_the_other_results(monkeypatch, tmp_path, capsys):
    def good(settings):
        yield Row("c", "m", 1.0, "ms")

    def bad(settings):
        yield Row("c", "m", 1.0, "ms")
        raise WrongResult("differs; nothing is reported")

    monkeypatch.setattr(runner, "load", {"good": good, "bad": bad}.__getitem__)
    path = tmp_path / "r.json"
    assert runner.run_and_report(["bad", "good"], QUICK, path) == 1
    assert json.loads(path.read_text())["bench"] == "good"
    assert "tenfold bench: bad: differs" in capsys.readouterr().err


def test_json_is_an_object_for_one_and_a_list_for_several(tmp_path):
    one, two = {"bench": "a", "rows": []}, {"bench": "b", "rows": []}
    runner.write_json(tmp_path / "one.json", [one])
    runner.write_json(tmp_path / "two.json", [one, two])
    assert json.loads((tmp_path / "one.json").read_text()) == one
    assert json.loads((tmp_path / "two.json").read_text()) == [one, two]


def test_json_that_cannot_be_written_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("old")
    monkeypatch.setattr(runner.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        runner.write_json(path, [{"bench": "a"}])
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_plain_lines_show_ours_theirs_and_the_reason():
    row = Row("T=1", "forward_ms", 2.0, "ms", "them", 3.0, 1.5, "copy", 1.0, 9, 0.5)
    assert runner.plain_line("x", row) == "x | T=1 | forward_ms 2 ± 0.5 ms | them 3 | ratio 1.5 | bound 1 (copy)"
    assert "them not installed | ratio -" in runner.plain_line("x", missing_peer(row, "them", "not installed"))


def test_table_on_a_terminal_holds_every_row(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    facts = environment_module.environment("cpu")
    row = vars(Row("T=1", "forward_ms", 2.0, "ms", "them", 3.0, 1.5))
    runner._show_tables([{"bench": "x", "environment": facts, "rows": [row]}])
    shown = capsys.readouterr().out
    assert re.search(r"T=1\s+│ forward_ms\s+│\s+2 ms │ them\s+│\s+3 │\s+1.5 │", shown)


def test_environment_names_machine_versions_commit_and_date(repository):
    facts = environment_module.environment("cpu")
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["gpu"] is None
    assert {"cpu", "cores", "python", "transformers", "lightning", "date", "load_1min"} <= set(facts)
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert facts["commit"].rstrip("+") == head.stdout.strip()
    json.dumps(facts)


def test_commit_of_a_foreign_checkout_is_not_claimed(tmp_path, monkeypatch):
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True)
    monkeypatch.setattr(environment_module, "__file__", str(tmp_path / "environment.py"))
    assert environment_module._commit() is None


def test_names_resolve_once_and_in_order():
    assert registry.resolve(["weighted-gather", "all"]) == list(dict.fromkeys(["weighted-gather", *registry.BENCHES]))


def test_every_registered_benchmark_can_be_loaded():
    for name in registry.BENCHES:
        assert callable(registry.load(name))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["weighted-gahter"], ValueError, "unknown benchmark 'weighted-gahter'; did you mean weighted-gather"),
        (["zzz"], ValueError, "unknown benchmark 'zzz'; choose from all, .*weighted-gather"),
        ([], ValueError, "no benchmark named"),
        (
            ["all", "--quick", "--json", "/nowhere/at/all.json"],
            FileNotFoundError,
            "the folder /nowhere/at does not exist",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, error, message):
    with pytest.raises(error, match=message):
        command.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--device cuda: torch finds no CUDA device"):
        command.main(["all", "--device", "cuda"])


def test_list_shows_every_benchmark(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(registry.BENCHES)


def test_command_writes_the_file_it_announces(monkeypatch, tmp_path, capsys):
    small_cases(monkeypatch)
    path: Path = tmp_path / "r.json"
    assert command.main(["weighted-gather", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"results in {path}" in printed
    assert len(json.loads(path.read_text())["rows"]) == printed.count("weighted-gather |") == 12

"""The SpeCache benchmark: the rows that anyone may look for, bytes by formula, and reasons where a peer is missing."""

from tenfold.experiments.bench.registry import Settings
from tenfold.experiments.bench.specache import CPU_QUICK, PEERS, run
from tenfold.experiments.bench.specache_parts import PARTS


def test_rows_carry_the_published_names_and_bytes_are_the_formula(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = list(run(Settings(quick=True)))
    case = f"context={CPU_QUICK.contexts[0]} batch={CPU_QUICK.batch}"
    published, rows = rows[:8], rows[8:]
    assert {row.case for row in rows} == {case}
    for row in published:
        assert row.case.endswith("meta")
        assert row.value == row.bound_value < row.peer_value
    llama = next(row for row in published if row.case == "llama-3-8b context=8192 bits=1 meta")
    # 128 KiB per token in full; the paper's table has 0.11 for this corner
    assert llama.peer_value == 8192 * 128 * 1024
    assert 0.105 < 1 / llama.ratio < 0.115
    for metric in ("device_bytes", "tokens_per_s"):
        found = {row.peer: row for row in rows if row.metric == metric}
        assert set(found) == set(PEERS)
        for row in found.values():
            # a number, or a reason why there is none
            assert (row.peer_value is None) == (row.reason is not None)
            assert row.value > 0
    sizes = {row.peer: row for row in rows if row.metric == "device_bytes"}
    assert all(row.value == row.bound_value for row in sizes.values())
    full = CPU_QUICK.batch * (CPU_QUICK.contexts[0] + 512) * CPU_QUICK.layers * CPU_QUICK.key_value_heads * 32 * 2 * 4
    assert sizes["full"].peer_value == full
    assert sizes["full"].ratio == full / sizes["full"].value > 4
    host = next(row for row in rows if row.metric == "host_bytes")
    assert host.value == host.bound_value == full
    # window and h2o get as many tokens as fit into these bytes
    for peer in ("window", "h2o"):
        assert 0.99 * sizes[peer].value < sizes[peer].peer_value <= sizes[peer].value
    parts = {row.metric: row for row in rows if row.metric.startswith("step_ms_")}
    assert set(parts) == {f"step_ms_{name}" for name in (*PARTS, "model", "all")}
    assert all(row.value >= 0 for row in parts.values())
    assert parts["step_ms_scores"].value + parts["step_ms_model"].value < parts["step_ms_all"].value
    for metric in ("bytes_to_device_per_step", "bytes_to_host_per_step"):
        moved = next(row for row in rows if row.metric == metric)
        assert moved.value == moved.bound_value > 0
    assert next(row for row in rows if row.metric == "row_copies_per_step").value == CPU_QUICK.layers
    wait = next(row for row in rows if row.metric == "exposed_wait_pct")
    assert wait.peer == "exact-fetch"
    assert 0 <= wait.value <= 100

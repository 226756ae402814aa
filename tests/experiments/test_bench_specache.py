"""The SpeCache benchmark: the rows that anyone may look for, bytes by formula, and reasons where a peer is missing."""

from tenfold.experiments.bench.registry import Settings
from tenfold.experiments.bench.specache import CPU_QUICK, PEERS, run


def test_rows_carry_the_published_names_and_bytes_are_the_formula() -> None:
    rows = list(run(Settings(quick=True)))
    case = f"context={CPU_QUICK.contexts[0]} batch={CPU_QUICK.batch}"
    assert {row.case for row in rows} == {case}
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
    wait = next(row for row in rows if row.metric == "exposed_wait_pct")
    assert wait.peer == "exact-fetch"
    assert 0 <= wait.value <= 100

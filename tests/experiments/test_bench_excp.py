"""The ExCP benchmark: the paper's pipeline against its formulas, what rows promise, runs that can be continued."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tenfold.callbacks.excp import ExCPOptions
from tenfold.experiments.bench import excp, excp_chain, excp_lossless, excp_paper, excp_resume
from tenfold.experiments.bench.excp_chain import SaveNumbers, amortised_ratio
from tenfold.experiments.bench.registry import Settings
from tenfold.experiments.bench.rows import Row
from tenfold.experiments.excp import resume_quality
from tenfold.experiments.excp.training import RunSettings, Text, Training, make_saves

TINY = RunSettings(
    model="dense-tiny",
    overrides=(("num_hidden_layers", 1), ("hidden_size", 64), ("num_attention_heads", 2)),
    tokenizer="bpe:512",
    sequence_length=32,
    batch_size=4,
    warmup_steps=2,
    first_save=2,
    steps_per_save=2,
    num_saves=3,
)


@pytest.fixture
def work(require_asset: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in; the text that runs train on is there."""
    require_asset("wikipedia-summaries")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(seed: int, shape: tuple[int, ...] = (9, 7)) -> dict[str, Any]:
    """A save with one weight and its Adam state."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(shape, generator=generator) * 1e-3, torch.rand(shape, generator=generator) * 1e-6
    state = {"step": torch.tensor(10.0), "exp_avg": first, "exp_avg_sq": second}
    group = {"params": [0], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    weight = torch.randn(shape, generator=generator)
    return {"state_dict": {"w": weight}, "optimizer_states": [{"state": {0: state}, "param_groups": [group]}]}


@pytest.mark.parametrize("alpha", [5e-5, 1e-3, 1e9])
@pytest.mark.parametrize("shape", [(9, 7), (64, 33), (201,)])
def test_the_papers_pipeline_is_its_formulas(alpha: float, shape: tuple[int, ...]) -> None:
    before, now = checkpoint(0, shape), checkpoint(1, shape)
    reference = {"w": before["state_dict"]["w"].reshape(-1).numpy()}
    save = excp_paper.encode(now, reference, alpha=alpha)
    weight, first, second = excp_paper.decode(save, now, reference)["w"]

    state = now["optimizer_states"][0]["state"][0]
    residual = (now["state_dict"]["w"] - before["state_dict"]["w"]).reshape(-1)
    ratio = min(2.5, alpha / float(state["exp_avg_sq"].double().mean().sqrt()))
    kept = residual.abs() > ratio * residual.abs().quantile(0.5)
    moment = state["exp_avg"].reshape(-1)
    both = kept & (moment.abs() > 2 * moment.abs().mean())
    # index 0 alone decodes to zero: the masks are those of the formulas
    np.testing.assert_array_equal(weight != reference["w"], kept.numpy())
    np.testing.assert_array_equal(first != 0, both.numpy())
    np.testing.assert_array_equal(second != 0, both.numpy())
    np.testing.assert_array_equal(weight, save.weights["w"])
    assert save.squared_error == pytest.approx(
        float(np.square(weight - now["state_dict"]["w"].reshape(-1).numpy()).sum())
    )
    error = float(np.square(first - moment.numpy(), dtype=np.float64).sum())
    assert save.momentum_squared_error == pytest.approx(error)
    assert len(np.unique(weight - reference["w"])) >= 2
    assert all(len(codebook) <= 16 for codebook in save.codebooks["w"])


def test_kmeans_is_a_fixed_point_of_lloyds_algorithm() -> None:
    values = np.random.default_rng(0).standard_t(4, 5000).astype(np.float32)
    centres = excp_paper.kmeans(values)
    assert len(centres) == 15
    nearest = np.abs(values[:, None] - centres).argmin(axis=1)
    error = np.square(values - centres[nearest]).sum()
    means = np.array([values[nearest == i].mean() for i in range(15)])
    # one more round gains next to nothing
    assert error <= 1.02 * np.square(values - means[nearest]).sum()
    uniform = np.linspace(values.min(), values.max(), 15)
    assert error < 0.5 * np.square(values - uniform[np.abs(values[:, None] - uniform).argmin(axis=1)]).sum()


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8])
def test_nibbles_come_back_and_the_first_is_the_high_one(length: int) -> None:
    indices = np.random.default_rng(length).integers(0, 16, length).astype(np.uint8)
    packed = excp_paper.pack(indices)
    np.testing.assert_array_equal(excp_paper.unpack(packed, length), indices)
    if length > 1:
        assert packed[0] == 16 * indices[0] + indices[1]


def test_a_sample_of_the_archive_counts_as_often_as_it_leaves_out() -> None:
    shape = (256, 321)
    before, now = checkpoint(0, shape), checkpoint(1, shape)
    reference = {"w": before["state_dict"]["w"].reshape(-1).numpy()}
    whole, sample = (excp_paper.encode(now, reference, alpha=1e9, archive_every=every) for every in (1, 4))
    blocks = np.arange(256 * 321)[: 20 * 4096].reshape(20, 4096)[::4].reshape(-1)
    np.testing.assert_array_equal(excp_paper.sampled(np.arange(256 * 321), 4), blocks)
    assert sample.archive_share == len(blocks) / (256 * 321)
    assert len(sample.archive) < 0.3 * len(whole.archive)
    # an adaptive coder learns from what it sees: less so the longer it sees it
    assert sample.num_bytes == pytest.approx(whole.num_bytes, rel=0.2)
    all_values, some = (excp_paper.decode(save, now, reference)["w"] for save in (whole, sample))
    for one, part in zip(all_values, some, strict=True):
        np.testing.assert_array_equal(part, one[blocks])


def test_shuffled_bytes_come_back_and_peers_give_back_what_they_got() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 1001).astype(np.uint32)
    shuffled = excp_lossless.shuffle(words)
    assert shuffled[:3] == bytes(int(word) & 0xFF for word in words[:3])
    np.testing.assert_array_equal(excp_lossless.unshuffle(shuffled), words)
    results, missing = excp_lossless.code_all(checkpoint(0), checkpoint(1))
    assert {"lzma"} <= results.keys()
    assert results.keys() | missing.keys() == {"lzma", "zstd", "shuffle_zstd", "xor_shuffle_zstd", "zipnn"}
    assert all(coded.raw_bytes == 4 * 3 * 63 for coded in results.values())


def numbers(raw: int, coded: int) -> SaveNumbers:
    return SaveNumbers(
        raw_bytes=raw, coded_bytes=coded, bound_bytes=coded, error_over_step=0.1, relative_error=0.1,
        momentum_error=0.1, encode_s=1.0,
    )  # fmt: skip


def test_the_key_frame_is_amortised_over_sixty_saves() -> None:
    # section b.4 of the notes has k residual saves behind a raw base: (k + 1) / (1 + k / ratio)
    saves = [numbers(7000, 7000), numbers(7000, 100), numbers(7000, 100)]
    assert amortised_ratio(saves) == pytest.approx(60 / (1 + 59 / 70))
    assert excp.residual_ratio(saves) == 70


def test_what_was_measured_is_kept_until_code_or_settings_change(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("one")
    calls = []

    def work(progress: excp_chain.Progress) -> list[SaveNumbers]:
        calls.append(1)
        return [numbers(100, len(calls))]

    def measured(settings: Any) -> list[SaveNumbers]:
        return excp_chain.measured(tmp_path / "chain", [source], settings, work)

    first = measured({"a": 1})
    assert measured({"a": 1}) == first
    assert len(calls) == 1
    assert measured({"a": 2})[0].coded_bytes == 2
    source.write_text("two")
    assert measured({"a": 2})[0].coded_bytes == 3


@pytest.mark.parametrize("coder", ["ours", "paper"])
def test_a_broken_off_chain_goes_on_with_the_same_numbers(
    coder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.pt")
        torch.save(checkpoint(number, (96, 64)), paths[-1])

    def run(name: str, digest: str = "a") -> list[dict[str, Any]]:
        progress = excp_chain.Progress(tmp_path / name, digest, report=lambda line: None)
        if coder == "paper":
            saves = excp_chain.code_paper(paths, alpha=1e9, progress=progress)
        else:
            options = ExCPOptions(min_numel=16)
            saves = excp_chain.code_ours(paths, lambda position: options, progress=progress)
        times = {"encode_s", "decode_s", "peak_bytes"}
        return [{key: value for key, value in asdict(save).items() if key not in times} for save in saves]

    whole = run("whole")
    keep = excp_chain.Progress.keep

    def broken(self: excp_chain.Progress, saves: list[SaveNumbers], state: Any, total: int) -> None:
        keep(self, saves, state, total)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(excp_chain.Progress, "keep", broken)
        with pytest.raises(KeyboardInterrupt):
            run("broken-off")
    loaded: list[Path] = []
    monkeypatch.setattr(excp_chain, "load", lambda path: (loaded.append(path), torch.load(path, weights_only=True))[1])
    assert run("broken-off") == whole
    # the save before, to measure the step, and those that were missing
    assert loaded == paths[1:]
    assert not list(tmp_path.glob("broken-off*.state"))


def test_a_thinned_checkpoint_has_every_other_parameter_with_its_own_state() -> None:
    saves = [checkpoint(i, shape) for i, shape in enumerate([(8, 8), (8,), (8, 8), (8,), (8, 8)])]
    matrices, vectors = [0, 2, 4], [1, 3]
    order = matrices + vectors
    whole = {
        "state_dict": {f"w{i}": save["state_dict"]["w"] for i, save in enumerate(saves)},
        "optimizer_states": [
            {
                "state": {n: saves[i]["optimizer_states"][0]["state"][0] for n, i in enumerate(order)},
                "param_groups": [{"params": [0, 1, 2], "betas": (0.9, 0.95)}, {"params": [3, 4], "betas": (0.9, 0.95)}],
            }
        ],
        "global_step": 3,
    }
    thinned = excp_chain.thin(whole, 2)
    assert list(thinned["state_dict"]) == ["w0", "w2", "w4"]
    for parameter in excp_paper.parameters_of(thinned):
        number = int(parameter.name[1:])
        state = saves[number]["optimizer_states"][0]["state"][0]
        assert excp_paper.at(thinned, parameter.exp_avg) is state["exp_avg"]
        assert excp_paper.at(thinned, parameter.weight) is saves[number]["state_dict"]["w"]
    assert excp_chain.thin(whole, 1) is whole


def test_a_run_goes_on_from_its_last_save_with_the_same_bits(work: Path) -> None:
    lines: list[str] = []
    whole = make_saves(TINY, work / "whole", lines.append)
    assert len(lines) == 3
    broken_off = make_saves(TINY, work / "broken-off", lines.append)
    for path in broken_off[1:]:
        path.unlink()
    assert make_saves(TINY, work / "broken-off", lines.append) == broken_off
    for first, second in zip(whole, broken_off, strict=True):
        one, other = excp_chain.load(first), excp_chain.load(second)
        assert one["global_step"] == other["global_step"]
        for name, weight in one["state_dict"].items():
            assert torch.equal(weight, other["state_dict"][name])
        for key, state in one["optimizer_states"][0]["state"].items():
            assert all(torch.equal(state[name], other["optimizer_states"][0]["state"][key][name]) for name in state)


def test_an_exact_resume_is_the_run_itself_and_the_update_is_what_the_optimiser_did(work: Path) -> None:
    training = Training(TINY, Text(TINY))
    training.train(4)
    state = copy.deepcopy(training.state())
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    losses = training.train(5)
    rate = training.learning_rate(4)
    moved = [
        (p.detach() - before[name] * (1 - rate * TINY.weight_decay * (p.dim() > 1))).abs().max() / rate
        for name, p in training.model.named_parameters()
    ]
    assert training.largest_update() == pytest.approx(float(max(moved)), rel=1e-3)
    losses += training.train(6)
    watched, update = resume_quality.resume_and_watch(training, state, 2)
    assert watched == losses
    assert update == pytest.approx(float(max(moved)), rel=1e-3)


@pytest.fixture
def rows(work: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Rows of a benchmark on a run of a few steps."""
    monkeypatch.setattr(excp, "QUICK", {"scratch": TINY})
    return list(excp.run(Settings(quick=True)))


def test_ratios_come_with_their_errors_and_equal_error_means_no_larger(rows: list[Row]) -> None:
    def find(case: str, metric: str, peer: str | None = "paper_lzma") -> Row:
        return next(row for row in rows if (row.case, row.metric, row.peer) == (case, metric, peer))

    for regime in ("", " clamp"):
        for suffix in (" equal-error", " paper-settings"):
            case = f"scratch{regime}{suffix}"
            assert find(case, "ratio_per_save").value > 1
            assert find(case, "ratio_amortised").value < find(case, "ratio_per_save").value
            for metric in ("error_over_step", "relative_error", "momentum_error"):
                row = find(case, metric)
                assert row.peer_value is not None
                if suffix == " equal-error":
                    assert row.value <= row.peer_value
                else:
                    # the same thresholds; levels are ours
                    assert row.value == pytest.approx(row.peer_value, rel=0.03)
    assert find("scratch", "error_over_step").value <= 0.5
    for metric in ("ratio_per_save", "ratio_amortised", "encode_mb_s", "decode_mb_s"):
        for peer in ("lzma", "torch_save"):
            assert find("scratch", metric, peer).peer_value is not None
        zipnn = find("scratch", metric, "zipnn")
        assert (zipnn.peer_value is None) == (zipnn.reason is not None)
    assert find("scratch", "ratio_per_save", "torch_save").peer_value == pytest.approx(1, rel=0.05)
    assert find("scratch", "blocked_ms", "torch_save").ratio is not None


def test_a_study_has_a_row_for_each_mode_and_takes_up_where_it_stopped(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = resume_quality.Study(
        run=TINY, resumes=(1, 2), watched_steps=2, tail_steps=2, held_out=1, seeds=(0,), modes=("rank1",)
    )
    monkeypatch.setattr(excp_resume, "QUICK", study)
    monkeypatch.setattr(resume_quality, "ERROR_TARGETS", (0.2, 1.0))
    rows = list(excp_resume.run(Settings(quick=True)))
    assert {row.case for row in rows} == {"rank1 beta2=0.95", "rank1 beta2=0.999"}
    updates = [row for row in rows if row.metric == "first_update_largest"]
    assert len(updates) == 2
    assert all(row.repeats == 2 and row.peer == "exact_resume" for row in updates)
    assert (excp_resume.FOLDER / "rate_distortion.png").stat().st_size > 0
    monkeypatch.setattr(resume_quality, "one_run", lambda *arguments: pytest.fail("done before"))
    assert list(excp_resume.run(Settings(quick=True))) == rows


def test_bits_buy_a_smaller_error(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_quality, "ERROR_TARGETS", (0.1, 0.4, 1.0))
    study = resume_quality.Study(run=TINY, resumes=(1,), watched_steps=2, seeds=(0,))
    text = Text(TINY)
    first = resume_quality.start(study, 0.999, 0, text)
    points = resume_quality.rate_distortion(study, 0.999, text, first)
    for second_moment in ("rank1", "log_kmeans", "masked"):
        some = [point for point in points if point["second_moment"] == second_moment]
        bits = [point["bits_per_parameter"] for point in some]
        errors = [point["error_over_step"] for point in some]
        assert bits == sorted(bits, reverse=True)
        assert errors == sorted(errors)
        assert all(point["error_over_step"] <= point["error_target"] for point in some)

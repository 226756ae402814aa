"""Row-wise optimisers: AdamW where all rows are used, row by row in plain Python where not; saved, loaded, clipped."""

import copy
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tenfold.lightning_modules import MemoryFormerLightning
from tenfold.lightning_modules.memoryformer import row_optimizer, sizes
from tenfold.lightning_modules.memoryformer.row_optimizer import RowWiseOptimizer, clip_gradients, used_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

LR, BETAS, EPS, DECAY = 0.03, (0.8, 0.95), 1e-6, 0.1
RULES = ("lazy_adam", "rowwise_adam", "rowwise_adagrad")


def _optimizer(rule: str, table: Tensor, *others: Tensor) -> RowWiseOptimizer:
    groups: list[dict[str, Any]] = [{"params": [table], "row_rule": rule, "weight_decay": DECAY}]
    if others:
        groups.insert(0, {"params": list(others)})
    return RowWiseOptimizer(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.2)


def _gradients(rows: list[list[int]], num_rows: int, columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.sparse_coo_tensor(
            [used],
            torch.randn(len(used), columns, generator=generator, dtype=torch.float64),
            (num_rows, columns),
            check_invariants=True,
        )
        for used in rows
    ]


def _by_hand(rule: str, table: list[list[float]], steps: list[dict[int, list[float]]]) -> list[list[float]]:
    """The rules as their papers and FBGEMM's documentation have them, a number at a time."""
    beta1, beta2 = BETAS
    columns = len(table[0])
    first = [[0.0] * columns for _ in table]
    second = [[0.0] * columns for _ in table]
    for number, gradient in enumerate(steps, start=1):
        for row, values in gradient.items():
            mean_square = sum(g * g for g in values) / columns
            for j, g in enumerate(values):
                first[row][j] = beta1 * first[row][j] + (1 - beta1) * g
                if rule == "lazy_adam":
                    second[row][j] = beta2 * second[row][j] + (1 - beta2) * g * g
                elif rule == "rowwise_adam":
                    second[row][j] = beta2 * second[row][j] + (1 - beta2) * mean_square
                else:
                    second[row][j] += mean_square
                table[row][j] *= 1 - LR * DECAY
                if rule == "rowwise_adagrad":
                    table[row][j] -= LR * g / (math.sqrt(second[row][j]) + EPS)
                else:
                    scale = math.sqrt(second[row][j] / (1 - beta2**number)) + EPS
                    table[row][j] -= LR * first[row][j] / (1 - beta1**number) / scale
    return table


@pytest.mark.parametrize("form", ["sparse", "dense", "uncoalesced"])
@pytest.mark.parametrize("rule", RULES)
def test_rows_of_a_batch_are_stepped_as_by_hand(rule, form, monkeypatch):
    # two rows at a time
    monkeypatch.setattr(row_optimizer, "_CHUNK_VALUES", 7)
    start = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = nn.Parameter(start.clone())
    optimizer = _optimizer(rule, table)
    gradients = _gradients([[1, 4], [4], [0, 1, 4, 5], [1]], 6, 3)
    for gradient in gradients:
        if form == "uncoalesced":
            half = gradient * 0.5
            table.grad = torch.sparse_coo_tensor(
                torch.cat([half.coalesce().indices()] * 2, 1), torch.cat([half.coalesce().values()] * 2), (6, 3)
            )
        else:
            table.grad = gradient.to_dense() if form == "dense" else gradient
        optimizer.step()
    steps = [
        dict(zip(g.coalesce().indices()[0].tolist(), g.coalesce().values().tolist(), strict=True)) for g in gradients
    ]
    expected = torch.tensor(_by_hand(rule, start.tolist(), steps), dtype=torch.float64)
    torch.testing.assert_close(table.detach(), expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(table[[2, 3]], start[[2, 3]])


def test_lazy_adam_is_adamw_where_every_row_has_a_gradient():
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = _optimizer("lazy_adam", ours)
    adamw = torch.optim.AdamW([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(6):
        gradient = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        ours.grad, theirs.grad = gradient.to_sparse(1) if step % 2 else gradient, gradient
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-13)


def test_lazy_adam_is_torchs_sparse_adam_up_to_the_place_of_epsilon():
    start = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "row_rule": "lazy_adam"}
    optimizer = RowWiseOptimizer([group], lr=LR, betas=BETAS, eps=1e-30, weight_decay=0.0)
    sparse_adam = torch.optim.SparseAdam([theirs], lr=LR, betas=BETAS, eps=1e-30)
    for gradient in _gradients([[1, 4], [4], [0, 1, 4, 5], [1]], 6, 3):
        ours.grad = theirs.grad = gradient
        optimizer.step()
        sparse_adam.step()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_other_groups_are_adamws_and_all_follow_one_schedule():
    generator = torch.Generator().manual_seed(4)
    table, weight = nn.Parameter(torch.randn(4, 2, generator=generator)), nn.Parameter(torch.ones(3))
    other = nn.Parameter(weight.detach().clone())
    optimizer, adamw = _optimizer("lazy_adam", table, weight), torch.optim.AdamW(
        [other], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.2
    )  # fmt: skip
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)) for o in (optimizer, adamw)]
    for _ in range(4):
        gradient = torch.randn(3, generator=generator)
        weight.grad, other.grad, table.grad = gradient, gradient.clone(), torch.ones(4, 2)
        optimizer.step()
        adamw.step()
        for schedule in schedules:
            schedule.step()
    assert torch.equal(weight, other)
    assert [group["lr"] for group in optimizer.param_groups] == [LR / 5] * 2


@pytest.mark.parametrize("rule", RULES)
def test_state_has_a_value_per_row_where_the_rule_says_so_and_loads(rule):
    table, weight = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.ones(3))
    optimizer = _optimizer(rule, table, weight)

    def step(*holders: tuple[Any, Tensor, Tensor]) -> None:
        for o, t, w in holders:
            t.grad, w.grad = torch.sparse_coo_tensor([[0, 2]], torch.tensor([[1.0, 2], [3, 4]]), (4, 2)), torch.ones(3)
            o.step()

    step((optimizer, table, weight))
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[table].items()}
    assert (
        shapes
        == {
            "lazy_adam": {"step": (), "exp_avg": (4, 2), "exp_avg_sq": (4, 2)},
            "rowwise_adam": {"step": (), "exp_avg": (4, 2), "exp_avg_sq": (4, 1)},
            "rowwise_adagrad": {"step": (), "sum": (4, 1)},
        }[rule]
    )
    again = (nn.Parameter(table.detach().clone()), nn.Parameter(weight.detach().clone()))
    loaded = _optimizer(rule, *again)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step((optimizer, table, weight), (loaded, *again))
    assert torch.equal(table, again[0])
    assert torch.equal(weight, again[1])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_equals_torchs_on_dense_gradients(algorithm):
    generator = torch.Generator().manual_seed(5)
    table, weight = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(3))
    dense = [nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(3))]
    # row 2 from two micro-batches: their sum counts
    table.grad = torch.sparse_coo_tensor([[2, 0, 2]], torch.randn(3, 2, generator=generator), (4, 2))
    weight.grad = torch.randn(3, generator=generator)
    dense[0].grad, dense[1].grad = table.grad.to_dense(), weight.grad.clone()
    found = clip_gradients([table, weight], 0.3, algorithm)
    if algorithm == "norm":
        torch.testing.assert_close(found, nn.utils.clip_grad_norm_(dense, 0.3))
    else:
        nn.utils.clip_grad_value_(dense, 0.3)
    torch.testing.assert_close(table.grad.to_dense(), dense[0].grad)
    torch.testing.assert_close(weight.grad, dense[1].grad)


def test_used_rows_of_a_dense_gradient():
    rows, values = used_rows(torch.tensor([[0.0, 0], [0, -1], [0, 0], [2, 0]]))
    assert (rows.tolist(), values.tolist()) == ([1, 3], [[0, -1], [2, 0]])


def test_refusals():
    with pytest.raises(ValueError, match="row_rule 'adam' is not one of lazy_adam, rowwise_adam, rowwise_adagrad"):
        RowWiseOptimizer([{"params": [nn.Parameter(torch.zeros(2, 2))], "row_rule": "adam"}])
    with pytest.raises(ValueError, match=r"for tables \(rows, columns\), got \(2,\)"):
        RowWiseOptimizer([{"params": [nn.Parameter(torch.zeros(2))], "row_rule": "lazy_adam"}])


FIELDS: dict[str, Any] = {
    "preset": "memoryformer-tiny",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_options": {"num_bits": 4},
    "feed_forward_options": {"num_bits": 4, "extra_bits": 4},
}
NGRAMS: dict[str, Any] = {
    "preset": "ngram-tiny",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "feed_forward_options": {"key": "ngram_hash", "num_rows": 512, "orders": [2], "num_heads": 2},
}


class Text(pl.LightningDataModule):
    """Random sequences."""

    vocab_size = 61

    def train_dataloader(self) -> Any:
        ids = torch.randint(61, (16, 8), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)

    # an epoch that ends without a validation is begun again by a resumed run
    val_dataloader = train_dataloader


def _trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", **(quiet | {"max_steps": 6, "enable_checkpointing": False} | options))


def _module(fields: dict[str, Any], **options: Any) -> MemoryFormerLightning:
    pl.seed_everything(0, verbose=False)
    return MemoryFormerLightning(fields, learning_rate=1e-2, total_steps=8, **options)


@pytest.mark.parametrize("fields", [FIELDS, NGRAMS], ids=["hash", "ngram"])
@pytest.mark.parametrize("rule", RULES)
def test_training_learns_clips_and_resumes_to_the_same_bits(rule, fields, tmp_path):
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    whole = _module(fields, table_optimizer=rule)
    run = _trainer(max_steps=8, **options)
    seen = []
    whole.on_before_zero_grad = lambda optimizer: seen.extend(  # type: ignore[method-assign]
        p.grad.is_sparse for g in optimizer.param_groups if g["row_rule"] for p in g["params"] if p.grad is not None
    )
    run.fit(whole, Text())
    assert seen
    assert all(seen)
    first = _module(fields, table_optimizer=rule)
    half = _trainer(max_steps=4, **options)
    half.fit(first, Text())
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = _module(fields, table_optimizer=rule)
    _trainer(max_steps=8, **options).fit(again, Text(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    start = _module(fields)
    start.configure_model()
    for name, value in whole.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name
        if name.endswith("table"):
            assert not torch.equal(value, start.get_parameter(name)), name


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_lightning_clips_sparse_gradients_as_dense_ones(algorithm, monkeypatch):
    found = []
    for dense in (False, True):
        module = _module(FIELDS, table_optimizer="lazy_adam")
        module.configure_model()
        for part in module.modules():
            if dense and hasattr(part, "sparse_grad"):
                part.sparse_grad = False
        monkeypatch.setattr(module, "configure_model", lambda: None)
        options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm, "limit_val_batches": 0}
        _trainer(max_steps=1, **options).fit(module, Text())
        # what the step has seen
        found.append({name: value.grad.to_dense() for name, value in module.named_parameters()})
        assert any(value.grad.is_sparse for value in module.parameters()) != dense
    # one step: from the second on, values near zero may fall into another bucket
    torch.testing.assert_close(found[0], found[1], atol=1e-8, rtol=1e-5)
    if algorithm == "norm":
        assert float(nn.utils.get_total_norm(list(found[0].values()))) == pytest.approx(0.01, rel=1e-3)
    else:
        assert max(float(value.abs().max()) for value in found[0].values()) == pytest.approx(0.01)


def test_unknown_and_unfit_choices(monkeypatch):
    with pytest.raises(ValueError, match="unknown table_optimizer 'sgd'; there are adamw, lazy_adam"):
        MemoryFormerLightning(FIELDS, table_optimizer="sgd")  # type: ignore[arg-type]

    class FakeFSDPStrategy:
        root_device = torch.device("cpu")

    class Trainer:
        strategy, datamodule, world_size = FakeFSDPStrategy(), None, 2

    module = _module(FIELDS, table_optimizer="lazy_adam")
    module._trainer = Trainer()
    with pytest.raises(ValueError, match="FakeFSDPStrategy shards them; use table_optimizer: adamw, or the strategy"):
        module.configure_model()


def test_memory_counts_the_smaller_state(monkeypatch):
    monkeypatch.setattr(sizes, "available_bytes", lambda device="cpu": 10**9)
    # 8 bytes for each of 6 x 69,206,016 table values, 16 for the others
    expected = 8 * 6 * 69_206_016 + 16 * (466_784_512 - 6 * 69_206_016)
    module = MemoryFormerLightning("memoryformer-tiny", table_optimizer="rowwise_adagrad")
    message = rf"415,236,096 of them with rowwise_adagrad \(8 bytes each\) takes {expected:,} bytes"
    with pytest.raises(ValueError, match=message):
        module.configure_model()

"""Sparse gradients of tables: the rows that were used, their values against autograd of plain torch."""

import pytest
import torch
from tenfold.kernels.hash_gather import coalesced, hash_gather, num_tables, weighted_gather_sparse_grad
from torch import Tensor

GENERATOR = torch.Generator().manual_seed(3)


def _case(shape: tuple[int, ...], bits: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*shape, generator=GENERATOR, dtype=torch.float64).to(dtype)
    table = torch.randn(num_tables(shape[-1], bits) << bits, columns, generator=GENERATOR, dtype=torch.float64)
    grad = torch.randn(*shape[:-1], columns, generator=GENERATOR, dtype=torch.float64)
    return x.requires_grad_(), table.to(dtype).requires_grad_(), grad.to(dtype)


def _rows_by_hand(x: Tensor, bits: int) -> set[int]:
    rows = set()
    for token in x.detach().reshape(-1, x.shape[-1]).tolist():
        for k in range(num_tables(x.shape[-1], bits)):
            part = token[k * bits : (k + 1) * bits]
            part += [0.0] * (bits - len(part))
            rows.add(k * 2**bits + int("".join("1" if value >= 0 else "0" for value in part), 2))
    return rows


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("shape", "bits", "columns"), [((3, 5, 12), 4, 7), ((40, 10), 3, 33), ((1, 8), 8, 5)], ids=str)
def test_rows_and_values_are_those_of_autograd(backend, shape, bits, columns):
    x, table, grad = _case(shape, bits, columns, torch.float64 if backend == "cpu" else torch.float32)
    hash_gather(x, table, bits, backend=backend, sparse_grad=True).backward(grad)
    assert table.grad.is_sparse
    sparse, by_x = coalesced(table.grad), x.grad
    assert set(sparse.indices()[0].tolist()) == _rows_by_hand(x, bits)
    assert sparse.indices()[0].diff().gt(0).all()
    x.grad = table.grad = None
    hash_gather(x, table, bits, backend="reference").backward(grad)
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if backend == "cpu" else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(sparse.to_dense(), table.grad, **tolerance)
    torch.testing.assert_close(by_x, x.grad, **tolerance)


def test_it_equals_the_dense_gradient_to_the_bit_and_repeats():
    x, table, grad = _case((300, 24), 4, 16, torch.float32)
    found = []
    for sparse in (True, True, False):
        table.grad = None
        hash_gather(x, table, 4, sparse_grad=sparse).backward(grad)
        found.append(table.grad.to_dense())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_rows(dtype):
    table = torch.randn(50, 9, generator=GENERATOR).to(dtype).requires_grad_()
    rows = torch.tensor([[[3, 3, 49]], [[3, 0, 7]]])
    weights = torch.randn(2, 1, 3, generator=GENERATOR).requires_grad_()
    grad = torch.randn(2, 1, 9, generator=GENERATOR).to(dtype)
    out = weighted_gather_sparse_grad(table, rows, weights)
    out.backward(grad)
    assert coalesced(table.grad).indices().tolist() == [[0, 3, 7, 49]]
    exact, factors = table.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    expected = (exact[rows] * factors.unsqueeze(-1)).sum(-2)
    expected.backward(grad.double())
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(table.grad.to_dense().double(), exact.grad, **tolerance)
    torch.testing.assert_close(weights.grad.double(), factors.grad, **tolerance)


def test_no_tokens_give_no_rows():
    x = torch.randn(0, 8, requires_grad=True)
    table = torch.randn(32, 4, requires_grad=True)
    hash_gather(x, table, 4, sparse_grad=True).sum().backward()
    assert table.grad.coalesce().indices().shape == (1, 0)
    assert table.grad.shape == (32, 4)


def test_two_micro_batches_add_up():
    x, table, grad = _case((6, 8), 4, 3, torch.float64)
    for part in (slice(0, 2), slice(2, 6)):
        hash_gather(x[part], table, 4, sparse_grad=True).backward(grad[part])
    total = table.grad.coalesce().to_dense()
    table.grad = None
    hash_gather(x, table, 4, sparse_grad=True).backward(grad)
    torch.testing.assert_close(total, table.grad.to_dense(), atol=1e-12, rtol=0)


def test_the_plain_path_refuses():
    x, table, _ = _case((2, 8), 4, 3, torch.float32)
    with pytest.raises(ValueError, match="backend 'reference' gives dense gradients"):
        hash_gather(x, table, 4, backend="reference", sparse_grad=True)


@pytest.mark.parametrize("rows", [[0, 2, 5], [2, 0, 5], [2, 2, 5], [4], []], ids=str)
def test_coalescing_with_and_without_a_sort(rows):
    values = torch.arange(2.0 * len(rows)).view(-1, 2)
    grad = torch.sparse_coo_tensor([rows], values, (6, 2), check_invariants=True)
    found = coalesced(grad)
    assert found.is_coalesced()
    assert found.indices()[0].tolist() == sorted(set(rows))
    assert torch.equal(found.to_dense(), grad.to_dense())
    # nothing is copied where nothing is to be done
    assert (found.values().data_ptr() == grad._values().data_ptr()) == (rows in ([0, 2, 5], [4], []))

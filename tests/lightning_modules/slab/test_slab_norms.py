"""RepBN and its blend: formulas in float64, lambda's endpoints, masks, recomputation, two processes."""

import copy
import os
import socket

import pytest
import torch
from tenfold.lightning_modules import ProgressiveNorm, RepBatchNorm, follow_attention_mask, set_token_mask
from torch import nn
from torch.utils.checkpoint import checkpoint

EPS = 1e-5


def filled(norm, seed=0):
    """No parameter or statistic at its trivial value."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*norm.parameters(), *(b for n, b in norm.named_buffers() if "running" in n)]:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm.double()


def batch_norm_by_hand(x, norm, keep=None):
    """One channel at a time, in plain arithmetic; returns the output, the mean and the unbiased variance."""
    flat = x.reshape(-1, x.shape[-1])
    used = flat if keep is None else flat[keep.reshape(-1)]
    mean = sum(used) / len(used)
    variance = sum((row - mean) ** 2 for row in used) / len(used)
    y = (flat - mean) / (variance + EPS).sqrt() * norm.bn.weight + norm.bn.bias + norm.eta * flat
    return y.view(x.shape), mean, variance * len(used) / (len(used) - 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 4), (7, 4), (2, 3, 2, 4)], ids=str)
def test_training_equals_the_formula_with_gradients_and_running_statistics(shape, masked):
    norm = filled(RepBatchNorm(4, momentum=0.3))
    before = copy.deepcopy(norm)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    keep = None
    if masked:
        leading = shape[: min(2, len(shape) - 1)]
        keep = torch.ones(leading, dtype=torch.bool)
        keep.view(-1)[::3] = False
        norm.token_mask = keep.long()
        keep = keep.reshape(*leading, *(1,) * (len(shape) - 1 - len(leading))).expand(shape[:-1])
    found = norm(x)
    expected, mean, variance = batch_norm_by_hand(x, norm, keep)
    direction = torch.randn(shape, dtype=torch.float64)
    if masked:
        # what stands at padding is nobody's business
        direction = direction * keep.unsqueeze(-1)
        assert torch.isfinite(found).all()
    torch.testing.assert_close((found * direction).sum(), (expected * direction).sum(), rtol=1e-12, atol=1e-12)
    if not masked:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    inputs = (x, norm.bn.weight, norm.bn.bias, norm.eta)
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.bn.running_mean, 0.7 * before.bn.running_mean + 0.3 * mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.bn.running_var, 0.7 * before.bn.running_var + 0.3 * variance, rtol=0, atol=1e-12)


def test_padding_does_not_matter_for_what_is_kept():
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    norm = filled(RepBatchNorm(4))
    other = copy.deepcopy(norm)
    norm.token_mask = other.token_mask = mask
    y = x.clone()
    y[0, :2] = torch.inf
    torch.testing.assert_close(norm(x)[0, 2:], other(y)[0, 2:], rtol=0, atol=0)
    assert torch.equal(norm.bn.running_var, other.bn.running_var)


def test_evaluation_is_the_affine_map_of_the_running_statistics():
    norm = filled(RepBatchNorm(4)).eval()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    expected = nn.functional.batch_norm(
        x.view(-1, 4), norm.bn.running_mean, norm.bn.running_var, norm.bn.weight, norm.bn.bias, False, 0, EPS
    ).view(x.shape)
    torch.testing.assert_close(norm(x), expected + norm.eta * x, rtol=1e-13, atol=1e-13)
    scale, shift = norm.affine()
    torch.testing.assert_close(norm(x), scale * x + shift, rtol=1e-13, atol=1e-13)
    for dtype in (torch.float16, torch.bfloat16):
        assert norm.float()(x.to(dtype)).dtype == dtype


def test_a_fresh_momentum_of_none_averages_the_batches():
    norm = RepBatchNorm(3, momentum=None).double()
    batches = [torch.randn(8, 3, dtype=torch.float64) for _ in range(4)]
    for batch in batches:
        norm(batch)
    torch.testing.assert_close(norm.bn.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(norm.bn.running_var, torch.stack([b.var(0) for b in batches]).mean(0))


@pytest.mark.parametrize(
    ("initial", "values"), [("vision", (1.0, 0.0, 1.0)), ("language", (0.0, 0.0, 0.0))], ids=["vision", "language"]
)
def test_start_values_of_the_table(initial, values):
    norm = RepBatchNorm(3, initial=initial)
    assert (norm.bn.weight[0].item(), norm.bn.bias[0].item(), norm.eta.item()) == values
    assert (norm.bn.eps, norm.bn.momentum) == (1e-5, 0.1)


def blend():
    torch.manual_seed(0)
    norm = ProgressiveNorm(nn.LayerNorm(4), RepBatchNorm(4)).double()
    filled(norm.new_norm)
    for parameter in norm.old_norm.parameters():
        parameter.data.uniform_(0.5, 1.5)
    return norm


def test_endpoints_of_lambda_bit_for_bit():
    norm, x = blend(), torch.randn(2, 5, 4, dtype=torch.float64)
    norm.set_blend(1.0)
    assert torch.equal(norm(x), norm.old_norm(x))
    norm.set_blend(0.0)
    assert torch.equal(norm(x), norm.new_norm(x))
    norm.set_blend(0.5)
    norm.eval()
    assert torch.equal(norm(x), norm.new_norm(x))
    assert not torch.equal(norm(x), norm.old_norm(x))


def test_between_the_endpoints_and_in_a_shown_blend():
    norm, x = blend(), torch.randn(2, 5, 4, dtype=torch.float64)
    norm.set_blend(0.25)
    other = copy.deepcopy(norm)
    expected = 0.25 * other.old_norm(x) + 0.75 * other.new_norm(x)
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)
    norm.eval()
    norm.evaluate_blend = True
    expected = 0.25 * norm.old_norm(x) + 0.75 * norm.new_norm(x)
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)
    norm.train()
    norm.record_gap = True
    norm(x)
    old, new = other.old_norm(x), batch_norm_by_hand(x, other.new_norm)[0]
    assert float(norm.branch_gap) == pytest.approx(float(((new - old).norm() / old.norm()).detach()), rel=1e-5)


def test_statistics_move_in_the_blend_and_not_while_warming():
    norm, x = blend(), torch.randn(2, 5, 4, dtype=torch.float64)
    before = norm.new_norm.bn.running_mean.clone()
    norm.set_blend(1.0, warming=True)
    y = norm(x)
    assert torch.equal(y, norm.old_norm(x))
    assert torch.equal(norm.new_norm.bn.running_mean, before)
    # every parameter has a gradient, or DDP would wait for it
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in norm.parameters())
    assert all((parameter.grad == 0).all() for parameter in norm.new_norm.parameters())
    norm.set_blend(1.0)
    norm(x)
    assert not torch.equal(norm.new_norm.bn.running_mean, before)
    norm.zero_grad()
    norm.set_blend(0.0)
    norm(x).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in norm.old_norm.parameters())


def test_lambda_keeps_its_precision_and_its_value():
    norm = blend()
    norm.set_blend(0.999)
    for dtype in (torch.bfloat16, torch.float64):
        assert norm.to(dtype).blend.dtype == torch.float32
    assert float(norm.blend) == pytest.approx(0.999, abs=1e-7)
    loaded = blend()
    # read before, so that the values of then are known
    assert loaded.blend_state() == (1.0, False)
    loaded.load_state_dict(norm.state_dict())
    assert loaded.blend_state() == (float(norm.blend), False)
    # bfloat16 has no number between 0.996 and 1: the blend is computed in float32
    norm = norm.to(torch.bfloat16)
    x = torch.randn(64, 4).bfloat16()
    norm.new_norm.bn.bias.data.fill_(512.0)
    assert not torch.equal(norm(x), norm.old_norm(x))


def test_a_dropped_norm_stays_dropped_through_a_checkpoint():
    norm = blend()
    with pytest.raises(ValueError, match="lambda is 1: the old norm is still in use"):
        norm.drop_old_norm()
    norm.set_blend(0.0)
    old = list(norm.old_norm.parameters())
    assert norm.drop_old_norm() == old
    assert {n.split(".")[0] for n, _ in norm.named_parameters()} == {"new_norm"}
    loaded = blend()
    loaded.load_state_dict(norm.state_dict())
    assert loaded.old_norm is None
    with pytest.raises(ValueError, match=r"lambda 0.5 needs the old norm"):
        loaded.set_blend(0.5)
    # a checkpoint that is merely incomplete is not taken for one
    state = {k: v for k, v in blend().state_dict().items() if not k.startswith("old_norm")}
    with pytest.raises(RuntimeError, match=r"old_norm\.weight"):
        blend().load_state_dict(state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_batch_once(reentrant):
    plain, recomputed = blend(), blend()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    plain.set_blend(0.5)
    recomputed.set_blend(0.5)
    one = plain(x)
    other = checkpoint(recomputed, x, use_reentrant=reentrant)
    grads = torch.autograd.grad(one.square().sum(), x)
    x.grad = None
    other.square().sum().backward()
    torch.testing.assert_close(x.grad, grads[0], rtol=1e-12, atol=1e-12)
    assert plain.new_norm.bn.num_batches_tracked == recomputed.new_norm.bn.num_batches_tracked == 1
    assert torch.equal(plain.new_norm.bn.running_var, recomputed.new_norm.bn.running_var)


def test_compiled_code_serves_every_lambda():
    from torch._dynamo.testing import CompileCounter

    norm, x = blend(), torch.randn(3, 5, 4, dtype=torch.float64)
    plain, counter = copy.deepcopy(norm), CompileCounter()
    compiled = torch.compile(norm, backend=counter)
    for value in (1.0, 0.9, 0.5, 0.2):
        norm.set_blend(value)
        plain.set_blend(value)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-13, atol=1e-13)
    assert counter.frame_count == 1


def test_refusals():
    norm = RepBatchNorm(4)
    with pytest.raises(ValueError, match=r"got 1 token .* its variance needs at least 2; use a larger batch, or eval"):
        norm(torch.randn(1, 1, 4))
    assert norm.eval()(torch.randn(1, 1, 4)).shape == (1, 1, 4)
    norm.train()
    norm.token_mask = torch.tensor([[1, 0]])
    with pytest.raises(ValueError, match="got 1 token"):
        norm(torch.randn(1, 2, 4))
    with pytest.raises(ValueError, match=r"the token mask is \(1, 2\), the norm's input \(1, 3, 4\)"):
        norm(torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match="initial 'visoin' is not one of vision, language"):
        RepBatchNorm(4, initial="visoin")
    with pytest.raises(ValueError, match=r"lambda 1.5 is not between 0 and 1"):
        blend().set_blend(1.5)


class WithMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = RepBatchNorm(4)

    def forward(self, inputs_embeds, attention_mask=None):
        return self.norm(inputs_embeds)


def test_the_mask_follows_the_attention_mask():
    model, x = WithMask(), torch.randn(2, 3, 4)
    handle = follow_attention_mask(model)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for call in (lambda: model(x, mask), lambda: model(x, attention_mask=torch.cat([1 - mask, mask], 1))):
        call()
        assert torch.equal(model.norm.token_mask, mask)
    for other in (torch.ones_like(mask), torch.zeros(2, 1, 3, 3), None):
        model(x, attention_mask=mask)
        model(x, attention_mask=other)
        assert model.norm.token_mask is None
    handle.remove()
    set_token_mask(model, mask)
    model(x)
    assert torch.equal(model.norm.token_mask, mask)
    with pytest.raises(ValueError, match="forward of WithMask has no argument 'padding'"):
        follow_attention_mask(model, "padding")


def _process(rank, port, inputs, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(filled(RepBatchNorm(4)))
    x, mask = inputs[rank]
    x.requires_grad_()
    norm.token_mask = mask
    y = norm(x)
    (y * mask.unsqueeze(-1)).square().sum().backward()
    torch.save((y.detach(), x.grad, norm.bn.running_mean, norm.bn.running_var), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_statistics_of_two_processes_are_those_of_one_batch(tmp_path):
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, :3] = False
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # of unequal size
    parts = [(x[:1].clone(), mask[:1]), (x[1:].clone(), mask[1:])]
    torch.multiprocessing.start_processes(_process, (port, parts, tmp_path), nprocs=2, start_method="fork")
    norm = filled(RepBatchNorm(4))
    norm.token_mask = mask
    x.requires_grad_()
    y = norm(x)
    (y * mask.unsqueeze(-1)).square().sum().backward()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    kept = mask.unsqueeze(-1)
    torch.testing.assert_close(torch.cat([f[0] for f in found]) * kept, y.detach() * kept, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), x.grad, rtol=0, atol=1e-12)
    for part in found:
        torch.testing.assert_close(part[2], norm.bn.running_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(part[3], norm.bn.running_var, rtol=0, atol=1e-12)

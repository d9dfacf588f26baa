"""cross_entropy's gradients as autograd uses them: which, how often, of what order."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchext
from torchext.testing import assert_drop_in

REDUCTIONS = ("none", "mean", "sum")


def make_logits(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return 3 * torch.randn(shape, dtype=dtype, device=device)


def make_target(shape: tuple[int, ...], dense: bool, dtype: torch.dtype) -> Tensor:
    """Class indices, or probabilities."""
    dim = min(len(shape) - 1, 1)
    if dense:
        return torch.randn(shape).softmax(dim).to(dtype)
    return torch.randint(shape[dim], (*shape[:dim], *shape[dim + 1 :]))


def test_second_derivatives(backend: str, device: str) -> None:
    for shape, dense in itertools.product([(5,), (4, 3), (2, 3, 4)], [False, True]):
        for reduction, smoothing in itertools.product(REDUCTIONS, (0.0, 0.1)):
            logits = make_logits(shape, torch.float64, device).requires_grad_()
            target = make_target(shape, dense, torch.float64).to(device)
            if dense:
                target.requires_grad_()
            options = {"reduction": reduction, "label_smoothing": smoothing}
            assert_drop_in(
                torchext.cross_entropy, F.cross_entropy, logits, target, order=2, **options
            )


def test_gradcheck(backend: str, device: str) -> None:
    logits = make_logits((4, 3, 2), torch.float64, device).requires_grad_()
    target = make_target((4, 3, 2), True, torch.float64).to(device).requires_grad_()
    indices, weight = torch.randint(3, (4, 2), device=device), torch.rand(3, dtype=torch.float64)
    for reduction in REDUCTIONS:
        for x in (logits, logits.detach().transpose(0, 2).clone().transpose(0, 2).requires_grad_()):

            def loss(x: Tensor, reduction: str = reduction) -> Tensor:
                return torchext.cross_entropy(
                    x, indices, weight.to(device), reduction=reduction, label_smoothing=0.1
                )

            assert torch.autograd.gradcheck(loss, x, check_batched_grad=True, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(loss, x)

        def dense(x: Tensor, target: Tensor, reduction: str = reduction) -> Tensor:
            return torchext.cross_entropy(x, target, reduction=reduction)

        assert torch.autograd.gradcheck(dense, (logits, target), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(dense, (logits, target))


@pytest.mark.parametrize("probabilities", [False, True])
def test_only_the_gradients_that_stock_gives(backend: str, probabilities: bool) -> None:
    for logits_grad, target_grad in itertools.product((False, True), repeat=2):
        logits = make_logits((4, 5), torch.float32).requires_grad_(logits_grad)
        target = make_target((4, 5), probabilities, torch.float32)
        if probabilities:
            target.requires_grad_(target_grad)
        assert_drop_in(torchext.cross_entropy, F.cross_entropy, logits, target)
        loss = torchext.cross_entropy(logits, target)
        assert loss.requires_grad == F.cross_entropy(logits, target).requires_grad
        with torch.no_grad():
            assert not torchext.cross_entropy(logits, target).requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_twice(backend: str, reduction: str, dtype: torch.dtype) -> None:
    logits = make_logits((4, 5), dtype).requires_grad_()
    loss = torchext.cross_entropy(logits, torch.randint(5, (4,)), reduction=reduction)
    upstream = torch.randn_like(loss)
    before = logits.detach().clone()
    (first,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    kept = first.clone()
    first.fill_(7)  # a user may do with a gradient as they like
    (second,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    assert torch.equal(second, kept)
    (other,) = torch.autograd.grad(loss, logits, 2 * upstream, retain_graph=True)
    torch.testing.assert_close(other, 2 * kept)
    assert torch.equal(second, kept)
    (last,) = torch.autograd.grad(loss, logits, upstream)
    assert torch.equal(last, kept)
    assert len({tensor.data_ptr() for tensor in (first, second, other, last, logits)}) == 5
    assert torch.equal(logits, before)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits, upstream)


def test_gradients_accumulate(backend: str) -> None:
    logits = make_logits((4, 5), torch.float64).requires_grad_()
    target = torch.randint(5, (4,))
    losses = [torchext.cross_entropy(logits, target, reduction=r).sum() for r in REDUCTIONS]
    (2 * losses[0] + 3 * losses[1] * losses[2]).backward()
    ours, logits.grad = logits.grad, None
    losses = [F.cross_entropy(logits, target, reduction=r).sum() for r in REDUCTIONS]
    (2 * losses[0] + 3 * losses[1] * losses[2]).backward()
    torch.testing.assert_close(ours, logits.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_statistics_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    """As float32 and float64 they are numbers of another width."""
    x, target = torch.randn(3, 5, dtype=dtype), torch.tensor([0, 4, 2])
    ops, call = torch.ops.torchext, (None, 0, -100, 0.0)
    stats = ops.cross_entropy_forward(x, target, *call, False)[1]
    wrong = stats.to(torch.float32 if dtype is torch.float64 else dtype)
    upstream = torch.randn(3, dtype=dtype)
    ops.cross_entropy_backward(upstream, x, target, None, stats, *call[1:])
    with pytest.raises(RuntimeError, match="cross_entropy_backward: expected stats .* dtype"):
        ops.cross_entropy_backward(upstream, x, target, None, wrong, *call[1:])
    weight = torch.randn(5, 5, dtype=dtype)
    with pytest.raises(RuntimeError, match="linear_cross_entropy_backward: expected stats"):
        ops.linear_cross_entropy_backward(
            upstream.to(stats.dtype), x, weight, target, None, None, wrong, *call[1:],
            True, True, False,
        )  # fmt: skip

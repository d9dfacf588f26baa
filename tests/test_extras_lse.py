"""The log-sum-exp of the extras: torch's, for every layout, without copies of the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchext
from torchext.ops import extras_lse, extras_source

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}


def layouts(dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(33, 70).to(dtype) * 3,
        torch.randn(70, 33).to(dtype).t(),
        torch.randn(33, 140).to(dtype)[:, ::2],
        torch.randn(9).to(dtype),
        torch.randn(3, 11, 4, 5).to(dtype),
        torch.randn(3, 4, 5, 11).to(dtype).movedim(-1, 1),
        torch.randn(4, 1).to(dtype),
    ]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_layout(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(extras_source, "_BYTES", {"cpu": 1})
    monkeypatch.setattr(extras_source, "_MIN_ROWS", 8)  # the chunks of narrow logits
    monkeypatch.setattr(extras_lse, "_defined", None)
    for logits in layouts(dtype):
        leaf = logits.detach().requires_grad_()
        dim = 0 if logits.dim() == 1 else 1
        lse = extras_lse.log_sum_exp(leaf)
        wide = logits.double().requires_grad_()
        truth = wide.logsumexp(dim)
        upstream = torch.randn_like(truth)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(lse.double(), truth, rtol=2e-6, atol=2e-6)
        (grad,) = torch.autograd.grad(lse, leaf, upstream.to(lse.dtype))
        (exact,) = torch.autograd.grad(truth, wide, upstream)
        assert grad.dtype == dtype
        error = (grad.double() - exact).norm()
        assert error <= TOLERANCES[dtype] * exact.norm()


def test_transforms_and_second_derivatives() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(extras_lse.log_sum_exp, logits)
    assert torch.autograd.gradgradcheck(extras_lse.log_sum_exp, logits)
    hessian = torch.func.hessian(lambda x: extras_lse.log_sum_exp(x).sum())(logits)
    expected = torch.func.hessian(lambda x: x.logsumexp(1).sum())(logits)
    torch.testing.assert_close(hessian, expected)
    empty = torch.randn(0, 5)
    torch.testing.assert_close(extras_lse.log_sum_exp(empty), empty.logsumexp(1))


def test_infinities() -> None:
    logits = torch.randn(5, 60)
    logits[0, 3], logits[1], logits[2, 7], logits[3, 1] = (
        float("inf"),
        -float("inf"),
        -float("inf"),
        float("nan"),
    )
    for layout in (logits, logits.t().contiguous().t()):
        found = extras_lse.log_sum_exp(layout)
        torch.testing.assert_close(found, logits.logsumexp(1), equal_nan=True)


def test_the_logits_are_left_alone() -> None:
    logits = torch.randn(6, 7, requires_grad=True)
    before = logits.detach().clone()
    _, lse = torchext.cross_entropy(logits, torch.zeros(6).long(), return_lse=True)
    lse.sum().backward()
    assert torch.equal(logits.detach(), before)

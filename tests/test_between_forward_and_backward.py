"""What happens to the logits after the loss, and upstream gradients that are subclasses."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import torchext

TARGET = torch.tensor([3, 0, 19, 7, 7, 12])


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """The calls are small: `auto` would give them to stock."""
    with torchext.use_backend("native"):
        yield


def smoothed(op: Callable[..., Tensor], logits: Tensor, reduction: str) -> Tensor:
    return op(logits, TARGET, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logits_may_be_changed_after_the_loss(dtype: torch.dtype, reduction: str) -> None:
    x, found = torch.randn(6, 20, dtype=dtype), []
    for op, change in (
        (F.cross_entropy, True),
        (torchext.cross_entropy, False),
        (torchext.cross_entropy, True),
    ):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        loss = smoothed(op, logits, reduction)
        if change:
            logits.div_(2)
        found += torch.autograd.grad(loss, leaf, torch.tensor(0.7, dtype=dtype))
    assert torch.equal(found[1], found[2])
    if dtype is not torch.bfloat16:  # test_cross_entropy.py holds those to the truth
        torch.testing.assert_close(*found[::2])


@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_upstream_gradients_that_are_not_finite(
    dtype: torch.dtype, reduction: str, upstream: float
) -> None:
    """As stock: 0 of rows that are ignored, NaN at the target, infinite beside it."""
    x, w = torch.randn(6, 20).to(dtype), torch.randn(20, 4).to(dtype)
    target = TARGET.masked_fill(TARGET == 7, -100)
    gradient = torch.tensor(upstream, dtype=dtype)
    for smoothing in (0.0, 0.1):

        def grads(op: Callable[..., Tensor], *leaves: Tensor, smoothing: float = smoothing) -> Any:
            leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
            first, *others = leaves
            loss = op(first, *others, target, reduction=reduction, label_smoothing=smoothing)
            return torch.autograd.grad(loss, leaves, gradient)

        def definition(input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
            return F.cross_entropy(input @ weight.t(), *args, **options)

        pairs = [
            (grads(torchext.cross_entropy, x), grads(F.cross_entropy, x)),
            (grads(torchext.linear_cross_entropy, x[:, :4], w), grads(definition, x[:, :4], w)),
        ]
        for actual, expected in pairs:
            for one, other in zip(actual, expected, strict=True):
                assert torch.equal(torch.isnan(one), torch.isnan(other))
                assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_second_derivatives_of_changed_logits_are_refused() -> None:
    leaf = torch.randn(6, 20, requires_grad=True)
    logits = leaf * 1
    loss = smoothed(torchext.cross_entropy, logits, "mean")
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert first.requires_grad
    logits.div_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    torch.autograd.grad(loss, leaf)  # needs none of them


def test_backward_forgets_the_logits() -> None:
    leaf = torch.randn(6, 20, requires_grad=True)
    logits = leaf * 1
    loss = smoothed(torchext.cross_entropy, logits, "mean")
    kept = weakref.ref(logits)
    del logits
    gc.collect()
    assert kept() is not None  # a second derivative would need them
    loss.backward()
    gc.collect()
    assert kept() is None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


Call = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def z_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, TARGET) + (0.1 * logits.logsumexp(1) ** 2).mean()


CALLS: dict[str, Call] = {
    "linear_relu": (torchext.linear_relu, lambda x, w: F.relu(F.linear(x, w))),
    "z_loss": (
        lambda x, w: torchext.cross_entropy(x, TARGET, z_loss=0.1) + 0 * w.sum(),
        lambda x, w: z_loss(x) + 0 * w.sum(),
    ),
    "linear z_loss": (
        lambda x, w: torchext.linear_cross_entropy(x, w, TARGET, z_loss=0.1),
        lambda x, w: z_loss(F.linear(x, w)),
    ),
    "inplace_backward": (
        lambda x, w: torchext.cross_entropy(F.linear(x, w), TARGET, inplace_backward=True),
        lambda x, w: F.cross_entropy(F.linear(x, w), TARGET),
    ),
}
for _name in ("none", "mean"):
    _options: dict[str, Any] = {"reduction": _name, "label_smoothing": 0.1}
    CALLS[f"cross_entropy {_name}"] = (
        lambda x, w, o=_options: torchext.cross_entropy(F.linear(x, w), TARGET, **o),
        lambda x, w, o=_options: F.cross_entropy(F.linear(x, w), TARGET, **o),
    )
    CALLS[f"linear_cross_entropy {_name}"] = (
        lambda x, w, o=_options: torchext.linear_cross_entropy(x, w, TARGET, **o),
        lambda x, w, o=_options: F.cross_entropy(F.linear(x, w), TARGET, **o),
    )


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_upstream_gradients_of_a_subclass(call: Call) -> None:
    """Two tensors in one: each has its own gradient."""
    x, w = torch.randn(6, 20, requires_grad=True), torch.randn(20, 20, requires_grad=True)
    upstream = torch.empty(0)
    for function in call:
        output = function(x, w)
        if upstream.numel() == 0:
            upstream = torch.randn_like(output)
        both = TwoTensor(upstream, 7 * upstream.cos())
        for got in torch.autograd.grad(output, (x, w), both, retain_graph=True):
            assert type(got) is TwoTensor
        found = torch.autograd.grad(output, (x, w), both)
        parts = [(got.a, got.b) for got in found]  # type: ignore[attr-defined]
        if function is call[0]:
            ours = parts
    torch.testing.assert_close(ours, parts)


class _NoGradient(torch.autograd.Function):
    """Passes no gradient on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_no_gradient_stays_none() -> None:
    """Zeros in its place would be NaN where the tensors are."""
    x, weight = torch.randn(200, 300), torch.randn(7, 300, requires_grad=True)
    x[0, 0] = math.nan
    x.requires_grad_()
    target = torch.zeros(200, dtype=torch.long)
    for output in (
        torchext.linear_relu(x, weight),
        torchext.cross_entropy(x * 1, target),
        torchext.cross_entropy(x * 1, target, reduction="none"),
        torchext.linear_cross_entropy(x, weight, target),
        torchext.linear_cross_entropy(x, weight, target, softcap=3.0),
    ):
        assert output.requires_grad
        total = _NoGradient.apply(output).sum()
        assert torch.autograd.grad(total, (x, weight), allow_unused=True) == (None, None)

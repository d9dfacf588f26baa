"""linear_cross_entropy by every backend of every device, against float64.

The whole contract on the CPU is in test_linear_cross_entropy.py; routes that only the Triton
kernels have are in triton_interpreted.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import torchext
from torchext import _backend, _triton, reference
from torchext.testing import assert_drop_in, derivatives

# (rows, features, classes): ragged, aligned, one row, a row in registers and one that is not.
SHAPES = [(7, 5, 11), (32, 16, 64), (1, 3, 2), (19, 33, 130), (3, 8, 17000)]
# Of the norm, beyond the error that eager makes in the dtype: one rounding of the result. Of a few
# values the errors are a matter of luck: low precision is judged on the larger shapes.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
REDUCTIONS = ("none", "mean", "sum")
OP = "linear_cross_entropy"


def sized(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int, int]:
    rows, features, classes = shape
    return shape if dtype.itemsize > 2 else (max(rows, 12), max(features, 16), max(classes, 40))


def leaves(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, biased: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, features, classes = shape
    tensors = [
        torch.randn(rows, features, device=device),
        torch.randn(classes, features, device=device) / features**0.5,
        torch.randn(classes, device=device),
    ]
    x, w, b = (tensor.to(dtype).requires_grad_() for tensor in tensors)
    return x, w, b if biased else None


def indices(shape: tuple[int, int, int], device: str) -> Tensor:
    target = torch.randint(shape[2], shape[:1], device=device)
    target[shape[0] // 2 :: 5] = -100 if shape[0] > 1 else 0
    return target


def check(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Value and gradients of input, weight and bias, for a random upstream gradient."""
    x, w, b = tensors
    call = ((x, w, target), {"linear_bias": b, **options})
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        with torch.no_grad():
            plain = torchext.linear_cross_entropy(*call[0], **call[1])
        upstream = torch.randn_like(plain)
        ours, eager = (
            derivatives(function, *call, upstream)
            for function in (torchext.linear_cross_entropy, reference.linear_cross_entropy)
        )
    exact_call, exact_upstream = pytree.tree_map(widened, (call, upstream))
    truth = derivatives(reference.linear_cross_entropy, *exact_call, exact_upstream)
    assert len(ours) == 1 + sum(t is not None and t.requires_grad for t in tensors)
    for actual, stock, exact in zip([plain, *ours], [eager[0], *eager], [truth[0], *truth],
                                    strict=True):  # fmt: skip
        assert (actual.dtype, actual.shape) == (stock.dtype, stock.shape)
        assert torch.equal(actual.isnan(), stock.isnan())
        error, own = ((t.double() - exact).nan_to_num().norm() for t in (actual, stock))
        assert error <= own + TOLERANCES[autocast or x.dtype] * (
            exact.nan_to_num().norm() + 1e-3
        ), options


def widened(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().double().requires_grad_(leaf.requires_grad)
    return leaf


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_class_indices(
    device: str, backend: str, dtype: torch.dtype, shape: tuple[int, int, int], reduction: str,
    biased: bool,
) -> None:  # fmt: skip
    shape = sized(shape, dtype)
    target = indices(shape, device)
    check(leaves(shape, dtype, device, biased), target, reduction=reduction)
    weight = (torch.rand(shape[2], device=device) + 0.1).to(dtype)
    check(
        leaves(shape, dtype, device, biased), target.int(), weight=weight, reduction=reduction,
        label_smoothing=0.2,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities(
    device: str, backend: str, dtype: torch.dtype, shape: tuple[int, int, int], reduction: str
) -> None:
    shape = sized(shape, dtype)
    target = torch.randn(shape[0], shape[2], device=device).softmax(1).to(dtype)
    weight = (torch.rand(shape[2], device=device) + 0.1).to(dtype)
    tensors = leaves(shape, dtype, device)
    check(tensors, target, weight=weight, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("inner", [(3,), (2, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_inner_dimensions(
    device: str,
    backend: str,
    dtype: torch.dtype,
    dense: bool,
    reduction: str,
    inner: tuple[int, ...],
) -> None:
    rows, features, classes, size = 19, 16, 130, torch.Size(inner).numel()
    x, w, b = leaves((rows, features, classes * size), dtype, device)
    assert b is not None
    with torch.no_grad():
        w, b = w.view(classes, *inner, features), b.view(classes, *inner)
    if dense:
        target = torch.randn(rows, classes, *inner, device=device).softmax(1).to(dtype)
    else:
        target = indices((rows * size, features, classes), device).view(rows, *inner)
    tensors = (x, w.requires_grad_(), b.requires_grad_())
    check(tensors, target, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(device: str, backend: str, reduction: str, narrow: torch.dtype) -> None:
    shape = (32, 16, 64)
    tensors = leaves(shape, torch.float32, device)
    weight = torch.rand(64, device=device) + 0.1
    check(tensors, indices(shape, device), narrow, reduction=reduction, weight=weight)


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_asked_for(
    device: str, backend: str, wanted: int, reduction: str
) -> None:
    shape = (9, 6, 21)
    tensors = leaves(shape, torch.float32, device)
    for bit, tensor in enumerate(tensors):
        assert tensor is not None
        tensor.requires_grad_(bool(wanted >> bit & 1))
    check(tensors, indices(shape, device), reduction=reduction)


def test_targets_of_nothing_but_ignored_ones(device: str, backend: str, dtype: torch.dtype) -> None:
    shape = (5, 4, 9)
    for reduction in REDUCTIONS:
        target = torch.full((5,), 3, device=device)
        check(leaves(shape, dtype, device), target, reduction=reduction, ignore_index=3)


def test_strides_and_uint8(device: str, backend: str) -> None:
    x, w, b = leaves((12, 10, 30), torch.float32, device)
    assert b is not None
    target = torch.randint(30, (12, 2), device=device, dtype=torch.uint8)[:, 0]
    with torch.no_grad():
        views = (
            x.t().contiguous().t(),
            torch.cat((w, w), 1)[:, ::2],
            torch.stack((b, b), 1)[:, 0],
        )
    check(tuple(view.requires_grad_() for view in views), target)  # type: ignore[arg-type]


def test_twice_through_one_graph(device: str, backend: str) -> None:
    """The gradients that forward made are scaled in place: only where no one sees them again."""
    x, w, _ = leaves((9, 4, 7), torch.float32, device)
    target = indices((9, 4, 7), device)
    loss = 3 * torchext.linear_cross_entropy(x, w, target)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # the caller's own
    for again, gradient in zip(torch.autograd.grad(loss, (x, w)), kept, strict=True):
        assert torch.equal(again, gradient)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, w))


def test_second_derivatives_are_stocks(device: str, backend: str) -> None:
    x, w, b = leaves((4, 3, 5), torch.float64, device)
    assert_drop_in(
        torchext.linear_cross_entropy, reference.linear_cross_entropy, x, w,
        indices((4, 3, 5), device), linear_bias=b, order=2,
    )  # fmt: skip


def test_which_implementation_serves(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eager definition is for the eager backend alone."""
    called: list[str] = []

    def definition(*args: Any, **kwargs: Any) -> Tensor:
        called.append("definition")
        return F.cross_entropy(F.linear(*args[:2]), args[2])

    monkeypatch.setattr(reference, "linear_cross_entropy", definition)
    x, w, _ = leaves((300, 20, 500), torch.float32, device)
    loss = torchext.linear_cross_entropy(x, w, indices((300, 20, 500), device))
    loss.backward()
    no_kernel = backend == "native" and device == "cuda" and not _triton.has_native_cuda(OP)
    assert called == (["definition"] if backend == "eager" or no_kernel else [])
    place = _backend.route(x, w, op=OP)
    assert backend != "triton" or place == _backend.TRITON

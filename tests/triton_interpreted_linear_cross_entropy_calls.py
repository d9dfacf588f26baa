"""How calls of linear_cross_entropy reach the Triton kernels, and what they leave in memory.

Run by test_triton.py, in a process with TRITON_INTERPRET=1: interpreted, on CPU tensors.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_linear_cross_entropy_backends import OP, check, indices, leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchext.triton_kernels import linear_cross_entropy
from torchext.triton_kernels import linear_cross_entropy_chunks as chunks

import torchext
from torchext import _backend, _triton, reference
from torchext.ops import extras_autograd, linear_cross_entropy_gpu

OPS = torch.ops.torchext_triton
WAYS = ("forward", "backward")


@pytest.fixture
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other implementation of ours may serve a call; the definition only as the truth."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("not the kernels served the call")

    for name in ("_unserved", "_forward_op", "_kernel", "_differentiable", "_cuda_call"):
        monkeypatch.setattr(sys.modules[f"torchext.ops.{OP}"], name, refuse)
    monkeypatch.setattr(extras_autograd, "attempt", refuse)


@pytest.mark.parametrize("inner", [(1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inner_dimensions_by_several_chunks(
    kernels_alone: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    reduction: str,
    inner: tuple[int, ...],
) -> None:
    """Contiguous and not; tiles, which do not serve them, are asked for."""
    monkeypatch.setattr(chunks, "MIN_ROWS", 8)
    monkeypatch.setattr(chunks, "_ALIGNED_ROWS", 4)
    monkeypatch.setattr(chunks, "BUFFER_BYTES", 1)
    rows, features, classes = 21, 16, 33
    target = torch.randint(classes, (rows, *inner))
    target[3] = -100
    dense = torch.randn(rows, classes, *inner).softmax(1).to(dtype)
    weight = (torch.rand(classes) + 0.1).to(dtype)
    for of, options in ((target, {}), (dense, {"weight": weight, "label_smoothing": 0.1})):
        x, w, b = leaves((rows, features, classes * torch.Size(inner).numel()), dtype, "cpu")
        assert b is not None
        with torch.no_grad():
            w = w.reshape(classes, *inner, features).transpose(0, -1).contiguous()
            w = w.transpose(0, -1).requires_grad_()
            b = b.view(classes, *inner).requires_grad_()
        with torchext.use_backend("triton"), linear_cross_entropy.use_schedule("tiles"):
            check((x, w, b), of, reduction=reduction, **options)


@pytest.mark.parametrize("schedule", ["chunks", "tiles"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_autocast(kernels_alone: None, reduction: str, schedule: str) -> None:
    """The logits narrow, the loss and the weights of the classes wide."""
    shape = (21, 16, 40)
    with torchext.use_backend("triton"), linear_cross_entropy.use_schedule(schedule):
        for options in ({}, {"weight": torch.rand(40) + 0.1, "label_smoothing": 0.1}):
            tensors = leaves(shape, torch.float32, "cpu")
            check(
                tensors, indices(shape, "cpu"), torch.float16, reduction=reduction, **options
            )  # fmt: skip


def test_the_operators_give_the_loss_as_wide_as_the_sums() -> None:
    x, w, _ = (t if t is None else t.detach() for t in leaves((9, 4, 12), torch.float16, "cpu"))
    target, none = torch.randint(12, (9,)), [False] * 3
    for reduction in (0, 1):
        loss, stats, *_ = OPS.linear_cross_entropy_forward(
            x, w, target, None, None, reduction, -100, 0.0, *none
        )
        assert loss.dtype == stats.dtype == torch.float32
        with pytest.raises(RuntimeError, match="of dtype torch.float32"):
            OPS.linear_cross_entropy_backward(
                loss.half(), x, w, target, None, None, stats, reduction, -100, 0.0, *[True] * 3
            )


@pytest.mark.parametrize("triton", [False, True])
def test_what_the_cuda_library_does_not_take(monkeypatch: pytest.MonkeyPatch, triton: bool) -> None:
    """Inner dimensions, and the weights of classes that autocast leaves wide, are Triton's."""
    place = sys.modules[f"torchext.ops.{OP}"].place_of
    monkeypatch.setattr(_triton, "serves", lambda tensor: triton)
    with FakeTensorMode():
        x = torch.empty(4, 5, device="cuda")
        flat = torch.empty(7, 5, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        deep = torch.empty(7, 2, 5, device="cuda"), torch.empty(4, 2, dtype=torch.int64)
        narrow, wide = [tensor.half() for tensor in (x, flat[0])], torch.empty(7, device="cuda")
        for served in (_backend.OPERATOR, _backend.TRITON, _backend.EAGER):
            monkeypatch.setattr(_backend, "route", lambda *_, served=served, **__: served)
            assert place(False, x, *flat, None, None) == served
            assert place(False, x, *flat, None, wide) == served
            for name in ("auto", "native"):
                instead = _backend.TRITON if triton and name == "auto" else _backend.EAGER
                expected = instead if served == _backend.OPERATOR else served
                with torchext.use_backend(name):
                    assert place(False, x, *deep, None, None) == expected
                    assert place(False, *narrow, flat[1], None, wide) == expected


@pytest.mark.parametrize("by", ["triton", "library"])
def test_gradients_are_scaled_in_their_own_memory_and_nobody_looks(
    monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Also inside autocast. The library's operators by their CPU kernel, which serves as well."""
    op = sys.modules[f"torchext.ops.{OP}"]
    native = torch.ops.torchext
    made: list[int] = []

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        made[:] = [gradient.data_ptr() for gradient in output[2:]]
        op._setup_context(ctx, inputs, output)

    if by == "library":
        operators = [getattr(native, f"linear_cross_entropy_{n}").default for n in WAYS]
        call = linear_cross_entropy_gpu.library(setup, op._backward, *operators, "CPU")
    else:
        monkeypatch.setattr(_triton, "register", lambda _, name, fake: registered(name))
        monkeypatch.setattr(torch.library, "register_autograd", lambda *_, **__: None)
        call = linear_cross_entropy_gpu.triton(setup, op._backward)
    x, w, b = leaves((21, 6, 40), torch.float32, "cpu")
    target = indices((21, 6, 40), "cpu")
    arguments = (x, w, target, b, None, 1, -100, 0.0, True, True, True)
    truth = reference.linear_cross_entropy(x, w, target, b, None, "mean", None, 0.0)
    exact = torch.autograd.grad(-3 * truth, (x, w, b))
    again = torch.autograd.grad(call(*arguments), (x, w, b), torch.tensor(-3.0), retain_graph=True)
    torch.testing.assert_close(again, exact)
    monkeypatch.setattr(Tensor, "item", lambda _: pytest.fail("the host looked"))
    for context in (nullcontext(), torch.autocast("cpu", torch.float16)):
        with context:
            found = torch.autograd.grad(call(*arguments), (x, w, b), torch.tensor(-3.0))
        assert [gradient.data_ptr() for gradient in found] == made
        torch.testing.assert_close(found, exact)


def registered(name: str) -> tuple[Any, Any]:
    """What `_triton.register` gave for an operator of this op."""
    return getattr(OPS, name).default, getattr(linear_cross_entropy, name)

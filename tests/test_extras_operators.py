"""The operators of the extras: what they refuse, opcheck, and shapes that have no kernel."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_extras import truth
from test_extras_kernel import FLOOR, OPERATOR
from torch import Tensor

FORWARD = torch.ops.torchext.cross_entropy_extras_forward.default
ROWS = torch.ops.torchext.cross_entropy_extras_rows.default
MASS = torch.ops.torchext.cross_entropy_mass.default
PRODUCT = torch.ops.torchext.product_out.default


def rows_of(dtype: torch.dtype, rows: int = 7, classes: int = 20) -> dict[str, Any]:
    """Arguments of the kernel's operator."""
    return {
        "input": torch.randn(rows, classes).to(dtype),
        "target": torch.randint(classes, (rows,)),
        "weight": torch.rand(classes),
        "grad_loss": torch.randn(rows),
        "grad_lse": torch.randn(rows),
        "gradient": torch.empty(rows, classes, dtype=dtype),
        "loss": torch.empty(rows),
        "stats": torch.empty(2, rows),
        "argmax": torch.empty(rows, dtype=torch.int64),
    }


def call_rows(given: dict[str, Any]) -> None:
    names = ("input", "target", "weight")
    last = ("grad_loss", "grad_lse", "gradient", "loss", "stats", "argmax")
    options = (-100, 0.1, 0.2, 5.0, 1.5)
    ROWS(*(given[name] for name in names), *options, *(given[name] for name in last))


def test_what_the_operators_refuse() -> None:
    call_rows(rows_of(torch.float32))
    wrong: dict[str, Tensor] = {
        "input": torch.randn(7, 15),
        "target": torch.randint(20, (6,)),
        "weight": torch.rand(19),
        "grad_loss": torch.randn(6),
        "grad_lse": torch.randn(7).double(),
        "gradient": torch.empty(20, 7).t(),
        "loss": torch.empty(14)[::2],
        "stats": torch.empty(7, 2).t(),
        "argmax": torch.empty(7, dtype=torch.int32),
    }
    for name, value in wrong.items():
        with pytest.raises(RuntimeError, match="^cross_entropy_extras_rows: expected"):
            call_rows({**rows_of(torch.float32), name: value})
    given = rows_of(torch.float32)
    given["target"][3] = 20
    given["loss"].fill_(7.0)
    with pytest.raises(IndexError, match="Target 20 is out of bounds"):
        call_rows(given)
    assert (given["loss"] == 7.0).all()
    for bad, weight in ((torch.randn(5), None), (torch.zeros(5).long(), torch.rand(3))):
        with pytest.raises(RuntimeError, match="^cross_entropy_mass: expected"):
            MASS(bad, weight, 4, -100)


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = rows_of(dtype)
        logits, target = given["input"], given["target"]
        options = (-100, 0.1, 0.2, 5.0, 1.5, False)
        for reduction, save in ((0, False), (1, True), (2, False)):
            wanted = (reduction == 0, reduction == 1, save)
            call = (logits, target, given["weight"].to(dtype), reduction, *options, *wanted)
            torch.library.opcheck(FORWARD, call)
        torch.library.opcheck(MASS, (target, None, 20, -100))
        kept = (given[name] for name in ("grad_loss", "grad_lse", "gradient", "loss", "stats"))
        call = (logits, target, given["weight"], *options[:5], *kept, given["argmax"])
        torch.library.opcheck(ROWS, call)
        plain = (target, None, given["weight"].to(dtype))
        for reduction in (0, 1):
            came = (reduction == 1, False, False)
            end = (reduction, False, False, False, *came)
            torch.library.opcheck(OPERATOR, (logits, None, *plain, *options[:5], *end))


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_product_out(dtype: torch.dtype) -> None:
    # Those of one row or one inner step, some of several visits of out, have paths of their own.
    # Seven long sums of any sign are not all near 0 by chance, as three were now and then.
    shapes = [(1, 5, 3), (1, 2100, 100), (1, 2100, 7), (6, 1, 70), (40, 70, 33), (300, 200, 500)]
    shapes.append((3, 2100, 70))
    for (rows, inner, columns), turned in itertools.product(shapes, (False, True)):
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        if turned:
            right = right.t().contiguous().t()
        bias, before = torch.randn(columns).to(dtype), torch.randn(rows, columns).to(dtype)
        for given, accumulate in ((None, False), (bias, False), (None, True)):
            out = before.clone()
            PRODUCT(left, right, given, accumulate, out)
            expected = left.double() @ right.double()
            expected += before.double() if accumulate else 0 if given is None else bias.double()
            error = (out.double() - expected).norm()
            assert error <= 2 * FLOOR[dtype] * expected.norm()
            call = (left, right, given, accumulate, out)
            torch.library.opcheck(PRODUCT, call)
    for wrong in (
        (left, right.t(), None, False, out),
        (left, right.double().half(), None, False, out.double()),
        (left, right, bias[1:], False, out),
        (left, right, bias, True, out),
    ):
        with pytest.raises(RuntimeError, match="^product_out: expected"):
            PRODUCT(*wrong)


def test_no_rows() -> None:
    """A captured batch may be empty: no loss, and a gradient without elements."""
    tensors = (torch.randn(0, 40), None, torch.empty(0, dtype=torch.int64), None, None)
    options, wanted = (-100, 0.0, 0.1, 3.0, 1.0), (True, False, False)
    loss, _, _, stats, mass, grad, *_ = OPERATOR(
        *tensors, *options, 2, False, False, False, *wanted
    )
    assert loss == 0
    assert grad.shape == (0, 40)
    backward = torch.ops.torchext.cross_entropy_extras_backward
    again = backward(torch.ones(()), None, *tensors, stats, mass, *options, *wanted)
    assert again[0].shape == (0, 40)


def test_the_operator_has_every_shape_of_logits() -> None:
    """Without a kernel too: few classes, inner dimensions, transposed rows."""
    for logits in (torch.randn(30, 9), torch.randn(4, 20, 3, 2), torch.randn(20, 30).t()):
        shape = logits.shape[:1] + logits.shape[2:]
        target = torch.randint(logits.shape[1], shape)
        options = (-100, 0.1, 0.2, 5.0, 1.5, 1, False, True, True)
        leaf = logits.clone().requires_grad_()
        loss, lse, argmax, *_ = OPERATOR(
            leaf, None, target, None, None, *options, False, False, False
        )
        flat = logits.movedim(1, -1).flatten(0, -2).double().requires_grad_()
        expected = truth(
            flat, target.flatten(), label_smoothing=0.1, z_loss=0.2, softcap=5.0, logit_scale=1.5,
            return_lse=True, return_argmax=True,
        )  # fmt: skip
        upstream = [torch.randn(()), torch.randn(shape)]
        (grad,) = torch.autograd.grad([loss, lse], leaf, upstream)
        doubles = [upstream[0].double(), upstream[1].flatten().double()]
        (exact,) = torch.autograd.grad(expected[:2], flat, doubles)
        near = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(loss.double(), expected[0], **near)
        torch.testing.assert_close(lse.flatten().double(), expected[1], **near)
        assert torch.equal(argmax.flatten(), expected[2])
        found = grad.movedim(1, -1).flatten(0, -2).double()
        torch.testing.assert_close(found, exact, **near)

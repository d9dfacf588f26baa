"""linear_relu in bfloat16 and float16, whose products are sums in float32 that are rounded once.

By our own kernels (csrc/cpu/product*.cpp), pairs among them, at all their paths; or the library's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torchext
from torchext import _native, reference

NARROW = [torch.bfloat16, torch.float16]

# rows, in_features, out_features
SHAPES = [
    (1, 7, 9),  # a batch of one
    (1, 64, 40),
    (1, 1300, 300),  # of two visits
    (16, 63, 65),
    (13, 62, 10),  # panels of one vector
    (100, 784, 64),  # the left matrix in place
    (301, 513, 70),  # odd sums, that no pairs serve forward
    (1030, 2200, 300),  # rows for all threads, sums of two visits, panels packed together
    (700, 600, 1050),  # rows with panels of each thread's own
    (4099, 96, 65),
    (4200, 2100, 40),  # more rows than sums between visits are kept of
    (20, 2100, 4200),  # and more columns
]


def gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_no_larger_error_than_eagers(
    dtype: torch.dtype, shape: tuple[int, int, int], strided: bool
) -> None:
    rows, inner, columns = shape
    input = torch.randn(rows, inner, 2 if strided else 1).to(dtype)[..., 0]
    weight = (torch.randn(columns, inner) / inner**0.5).to(dtype)
    if strided:
        weight = weight.t().contiguous().t()
    bias, upstream = torch.randn(columns).to(dtype), torch.randn(rows, columns).to(dtype)
    tensors = [input, weight, bias]
    ours = gradients(torchext.linear_relu, tensors, upstream)
    eager = gradients(reference.linear_relu, tensors, upstream)
    wide = [tensor.double() for tensor in tensors]
    truth = gradients(reference.linear_relu, wide, upstream.double())
    # Each gradient is that of the mask that the rounded output gives: near 0 it can be another one.
    mask = (ours[0] > 0).double() * upstream.double()
    own = [truth[0], mask @ wide[1], mask.t() @ wide[0], mask.sum(0)]
    mask = (eager[0] > 0).double() * upstream.double()
    stock = [truth[0], mask @ wide[1], mask.t() @ wide[0], mask.sum(0)]
    for actual, expected, theirs, of_theirs in zip(ours, own, eager, stock, strict=True):
        assert actual.dtype == dtype
        # Both round once: half an ulp at the most of each element, and as much by chance of it.
        once = torch.finfo(dtype).eps / 4
        assert error(actual, expected) <= max(error(theirs, of_theirs) * 1.05, once)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    input, weight = torch.randn(40, 100).to(dtype), torch.randn(70, 100).to(dtype)
    input[3, 5] = value
    expected = reference.linear_relu(input, weight)
    actual = torchext.linear_relu(input, weight)
    torch.testing.assert_close(actual[3], expected[3], equal_nan=True)
    # At the baseline the product is the library's, and oneDNN with AMX (torch 2.13) has the row
    # before not finite, too, in eager as in ours.
    library = _native.simd_level() in ("none", "baseline")
    finite = int(expected.isfinite().all(1).sum()) if library else 39
    assert actual.isfinite().all(1).sum() == finite


def test_bits_of_pairs_are_not_read_as_numbers() -> None:
    """Half of a pair may look like a float32 that is subnormal or no number."""
    tiny, odd = (
        torch.tensor([1e-39, 0.0, -0.0]).bfloat16(),
        torch.tensor([1.0, 3.0, -5.0]).bfloat16(),
    )
    input = torch.stack([odd, tiny], -1).reshape(1, 6)  # tiny in the upper halves
    weight = torch.ones(33, 6).bfloat16()
    assert torch.set_flush_denormal(True)
    try:
        actual = torchext.linear_relu(-input, weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(actual, torch.ones(1, 33).bfloat16())

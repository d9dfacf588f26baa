"""Sums over many rows of one sign, where a running sum loses digits: random data do not show it."""

import pytest
import torch
import torch.nn.functional as F

import torchext
from torchext.testing import assert_drop_in

ROWS = 1 << 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bias_gradient_of_linear_relu(dtype: torch.dtype) -> None:
    input, weight = torch.zeros(ROWS, 1, dtype=dtype), torch.ones(3, 1, dtype=dtype)
    bias = torch.rand(3).add(0.1).to(dtype).requires_grad_()
    grad_output = torch.rand(1, 3).to(dtype).expand(ROWS, 3)
    assert_drop_in(
        torchext.linear_relu,
        lambda *args: F.relu(F.linear(*args)),
        input,
        weight,
        bias,
        grad_output=grad_output,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [3, 20])
def test_bias_gradient_of_linear_cross_entropy(classes: int, dtype: torch.dtype) -> None:
    input, weight = torch.zeros(ROWS, 1, dtype=dtype), torch.ones(classes, 1, dtype=dtype)
    bias = torch.rand(classes).to(dtype).requires_grad_()
    target = torch.zeros(ROWS, dtype=torch.int64)
    assert_drop_in(
        lambda bias: torchext.linear_cross_entropy(input, weight, target, linear_bias=bias),
        lambda bias: F.cross_entropy(
            F.linear(input.to(bias.dtype), weight.to(bias.dtype), bias), target
        ),
        bias,
    )

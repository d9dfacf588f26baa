"""The definition of linear_cross_entropy's registered operators, and their fakes.

The loss has the dtype of the kernels' sums: float32, or float64 for float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchext import reference
from torchext.ops.cross_entropy_fake import REDUCTIONS, to_check


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def definition(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Computes what the operator does, in torch's ops: under autocast it is what those do."""
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    sums = wide(input.dtype)
    return reference.cross_entropy(
        logits.to(sums),
        target.to(sums) if target.is_floating_point() else target,
        None if weight is None else weight.to(sums),
        ignore_index,
        REDUCTIONS[reduction],
        label_smoothing,
    )


def _gradients(
    input: Tensor, linear_weight: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:-1])
    first, second, third = (
        input.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )
    return first, second, third


def forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    """Returns loss, stats and the wanted gradients."""
    options = (reduction, ignore_index, label_smoothing)
    checked = to_check(weight, target, linear_weight.shape[0])
    # Raises where shapes do not go together.
    definition(input, linear_weight, target, linear_bias, checked, *options)
    positions = (input.shape[0], *linear_weight.shape[1:-1])
    loss = input.new_empty(positions if reduction == 0 else (), dtype=wide(input.dtype))
    stats = loss.new_empty((2, input.shape[0] * linear_weight.shape[1:-1].numel()))
    return loss, stats, *_gradients(input, linear_weight, wanted)


def backward(
    grad_output: Tensor, input: Tensor, linear_weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the wanted gradients."""
    return _gradients(input, linear_weight, arguments[-3:])

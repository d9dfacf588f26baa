"""The definition of linear_cross_entropy's registered operators, and their fakes.

The loss has the dtype of the kernels' sums: float32, or float64 for float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchext import _autograd, reference
from torchext.ops.cross_entropy_fake import REDUCTIONS, to_check

_HEAD_CLASSES, _HEAD_FEATURES = 16, 1024


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


def kept_forward(
    input: Tensor, linear_weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss, stats and logits, whose rows are as the kernel's products leave them."""
    loss, stats, *_ = forward(input, linear_weight, *arguments, False, False, False)
    columns = linear_weight.shape[:-1].numel()
    narrow = (  # NarrowHead::serves of csrc/cpu/narrow_head.h, whose rows are a vector each
        linear_weight.dim() == 2
        and input.dtype in (torch.float32, torch.float64)
        and 0 < columns <= _HEAD_CLASSES
        and 0 < input.shape[1] <= _HEAD_FEATURES
        and input.stride(1) == linear_weight.stride(1) == 1
    )
    return loss, stats, input.new_empty((input.shape[0], _HEAD_CLASSES if narrow else columns))


def kept_backward(
    grad_output: Tensor, logits: Tensor, input: Tensor, linear_weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the wanted gradients."""
    return _gradients(input, linear_weight, arguments[-3:])


def gradients(
    ctx: Any, tensors: Sequence[Tensor | None], needed: Sequence[bool], grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the definition: see `_autograd.reference_gradients`.

    Args:
        ctx: has the options.
        tensors: input, linear_weight, target, linear_bias and weight.
        needed: which of three gradients are.
        grad_loss: the gradient of the loss.
    """
    input, linear_weight, target, linear_bias, weight = tensors

    def loss(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        assert target is not None
        return definition(x, w, target, b, weight, *ctx.options)

    return _autograd.reference_gradients(
        loss, (input, linear_weight, linear_bias), needed, grad_loss
    )


def backward(
    grad_output: Tensor, input: Tensor, linear_weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the wanted gradients."""
    return _gradients(input, linear_weight, arguments[-3:])

"""The extras of given logits by a kernel: which calls it serves.

Siblings: torchext/ops/extras.py (the definition), torchext/ops/extras_autograd.py (the node).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchext import _backend
from torchext.ops.cross_entropy_fake import REDUCTIONS
from torchext.ops.extras import Extras, Result
from torchext.ops.extras_autograd import forward, plain, run
from torchext.ops.extras_chunks import Options
from torchext.ops.extras_source import kernel_of
from torchext.ops.linear_cross_entropy_call import go_together
from torchext.ops.linear_cross_entropy_fake import wide


def attempt(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    extras: Extras,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    overwriting: Callable[..., Tensor | None] | None = None,
) -> Result | None:
    """Computes a loss of given logits by a kernel; None where none serves the call.

    Args:
        input: the logits (N, C).
        target: class indices (N) or probabilities (N, C).
        weight: (C).
        extras: what is asked for.
        reduction: of the loss.
        ignore_index: of the loss.
        label_smoothing: of the loss.
        overwriting: ``overwriting(run, input, target, weight, ...)``, a node of autograd around a
            `run` that leaves the gradient in input's place, or None where it must not.

    Raises:
        IndexError: where a class index is neither in [0, C) nor `ignore_index`.
    """
    ordinary = _backend.ordinary(any_backend=True, autocast=True)
    if (
        input.dim() != 2
        or any(isinstance(extra, Tensor) for extra in extras)
        or not plain(input, target, weight, ordinary=ordinary)
        or not kernel_of(input, input.shape[1:], input.shape[0])
    ):
        return None
    autocast = _backend.autocast_dtype(input) is not None
    if autocast:
        input, target = (_backend.cast(t, torch.float32) for t in (input, target))
        weight = None if weight is None else _backend.cast(weight, torch.float32)
    if not (
        input.shape[0] > 0  # not len: export would make it a constant
        and input.stride(1) == 1
        and go_together(input, None, target, None, weight, input.dtype)
        and (ignore_index < 0 or not target.is_floating_point())
        and not label_smoothing > 1
    ):
        return None
    smoothing = label_smoothing if label_smoothing > 0 else 0.0
    dtype = input.dtype if ordinary else wide(input.dtype)
    options = Options(extras, reduction, ignore_index, smoothing, dtype)
    # As without extras: where it is float16, the gradient would underflow.
    at_once = options.at_once and input.dtype is not torch.float16
    if overwriting is not None and ordinary and not autocast and at_once:
        result = _overwritten(overwriting, input, target, weight, options)
        if result is not None:
            return result
    loss, *others = run(ordinary, input, None, None, target, weight, options)
    loss = loss.to(input.dtype)
    return (loss, *others) if others else loss


def _overwritten(
    overwriting: Callable[..., Tensor | None],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
) -> Result | None:
    """The loss and argmax where a gradient is wanted of dense logits, in their place; or None."""
    if not (input.requires_grad and torch.is_grad_enabled() and input.is_contiguous()):
        return None
    others: list[Tensor] = []

    def compute(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> Tensor:
        needed = (True, False, False)
        found = forward(needed, input, None, None, target, weight, options, True)
        others.extend(value for value in found[2:3] if value is not None)  # the argmax
        return found[0]

    code = REDUCTIONS.index(options.reduction)
    arguments = (code, options.ignore_index, options.label_smoothing)
    loss = overwriting(compute, input, target, weight, *arguments)
    if loss is None:
        return None
    return (loss, *others) if others else loss

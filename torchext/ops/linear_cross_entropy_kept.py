"""linear_cross_entropy with the logits kept for backward, where they are few.

Forward cannot make the gradients of reduction "none", nor float16's (a mean's would underflow), and
bfloat16's only where that of the loss is a power of two (else they are rounded twice). Backward
would make the logits again: a fourth product beside three, or a sixth. So few logits as one chunk
of the CPU kernel's buffer holds are kept; the gradients are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchext import _autograd, _native
from torchext.ops import linear_cross_entropy_fake as fakes

_MOST_BYTES = 8 << 20  # kSmallBytes of csrc/cpu/linear_cross_entropy.cpp
# Multiplications from which on a mean in bfloat16 is one of those. Of eager's time, forward and
# backward, the gradients made by forward, those for a loss times 0.3, and by kept logits: 100 x 256
# x 64 0.67, 0.85 and 0.67, 512 x 128 x 64 0.60, 0.96 and 0.64, 256 x 256 x 100 0.61, 1.00 and 0.65,
# 100 x 512 x 500 0.78, 1.53 and 0.88, 512 x 512 x 1000 0.91, 1.72 and 0.90 (2 cores of Zen 4).
_MANY_OF_BFLOAT16 = 1 << 22


def keeps(input: Tensor, linear_weight: Tensor, reduction: int) -> bool:
    """Whether backward needs the logits, or may, and they are few enough.

    Args:
        input: (N, H).
        linear_weight: (C, H) or (C, D, H).
        reduction: as the operator has it.
    """
    rows, elements = input.size(0), linear_weight.numel()
    many = input.dtype is torch.bfloat16 and rows * elements >= _MANY_OF_BFLOAT16
    if not (reduction == 0 or many or input.dtype is torch.float16):
        return False
    return rows * (elements // input.size(1)) * input.itemsize <= _MOST_BYTES


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[5:]
    if not ctx.owned:
        ctx.mark_non_differentiable(*output[1:])
    ctx.to_save = (*inputs[:5], *output[1:])  # save_for_backward, a call less


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    first, second, _, third, *_ = ctx.needs_input_grad
    needed = (first, second, third)
    *tensors, stats, logits = ctx.saved_tensors
    if _autograd.wants_reference(grad_loss, ctx.owned):
        grads = fakes.gradients(ctx, tensors, needed, grad_loss)
    else:
        run = _backward_kernel if _autograd.plain_backward(ctx, grad_loss) else _backward_op
        grad_loss = grad_loss.resolve_neg()
        made = run(grad_loss, logits, *tensors, stats, *ctx.options, *needed)
        grads = _autograd.wanted(made, needed)
    first, second, third = grads
    return first, second, None, third, None, None, None, None


if not _native.cpu_missing:
    torch.library.register_fake("torchext::linear_cross_entropy_kept_forward", fakes.kept_forward)
    torch.library.register_fake("torchext::linear_cross_entropy_kept_backward", fakes.kept_backward)
    _forward_op = torch.ops.torchext.linear_cross_entropy_kept_forward.default
    _backward_op = torch.ops.torchext.linear_cross_entropy_kept_backward.default
    _backward_kernel = _autograd.kernel(_backward_op)
    differentiable = _autograd.define(_forward_op, _setup_context, _backward)

"""cross_entropy by the Triton kernels: their operators, and what an eager call takes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchext import _autograd, _backend, _triton
from torchext.ops import cross_entropy_fake

_OP = "cross_entropy"


def define(
    setup_context: _autograd.SetupContext,
    backward: _autograd.Backward,
    inplace: Callable[..., Tensor],
    may_overwrite: Callable[[Tensor, Tensor], bool],
) -> Callable[..., Tensor]:
    """Registers the operators with the op's one formula; returns the function that serves a call.

    Args:
        setup_context: the formula's, as `_autograd.define` has it.
        backward: the formula's; ``backward(..., kernel=...)`` takes that backward kernel.
        inplace: ``inplace(kernel, input, ...)``: the gradient in the place of the logits.
        may_overwrite: whether that leaves the target alone.
    """
    fakes = cross_entropy_fake
    forward_op, forward = _triton.register(_OP, "cross_entropy_forward", fakes.forward)
    _, forward_ = _triton.register(_OP, "cross_entropy_forward_", fakes.forward_)
    backward_op, _ = _triton.register(_OP, "cross_entropy_backward", fakes.backward)

    def by_triton(ctx: Any, *grads: Tensor | None) -> Any:
        return backward(ctx, *grads, kernel=backward_op)

    differentiable = _autograd.define(forward_op, setup_context, by_triton, forward)

    def call(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        code: int,
        ignore_index: int,
        label_smoothing: float,
        inplace_backward: bool,
    ) -> Tensor:
        if not _backend.ordinary(any_backend=True):
            return forward_op(  # type: ignore[no-any-return]
                input, target, weight, code, ignore_index, label_smoothing, False
            )[0]
        if type(ignore_index) is bool:
            raise TypeError
        input, target = input.resolve_neg(), target.resolve_neg()
        weight = None if weight is None else weight.resolve_neg()
        arguments = (input, target, weight, code, ignore_index, label_smoothing)
        if not (input.requires_grad and torch.is_grad_enabled()):
            return forward(*arguments, False)[0]  # type: ignore[no-any-return]
        # In float16 a mean's gradient underflows before a loss scale can lift it.
        at_once = code != 0 and input.dtype is not torch.float16
        if inplace_backward and at_once and input.is_contiguous() and may_overwrite(input, target):
            return inplace(forward_, *arguments)
        # A row too large for the registers is read again for its gradient: in backward, then.
        return differentiable(*arguments, at_once and _triton.kernels(_OP).one_pass(input))

    return call

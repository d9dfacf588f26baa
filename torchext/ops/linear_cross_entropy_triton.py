"""linear_cross_entropy by the Triton kernels: their operators, and what an eager call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchext import _autograd, _backend, _triton
from torchext.ops import linear_cross_entropy_fake as fakes

_OP = "linear_cross_entropy"


def define(
    setup_context: _autograd.SetupContext, backward: _autograd.Backward
) -> Callable[..., Tensor]:
    """Registers the operators with the op's one formula; returns the function that serves a call.

    Args:
        setup_context: the formula's, as `_autograd.define` has it.
        backward: the formula's; ``backward(..., kernel=...)`` takes that backward kernel.
    """
    forward_op, forward = _triton.register(_OP, "linear_cross_entropy_forward", fakes.forward)
    backward_op, _ = _triton.register(_OP, "linear_cross_entropy_backward", fakes.backward)

    def by_triton(ctx: Any, *grads: Tensor | None) -> Any:
        return backward(ctx, *grads, kernel=backward_op)

    differentiable = _autograd.define(forward_op, setup_context, by_triton, forward)

    def call(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None,
        weight: Tensor | None,
        code: int,
        ignore_index: int,
        label_smoothing: float,
        *came: bool,
    ) -> Tensor:
        options = (code, ignore_index, label_smoothing)
        if not _backend.ordinary(any_backend=True, autocast=True):
            tensors = (input, linear_weight, target, linear_bias, weight)
            return forward_op(*tensors, *options, *came)[0]  # type: ignore[no-any-return]
        if type(ignore_index) is bool:
            raise TypeError
        given = (input, linear_weight, target, linear_bias, weight)
        plain = [None if tensor is None else tensor.resolve_neg() for tensor in given]
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in plain):
            if _triton.kernels(_OP).by_tiles(*plain[:3]):
                # They make the logits again in any case: gradients need memory only in backward.
                came = (False, False, False)
            return differentiable(*plain, *options, *came)
        return forward(*plain, *options, *came)[0]  # type: ignore[no-any-return]

    return call

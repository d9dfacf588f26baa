"""linear_cross_entropy on a GPU: what an eager call takes of the Triton kernels, or of the library.

Gradients that came with the loss are ours alone: backward multiplies them in their own memory, and
never looks at the factor, which the host would have to wait for. The registered operators cannot:
what they give belongs to whoever called them, and each product is one more tensor of
linear_weight's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from torchext import _autograd, _backend, _triton
from torchext.ops import linear_cross_entropy_fake as fakes

_OP = "linear_cross_entropy"


def triton(
    setup_context: _autograd.SetupContext, backward: _autograd.Backward
) -> Callable[..., Tensor]:
    """Registers the Triton operators with the op's one formula; returns what serves a call.

    Args:
        setup_context: the formula's, as `_autograd.define` has it.
        backward: the formula's; ``backward(..., kernel=...)`` takes that backward kernel.
    """
    forward_op, forward = _triton.register(_OP, "linear_cross_entropy_forward", fakes.forward)
    backward_op, _ = _triton.register(_OP, "linear_cross_entropy_backward", fakes.backward)
    by_triton = _autograd.with_kernel(backward, backward_op)
    differentiable = _autograd.define(forward_op, setup_context, by_triton, forward)

    def in_backward(*tensors: Tensor) -> bool:
        # Tiles make the logits again in any case: gradients need memory only in backward.
        return _triton.kernels(_OP).by_tiles(*tensors)  # type: ignore[no-any-return]

    return _call(forward_op, forward, differentiable, in_backward)


def library(
    setup_context: _autograd.SetupContext,
    backward: _autograd.Backward,
    forward_op: OpOverload,
    backward_op: OpOverload,
    device: str = "CUDA",
) -> Callable[..., Tensor]:
    """Returns what serves a call by the library's operators, which have their formula already.

    Args:
        setup_context: as in `triton`.
        backward: as in `triton`.
        forward_op: the library's.
        backward_op: the library's.
        device: whose kernels.
    """
    run = _autograd.kernel(forward_op, device)
    by_library = _autograd.with_kernel(backward, backward_op)
    differentiable = _autograd.eager(forward_op, setup_context, by_library, run)
    return _call(forward_op, run, differentiable, lambda *_: False)


def library_takes(input: Tensor, linear_weight: Tensor, weight: Tensor | None) -> bool:
    """Whether the library's kernels take what the CPU's do: no inner dimension, no wide weight."""
    return linear_weight.dim() <= 2 and (weight is None or weight.dtype == input.dtype)


def _call(
    op: OpOverload,
    run: Callable[..., Any],
    differentiable: Callable[..., Tensor],
    in_backward: Callable[..., bool],
) -> Callable[..., Tensor]:
    """Returns the function that serves a call.

    Args:
        op: the operator, for calls that are not ordinary.
        run: the kernel.
        differentiable: the kernel with its gradient.
        in_backward: of input, linear_weight and target, whether gradients are better made there.
    """

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
        given = (input, linear_weight, target, linear_bias, weight)
        if not _backend.ordinary(any_backend=True, autocast=True):
            return op(*given, *options, *came)[0]  # type: ignore[no-any-return]
        if type(ignore_index) is bool:
            raise TypeError
        plain = [None if tensor is None else tensor.resolve_neg() for tensor in given]
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in plain):
            if True in came and in_backward(*plain[:3]):
                came = (False, False, False)
            return differentiable(*plain, *options, *came)
        return run(*plain, *options, *came)[0]  # type: ignore[no-any-return]

    return call

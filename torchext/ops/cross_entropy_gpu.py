"""cross_entropy on a GPU: what an eager call takes of the Triton kernels, or of the library.

Where a row stays in registers its gradient is written with the loss, and backward multiplies it in
its own memory, without the host looking at the factor: a launch that ends at once where that is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from torchext import _autograd, _backend, _triton
from torchext.ops import cross_entropy_fake

_OP = "cross_entropy"


def triton(
    setup_context: _autograd.SetupContext,
    backward: _autograd.Backward,
    inplace: Callable[..., Tensor],
    may_overwrite: Callable[[Tensor, Tensor], bool],
) -> Callable[..., Tensor]:
    """Registers the Triton operators with the op's one formula; returns what serves a call.

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
    by_triton = _autograd.with_kernel(backward, backward_op)
    differentiable = _autograd.define(forward_op, setup_context, by_triton, forward)

    def in_registers(input: Tensor, dense: bool) -> bool:
        return _triton.kernels(_OP).one_pass(input)  # type: ignore[no-any-return]

    overwriting = (forward_, inplace, may_overwrite)
    return _call(forward_op, forward, differentiable, overwriting, in_registers)


def library(
    setup_context: _autograd.SetupContext,
    backward: _autograd.Backward,
    inplace: Callable[..., Tensor],
    may_overwrite: Callable[[Tensor, Tensor], bool],
    device: str = "CUDA",
) -> Callable[..., Tensor]:
    """Returns what serves a call by the library's operators, which have their formula already.

    Args:
        setup_context: as in `triton`.
        backward: as in `triton`.
        inplace: as in `triton`.
        may_overwrite: as in `triton`.
        device: whose kernels.
    """
    ops = torch.ops.torchext
    forward_op = ops.cross_entropy_forward.default
    forward = _autograd.kernel(forward_op, device)
    forward_ = _autograd.kernel(ops.cross_entropy_forward_.default, device)
    by_library = _autograd.with_kernel(backward, ops.cross_entropy_backward.default)
    differentiable = _autograd.eager(forward_op, setup_context, by_library, forward)
    overwriting = (forward_, inplace, may_overwrite)
    return _call(forward_op, forward, differentiable, overwriting, stays_in_registers)


def stays_in_registers(input: Tensor, dense: bool) -> bool:
    """Whether the library's kernels read rows of these logits once: `plan_rows` in csrc/cuda.

    And whether the gradient that comes of it can be multiplied without reading it: by Triton.

    Args:
        input: the logits.
        dense: whether every class has a part in the target.
    """
    classes = input.shape[min(input.dim() - 1, 1)]
    if input.dim() > 2 or input.stride(-1) != 1 or _triton.missing():
        return False
    # Accesses of 16 bytes that a thread keeps, or twice as many of one element.
    elements, accesses = 1, 16
    if input.data_ptr() % 16 == 0 and input.stride(0) * input.itemsize % 16 == 0:
        elements, accesses = 16 // input.itemsize, 8
    threads = 512 if dense or input.dtype is torch.float64 else 1024
    if input.dtype is torch.float64:
        accesses //= 2
    return classes <= elements * accesses * threads * _blocks_of_a_row(input.device.index or 0)


@cache
def _blocks_of_a_row(device: int) -> int:
    return 8 if torch.cuda.get_device_capability(device) >= (9, 0) else 1


def _call(
    op: OpOverload,
    forward: Callable[..., Any],
    differentiable: Callable[..., Tensor],
    overwriting: tuple[
        Callable[..., Tensor], Callable[..., Tensor], Callable[[Tensor, Tensor], bool]
    ],
    in_registers: Callable[[Tensor, bool], bool],
) -> Callable[..., Tensor]:
    """Returns the function that serves a call.

    Args:
        op: the operator, for calls that are not ordinary.
        forward: the kernel.
        differentiable: the kernel with its gradient.
        overwriting: the kernel that leaves the gradient in the logits' place, its node, and whether
            it may.
        in_registers: of the logits, and whether all classes are in the target: whether a row is
            read once, its gradient made with the loss. A row that is too large is read again for
            its gradient: in backward, then.
    """
    forward_, inplace, may_overwrite = overwriting

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
            return op(  # type: ignore[no-any-return]
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
        if at_once:
            dense = target.is_floating_point() or label_smoothing > 0
            at_once = in_registers(input, dense)
        return differentiable(*arguments, at_once)

    return call

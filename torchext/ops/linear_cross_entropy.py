"""Linear + cross-entropy, the logits never whole in memory.

    logits = input @ linear_weight.T + linear_bias      input (N, H), linear_weight (C, H)
    loss = cross_entropy(logits, target)                see torchext/ops/cross_entropy.py

The kernel walks chunks of rows: a chunk's logits, their loss, and in their place their gradient,
which goes into the gradients of input and linear_weight at once. Backward multiplies those by that
of the loss. For reduction "none", and where that would round twice, it makes the logits again, or
has few of them kept.

Siblings: {csrc/{ops,cpu},torchext/nn,triton_kernels,tests}/*linear_cross_entropy*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

import torchext.ops.extras_operator  # noqa: F401 (registers the operators)
from torchext import _autograd, _backend, _errors, _native, reference
from torchext.ops import extras as with_extras
from torchext.ops import extras_autograd
from torchext.ops import linear_cross_entropy_fake as fakes
from torchext.ops import linear_cross_entropy_gpu as gpu
from torchext.ops import linear_cross_entropy_kept as kept
from torchext.ops.cross_entropy_fake import check_reduction
from torchext.ops.extras import Extras
from torchext.ops.linear_cross_entropy_call import (
    CODES,
    INDICES,
    by_stock,
    cast_by_autocast,
    fit,
    place_of,
    usual,
)

_grad_enabled = torch.is_grad_enabled
# Not torch._C's, which Dynamo cannot trace.
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_lse: bool = False,
    return_argmax: bool = False,
    ignored_mean: str = "nan",
) -> Any:
    r"""Computes the cross-entropy of linearly transformed input, without the logits.

    The same as ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)``, and
    as torch 2.13's ``F.linear_cross_entropy``, but for memory. Beside the gradients it needs, on
    the CPU, one buffer of 384 rows of logits (more where they take less than 8 MiB), of at most
    64 MiB, or of 256 rows where those are more; on a GPU, by the CUDA library, 1072 MiB of logits
    where linear_weight's gradient is wanted, else 512 MiB; by Triton 128 MiB. For 16-bit dtypes on
    the CPU (of more rows than that) and by Triton float32 sums of linear_weight's gradient as well.
    On the CPU logits of up to 8 MiB are kept for backward where reduction is "none", or of 16-bit
    dtypes (of bfloat16 from 2 ** 22 multiplications on).
    With extras: see `torchext.ops.extras_source`.

    float32, float64, bfloat16 and float16 run on the fused kernels, on the CPU or a GPU, with
    class indices and probabilities, class weights, label smoothing and every reduction, under
    autocast and with K-dimensional weights (the CUDA library takes neither these nor the wide class
    weights of autocast: Triton's kernels do). Gradients of a mean or sum are made with the loss, of
    the tensors as they are then. The extras walk chunks of rows as well, compiled or not, by
    kernels of their own. Anything else (functorch transforms, second derivatives, extras under
    torch.jit.trace) runs as the two stock ops, on the whole logits.

    Args:
        input: the features.
        linear_weight: the weight of the linear transformation, a row for each class.
        target: class indices (int64, int32, uint8), or probabilities.
        linear_bias: the bias of the linear transformation.
        weight: a weight for each class.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: the class index that counts for nothing; None means -100. Not to be given with
            probabilities.
        label_smoothing: how much of each target is spread over all classes, in [0, 1].
        z_loss: this and the following as in `torchext.cross_entropy`; see `extras_chunks`.
        softcap: likewise; on a GPU with a second buffer.
        logit_scale: likewise.
        return_lse: likewise.
        return_argmax: likewise.
        ignored_mean: likewise.

    Shape:
        - input: :math:`(H)` or :math:`(*, H)`
        - linear_weight: :math:`(C, H)`, or :math:`(C, d_1, ..., d_K, H)` with input :math:`(N, H)`
        - target: :math:`()` or :math:`(*)`, or with probabilities :math:`(C)` or :math:`(N, C)`;
          with a K-dimensional weight :math:`(N, d_1, ..., d_K)` or :math:`(N, C, d_1, ..., d_K)`
        - linear_bias: linear_weight's shape without :math:`H`
        - weight: :math:`(C)`
        - output: a scalar, or the shape of class indices if reduction is ``"none"``

    Returns:
        The loss, of input's dtype, or a tuple, see `torchext.cross_entropy`.

    Raises:
        IndexError: where a class index is neither in [0, C) nor `ignore_index`.
        ValueError: for another `reduction`, or batch sizes that differ.
        RuntimeError: where other shapes or dtypes do not go together.
        TypeError: where an argument is of another type.
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        return handle_torch_function(
            linear_cross_entropy,
            (input, linear_weight, target, linear_bias, weight),
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            return_lse=return_lse,
            return_argmax=return_argmax,
            ignored_mean=ignored_mean,
        )
    if (
        z_loss or softcap is not None or logit_scale != 1.0
        or return_lse or return_argmax or ignored_mean != "nan"
    ):  # fmt: skip
        extras = Extras(z_loss, softcap, logit_scale, return_lse, return_argmax, ignored_mean)
        return with_extras.linear_cross_entropy(
            _attempt, extras, input, linear_weight, target, linear_bias, weight, reduction,
            ignore_index, label_smoothing,
        )  # fmt: skip
    try:
        if _grad_enabled() and usual(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index
        ):
            ignored = -100 if ignore_index is None else ignore_index
            biased = linear_bias is not None and linear_bias.requires_grad
            return _differentiable(
                input, linear_weight, target, linear_bias, None, CODES[reduction], ignored,
                label_smoothing, input.requires_grad, linear_weight.requires_grad, biased,
            )  # fmt: skip
        loss = by_stock(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
            label_smoothing,
        )  # fmt: skip
        if loss is not None:
            return loss
        return _linear_cross_entropy(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
            label_smoothing,
        )  # fmt: skip
    except _errors.REFUSALS as error:
        return _settle(
            error, input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
            label_smoothing,
        )  # fmt: skip


def _attempt(*arguments: Any) -> Tensor:
    """The call beside extras; what raises is settled."""
    try:
        return _linear_cross_entropy(*arguments)
    except _errors.REFUSALS as error:
        return _settle(error, *arguments)


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
) -> Tensor:
    if type(ignore_index) is bool:
        raise TypeError
    tensors = (input, linear_weight, target, linear_bias, weight)
    ordinary = _backend.ordinary()
    narrow = None if ordinary else _backend.autocast_dtype(input)
    if narrow is not None:
        tensors, ordinary = cast_by_autocast(narrow, *tensors), _backend.ordinary(autocast=True)
    ordinary = ordinary and input.is_cpu  # past the dispatcher
    if (
        (ignore_index is not None and target.dtype not in INDICES)
        or (weight is not None and weight.dtype != input.dtype and narrow is None)
        or not fit(*tensors[:4])
        or (place := place_of(ordinary, *tensors)) == _backend.EAGER
    ):
        return _unserved(
            narrow, input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
            label_smoothing,
        )  # fmt: skip
    ignored = -100 if ignore_index is None else ignore_index
    loss = _fused(place, ordinary, *tensors, CODES[reduction], ignored, label_smoothing)
    # As wide as the sums, which under autocast is the loss's own dtype.
    return loss if loss.dtype is input.dtype or narrow is not None else loss.to(input.dtype)


def _unserved(narrow: torch.dtype | None, *arguments: Any) -> Tensor:
    """By chunks under autocast, whose probabilities are wider than its logits, or by definition."""
    if narrow is not None:
        input, linear_weight, target, bias, weight, *options = arguments
        tensors = (input, linear_weight, target, bias, weight)
        loss = extras_autograd.attempt(*tensors, with_extras.NONE, *options)
        if loss is not None:
            return loss  # type: ignore[return-value]
    return reference.linear_cross_entropy(*arguments)


def _fused(
    place: int,
    ordinary: bool,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    code: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The operator or the kernel, on tensors with one leading and one inner dimension."""
    dtype, shape = input.dtype, None
    if linear_weight.dim() > 2:
        class_dim = target.dim() - linear_weight.dim() + 1  # 1 of probabilities, else 0
        shape = target.shape[:1] + target.shape[class_dim + 1 :]
        linear_weight, target = linear_weight.flatten(1, -2), target.flatten(class_dim + 1)
        linear_bias = None if linear_bias is None else linear_bias.flatten(1)
    elif input.dim() != 2:
        shape = target.shape
        if input.shape[:-1] != shape:
            raise RuntimeError(
                f"linear_cross_entropy: expected target of input's shape without its last "
                f"dimension, {list(input.shape[:-1])}, but got {list(shape)}"
            )
        input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    differentiate = _grad_enabled() and (
        input.requires_grad
        or linear_weight.requires_grad
        or (linear_bias is not None and linear_bias.requires_grad)
    )
    # See cross_entropy: float16 gradients of a mean would underflow; and bfloat16 ones would be
    # rounded twice where backward cannot look at what it multiplies them by (unless that is 1).
    at_once = dtype is torch.float32 or dtype is torch.float64
    at_once = at_once or (dtype is torch.bfloat16 and (ordinary or not input.is_cpu))
    # A trace keeps these flags: of its operator the gradients are made where backward wants them.
    at_once = at_once and code != 0 and (ordinary or not _is_tracing())
    came = (False, False, False)
    if differentiate and at_once:
        bias_grad = linear_bias is not None and linear_bias.requires_grad
        came = (input.requires_grad, linear_weight.requires_grad, bias_grad)
    arguments = (
        input, linear_weight, target, linear_bias, weight, code, ignore_index, label_smoothing,
        *came,
    )  # fmt: skip
    if place == _backend.TRITON:
        loss = _triton_call(*arguments)
    elif not input.is_cpu:
        loss = _cuda_call(*arguments)
    elif ordinary and differentiate:
        if kept.keeps(input, linear_weight, code):
            loss = kept.differentiable(*arguments[:8])
        else:
            loss = _differentiable(*arguments)
    else:
        loss = (_kernel if ordinary else _forward_op)(*arguments)[0]
    return loss.reshape(shape) if shape is not None and code == 0 else loss


def _settle(
    error: Exception,
    input: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    weight: Any,
    reduction: Any,
    ignore_index: Any,
    label_smoothing: Any,
) -> Tensor:
    """Serves or refuses a call that raised `error`: see `_errors.settle`."""
    op = "linear_cross_entropy"
    _errors.check_types(
        op,
        (
            ("input", input, _errors.TENSOR),
            ("linear_weight", linear_weight, _errors.TENSOR),
            ("target", target, _errors.TENSOR),
            ("linear_bias", linear_bias, _errors.OPTIONAL_TENSOR),
            ("weight", weight, _errors.OPTIONAL_TENSOR),
            ("ignore_index", ignore_index, _errors.OPTIONAL_INT),
            ("label_smoothing", label_smoothing, _errors.FLOAT),
        ),
    )
    check_reduction(op, reduction)
    ignored = -100 if ignore_index is None else ignore_index
    options = (CODES.get(reduction, 1), ignored, label_smoothing, False, False, False)
    given: tuple[Any, ...] = (reduction, ignore_index, label_smoothing)
    tensors = {
        "input": input,
        "linear_weight": linear_weight,
        "target": target,
        "linear_bias": linear_bias,
        "weight": weight,
    }
    return _errors.settle(
        error,
        op,
        tensors,
        lambda: reference.linear_cross_entropy(*tensors.values(), *given),
        lambda: _kernel(*tensors.values(), *options) if linear_weight.dim() == 2 else None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options, ctx.wanted = inputs[5:8], inputs[8:]
    grads = output[2:] if True in inputs[8:] else ()
    if ctx.owned:  # nobody's but ours: they need no saving, which costs 1 us each
        ctx.grads, grads = grads, ()
    else:
        ctx.grads = ()
        ctx.mark_non_differentiable(*output[1:])
    ctx.to_save = (*inputs[:5], output[1], *grads)  # save_for_backward, a call less


def _backward(
    ctx: Any, grad_loss: Tensor, *_: Tensor | None, kernel: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    first, second, _, third, *_ = ctx.needs_input_grad
    needed = (first, second, third)
    plain = kernel is None and _autograd.plain_backward(ctx, grad_loss)
    grads = ctx.grads
    if (
        plain
        and grads
        and _autograd.may_scale(ctx.wanted, needed, grads[0].dtype, grad_loss)
        and math.isfinite(value := grad_loss.item())  # see `_autograd.scaled`
    ):
        if _autograd.keeps_graph():
            grads = _autograd.multiplied(grads, grad_loss)
        else:
            ctx.grads = ()  # as saved tensors go; after this those are missed, as ever
            if value != 1.0:
                for gradient in grads:
                    gradient.mul_(grad_loss)
    else:
        run = kernel or (_backward_kernel if plain else _backward_op)
        grads = _recomputed(ctx, grad_loss, needed, run)
    first, second, third = _autograd.wanted(grads, needed)
    return first, second, None, third, None, None, None, None, None, None, None


def _recomputed(
    ctx: Any, grad_loss: Tensor, needed: tuple[bool, ...], run: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    """The gradients, from the saved tensors."""
    input, linear_weight, target, linear_bias, weight, stats, *saved = ctx.saved_tensors
    tensors = (input, linear_weight, target, linear_bias, weight)
    if _autograd.wants_reference(grad_loss, ctx.owned):
        return fakes.gradients(ctx, tensors, needed, grad_loss)
    grad_loss = grad_loss.resolve_neg()
    saved = saved or ctx.grads
    if saved and _autograd.may_scale(ctx.wanted, needed, saved[0].dtype, grad_loss):
        scaled = _autograd.scaled(saved, grad_loss, ctx.owned)
        if scaled is not None:
            if not _autograd.keeps_graph():
                ctx.grads = ()
            return scaled
    return run(grad_loss, *tensors, stats, *ctx.options, *needed)  # type: ignore[no-any-return]


if not _native.cpu_missing:
    torch.library.register_fake("torchext::linear_cross_entropy_forward", fakes.forward)
    torch.library.register_fake("torchext::linear_cross_entropy_backward", fakes.backward)
    _forward_op = torch.ops.torchext.linear_cross_entropy_forward.default
    _backward_op = torch.ops.torchext.linear_cross_entropy_backward.default
    _kernel = _autograd.kernel(_forward_op)
    _backward_kernel = _autograd.kernel(_backward_op)
    _differentiable = _autograd.define(_forward_op, _setup_context, _backward)
    _cuda_call = gpu.library(_setup_context, _backward, _forward_op, _backward_op)

_triton_call = gpu.triton(_setup_context, _backward)

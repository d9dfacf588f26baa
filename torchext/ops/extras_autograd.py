"""The extras' chunks as one node of autograd.

Where a sum or mean is wanted, and no lse whose gradient only backward knows, forward makes the
gradients with the loss, for a gradient of 1, which backward multiplies. Otherwise it keeps each
position's maximum and sum, and backward makes the logits again.

Siblings: torchext/ops/extras.py (the definition), torchext/ops/extras_chunks.py (the arithmetic).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchext import _autograd, _backend, reference
from torchext.ops import extras as with_extras
from torchext.ops.cross_entropy_fake import REDUCTIONS
from torchext.ops.extras import Extras, Result
from torchext.ops.extras_chunks import Linear, Options, Targets, log_sum, transformed
from torchext.ops.linear_cross_entropy_call import INDICES, cast_by_autocast
from torchext.ops.linear_cross_entropy_fake import wide

_Needed = tuple[bool, bool, bool]
_Grads = tuple[Tensor | None, ...]
_NOTHING: _Needed = (False, False, False)


def attempt(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    extras: Extras,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
) -> Result | None:
    """Computes the loss and what else is asked for; None where the call is not served.

    That is a call that is not plain (compiled, transformed, of subclasses), or wants a gradient of
    target or weight, or is wrong: the definition has the answer or the error.

    Args:
        input: (*, H), in any number of leading dimensions with class indices (*).
        linear_weight: (C, H) or (C, d1, ..., dK, H).
        target: class indices (N, d1, ..., dK) or probabilities (N, C, d1, ..., dK).
        linear_bias: linear_weight's shape without H.
        weight: (C).
        extras: what is asked for.
        reduction: of the loss.
        ignore_index: of the loss.
        label_smoothing: of the loss.

    Raises:
        IndexError: where a class index is neither in [0, C) nor `ignore_index`.
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    if not _backend.ordinary(any_backend=True, autocast=True) or not _plain(*tensors):
        return None
    narrow = _backend.autocast_dtype(input)
    if narrow is not None:
        tensors = cast_by_autocast(narrow, *tensors)
    # With autocast the loss is as wide as the sums.
    sums = wide(tensors[0].dtype)
    dtype = input.dtype if narrow is None else sums
    input, linear_weight, target, linear_bias, weight = tensors
    if not (
        _go_together(input, linear_weight, target, linear_bias, weight, dtype)
        and (ignore_index is None or not target.is_floating_point())
        and reduction in REDUCTIONS
        and not label_smoothing > 1
    ):
        return None
    smoothing = label_smoothing if label_smoothing > 0 else 0.0
    ignored = -100 if ignore_index is None else ignore_index
    options = Options(extras, reduction, ignored, smoothing, dtype)
    shape = target.shape  # of the positions
    if target.is_floating_point():
        shape = shape[:1] + shape[2:]
    elif input.dim() != 2:
        input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    inner = linear_weight.shape[:-1]
    linear_weight = linear_weight.reshape(-1, linear_weight.shape[-1])
    linear_bias = None if linear_bias is None else linear_bias.reshape(-1)
    differentiable = (input, linear_weight, linear_bias)
    arguments = (*differentiable, inner, target, weight, options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        loss, lse, argmax = _Function.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        loss, lse, argmax, *_ = _forward(_NOTHING, *arguments)
    loss = loss.reshape(shape) if reduction == "none" else loss
    others = [value.reshape(shape) for value in (lse, argmax) if value is not None]
    return (loss, *others) if others else loss


def _plain(*tensors: Tensor | None) -> bool:
    """Whether the tensors are plain memory of a device that has kernels of cross_entropy."""
    return (
        all(isinstance(tensor, Tensor) for tensor in tensors[:3])
        and _backend.route(*tensors, op="cross_entropy") != _backend.EAGER
        and not any(tensor is not None and tensor.is_neg() for tensor in tensors)
    )


def _go_together(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    """Whether shapes and dtypes are a call's; `dtype` is that of probabilities and weight."""
    if linear_weight.dim() < 2 or input.dim() < 1 or input.numel() * linear_weight.numel() == 0:
        return False
    inner = linear_weight.shape[:-1]
    if target.dtype in INDICES:
        fitting = target.shape == input.shape[:-1] + inner[1:]
    else:
        fitting = (
            target.shape == input.shape[:-1] + inner
            and target.dtype is dtype
            and not target.requires_grad
            and input.dim() == 2
        )
    return (
        fitting
        and (len(inner) == 1 or input.dim() == 2)
        and input.shape[-1] == linear_weight.shape[-1]
        and linear_weight.dtype is input.dtype
        and (
            linear_bias is None or (linear_bias.shape == inner and linear_bias.dtype is input.dtype)
        )
        and (
            weight is None
            or (weight.shape == inner[:1] and weight.dtype is dtype and not weight.requires_grad)
        )
    )


def _forward(
    at_once: _Needed,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    inner: tuple[int, ...],
    target: Tensor,
    weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, _Grads]:
    """Returns loss, lse, argmax, stats, what backward divides by, and the gradients at once."""
    extras, reduction = options.extras, options.reduction
    source = Linear(input, linear_weight, linear_bias, inner, extras.softcap is not None)
    source.want(at_once)
    targets = Targets(target, weight, inner[0], wide(input.dtype), options)
    mass = targets.mass() if reduction == "mean" else torch.ones((), dtype=torch.float64)
    mass = mass.to(input.device)
    stats = input.new_empty((2, *targets.positions), dtype=targets.dtype)
    losses = torch.empty_like(stats[0]) if reduction == "none" else None
    argmax = torch.empty_like(stats[0], dtype=torch.int64) if extras.return_argmax else None
    total = input.new_zeros((), dtype=torch.float64)
    of_loss = None
    if True in at_once:
        share = (extras.logit_scale / mass).to(targets.dtype)
        of_loss = targets.keep(share.expand(targets.positions), 0, source.rows)
    for first, last in source.chunks():
        z = transformed(source.logits(first, last), extras, source.factor_of(first, last))
        rows, stats[:, first:last] = targets.losses(z, first, last)
        if losses is None:
            total += rows.sum(dtype=torch.float64)
        else:
            losses[first:last] = rows
        if argmax is not None:
            argmax[first:last] = z.argmax(1)
        if of_loss is not None:
            _gradient(source, targets, z, stats, of_loss, None, first, last)
    loss = losses if losses is not None else total / mass
    lse = log_sum(stats) if extras.return_lse else None
    return loss.to(options.dtype), lse, argmax, stats, mass, source.gradients()


def _gradient(
    source: Linear,
    targets: Targets,
    z: Tensor,
    stats: Tensor,
    of_loss: Tensor | None,
    of_lse: Tensor | None,
    first: int,
    last: int,
) -> None:
    """What rows [first, last) give the gradients; `z` is overwritten."""
    gradient = targets.gradient(
        z,
        stats[:, first:last],
        None if of_loss is None else of_loss[first:last],
        None if of_lse is None else of_lse[first:last],
        first,
        last,
    )
    factor = source.factor_of(first, last)
    source.take(gradient if factor is None else gradient.mul_(factor), first, last)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        input, linear_weight, linear_bias, ctx.inner, target, weight, ctx.options = arguments
        needed: _Needed = ctx.needs_input_grad[:3]
        # See linear_cross_entropy: float16 would underflow, bfloat16 may have to be made again.
        at_once = (
            ctx.options.reduction != "none"
            and not ctx.options.extras.return_lse
            and input.dtype is not torch.float16
            and (input.dtype is not torch.bfloat16 or input.is_cpu)
        )
        loss, lse, argmax, stats, mass, grads = _forward(
            needed if at_once else _NOTHING, *arguments
        )
        ctx.at_once, ctx.owned = at_once, not _autograd.kept_by_hooks()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            input, linear_weight, linear_bias, target, weight, stats, mass, *grads
        )
        if argmax is not None:
            ctx.mark_non_differentiable(argmax)
        return loss, lse, argmax

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: Any) -> _Grads:
        needed: _Needed = ctx.needs_input_grad[:3]
        upstream = [grad for grad in (grad_loss, grad_lse) if grad is not None]
        nothing = (None,) * 4
        if not upstream:
            return (None, None, None, *nothing)
        input, linear_weight, linear_bias, target, weight, stats, mass, *grads = ctx.saved_tensors
        if any(map(_autograd.wants_reference, upstream)):
            begin, end = (1 if grad_loss is None else 0), (1 if grad_lse is None else 2)

            def definition(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
                logits = F.linear(x, w, b).view(-1, *ctx.inner)
                return defined(logits, target, weight, ctx.options)[begin:end]

            tensors = (input, linear_weight, linear_bias)
            found = _autograd.reference_gradients(definition, tensors, needed, tuple(upstream))
            return (*found, *nothing)
        if ctx.at_once and grad_loss is not None and _autograd.exact(input.dtype, grad_loss):
            wanted = [grad for grad in grads if grad is not None]
            scaled = iter(_autograd.scaled(wanted, grad_loss, ctx.owned))
            return (*(None if grad is None else next(scaled) for grad in grads), *nothing)
        options = ctx.options
        source = Linear(
            input, linear_weight, linear_bias, ctx.inner, options.extras.softcap is not None
        )
        source.want(needed)
        targets = Targets(target, weight, ctx.inner[0], wide(input.dtype), options)
        scale = options.extras.logit_scale
        of_loss = of_lse = None
        if grad_loss is not None:
            share = (grad_loss.to(torch.float64) * scale / mass).to(targets.dtype)
            of_loss = targets.keep(share.expand(targets.positions), 0, source.rows)
        if grad_lse is not None:
            of_lse = grad_lse * scale
        for begin, end in source.chunks():
            factor = source.factor_of(begin, end)
            z = transformed(source.logits(begin, end), options.extras, factor)
            _gradient(source, targets, z, stats, of_loss, of_lse, begin, end)
        return (*source.gradients(), *nothing)


def defined(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    """Returns loss and lse by torch's ops on the whole logits, summed in float32 or wider."""
    sums = wide(logits.dtype)
    extras = options.extras._replace(return_lse=True, return_argmax=False)
    loss, lse = with_extras.cross_entropy(
        reference.cross_entropy,
        extras,
        logits.to(sums),
        target.to(sums) if target.is_floating_point() else target,
        None if weight is None else weight.to(sums),
        options.ignore_index,
        options.reduction,
        options.label_smoothing,
    )
    return loss.to(options.dtype), lse

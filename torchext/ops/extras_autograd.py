"""The extras' chunks as one node of autograd: of eager calls, and of the registered operator.

Where a sum or mean is wanted, and no lse whose gradient only backward knows, forward makes the
gradients with the loss, for a gradient of 1, which backward multiplies. Otherwise it keeps each
position's maximum and sum, and backward makes the logits again.

Siblings: torchext/ops/extras.py (the definition), torchext/ops/extras_chunks.py (the arithmetic),
torchext/ops/extras_operator.py (the operator).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchext import _autograd, _backend, reference
from torchext.ops import extras as with_extras
from torchext.ops.cross_entropy_fake import REDUCTIONS
from torchext.ops.extras import Extras, Result
from torchext.ops.extras_chunks import Options, Targets, log_sum, step
from torchext.ops.extras_source import Linear, Logits, Source
from torchext.ops.linear_cross_entropy_call import cast_by_autocast, go_together
from torchext.ops.linear_cross_entropy_fake import wide

_Needed = tuple[bool, bool, bool]
Grads = tuple[Tensor | None, ...]
# again(grad_loss, grad_lse, needed, input, linear_weight, linear_bias, target, weight, stats, mass,
# options)
Again = Callable[..., Grads]
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

    That is a call that is not plain (transformed, of subclasses), or wants a gradient of target,
    weight or an extra, or is wrong: the definition has the answer or the error. What captures a
    call, or looks at it, sees the registered operator.

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
    ordinary = _backend.ordinary(any_backend=True, autocast=True)
    if any(isinstance(extra, Tensor) for extra in extras):  # a scale that is learned, say
        return None
    if not all(isinstance(tensor, Tensor) for tensor in tensors[:3]):
        return None
    if not plain(*tensors, ordinary=ordinary):
        return None
    narrow = _backend.autocast_dtype(input)
    if narrow is not None:
        tensors = cast_by_autocast(narrow, *tensors)
    # With autocast the loss is as wide as the sums.
    sums = wide(tensors[0].dtype)
    dtype = input.dtype if narrow is None else sums
    input, linear_weight, target, linear_bias, weight = tensors
    if not (
        input.numel() * linear_weight.numel() > 0
        and go_together(input, linear_weight, target, linear_bias, weight, dtype)
        and (ignore_index is None or not target.is_floating_point())
        and reduction in REDUCTIONS
        and not label_smoothing > 1
    ):
        return None
    smoothing = label_smoothing if label_smoothing > 0 else 0.0
    ignored = -100 if ignore_index is None else ignore_index
    shape = target.shape  # of the positions
    if target.is_floating_point():
        shape = shape[:1] + shape[2:]
    elif input.dim() != 2:
        input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    options = Options(extras, reduction, ignored, smoothing, dtype if ordinary else sums)
    loss, *others = run(ordinary, input, linear_weight, linear_bias, target, weight, options)
    loss = loss.to(dtype).reshape(shape) if reduction == "none" else loss.to(dtype)
    others = [value.reshape(shape) for value in others]
    return (loss, *others) if others else loss


def at_once(input: Tensor, options: Options) -> bool:
    """Whether an eager call makes the gradients in forward.

    See linear_cross_entropy: float16 would underflow, bfloat16 may have to be made again.
    """
    dtype = input.dtype
    return options.at_once and (
        dtype is not torch.float16 and (dtype is not torch.bfloat16 or input.is_cpu)
    )


def run(
    ordinary: bool,
    input: Tensor,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
) -> list[Tensor]:
    """Returns the loss, and the lse and argmax that are asked for."""
    differentiable = (input, linear_weight, linear_bias)
    differentiate = torch.is_grad_enabled()
    needed = tuple(differentiate and t is not None and t.requires_grad for t in differentiable)
    if not ordinary:
        from torchext.ops import extras_operator  # made of what is here

        found = extras_operator.call(needed, *differentiable, target, weight, options)
    elif True in needed:
        found = _apply(*differentiable, target, weight, options)
    else:
        found = forward(_NOTHING, *differentiable, target, weight, options)[:3]
    return [value for value in found if value is not None]


def plain(*tensors: Tensor | None, ordinary: bool) -> bool:
    """Whether the tensors are plain memory of a device that has kernels of cross_entropy."""
    if _backend.route(*tensors, op="cross_entropy", fake=not ordinary) == _backend.EAGER:
        return False
    if ordinary:
        return not any(tensor is not None and tensor.is_neg() for tensor in tensors)
    # What torch.jit.trace makes is to run without Python, whose kernel the operator's is.
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is None


def source_of(
    input: Tensor, linear_weight: Tensor | None, linear_bias: Tensor | None, options: Options
) -> Source:
    """Returns the logits: the input itself, or what the linear transformation makes of it."""
    softcap = options.extras.softcap is not None
    if linear_weight is None:
        return Logits(input, softcap)
    return Linear(input, linear_weight, linear_bias, softcap)


def forward(
    wanted: _Needed,
    input: Tensor,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Grads]:
    """Returns loss, lse, argmax, stats, what backward divides by, and the gradients at once.

    Where `overwrite`, that of the logits takes their place.
    """
    extras, reduction = options.extras, options.reduction
    source = source_of(input, linear_weight, linear_bias, options)
    if overwrite:
        assert isinstance(source, Logits)
        source.overwrite()
    elif linear_weight is None and source.kernel == _backend.OPERATOR and input.is_cpu:
        return _forward_of_logits(wanted[0], input, target, weight, options)
    targets = Targets(target, weight, source, wide(input.dtype), options)
    source.want(wanted)
    mass = targets.mass() if reduction == "mean" else input.new_ones((), dtype=torch.float64)
    stats = input.new_empty((2, *targets.positions), dtype=targets.dtype)
    losses = torch.empty_like(stats[0])
    argmax = torch.empty_like(stats[0], dtype=torch.int64) if extras.return_argmax else None
    of_loss = None
    if True in wanted:
        of_loss = (1 / mass).to(targets.dtype).expand(targets.positions)
    for first, last in source.chunks():
        step(source, targets, stats, losses, argmax, of_loss, None, first, last)
    loss = losses if reduction == "none" else losses.sum(dtype=torch.float64) / mass
    lse = log_sum(stats) if extras.return_lse else None
    return loss.to(options.dtype), lse, argmax, stats, mass, source.gradients()


def _forward_of_logits(
    save_gradient: bool, input: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Grads]:
    """What `forward` does, in one call of the kernel."""
    extras = options.extras
    arguments = (
        input, target, weight, REDUCTIONS.index(options.reduction), options.ignore_index,
        options.label_smoothing, extras.z_loss, extras.softcap or 0.0, extras.logit_scale,
        extras.ignored_mean == "zero", extras.return_lse, extras.return_argmax, save_gradient,
    )  # fmt: skip
    found = torch.ops.torchext.cross_entropy_extras_forward(*arguments)
    loss, lse, argmax, stats, mass, gradient = found
    return (
        loss.to(options.dtype),
        lse if extras.return_lse else None,
        argmax if extras.return_argmax else None,
        stats,
        mass,
        (gradient if save_gradient else None, None, None),
    )


def again(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    needed: _Needed,
    input: Tensor,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    mass: Tensor,
    options: Options,
) -> Grads:
    """Returns the needed gradients, the logits made again."""
    # Triton's kernels read memory as it is.
    grad_lse = None if grad_lse is None else grad_lse.resolve_neg()
    source = source_of(input, linear_weight, linear_bias, options)
    targets = Targets(target, weight, source, wide(input.dtype), options)
    source.want(needed)
    of_loss = None
    if grad_loss is not None:
        share = (grad_loss.to(torch.float64) / mass).to(targets.dtype)
        of_loss = share.expand(targets.positions)
    for first, last in source.chunks():
        step(source, targets, stats, None, None, of_loss, grad_lse, first, last)
    return source.gradients()


def backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, needed: _Needed, again: Again
) -> Grads:
    """Returns the gradients of input, linear_weight and linear_bias: the one formula.

    Args:
        ctx: `options` and `owned` of the call, and its saved tensors: input, linear_weight,
            linear_bias, target, weight, stats, mass, and the gradients that forward made.
        grad_loss: the gradient of the loss.
        grad_lse: the gradient of the lse.
        needed: which gradients are needed.
        again: makes them from the tensors.
    """
    upstream = tuple(grad for grad in (grad_loss, grad_lse) if grad is not None)
    if not upstream:
        return (None, None, None)
    *saved, first, second, third = ctx.saved_tensors
    if any(_autograd.wants_reference(grad, ctx.owned) for grad in upstream):
        target, weight = saved[3:5]
        begin, end = (1 if grad_loss is None else 0), (1 if grad_lse is None else 2)

        def definition(x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
            logits = x
            if w is not None:
                logits = F.linear(x, w.flatten(0, -2), None if b is None else b.flatten())
                logits = logits.view(len(x), *w.shape[:-1])
            return defined(logits, target, weight, ctx.options)[begin:end]

        return _autograd.reference_gradients(definition, saved[:3], needed, upstream)
    grads = (first, second, third)
    came = tuple(grad is not None for grad in grads)
    if (
        grad_loss is not None
        and grad_lse is None
        and _autograd.may_scale(came, needed, saved[0].dtype, grad_loss)
    ):
        made = [grad for grad in grads if grad is not None]
        scaled = _autograd.scaled(made, grad_loss, ctx.owned)
        if scaled is not None:
            found = iter(scaled)
            return tuple(None if grad is None else next(found) for grad in grads)
    return again(grad_loss, grad_lse, needed, *saved, ctx.options)


class CrossEntropyExtras(torch.autograd.Function):
    """The node: its name is what the profiler and anomaly mode show."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, *arguments: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        *tensors, ctx.options = arguments
        needed = ctx.needs_input_grad[:3] if at_once(tensors[0], ctx.options) else _NOTHING
        loss, lse, argmax, stats, mass, grads = forward(needed, *arguments)
        ctx.owned = not _autograd.kept_by_hooks()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, stats, mass, *grads)
        if argmax is not None:
            ctx.mark_non_differentiable(argmax)
        return loss, lse, argmax

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: Any
    ) -> Grads:
        found = backward(ctx, grad_loss, grad_lse, ctx.needs_input_grad[:3], again)
        return (*found, None, None, None)


_apply: Callable[..., Any] = _autograd.fast_apply(CrossEntropyExtras)


def defined(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    """Returns loss and lse by torch's ops on the whole logits, summed in float32 or wider."""
    sums = wide(logits.dtype)
    extras = options.extras._replace(return_lse=True, return_argmax=False)
    loss, lse = with_extras.defined(
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

r"""Cross-entropy in one pass over the logits.

    loss = -sum_c q_c log softmax(input)_c
    q_c = weight_c ((1 - label_smoothing) t_c + label_smoothing / C)
    grad_input_c = grad_loss (softmax(input)_c sum(q) - q_c)

t is the one-hot class index or the given probabilities; input (C), (N, C) or (N, C, d1, ...).
Where a gradient will be wanted of a sum or mean, the kernel writes it while the row is in cache;
otherwise it keeps each row's maximum and sum of exponentials (`stats`), from which backward makes
the softmax.

Siblings: csrc/{ops,cpu}/cross_entropy*, torchext/nn/cross_entropy.py, tests/test_cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torchext import _autograd, _backend, _errors, _native, reference
from torchext.ops import cross_entropy_fake, cross_entropy_gpu
from torchext.ops import extras as with_extras
from torchext.ops.cross_entropy_inplace import apart, inplace
from torchext.ops.cross_entropy_small import FEW_LOGITS, SMALL, few_logits
from torchext.ops.extras import Extras

_PLAIN, _FLOATING = _backend.PLAIN, _backend.FLOATING
_INDICES = frozenset({torch.int64, torch.int32, torch.uint8})
_INT64 = torch.int64
_is_compiling = torch.compiler.is_dynamo_compiling
_is_tracing = torch._C._is_tracing
_stock: Any = torch._C._nn.cross_entropy_loss
_NAMES = cross_entropy_fake.REDUCTIONS
_REDUCTIONS = {name: code for code, name in enumerate(_NAMES)}


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    return_lse: bool = False,
    return_argmax: bool = False,
    ignored_mean: str = "nan",
) -> Any:
    r"""Computes the cross-entropy between logits and targets: ``F.cross_entropy`` in one pass.

    .. math::
        \ell_n = -\sum_c q_{nc} \log \frac{\exp x_{nc}}{\sum_j \exp x_{nj}}, \qquad
        q_{nc} = w_c \left((1 - \epsilon) t_{nc} + \frac{\epsilon}{C}\right)

    with :math:`t` the one-hot class index or the given probabilities. The mean divides by the sum
    of the weights of the targets that are not ignored, or, for probabilities, by their number. A
    mean over no target is NaN, as in torch.

    Takes every call that ``F.cross_entropy`` takes, with the same result and gradients, and int32
    class indices as well. float32, float64, bfloat16 and float16 on the CPU, or on a GPU, run on
    the fused kernels, which sum in float32 or wider and give the same bits for any number of
    threads; anything else, and what is too small to gain, runs as the stock op. Under autocast it
    computes in float32, as the stock op does. Between forward and backward the logits may be
    changed in place, as with the stock op, but not with reduction "none", float16, extras or
    compiled: there backward reads them, and autograd raises the usual error.

    Args:
        input: the logits, not normalised.
        target: class indices (int64, int32, uint8), or probabilities of input's shape.
        weight: a weight for each class.
        size_average: deprecated, as `reduce`: see `reduction`.
        ignore_index: the class index that counts for nothing. Not used with probabilities.
        reduce: deprecated, see `reduction`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: how much of each target is spread over all classes, in [0, 1].
        z_loss: adds ``z_loss * lse ** 2``, lse the log-sum-exp, to each loss that is not ignored.
        softcap: takes ``softcap * tanh(logits / softcap)`` for the logits.
        logit_scale: multiplies the logits first.
        inplace_backward: lets the gradient overwrite the logits, which saves a tensor of their size
            and most of the time of a large loss. The logits hold the gradient from the forward call
            on, and autograd knows: whatever saved them for its own backward raises the usual error
            about an in-place change. Has an effect where a gradient of a mean or sum is wanted of
            contiguous logits in float32, float64 or bfloat16; with extras, where they have a
            kernel, and without return_lse. No second derivatives; an infinite gradient of the loss
            makes NaN of ignored rows, too.
        return_lse: returns lse, too, differentiable, in float32 or wider.
        return_argmax: returns the class of the largest logit too.
        ignored_mean: what a mean over no target, or targets of no weight, gives: ``"nan"``, as in
            torch, or ``"zero"``.

    Shape:
        - input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`; read in place,
          whether classes or positions are contiguous
        - target: :math:`()`, :math:`(N)` or :math:`(N, d_1, ..., d_K)`, or input's shape
        - weight: :math:`(C)`
        - output: a scalar, or the shape of class indices if reduction is ``"none"``

    Returns:
        The loss, of input's dtype; with return_lse or return_argmax a tuple of it and those. The
        extras have a kernel for rows of contiguous classes (on the CPU of at least 16), and are
        else torch's ops around the loss's: see `torchext.ops.extras`.

    Raises:
        IndexError: where a class index is neither in [0, C) nor `ignore_index`.
        ValueError: for another `reduction`, or batch sizes that differ.
        RuntimeError: where other shapes or dtypes do not go together.
        TypeError: where an argument is of another type.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            inplace_backward=inplace_backward,
            return_lse=return_lse,
            return_argmax=return_argmax,
            ignored_mean=ignored_mean,
        )
    if (
        z_loss or softcap is not None or logit_scale != 1.0
        or return_lse or return_argmax or ignored_mean != "nan"
    ):  # fmt: skip
        extras = Extras(z_loss, softcap, logit_scale, return_lse, return_argmax, ignored_mean)
        overwrite = inplace_backward and not extras.need_logits  # torch's ops read the logits, too
        return with_extras.cross_entropy(
            partial(_attempt, inplace_backward=overwrite), extras, input, target, weight,
            ignore_index, reduction, label_smoothing, _overwriting if inplace_backward else None,
        )  # fmt: skip
    try:
        # Each look costs 50 ns, which small calls feel: no functions of ours here.
        if (
            _backend.stock_when_small
            and target.dtype is _INT64
            and not label_smoothing
            # Before the size: a compiler would guard on it. Fake tensors have types of their own.
            and type(target) is Tensor
            and not _is_compiling()
            and not _is_tracing()
            and (
                (logits := input.numel()) + 128 * (rows := target.numel()) < SMALL[reduction]
                or (logits < FEW_LOGITS and few_logits(input, logits, rows, reduction))
            )
        ):
            return _stock(
                input, target, weight, _REDUCTIONS[reduction], ignore_index, label_smoothing
            )
        return _cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing, inplace_backward
        )
    except _errors.REFUSALS as error:
        return _settle(error, input, target, weight, ignore_index, reduction, label_smoothing)


def _attempt(*arguments: Any, inplace_backward: bool) -> Tensor:
    """The call beside extras; what raises is settled."""
    try:
        return _cross_entropy(*arguments, inplace_backward=inplace_backward)  # type: ignore[misc]
    except _errors.REFUSALS as error:
        return _settle(error, *arguments)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    inplace_backward: bool,
) -> Tensor:
    if (
        not _backend.ordinary()
        or type(input) not in _PLAIN
        or type(target) is not Tensor
        or input.dtype not in _FLOATING
        or not (input.is_cpu and target.is_cpu)
        or input.is_neg()
        or (
            (target.dtype not in _INDICES or weight is not None)
            and not _plain(input, target, weight)
        )
        or input.numel() == 0
    ):
        return _unusual(
            input, target, weight, ignore_index, reduction, label_smoothing, inplace_backward
        )
    if type(ignore_index) is bool:
        raise TypeError
    code = _REDUCTIONS[reduction]
    if not (input.requires_grad and torch.is_grad_enabled()):
        return _kernel(input, target, weight, code, ignore_index, label_smoothing, False)[0]  # type: ignore[no-any-return]
    # In float16 a mean's gradient underflows before a loss scale can lift it: made in backward.
    one_pass = code != 0 and input.dtype is not torch.float16
    if inplace_backward and one_pass and input.is_contiguous() and apart(input, target):
        return inplace(_inplace_kernel, input, target, weight, code, ignore_index, label_smoothing)
    return _differentiable(input, target, weight, code, ignore_index, label_smoothing, one_pass)


def _unusual(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    inplace_backward: bool,
) -> Tensor:
    """What is not an ordinary call of plain CPU tensors."""
    place = _backend.route(input, target, weight, op="cross_entropy", work=input.numel())
    if place == _backend.EAGER or not _served(input, target, weight):
        return reference.cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing
        )
    if _backend.autocast_dtype(input) is not None:
        input = _backend.cast(input, torch.float32)
        target = _backend.cast(target, torch.float32)
        weight = None if weight is None else _backend.cast(weight, torch.float32)
    arguments = (input, target, weight, _REDUCTIONS[reduction], ignore_index, label_smoothing)
    if place == _backend.TRITON:
        return _triton_call(*arguments, inplace_backward)
    if not input.is_cpu:
        return _cuda_call(*arguments, inplace_backward)
    return torch.ops.torchext.cross_entropy_forward(*arguments, False)[0]  # type: ignore[no-any-return]


def _plain(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether targets that are no class indices, and weights, are plain memory that is served."""
    if weight is not None and (type(weight) not in _PLAIN or not weight.is_cpu or weight.is_neg()):
        return False
    return not target.is_neg() and _served(input, target, weight)


def _overwriting(run: Callable[..., Tensor], *arguments: Any) -> Tensor | None:
    """The loss with extras that `run` computes, the gradient in the logits' place, if it may be."""
    return inplace(run, *arguments) if apart(*arguments[:2]) else None


def _served(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernels serve these dtypes and gradients, or are the ones to refuse them."""
    if input.numel() == 0:
        return False
    if weight is not None and weight.requires_grad:
        return False
    if not target.is_floating_point():
        return True
    return (
        not target.requires_grad
        and target.dtype == input.dtype
        and (weight is None or weight.dtype == input.dtype)
    )


def _settle(
    error: Exception,
    input: Any,
    target: Any,
    weight: Any,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
) -> Tensor:
    """Serves or refuses a call that raised `error`: see `_errors.settle`."""
    _errors.check_types(
        "cross_entropy",
        (
            ("input", input, _errors.TENSOR),
            ("target", target, _errors.TENSOR),
            ("weight", weight, _errors.OPTIONAL_TENSOR),
            ("ignore_index", ignore_index, _errors.INT),
            ("label_smoothing", label_smoothing, _errors.FLOAT),
        ),
    )
    cross_entropy_fake.check_reduction("cross_entropy", reduction)
    code = _REDUCTIONS.get(reduction, 1)
    return _errors.settle(
        error,
        "cross_entropy",
        {"input": input, "target": target, "weight": weight},
        lambda: reference.cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing
        ),
        lambda: _kernel(input, target, weight, code, ignore_index, label_smoothing, False),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, weight, *ctx.options, ctx.one_pass = inputs
    ctx.logits = None
    if not ctx.owned:
        ctx.mark_non_differentiable(output[1], output[2])
    elif ctx.one_pass:  # as stock's, backward reads them no more: they may be changed
        ctx.logits, input = (input, input._version), None
    ctx.save_for_backward(input, target, weight, output[2] if ctx.one_pass else output[1])


def _reference_gradient(
    ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, grad_loss: Tensor
) -> Tensor | None:
    reduction, ignore_index, label_smoothing = ctx.options

    def loss(logits: Tensor) -> Tensor:
        return reference.cross_entropy(
            logits, target, weight, ignore_index, _NAMES[reduction], label_smoothing
        )

    return _autograd.reference_gradients(loss, (input,), (True,), grad_loss)[0]


def _backward(
    ctx: Any, grad_loss: Tensor, *_: Tensor | None, kernel: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    input, target, weight, saved = ctx.saved_tensors
    if _autograd.wants_reference(grad_loss, ctx.owned):
        if ctx.logits is not None:
            input = _autograd.unchanged(*ctx.logits)
        grad_input = _reference_gradient(ctx, input, target, weight, grad_loss)
    elif ctx.one_pass:
        scaled: Any = _autograd.scaled((saved,), grad_loss, ctx.owned)
        if scaled is None:  # made of the logits, where they are what they were
            if ctx.logits is not None and ctx.logits[0]._version == ctx.logits[1]:
                input = ctx.logits[0]
            if input is not None:
                scaled = (_reference_gradient(ctx, input, target, weight, grad_loss),)
        (grad_input,) = scaled or _autograd.multiplied((saved,), grad_loss)
        if ctx.logits is not None and not _autograd.keeps_graph():
            ctx.logits = None
    else:
        if kernel is None:
            kernel = _backward_kernel if ctx.owned and _backend.ordinary() else _backward_op
        grad_input = kernel(grad_loss.resolve_neg(), input, target, weight, saved, *ctx.options)
    return grad_input, None, None, None, None, None, None


if not _native.cpu_missing:
    torch.library.register_fake("torchext::cross_entropy_forward", cross_entropy_fake.forward)
    torch.library.register_fake("torchext::cross_entropy_forward_", cross_entropy_fake.forward_)
    torch.library.register_fake("torchext::cross_entropy_backward", cross_entropy_fake.backward)
    _backward_op = torch.ops.torchext.cross_entropy_backward.default
    _kernel = _autograd.kernel(torch.ops.torchext.cross_entropy_forward.default)
    _inplace_kernel = _autograd.kernel(torch.ops.torchext.cross_entropy_forward_.default)
    _backward_kernel = _autograd.kernel(_backward_op)
    _differentiable = _autograd.define(
        torch.ops.torchext.cross_entropy_forward.default, _setup_context, _backward
    )
    _cuda_call = cross_entropy_gpu.library(_setup_context, _backward, inplace, apart)

_triton_call = cross_entropy_gpu.triton(_setup_context, _backward, inplace, apart)

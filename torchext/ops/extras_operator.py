"""The extras' chunks as registered operators: what compile, export and make_fx keep of a call.

Without a linear_weight the input is the logits. Their kernels are the functions of eager calls, in
Python, for every device. The loss has the dtype of the sums, float32 or float64; what is not asked
for has no elements. `mass` is what a mean was divided by. The gradients that are asked for come
with the loss of a mean or sum, as in linear_cross_entropy_forward.

Siblings: torchext/ops/extras_autograd.py (the formula), torchext/ops/extras_chunks.py (the
arithmetic), tests/test_extras_compiled.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchext import _native
from torchext.ops import extras_autograd, extras_fake
from torchext.ops.cross_entropy_fake import REDUCTIONS
from torchext.ops.extras import Extras
from torchext.ops.extras_autograd import Grads
from torchext.ops.extras_chunks import Options
from torchext.ops.linear_cross_entropy_call import go_together
from torchext.ops.linear_cross_entropy_fake import wide

_NAME = "cross_entropy_extras"
_TENSORS = "Tensor input, Tensor? linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight"
_OPTIONS = (
    "int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale"
)
_NEEDED = "bool input_grad, bool linear_weight_grad, bool linear_bias_grad"
_FORWARD = (
    f"{_NAME}({_TENSORS}, {_OPTIONS}, int reduction, bool ignored_mean_zero, bool return_lse, "
    f"bool return_argmax, {_NEEDED}) -> (Tensor loss, Tensor lse, Tensor argmax, Tensor stats, "
    "Tensor mass, Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)"
)
_BACKWARD = (
    f"{_NAME}_backward(Tensor? grad_loss, Tensor? grad_lse, {_TENSORS}, Tensor stats, "
    f"Tensor mass, {_OPTIONS}, {_NEEDED}) -> (Tensor, Tensor, Tensor)"
)
_MEANS = ("nan", "zero")  # by ignored_mean_zero
_MAKING_AGAIN = 5  # how many options backward takes, the first ones


def call(
    needed: tuple[bool, ...],
    input: Tensor,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns loss, lse and argmax by the operator."""
    # See linear_cross_entropy: float16 would underflow, and bfloat16 be rounded twice, where
    # backward cannot look at what it multiplies the gradients by.
    at_once = options.at_once and input.dtype in (torch.float32, torch.float64)
    wanted = needed if at_once else (False, False, False)
    tensors = (input, linear_weight, target, linear_bias, weight)
    loss, lse, argmax, *_ = _forward_op(*tensors, *_encoded(options), *wanted)
    extras = options.extras
    return loss, lse if extras.return_lse else None, argmax if extras.return_argmax else None


def _encoded(options: Options) -> tuple[Any, ...]:
    """Returns the options as the operators take them."""
    extras = options.extras
    return (
        options.ignore_index,
        options.label_smoothing,
        extras.z_loss,
        extras.softcap,
        extras.logit_scale,
        REDUCTIONS.index(options.reduction),
        extras.ignored_mean == "zero",
        extras.return_lse,
        extras.return_argmax,
    )


def _decoded(
    input: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    reduction: int = 0,
    ignored_mean_zero: bool = False,
    return_lse: bool = False,
    return_argmax: bool = False,
) -> Options:
    """Returns the options as eager calls have them."""
    means = _MEANS[ignored_mean_zero]
    extras = Extras(z_loss, softcap, logit_scale, return_lse, return_argmax, means)
    sums = wide(input.dtype)
    return Options(extras, REDUCTIONS[reduction], ignore_index, label_smoothing, sums)


def _check(
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None],
) -> None:
    """Raises RuntimeError for what the public functions would never give to the operators."""
    input, linear_weight = tensors[:2]
    # Under autocast probabilities and class weights are as wide as the sums.
    dtypes = {input.dtype, wide(input.dtype)}
    shaped = linear_weight is None or input.dim() == 2
    if not shaped or not any(go_together(*tensors, dtype) for dtype in dtypes):
        given = [None if t is None else f"{list(t.shape)} of {t.dtype}" for t in tensors]
        raise RuntimeError(
            f"{_NAME}: expected input (N, H) or logits, and what goes with it in torchext."
            f"linear_cross_entropy, but got input, linear_weight, target, linear_bias and weight "
            f"of shapes {given}"
        )


def _filled(grads: Grads, input: Tensor) -> tuple[Tensor, ...]:
    """Returns gradients without elements for those that are None."""
    return tuple(input.new_empty((0,)) if grad is None else grad for grad in grads)


def _forward(
    input: Tensor,
    linear_weight: Tensor | None,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The kernel."""
    _check((input, linear_weight, target, linear_bias, weight))
    *encoded, input_grad, linear_weight_grad, linear_bias_grad = rest
    options = _decoded(input, *encoded)
    wanted = (input_grad, linear_weight_grad, linear_bias_grad)
    if options.reduction == "none" and True in wanted:
        raise RuntimeError(
            f"{_NAME}: expected reduction mean or sum where gradients come with the loss"
        )
    tensors = (input, linear_weight, linear_bias, target, weight)
    loss, lse, argmax, stats, mass, grads = extras_autograd.forward(wanted, *tensors, options)
    if lse is None:
        lse = stats.new_empty((0,))
    if argmax is None:
        argmax = stats.new_empty((0,), dtype=torch.int64)
    return (loss, lse, argmax, stats, mass, *_filled(grads, input))


def _forward_fake(
    input: Tensor,
    linear_weight: Tensor | None,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    _check((input, linear_weight, target, linear_bias, weight))
    reduction, _, return_lse, return_argmax = rest[_MAKING_AGAIN:-3]
    sums = wide(input.dtype)
    inner = input.shape[2:] if linear_weight is None else linear_weight.shape[1:-1]
    positions = (input.shape[0], *inner)
    return (
        input.new_empty(positions if reduction == 0 else (), dtype=sums),
        input.new_empty(positions if return_lse else (0,), dtype=sums),
        input.new_empty(positions if return_argmax else (0,), dtype=torch.int64),
        input.new_empty((2, *positions), dtype=sums),
        input.new_empty((), dtype=torch.float64),
        *_gradients_fake(input, linear_weight, linear_bias, rest[-3:]),
    )


def _gradients_fake(
    input: Tensor,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    tensors = (input, linear_weight, linear_bias)
    return tuple(
        input.new_empty(tensor.shape if want and tensor is not None else (0,))
        for tensor, want in zip(tensors, wanted, strict=True)
    )


def _backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    input: Tensor,
    linear_weight: Tensor | None,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    mass: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The kernel of the gradients that did not come with the loss."""
    _check((input, linear_weight, target, linear_bias, weight))
    *encoded, input_grad, linear_weight_grad, linear_bias_grad = rest
    grads = extras_autograd.again(
        grad_loss,
        grad_lse,
        (input_grad, linear_weight_grad, linear_bias_grad),
        *(input, linear_weight, linear_bias, target, weight, stats, mass),
        _decoded(input, *encoded),
    )
    return _filled(grads, input)


def _backward_fake(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    input: Tensor,
    linear_weight: Tensor | None,
    target: Tensor,
    linear_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _gradients_fake(input, linear_weight, linear_bias, rest[-3:])


def _again(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    needed: tuple[bool, bool, bool],
    input: Tensor,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    mass: Tensor,
    options: Options,
) -> Grads:
    """Calls the operator of the gradients: see `extras_autograd.again`."""
    found = _backward_op(
        grad_loss,
        grad_lse,
        *(input, linear_weight, target, linear_bias, weight, stats, mass),
        *_encoded(options)[:_MAKING_AGAIN],
        *needed,
    )
    return tuple(grad if need else None for grad, need in zip(found, needed, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, linear_weight, target, linear_bias, weight, *encoded = inputs
    _, lse, argmax, stats, mass, *grads = output
    ctx.owned, ctx.options = False, _decoded(input, *encoded[:-3])
    ctx.set_materialize_grads(False)
    made = [grad if want else None for grad, want in zip(grads, encoded[-3:], strict=True)]
    if linear_weight is None:
        made[1] = None
    if linear_bias is None:
        made[2] = None
    ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, stats, mass, *made)
    without = (argmax, stats, mass, *grads)
    ctx.mark_non_differentiable(*(without if ctx.options.extras.return_lse else (lse, *without)))


def _differentiated(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: Tensor | None
) -> Grads:
    needed = ctx.needs_input_grad
    needed = (needed[0], needed[1], needed[3])
    first, second, third = extras_autograd.backward(ctx, grad_loss, grad_lse, needed, _again)
    return (first, second, None, third, *[None] * (len(ctx.needs_input_grad) - 4))


# By the plain registrations: `torch.library.custom_op` imports much, and looks at every call.
_library: Any = torch.library.Library("torchext", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _kernel, _fake in (
    (_FORWARD, _forward, _forward_fake),
    (_BACKWARD, _backward, _backward_fake),
):
    _operator = _library.define(_schema)
    _library.impl(_operator, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torchext::{_operator}", _fake, lib=_library)
torch.library.register_autograd(
    f"torchext::{_NAME}", _differentiated, setup_context=_setup_context, lib=_library
)
if not _native.cpu_missing:
    torch.library.register_fake("torchext::cross_entropy_extras_forward", extras_fake.forward)
    torch.library.register_fake("torchext::cross_entropy_extras_rows", extras_fake.nothing)
    torch.library.register_fake("torchext::product_out", extras_fake.nothing)
    torch.library.register_fake("torchext::cross_entropy_mass", extras_fake.mass)
_forward_op = torch.ops.torchext.cross_entropy_extras.default
_backward_op = torch.ops.torchext.cross_entropy_extras_backward.default

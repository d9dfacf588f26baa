"""Fused linear + ReLU.

    output = max(input @ weight.T + bias, 0)        input (*, K), weight (N, K), bias (N)

    grad_linear = grad_output where output > 0 (where output is NaN too), else 0
    grad_input = grad_linear @ weight
    grad_weight = grad_linear.T @ input
    grad_bias = sum of grad_linear over all leading dimensions

Siblings: csrc/{ops,cpu}/linear_relu.*, torchext/nn/linear_relu.py, tests/test_linear_relu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torchext import _autograd, _backend, _errors, _native, _triton, reference

_PLAIN, _FLOATING = _backend.PLAIN, _backend.FLOATING
_grad_enabled = torch.is_grad_enabled


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Applies a linear transformation and ReLU in one pass: ``F.relu(F.linear(...))``.

    .. math:: y = \max(x A^T + b, 0)

    Takes every call that ``F.relu(F.linear(input, weight, bias))`` takes, with the same result and
    gradients: the gradient at 0 is 0, NaN stays NaN. Only the gradients that are asked for are
    computed. float32, float64, bfloat16 and float16 on the CPU, or on a GPU, run on the fused
    kernels; anything else runs as the two stock ops. Under autocast it takes the dtype that
    ``F.linear`` takes.

    Args:
        input: the features.
        weight: the weights, of input's dtype.
        bias: the bias, of input's dtype, or None.

    Shape:
        - input: :math:`(*, K)`, any number of leading dimensions, none included
        - weight: :math:`(N, K)` (or :math:`(K)`, as ``F.linear``)
        - bias: :math:`(N)` (or :math:`()`)
        - output: :math:`(*, N)`

    Returns:
        The activations, of input's dtype.

    Raises:
        RuntimeError: where shapes or dtypes do not go together.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            return torch.relu(torch.nn.functional.linear(input, weight, bias))
        return torch.ops.torchext.linear_relu_forward(input, weight, bias)  # type: ignore[no-any-return]
    else:
        if has_torch_function_variadic(input, weight, bias):
            return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias)
        return _attempt(input, weight, bias)


def _attempt(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The call; what raises is settled. Apart, because TorchScript reads no ``try``."""
    try:
        # The kernel itself refuses the other tensors' devices and layouts.
        if not (
            _backend.ordinary()
            and type(input) in _PLAIN
            and type(weight) in _PLAIN
            and input.is_cpu
            and input.dtype in _FLOATING
            and weight.dim() == 2
            and not (input.is_neg() or weight.is_neg())
            and (bias is None or (type(bias) in _PLAIN and not bias.is_neg()))
        ):
            return _unusual(input, weight, bias)
        if _grad_enabled() and (
            weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _differentiable(input, weight, bias)
        return _kernel(input, weight, bias)  # type: ignore[no-any-return]
    except _errors.REFUSALS as error:
        return _settle(error, input, weight, bias)


def _unusual(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What is not an ordinary call of plain CPU tensors."""
    work = input.numel() * weight.shape[0] if weight.dim() == 2 else 0
    place = _backend.route(input, weight, bias, op="linear_relu", work=work)
    if place == _backend.EAGER or weight.dim() != 2:
        return reference.linear_relu(input, weight, bias)
    if (dtype := _backend.autocast_dtype(input)) is not None:
        input, weight = _backend.cast(input, dtype), _backend.cast(weight, dtype)
        bias = None if bias is None else _backend.cast(bias, dtype)
    if place == _backend.TRITON:
        return _triton_call(input, weight, bias)
    return torch.ops.torchext.linear_relu_forward(input, weight, bias)  # type: ignore[no-any-return]


def _triton_call(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _backend.ordinary(any_backend=True):
        return _triton_forward_op(input, weight, bias)  # type: ignore[no-any-return]
    input, weight = input.resolve_neg(), weight.resolve_neg()
    bias = None if bias is None else bias.resolve_neg()
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _triton_differentiable(input, weight, bias)
    return _triton_forward(input, weight, bias)  # type: ignore[no-any-return]


def _settle(error: Exception, input: Any, weight: Any, bias: Any) -> Tensor:
    """Serves or refuses a call that raised `error`: see `_errors.settle`."""
    _errors.check_types(
        "linear_relu",
        (
            ("input", input, _errors.TENSOR),
            ("weight", weight, _errors.TENSOR),
            ("bias", bias, _errors.OPTIONAL_TENSOR),
        ),
    )
    return _errors.settle(
        error,
        "linear_relu",
        {"input": input, "weight": weight, "bias": bias},
        lambda: reference.linear_relu(input, weight, bias),
        lambda: _kernel(input, weight, bias),
    )


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference.linear_relu(input, weight, bias)


def _fake_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*grad_output.shape[:-1], weight.shape[1])
    return (
        weight.new_empty(shape if input_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
        weight.new_empty((weight.shape[0],) if bias_grad else (0,)),
    )


def _reference_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in stock ops, differentiable.

    By the output, as stock: through it all arguments are in the graph, with a derivative of 0.
    """
    masked = torch.ops.aten.threshold_backward(grad_output, output, 0)
    count = masked.shape[:-1].numel()
    rows = masked.reshape(count, masked.shape[-1])
    nothing = grad_output
    return (
        masked @ weight if input_grad else nothing,
        rows.mT @ input.reshape(count, input.shape[-1]) if weight_grad else nothing,
        rows.sum(0) if bias_grad else nothing,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _ = inputs
    needed = ctx.needs_input_grad
    # As stock: what is not needed may be changed, and an input that is not needed be forgotten.
    # save_for_backward, a call less.
    ctx.to_save = (input if needed[1] else None, weight if needed[0] else None, output)
    ctx.unsaved = None if needed[0] else weight


def _backward(
    ctx: Any, grad_output: Tensor, run: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    needed = ctx.needs_input_grad
    # The kernel looks at the weight's shape, and only for its gradient at the input.
    if not needed[0]:
        weight = ctx.unsaved
    if not needed[1]:
        input = weight
    if run is None and _autograd.plain_backward(ctx, grad_output):
        grads = _backward_kernel(grad_output, output, input, weight, *needed)
    elif _autograd.wants_reference(grad_output, ctx.owned):
        grads = _reference_backward(grad_output, output, input, weight, *needed)
    else:
        run = _backward_op if run is None else run
        grads = run(grad_output.resolve_neg(), output, input, weight, *needed)
    return _autograd.wanted(grads, needed)


if not _native.cpu_missing:
    torch.library.register_fake("torchext::linear_relu_forward", _fake_forward)
    torch.library.register_fake("torchext::linear_relu_backward", _fake_backward)
    _forward_op = torch.ops.torchext.linear_relu_forward.default
    _backward_op = torch.ops.torchext.linear_relu_backward.default
    _kernel = _autograd.kernel(_forward_op)
    _backward_kernel = _autograd.kernel(_backward_op)
    _differentiable = _autograd.define(_forward_op, _setup_context, _backward)

_triton_forward_op, _triton_forward = _triton.register(
    "linear_relu", "linear_relu_forward", _fake_forward
)
_triton_backward_op, _ = _triton.register("linear_relu", "linear_relu_backward", _fake_backward)


def _by_triton(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad_output, _triton_backward_op)


_triton_differentiable = _autograd.define(
    _triton_forward_op, _setup_context, _by_triton, _triton_forward
)

"""linear_cross_entropy in Triton: the functions of csrc/ops/linear_cross_entropy.cpp.

    logits = input @ linear_weight.T + linear_bias      input (N, H), linear_weight (C, H)
    loss = cross_entropy(logits, target)

Argument for argument the native operators, by one of two schedules:

* chunks of rows (linear_cross_entropy_chunks.py): the products are the library's, a chunk's logits
  are in memory. Nothing here waits for the device.
"""

from __future__ import annotations

from torch import Tensor
from torchext.triton_kernels import linear_cross_entropy_chunks
from torchext.triton_kernels.linear_cross_entropy_call import NONE, Gradients, Problem, check

from torchext.ops import linear_cross_entropy_fake as fakes

__all__ = ["linear_cross_entropy_backward", "linear_cross_entropy_forward"]


def _given(problem: Problem, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients as the operators give them: no elements where one is not asked for."""
    first, second, third = (
        problem.input.new_empty((0,)) if gradient is None else gradient for gradient in gradients
    )
    return first, second, third


def linear_cross_entropy_forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    input_grad: bool,
    linear_weight_grad: bool,
    linear_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, statistics and gradients as the native operator of the same name does.

    Bytes moved and multiplications: those of the schedule.
    """
    wanted = (input_grad, linear_weight_grad, linear_bias_grad)
    call = (input, linear_weight, target, linear_bias, weight,
            reduction, ignore_index, label_smoothing)  # fmt: skip
    problem = check("linear_cross_entropy_forward", (*call, *wanted), call)
    if reduction == NONE and any(wanted):
        raise RuntimeError(
            "linear_cross_entropy: expected reduction mean or sum where gradients come with the "
            "loss, but got none"
        )
    gradients = problem.gradients(wanted)
    stats = input.new_empty((2, problem.rows), dtype=problem.acc)
    if problem.rows == 0 or problem.classes == 0:
        loss = fakes.definition(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
            label_smoothing,
        )  # fmt: skip
        return loss, stats, *_given(problem, gradients)
    losses = input.new_empty((problem.rows,), dtype=problem.acc)
    scale = problem.mean_scale() if gradients.any else None
    linear_cross_entropy_chunks.forward(problem, losses, stats, gradients, scale)
    loss = losses if reduction == NONE else problem.reduced(losses)
    return loss, stats, *_given(problem, gradients)


def linear_cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    input_grad: bool,
    linear_weight_grad: bool,
    linear_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients from forward's statistics, as the native operator does.

    Bytes moved and multiplications: those of the schedule.
    """
    wanted = (input_grad, linear_weight_grad, linear_bias_grad)
    options = (reduction, ignore_index, label_smoothing)
    call = (input, linear_weight, target, linear_bias, weight, *options)
    arguments = (grad_output, *call[:5], stats, *options, *wanted)
    problem = check("linear_cross_entropy_backward", arguments, call)
    count = problem.rows if reduction == NONE else 1
    if grad_output.numel() != count or grad_output.dtype != problem.acc:
        raise RuntimeError(
            f"linear_cross_entropy_backward: expected grad_output of {count} elements of dtype "
            f"{problem.acc}, but got shape {list(grad_output.shape)} and dtype {grad_output.dtype}"
        )
    if stats.numel() != 2 * problem.rows or not stats.is_contiguous():
        raise RuntimeError(
            f"linear_cross_entropy_backward: expected stats of shape [2, {problem.rows}], but got "
            f"{list(stats.shape)}"
        )
    gradients = problem.gradients(wanted)
    if problem.rows and problem.classes and gradients.any:
        grad_output = grad_output.reshape((count,) if reduction == NONE else ()).contiguous()
        scale = problem.mean_scale()
        stats = stats.view(2, problem.rows)
        linear_cross_entropy_chunks.backward(problem, grad_output, stats, gradients, scale)
    return _given(problem, gradients)

"""linear_cross_entropy in Triton: the functions of csrc/ops/linear_cross_entropy.cpp.

    logits = input @ linear_weight.T + linear_bias      input (N, H), linear_weight (C, [D,] H)
    loss = cross_entropy(logits, target)

Argument for argument the native operators, by one of two schedules:

* chunks of rows (linear_cross_entropy_chunks.py): the products are the library's, a chunk's logits
  are in memory, and for 16-bit dtypes float32 sums of linear_weight's gradient;
* tiles (linear_cross_entropy_tiles.py): the logits are never in memory, and are made again for each
  of the gradients. For class indices, since probabilities are as large as the logits, and for
  linear_weight (C, H).

Both have the same statistics, so that either may make the gradients of the other's loss. Which one
serves a call depends on its shapes, dtype and target alone (`by_tiles`), or on `use_schedule`.
Nothing here waits for the device, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torchext.triton_kernels import linear_cross_entropy_chunks, linear_cross_entropy_tiles
from torchext.triton_kernels.cross_entropy_call import INDICES
from torchext.triton_kernels.linear_cross_entropy_call import NONE, Gradients, Problem, check

from torchext.ops import linear_cross_entropy_fake as fakes

__all__ = [
    "by_tiles",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "use_schedule",
]

_SCHEDULES = {"chunks": linear_cross_entropy_chunks, "tiles": linear_cross_entropy_tiles}
_schedule = "auto"
NARROW = {2: 128, 4: 32}
"""Features up to which tiles are taken, by the element's size: where to make a logit again costs
less than to write and read it. Beside the products, chunks move 10 bytes of a 16-bit logit (written
once, read by the loss, overwritten, read by two products): 2.3 ps at 4.3 TB/s. Two products more,
and all five at two thirds of the library's 790 TFLOP/s, are 0.011 H ps. Reckoned, not measured."""
MANY = 8192
"""Rows and classes from which on: fewer would leave multiprocessors without a block of them."""


@contextmanager
def use_schedule(name: str) -> Iterator[None]:
    """Chooses the schedule of the calls inside a ``with`` block, in the whole process.

    Where memory is shortest, ``"tiles"`` needs no workspace worth the name for any shape, at the
    price of (5 + 2 (B - 1)) / 3 times the multiplications, B blocks of 128 features (64 in float32,
    32 in float64). Backward goes by what is chosen when it runs.

    Args:
        name: ``"auto"`` (by the shapes: `by_tiles`), ``"chunks"`` or ``"tiles"``.

    Raises:
        ValueError: for another name.
    """
    global _schedule
    names = ("auto", *_SCHEDULES)
    if name not in names:
        raise ValueError(f"use_schedule: expected name to be one of {names}, but got {name!r}")
    previous, _schedule = _schedule, name
    try:
        yield
    finally:
        _schedule = previous


def by_tiles(input: Tensor, linear_weight: Tensor, target: Tensor) -> bool:
    """Whether tiles serve a call, and their gradients are better made in backward.

    Of themselves: for class indices, few features (`NARROW`), many rows and classes (`MANY`), and
    logits that the buffer of the chunks could not hold at once.
    """
    if target.dtype not in INDICES or linear_weight.dim() > 2 or _schedule == "chunks":
        return False
    (rows, features), classes = input.shape, linear_weight.shape[0]
    size = input.element_size()
    return _schedule == "tiles" or (
        features <= NARROW.get(size, 0)
        and min(rows, classes) >= MANY
        and rows * classes * size > linear_cross_entropy_chunks.BUFFER_BYTES
    )


def _schedule_of(problem: Problem) -> Any:
    tiles = by_tiles(problem.input, problem.linear_weight, problem.target)
    return _SCHEDULES["tiles" if tiles else "chunks"]


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
    stats = input.new_empty((2, problem.positions), dtype=problem.acc)
    if problem.positions == 0 or problem.classes == 0:
        loss = fakes.definition(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
            label_smoothing,
        )  # fmt: skip
        return loss, stats, *_given(problem, gradients)
    losses = input.new_empty((problem.positions,), dtype=problem.acc)
    scale = problem.mean_scale() if gradients.any else None
    _schedule_of(problem).forward(problem, losses, stats, gradients, scale)
    if reduction == NONE:
        loss = losses.view(problem.rows, *linear_weight.shape[1:-1])
    else:
        loss = problem.reduced(losses)
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
    count = problem.positions if reduction == NONE else 1
    if grad_output.numel() != count or grad_output.dtype != problem.acc:
        raise RuntimeError(
            f"linear_cross_entropy_backward: expected grad_output of {count} elements of dtype "
            f"{problem.acc}, but got shape {list(grad_output.shape)} and dtype {grad_output.dtype}"
        )
    if stats.numel() != 2 * problem.positions or not stats.is_contiguous():
        raise RuntimeError(
            f"linear_cross_entropy_backward: expected stats of shape [2, {problem.positions}], but "
            f"got {list(stats.shape)}"
        )
    gradients = problem.gradients(wanted)
    if problem.positions and problem.classes and gradients.any:
        grad_output = grad_output.reshape((count,) if reduction == NONE else ()).contiguous()
        scale = problem.mean_scale()
        stats = stats.view(2, problem.positions)
        _schedule_of(problem).backward(problem, grad_output, stats, gradients, scale)
    return _given(problem, gradients)

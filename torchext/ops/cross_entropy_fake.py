"""The reductions; and shapes, dtypes and strides of cross_entropy's operators, for fake tensors.

The eager definition is called too, so that shapes that do not go together raise here as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchext import reference

REDUCTIONS = ("none", "mean", "sum")
# What stock takes, with a warning, for "mean": the eager definition has it.
DEPRECATED_REDUCTIONS = ("elementwise_mean",)


def check_reduction(op: str, reduction: object) -> None:
    """Raises stock's ValueError for what is none of these."""
    if reduction not in (*REDUCTIONS, *DEPRECATED_REDUCTIONS):
        raise ValueError(
            f"{op}: expected reduction to be one of {REDUCTIONS}, but got {reduction!r}: "
            f"{reduction} is not a valid value for reduction"
        ) from None


def empty_gradient(input: Tensor) -> Tensor:
    """The kernels' layout of a gradient: the logits' own, as far as it is dense."""
    if (
        input.dim() >= 2
        and input.shape[1] != 1
        and input.stride(1) != 1
        and input.stride(0) == 1
        and all(size == 1 for size in input.shape[2:])
    ):
        rows, classes = input.shape[:2]
        strides = (1, rows, *[rows * classes] * (input.dim() - 2))
        return input.new_empty_strided(input.shape, strides)
    if input.dim() > 2 and input.stride(1) == 1 and input.shape[1] != 1 and _one_stride(input):
        last = [input.shape[0], *input.shape[2:], input.shape[1]]
        return input.new_empty(last).movedim(-1, 1)
    return input.new_empty(input.shape)


def _one_stride(input: Tensor) -> bool:
    """Whether d1, d2, ... can be walked with one stride."""
    expected = None
    for size, stride in zip(reversed(input.shape[2:]), reversed(input.stride()[2:]), strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return False
        expected = stride * size
    return True


def to_check(weight: Tensor | None, target: Tensor, classes: int) -> Tensor | None:
    """Returns the class weights that stock's checks need to see: not those of probabilities.

    With symbolic sizes torch 2.11 cannot weigh them.
    """
    if weight is not None and target.is_floating_point() and weight.shape == (classes,):
        return None
    return weight


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    save_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss, stats and gradient."""
    name = REDUCTIONS[reduction]
    classes = input.shape[0 if input.dim() == 1 else 1]
    checked = to_check(weight, target, classes)
    reference.cross_entropy(input, target, checked, ignore_index, name, label_smoothing)
    # The shape is ours: with symbolic sizes, stock's fake loss of reduction none is a scalar.
    rows = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    loss = input.new_empty(rows if reduction == 0 else ())
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    positions = 0 if save_gradient else input.numel() // classes
    stats = input.new_empty((2, positions), dtype=wide)
    return loss, stats, empty_gradient(input) if save_gradient else input.new_empty((0,))


def forward_(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Returns the loss."""
    return input.new_empty(())


def backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Returns the gradient."""
    return empty_gradient(input)

"""Shapes and dtypes of the CPU kernel's operators of the extras, for fake tensors.

No capture keeps these operators: it keeps those of extras_operator.py, which call them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchext.ops.linear_cross_entropy_fake import wide


def forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, *rest: Any
) -> tuple[Tensor, ...]:
    """Returns loss, lse, argmax, stats, mass and gradient."""
    return_lse, return_argmax, save_gradient = rest[-3:]
    sums, rows = wide(input.dtype), input.shape[0]
    return (
        input.new_empty((rows,) if reduction == 0 else (), dtype=sums),
        input.new_empty((rows if return_lse else 0,), dtype=sums),
        input.new_empty((rows if return_argmax else 0,), dtype=torch.int64),
        input.new_empty((2, rows), dtype=sums),
        input.new_empty((), dtype=torch.float64),
        input.new_empty(input.shape if save_gradient else (0,)),
    )


def nothing(*_: Any) -> None:
    """Everything is written in place."""


def mass(target: Tensor, *_: Any) -> Tensor:
    """Returns a scalar."""
    return target.new_empty((), dtype=torch.float64)

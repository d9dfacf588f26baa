"""One call of linear_cross_entropy: its checks, its tensors, and what it allocates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchext.triton_kernels.common import accumulator, refuse
from torchext.triton_kernels.cross_entropy_call import FLOATING, INDICES, check_classes
from torchext.triton_kernels.reductions import reduce

_OP = "linear_cross_entropy"
NONE, MEAN = 0, 1


class Gradients(NamedTuple):
    """The gradients, None where one is not asked for."""

    input: Tensor | None  # (N, H)
    linear_weight: Tensor | None  # (C, H) or (C, D, H)
    linear_bias: Tensor | None  # (C) or (C, D)

    @property
    def any(self) -> bool:
        """Whether one is asked for."""
        return self != (None, None, None)


class Problem(NamedTuple):
    """One call's tensors, in the order of the operators' arguments, and its options."""

    input: Tensor  # (N, H)
    linear_weight: Tensor  # (C, H) or (C, D, H)
    target: Tensor  # (N) or (N, D) class indices, or (N, C) or (N, C, D) probabilities
    linear_bias: Tensor | None  # (C) or (C, D)
    weight: Tensor | None  # (C)
    reduction: int
    ignore_index: int
    smoothing: float

    @property
    def rows(self) -> int:
        """N."""
        return self.input.shape[0]

    @property
    def classes(self) -> int:
        """C."""
        return self.linear_weight.shape[0]

    @property
    def inner(self) -> int:
        """D, of a linear_weight that has it, else 1."""
        return self.linear_weight.shape[1:-1].numel()

    @property
    def positions(self) -> int:
        """N D: of losses."""
        return self.rows * self.inner

    @property
    def indexed(self) -> bool:
        """Whether the target is of class indices."""
        return self.target.dtype in INDICES

    @property
    def acc(self) -> torch.dtype:
        """The dtype of sums."""
        return accumulator(self.input.dtype)

    def gradients(self, wanted: tuple[bool, ...]) -> Gradients:
        """Returns the gradients that are wanted, without a value yet; 0 where no row has one."""
        shapes = (self.input.shape, self.linear_weight.shape, self.linear_weight.shape[:-1])
        make = self.input.new_empty if self.rows else self.input.new_zeros
        return Gradients(
            *(make(shape) if want else None for shape, want in zip(shapes, wanted, strict=True))
        )

    def mean_scale(self) -> Tensor | None:
        """Returns what a mean multiplies gradients by, from the targets."""
        if self.reduction != MEAN:
            return None
        scale = self.input.new_empty((), dtype=self.acc)
        self._reduce(None, None, scale)
        return scale

    def reduced(self, losses: Tensor) -> Tensor:
        """Returns the sum or mean of the positions' losses."""
        loss = self.input.new_empty((), dtype=self.acc)
        self._reduce(losses, loss, None)
        return loss

    def _reduce(self, losses: Tensor | None, loss: Tensor | None, scale: Tensor | None) -> None:
        target = self.target if self.indexed else None
        sizes = (self.positions, self.classes, self.ignore_index)
        reduce(losses, target, self.weight, loss, scale, *sizes, mean=self.reduction == MEAN)


def _served(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    smoothing: float,
) -> bool:
    """The conditions of csrc/ops/linear_cross_entropy.h, whose words `refuse` gets."""
    if input.dim() != 2 or linear_weight.dim() not in (2, 3):
        return False
    if input.shape[1] != linear_weight.shape[-1]:
        return False
    if input.dtype not in FLOATING or reduction not in (0, 1, 2) or smoothing > 1.0:
        return False
    rows, (classes, *inner) = input.shape[0], linear_weight.shape[:-1]
    indexed = target.dtype in INDICES
    if target.shape != ((rows, *inner) if indexed else (rows, classes, *inner)):
        return False
    if linear_bias is not None and linear_bias.shape != (classes, *inner):
        return False
    if weight is not None and (
        weight.shape != (classes,) or weight.dtype not in (input.dtype, accumulator(input.dtype))
    ):
        return False
    floating = [linear_weight] + ([] if linear_bias is None else [linear_bias])
    floating += [] if indexed else [target]
    tensors = [*floating, target] + ([] if weight is None else [weight])
    return all(tensor.dtype == input.dtype for tensor in floating) and all(
        tensor.device == input.device for tensor in tensors
    )


def check(operator: str, arguments: tuple[Any, ...], call: tuple[Any, ...]) -> Problem:
    """Refuses what no kernel takes; where the host may look, classes that do not exist too.

    Args:
        operator: which of the two.
        arguments: the operator's, for the words of a refusal.
        call: input, linear_weight, target, linear_bias, weight and the options.

    Returns:
        The call, with target and weights dense, and a linear_weight that flattens to a view.
    """
    input, linear_weight, target, linear_bias, weight, reduction, ignore_index, smoothing = call
    if not _served(*call[:6], smoothing):
        refuse(lambda: getattr(torch.ops.torchext, operator).default, _OP, arguments)
    if target.dtype in INDICES:
        check_classes(_OP, target, linear_weight.shape[0], ignore_index)
        target = target.contiguous()
    return Problem(
        input,
        linear_weight if linear_weight.dim() == 2 else linear_weight.contiguous(),
        target,
        None if linear_bias is None else linear_bias.contiguous(),
        None if weight is None else weight.contiguous(),
        reduction,
        ignore_index,
        smoothing if smoothing > 0 else 0.0,
    )

"""`CrossEntropyLoss`: `nn.CrossEntropyLoss` in one pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchext.ops.cross_entropy import cross_entropy, scripted


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Computes the cross-entropy between logits and targets.

    Constructor and ``state_dict`` are those of :class:`torch.nn.CrossEntropyLoss`, with one
    argument more. Shapes, formula and errors: :func:`torchext.cross_entropy`.

    Args:
        weight: a weight for each class, a buffer of the module.
        size_average: deprecated, see `reduction`.
        ignore_index: the class index that counts for nothing.
        reduce: deprecated, see `reduction`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: how much of each target is spread over all classes, in [0, 1].
        inplace_backward: lets the gradient overwrite the logits.
    """

    __constants__ = ["ignore_index", "reduction", "label_smoothing", "inplace_backward"]

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of logits `input` against `target`."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return scripted(
                input,
                target,
                self.weight,
                self.ignore_index,
                self.reduction,
                self.label_smoothing,
            )
        else:
            return cross_entropy(
                input,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
                inplace_backward=self.inplace_backward,
            )

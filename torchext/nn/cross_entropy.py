"""`CrossEntropyLoss`: `nn.CrossEntropyLoss` in one pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchext.ops.cross_entropy import cross_entropy
from torchext.ops.extras import NONE, Extras


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Computes the cross-entropy between logits and targets.

    Constructor and ``state_dict`` are those of :class:`torch.nn.CrossEntropyLoss`, with the extras
    of :func:`torchext.cross_entropy`, which TorchScript does not have. Shapes, formula and errors
    are that function's.

    Args:
        weight: a weight for each class, a buffer of the module.
        size_average: deprecated, see `reduction`.
        ignore_index: the class index that counts for nothing.
        reduce: deprecated, see `reduction`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: how much of each target is spread over all classes, in [0, 1].
        z_loss: adds ``z_loss * lse ** 2`` to each position's loss.
        softcap: takes ``softcap * tanh(logits / softcap)`` for the logits.
        logit_scale: multiplies the logits first.
        inplace_backward: lets the gradient overwrite the logits.
        return_lse: returns the logits' log-sum-exp too.
        return_argmax: returns the class of the largest logit too.
        ignored_mean: what a mean over no target gives: ``"nan"`` or ``"zero"``.
    """

    __constants__ = ["ignore_index", "reduction", "label_smoothing", "plain"]

    def __init__(
        self,
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
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace_backward = inplace_backward
        extras = Extras(z_loss, softcap, logit_scale, return_lse, return_argmax, ignored_mean)
        extras.check("CrossEntropyLoss", constant=True)
        self.plain = extras == NONE
        self.extras = {} if self.plain else extras._asdict()

    def extra_repr(self) -> str:
        """Returns the extras, where there are any."""
        shown = [] if self.plain else [Extras(**self.extras).shown()]
        return ", ".join([*shown, "inplace_backward=True"] if self.inplace_backward else shown)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of logits `input` against `target`, or a tuple with what else it has."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if not self.plain:
                raise RuntimeError("CrossEntropyLoss: TorchScript has no extras")
            return _scripted(
                input,
                target,
                self.weight,
                self.ignore_index,
                self.reduction,
                self.label_smoothing,
            )
        return self._eager(input, target)

    @torch.jit.unused
    def _eager(self, input: Tensor, target: Tensor) -> Tensor:
        buffers = self._buffers  # see `LinearReLU`
        weight = buffers["weight"] if "weight" in buffers else self.weight
        return cross_entropy(  # type: ignore[no-any-return]
            input,
            target,
            weight=weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
            **self.extras,
        )


def _scripted(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """The call as TorchScript takes it (no keyword-only arguments)."""
    # The operator has one gradient, that of input, and one dtype.
    if (target.is_floating_point() and (target.requires_grad or target.dtype != input.dtype)) or (
        weight is not None and (weight.requires_grad or weight.dtype != input.dtype)
    ):
        return torch.nn.functional.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
    code = 1
    if reduction == "none":
        code = 0
    elif reduction == "sum":
        code = 2
    return torch.ops.torchext.cross_entropy_forward(  # type: ignore[no-any-return]
        input, target, weight, code, ignore_index, label_smoothing, False
    )[0]

"""`LinearCrossEntropyLoss`: the head of a classifier and its loss, without the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchext.ops.extras import NONE, Extras
from torchext.ops.linear_cross_entropy import linear_cross_entropy
from torchext.ops.linear_cross_entropy_call import scripted


class LinearCrossEntropyLoss(nn.Module):
    """Computes the cross-entropy between linearly transformed input and targets.

    Constructor and ``state_dict`` are those of torch 2.13's ``nn.LinearCrossEntropyLoss`` (whose
    ``options`` is not needed: the logits never exist as a whole); it exists on torch 2.11 too.
    TorchScript has it without the extras, for CPU tensors.
    Shapes, formula and errors: :func:`torchext.linear_cross_entropy`.

    Args:
        in_features: size of each input sample.
        num_classes: number of classes.
        out_features: the dimensions :math:`(d_1, ..., d_K)` of a K-dimensional loss.
        bias: whether the linear transformation has a bias.
        device: where its parameters are made.
        dtype: the parameters' dtype.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: a weight for each class, a buffer of the module.
        ignore_index: the class index that counts for nothing; None means -100.
        label_smoothing: how much of each target is spread over all classes, in [0, 1].
        z_loss: adds ``z_loss * lse ** 2`` to each position's loss.
        softcap: takes ``softcap * tanh(logits / softcap)`` for the logits.
        logit_scale: multiplies the logits first.
        return_lse: returns the logits' log-sum-exp too.
        return_argmax: returns the class of the largest logit too.
        ignored_mean: what a mean over no target gives: ``"nan"`` or ``"zero"``.
    """

    __constants__ = [
        "num_classes",
        "reduction",
        "ignore_index",
        "label_smoothing",
        "plain",
        "inner",
    ]

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        return_lse: bool = False,
        return_argmax: bool = False,
        ignored_mean: str = "nan",
    ) -> None:
        super().__init__()
        extras = Extras(z_loss, softcap, logit_scale, return_lse, return_argmax, ignored_mean)
        extras.check("LinearCrossEntropyLoss", constant=True)
        self.plain = extras == NONE
        self.extras = {} if self.plain else extras._asdict()
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"LinearCrossEntropyLoss: expected weight of shape {(num_classes,)}, but got "
                f"{tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(
                f"LinearCrossEntropyLoss: expected label_smoothing in [0, 1], but got "
                f"{label_smoothing}"
            )
        self.weight: Tensor | None  # not on the class: TorchScript would read it there, and cannot
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = out_features
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.inner = math.prod(out_features) if out_features else 0  # 0: no dimensions but C
        # For TorchScript, which cannot tell what an empty list is of.
        self.sizes = torch.jit.Attribute(list(out_features), list[int])
        # A weight of K dimensions is kept flat, as torch keeps it.
        self.linear = nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias, device, dtype
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of `input` against `target`, or a tuple with what else it has."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._eager(input, target)
        if not self.plain:
            raise RuntimeError("LinearCrossEntropyLoss: TorchScript has no extras")
        linear_weight = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        if self.inner != 0:
            linear_weight = linear_weight.reshape(self.num_classes, self.inner, -1)
            if linear_bias is not None:
                linear_bias = linear_bias.reshape(self.num_classes, self.inner)
        return scripted(
            input,
            linear_weight,
            target,
            linear_bias,
            self.weight,
            self.reduction,
            self.ignore_index,
            self.label_smoothing,
            self.sizes,  # type: ignore[arg-type]
        )

    @torch.jit.unused
    def _eager(self, input: Tensor, target: Tensor) -> Tensor:
        # As nn.Module finds them, a call and an exception less each: see `LinearReLU`.
        modules, buffers = self._modules, self._buffers
        linear: Any = modules["linear"] if "linear" in modules else self.linear
        weight = buffers["weight"] if "weight" in buffers else self.weight
        own = linear._parameters
        linear_weight: Tensor = own["weight"] if "weight" in own else linear.weight
        linear_bias: Tensor | None = own["bias"] if "bias" in own else linear.bias
        if self.out_features:
            inner = (self.num_classes, *self.out_features)
            linear_weight = linear_weight.reshape((*inner, linear.in_features))
            linear_bias = None if linear_bias is None else linear_bias.reshape(inner)
        # Not `**` of none, which makes a dict of all: 1.8 us of 29.
        run: Callable[..., Tensor] = linear_cross_entropy
        if not self.plain:
            run = partial(run, **self.extras)
        return run(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        """Returns the options."""
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, "
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
            f"{', ' + Extras(**self.extras).shown() if self.extras else ''}"
        )

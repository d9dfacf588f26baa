r"""What the losses can do beside the stock ones, made of differentiable ops.

    z = softcap tanh(logit_scale x / softcap)        the logits x, scaled, then capped
    lse_n = log sum_c exp z_nc
    loss_n = cross_entropy(z)_n + z_loss lse_n^2     nothing where the target is ignored

Every backend serves them. Rows of logits have a kernel of their own (csrc/cpu, csrc/cuda,
triton_kernels: cross_entropy_extras*); other logits take the backend's cross_entropy and torch's
ops around it, and linear_cross_entropy makes the logits by chunks of rows where it can
(extras_autograd.py; of a compiled call, extras_operator.py). `z_loss` and `softcap` are those of
PaLM (Chowdhery et al., 2022) and Gemma 2 (Gemma team, 2024).

Siblings: torchext/ops/cross_entropy.py, torchext/ops/linear_cross_entropy.py, tests/test_extras.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction

from torchext import _errors, reference
from torchext.ops.cross_entropy_fake import REDUCTIONS, check_reduction

_MEANS = ("nan", "zero")
_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.float16, torch.bfloat16)


class Extras(NamedTuple):
    """The extras that one call asks for."""

    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    return_lse: bool = False
    return_argmax: bool = False
    ignored_mean: str = "nan"

    def check(self, op: str, constant: bool = False) -> None:
        """Raises TypeError for what is no number, ValueError for values that have no meaning.

        Args:
            op: what refuses them.
            constant: whether tensors are no numbers either: a module would not own such a scale.
        """
        if constant:
            for name, value in self._asdict().items():
                if isinstance(value, Tensor):
                    raise TypeError(
                        f"{op}: expected {name} to be a number, but got {type(value).__name__} "
                        "(of the functions it may be a tensor)"
                    )
        _check_number(op, "z_loss", self.z_loss)
        if self.softcap is not None:
            _check_number(op, "softcap", self.softcap)
        _check_number(op, "logit_scale", self.logit_scale)
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(
                f"{op}: expected softcap above 0, finite, or None, but got {self.softcap}"
            )
        if self.ignored_mean not in _MEANS:
            raise ValueError(
                f"{op}: expected ignored_mean to be one of {_MEANS}, but got {self.ignored_mean!r}"
            )

    @property
    def need_logits(self) -> bool:
        """Whether they need the logits themselves, not their loss alone."""
        return (
            self.z_loss != 0
            or self.softcap is not None
            or self.logit_scale != 1
            or self.return_lse
            or self.return_argmax
        )

    def shown(self) -> str:
        """Returns those that are asked for, as a module's repr shows them."""
        pairs = zip(self._asdict().items(), NONE, strict=True)
        return ", ".join(f"{name}={value}" for (name, value), none in pairs if value != none)


# What a call without extras has.
NONE = Extras()

# loss(logits, target, weight, ignore_index, reduction, label_smoothing)
Loss = Callable[[Tensor, Tensor, Tensor | None, int, str, float], Tensor]
Result = Tensor | tuple[Tensor, ...]


def _check_number(op: str, name: str, value: object) -> None:
    # A tensor is one as well: a scale may be learned. (Dynamo asks a SymFloat for no attribute.)
    if not isinstance(value, (*_errors.FLOAT, Tensor)) and not hasattr(value, "__float__"):
        raise TypeError(f"{op}: expected {name} to be a number, but got {type(value).__name__}")


def _check(
    op: str,
    extras: Extras,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    tensors: dict[str, Tensor],
    optional: dict[str, Tensor | None],
) -> str:
    """Refuses arguments of other types, and values without meaning; returns the reduction."""
    _errors.check_types(op, ((name, value, _errors.TENSOR) for name, value in tensors.items()))
    _errors.check_types(
        op, ((name, value, _errors.OPTIONAL_TENSOR) for name, value in optional.items())
    )
    _errors.check_types(op, (("ignore_index", ignore_index, _errors.OPTIONAL_INT),))
    _check_number(op, "label_smoothing", label_smoothing)
    extras.check(op)
    check_reduction(op, reduction)
    if reduction in REDUCTIONS:
        return reduction
    return REDUCTIONS[_reduction.get_enum(reduction)]  # the deprecated one, with torch's warning


def _widened(target: Tensor) -> Tensor:
    """Class indices as int64: uint8 and int32 would be compared in their own width, and wrap."""
    return target.long() if target.dtype in (torch.uint8, torch.int32) else target


def cross_entropy(
    loss_of: Loss,
    extras: Extras,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    overwriting: Callable[..., Tensor | None] | None = None,
) -> Result:
    """Computes a loss with extras.

    Args:
        loss_of: the loss without them.
        extras: what is asked for.
        input: the logits. The others: see `torchext.cross_entropy`.
        target: of the loss.
        weight: of the loss.
        ignore_index: of the loss.
        reduction: of the loss.
        label_smoothing: of the loss.
        overwriting: see `extras_logits.attempt`; torch's ops leave the logits alone.

    Returns:
        The loss, or a tuple of it, the lse and the argmax, as far as they are asked for.
    """
    tensors_of = {"input": input, "target": target}
    optional = {"weight": weight}
    reduction = _check(
        "cross_entropy", extras, reduction, ignore_index, label_smoothing, tensors_of, optional
    )
    if extras.need_logits:
        from torchext.ops import extras_logits  # made of what is here

        served = extras_logits.attempt(
            input, target, weight, extras, reduction, ignore_index, label_smoothing, overwriting
        )
        if served is not None:
            return served
    return defined(loss_of, extras, input, target, weight, ignore_index, reduction, label_smoothing)


def defined(
    loss_of: Loss,
    extras: Extras,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Result:
    """What `cross_entropy` computes, by its definition, of which second derivatives are made."""
    target = _widened(target)
    logits = input
    if extras.logit_scale != 1:
        logits = logits * extras.logit_scale
    if extras.softcap is not None:
        logits = extras.softcap * torch.tanh(logits / extras.softcap)
    from torchext.ops.extras_lse import log_sum_exp  # made of what is here

    # The loss comes first: it refuses what is wrong, in stock's classes.
    options = (label_smoothing,)
    lse = None
    if extras.z_loss == 0:
        loss = mean_or(
            lambda how: loss_of(logits, target, weight, ignore_index, how, *options),
            extras, reduction, target, weight, ignore_index, logits,
        )  # fmt: skip
    else:
        rows = loss_of(logits, target, weight, ignore_index, "none", *options)
        lse = log_sum_exp(logits)
        squares = extras.z_loss * lse.square()
        if not target.is_floating_point():
            squares = squares.masked_fill(target.reshape(squares.shape) == ignore_index, 0)
        rows = (rows + squares.reshape(rows.shape)).to(rows.dtype)
        loss = mean_or(
            lambda how: rows if how == "none" else rows.sum(),
            extras, reduction, target, weight, ignore_index, logits, own_mean=False,
        )  # fmt: skip
    if not (extras.return_lse or extras.return_argmax):
        return loss
    result = [loss]
    if extras.return_lse:
        result.append(log_sum_exp(logits) if lse is None else lse)
    if extras.return_argmax:
        result.append(logits.argmax(0 if logits.dim() <= 1 else 1))
    return tuple(result)


def linear_cross_entropy(
    loss_of: Callable[..., Tensor],
    extras: Extras,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
) -> Result:
    """Computes the loss of a linear transformation with extras.

    Args:
        loss_of: the loss without them, of what follows.
        extras: what is asked for.
        input: the features. The others: see `torchext.linear_cross_entropy`.
        linear_weight: of the transformation.
        target: of the loss.
        linear_bias: of the transformation.
        weight: of the loss.
        reduction: of the loss.
        ignore_index: of the loss.
        label_smoothing: of the loss.

    Returns:
        See `cross_entropy`.
    """
    op = "linear_cross_entropy"
    tensors_of = {"input": input, "linear_weight": linear_weight, "target": target}
    optional = {"linear_bias": linear_bias, "weight": weight}
    reduction = _check(op, extras, reduction, ignore_index, label_smoothing, tensors_of, optional)
    target = _widened(target)
    ignored = -100 if ignore_index is None else ignore_index
    rest = extras._replace(logit_scale=1.0)
    if extras.logit_scale != 1 and not rest.need_logits and input.dtype in _WIDE:
        input = input * extras.logit_scale
        linear_bias = None if linear_bias is None else linear_bias * extras.logit_scale
        extras = rest
    tensors = (input, linear_weight, target, linear_bias, weight)
    if not extras.need_logits:

        def reduced(how: str) -> Tensor:
            return loss_of(*tensors, how, ignore_index, label_smoothing)

        return mean_or(reduced, extras, reduction, target, weight, ignored, input)
    from torchext.ops import extras_autograd  # made of what is here

    result = extras_autograd.attempt(*tensors, extras, reduction, ignore_index, label_smoothing)
    if result is None:
        result = _on_whole_logits(*tensors, extras, reduction, ignore_index, label_smoothing)
    return result


def _on_whole_logits(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    extras: Extras,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
) -> Result:
    """The definition, for what the chunks do not serve, and what is wrong."""
    import torchext

    reference.check_linear_cross_entropy(input, linear_weight, target, linear_bias, ignore_index)
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), bias)
    flat, shape = input.dim() > 2, target.shape
    if flat:
        logits, target = logits.flatten(0, -2), target.flatten()
    elif linear_weight.dim() > 2:
        logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    ignored = -100 if ignore_index is None else ignore_index
    result = torchext.cross_entropy(
        logits, target, weight, ignore_index=ignored, reduction=reduction,
        label_smoothing=label_smoothing, **extras._asdict(),
    )  # fmt: skip
    if not flat:
        return result  # type: ignore[no-any-return]
    if isinstance(result, Tensor):
        return result.reshape(shape) if reduction == "none" else result
    loss, *others = result
    loss = loss.reshape(shape) if reduction == "none" else loss
    return (loss, *(other.reshape(shape) for other in others))


def mean_or(
    reduced: Callable[[str], Tensor],
    extras: Extras,
    reduction: str,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    like: Tensor,
    own_mean: bool = True,
) -> Tensor:
    """Reduces a loss, a mean as `ignored_mean` says.

    Args:
        reduced: the loss by reduction.
        extras: what is asked for.
        reduction: what is asked for.
        target: the targets.
        weight: of the classes.
        ignore_index: which targets count for nothing.
        like: the logits, or what has as many dimensions and their dtype.
        own_mean: whether `reduced` knows the mean that is NaN over no target.
    """
    if reduction != "mean" or (own_mean and extras.ignored_mean == "nan"):
        return reduced(reduction)
    if like.dtype in _NARROW:  # a sum of float16 would overflow before it is divided
        rows = reduced("none")
        total, dtype = rows.float().sum(), rows.dtype
    else:
        total = reduced("sum")
        dtype = total.dtype
    if target.is_floating_point():
        classes = target.shape[0 if like.dim() == 1 else 1]
        mass = torch.full_like(total, target.numel() // max(classes, 1))
    else:
        kept = target != ignore_index
        if weight is None:
            mass = kept.sum()
        else:
            index = target.masked_fill(~kept, 0).long()
            chosen = torch.where(kept, weight[index], torch.zeros_like(weight[index]))
            mass = chosen.sum(dtype=total.dtype)
    # By infinity it is 0, and so is its gradient, whatever label smoothing or z_loss add to targets
    # that weigh nothing. Else it is stock's: there the loss of the targets is 0/0.
    nothing = math.inf if extras.ignored_mean == "zero" else math.nan
    return (total / torch.where(mass == 0, nothing, mass.double())).to(dtype)

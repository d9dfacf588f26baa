"""What a call of linear_cross_entropy is made of, before a kernel sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchext import _backend, _native
from torchext.ops import linear_cross_entropy_gpu as gpu
from torchext.ops.cross_entropy_fake import REDUCTIONS

_PLAIN, _FLOATING = _backend.PLAIN, _backend.FLOATING
INDICES = frozenset({torch.int64, torch.int32, torch.uint8})
CODES = {name: code for code, name in enumerate(REDUCTIONS)}

_in_dynamo = torch.compiler.is_dynamo_compiling
_is_tracing = torch._C._is_tracing
_grad_enabled = torch.is_grad_enabled
_INT64, _BFLOAT16, _FLOAT16 = torch.int64, torch.bfloat16, torch.float16
_WIDE = frozenset({torch.float32, torch.float64})
_linear: Any = torch._C._nn.linear
_stock: Any = torch._C._nn.cross_entropy_loss
# Multiplications of the logits. Measured without gradients on 2 Zen 5 cores, us of stock and of
# ours: 1 x 8 x 8 3.4 and 7.3, 16 x 16 x 16 6.0 and 7.6, 16 x 64 x 10 9.7 and 7.8. Where the
# library's products are as fast as ours, of its time: 8 x 64 x 100 1.62, 128 x 64 x 100 1.52, 128 x
# 128 x 256 1.25, 128 x 64 x 1000 0.96 (2 cores of an Intel Xeon of family 6, model 207, float32).
_SMALL = 8192
# The same of no more than _FEW_ROWS rows, and of _MANY_CLASSES on, that fill the vectors of stock's
# softmax. Ours takes of stock's time on 2 Zen 5 cores, 1 x 768 x 100 1.66, 1 x 16 x 1000 1.6, 16 x
# 256 x 10 and 100 1.16 and 1.15, 128 x 16 x 100 1.25, but 128 x 64 x 10 0.54; in bfloat16 16 x 256
# x 1000 1.22, 128 x 256 x 100 1.23, 128 x 768 x 100 1.16.
_SMALL_OF_SUCH = 1 << 19
_SMALL_OF_SUCH_BFLOAT16 = 1 << 22
_FEW_ROWS = _MANY_CLASSES = 16
# The same with gradients, of narrow dtypes and without reduction. Of stock's time, forward and
# backward on 2 cores of Zen 4, ours takes without reduction of float32 1 x 256 x 16, 16 x 16 x 5
# and 2 x 64 x 64 1.23, 1.02 and 0.99; of bfloat16, which oneDNN multiplies from 4096 on, 1 x 256 x
# 16 1.50, but 8 x 256 x 5 0.57; of the float16 mean of 2 x 16 x 32, 8 x 256 x 5 and 16 x 64 x 16
# 1.34, 1.10 and 1.09, of 64 x 64 x 8 0.86.
_SMALL_WITH_GRADIENTS = 4096
_SMALL_WITH_GRADIENTS_FLOAT16 = 1 << 14
_MOST = _SMALL_OF_SUCH_BFLOAT16
_SMALL_ON_CPU = _SMALL if _native.own_products(torch.float32) else 1 << 22


def by_stock(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
) -> Tensor | None:
    """Calls torch's two ops where a call is too small to gain by ours; None for all others.

    Those are calls without gradients, and very small ones with them that are not `usual`: ours
    makes the logits again in backward then. Each look costs 50 ns.

    Args:
        input: (N, H).
        linear_weight: (C, H).
        target: class indices (N).
        linear_bias: (C).
        weight: (C).
        reduction: of the loss.
        ignore_index: of the loss.
        label_smoothing: of the loss.
    """
    if (
        not _backend.stock_when_small
        or label_smoothing  # of float16 and many classes its sum overflows
        # Before the sizes: a compiler would guard on them. Fake tensors have types of their own.
        or type(target) is not Tensor
        or _in_dynamo()
        or _is_tracing()
        or target.dtype is not _INT64
        or not 0 < (work := linear_weight.numel() * target.numel()) <= _MOST
        or (
            _grad_enabled()
            and (
                work > _SMALL_WITH_GRADIENTS
                and (input.dtype is not _FLOAT16 or work > _SMALL_WITH_GRADIENTS_FLOAT16)
                or not input.is_cpu
            )
            and (
                input.requires_grad
                or linear_weight.requires_grad
                or (linear_bias is not None and linear_bias.requires_grad)
                or (weight is not None and weight.requires_grad)
            )
        )
        or (
            work > _SMALL
            and work > (_SMALL_ON_CPU if input.is_cpu else _SMALL)
            and (
                work > (_SMALL_OF_SUCH_BFLOAT16 if input.dtype is _BFLOAT16 else _SMALL_OF_SUCH)
                or not input.is_cpu
                or (target.numel() > _FEW_ROWS and linear_weight.size(0) < _MANY_CLASSES)
            )
        )
        or input.dim() != 2
        or linear_weight.dim() != 2
        # What linear would broadcast is refused: nothing but (C) with (N, H) and (N) passes both
        # this and the loss's own check of batch sizes.
        or (
            linear_bias is not None
            and (linear_bias.dim() != 1 or linear_bias.numel() * input.numel() != work)
        )
    ):
        return None
    return _stock(  # type: ignore[no-any-return]
        _linear(input, linear_weight, linear_bias),
        target,
        weight,
        CODES[reduction],
        -100 if ignore_index is None else ignore_index,
        label_smoothing,
    )


def usual(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
) -> bool:
    """Whether the call is what training mostly makes, and the kernel will serve or refuse it.

    An ordinary one of plain CPU tensors, (N, H), (C, H) and (N), whose gradients forward makes,
    grad mode being on: one look at all that `by_stock`, `fit` and `place_of` ask.

    Args:
        input: (*, H).
        linear_weight: (C, ..., H).
        target: class indices or probabilities.
        linear_bias: (C, ...).
        weight: (C).
        reduction: of the loss.
        ignore_index: of the loss.
    """
    return (
        (input.requires_grad or linear_weight.requires_grad)
        and _backend.ordinary()
        and input.dtype in _WIDE
        and target.dtype is _INT64
        and input.is_cpu
        and weight is None
        and type(input) in _PLAIN
        and type(linear_weight) in _PLAIN
        and type(target) is Tensor
        and (linear_bias is None or (type(linear_bias) in _PLAIN and not linear_bias.is_neg()))
        and input.dim() == linear_weight.dim() == 2
        and target.dim() == 1
        and not (input.is_neg() or linear_weight.is_neg() or target.is_neg())
        and (reduction == "mean" or reduction == "sum")
        and type(ignore_index) is not bool
        and input.numel() * linear_weight.numel() > 0
    )


def cast_by_autocast(
    dtype: torch.dtype,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Casts as autocast does: F.linear's tensors to its dtype, cross_entropy's to float32.

    Args:
        dtype: autocast's.
        input: (*, H).
        linear_weight: (C, ..., H).
        target: class indices, which stay what they are, or probabilities.
        linear_bias: (C, ...).
        weight: (C).
    """
    return (
        _backend.cast(input, dtype),
        _backend.cast(linear_weight, dtype),
        _backend.cast(target, torch.float32),
        None if linear_bias is None else _backend.cast(linear_bias, dtype),
        None if weight is None else _backend.cast(weight, torch.float32),
    )


def fit(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> bool:
    """Whether the kernels take these dimensions.

    Args:
        input: (H), (*, H).
        linear_weight: (C, H), or (C, d1, ..., dK, H) with input (N, H).
        target: (*), or (N, C); (N, d1, ..., dK) or (N, C, d1, ..., dK).
        linear_bias: linear_weight's shape without H.
    """
    if input.numel() == 0 or linear_weight.numel() == 0:
        return False
    indices = target.dtype in INDICES
    dims = linear_weight.dim()
    if dims == 2:
        return target.dim() == input.dim() - 1 if indices else target.dim() == input.dim() == 2
    # K dimensions, flattened to one: what does not go together must not seem to.
    return (
        dims > 2
        and input.dim() == 2
        and target.dim() == (dims - 1 if indices else dims)
        and target.shape[2 - dims :] == linear_weight.shape[1:-1]
        and (linear_bias is None or linear_bias.shape == linear_weight.shape[:-1])
    )


def go_together(
    input: Tensor,
    linear_weight: Tensor | None,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    """Whether shapes and dtypes are those of a call that goes by chunks.

    Args:
        input: (*, H), or logits (N, C, d1, ..., dK).
        linear_weight: (C, H), or (C, d1, ..., dK, H) with input (N, H); None with logits.
        target: (*), (N, d1, ..., dK) or (N, C, d1, ..., dK).
        linear_bias: linear_weight's shape without H.
        weight: (C).
        dtype: that of probabilities and weight.
    """
    if linear_weight is None:
        if input.dim() < 2 or linear_bias is not None:
            return False
        batch, inner = input.shape[:1], input.shape[1:]
    elif (
        linear_weight.dim() < 2
        or input.dim() < 1
        or input.shape[-1] != linear_weight.shape[-1]
        or linear_weight.dtype is not input.dtype
    ):
        return False
    else:
        batch, inner = input.shape[:-1], linear_weight.shape[:-1]
    if target.dtype in INDICES:
        fitting = target.shape == batch + inner[1:]
    else:
        fitting = (
            target.shape == batch + inner
            and target.dtype is dtype
            and not target.requires_grad
            and len(batch) == 1
        )
    return (
        fitting
        and (len(inner) == 1 or len(batch) == 1)
        and (
            linear_bias is None or (linear_bias.shape == inner and linear_bias.dtype is input.dtype)
        )
        and (
            weight is None
            or (weight.shape == inner[:1] and weight.dtype is dtype and not weight.requires_grad)
        )
    )


def scripted(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    inner: list[int],
) -> Tensor:
    """The call as TorchScript takes it (no keyword-only arguments), for the module.

    Args:
        input: (H) or (*, H); (N, H) with a linear_weight of three dimensions.
        linear_weight: (C, H) or (C, D, H).
        target: class indices, or probabilities (N, C, ...).
        linear_bias: linear_weight's shape without H.
        weight: (C).
        reduction: of the loss.
        ignore_index: of the loss.
        label_smoothing: of the loss.
        inner: the dimensions of which D is the product.
    """
    probabilities = target.is_floating_point()
    if probabilities and ignore_index is not None:
        raise RuntimeError(
            "linear_cross_entropy: expected no ignore_index with a target of probabilities"
        )
    ignored = -100 if ignore_index is None else ignore_index
    shape = list(target.shape)  # of the positions
    if probabilities:
        shape = shape[:-1] if target.dim() == 1 else shape[:1] + shape[2:]
    expected = list(input.shape[:-1]) + inner
    classes = linear_weight.shape[0]
    if shape != expected or (
        probabilities and (input.dim() > 2 or target.shape[min(target.dim() - 1, 1)] != classes)
    ):
        raise RuntimeError(
            f"linear_cross_entropy: expected target of shape {expected}, or with {classes} classes "
            f"after the first dimension, but got {target.shape}"
        )
    if (probabilities and (target.requires_grad or target.dtype != input.dtype)) or (
        weight is not None and (weight.requires_grad or weight.dtype != input.dtype)
    ):  # the operator has no gradient of theirs, and one dtype
        flat = None if linear_bias is None else linear_bias.reshape(-1)
        logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), flat)
        if linear_weight.dim() == 3:
            logits = logits.reshape([input.shape[0], classes] + inner)
        elif input.dim() > 2:
            logits, target = logits.reshape(-1, classes), target.reshape(-1)
        loss: Tensor = torch.nn.functional.cross_entropy(
            logits, target, weight, None, ignored, None, reduction, label_smoothing
        )
        return loss.reshape(shape) if reduction == "none" else loss
    if linear_weight.dim() == 3:
        target = target.flatten(2 if probabilities else 1)
    else:
        input = input.unsqueeze(0) if input.dim() == 1 else input.flatten(0, -2)
        target = target.reshape(-1, target.shape[-1]) if probabilities else target.reshape(-1)
    code = 0 if reduction == "none" else 2 if reduction == "sum" else 1
    at_once = (
        code != 0 and torch.is_grad_enabled() and input.dtype in (torch.float32, torch.float64)
    )
    fused: Tensor = torch.ops.torchext.linear_cross_entropy_forward(
        input,
        linear_weight,
        target,
        linear_bias,
        weight,
        code,
        ignored,
        label_smoothing,
        at_once and input.requires_grad,
        at_once and linear_weight.requires_grad,
        at_once and linear_bias is not None and linear_bias.requires_grad,
    )[0]
    fused = fused.to(input.dtype)
    return fused.reshape(shape) if code == 0 else fused


def place_of(
    ordinary: bool,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
) -> int:
    """Which kernels serve the call, or are the ones to refuse it: see `_backend.route`.

    Args:
        ordinary: past the dispatcher, see `_backend.ordinary`.
        input: (*, H).
        linear_weight: (C, ..., H).
        target: class indices or probabilities.
        linear_bias: (C, ...).
        weight: (C).
    """
    if weight is not None and weight.requires_grad:
        return _backend.EAGER
    if target.requires_grad or (target.dtype not in INDICES and target.dtype != input.dtype):
        return _backend.EAGER
    if not ordinary:
        tensors = (input, linear_weight, target, linear_bias, weight)
        work = input.numel() * linear_weight.shape[:-1].numel()
        place = _backend.route(*tensors, op="linear_cross_entropy", work=work)
        if place == _backend.OPERATOR and not input.is_cpu:
            taken = gpu.library_takes(input, linear_weight, weight)
            return place if taken else _backend.beside_native(input)
        return place
    # The kernel itself refuses the other tensors' devices and layouts.
    plain = (
        input.dtype in _FLOATING
        and type(input) in _PLAIN
        and type(linear_weight) in _PLAIN
        and type(target) is Tensor
        and not (input.is_neg() or linear_weight.is_neg() or target.is_neg())
        and (linear_bias is None or (type(linear_bias) in _PLAIN and not linear_bias.is_neg()))
        and (weight is None or (type(weight) in _PLAIN and not weight.is_neg()))
    )
    return _backend.OPERATOR if plain else _backend.EAGER

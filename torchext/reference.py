"""The eager definition of each op, in torch's own ops.

It serves every call that no kernel serves, it is what the tests hold the kernels to, and the
baseline of the benchmarks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns ``relu(input @ weight.T + bias)``."""
    return F.relu(F.linear(input, weight, bias))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the cross-entropy of ``F.linear(input, linear_weight, linear_bias)``.

    Takes what torch 2.13's ``F.linear_cross_entropy`` takes, and input (*, H) with class indices
    (*) of more than one leading dimension.
    """
    check_linear_cross_entropy(input, linear_weight, target, linear_bias, ignore_index)
    if input.dim() > 2:
        rows = linear_cross_entropy(
            input.flatten(0, -2), linear_weight, target.flatten(), linear_bias, weight, reduction,
            ignore_index, label_smoothing,
        )  # fmt: skip
        return rows.reshape(target.shape) if reduction == "none" else rows
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    ignored = -100 if ignore_index is None else ignore_index
    return cross_entropy(logits, target, weight, ignored, reduction, label_smoothing)


def check_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int | None,
) -> None:
    """Raises RuntimeError, as stock does, for what the two ops alone would not refuse.

    Args:
        input: (H), (N, H), or (*, H) with target (*).
        linear_weight: (C, H) or (C, d1, ..., dK, H).
        target: as linear_cross_entropy takes it.
        linear_bias: linear_weight's shape without H.
        ignore_index: not to be given with probabilities.
    """
    op = "linear_cross_entropy"
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"{op}: expected linear_weight of at least 2 dimensions, but got {linear_weight.dim()}"
        )
    if input.dim() < 1 or (input.dim() > 2 and linear_weight.dim() > 2):
        raise RuntimeError(f"{op}: expected input of 1 or 2 dimensions, but got {input.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"{op}: expected equal last dimensions (in_features) of input and linear_weight, but "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}"
        )
    inner = linear_weight.shape[:-1]  # C, d1, ...
    if linear_bias is not None and linear_bias.shape != inner:
        raise RuntimeError(
            f"{op}: expected linear_bias of shape {list(inner)}, but got {list(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"{op}: expected input (N, {input.shape[-1]}) with linear_weight of shape "
            f"{list(linear_weight.shape)}, but got shape {list(input.shape)}"
        )
    if input.dim() > 2 and target.shape != input.shape[:-1]:
        raise RuntimeError(
            f"{op}: expected target of input's shape without its last dimension, "
            f"{list(input.shape[:-1])}, but got {list(target.shape)}"
        )
    if target.shape == input.shape[:-1] + inner and ignore_index is not None:
        raise RuntimeError(
            f"{op}: expected no ignore_index with a target of probabilities, but got {ignore_index}"
        )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns torch's cross-entropy, int32 and uint8 class indices taken as well."""
    if target.dtype == torch.int32 or target.dtype == torch.uint8:  # stock takes uint8 by halves
        target = target.long()
    return F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )

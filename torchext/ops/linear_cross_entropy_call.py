"""What a call of linear_cross_entropy is made of, before a kernel sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from torchext import _backend

INDICES = frozenset({torch.int64, torch.int32, torch.uint8})


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
        and input.is_cpu
        and input.dim() == 2
        and target.dim() == (dims - 1 if indices else dims)
        and target.shape[2 - dims :] == linear_weight.shape[1:-1]
        and (linear_bias is None or linear_bias.shape == linear_weight.shape[:-1])
    )

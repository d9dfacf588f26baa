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


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns torch's cross-entropy, int32 class indices taken as well."""
    if target.dtype == torch.int32:
        target = target.long()
    return F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )

"""The log-sum-exp over the classes, by the cross_entropy kernel's statistics: no logits copied.

torch's own makes one of their size forward, two backward, and before both one in float32 of narrow
logits. Here forward reads them once, and backward makes the gradient in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchext import _autograd, _backend
from torchext.ops.extras_chunks import log_sum, with_nan
from torchext.ops.extras_source import rows_per_chunk
from torchext.ops.linear_cross_entropy_fake import wide


def log_sum_exp(logits: Tensor) -> Tensor:
    """Returns the log-sum-exp of each position, in float32 or wider, differentiable.

    Args:
        logits: (C), (N, C) or (N, C, d1, ..., dK).
    """
    if (
        logits.dim() == 0
        or logits.numel() == 0
        or not _backend.ordinary(any_backend=True, autocast=True)
        or logits.is_neg()
        or _backend.route(logits, op="cross_entropy", work=logits.numel()) != _backend.OPERATOR
    ):
        return _defined(logits)
    return _Function.apply(logits)  # type: ignore[no-any-return, no-untyped-call]


def _defined(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits.to(wide(logits.dtype)), _class_dim(logits))


def _class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        positions = list(logits.shape)
        del positions[_class_dim(logits)]
        # Of the class that a position is given nothing comes into its statistics.
        target = torch.zeros(positions, dtype=torch.uint8, device=logits.device)
        stats = torch.ops.torchext.cross_entropy_forward(logits, target, None, 0, -100, 0.0, False)
        stats = with_nan(stats[1].view(2, *positions), logits, _class_dim(logits))
        ctx.save_for_backward(logits, stats)
        return log_sum(stats)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        logits, stats = ctx.saved_tensors
        if _autograd.wants_reference(grad, True):
            return _autograd.reference_gradients(_defined, (logits,), (True,), grad)[0]
        gradient = torch.empty_like(logits)
        largest, total = stats
        scale = grad / total
        if logits.dim() == 1:
            return torch.sub(logits, largest).exp_().mul_(scale).to(logits.dtype)
        rows = len(logits)
        step = rows_per_chunk(rows, logits[0].numel(), logits)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            # Of narrow logits a chunk in float32; else the gradient's own place.
            narrow = stats.dtype is not logits.dtype
            exps = torch.sub(
                logits[part], largest[part].unsqueeze(1), out=None if narrow else gradient[part]
            )
            exps.exp_().mul_(scale[part].unsqueeze(1))
            if narrow:
                gradient[part] = exps
        return gradient

"""cross_entropy whose gradient takes the place of the logits: ``inplace_backward=True``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchext import _autograd


def apart(input: Tensor, target: Tensor) -> bool:
    """Whether overwriting the logits leaves the target alone."""
    storages = (input.untyped_storage().data_ptr(), target.untyped_storage().data_ptr())
    return storages[0] != storages[1]


class _Inplace(torch.autograd.Function):
    """The gradient in the place of the logits."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        run: Callable[..., Tensor],
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        loss = run(input, target, weight, reduction, ignore_index, label_smoothing)
        # What saved the logits before this must not use them again, and backward must not use a
        # gradient that was changed after it.
        torch.autograd.graph.increment_version(input)
        ctx.owned = not _autograd.kept_by_hooks()
        ctx.save_for_backward(input.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        if _autograd.wants_reference(grad_loss):
            raise RuntimeError(
                "cross_entropy: a second derivative needs the logits, but inplace_backward=True "
                "overwrote them; call it with inplace_backward=False"
            )
        (gradient,) = ctx.saved_tensors
        scaled = _autograd.scaled((gradient,), grad_loss, ctx.owned)
        # Of an infinite gradient the logits would be needed: what has no part in it is NaN, too.
        (grad_input,) = scaled or _autograd.multiplied((gradient,), grad_loss)
        return None, grad_input, None, None, None, None, None


inplace: Callable[..., Tensor] = _autograd.fast_apply(_Inplace)

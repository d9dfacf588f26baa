"""Errors in bfloat16 and float16, summed over many calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchext.testing import derivatives


class Narrow:
    """The errors of many small results in low precision against those of the two stock ops.

    Of a few values that an error is the smaller one is a matter of luck; of their sum it is not.
    """

    def __init__(self) -> None:
        self.ours = self.eager = 0.0

    def add(
        self,
        ours: Any,
        eager: Any,
        arguments: list[Any],
        kwargs: dict[str, Any],
        truth_of: Callable[[Tensor], Any] | None = None,
    ) -> None:
        """Adds one call; `truth_of` as in `assert_drop_in`."""
        upstream = torch.randn_like(derivatives(eager, arguments, kwargs)[0])
        wide = pytree.tree_map(widened, (arguments, kwargs, upstream))
        found = [derivatives(function, arguments, kwargs, upstream) for function in (ours, eager)]
        exacts = [
            derivatives(eager if truth_of is None else truth_of(output), *wide)
            for output, *_ in found
        ]
        for actual, stock, exact, stock_exact in zip(*found, *exacts, strict=True):
            assert actual.dtype == stock.dtype and actual.shape == stock.shape
            size = exact.nan_to_num().abs().max().item()
            torch.testing.assert_close(
                actual.double(), exact, rtol=0, atol=2e-2 * (size + 1), equal_nan=True
            )
            if exact.isfinite().all() and stock.isfinite().all():
                scale = exact.norm().item() + 1e-6
                self.ours += (actual.double() - exact).norm().item() / scale
                self.eager += (stock.double() - stock_exact).norm().item() / scale


def widened(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().double().requires_grad_(leaf.requires_grad)
    return leaf

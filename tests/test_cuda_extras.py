"""The native CUDA kernel of the extras on a GPU. Left out without one, where
test_cuda_emulated_extras.py runs the same source.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cuda_extras import EXTRAS, FLOOR, Rows, check_borders, check_not_finite

import torchext
from torchext import _native

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
    pytest.mark.skipif(
        bool(_native.cuda_missing) and "TORCHEXT_NEEDS_CUDA" not in os.environ,
        reason=_native.cuda_missing or "the library is there",
    ),
]


def run(name: str, *args: Any) -> Any:
    return getattr(torch.ops.torchext, name)(*args)


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_against_float64(dtype: torch.dtype, extras: tuple[float, float, float]) -> None:
    for shape, options in (
        ((300, 10), {"weighted": True}),
        ((300, 61), {"smoothing": 0.1, "weighted": True}),
        ((64, 640), {"probabilities": True}),
        ((40, 50257), {"probabilities": True, "narrow": False, "weighted": True}),
        ((40, 128256), {"smoothing": 0.1}),
        ((16, 262144), {"narrow": False}),
    ):
        logits = (torch.randn(shape, device="cuda") * 3).to(dtype)
        Rows(logits, extras, **options).check(run)


@pytest.mark.parametrize("classes", [5, 1100, 40000])
def test_rows_that_are_not_finite(classes: int) -> None:
    check_not_finite(run, classes, "cuda")


def test_nothing_outside_is_touched() -> None:
    check_borders(run, "cuda")


@pytest.mark.parametrize("which", ["native", "triton"])
def test_nothing_waits_for_the_device(which: str) -> None:
    """Forward and backward, of logits and of their chunks."""
    if not torchext.backends()[which].available:
        pytest.skip(torchext.backends()[which].reason)
    leaves = [torch.randn(64, 96, device="cuda"), torch.randn(2000, 96, device="cuda") / 10]
    x, w = (leaf.requires_grad_() for leaf in leaves)
    target = torch.randint(2000, (64,), device="cuda")

    def both() -> list[torch.Tensor]:
        logits = x @ w.t()
        given = torchext.cross_entropy(logits, target, softcap=5.0, z_loss=0.1)
        made = torchext.linear_cross_entropy(x, w, target, softcap=5.0, z_loss=0.1)
        found = [given, made]
        for loss in (given, made):
            found += torch.autograd.grad(loss, (x, w))
        return found

    with torchext.use_backend(which):
        found = both()
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[2:4], found[4:6])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            both()
        finally:
            torch.cuda.set_sync_debug_mode("default")

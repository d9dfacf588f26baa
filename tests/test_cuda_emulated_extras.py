"""The CUDA kernel of the extras, run on the CPU: see cuda/emulated/cuda/gpu.cuh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_cases import shifted
from cuda_extras import EXTRAS, FLOOR, Rows, check_borders, check_not_finite


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_against_float64(
    emulated: Callable[..., Any], dtype: torch.dtype, extras: tuple[float, float, float]
) -> None:
    for logits, options in (
        (torch.randn(9, 1) * 3, {"weighted": True}),
        (torch.randn(9, 40) * 3, {}),
        (torch.randn(9, 61) * 3, {"smoothing": 0.1, "weighted": True}),
        (torch.randn(6, 640) * 3, {"probabilities": True}),
        (shifted(5, 43) * 3, {"probabilities": True, "narrow": False, "weighted": True}),
        (torch.randn(3, 9001) * 3, {"smoothing": 0.1}),
        (torch.randn(3, 8200)[:, :8193] * 3, {"narrow": False, "weighted": True}),
    ):
        Rows(logits.to(dtype), extras, **options).check(emulated)


@pytest.mark.parametrize("classes", [5, 1100])
def test_rows_that_are_not_finite(emulated: Callable[..., Any], classes: int) -> None:
    check_not_finite(emulated, classes)


def test_nothing_outside_is_touched(emulated: Callable[..., Any]) -> None:
    check_borders(emulated)


def test_rows_do_not_depend_on_their_batch(emulated: Callable[..., Any]) -> None:
    whole = Rows(torch.randn(9, 1000), (0.1, 5.0, 2.0), smoothing=0.1)
    gradient = torch.empty_like(whole.logits)
    losses, _, _ = whole.call(emulated, gradient)
    for rows in (slice(0, 1), slice(4, 9)):
        part = Rows(whole.logits[rows].clone(), whole.extras, smoothing=0.1)
        part.target, part.of_loss = whole.target[rows], whole.of_loss[rows]
        part.of_lse = whole.of_lse[rows]
        found = torch.empty_like(part.logits)
        assert torch.equal(part.call(emulated, found)[0], losses[rows])
        assert torch.equal(found, gradient[rows])


def test_a_row_alone_upstreams_alone_and_nothing(emulated: Callable[..., Any]) -> None:
    """One of the two upstream gradients may be missing; no rows are no launch."""
    case = Rows(torch.randn(4, 33), (0.1, 0.0, 1.0))
    both = torch.empty_like(case.logits)
    _, stats, _ = case.call(emulated, both)
    parts = []
    for upstream in ((case.of_loss, None), (None, case.of_lse)):
        part = torch.empty_like(both)
        emulated(
            "cross_entropy_extras_rows", case.logits, case.target, None, -100, 0.0,
            *case.extras, *upstream, part, None, stats, None,
        )  # fmt: skip
        parts.append(part)
    torch.testing.assert_close(parts[0] + parts[1], both)
    nothing = Rows(torch.randn(0, 33), case.extras)
    assert nothing.call(emulated, torch.empty(0, 33))[0].shape == (0,)


def test_a_padded_vocabulary_has_the_same_loss_with_a_gradient(
    emulated: Callable[..., Any],
) -> None:
    """The logits' rows are aligned, those of a fresh gradient are not."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(5, 1024).to(dtype)[:, :1001]
        case = Rows(logits, (0.1, 5.0, 1.0))
        gradient = torch.empty(logits.shape, dtype=dtype)
        losses, stats, _ = case.call(emulated, gradient)
        alone, same, _ = case.call(emulated, None)
        assert torch.equal(losses, alone)
        assert torch.equal(stats, same)
        dense = Rows(logits.clone(memory_format=torch.contiguous_format), case.extras)
        dense.target, dense.of_loss, dense.of_lse = case.target, case.of_loss, case.of_lse
        other = torch.empty_like(gradient)
        dense.call(emulated, other)
        near = {"rtol": 2**-7, "atol": 1e-6} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(gradient, other, **near)


def test_wrong_arguments(emulated: Callable[..., Any]) -> None:
    case = Rows(torch.randn(4, 33), (0.1, 0.0, 1.0))
    with pytest.raises(RuntimeError, match="expected gradient to have the shape"):
        case.call(emulated, torch.empty(4, 32))
    case.logits = torch.randn(33, 4).t()
    with pytest.raises(RuntimeError, match="contiguous classes"):
        case.call(emulated, None)

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


def test_wrong_arguments(emulated: Callable[..., Any]) -> None:
    case = Rows(torch.randn(4, 33), (0.1, 0.0, 1.0))
    with pytest.raises(RuntimeError, match="expected gradient to have the shape"):
        case.call(emulated, torch.empty(4, 32))
    case.logits = torch.randn(33, 4).t()
    with pytest.raises(RuntimeError, match="contiguous classes"):
        case.call(emulated, None)

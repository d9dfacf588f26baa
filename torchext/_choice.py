"""Which implementation ``use_backend("auto")`` takes on a GPU: one table of what was measured.

A row says: from that much work on, this op was fastest so on that machine. The last row of an op
whose `work` a call reaches, and whose backend is available, decides. Without one: native if it is
loaded, else Triton, else eager. Rows come from the benchmarks' results
(``python -m benchmarks``), in ascending order of work; none is guessed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Measured(NamedTuple):
    """The fastest backend of an op for calls of at least that much work."""

    op: str
    work: int
    """linear_relu and linear_cross_entropy: the forward product's multiplications (rows x
    in_features x out_features); cross_entropy: logits."""
    backend: str
    machine: str
    """Where it was measured."""


MEASURED: tuple[Measured, ...] = ()
"""Nothing has been measured on a GPU yet."""

_ORDER = ("native", "triton")


def choose(op: str, work: int, available: Collection[str]) -> str:
    """Returns the backend for a call.

    Args:
        op: the op.
        work: the call's, as in `Measured`.
        available: the backends that can serve the call's device.
    """
    for row in reversed(MEASURED):
        if row.op == op and row.work <= work and row.backend in (*available, "eager"):
            return row.backend
    for name in _ORDER:
        if name in available:
            return name
    return "eager"

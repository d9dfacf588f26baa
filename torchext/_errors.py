"""Errors of torch's classes that name the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torchext import _backend, _native

TENSOR: tuple[type, ...] = (Tensor,)
OPTIONAL_TENSOR: tuple[type, ...] = (Tensor, type(None))
INT: tuple[type, ...] = (int, torch.SymInt)
FLOAT: tuple[type, ...] = (*INT, float, torch.SymFloat)
OPTIONAL_INT: tuple[type, ...] = (*INT, type(None))
_WORDS = {
    TENSOR: "Tensor",
    OPTIONAL_TENSOR: "Tensor or None",
    INT: "int",
    OPTIONAL_INT: "int or None",
    FLOAT: "float",
}


def check_types(op: str, arguments: Iterable[tuple[str, Any, tuple[type, ...]]]) -> None:
    """Raises TypeError for the first ``(name, value, types)`` whose value is of no such type."""
    for name, value, types in arguments:
        if not isinstance(value, types):
            raise TypeError(
                f"{op}: expected {name} to be {_WORDS[types]}, but got {type(value).__name__}"
            ) from None


def explain(
    error: Exception, op: str, kernel: Callable[[], object], *tensors: Tensor | None
) -> None:
    """Raises the kernel's own refusal of a call in the place of stock's, if it is of one class.

    Args:
        error: what stock raised for the call.
        op: the op's name, with which the kernel's messages begin.
        kernel: makes the same call of the native kernel, whose checks come first.
        tensors: the call's tensors; the kernel is asked only about plain ones on the CPU.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if _native.cpu_missing or not _backend.ordinary():
        return
    if not all(type(t) in _backend.PLAIN and t.is_cpu and not t.is_neg() for t in given):
        return
    try:
        with torch.no_grad():
            kernel()
    except type(error) as ours:
        if str(ours).startswith(f"{op}:"):
            raise ours from None
    except Exception:  # the kernel refuses it in another class: stock's own words stand
        return

"""Errors of torch's classes that name the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchext import _backend, _native

# What a bad call raises, in torch or in Python. Nothing else is caught: torch.utils.checkpoint ends
# a recomputation by an exception of its own.
REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)

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
        if not isinstance(value, types) or (types in (INT, OPTIONAL_INT) and type(value) is bool):
            raise TypeError(
                f"{op}: expected {name} to be {_WORDS[types]}, but got {type(value).__name__}"
            ) from None
        if (
            types in (INT, OPTIONAL_INT)
            and isinstance(value, int)
            and not -(2**63) <= value < 2**63
        ):
            raise ValueError(f"{op}: expected {name} to fit 64 bits, but got {value}") from None


def settle(
    error: Exception,
    op: str,
    tensors: Mapping[str, Tensor | None],
    reference: Callable[[], Tensor],
    kernel: Callable[[], object],
) -> Tensor:
    """Serves the call that raised `error` by the eager definition, or refuses it clearly.

    Whether a call is good, and in which class it is refused, is stock's to say; the words are ours:
    the kernel's checks name op, argument, what was expected and what came.

    Args:
        error: what the call raised.
        op: the op's name, with which our messages begin.
        tensors: the call's tensors, by name.
        reference: makes the same call of the eager definition.
        kernel: makes the same call of the native kernel, for its words.
    """
    words = str(error)
    ours = words.startswith(f"{op}:")
    if ours and isinstance(error, IndexError):
        raise error  # a class out of range, found before anything was computed
    try:
        return reference()
    except REFUSALS as refusal:
        stock = refusal
    if not ours:
        words = _words(op, tensors, kernel)
    if words.startswith(f"{op}:"):
        raise type(stock)(words) from None
    raise stock from None


def _words(op: str, tensors: Mapping[str, Tensor | None], kernel: Callable[[], object]) -> str:
    """Returns what is wrong with a call, beginning with the op's name; empty if it cannot tell."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(given.values())).device
    for name, tensor in given.items():
        if tensor.layout is not torch.strided:
            return f"{op}: expected {name} of strided layout, but got {tensor.layout}"
        if tensor.device != device:
            return f"{op}: expected {name} on input's device ({device}), but got {tensor.device}"
    if _native.cpu_missing or not _backend.ordinary():
        return ""
    if not all(type(t) in _backend.PLAIN and t.is_cpu and not t.is_neg() for t in given.values()):
        return ""
    try:
        with torch.no_grad():
            kernel()
    except REFUSALS as refusal:
        return str(refusal)
    return ""

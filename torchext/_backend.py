"""Which implementation serves a call.

An `ordinary` call of plain tensors takes the eager fast path to the C++ kernel. The public
functions ask `route` where any other goes:

* `OPERATOR`: the registered operator, for `torch.compile`, export, tracing, modes and autocast;
* `EAGER`: the eager definition (`torchext.reference`), for all that no kernel serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.parameter import Buffer

from torchext import _native

EAGER, OPERATOR = 0, 1

_NAMES = ("auto", "native", "eager")
FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
# Subclasses may mean anything (DTensor shards, FakeTensor has no data): these are plain memory.
PLAIN = frozenset({Tensor, Parameter, Buffer})

_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_any_autocast = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled

_active = "auto"


@dataclass(frozen=True)
class Availability:
    """Whether a backend can serve calls here; if not, `reason` says why."""

    available: bool
    reason: str = ""


def backends() -> dict[str, Availability]:
    """Returns, for each backend by name, whether it is available here and, if not, why.

    Returns:
        ``{"native": Availability(...), "eager": Availability(...)}``.
    """
    return {
        "native": Availability(not _native.cpu_missing, _native.cpu_missing),
        "eager": Availability(True),
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the implementation that serves the calls inside a ``with`` block.

    A call that the chosen backend cannot serve (its dtype, its device, a functorch transform) takes
    the eager definition. The choice holds for the whole process, not for one thread, and for the
    forward call; backward follows the forward that it belongs to.

    Args:
        name: ``"auto"`` (the default outside any block: the fastest that is available, which for
            the smallest calls is torch's own), ``"native"`` (C++ kernels) or ``"eager"`` (the
            definition in torch's own ops).

    Raises:
        ValueError: for another name.
        RuntimeError: where the backend is not available, with the reason.
    """
    global _active
    if name not in _NAMES:
        raise ValueError(f"use_backend: expected name to be one of {_NAMES}, but got {name!r}")
    if name != "auto" and not (here := backends()[name]).available:
        raise RuntimeError(f"use_backend: backend {name!r} is not available: {here.reason}")
    previous = _active
    _active = name
    try:
        yield
    finally:
        _active = previous


def ordinary() -> bool:
    """Whether this is a plain eager call: the eager fast path may take it, past the dispatcher.

    Everything else (transforms, modes, tracers, the profiler) goes through `route`. Each look costs
    about 50 ns; together they are less than one dispatch.
    """
    return not (
        _is_compiling()
        or _functorch_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or _any_autocast()
        or _tracing_state() is not None
        or _profiling()
        or _active == "eager"
    )


def may_choose() -> bool:
    """Whether `auto` may give a small call to torch's stock op: nothing is being captured."""
    return _active == "auto" and not _is_compiling() and _tracing_state() is None


def route(*tensors: Tensor | None) -> int:
    """Returns where a call that is not `ordinary` goes: `OPERATOR` or `EAGER`.

    The first tensor decides the dtype; the kernels' own checks judge the others' dtypes.
    """
    if (
        _active == "eager"
        or _native.cpu_missing
        or _functorch_active()
        or forward_ad._current_level >= 0
        or not serves_dtype(tensors[0])
    ):
        return EAGER
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.layout is torch.strided):
            return EAGER
    if _is_compiling() or _tracing_state() is not None:
        return OPERATOR
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN:
            return EAGER
    return OPERATOR


def serves_dtype(tensor: Tensor | None) -> bool:
    """Whether the kernels compute in the tensor's dtype."""
    return tensor is not None and tensor.dtype in FLOATING


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Returns the dtype that autocast's lower-precision ops take on the tensor's device, if any."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts as autocast does: floating point tensors, but never float64."""
    if tensor.is_floating_point() and tensor.dtype is not torch.float64:
        return tensor.to(dtype)
    return tensor

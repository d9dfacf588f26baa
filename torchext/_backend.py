"""Which implementation serves a call.

An `ordinary` call of plain tensors takes the eager fast path to the C++ kernel. The public
functions ask `route` where any other goes:

* `OPERATOR`: the registered operator, for `torch.compile`, export, tracing, modes and autocast,
  and for the native CUDA kernels;
* `TRITON`: the Triton kernels (`torchext._triton`);
* `EAGER`: the eager definition (`torchext.reference`), for all that no kernel serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.parameter import Buffer

from torchext import _choice, _native, _triton

EAGER, OPERATOR, TRITON = 0, 1, 2

_NAMES = ("auto", "native", "triton", "eager")
FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
# Subclasses may mean anything (DTensor shards, FakeTensor has no data): these are plain memory.
PLAIN = frozenset({Tensor, Parameter, Buffer})

# The two halves of `torch.compiler.is_compiling`, which is two more calls.
_compiler, _in_dynamo = torch.compiler, torch.compiler.is_dynamo_compiling
_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_any_autocast = torch._C._is_any_autocast_enabled
_is_tracing = torch._C._is_tracing
_profiling = torch._C._autograd._profiler_enabled

_active = "auto"
# Whether calls of plain CPU tensors go past the dispatcher to the C++ kernels.
_direct = not _native.cpu_missing
# Whether a small call may go to torch's stock op, where nothing is being captured.
stock_when_small = True


@dataclass(frozen=True)
class Availability:
    """Whether a backend can serve calls here; if not, `reason` says why."""

    available: bool
    reason: str = ""


def backends() -> dict[str, Availability]:
    """Returns, for each backend by name, whether it is available here and, if not, why.

    Returns:
        ``{"native": Availability(...), "triton": Availability(...), "eager": Availability(...)}``.
    """
    no_triton = _triton.missing()
    return {
        "native": Availability(not _native.cpu_missing, _native.cpu_missing),
        "triton": Availability(not no_triton, no_triton),
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
            the smallest calls is torch's own), ``"native"`` (C++ kernels), ``"triton"`` (Triton
            kernels: CUDA tensors, or, under ``TRITON_INTERPRET=1``, CPU tensors) or ``"eager"``
            (the definition in torch's own ops).

    Raises:
        ValueError: for another name.
        RuntimeError: where the backend is not available, with the reason.
    """
    global _active, _direct, stock_when_small
    if name not in _NAMES:
        raise ValueError(f"use_backend: expected name to be one of {_NAMES}, but got {name!r}")
    if name != "auto" and not (here := backends()[name]).available:
        raise RuntimeError(f"use_backend: backend {name!r} is not available: {here.reason}")
    previous = _active
    _active, _direct = name, _is_direct(name)
    stock_when_small = name == "auto"
    try:
        yield
    finally:
        _active, _direct = previous, _is_direct(previous)
        stock_when_small = previous == "auto"


def _is_direct(name: str) -> bool:
    return name in ("auto", "native") and not _native.cpu_missing


def ordinary(any_backend: bool = False, autocast: bool = False) -> bool:
    """Whether this is a plain eager call: the eager fast path may take it, past the dispatcher.

    Everything else (transforms, modes, tracers, the profiler) goes through `route`. Each look costs
    about 50 ns; together they are less than one dispatch. Where `any_backend`, calls that the C++
    kernels would not serve may be ordinary too; where `autocast`, the caller has cast as it does.
    """
    return not (
        _in_dynamo()
        or _compiler._is_compiling_flag
        or _functorch_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or (_any_autocast() and not autocast)
        or _is_tracing()
        or _profiling()
        or not (_direct or any_backend)
    )


def route(*tensors: Tensor | None, op: str = "", work: int = 0, fake: bool = False) -> int:
    """Returns where a call that is not `ordinary` goes: `OPERATOR`, `TRITON` or `EAGER`.

    The first tensor decides the dtype; the kernels' own checks judge the others' dtypes.

    Args:
        *tensors: the call's; the first is not None.
        op: the op, where it has kernels beside the C++ ones for the CPU.
        work: how large the call is, as `_choice.Measured` counts it.
        fake: whether fake tensors may go to the operator, where nothing is compiled.
    """
    first = tensors[0]
    if (
        _active == "eager"
        or first is None
        or _functorch_active()
        or forward_ad._current_level >= 0
        or not serves_dtype(first)
    ):
        return EAGER
    for tensor in tensors:
        if tensor is not None and not (
            tensor.layout is torch.strided and tensor.device == first.device
        ):
            return EAGER
    place = _place(first, op, work)
    if _is_compiling() or _is_tracing():
        return place
    plain = PLAIN | {FakeTensor} if fake else PLAIN
    for tensor in tensors:
        if tensor is not None and type(tensor) not in plain:
            return EAGER
    return place


def _place(tensor: Tensor, op: str, work: int) -> int:
    """Where the active backend serves a tensor of this device, if it does."""
    native = not _native.cpu_missing and (
        tensor.is_cpu or (tensor.is_cuda and _triton.has_native_cuda(op))
    )
    if _active == "native" or (tensor.is_cpu and _active == "auto"):
        return OPERATOR if native else EAGER
    triton = op != "" and _triton.serves(tensor)
    if _active == "triton":
        return TRITON if triton else EAGER
    here = [name for name, serves in (("native", native), ("triton", triton)) if serves]
    return {"native": OPERATOR, "triton": TRITON}.get(_choice.choose(op, work, here), EAGER)


def beside_native(tensor: Tensor) -> int:
    """Where a call goes that the native kernels of its device do not take: to Triton, if it may."""
    return TRITON if _active == "auto" and _triton.serves(tensor) else EAGER


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

"""What the launchers share: the launch, the view of a tensor that a kernel walks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU tensors."""

WIDE = {torch.float64: tl.float64}
"""What a dtype is summed in, where that is not float32."""

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


def launch(kernel: Any, grid: Grid, device: torch.device, *args: Any, **options: Any) -> None:
    """Launches a kernel on the tensors' device and current stream. An empty grid is no launch."""
    if isinstance(grid, tuple) and 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums have: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def dot_precision(dtype: torch.dtype) -> str:
    """How products are made: float32 ones as torch's own are."""
    tf32 = dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


class Strides(NamedTuple):
    """Where element (n, c, s) of a tensor (N, C, S) stands: n * outer + c * channel + s * inner."""

    outer: int
    channel: int
    inner: int


def class_strides(tensor: Tensor) -> Strides | None:
    """Strides over (N, C, S), S the product of d1, d2, ...; None where these have no common one."""
    if tensor.dim() == 1:
        return Strides(0, tensor.stride(0), 1)
    inner, expected = 1, None
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size == 1:
            continue
        if expected is None:
            inner = stride
        elif stride != expected:
            return None
        expected = stride * size
    return Strides(tensor.stride(0), tensor.stride(1), inner)


def refuse(native: Callable[[], Any], op: str, arguments: tuple[Any, ...]) -> NoReturn:
    """Raises what the native checks say of arguments that the kernels here cannot take.

    Shapes and dtypes are checked in one place for every device, in csrc/ops. They get stand-ins
    without memory: of the same shapes and dtypes, on the CPU.

    Args:
        native: gives the operator of the native library.
        op: the name that an error begins with.
        arguments: the operator's.
    """

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.zeros((), dtype=value.dtype).expand(value.shape)

    try:
        operator = native()
    except AttributeError:
        operator = None  # no native library here
    if operator is not None:
        operator(*map(stand_in, arguments))
    raise RuntimeError(f"{op}: expected arguments that the Triton kernels take")

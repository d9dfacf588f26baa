"""The Triton kernels: whether they can serve here, and their operators.

``torch.ops.torchext_triton.*`` have the schemas, the fakes and the gradients of the native
operators, and stand in a graph that was captured under ``use_backend("triton")``. Where no native
CUDA library is loaded they also are the kernels of ``torch.ops.torchext.*`` on CUDA. To
torch.compile they are opaque: Inductor fuses nothing into a kernel that it did not write, so that
looking in would gain the launches of Python alone, which a CUDA graph gains too; and behind one
operator the choice of blocks may depend on the strides that really come, and one graph serves all
shapes.

Triton itself is imported by the first call.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from torchext import _native

SCHEMAS = {
    "linear_relu_forward": "(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    "linear_relu_backward": (
        "(Tensor grad_output, Tensor output, Tensor input, Tensor weight, bool input_grad, "
        "bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)"
    ),
    "cross_entropy_forward": (
        "(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
        "float label_smoothing, bool save_gradient) "
        "-> (Tensor loss, Tensor stats, Tensor gradient)"
    ),
    "cross_entropy_forward_": (
        "(Tensor(a!) input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
        "float label_smoothing) -> Tensor"
    ),
    "cross_entropy_backward": (
        "(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor stats, "
        "int reduction, int ignore_index, float label_smoothing) -> Tensor"
    ),
    "linear_cross_entropy_forward": (
        "(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
        "int reduction, int ignore_index, float label_smoothing, bool input_grad, "
        "bool linear_weight_grad, bool linear_bias_grad) -> (Tensor loss, Tensor stats, "
        "Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)"
    ),
    "linear_cross_entropy_backward": (
        "(Tensor grad_output, Tensor input, Tensor linear_weight, Tensor target, "
        "Tensor? linear_bias, Tensor? weight, Tensor stats, int reduction, int ignore_index, "
        "float label_smoothing, bool input_grad, bool linear_weight_grad, bool linear_bias_grad) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}
"""Those of csrc/ops, which a test holds them to."""

interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton's interpreter runs the kernels, on CPU tensors: read once, as Triton does."""

_library: Any = torch.library.Library("torchext_triton", "DEF")  # type: ignore[no-untyped-call]
_native_library: Any = torch.library.Library("torchext", "FRAGMENT")  # type: ignore[no-untyped-call]


_installed = importlib.util.find_spec("triton") is not None
# Not so where the sources are used in place, without an installation.
_shipped = importlib.util.find_spec("torchext.triton_kernels") is not None


def missing() -> str:
    """Returns why the Triton kernels cannot serve here, or an empty string."""
    if not _installed:
        return "triton is not installed"
    if not _shipped:
        return "torchext.triton_kernels is not in this installation"
    if interpreted:
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device is here, and TRITON_INTERPRET=1 is not set"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need compute capability 8.0 or newer"
    return ""


# A compiler's tracer calls it and keeps the answer. (`torch.compiler.assume_constant_result` does
# no more, but imports the compiler.)
missing.__dict__["_dynamo_marked_constant"] = True


def serves(tensor: Tensor) -> bool:
    """Whether the Triton kernels can serve a tensor where it is.

    The interpreter rounds bfloat16 towards zero and multiplies it wrong: it would prove nothing.
    """
    here = tensor.is_cuda
    if interpreted:
        here = tensor.is_cpu and tensor.dtype is not torch.bfloat16
    return here and not missing()


@cache
def kernels(op: str) -> Any:
    """Returns the module of an op's functions. Imports triton."""
    return importlib.import_module(f"torchext.triton_kernels.{op}")


def _call(op: str, name: str, *args: Any) -> Any:
    return getattr(kernels(op), name)(*args)


def has_native_cuda(op: str) -> bool:
    """Whether the native CUDA library serves an op."""
    return op in _native_cuda


_native_cuda: set[str] = set()


def register(op: str, name: str, fake: Callable[..., Any]) -> tuple[OpOverload, Callable[..., Any]]:
    """Registers one operator of an op.

    Args:
        op: the op.
        name: the operator's name, and that of the function of `kernels`.
        fake: what it gives for fake tensors.

    Returns:
        The operator, and the function behind it, for calls past the dispatcher.
    """
    run = partial(_call, op, name)
    _library.define(name + SCHEMAS[name])
    _library.impl(name, run, "CUDA")
    if interpreted:
        _library.impl(name, run, "CPU")
    torch.library.register_fake(f"torchext_triton::{name}", fake, lib=_library)
    if not _native.cpu_missing:  # without it no operator has that name
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"torchext::{name}", "CUDA"):
            _native_cuda.add(op)
        else:
            _native_library.impl(name, run, "CUDA")
    operator: OpOverload = getattr(torch.ops.torchext_triton, name).default
    return operator, run


def scale_(gradient: Tensor, grad_output: Tensor) -> None:
    """Multiplies a gradient in device memory by a scalar there, without the host knowing it."""
    if serves(gradient):
        kernels("cross_entropy").scale_(gradient, grad_output.resolve_neg())
    else:
        gradient.mul_(grad_output)

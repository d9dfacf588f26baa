"""Finds and loads the native libraries, and says why not where one is missing."""

from __future__ import annotations

import importlib.util

import torch

_LEVELS = ("baseline", "AVX2", "AVX-512")


def _load(module: str) -> str:
    """Loads one library of registrations; returns why it could not, or an empty string."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return f"{module} is not in this installation"
    try:
        torch.ops.load_library(spec.origin)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{spec.origin} could not be loaded: {error}"
    return ""


cpu_missing = _load("torchext._C")
"""Why the CPU library is not there; empty where it is."""


def _load_cuda() -> str:
    # A torch without CUDA has nothing to load it with, and must not pay for a look.
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return cpu_missing or _load("torchext._C_cuda")


cuda_missing = _load_cuda()
"""Why the CUDA library is not there; empty where it is."""


def simd_level() -> str:
    """Returns the instruction set that the CPU kernels use on this machine."""
    if cpu_missing:
        return "none"
    return _LEVELS[torch.ops.torchext.simd_level()]


def multiplies_pairs() -> bool:
    """Returns whether bfloat16 is multiplied by pairs here (AVX512_BF16, not Intel's)."""
    return not cpu_missing and torch.ops.torchext.multiplies_pairs()


def own_products(dtype: torch.dtype) -> bool:
    """Returns whether our own kernel, without pairs, makes large products of this dtype here."""
    return not cpu_missing and torch.ops.torchext.own_products(torch.empty(0, dtype=dtype))

"""Fused drop-in layers for PyTorch with native kernels."""

from torchext import nn, optim
from torchext._backend import backends, use_backend
from torchext._cpp_paths import cmake_prefix_path, include_path
from torchext.ops import cross_entropy, linear_cross_entropy, linear_relu

__version__ = "0.1.0"
__all__ = [
    "cmake_prefix_path",
    "include_path",
    "backends",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_relu",
    "nn",
    "optim",
    "use_backend",
]

"""Fused drop-in layers for PyTorch with native kernels."""

from torchext import nn
from torchext._backend import backends, use_backend
from torchext.ops import cross_entropy, linear_cross_entropy, linear_relu

__version__ = "0.1.0"
__all__ = ["backends", "cross_entropy", "linear_cross_entropy", "linear_relu", "nn", "use_backend"]

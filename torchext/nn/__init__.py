"""Modules: drop-ins for their stock namesakes."""

from torchext.nn.cross_entropy import CrossEntropyLoss
from torchext.nn.linear_cross_entropy import LinearCrossEntropyLoss
from torchext.nn.linear_relu import LinearReLU

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss", "LinearReLU"]

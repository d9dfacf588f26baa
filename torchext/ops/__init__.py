"""The ops: public function, fake kernel and backward formula of each in one file."""

from torchext.ops.cross_entropy import cross_entropy
from torchext.ops.linear_cross_entropy import linear_cross_entropy
from torchext.ops.linear_relu import linear_relu

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_relu"]

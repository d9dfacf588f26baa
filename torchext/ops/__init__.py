"""The ops: public function, fake kernels and backward formula of each, in files of its name.

What both losses can do beside the stock ones is in `extras*`.
"""

from torchext.ops.cross_entropy import cross_entropy
from torchext.ops.linear_cross_entropy import linear_cross_entropy
from torchext.ops.linear_relu import linear_relu

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_relu"]

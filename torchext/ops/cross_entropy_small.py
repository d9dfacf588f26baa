"""Which calls of cross_entropy are too small to gain by a kernel of ours.

Torch's own two nodes, in C++, cost less than one of ours in Python: of class indices without
smoothing. With it torch has more nodes, and for probabilities (ours takes 0.4 and 0.7 of their time
from 1 x 8 on, 2 cores of Zen 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchext import _native
from torchext.ops.cross_entropy_fake import REDUCTIONS

_WIDE_VECTORS = _native.simd_level() == "AVX-512"

# Logits + 128 x rows. Of stock's time, forward and backward with the thread pool asleep, ours takes
# of the mean of 32 x 2, 64 x 64, 100 x 10 and 128 x 10 1.28, 1.06, 0.91 and 0.83, of
# reduction="none", whose gradient is made in backward by ours, too, of 64 x 64, 128 x 100, 256 x 10
# and 32 x 1000 1.07, 1.10, 0.82 and 0.88 (2 cores of an Intel Xeon of family 6, model 207; the mean
# from 3,000 to 13,000 1.1 to 1.2 on Zen 4, too, and 0.8 to 0.95 with the pool awake). Without
# AVX-512, of the mean on 2 cores of Zen 3: 100 x 10 84 (stock) and 106 us, 300 x 32 150 and 186;
# 300 x 100 154 and 147.
SMALL = dict.fromkeys(REDUCTIONS, 49152)
if _WIDE_VECTORS:
    SMALL = {"none": 32768, "mean": 13312, "sum": 13312}

# Above that, with AVX-512 (where it is not, nothing was measured). Times are of stock's, forward
# and backward, on 2 cores of Zen 4.
#
# Logits + rows, where a row has hardly any classes. Means: float32 128 x 2, 200 x 2 and 384 x 2
# 1.19, 1.15 and 1.07, 128 x 3, 200 x 3 and 256 x 3 1.14, 1.08 and 0.83, 128 x 5 and 200 x 5 1.05
# and 0.95, 128 x 8 0.94; other dtypes within 0.06 of that. Without reduction 256 x 3 1.15.
_FEW_CLASSES = 1000
# Classes from which on stock's softmax fills its vectors, and logits below which forward alone is
# stock's, up to _ROWS rows. Forward alone: float32 160 x 48, 256 x 48, 256 x 64 and 384 x 48 1.46,
# 1.05, 0.91 and 0.89 (Zen 5: 64 x 100 1.35, 384 x 64 1.05), bfloat16 160 x 48, 256 x 48 and 240 x
# 100 1.18, 0.92 and 0.91, but 512 x 16 0.17 and 160 x 31 0.34; float16 160 x 48 0.94.
_OF_DTYPE = {
    torch.float32: (16, 16384),
    torch.bfloat16: (32, 12288),
    torch.float16: (32, 0),
}
# The same with the gradient. Means: float32 100 x 32, 256 x 48, 256 x 64 and 192 x 100 1.20, 1.08,
# 0.99 and 0.96, bfloat16 160 x 64, 256 x 64 and 160 x 100 1.08, 1.00 and 0.82, but 100 x 24 0.79,
# float16 128 x 32, 256 x 64 and 160 x 100 1.23, 1.03 and 0.89. Without reduction: float32 512 x 16,
# 256 x 64 and 384 x 64 1.30, 1.13 and 1.07, bfloat16 384 x 64 1.07, float16 240 x 100 1.02.
_WITH_GRADIENT = {"none": 24576, "mean": 16384, "sum": 16384}
_ROWS = 512
FEW_LOGITS = max(_WITH_GRADIENT.values()) if _WIDE_VECTORS else 0


def few_logits(input: Tensor, logits: int, rows: int, reduction: str) -> bool:
    """Whether a call of fewer than FEW_LOGITS, but not SMALL, is stock's.

    Args:
        input: the logits, (N, C) if so.
        logits: their number.
        rows: that of the targets.
        reduction: of the loss.
    """
    if rows > _ROWS or input.dim() != 2 or not input.is_cpu:
        return False
    if logits + rows < _FEW_CLASSES:
        return True
    classes, most = _OF_DTYPE.get(input.dtype, (0, 0))
    if input.requires_grad and torch.is_grad_enabled():
        most = _WITH_GRADIENT[reduction]
    return 0 < classes * rows <= logits < most

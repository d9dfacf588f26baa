"""linear_cross_entropy by tiles: the gradients. See linear_cross_entropy_tiles.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torchext.triton_kernels.cross_entropy_math import (
    base_of,
    dense_target,
    gradient_scale,
    target_of,
)
from torchext.triton_kernels.linear_cross_entropy_statistics import product_tile


@triton.jit
def _row_factors(
    target,
    weight,
    stats,
    mass,
    grad_output,
    scale,
    row,
    here,
    rows,
    classes,
    ignore_index,
    SMOOTHING: tl.constexpr,
    PER_ROW: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of each row: its class, what exponentials are relative to, their factor, W_t g, and g."""
    index, kept, _, weight_t = target_of(
        target, weight, row, here, classes, ignore_index, SMOOTHING, ACC
    )
    g = gradient_scale(grad_output, scale, row, here, PER_ROW, ACC)
    g = tl.where(kept, g, 0.0)
    share = weight_t
    if mass is not None:
        share += tl.load(mass).to(ACC)
    elif SMOOTHING > 0:
        share += SMOOTHING
    base = base_of(tl.load(stats + row, mask=here, other=0.0))
    total = tl.load(stats + tl.cast(rows, tl.int64) + row, mask=here, other=1.0)
    own = tl.where((index >= 0) & (index < classes), index, -1).to(tl.int32)
    return own, base, g * share / total, weight_t * g, g


@triton.jit(do_not_specialize=["ignore_index", "tuned_size"])
def linear_cross_entropy_input_kernel(
    input,  # (N, H)
    linear_weight,  # (C, H)
    linear_bias,  # (C) or None
    target,  # (N)
    weight,  # (C) or None
    stats,  # (2, N)
    mass,  # the sum of q where there are weights, or None
    grad_output,  # (N), or a scalar, or None: 1
    scale,  # a scalar, or None: 1
    gradient,  # (N, H), contiguous
    rows,
    features,
    classes,
    ignore_index,
    input_n,
    input_k,
    weight_c,
    weight_k,
    blocks_h,  # programs side by side, for BLOCK_H columns each
    tuned_size,  # rows as the autotuner remembers them
    SMOOTHING: tl.constexpr,
    PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_H columns of the gradient of BLOCK_OWN rows of input, over all classes.

    (1 + H / BLOCK_H) N C H multiplications. Bytes moved, e an element's size: at least
    e H (2 N + C). All programs walk linear_weight in one order and read it from the L2 cache:
    (1 + H / BLOCK_H) e H N C / BLOCK_OWN pass through that; the columns of a block of rows are
    side by side, so that they read its input together.
    """
    row = (tl.program_id(0) // blocks_h) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    h = (tl.program_id(0) % blocks_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    here, h_inside = row < rows, h < features
    own, base, factor, own_g, g = _row_factors(
        target, weight, stats, mass, grad_output, scale, row, here, rows, classes, ignore_index,
        SMOOTHING, PER_ROW, ACC,
    )  # fmt: skip
    sums = tl.zeros([BLOCK_OWN, BLOCK_H], ACC)
    for begin in range(0, classes, BLOCK_STEP):
        c = begin + tl.arange(0, BLOCK_STEP)
        inside = c < classes
        x = product_tile(
            input, linear_weight, row, c, here, inside, features, input_n, input_k, weight_c,
            weight_k, PRECISION, ACC, BLOCK_OWN, BLOCK_STEP, BLOCK_K,
        )  # fmt: skip
        if linear_bias is not None:
            x += tl.load(linear_bias + c, mask=inside, other=0.0).to(ACC)[None, :]
        value = tl.exp(x - base[:, None]) * factor[:, None]
        if SMOOTHING > 0:
            q = dense_target(None, weight, c, inside, classes, SMOOTHING, ACC)
            value -= q[None, :] * g[:, None]
        value -= tl.where(c[None, :] == own[:, None], own_g[:, None], 0.0)
        value = tl.where(here[:, None] & inside[None, :], value, 0.0)
        at = linear_weight + c.to(tl.int64)[:, None] * weight_c + h.to(tl.int64)[None, :] * weight_k
        w = tl.load(at, mask=inside[:, None] & h_inside[None, :], other=0.0)
        sums = tl.dot(value.to(w.dtype), w, sums, input_precision=PRECISION, out_dtype=ACC)
    at = gradient + row.to(tl.int64)[:, None] * features + h[None, :]
    tl.store(at, sums, mask=here[:, None] & h_inside[None, :])


@triton.jit(do_not_specialize=["ignore_index", "tuned_size"])
def linear_cross_entropy_weight_kernel(
    input,  # (N, H)
    linear_weight,  # (C, H)
    linear_bias,  # (C) or None
    target,  # (N)
    weight,  # (C) or None
    stats,  # (2, N)
    mass,  # the sum of q where there are weights, or None
    grad_output,  # (N), or a scalar, or None: 1
    scale,  # a scalar, or None: 1
    gradient,  # (C, H), contiguous, or None
    bias_gradient,  # (C) or None
    rows,
    features,
    classes,
    ignore_index,
    input_n,
    input_k,
    weight_c,
    weight_k,
    blocks_h,  # programs side by side, for BLOCK_H columns each
    tuned_size,  # rows as the autotuner remembers them
    SMOOTHING: tl.constexpr,
    PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_H columns of the gradient of BLOCK_OWN classes of linear_weight, over all rows.

    (1 + H / BLOCK_H) N C H multiplications. Bytes moved, e an element's size: at least
    e H (N + 2 C). (1 + H / BLOCK_H) e H N C / BLOCK_OWN pass through the L2 cache, as in
    `linear_cross_entropy_input_kernel`. The tile is transposed, so that it is the left operand.
    """
    block_h = tl.program_id(0) % blocks_h
    c = (tl.program_id(0) // blocks_h) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    h = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
    inside, h_inside = c < classes, h < features
    bias = tl.zeros([BLOCK_OWN], ACC)
    if linear_bias is not None:
        bias = tl.load(linear_bias + c, mask=inside, other=0.0).to(ACC)
    q = tl.zeros([BLOCK_OWN], ACC)
    if SMOOTHING > 0:
        q = dense_target(None, weight, c, inside, classes, SMOOTHING, ACC)
    sums = tl.zeros([BLOCK_OWN, BLOCK_H], ACC)
    ones = tl.full([BLOCK_STEP, 16], 1.0, input.dtype.element_ty)
    bias_sums = tl.zeros([BLOCK_OWN, 16], ACC)
    for begin in range(0, rows, BLOCK_STEP):
        row = begin + tl.arange(0, BLOCK_STEP)
        here = row < rows
        own, base, factor, own_g, g = _row_factors(
            target, weight, stats, mass, grad_output, scale, row, here, rows, classes,
            ignore_index, SMOOTHING, PER_ROW, ACC,
        )  # fmt: skip
        x = product_tile(
            linear_weight, input, c, row, inside, here, features, weight_c, weight_k, input_n,
            input_k, PRECISION, ACC, BLOCK_OWN, BLOCK_STEP, BLOCK_K,
        )  # fmt: skip
        value = tl.exp(x + bias[:, None] - base[None, :]) * factor[None, :]
        if SMOOTHING > 0:
            value -= q[:, None] * g[None, :]
        value -= tl.where(c[:, None] == own[None, :], own_g[None, :], 0.0)
        value = tl.where(inside[:, None] & here[None, :], value, 0.0).to(input.dtype.element_ty)
        if gradient is not None:
            at = input + row.to(tl.int64)[:, None] * input_n + h.to(tl.int64)[None, :] * input_k
            right = tl.load(at, mask=here[:, None] & h_inside[None, :], other=0.0)
            sums = tl.dot(value, right, sums, input_precision=PRECISION, out_dtype=ACC)
        if bias_gradient is not None:
            bias_sums = tl.dot(value, ones, bias_sums, input_precision=PRECISION, out_dtype=ACC)
    if gradient is not None:
        at = gradient + c.to(tl.int64)[:, None] * features + h[None, :]
        tl.store(at, sums, mask=inside[:, None] & h_inside[None, :])
    if bias_gradient is not None:
        first = tl.arange(0, 16)[None, :] == 0
        total = tl.sum(tl.where(first, bias_sums, 0.0), 1)
        tl.store(bias_gradient + c, total, mask=inside & (block_h == 0))

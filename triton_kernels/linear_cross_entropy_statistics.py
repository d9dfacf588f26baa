"""linear_cross_entropy by tiles: the statistics. See linear_cross_entropy_tiles.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torchext.triton_kernels.cross_entropy_math import (
    base_of,
    dense_target,
    merged,
    merged_target,
    store_row,
    target_of,
)


@triton.jit
def product_tile(
    left,  # (I, K)
    right,  # (J, K)
    i,
    j,
    i_inside,
    j_inside,
    k_size,
    left_i,
    left_k,
    right_j,
    right_k,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """left[i] @ right[j].T, in steps of BLOCK_K."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left_at = left + i.to(tl.int64)[:, None] * left_i + k[None, :] * left_k
    right_at = right + k[:, None] * right_k + j.to(tl.int64)[None, :] * right_j
    total = tl.zeros([BLOCK_I, BLOCK_J], ACC)
    for begin in range(0, k_size, BLOCK_K):
        inside = k < k_size - begin
        a = tl.load(left_at, mask=i_inside[:, None] & inside[None, :], other=0.0)
        b = tl.load(right_at, mask=inside[:, None] & j_inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)
        left_at += BLOCK_K * tl.cast(left_k, tl.int64)
        right_at += BLOCK_K * tl.cast(right_k, tl.int64)
    return total


@triton.jit
def _own_class(target, row, inside, classes, ignore_index):
    """Each row's class as the tiles compare it: -1 where no logit is the target's."""
    index = tl.load(target + row, mask=inside, other=-1).to(tl.int64)
    own = (index >= 0) & (index < classes) & (index != ignore_index)
    return tl.where(own, index, -1).to(tl.int32)  # 64 bits would take registers


@triton.jit(do_not_specialize=["ignore_index"])
def linear_cross_entropy_statistics_kernel(
    input,  # (N, H)
    linear_weight,  # (C, H)
    linear_bias,  # (C) or None
    target,  # (N)
    weight,  # (C) or None
    partials,  # (5, slices, N): maximum, sum, mass of q, its dot product, the target's logit
    rows,
    features,
    classes,
    slices,
    ignore_index,
    input_n,
    input_k,
    weight_c,
    weight_k,
    SMOOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """The statistics of BLOCK_N rows over a slice of STEPS * BLOCK_C classes.

    N C H multiplications. Bytes moved, e an element's size: at least e H (N + C), and 20 N for each
    slice. Groups of GROUP_N blocks of rows take a slice at a time, so that they read its part of
    linear_weight from the L2 cache: e H N C / BLOCK_N + e H N C / BLOCK_C pass through that.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows, BLOCK_N)
    group_size = GROUP_N * slices
    first = (pid // group_size) * GROUP_N
    height = tl.minimum(blocks - first, GROUP_N)
    block = first + (pid % group_size) % height
    piece = (pid % group_size) // height

    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    here = row < rows
    own = _own_class(target, row, here, classes, ignore_index)
    maximum = tl.full([BLOCK_N], -float("inf"), ACC)
    total = tl.zeros([BLOCK_N], ACC)
    mass = tl.zeros([BLOCK_N], ACC)
    dot = tl.zeros([BLOCK_N], ACC)
    target_x = tl.zeros([BLOCK_N], ACC)
    begin = piece * STEPS * BLOCK_C
    for at in range(begin, tl.minimum(begin + STEPS * BLOCK_C, classes), BLOCK_C):
        c = at + tl.arange(0, BLOCK_C)
        inside = c < classes
        x = product_tile(
            input, linear_weight, row, c, here, inside, features, input_n, input_k, weight_c,
            weight_k, PRECISION, ACC, BLOCK_N, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        if linear_bias is not None:
            x += tl.load(linear_bias + c, mask=inside, other=0.0).to(ACC)[None, :]
        x = tl.where(inside[None, :], x, -float("inf"))
        larger = tl.maximum(maximum, tl.max(x, 1))
        base = base_of(larger)
        shifted = x - base[:, None]
        factor = tl.exp(tl.where(maximum == larger, 0.0, maximum - base))
        total = total * factor + tl.sum(tl.exp(shifted), 1)
        if SMOOTHING > 0:
            q = dense_target(None, weight, c, inside, classes, SMOOTHING, ACC)
            products = tl.where(inside[None, :], q[None, :] * shifted, 0.0)
            dot += mass * (base_of(maximum) - base) + tl.sum(products, 1)
            mass += tl.sum(q, 0)
        target_x += tl.sum(tl.where(c[None, :] == own[:, None], x, 0.0), 1)
        maximum = larger
    at = partials + piece.to(tl.int64) * rows + row
    step = tl.cast(slices, tl.int64) * rows
    tl.store(at, maximum, mask=here)
    tl.store(at + step, total, mask=here)
    if SMOOTHING > 0:
        tl.store(at + 2 * step, mass, mask=here)
        tl.store(at + 3 * step, dot, mask=here)
    tl.store(at + 4 * step, target_x, mask=here)


@triton.jit(do_not_specialize=["ignore_index"])
def linear_cross_entropy_merge_kernel(
    target,  # (N)
    weight,  # (C) or None
    losses,  # (N)
    stats,  # (2, N)
    partials,  # (5, slices, N)
    rows,
    classes,
    slices,
    ignore_index,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The losses and statistics of rows from those of their slices; BLOCK_S slices hold all.

    Bytes moved: 12 N read for each slice (20 N where smoothed), 12 N written, and the targets.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = row < rows
    piece = tl.arange(0, BLOCK_S)[:, None]
    mask = here[None, :] & (piece < slices)
    at = partials + piece.to(tl.int64) * rows + row[None, :]
    step = tl.cast(slices, tl.int64) * rows
    maximum = tl.load(at, mask=mask, other=-float("inf"))
    total = tl.load(at + step, mask=mask, other=0.0)
    mass = None
    dot = None
    if SMOOTHING > 0:
        mass = tl.load(at + 2 * step, mask=mask, other=0.0)
        dot = tl.load(at + 3 * step, mask=mask, other=0.0)
    target_x = tl.sum(tl.load(at + 4 * step, mask=mask, other=0.0), 0)  # of one slice: the others 0
    largest, total = merged(maximum, total)
    if mass is not None:
        mass, dot = merged_target(maximum, largest, mass, dot)
    _, kept, _, weight_t = target_of(
        target, weight, row, here, classes, ignore_index, SMOOTHING, ACC
    )
    store_row(
        losses, stats, row, here, rows, largest, total, mass, dot, target_x, weight_t, kept
    )  # fmt: skip

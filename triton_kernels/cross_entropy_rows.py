"""cross_entropy in Triton: rows that fit the registers. Formulas: cross_entropy_math.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torchext.triton_kernels.cross_entropy_math import (
    base_of,
    dense_target,
    gradient_scale,
    store_row,
    target_of,
)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_rows_kernel(
    input,
    target,  # class indices, or None
    probabilities,  # or None
    weight,  # or None
    losses,  # written in forward; None in backward
    stats,  # (2, positions): maxima and sums; written in forward where not None, read in backward
    gradient,  # or None: no gradient is wanted. May be the input
    grad_output,  # or None: 1
    scale,  # a scalar, or None: 1
    inner_size,
    blocks,  # programs for one outer
    classes,
    stats_stride,
    ignore_index,
    input_outer,
    input_inner,
    probability_outer,
    probability_channel,
    probability_inner,
    gradient_outer,
    gradient_channel,
    gradient_inner,
    SMOOTHING: tl.constexpr,
    PER_ROW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of contiguous classes that fit the registers: BLOCK_P of them a program, all classes.

    Bytes moved, e an element's size, for P positions of C classes: forward P C e read; with the
    gradient P C e read and P C e written; backward the same. With probabilities P C e more are
    read. The rest is small: 8 P for the targets, 4 P for the losses, 8 P for the statistics.
    """
    pid = tl.program_id(0).to(tl.int64)
    outer = pid // blocks
    inner = (pid % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = inner < inner_size
    position = outer * inner_size + inner
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = rows[:, None] & (c < classes)
    row = input + outer * input_outer + inner * input_inner
    x = tl.load(row[:, None] + c, mask=mask, other=-float("inf")).to(ACC)

    index = tl.zeros([BLOCK_P], tl.int64)
    kept = rows
    weight_t = tl.zeros([BLOCK_P], ACC)
    target_x = tl.zeros([BLOCK_P], ACC)
    if target is not None:
        index, kept, valid, weight_t = target_of(
            target, weight, position, rows, classes, ignore_index, SMOOTHING, ACC
        )
        if losses is not None:
            # Before any gradient is written, which may take the place of the logits.
            target_x = tl.load(row + index, mask=valid, other=0.0).to(ACC)
    mass = None
    if (probabilities is not None) or SMOOTHING > 0:
        at = None
        if probabilities is not None:
            first = probabilities + outer * probability_outer + inner * probability_inner
            at = first[:, None] + c.to(tl.int64) * probability_channel
        q = dense_target(at, weight, c, mask, classes, SMOOTHING, ACC)
        mass = tl.sum(q, 1)

    if losses is not None:
        maximum = tl.max(x, 1)
        shifted = x - base_of(maximum)[:, None]
        e = tl.exp(shifted)
        total = tl.sum(e, 1)
        dot = None
        if mass is not None:
            dot = tl.sum(tl.where(mask, q * shifted, 0.0), 1)
        total = store_row(
            losses, stats, position, rows, stats_stride,
            maximum, total, mass, dot, target_x, weight_t, kept,
        )  # fmt: skip
    else:
        maximum = tl.load(stats + position, mask=rows, other=0.0)
        total = tl.load(stats + stats_stride + position, mask=rows, other=1.0)
        e = tl.exp(x - base_of(maximum)[:, None])

    if gradient is not None:
        g = gradient_scale(grad_output, scale, position, rows, PER_ROW, ACC)
        g = tl.where(kept, g, 0.0)
        share = weight_t
        if mass is not None:
            share += mass
        # Of a row that counts for nothing: 0, or NaN where its softmax is (as in torch).
        value = e * (g * share / total)[:, None]
        if mass is not None:
            if target is not None:
                q += tl.where(c == index[:, None], weight_t[:, None], 0.0)
            value -= q * g[:, None]
        elif target is not None:
            value -= tl.where(c == index[:, None], (weight_t * g)[:, None], 0.0)
        first = gradient + outer * gradient_outer + inner * gradient_inner
        tl.store(first[:, None] + c.to(tl.int64) * gradient_channel, value, mask=mask)

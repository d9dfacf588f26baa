"""cross_entropy in Triton: large vocabularies, and classes that are not contiguous.

A row is read in slices of classes, whose number depends on the number of classes alone; a second
kernel merges their statistics, and the gradient is a kernel of its own, one read and one write.
Formulas: cross_entropy_math.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torchext.triton_kernels.cross_entropy_math import (
    base_of,
    dense_target,
    extended,
    gradient_scale,
    merged,
    merged_target,
    store_row,
    target_of,
)


@triton.jit
def _tile(pid, blocks, ROWS: tl.constexpr, L: tl.constexpr):
    """The outer and inner indices of a tile's positions: one row's, or of L side by side."""
    outer = pid // blocks
    inner = pid % blocks
    if not ROWS:
        inner = inner * L + tl.arange(0, L)
    return outer, inner


@triton.jit
def _tile_classes(ROWS: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """The classes of a tile (K, L), from its first: K * L of one row, or K for L positions."""
    c = tl.arange(0, K)[:, None]
    # Contiguous classes need no 64 bits.
    return c * L + tl.arange(0, L)[None, :] if ROWS else c.to(tl.int64)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_statistics_kernel(
    input,  # or None: sum q alone
    target,
    probabilities,
    weight,
    losses,
    stats,
    partials,  # (4, slices, positions), or None where one slice has all classes
    inner_size,
    blocks,
    slices,
    classes,
    stats_stride,
    ignore_index,
    input_outer,
    input_channel,
    input_inner,
    probability_outer,
    probability_channel,
    probability_inner,
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    STEPS: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
):
    """A slice of STEPS * K * L classes of a row, or of STEPS * K classes of L positions.

    One read: each of L lanes keeps its own maximum and the sum relative to it, so that threads talk
    to each other at the end alone, and an element costs little more than one exponential.

    Bytes moved: P C e read (and as many probabilities); 16 P written for each slice, if several.
    """
    pid = tl.program_id(0).to(tl.int64)
    outer, inner = _tile(pid // slices, blocks, ROWS, L)
    piece = pid % slices
    rows = inner < inner_size
    position = outer * inner_size + inner
    first = 0 * inner
    if input is not None:
        first = outer * input_outer + inner * input_inner
    probability = outer * probability_outer + inner * probability_inner

    maximum = tl.full([L], -float("inf"), ACC)
    total = tl.zeros([L], ACC)
    mass = None
    dot = None
    if (probabilities is not None) or SMOOTHING > 0:
        mass = tl.zeros([L], ACC)
        dot = tl.zeros([L], ACC)
    c = _tile_classes(ROWS, K, L)
    WIDTH: tl.constexpr = K * L if ROWS else K
    for step in range(STEPS):
        begin = (piece * STEPS + step) * WIDTH
        mask = rows & (c < classes - begin)
        before = base_of(maximum)
        if input is not None:
            at = input + first + begin * input_channel
            x = tl.load(at + c * input_channel, mask=mask, other=-float("inf")).to(ACC)
            maximum, total, shifted = extended(maximum, total, x)
        if mass is not None:
            dense = None
            if probabilities is not None:
                dense = probabilities + probability + (begin + c) * probability_channel
            q = dense_target(dense, weight, begin + c, mask, classes, SMOOTHING, ACC)
            if input is not None:
                dot += mass * (before - base_of(maximum)) + tl.sum(
                    tl.where(mask, q * shifted, 0.0), 0
                )
            mass += tl.sum(q, 0)
    if ROWS:
        largest, total = merged(maximum, total)
        if mass is not None:
            mass, dot = merged_target(maximum, largest, mass, dot)
        maximum = largest
    if partials is not None:
        at = partials + piece * stats_stride + position
        step = tl.cast(slices, tl.int64) * stats_stride
        tl.store(at, maximum, mask=rows)
        tl.store(at + step, total, mask=rows)
        if mass is not None:
            tl.store(at + 2 * step, mass, mask=rows)
            tl.store(at + 3 * step, dot, mask=rows)
    elif input is not None:
        target_x = tl.where(rows, 0.0, 0.0).to(ACC)
        weight_t = target_x
        kept = rows
        if target is not None:
            index, kept, valid, weight_t = target_of(
                target, weight, position, rows, classes, ignore_index, SMOOTHING, ACC
            )
            target_x = tl.load(input + first + index * input_channel, mask=valid, other=0.0).to(ACC)
        store_row(
            losses, stats, position, rows, stats_stride,
            maximum, total, mass, dot, target_x, weight_t, kept,
        )  # fmt: skip
    else:
        tl.store(losses + position, mass, mask=rows)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_merge_kernel(
    input,
    target,
    weight,
    losses,
    stats,
    partials,
    inner_size,
    blocks,
    slices,
    classes,
    stats_stride,
    ignore_index,
    input_outer,
    input_channel,
    input_inner,
    SMOOTHING: tl.constexpr,
    DENSE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The statistics of rows from those of their slices; BLOCK_S slices hold all.

    Bytes moved: 8 P (16 P of a dense target) read for each slice, 12 P written, and the targets.
    """
    outer, inner = _tile(tl.program_id(0).to(tl.int64), blocks, False, BLOCK_P)
    rows = inner < inner_size
    position = outer * inner_size + inner
    piece = tl.arange(0, BLOCK_S)[:, None]
    mask = rows[None, :] & (piece < slices)
    at = partials + piece.to(tl.int64) * stats_stride + position[None, :]
    step = tl.cast(slices, tl.int64) * stats_stride
    maximum = tl.load(at, mask=mask, other=-float("inf"))
    total = tl.load(at + step, mask=mask, other=0.0)
    mass = None
    dot = None
    if DENSE:
        mass = tl.load(at + 2 * step, mask=mask, other=0.0)
        dot = tl.load(at + 3 * step, mask=mask, other=0.0)
    if input is None:
        tl.store(losses + position, tl.sum(mass, 0), mask=rows)
    else:
        largest, total = merged(maximum, total)
        if mass is not None:
            mass, dot = merged_target(maximum, largest, mass, dot)
        maximum = largest
        target_x = tl.zeros([BLOCK_P], ACC)
        weight_t = target_x
        kept = rows
        if target is not None:
            index, kept, valid, weight_t = target_of(
                target, weight, position, rows, classes, ignore_index, SMOOTHING, ACC
            )
            first = input + outer * input_outer + inner * input_inner
            target_x = tl.load(first + index * input_channel, mask=valid, other=0.0).to(ACC)
        store_row(
            losses, stats, position, rows, stats_stride,
            maximum, total, mass, dot, target_x, weight_t, kept,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_gradient_kernel(
    input,
    target,
    probabilities,
    weight,
    stats,
    masses,  # sum q of each position, or of all; None: there is no dense target, or no weight
    gradient,
    grad_output,
    scale,
    inner_size,
    blocks,
    slices,
    classes,
    stats_stride,
    ignore_index,
    input_outer,
    input_channel,
    input_inner,
    probability_outer,
    probability_channel,
    probability_inner,
    gradient_outer,
    gradient_channel,
    gradient_inner,
    SMOOTHING: tl.constexpr,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_MASS: tl.constexpr,
    ACC: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
):
    """The gradient of K * L logits from their rows' statistics: one read and one write of each.

    Bytes moved: P C e read and P C e written (and P C e of probabilities read).
    """
    pid = tl.program_id(0).to(tl.int64)
    outer, inner = _tile(pid // slices, blocks, ROWS, L)
    rows = inner < inner_size
    position = outer * inner_size + inner
    c = _tile_classes(ROWS, K, L)
    begin = (pid % slices) * (K * L if ROWS else K)
    mask = rows & (c < classes - begin)
    at = input + outer * input_outer + inner * input_inner + begin * input_channel
    x = tl.load(at + c * input_channel, mask=mask, other=-float("inf")).to(ACC)
    maximum = tl.load(stats + position, mask=rows, other=0.0)
    total = tl.load(stats + stats_stride + position, mask=rows, other=1.0)
    g = gradient_scale(grad_output, scale, position, rows, PER_ROW, ACC)
    share = tl.where(rows, 0.0, 0.0).to(ACC)
    if target is not None:
        index, kept, valid, weight_t = target_of(
            target, weight, position, rows, classes, ignore_index, SMOOTHING, ACC
        )
        g = tl.where(kept, g, 0.0)
        share = weight_t
    if masses is not None:
        share += tl.load(masses + (0 if ONE_MASS else 1) * position, mask=rows, other=0.0)
    elif SMOOTHING > 0:
        share += SMOOTHING
    value = tl.exp(x - base_of(maximum)) * (g * share / total)
    if target is not None:
        # Past the tile, 32 bits may be too few for an index, but then it is none of the tile's.
        own = index - begin
        own = tl.where((own >= 0) & (own < (K * L if ROWS else K)), own, -1).to(c.dtype)
    if (probabilities is not None) or SMOOTHING > 0:
        dense = None
        if probabilities is not None:
            first = outer * probability_outer + inner * probability_inner
            dense = probabilities + first + (begin + c) * probability_channel
        q = dense_target(dense, weight, begin + c, mask, classes, SMOOTHING, ACC)
        if target is not None:
            q += tl.where(c == own, weight_t, 0.0)
        value -= q * g
    elif target is not None:
        value -= tl.where(c == own, weight_t * g, 0.0)
    at = gradient + outer * gradient_outer + inner * gradient_inner + begin * gradient_channel
    tl.store(at + c * gradient_channel, value, mask=mask)

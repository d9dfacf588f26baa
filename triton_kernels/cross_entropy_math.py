r"""cross_entropy in Triton: the arithmetic that its kernels share.

For a row x of logits with maximum m and S = sum_c exp(x_c - m):

    loss       = W_t (log S - (x_t - m)) + sum_c q_c (log S - (x_c - m))
    gradient_c = g (exp(x_c - m) (W_t + sum q) / S - (q_c + [c = t] W_t))

with W_t = (1 - smoothing) weight_t of a class index t (0 for probabilities), the dense target
q_c = weight_c ((1 - smoothing) probability_c + smoothing / C) (none for a plain class index), and g
the gradient of the row's loss. The same formulas as csrc/cpu/cross_entropy_kernel.h.

A position (a row of logits) is element (outer, inner) of a matrix; its class c stands at
outer * input_outer + inner * input_inner + c * input_channel. Targets, losses and statistics are
contiguous over positions. Every sum has an order that depends on the number of classes alone, so
that a row has the same bits in any batch. There are no atomics.

A class index that is neither a class nor ignore_index is not read with: its loss and its gradient
are NaN, and under TRITON_DEBUG=1 the kernel asserts. It raises nothing, since that would need the
host to wait for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def target_of(
    target,
    weight,
    position,
    mask,
    classes,
    ignore_index,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
):
    """The class index, whether the position counts, whether the index is a class, and W_t."""
    index = tl.load(target + position, mask=mask, other=0).to(tl.int64)
    kept = mask & (index != ignore_index)
    valid = kept & (index >= 0) & (index < classes)
    tl.device_assert(valid | (kept == 0), "cross_entropy: target is no class")
    scale = valid.to(ACC) * (1.0 - SMOOTHING)
    if weight is not None:
        scale *= tl.load(weight + index, mask=valid, other=0.0).to(ACC)
    scale = tl.where(valid, scale, float("nan"))
    return index, kept, valid, tl.where(kept, scale, 0.0)


@triton.jit
def dense_target(
    probabilities, weight, c, mask, classes, SMOOTHING: tl.constexpr, ACC: tl.constexpr
):
    """q_c, 0 beyond the classes; `probabilities` points at them, or is None."""
    q = tl.full([], SMOOTHING, ACC) / classes
    if probabilities is not None:
        q += (1.0 - SMOOTHING) * tl.load(probabilities, mask=mask, other=0.0).to(ACC)
    if weight is not None:
        q = q * tl.load(weight + c, mask=mask, other=0.0).to(ACC)
    return tl.where(mask, q, 0.0).to(ACC)


@triton.jit
def base_of(maximum):
    """What exponentials are relative to: of nothing but -inf, any finite number gives 0."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def extended(maximum, total, x):
    """Each lane's maximum and sum, a tile of logits added; and the logits relative to that."""
    larger = tl.maximum(maximum, tl.max(x, 0))
    base = base_of(larger)
    shifted = x - base[None, :]
    factor = tl.exp(tl.where(maximum == larger, 0.0, maximum - base))
    return larger, total * factor + tl.sum(tl.exp(shifted), 0), shifted


@triton.jit
def merged(maximum, total):
    """The maximum and sum of a row from those of its parts along axis 0."""
    row = tl.max(maximum, 0)
    # -inf - -inf is not asked for; a part of -inf alone has the sum 0 and the factor 0.
    factor = tl.exp(tl.where(maximum == row, 0.0, maximum - base_of(row)))
    return row, tl.sum(total * factor, 0)


@triton.jit
def merged_target(maximum, row, mass, dot):
    """The sums of a row's dense target, relative to its maximum, from those of its parts."""
    return tl.sum(mass, 0), tl.sum(dot + mass * (base_of(maximum) - base_of(row)), 0)


@triton.jit
def store_row(
    losses, stats, position, mask, stats_stride, maximum, total, mass, dot, target_x, scale, kept
):
    """The loss and the statistics of positions; log_softmax of nothing but -inf is NaN."""
    total = tl.where(maximum == -float("inf"), float("nan"), total)
    log_total = tl.log(total)
    loss = scale * (log_total - (target_x - base_of(maximum)))
    if dot is not None:
        loss += mass * log_total - dot
    tl.store(losses + position, tl.where(kept, loss, 0.0), mask=mask)
    if stats is not None:
        tl.store(stats + position, maximum, mask=mask)
        tl.store(stats + stats_stride + position, total, mask=mask)
    return total


@triton.jit
def gradient_scale(grad_output, scale, position, mask, PER_ROW: tl.constexpr, ACC: tl.constexpr):
    """g: the gradient of the loss (a position's own if PER_ROW) times what a mean divides by."""
    g = tl.where(mask, 1.0, 0.0).to(ACC)
    if grad_output is not None:
        if PER_ROW:
            g = tl.load(grad_output + position, mask=mask, other=0.0).to(ACC)
        else:
            g *= tl.load(grad_output).to(ACC)
    if scale is not None:
        g *= tl.load(scale).to(ACC)
    return g

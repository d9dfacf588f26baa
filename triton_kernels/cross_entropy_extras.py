r"""cross_entropy's extras (z_loss, softcap, logit_scale) in Triton: rows of contiguous classes.

Formulas: torchext/ops/extras_chunks.py, cross_entropy_math.py. The function is the operator
`cross_entropy_extras_rows` of csrc/ops/cross_entropy_extras.cpp, argument for argument.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torchext.triton_kernels import common
from torchext.triton_kernels.common import WIDE
from torchext.triton_kernels.cross_entropy_call import INDICES
from torchext.triton_kernels.cross_entropy_math import (
    base_of,
    dense_target,
    extended,
    merged,
    merged_target,
    target_of,
)
from triton.language.extra import libdevice

_TILE = 4096  # classes of a step
_INTERPRETED = tl.constexpr(common.INTERPRETED)


@triton.jit
def _tanh(x):
    """The library's tanh, which the interpreter has not got."""
    if _INTERPRETED:
        return (1.0 - 2.0 / (tl.exp(2.0 * x.to(tl.float64)) + 1.0)).to(x.dtype)
    else:
        return libdevice.tanh(x)


@triton.jit
def _with_slope(row, c, mask, softcap, logit_scale, CAPPED: tl.constexpr, ACC: tl.constexpr):
    """The logits, scaled and capped, -inf beyond the classes; and softcap's derivative.

    That is of tanh itself, whose product with the cap is rounded once more.
    """
    z = tl.load(row + c, mask=mask, other=0.0).to(ACC) * tl.full([], logit_scale, ACC)
    slope = tl.full([], 1.0, ACC)
    if CAPPED:
        cap = tl.full([], softcap, ACC)
        t = _tanh(z / cap)
        z = cap * t
        slope = 1.0 - t * t
    return tl.where(mask, z, -float("inf")), slope


@triton.jit
def _transformed(row, c, mask, softcap, logit_scale, CAPPED: tl.constexpr, ACC: tl.constexpr):
    z, slope = _with_slope(row, c, mask, softcap, logit_scale, CAPPED, ACC)
    return z


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_extras_kernel(
    input,
    target,  # class indices, or None
    probabilities,  # or None
    weight,  # or None
    grad_loss,  # of the rows, or None
    grad_lse,  # likewise
    gradient,  # or None: no gradient is wanted. May be the input
    losses,  # written; or None: stats are read
    stats,  # (2, rows): maxima and sums of the transformed logits
    argmax,  # or None
    classes,
    ignore_index,
    input_stride,
    probability_stride,
    grad_loss_stride,
    grad_lse_stride,
    gradient_stride,
    stats_stride,
    # The host's numbers in their width: a float would be one of 32 bits.
    z_loss: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    SMOOTHING: tl.constexpr,
    CAPPED: tl.constexpr,
    ACC: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
):
    """A row by one program, K * L classes a step: its sums, and then its gradient.

    Bytes moved, e an element's size, for P rows of C classes: P C e read for the sums, P C e for
    the argmax, P C e read (from the cache as far as that holds the rows under way) and written for
    the gradient, and as many of probabilities. The rest is small.
    """
    position = tl.program_id(0).to(tl.int64)
    row = input + position * input_stride
    lane = tl.arange(0, K)[:, None] * L + tl.arange(0, L)[None, :]
    at_probabilities = None
    if probabilities is not None:
        at_probabilities = probabilities + position * probability_stride
    here = position >= 0  # a mask of one row
    index = tl.full([], -1, tl.int64)
    kept = here
    weight_t = tl.zeros([], ACC)
    target_z = weight_t
    if target is not None:
        index, kept, valid, weight_t = target_of(
            target, weight, position, here, classes, ignore_index, SMOOTHING, ACC
        )
        if losses is not None:
            # Before any gradient is written, which may take the place of the logits.
            target_z = _transformed(row, index, valid, softcap, logit_scale, CAPPED, ACC)
            target_z = tl.where(valid, target_z, 0.0)
        index = tl.where(valid, index, -1)
    z_weight = tl.full([], z_loss, ACC)

    mass = None
    if losses is not None:
        lane_max = tl.full([L], -float("inf"), ACC)
        lane_sum = tl.zeros([L], ACC)
        lane_mass = None
        lane_dot = None
        if (probabilities is not None) or SMOOTHING > 0:
            lane_mass = tl.zeros([L], ACC)
            lane_dot = tl.zeros([L], ACC)
        for begin in range(0, classes, K * L):
            c = begin + lane
            mask = c < classes
            z = _transformed(row, c, mask, softcap, logit_scale, CAPPED, ACC)
            before = base_of(lane_max)
            lane_max, lane_sum, shifted = extended(lane_max, lane_sum, z)
            if lane_mass is not None:
                dense = None
                if at_probabilities is not None:
                    dense = at_probabilities + c
                q = dense_target(dense, weight, c, mask, classes, SMOOTHING, ACC)
                lane_dot += lane_mass * (before - base_of(lane_max))
                lane_dot += tl.sum(tl.where(mask, q * shifted, 0.0), 0)
                lane_mass += tl.sum(q, 0)
        maximum, total = merged(lane_max, lane_sum)
        if lane_mass is not None:
            mass, dot = merged_target(lane_max, maximum, lane_mass, lane_dot)
        total = tl.where(maximum == -float("inf"), float("nan"), total)
        if argmax is not None:
            # As torch's: the first NaN, or the first of the largest.
            first_nan = tl.full([L], 0x7FFFFFFF, tl.int32)
            first = first_nan
            for begin in range(0, classes, K * L):
                c = begin + lane
                mask = c < classes
                z = _transformed(row, c, mask, softcap, logit_scale, CAPPED, ACC)
                first_nan = tl.minimum(
                    first_nan, tl.min(tl.where(mask & (z != z), c, 0x7FFFFFFF), 0)
                )
                first = tl.minimum(first, tl.min(tl.where(mask & (z == maximum), c, 0x7FFFFFFF), 0))
            nan = tl.min(first_nan, 0)
            found = tl.where(nan < classes, nan, tl.min(first, 0))
            tl.store(argmax + position, found.to(tl.int64))
        if (maximum == float("inf")) | (maximum == -float("inf")):
            # A maximum passes NaN over: of finite logits it is in the sum, which is NaN here.
            some = tl.zeros([L], tl.int32)
            for begin in range(0, classes, K * L):
                c = begin + lane
                z = _transformed(row, c, c < classes, softcap, logit_scale, CAPPED, ACC)
                some = tl.maximum(some, tl.max((z != z).to(tl.int32), 0))
            maximum = tl.where(tl.max(some, 0) > 0, float("nan"), maximum)
        tl.store(stats + position, maximum)
        tl.store(stats + stats_stride + position, total)
    else:
        maximum = tl.load(stats + position)
        total = tl.load(stats + stats_stride + position)
        if (probabilities is not None) or SMOOTHING > 0:
            lane_mass = tl.zeros([L], ACC)
            for begin in range(0, classes, K * L):
                c = begin + lane
                dense = None
                if at_probabilities is not None:
                    dense = at_probabilities + c
                q = dense_target(dense, weight, c, c < classes, classes, SMOOTHING, ACC)
                lane_mass += tl.sum(q, 0)
            mass = tl.sum(lane_mass, 0)

    log_total = tl.log(total)
    infinite = (maximum == float("inf")) | (maximum == -float("inf"))
    lse = tl.where(infinite, maximum, maximum + log_total)
    if losses is not None:
        loss = weight_t * (log_total - (target_z - base_of(maximum)))
        if mass is not None:
            loss += mass * log_total - dot
        loss += tl.where(z_weight == 0, 0.0, z_weight * lse * lse)
        tl.store(losses + position, tl.where(kept, loss, 0.0))

    if gradient is not None:
        inner = tl.full([], logit_scale, ACC)
        g = tl.zeros([], ACC)
        if grad_loss is not None:
            g = inner * tl.load(grad_loss + position * grad_loss_stride).to(ACC)
            g = tl.where(kept, g, 0.0)
        share = weight_t
        if mass is not None:
            share += mass
        share += tl.where(z_weight == 0, 0.0, 2.0 * z_weight * lse)
        # Of a row that counts for nothing: 0, or NaN where its softmax is (as in torch).
        scale = tl.where(kept, g * share, 0.0)
        if grad_lse is not None:
            scale += inner * tl.load(grad_lse + position * grad_lse_stride).to(ACC)
        scale = scale / total
        base = base_of(maximum)
        for begin in range(0, classes, K * L):
            c = begin + lane
            mask = c < classes
            z, slope = _with_slope(row, c, mask, softcap, logit_scale, CAPPED, ACC)
            value = tl.exp(z - base) * scale
            if mass is not None:
                dense = None
                if at_probabilities is not None:
                    dense = at_probabilities + c
                q = dense_target(dense, weight, c, mask, classes, SMOOTHING, ACC)
                if target is not None:
                    q += tl.where(c == index.to(tl.int32), weight_t, 0.0)
                value -= q * g
            elif target is not None:
                value -= tl.where(c == index.to(tl.int32), weight_t * g, 0.0)
            if CAPPED:
                value *= slope
            tl.store(gradient + position * gradient_stride + c, value, mask=mask)


def cross_entropy_extras_rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    gradient: Tensor | None,
    loss: Tensor | None,
    stats: Tensor,
    argmax: Tensor | None,
) -> None:
    """Writes what the native operator of the same name does. Its callers have checked the call."""
    rows, classes = input.shape
    indexed = target.dtype in INDICES
    if indexed or target.stride(1) != 1:
        target = target.contiguous()
    lanes = {2: 2048, 4: 1024, 8: 512}[input.element_size()]  # 16 bytes of a thread, 8 warps
    lanes = min(lanes, triton.next_power_of_2(classes))
    steps = max(1, min(_TILE, triton.next_power_of_2(classes)) // lanes)
    common.launch(
        cross_entropy_extras_kernel,
        (rows,),
        input.device,
        input,
        target if indexed else None,
        None if indexed else target,
        None if weight is None else weight.contiguous(),
        grad_loss, grad_lse, gradient, loss, stats, argmax, classes, ignore_index,
        input.stride(0),
        0 if indexed else target.stride(0),
        0 if grad_loss is None else grad_loss.stride(0),
        0 if grad_lse is None else grad_lse.stride(0),
        0 if gradient is None else gradient.stride(0),
        stats.stride(0),
        z_loss, softcap, logit_scale,
        SMOOTHING=label_smoothing if label_smoothing > 0 else 0.0,
        CAPPED=softcap != 0,
        ACC=WIDE.get(input.dtype, tl.float32),
        K=steps,
        L=lanes,
        num_warps=max(1, min(8, steps * lanes // 256)),
    )  # fmt: skip

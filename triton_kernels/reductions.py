"""Sums over the positions of a loss: its total, what a mean divides by, and a scale in place.

Sums are float64 in a fixed order: blocks of CHUNK positions, then the blocks. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torchext.triton_kernels import common
from torchext.triton_kernels.common import WIDE

CHUNK = 16384
"""Positions of one program; fewer need one kernel, more need another for the programs' sums."""


@triton.jit
def _store_mean(loss, scale, total, mass, MEAN: tl.constexpr, ACC: tl.constexpr):
    """The loss, and what a mean's gradients are multiplied by; NaN over nothing, as in torch."""
    if MEAN:
        inverse = tl.where(mass == 0, float("nan"), 1.0 / mass)
        if scale is not None:
            tl.store(scale, inverse.to(ACC))
        total = tl.where(mass == 0, float("nan"), total / mass)
    if loss is not None:
        tl.store(loss, total.to(ACC))


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_sums_kernel(
    losses,  # or None
    target,  # class indices, or None: every position counts
    weight,  # or None
    partials,  # (2, blocks), or None: one block has all
    loss,  # written where one block has all, or None
    scale,  # likewise
    positions,
    classes,
    ignore_index,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of STEPS * BLOCK losses and of their targets' weights.

    Bytes moved, for P positions: 4 P of losses and the targets (4 P to 8 P) read.
    """
    pid = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    mass = tl.zeros([BLOCK], tl.float64)
    for step in range(STEPS):
        position = (pid * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        mask = position < positions
        if losses is not None:
            total += tl.load(losses + position, mask=mask, other=0.0).to(tl.float64)
        if MEAN:
            if target is not None:
                index = tl.load(target + position, mask=mask, other=0).to(tl.int64)
                kept = mask & (index != ignore_index)
                valid = kept & (index >= 0) & (index < classes)
                share = valid.to(tl.float64)
                if weight is not None:
                    share = tl.load(weight + index, mask=valid, other=0.0).to(tl.float64)
                # An index that is no class makes its loss NaN, and the mean with it.
                mass += tl.where(kept & (valid == 0), float("nan"), share)
            else:
                mass += mask.to(tl.float64)
    if partials is None:
        _store_mean(loss, scale, tl.sum(total, 0), tl.sum(mass, 0), MEAN, ACC)
    else:
        tl.store(partials + pid, tl.sum(total, 0))
        tl.store(partials + tl.num_programs(0) + pid, tl.sum(mass, 0))


@triton.jit
def cross_entropy_mean_kernel(
    partials, loss, scale, blocks, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum or mean from the sums of blocks. One program.

    Bytes moved: 16 a block read.
    """
    total = tl.zeros([BLOCK], tl.float64)
    mass = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, blocks, BLOCK):
        block = begin + tl.arange(0, BLOCK)
        mask = block < blocks
        total += tl.load(partials + block, mask=mask, other=0.0)
        mass += tl.load(partials + blocks + block, mask=mask, other=0.0)
    _store_mean(loss, scale, tl.sum(total, 0), tl.sum(mass, 0), MEAN, ACC)


@triton.jit
def cross_entropy_scale_kernel(gradient, grad_output, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Multiplies by grad_output, a scalar on the device, and does nothing where that is 1.

    What the scalar is, the host does not know: a training step multiplies by 1 and pays the launch.

    Bytes moved: none, or 2 e a gradient's element of e bytes.
    """
    factor = tl.load(grad_output).to(ACC)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < size).to(ACC)
        tl.store(gradient + at, value * factor, mask=at < size)


def reduce(
    losses: Tensor | None,  # (positions)
    target: Tensor | None,  # (positions), contiguous
    weight: Tensor | None,  # (classes), contiguous
    loss: Tensor | None,
    scale: Tensor | None,
    positions: int,
    classes: int,
    ignore_index: int,
    mean: bool,
) -> None:
    """Writes the sum or mean of losses to `loss`, and a mean's divisor's inverse to `scale`."""
    out = loss if loss is not None else scale
    assert out is not None
    acc = WIDE.get(out.dtype, tl.float32)
    blocks = max(1, -(-positions // CHUNK))
    steps = -(-min(max(positions, 1), CHUNK) // 1024)
    partials = out.new_empty((2, blocks), dtype=torch.float64) if blocks > 1 else None
    whole = (loss, scale) if blocks == 1 else (None, None)
    common.launch(
        cross_entropy_sums_kernel,
        (blocks,),
        out.device,
        losses, target, weight, partials, *whole, positions, classes, ignore_index,
        MEAN=mean,
        ACC=acc,
        STEPS=steps,
        BLOCK=1024,
    )  # fmt: skip
    if blocks > 1:
        common.launch(
            cross_entropy_mean_kernel, (1,), out.device,
            partials, loss, scale, blocks, MEAN=mean, ACC=acc, BLOCK=1024,
        )  # fmt: skip


def scale_(gradient: Tensor, grad_output: Tensor) -> Tensor:
    """Multiplies a dense gradient by a scalar in place, without the host knowing the scalar."""
    common.launch(
        cross_entropy_scale_kernel,
        (triton.cdiv(gradient.numel(), 4096),),
        gradient.device,
        gradient, grad_output, gradient.numel(),
        ACC=WIDE.get(gradient.dtype, tl.float32),
        BLOCK=4096,
    )  # fmt: skip
    return gradient

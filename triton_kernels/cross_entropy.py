"""cross_entropy in Triton: the functions of csrc/ops/cross_entropy.cpp, argument for argument.

Which kernels a call takes depends on its classes and strides alone:

* classes contiguous and at most `RESIDENT`: rows in registers, read once, gradient or not
  (cross_entropy_rows.py);
* otherwise slices, their merger, and the gradient by itself (cross_entropy_slices.py).

Around them, for a sum or mean, one small kernel over the targets or losses (reductions.py). Nothing
here waits for the device, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torchext.triton_kernels import common
from torchext.triton_kernels.common import accumulator
from torchext.triton_kernels.cross_entropy_call import Call, check, one_pass, walk
from torchext.triton_kernels.cross_entropy_rows import cross_entropy_rows_kernel
from torchext.triton_kernels.cross_entropy_slices import (
    cross_entropy_gradient_kernel,
    cross_entropy_merge_kernel,
    cross_entropy_statistics_kernel,
)
from torchext.triton_kernels.reductions import reduce, scale_

from torchext import reference
from torchext.ops import cross_entropy_fake

__all__ = [
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cross_entropy_forward_",
    "one_pass",
    "scale_",
    "write_gradient",
    "write_losses",
]

SLICE = 8192
"""Classes of a row's slice, one program; as many as keep a multiprocessor's loads in flight."""
TILE_SLICE = 1024
"""Classes of a slice where the positions are contiguous: a program takes several steps for it."""
TILE_ELEMENTS = 4096
_NONE, _MEAN = 0, 1


def _rows(
    call: Call,
    losses: Tensor | None,
    stats: Tensor | None,
    grad_output: Tensor | None,
    scale: Tensor | None,
) -> None:
    block_c = triton.next_power_of_2(call.classes)
    wide = 2 if call.acc is torch.float64 else 1
    # 16 elements a thread, and several rows where one has fewer than a warp's share.
    block_p = max(1, 2048 // (block_c * wide))
    warps = min(16, max(4, block_c * wide // 512))
    blocks = triton.cdiv(call.inner, block_p)
    common.launch(
        cross_entropy_rows_kernel,
        (call.outer * blocks,),
        call.input.device,
        call.input, call.target, call.probabilities, call.weight, losses, stats, call.gradient,
        grad_output, scale, call.inner, blocks, call.classes, call.positions, call.ignore_index,
        call.input_strides.outer, call.input_strides.inner,
        *call.probability_strides, *call.gradient_strides,
        **call.constants,
        PER_ROW=grad_output is not None and grad_output.dim() > 0,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=warps,
    )  # fmt: skip


def _tiles(call: Call) -> tuple[int, int, int]:
    """Steps of a slice, and classes by lanes of a step."""
    if not call.rows:
        k = min(128, triton.next_power_of_2(call.classes))
        return TILE_SLICE // k, k, TILE_ELEMENTS // k
    lanes = {2: 2048, 4: 1024, 8: 512}[call.input.element_size()]  # 16 bytes of a thread, 8 warps
    lanes = min(lanes, triton.next_power_of_2(call.classes))
    return 1, SLICE // lanes, lanes


def _statistics(call: Call, losses: Tensor, stats: Tensor | None) -> None:
    """Losses and statistics; without `stats`, sum q of each position to `losses`."""
    steps, k, lanes = _tiles(call)
    input = None if stats is None else call.input
    blocks = call.inner if call.rows else triton.cdiv(call.inner, lanes)
    slices = triton.cdiv(call.classes, steps * k * (lanes if call.rows else 1))
    partials = None
    if slices > 1:
        partials = call.input.new_empty((4, slices, call.positions), dtype=call.acc)
    else:
        steps = triton.cdiv(call.classes, k * (lanes if call.rows else 1))
    sizes = (slices, call.classes, call.positions, call.ignore_index)
    common.launch(
        cross_entropy_statistics_kernel,
        (call.outer * blocks * slices,),
        call.input.device,
        input, call.target, call.probabilities, call.weight, losses, stats, partials,
        call.inner, blocks, *sizes, *call.input_strides, *call.probability_strides,
        **call.constants,
        ROWS=call.rows,
        STEPS=steps,
        K=k,
        L=lanes,
        num_warps=8 if call.rows else 4,
    )  # fmt: skip
    if partials is None:
        return
    block_s = triton.next_power_of_2(slices)
    # All of a position's slices are in one tile.
    block_p = max(1, min(32, TILE_ELEMENTS // block_s))
    blocks = triton.cdiv(call.inner, block_p)
    common.launch(
        cross_entropy_merge_kernel,
        (call.outer * blocks,),
        call.input.device,
        input, call.target, call.weight, losses, stats, partials,
        call.inner, blocks, *sizes, *call.input_strides,
        **call.constants,
        DENSE=call.probabilities is not None or call.smoothing > 0,
        BLOCK_S=block_s,
        BLOCK_P=block_p,
    )  # fmt: skip


def _masses(call: Call) -> Tensor | None:
    """The sums of q: of each position's probabilities, or once for all of the weights."""
    if call.probabilities is None and (call.smoothing == 0 or call.weight is None):
        return None
    if call.probabilities is None:
        call = call._replace(outer=1, inner=1, target=None)
    masses = call.input.new_empty((call.positions,), dtype=call.acc)
    _statistics(call, masses, None)
    return masses


def _gradient(call: Call, stats: Tensor, grad_output: Tensor | None, scale: Tensor | None) -> None:
    _, k, lanes = _tiles(call)
    blocks = call.inner if call.rows else triton.cdiv(call.inner, lanes)
    slices = triton.cdiv(call.classes, k * (lanes if call.rows else 1))
    common.launch(
        cross_entropy_gradient_kernel,
        (call.outer * blocks * slices,),
        call.input.device,
        call.input, call.target, call.probabilities, call.weight, stats, _masses(call),
        call.gradient, grad_output, scale, call.inner, blocks, slices, call.classes,
        call.positions, call.ignore_index, *call.input_strides, *call.probability_strides,
        *call.gradient_strides,
        **call.constants,
        PER_ROW=grad_output is not None and grad_output.dim() > 0,
        ROWS=call.rows,
        ONE_MASS=call.probabilities is None,
        K=k,
        L=lanes,
        num_warps=8 if call.rows else 4,
    )  # fmt: skip


def _mean_scale(call: Call, reduction: int) -> Tensor | None:
    """What a mean multiplies gradients by, from the targets."""
    if reduction != _MEAN:
        return None
    scale = call.input.new_empty((), dtype=call.acc)
    sizes = (call.positions, call.classes, call.ignore_index)
    reduce(None, call.target, call.weight, None, scale, *sizes, mean=True)
    return scale


def write_losses(call: Call, losses: Tensor, stats: Tensor | None, scale: Tensor | None) -> None:
    """Writes losses and statistics; with `call.gradient`, that of `scale` times their sum too."""
    if call.resident:
        _rows(call, losses, stats, None, scale)
        return
    if stats is None:
        stats = call.input.new_empty((2, call.positions), dtype=call.acc)
    _statistics(call, losses, stats)
    if call.gradient is not None:
        _gradient(call, stats, None, scale)


def write_gradient(
    call: Call, stats: Tensor, grad_output: Tensor | None, scale: Tensor | None
) -> None:
    """Writes `call.gradient` from the statistics, times `grad_output` and `scale`."""
    if call.resident:
        _rows(call, None, stats, grad_output, scale)
    else:
        _gradient(call, stats, grad_output, scale)


def _forward(call: Call, shape: torch.Size, reduction: int, stats: Tensor | None) -> Tensor:
    """The loss; with `call.gradient`, the gradient of its sum or mean too."""
    input = call.input
    losses = input.new_empty(
        (call.positions,), dtype=input.dtype if reduction == _NONE else call.acc
    )
    scale = _mean_scale(call, reduction) if call.gradient is not None else None
    write_losses(call, losses, stats, scale)
    if reduction == _NONE:
        return losses.view(shape[:1] + shape[2:] if len(shape) > 1 else ())
    loss = input.new_empty(())
    sizes = (call.positions, call.classes, call.ignore_index)
    reduce(losses, call.target, call.weight, loss, None, *sizes, mean=reduction == _MEAN)
    return loss


def cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    save_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss, stats and gradient as the native operator of the same name does.

    Bytes moved: those of `cross_entropy_rows_kernel`, or of `cross_entropy_statistics_kernel` and,
    with the gradient, `cross_entropy_gradient_kernel`.
    """
    options = (reduction, ignore_index, label_smoothing)
    arguments = (input, target, weight, *options)
    check("cross_entropy_forward", (*arguments, save_gradient), arguments)
    if save_gradient and reduction == _NONE:
        raise RuntimeError(
            "cross_entropy: expected reduction mean or sum with save_gradient, but got none"
        )
    positions = (
        0
        if save_gradient or input.numel() == 0
        else input.numel() // input.shape[min(input.dim() - 1, 1)]
    )
    stats = input.new_empty((2, positions), dtype=accumulator(input.dtype))
    gradient = cross_entropy_fake.empty_gradient(input) if save_gradient else None
    if input.numel() == 0:
        loss = _of_nothing(input, target, weight, *options)
    else:
        call = walk(input, target, weight, ignore_index, label_smoothing, gradient)
        loss = _forward(call, input.shape, reduction, None if save_gradient else stats)
    return loss, stats, input.new_empty((0,)) if gradient is None else gradient


def _of_nothing(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    name = cross_entropy_fake.REDUCTIONS[reduction]
    return reference.cross_entropy(input, target, weight, ignore_index, name, label_smoothing)


def cross_entropy_forward_(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Returns the loss of a mean or sum, and writes its gradient in the place of the logits.

    Bytes moved: those of `cross_entropy_forward` with the gradient; no memory is allocated.
    """
    options = (reduction, ignore_index, label_smoothing)
    arguments = (input, target, weight, *options)
    check("cross_entropy_forward_", arguments, arguments)
    if reduction == _NONE:
        raise RuntimeError("cross_entropy_forward_: expected reduction mean or sum, but got none")
    if input.numel() == 0:
        return _of_nothing(input, target, weight, *options)
    call = walk(input, target, weight, ignore_index, label_smoothing, input)
    if call.input is not input:
        raise RuntimeError(
            "cross_entropy_forward_: expected input whose classes or positions are contiguous, but "
            f"got shape {list(input.shape)} with other strides"
        )
    return _forward(call, input.shape, reduction, None)


def cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Returns the gradient from forward's statistics.

    Bytes moved: those of `cross_entropy_rows_kernel` or of `cross_entropy_gradient_kernel`.
    """
    arguments = (input, target, weight, reduction, ignore_index, label_smoothing)
    check(
        "cross_entropy_backward",
        (grad_output, input, target, weight, stats, reduction, ignore_index, label_smoothing),
        arguments,
    )
    gradient = cross_entropy_fake.empty_gradient(input)
    if input.numel() == 0:
        return gradient
    call = walk(input, target, weight, ignore_index, label_smoothing, gradient)
    scale = _mean_scale(call, reduction)
    if reduction == _NONE:
        grad_output = grad_output.reshape(call.positions)
    else:
        grad_output = grad_output.reshape(())
    grad_output = grad_output.contiguous()
    write_gradient(call, stats, grad_output, scale)
    return gradient

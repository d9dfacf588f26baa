r"""linear_cross_entropy by tiles: the logits are never in device memory.

A tile of logits is made by the matrix units where it is used, from a block of rows and a block of
classes, and made again for each use:

* the statistics: a slice of the vocabulary a program, an online sum over its tiles, the target's
  logit picked from the tile that has it; a small kernel merges the slices;
* input's gradient: a block of rows a program, which walks all classes;
* the gradients of linear_weight and linear_bias: a block of classes a program, which walks all
  rows. The sum of a bias is a product with ones, so that its order is that of the products.

Formulas: cross_entropy_math.py. A program adds up its own results in its registers, in order: no
atomics, and no workspace but 20 bytes for each row and slice. `FEATURES` columns of a gradient fit
the registers; where there are more, other programs have them, and make the logits again too: with
B blocks of columns, forward has N C H multiplications and each of the gradients (1 + B) N C H. At
B = 1 those are five products instead of three, none of which reads or writes a logit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torchext.triton_kernels import common
from torchext.triton_kernels.common import INTERPRETED, WIDE, dot_precision
from torchext.triton_kernels.linear_cross_entropy_call import Gradients, Problem
from torchext.triton_kernels.linear_cross_entropy_gradients import (
    linear_cross_entropy_input_kernel,
    linear_cross_entropy_weight_kernel,
)
from torchext.triton_kernels.linear_cross_entropy_statistics import (
    linear_cross_entropy_merge_kernel,
    linear_cross_entropy_statistics_kernel,
)
from torchext.triton_kernels.tuning import TILES, choose

SLICE = 2048
"""Classes of a slice: fixed, so that the order of a row's sum is."""
FEATURES = {2: 128, 4: 64, 8: 32}
"""Columns of a gradient that fit the registers beside a tile of logits, by the element's size."""
# Rows, classes and features of a tile, warps and stages. One for each dtype, not tuned: the order
# in which a row's exponentials are added goes by the layout of the tile.
_STATISTICS = {2: (128, 128, 64, 8, 3), 4: (64, 64, 16, 8, 3), 8: (32, 32, 16, 4, 2)}


def _constants(problem: Problem) -> dict[str, Any]:
    return {
        "SMOOTHING": problem.smoothing,
        "PRECISION": dot_precision(problem.input.dtype),
        "ACC": WIDE.get(problem.input.dtype, tl.float32),
    }


def _strides(problem: Problem) -> tuple[int, int, int, int]:
    (input_n, input_k), (weight_c, weight_k) = (
        problem.input.stride(),
        problem.linear_weight.stride(),
    )
    return input_n, input_k, weight_c, weight_k


def forward(
    problem: Problem,
    losses: Tensor,
    stats: Tensor,
    gradients: Gradients,
    scale: Tensor | None,
) -> None:
    """Writes losses, statistics, and the gradients of `scale` times the sum of the losses."""
    rows, features, classes = *problem.input.shape, problem.classes
    block_n, block_c, block_k, warps, stages = _STATISTICS[problem.input.element_size()]
    if INTERPRETED:  # its time goes by the number of elements
        block_n, block_c, block_k = 16, 32, 16
    slices = triton.cdiv(classes, SLICE)
    partials = problem.input.new_empty((5, slices, rows), dtype=problem.acc)
    common.launch(
        linear_cross_entropy_statistics_kernel,
        (triton.cdiv(rows, block_n) * slices,),
        problem.input.device,
        problem.input, problem.linear_weight, problem.linear_bias, problem.target, problem.weight,
        partials, rows, features, classes, slices, problem.ignore_index, *_strides(problem),
        **_constants(problem),
        STEPS=SLICE // block_c,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_K=block_k,
        GROUP_N=8,
        num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    block_s = triton.next_power_of_2(slices)
    block_p = max(1, min(32, 4096 // block_s))
    constants = _constants(problem)
    del constants["PRECISION"]
    common.launch(
        linear_cross_entropy_merge_kernel,
        (triton.cdiv(rows, block_p),),
        problem.input.device,
        problem.target, problem.weight, losses, stats, partials, rows, classes, slices,
        problem.ignore_index,
        **constants,
        BLOCK_S=block_s,
        BLOCK_N=block_p,
    )  # fmt: skip
    if gradients.any:
        _gradients(problem, None, stats, gradients, scale)


def backward(
    problem: Problem,
    grad_output: Tensor,
    stats: Tensor,
    gradients: Gradients,
    scale: Tensor | None,
) -> None:
    """Writes the gradients from forward's statistics, from the logits made again."""
    _gradients(problem, grad_output, stats, gradients, scale)


def _gradients(
    problem: Problem,
    grad_output: Tensor | None,
    stats: Tensor,
    gradients: Gradients,
    scale: Tensor | None,
) -> None:
    mass = None
    if problem.smoothing > 0 and problem.weight is not None:
        total = torch.sum(problem.weight, dtype=torch.float64)
        mass = total.mul_(problem.smoothing / problem.classes).to(problem.acc)
    common_arguments = (
        problem.input, problem.linear_weight, problem.linear_bias, problem.target, problem.weight,
        stats, mass, grad_output, scale,
    )  # fmt: skip
    if gradients.input is not None:
        outputs = (gradients.input,)
        _walk(linear_cross_entropy_input_kernel, problem, common_arguments, outputs, problem.rows)
    if gradients.linear_weight is not None or gradients.linear_bias is not None:
        _walk(
            linear_cross_entropy_weight_kernel, problem, common_arguments,
            (gradients.linear_weight, gradients.linear_bias), problem.classes,
        )  # fmt: skip


def _walk(
    kernel: Any,
    problem: Problem,
    tensors: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    size: int,
) -> None:
    """Launches a kernel of gradients, whose programs have blocks of `size` rows or classes."""
    rows, features = problem.input.shape
    width = min(FEATURES[problem.input.element_size()], triton.next_power_of_2(features))
    width = max(16, width)
    blocks_h = triton.cdiv(features, width) if outputs[0] is not None else 1
    arguments = (
        *tensors, *outputs, rows, features, problem.classes, problem.ignore_index,
        *_strides(problem), blocks_h, triton.next_power_of_2(rows),
    )  # fmt: skip
    kernel, constants = choose(kernel, problem.input, arguments, TILES)
    grad_output = tensors[-2]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(size, meta["BLOCK_OWN"]) * blocks_h,)

    common.launch(
        kernel,
        grid,
        problem.input.device,
        *arguments,
        **_constants(problem),
        PER_ROW=grad_output is not None and grad_output.dim() > 0,
        BLOCK_H=width,
        **constants,
    )

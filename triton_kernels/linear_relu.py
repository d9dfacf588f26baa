"""linear_relu in Triton: the functions of csrc/ops/linear_relu.cpp, argument for argument.

    output = max(input @ weight.T + bias, 0)              input (M, K), weight (N, K), bias (N)

    masked = grad_output where output > 0 (where output is NaN too), else 0
    grad_input = masked @ weight
    grad_weight = masked.T @ input
    grad_bias = column sums of masked

One matrix product serves all three: its left operand may have a mask, which is applied while it is
loaded, so that `masked` is never in memory, and its result may get a bias and ReLU before it is
stored. No product is split along its sum: one program adds up an element, in order, without
atomics, and every configuration of the autotuner takes the sum in the same steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torchext.triton_kernels import common
from torchext.triton_kernels.common import WIDE, accumulator, refuse
from torchext.triton_kernels.tuning import choose

_FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
ROWS_PER_BLOCK = 128
"""Rows whose bias gradients are summed together: fixed, so that the order of the sum is."""


@triton.jit(do_not_specialize=["m_key"])
def linear_relu_gemm_kernel(
    left,  # (M, K)
    mask,  # (M, K) or None: left counts where this is not <= 0
    right,  # (K, N)
    bias,  # (N) or None
    result,  # (M, N)
    m_size,
    n_size,
    k_size,
    left_m,
    left_k,
    mask_m,
    mask_k,
    right_k,
    right_n,
    result_m,
    result_n,
    bias_n,
    m_key,  # m_size as the autotuner remembers it
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A product left @ right, with a mask on the left operand, or bias and ReLU on the result.

    Bytes moved, e an element's size: at least e (M K + K N + M N), and e M K for the mask. Blocks
    are taken in groups of GROUP_M rows of blocks, so that what they share is read from the L2
    cache: (M / BLOCK_M) K N e + (N / BLOCK_N) M K e pass through it.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(m_size, BLOCK_M)
    blocks_n = tl.cdiv(n_size, BLOCK_N)
    group_size = GROUP_M * blocks_n
    first = (pid // group_size) * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    block_m = first + (pid % group_size) % height
    block_n = (pid % group_size) // height

    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    # Masks, no wrapped indices: those would hide what is contiguous from the loads.
    m_inside = (m < m_size)[:, None]
    n_inside = (n < n_size)[None, :]
    m, n = m.to(tl.int64), n.to(tl.int64)
    left_at = left + m[:, None] * left_m + k[None, :] * left_k
    right_at = right + k[:, None] * right_k + n[None, :] * right_n
    mask_at = left_at
    if mask is not None:
        mask_at = mask + m[:, None] * mask_m + k[None, :] * mask_k

    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for begin in range(0, k_size, BLOCK_K):
        inside = k < k_size - begin
        a = tl.load(left_at, mask=m_inside & inside[None, :], other=0.0)
        b = tl.load(right_at, mask=inside[:, None] & n_inside, other=0.0)
        if mask is not None:
            y = tl.load(mask_at, mask=m_inside & inside[None, :], other=0.0)
            a = tl.where(y.to(ACC) <= 0, 0.0, a).to(a.dtype)
            mask_at += BLOCK_K * tl.cast(mask_k, tl.int64)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)
        left_at += BLOCK_K * tl.cast(left_k, tl.int64)
        right_at += BLOCK_K * tl.cast(right_k, tl.int64)

    if bias is not None:
        total += tl.load(bias + n * bias_n, mask=n < n_size, other=0.0).to(ACC)[None, :]
    if RELU:
        total = tl.where(total <= 0, 0.0, total)  # not `> 0`: NaN stays NaN
    result_at = result + m[:, None] * result_m + n[None, :] * result_n
    tl.store(result_at, total, mask=m_inside & n_inside)


@triton.jit
def linear_relu_bias_kernel(
    grad_output,  # (M, N)
    output,  # (M, N), contiguous, or None
    partial,  # (blocks, N)
    m_size,
    n_size,
    grad_m,
    grad_n,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Column sums of ROWS rows of the masked gradient; without `output`, of the rows as they are.

    Bytes moved: 2 e M N read (e M N without output), 4 N written for each block of ROWS rows.
    """
    blocks_n = tl.cdiv(n_size, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    block = pid // blocks_n
    n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], ACC)
    for step in range(ROWS // BLOCK_M):
        m = block * ROWS + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (m < m_size)[:, None] & (n < n_size)[None, :]
        at = grad_output + m[:, None] * grad_m + n[None, :] * grad_n
        grad = tl.load(at, mask=inside, other=0.0).to(ACC)
        if output is not None:
            at = output + m[:, None] * n_size + n[None, :]
            grad = tl.where(tl.load(at, mask=inside, other=0.0).to(ACC) <= 0, 0.0, grad)
        total += tl.sum(grad, 0)
    tl.store(partial + block * n_size + n, total, mask=n < n_size)


def _gemm(
    left: Tensor,  # (M, K)
    mask: Tensor | None,  # (M, K)
    right: Tensor,  # (K, N)
    bias: Tensor | None,  # (N)
    result: Tensor,  # (M, N)
    relu: bool,
) -> None:
    (m, k), n = left.shape, right.shape[1]
    if result.numel() == 0:
        return
    arguments = (
        left, mask, right, bias, result, m, n, k, *left.stride(),
        *((0, 0) if mask is None else mask.stride()), *right.stride(), *result.stride(),
        0 if bias is None else bias.stride(0), triton.next_power_of_2(m),
    )  # fmt: skip
    kernel, constants = choose(linear_relu_gemm_kernel, left, arguments)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    common.launch(
        kernel,
        grid,
        left.device,
        *arguments,
        RELU=relu,
        PRECISION=common.dot_precision(left.dtype),
        ACC=WIDE.get(left.dtype, tl.float32),
        **constants,
    )


def _column_sums(grad_output: Tensor, output: Tensor | None, result: Tensor) -> Tensor:
    """Sums of the rows in two levels, or more where the first leaves many."""
    rows, columns = grad_output.shape
    blocks = triton.cdiv(rows, ROWS_PER_BLOCK)
    out = result
    if blocks > 1:
        out = grad_output.new_empty((blocks, columns), dtype=accumulator(grad_output.dtype))
    block_n = 128
    common.launch(
        linear_relu_bias_kernel,
        (blocks * triton.cdiv(columns, block_n),),
        result.device,
        grad_output, output, out, rows, columns, *grad_output.stride(),
        ACC=WIDE.get(result.dtype, tl.float32),
        ROWS=ROWS_PER_BLOCK,
        BLOCK_M=32,
        BLOCK_N=block_n,
    )  # fmt: skip
    return result if blocks <= 1 else _column_sums(out, None, result)


def _served(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """The conditions of csrc/ops/linear_relu.h, whose words `refuse` gets."""
    if weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        return False
    tensors = [weight] if bias is None else [weight, bias]
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    return input.dtype in _FLOATING and all(
        tensor.dtype == input.dtype and tensor.device == input.device for tensor in tensors
    )


def linear_relu_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns relu(input @ weight.T + bias) as the native operator of the same name does.

    Bytes moved: those of `linear_relu_gemm_kernel`.
    """
    if not _served(input, weight, bias):
        native = torch.ops.torchext
        refuse(lambda: native.linear_relu_forward.default, "linear_relu", (input, weight, bias))
    n, k = weight.shape
    rows = math.prod(input.shape[:-1])
    output = input.new_empty((*input.shape[:-1], n))
    _gemm(input.reshape(rows, k), None, weight.t(), bias, output.view(rows, n), relu=True)
    return output


def linear_relu_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of input, weight and bias; one that is not asked for has no elements.

    Without `weight_grad` nothing is read of `input`, and `weight` may stand in its place.
    Bytes moved: `linear_relu_gemm_kernel`'s for each of the first two; 2 e M N for the bias's.
    """
    read = input if weight_grad else weight
    if (
        not _served(read, weight, None)
        or output.dim() < 1
        or output.shape[-1] != weight.shape[0]
        or (weight_grad and output.shape[:-1] != input.shape[:-1])
        or grad_output.shape != output.shape
        or not grad_output.dtype == output.dtype == weight.dtype
    ):
        refuse(
            lambda: torch.ops.torchext.linear_relu_backward.default,
            "linear_relu_backward",
            (grad_output, output, input, weight, input_grad, weight_grad, bias_grad),
        )
    n, k = weight.shape
    rows = math.prod(output.shape[:-1])
    grad_input = weight.new_empty((*output.shape[:-1], k) if input_grad else (0,))
    grad_weight = weight.new_empty(weight.shape if weight_grad else (0,))
    grad_bias = weight.new_empty((n,) if bias_grad else (0,))
    grad = grad_output.reshape(rows, n)
    result = output.reshape(rows, n).contiguous()
    if grad_input.numel():
        _gemm(grad, result, weight, None, grad_input.view(rows, k), relu=False)
    if grad_weight.numel():
        _gemm(grad.t(), result.t(), input.reshape(rows, k), None, grad_weight, relu=False)
    if grad_bias.numel():
        if rows:
            _column_sums(grad, result, grad_bias)
        else:
            grad_bias.zero_()
    return grad_input, grad_weight, grad_bias

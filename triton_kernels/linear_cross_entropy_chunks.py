"""linear_cross_entropy by chunks of rows: the products are the library's, the loss is ours.

    for each chunk of rows:
        logits = input @ linear_weight.T + linear_bias     into one reused buffer
        losses, and in the logits' place their gradient    the kernels of cross_entropy
        grad_input = gradient @ linear_weight
        grad_linear_weight += gradient.T @ input
        grad_linear_bias += column sums of gradient

C is C D throughout where linear_weight is (C, D, H): logits (N, C, D).

Three products of N C H multiplications, as many as the layers alone. Around them, e an element's
size: 2 to 4 e N C bytes for the loss, 3 e N C for the products' own reads and writes of the logits
and their gradient, and 8 C H for each further chunk, to which linear_weight's gradient is added.

Workspace: the buffer, and where several chunks add up a 16-bit gradient of linear_weight, 2 C H
bytes (see `WeightGradient`). At 8192 rows, 4096 features and 128256 classes in bfloat16: 131 MB and
1051 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torchext.triton_kernels.cross_entropy import write_gradient, write_losses
from torchext.triton_kernels.cross_entropy_call import Call, walk
from torchext.triton_kernels.linear_cross_entropy_call import NONE, Gradients, Problem

BUFFER_BYTES = 128 << 20
"""Of the logits' buffer, at most, unless `MIN_ROWS` need more. Each further chunk streams the
float32 sums of linear_weight's gradient, which at 790 TFLOP/s and 4.3 TB/s takes as long as a
product of 735 rows: a larger buffer is faster for the largest vocabularies, but 1.2 GB in all are
what the workspace may be."""
MIN_ROWS = 256
_ALIGNED_ROWS = 128
_PIECE = 1 << 24  # elements of a float32 product that is added by itself


def rows_per_chunk(rows: int, classes: int, element_size: int) -> int:
    """Returns how many rows' logits the buffer holds: all chunks but the last have so many."""
    fitting = BUFFER_BYTES // (classes * element_size) // _ALIGNED_ROWS * _ALIGNED_ROWS
    most = max(MIN_ROWS, fitting)
    if rows <= most:
        return rows
    chunks = -(-rows // most)
    even = -(-rows // chunks)
    return min(most, -(-even // _ALIGNED_ROWS) * _ALIGNED_ROWS)


@cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library adds a 16-bit product to float32 sums: torch on CUDA, by its version."""
    if device.type != "cuda":
        return False
    sums = torch.zeros((16, 16), device=device)
    factor = torch.zeros((16, 16), device=device, dtype=dtype)
    try:
        torch.addmm(sums, factor, factor, out_dtype=torch.float32, out=sums)
    except (RuntimeError, TypeError):
        return False
    return True


def _add_product(sums: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """Writes `beta * sums + left @ right` to float32 `sums`, from 16-bit factors."""
    if _adds_in_float32(sums.device, left.dtype):
        torch.addmm(sums, left, right, beta=beta, out_dtype=torch.float32, out=sums)
        return
    height = max(1, _PIECE // max(1, sums.shape[1]))
    for part, factor in zip(sums.split(height), left.split(height), strict=True):
        if sums.is_cuda:
            product = torch.mm(factor, right, out_dtype=torch.float32)
        else:
            product = part.new_empty(part.shape)
            torch.mm(factor.float(), right.float(), out=product)
        if beta:
            part.add_(product)
        else:
            part.copy_(product)


class WeightGradient:
    """The sum over chunks of rows of gradient.T @ input, rounded once.

    For a 16-bit dtype and several chunks the sums are float32: those of the first half of the
    classes in the memory of the gradient itself, the others beside it. In the end they are rounded,
    the first half in place: element i moves from bytes [4 i, 4 i + 4) to [2 i, 2 i + 2), in steps
    that double, so that none overwrites what it or a later one reads.

    Args:
        gradient: what is to be computed, contiguous.
        chunks: how many chunks there are.
    """

    _FIRST_STEP = 1 << 16

    def __init__(self, gradient: Tensor, chunks: int) -> None:
        """Allocates the sums."""
        self._gradient = gradient
        self._sums: list[tuple[Tensor, Tensor]] = []  # and which gradient they are of
        self._beta = 0
        classes, features = gradient.shape
        if chunks > 1 and gradient.element_size() == 2:
            half = classes // 2
            place = gradient.flatten()[: 2 * half * features].view(torch.float32)
            beside = gradient.new_empty((classes - half, features), dtype=torch.float32)
            self._sums = [(place.view(half, features), gradient[:half]), (beside, gradient[half:])]

    def add(self, logits_gradient: Tensor, input: Tensor) -> None:
        """Adds a chunk's part."""
        left, begin = logits_gradient.t(), 0
        if not self._sums:
            # beta 0 reads nothing.
            torch.addmm(self._gradient, left, input, beta=self._beta, out=self._gradient)
        for sums, _ in self._sums:
            if len(sums):
                _add_product(sums, left[begin : begin + len(sums)], input, self._beta)
            begin += len(sums)
        self._beta = 1

    def finish(self) -> None:
        """Rounds the sums to the gradient."""
        if not self._sums:
            return
        (place, first), (beside, second) = self._sums
        sums, rounded = place.flatten(), first.flatten()
        begin = min(self._FIRST_STEP, len(sums))
        rounded[:begin].copy_(sums[:begin].to(rounded.dtype))  # by way of a copy: they overlap
        while begin < len(sums):
            end = min(2 * begin, len(sums))
            rounded[begin:end].copy_(sums[begin:end])
            begin = end
        second.copy_(beside)


class _Chunks:
    """The chunks of one call, and the products around them."""

    def __init__(self, problem: Problem, gradients: Gradients) -> None:
        self._problem, self._gradients = problem, gradients
        input, columns = problem.input, problem.classes * problem.inner
        self._height = rows_per_chunk(problem.rows, columns, input.element_size())
        self._buffer = input.new_empty((self._height, columns))
        self.count = -(-problem.rows // self._height)
        self._weight_gradient = None
        if gradients.linear_weight is not None:
            gradient = gradients.linear_weight.flatten(0, -2)
            self._weight_gradient = WeightGradient(gradient, self.count)
        self._bias_sums: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, Call]]:
        """Gives each chunk's positions and logits, as the kernels walk them; then multiplies."""
        problem, gradients = self._problem, self._gradients
        weight, bias = problem.linear_weight.flatten(0, -2), problem.linear_bias
        for first in range(0, problem.rows, self._height):
            rows = slice(first, min(first + self._height, problem.rows))
            input = problem.input[rows]
            logits = self._buffer[: rows.stop - first]
            # Only ops that write to `out`: autocast leaves those alone.
            if bias is None:
                torch.mm(input, weight.t(), out=logits)
            else:
                torch.addmm(bias.flatten(), input, weight.t(), out=logits)
            shaped = logits.view(-1, *problem.linear_weight.shape[:-1])
            yield (
                slice(first * problem.inner, rows.stop * problem.inner),
                walk(
                    shaped, problem.target[rows], problem.weight, problem.ignore_index,
                    problem.smoothing, shaped if gradients.any else None,
                ),
            )  # fmt: skip
            if gradients.input is not None:
                torch.mm(logits, weight, out=gradients.input[rows])
            if self._weight_gradient is not None:
                self._weight_gradient.add(logits, input)
            if gradients.linear_bias is not None:
                sums = torch.sum(logits, 0, dtype=problem.acc)
                self._bias_sums = sums if self._bias_sums is None else self._bias_sums.add_(sums)
        if self._weight_gradient is not None:
            self._weight_gradient.finish()
        if gradients.linear_bias is not None and self._bias_sums is not None:
            gradients.linear_bias.flatten().copy_(self._bias_sums)


def forward(
    problem: Problem,
    losses: Tensor,
    stats: Tensor,
    gradients: Gradients,
    scale: Tensor | None,
) -> None:
    """Writes losses, statistics, and the gradients of `scale` times the sum of the losses."""
    chunks = _Chunks(problem, gradients)
    for positions, call in chunks:
        part = stats if chunks.count == 1 else stats.new_empty((2, call.positions))
        write_losses(call, losses[positions], part, scale)
        if part is not stats:
            stats[:, positions] = part


def backward(
    problem: Problem,
    grad_output: Tensor,
    stats: Tensor,
    gradients: Gradients,
    scale: Tensor | None,
) -> None:
    """Writes the gradients, from the logits made again and forward's statistics."""
    for positions, call in _Chunks(problem, gradients):
        upstream = grad_output[positions] if problem.reduction == NONE else grad_output
        write_gradient(call, stats[:, positions].contiguous(), upstream, scale)

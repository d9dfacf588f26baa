"""The logits of a loss with extras, a chunk of rows at a time, and where their gradient goes.

Workspace: on the CPU 384 rows of logits (more where they take less than 8 MiB) in at most 64 MiB,
elsewhere 512 MiB, or 256 rows where those are more. Where no kernel serves, again as much for
softcap, and half for narrow logits. Logits that are given need none with a kernel. Of more rows
than that 16-bit tensors' gradient of the weight is summed in float32, which is twice its size.

Siblings: torchext/ops/extras_chunks.py (the arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchext import _backend
from torchext.ops.linear_cross_entropy_fake import wide

_BYTES = {"cpu": 64 << 20}
_BYTES_ELSEWHERE = 512 << 20
_MIN_ROWS = 256
_ENOUGH_ROWS, _ENOUGH_BYTES = 384, 8 << 20  # kEnoughRows, kSmallBytes
_FEWEST_CLASSES = 16  # of the CPU's kernel: kFewestClassesOfExtras
_NONE = _backend.EAGER


def rows_per_chunk(rows: int, columns: int, like: Tensor) -> int:
    """Returns how many rows of logits are made at once; on the CPU as in csrc/cpu."""
    size = columns * wide(like.dtype).itemsize
    fit = _BYTES.get(like.device.type, _BYTES_ELSEWHERE) // size
    fit = max(_MIN_ROWS, fit // _MIN_ROWS * _MIN_ROWS)
    if like.is_cpu:
        fit = min(fit, max(_ENOUGH_ROWS, _ENOUGH_BYTES // size))
    return max(1, min(rows, fit))


def kernel_of(like: Tensor, shape: Sequence[int], rows: int) -> int:
    """Returns which kernel serves rows of logits of like's dtype and device.

    Args:
        like: of that dtype and device.
        shape: of a row.
        rows: how many there are.

    Returns:
        `_backend.OPERATOR`, the native one of the device; `_backend.TRITON`; or 0, none.
    """
    if len(shape) != 1:
        return _NONE
    place = _backend.route(like, op="cross_entropy", work=rows * shape[0])
    if place != _backend.OPERATOR:
        return place
    fewest = _FEWEST_CLASSES if like.is_cpu else 1
    return place if shape[0] >= fewest else _NONE


class Source:
    """Logits by chunks of rows, and where their gradient goes."""

    rows: int
    chunk: int
    shape: torch.Size
    """What comes after the rows: (C, d1, ..., dK)."""
    kernel: int
    """Which kernel makes the gradient, in `room`, of logits that stay as they are: `kernel_of`."""

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yields the first row of each chunk, and the one after its last."""
        for first in range(0, self.rows, self.chunk):
            yield first, min(self.rows, first + self.chunk)

    def want(self, needed: tuple[bool, bool, bool]) -> None:
        """Makes room for the gradients of input, linear_weight and linear_bias."""
        raise NotImplementedError

    def logits(self, first: int, last: int) -> Tensor:
        """Returns rows [first, last).

        The kernel reads them; else they are of the sums' dtype, to be overwritten.
        """
        raise NotImplementedError

    def room(self, first: int, last: int) -> Tensor:
        """Returns where the kernel puts the gradient of those rows."""
        raise NotImplementedError

    def factor_of(self, first: int, last: int) -> Tensor | None:
        """Returns the room for softcap's derivative at rows [first, last)."""
        raise NotImplementedError

    def take(self, gradient: Tensor, first: int, last: int) -> None:
        """Puts the gradient of rows [first, last) into those of the tensors."""
        raise NotImplementedError

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Returns those that are wanted, when all rows have been taken."""
        raise NotImplementedError


class Logits(Source):
    """Logits that are given: one chunk for the kernel.

    Args:
        input: (N, C, d1, ..., dK).
        softcap: whether the gradient needs a factor for each logit.
    """

    def __init__(self, input: Tensor, softcap: bool) -> None:
        self.input, self.shape, self.rows = input, input.shape[1:], len(input)
        self.kernel = _NONE
        if len(self.shape) == 1 and input.stride(1) == 1:
            self.kernel = kernel_of(input, self.shape, self.rows)
        self.chunk = max(1, self.rows)
        self._softcap = softcap
        if not self.kernel:
            self.chunk = rows_per_chunk(self.rows, math.prod(self.shape), input)
        self._gradient: Tensor | None = None
        self._overwrite = False

    def overwrite(self) -> None:
        """Lets the gradient take the place of the logits."""
        self._overwrite = True

    def want(self, needed: tuple[bool, bool, bool]) -> None:  # noqa: D102
        if needed[0]:
            # Not in the format of rows that overlap: the kernels write rows of contiguous classes.
            fresh = self.input.new_empty(self.input.shape)
            self._gradient = self.input if self._overwrite else fresh

    def logits(self, first: int, last: int) -> Tensor:  # noqa: D102
        rows = self.input[first:last]
        return rows if self.kernel else rows.to(wide(rows.dtype), copy=True)

    def room(self, first: int, last: int) -> Tensor:  # noqa: D102
        assert self._gradient is not None
        return self._gradient[first:last]

    def factor_of(self, first: int, last: int) -> Tensor | None:  # noqa: D102
        if not self._softcap:
            return None
        rows = self.input[first:last]
        return torch.empty_like(rows, dtype=wide(rows.dtype))

    def take(self, gradient: Tensor, first: int, last: int) -> None:  # noqa: D102
        if not self.kernel:
            self.room(first, last).copy_(gradient)

    def gradients(self) -> tuple[Tensor | None, ...]:  # noqa: D102
        return (self._gradient, None, None)


class Linear(Source):
    """The logits of a linear transformation, a chunk at a time, and the gradients of its tensors.

    Args:
        input: (N, H).
        linear_weight: (C, d1, ..., dK, H).
        linear_bias: (C, d1, ..., dK).
        softcap: whether the gradient needs a factor for each logit.
    """

    def __init__(
        self,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        softcap: bool,
    ) -> None:
        self.shape = linear_weight.shape[:-1]
        self.kernel = kernel_of(input, self.shape, len(input))
        self._native_products = self.kernel == _backend.OPERATOR and input.is_cpu
        linear_weight = linear_weight.flatten(0, -2)
        linear_bias = None if linear_bias is None else linear_bias.reshape(-1)
        self.tensors = (input, linear_weight, linear_bias)
        self.rows, columns = len(input), len(linear_weight)
        self.chunk = rows_per_chunk(self.rows, columns, input)
        self._logits = input.new_empty((self.chunk, columns))
        self._sums_dtype = wide(input.dtype)
        self._z = self._logits
        if not self.kernel and self._sums_dtype is not input.dtype:
            self._z = torch.empty_like(self._logits, dtype=self._sums_dtype)
        self._factor = torch.empty_like(self._z) if softcap and not self.kernel else None
        self._gradients: list[Tensor | None] = [None, None, None]
        self._sums: list[Tensor | None] = [None, None]

    def want(self, needed: tuple[bool, bool, bool]) -> None:
        """Makes room for gradients: those of narrow tensors are summed in float32."""
        sums = self._sums_dtype
        # Over no rows nothing is written.
        make = torch.empty_like if self.rows > 0 else torch.zeros_like
        for i, (tensor, need) in enumerate(zip(self.tensors, needed, strict=True)):
            if need and tensor is not None:
                self._gradients[i] = make(tensor, memory_format=torch.contiguous_format)
        _, weight, bias = self._gradients
        if weight is not None and weight.dtype is not sums and self.chunk < self.rows:
            self._sums[0] = torch.zeros_like(weight, dtype=sums)
        if bias is not None:
            self._sums[1] = torch.zeros_like(bias, dtype=sums)

    def logits(self, first: int, last: int) -> Tensor:  # noqa: D102
        input, linear_weight, linear_bias = self.tensors
        out = self._logits[: last - first]
        self._multiply(input[first:last], linear_weight.t(), out, bias=linear_bias)
        z = self._z[: last - first]
        if z.dtype is not out.dtype:
            z.copy_(out)
        return z.view(-1, *self.shape)

    def room(self, first: int, last: int) -> Tensor:  # noqa: D102
        return self._logits[: last - first]

    def factor_of(self, first: int, last: int) -> Tensor | None:  # noqa: D102
        return None if self._factor is None else self._factor[: last - first].view(-1, *self.shape)

    def take(self, gradient: Tensor, first: int, last: int) -> None:  # noqa: D102
        input, linear_weight, _ = self.tensors
        of_input, of_weight, of_bias = self._gradients
        gradient = gradient.view(last - first, -1)
        if of_bias is not None:
            assert self._sums[1] is not None
            self._sums[1] += gradient.sum(0, dtype=self._sums_dtype)
        narrow = self._logits[: last - first]
        if narrow.dtype is not gradient.dtype:
            narrow.copy_(gradient)
        if of_input is not None:
            self._multiply(narrow, linear_weight, of_input[first:last])
        if of_weight is None:
            return
        accumulate = self._sums[0] is None and first > 0
        self._multiply(narrow.t(), input[first:last], of_weight, accumulate=accumulate)
        if self._sums[0] is not None:
            self._sums[0] += of_weight

    def _multiply(
        self,
        left: Tensor,
        right: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:
        if self._native_products:
            torch.ops.torchext.product_out(left, right, bias, accumulate, out)
        elif bias is not None:
            torch.addmm(bias, left, right, out=out)
        elif accumulate:
            out.addmm_(left, right)
        else:
            torch.mm(left, right, out=out)

    def gradients(self) -> tuple[Tensor | None, ...]:  # noqa: D102
        for gradient, total in zip(self._gradients[1:], self._sums, strict=True):
            if gradient is not None and total is not None:
                gradient.copy_(total)
        of_input, of_weight, of_bias = self._gradients
        return (
            of_input,
            None if of_weight is None else of_weight.view(*self.shape, of_weight.shape[-1]),
            None if of_bias is None else of_bias.view(self.shape),
        )

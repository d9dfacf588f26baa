r"""The losses' extras by chunks of rows, with their gradient: no logits beside a chunk's.

    z = softcap tanh(logit_scale x / softcap)          of a chunk's logits x
    loss_n = m_n lse_n - sum_c q_nc z_nc + z_loss lse_n^2
    grad_z_nc = softmax(z_n)_c (g_n (m_n + 2 z_loss lse_n) + h_n) - g_n q_nc

with q the weighted targets (see torchext/ops/cross_entropy.py), m_n = sum_c q_nc, g_n and h_n the
gradients of loss_n and lse_n. Sums, z and its gradient are of float32 or wider. A chunk's loss is
the cross_entropy kernel's where there is one; the gradient takes the place of z.

Workspace: 64 MiB on the CPU, 512 MiB elsewhere, or 256 rows of logits where those are more; again
as much for softcap, and half for narrow logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchext import _backend
from torchext.ops.extras import Extras
from torchext.ops.linear_cross_entropy_call import INDICES
from torchext.ops.linear_cross_entropy_fake import wide

_BYTES = {"cpu": 64 << 20}
_BYTES_ELSEWHERE = 512 << 20
_MIN_ROWS = 256


class Options(NamedTuple):
    """What a call says beside its tensors."""

    extras: Extras
    reduction: str
    ignore_index: int
    label_smoothing: float
    dtype: torch.dtype
    """The loss's."""

    @property
    def at_once(self) -> bool:
        """Whether forward knows the gradients but for that of the loss, a factor."""
        return self.reduction != "none" and not self.extras.return_lse


def rows_per_chunk(rows: int, columns: int, like: Tensor) -> int:
    """Returns how many rows of logits are made at once."""
    budget = _BYTES.get(like.device.type, _BYTES_ELSEWHERE)
    fit = budget // (columns * wide(like.dtype).itemsize)
    return max(1, min(rows, max(_MIN_ROWS, fit // _MIN_ROWS * _MIN_ROWS)))


class Linear:
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
        linear_weight = linear_weight.reshape(-1, linear_weight.shape[-1])
        linear_bias = None if linear_bias is None else linear_bias.reshape(-1)
        self.tensors = (input, linear_weight, linear_bias)
        self.rows, columns = len(input), len(linear_weight)
        self.chunk = rows_per_chunk(self.rows, columns, input)
        self._logits = input.new_empty((self.chunk, columns))
        sums = wide(input.dtype)
        self._z = self._logits if sums is input.dtype else self._logits.to(sums)
        self._factor = torch.empty_like(self._z) if softcap else None
        self._gradients: list[Tensor | None] = [None, None, None]
        self._sums: list[Tensor | None] = [None, None]

    def want(self, needed: tuple[bool, bool, bool]) -> None:
        """Makes room for gradients: those of narrow tensors are summed in float32."""
        # Over no rows nothing is written.
        make = torch.empty_like if self.rows > 0 else torch.zeros_like
        for i, (tensor, need) in enumerate(zip(self.tensors, needed, strict=True)):
            if need and tensor is not None:
                self._gradients[i] = make(tensor, memory_format=torch.contiguous_format)
        _, weight, bias = self._gradients
        if weight is not None and weight.dtype is not self._z.dtype and self.chunk < self.rows:
            self._sums[0] = torch.zeros_like(weight, dtype=self._z.dtype)
        if bias is not None:
            self._sums[1] = torch.zeros_like(bias, dtype=self._z.dtype)

    def logits(self, first: int, last: int) -> Tensor:
        """Returns rows [first, last), (rows, C, d1, ..., dK), to be overwritten."""
        input, linear_weight, linear_bias = self.tensors
        out = self._logits[: last - first]
        if linear_bias is None:
            torch.mm(input[first:last], linear_weight.t(), out=out)
        else:
            torch.addmm(linear_bias, input[first:last], linear_weight.t(), out=out)
        z = self._z[: last - first]
        if z.dtype is not out.dtype:
            z.copy_(out)
        return z.view(-1, *self.shape)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yields the first row of each chunk, and the one after its last."""
        for first in range(0, self.rows, self.chunk):
            yield first, min(self.rows, first + self.chunk)

    def factor_of(self, first: int, last: int) -> Tensor | None:
        """Returns the room for softcap's derivative at rows [first, last)."""
        return None if self._factor is None else self._factor[: last - first].view(-1, *self.shape)

    def take(self, gradient: Tensor, first: int, last: int) -> None:
        """Multiplies the gradient of rows [first, last) into those of the tensors."""
        input, linear_weight, _ = self.tensors
        of_input, of_weight, of_bias = self._gradients
        gradient = gradient.view(last - first, -1)
        if of_bias is not None:
            assert self._sums[1] is not None
            self._sums[1] += gradient.sum(0)
        narrow = self._logits[: last - first]
        if narrow.dtype is not gradient.dtype:
            narrow.copy_(gradient)
        if of_input is not None:
            torch.mm(narrow, linear_weight, out=of_input[first:last])
        if of_weight is None:
            return
        if self._sums[0] is not None:
            self._sums[0] += torch.mm(narrow.t(), input[first:last], out=of_weight)
        elif first == 0:
            torch.mm(narrow.t(), input[first:last], out=of_weight)
        else:
            of_weight.addmm_(narrow.t(), input[first:last])

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Returns those that are wanted, when all rows have been taken."""
        for gradient, total in zip(self._gradients[1:], self._sums, strict=True):
            if gradient is not None and total is not None:
                gradient.copy_(total)
        of_input, of_weight, of_bias = self._gradients
        return (
            of_input,
            None if of_weight is None else of_weight.view(*self.shape, of_weight.shape[-1]),
            None if of_bias is None else of_bias.view(self.shape),
        )


class Targets:
    """The targets and the class weights, for all rows.

    Args:
        target: class indices (N, d1, ..., dK), or probabilities (N, C, d1, ..., dK).
        weight: (C).
        classes: C.
        dtype: that of the sums.
        options: the call's.
    """

    def __init__(
        self,
        target: Tensor,
        weight: Tensor | None,
        classes: int,
        dtype: torch.dtype,
        options: Options,
    ) -> None:
        self.options, self.classes, self.dtype = options, classes, dtype
        self.weight = None if weight is None else weight.to(dtype)
        self.kept: Tensor | None = None
        self.indices = target.dtype in INDICES
        if self.indices:
            target = target.long()  # narrow ones would be compared in their own width, and wrap
            self.kept = target != options.ignore_index
            self._check(target, self.kept)
            # An ignored row has an lse, too: its class is any.
            target = torch.where(self.kept, target, 0)
        self.target = target
        self.positions = target.shape if self.indices else target.shape[:1] + target.shape[2:]

    def _check(self, target: Tensor, kept: Tensor) -> None:
        if not target.is_cpu:  # the device checks for itself: a look would wait for it
            return
        wrong = target[kept & ((target < 0) | (target >= self.classes))]
        if wrong.numel() > 0:
            raise IndexError(
                f"linear_cross_entropy: expected target in [0, {self.classes}) or ignore_index "
                f"({self.options.ignore_index}), but got: Target {wrong[0]} is out of bounds"
            )

    def mass(self) -> Tensor:
        """Returns what a mean divides by, in float64."""
        if self.kept is None:
            # Made where it is used: a CUDA graph cannot capture a copy from the host.
            count, device = self.positions.numel(), self.target.device
            return torch.full((), count, dtype=torch.float64, device=device)
        if self.weight is None:
            mass = self.kept.sum(dtype=torch.float64)
        else:
            chosen = self.weight[self.target]
            mass = torch.where(self.kept, chosen, 0).sum(dtype=torch.float64)
        if self.options.extras.ignored_mean == "zero":
            mass = torch.where(mass == 0, 1.0, mass)
        return mass

    def keep(self, values: Tensor, first: int, last: int) -> Tensor:
        """Returns values of rows [first, last), 0 where the target is ignored."""
        return values if self.kept is None else torch.where(self.kept[first:last], values, 0)

    def losses(self, z: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Returns the cross-entropy of each position, and the maxima and sums, (2, n, d1, ...)."""
        target = self.target[first:last]
        if not self.indices:
            target = target.to(self.dtype)
        smoothing = self.options.label_smoothing
        if _backend.route(z, target, op="cross_entropy", work=z.numel()) == _backend.OPERATOR:
            arguments = (z, target, self.weight, 0, -100, smoothing, False)
            rows, stats, _ = torch.ops.torchext.cross_entropy_forward(*arguments)
            stats = with_nan(stats.view(2, *rows.shape), z, 1)
        else:
            rows = F.cross_entropy(
                z, target, self.weight, reduction="none", label_smoothing=smoothing
            )
            largest = z.amax(1)
            stats = torch.stack([largest, (z - largest.unsqueeze(1)).exp_().sum(1)])
        rows = self.keep(rows, first, last)
        if z_loss := self.options.extras.z_loss:
            rows = rows + self.keep(z_loss * log_sum(stats).square(), first, last)
        return rows, stats

    def gradient(
        self,
        z: Tensor,
        stats: Tensor,
        of_loss: Tensor | None,
        of_lse: Tensor | None,
        first: int,
        last: int,
    ) -> Tensor:
        """Returns the gradient of z, in its place.

        Args:
            z: the logits of rows [first, last).
            stats: their maxima and sums.
            of_loss: the gradient of each position's loss, 0 where the target is ignored.
            of_lse: that of each position's lse.
            first: of the rows.
            last: of the rows.
        """
        smoothing = self.options.label_smoothing
        largest, total = stats
        target = self.target[first:last]
        kept = 1 - smoothing
        scale = torch.zeros_like(largest) if of_lse is None else of_lse
        if of_loss is not None:
            if self.indices:
                chosen = kept * (torch.ones_like(largest) if self.weight is None
                                 else self.weight[target])  # fmt: skip
                spread = self.classes if self.weight is None else self.weight.sum()
                target_mass = chosen + spread * (smoothing / self.classes)
            else:
                probabilities = target.to(self.dtype) * kept + smoothing / self.classes
                if self.weight is not None:
                    probabilities *= self._by_class(self.weight, z)
                target_mass = probabilities.sum(1)
            scale = scale + of_loss * target_mass
            if z_loss := self.options.extras.z_loss:
                scale = scale + of_loss * log_sum(stats) * (2 * z_loss)
        z.sub_(largest.unsqueeze(1)).exp_().mul_((scale / total).unsqueeze(1))
        if of_loss is None:
            return z
        if not self.indices:
            return z.addcmul_(of_loss.unsqueeze(1), probabilities, value=-1)
        z.scatter_add_(1, target.unsqueeze(1), (-of_loss * chosen).unsqueeze(1))
        if smoothing > 0:
            uniform = torch.full((), smoothing / self.classes, dtype=z.dtype, device=z.device)
            if self.weight is not None:
                uniform = self._by_class(self.weight * uniform, z)
            z.addcmul_(of_loss.unsqueeze(1), uniform, value=-1)
        return z

    @staticmethod
    def _by_class(values: Tensor, z: Tensor) -> Tensor:
        return values.view(-1, *[1] * (z.dim() - 2))


def with_nan(stats: Tensor, logits: Tensor, class_dim: int) -> Tensor:
    """Gives maxima and sums the NaN of logits: the kernel's maximum passes it over."""
    largest, total = stats
    infinite = largest.isinf()
    if logits.is_cpu and not infinite.any():
        return stats  # a NaN is in the sum
    largest = torch.where(infinite, logits.amax(class_dim).to(largest.dtype), largest)
    return torch.stack([largest, total])


def log_sum(stats: Tensor) -> Tensor:
    """Returns the log-sum-exp from maxima and sums, which are NaN where a maximum is infinite."""
    largest, total = stats
    return torch.where(largest.isinf(), largest, largest + total.log())


def transformed(z: Tensor, extras: Extras, factor: Tensor | None = None) -> Tensor:
    """Scales and caps logits in place; `factor` gets the capped ones' derivative, unscaled."""
    if extras.softcap is None:
        return z if extras.logit_scale == 1 else z.mul_(extras.logit_scale)
    z.mul_(extras.logit_scale / extras.softcap).tanh_()
    if factor is not None:
        torch.addcmul(torch.ones((), dtype=z.dtype, device=z.device), z, z, value=-1, out=factor)
    return z.mul_(extras.softcap)

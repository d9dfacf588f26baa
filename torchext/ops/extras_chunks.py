r"""The losses' extras by chunks of rows, with their gradient: no logits beside a chunk's.

    z = softcap tanh(logit_scale x / softcap)          of a chunk's logits x
    loss_n = m_n lse_n - sum_c q_nc z_nc + z_loss lse_n^2
    grad_z_nc = softmax(z_n)_c (g_n (m_n + 2 z_loss lse_n) + h_n) - g_n q_nc

with q the weighted targets (see torchext/ops/cross_entropy.py), m_n = sum_c q_nc, g_n and h_n the
gradients of loss_n and lse_n. Sums, z and its gradient are of float32 or wider. Rows of contiguous
classes have one kernel for all of it; elsewhere a chunk's loss is the cross_entropy kernel's where
there is one, the rest torch's ops, and the gradient takes the place of z.

Siblings: torchext/ops/extras_source.py (the chunks), csrc/cpu/cross_entropy_extras_kernel.h and
csrc/cuda, triton_kernels/cross_entropy_extras.py (the kernels).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchext import _backend, _triton
from torchext.ops.extras import Extras
from torchext.ops.extras_source import Logits, Source
from torchext.ops.linear_cross_entropy_call import INDICES


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


class Targets:
    """The targets and the class weights, for all rows.

    Args:
        target: class indices (N, d1, ..., dK), or probabilities (N, C, d1, ..., dK).
        weight: (C).
        source: of the logits.
        dtype: that of the sums.
        options: the call's.

    Raises:
        IndexError: where a class index is neither in [0, C) nor `ignore_index`.
    """

    def __init__(
        self,
        target: Tensor,
        weight: Tensor | None,
        source: Source,
        dtype: torch.dtype,
        options: Options,
    ) -> None:
        self.options, self.classes, self.dtype = options, source.shape[0], dtype
        self.weight = None if weight is None else weight.to(dtype)
        self.kept: Tensor | None = None
        self.indices = target.dtype in INDICES
        self._op = "cross_entropy" if isinstance(source, Logits) else "linear_cross_entropy"
        self._mass: Tensor | None = None
        if self.indices and target.is_cpu and source.kernel == _backend.OPERATOR:
            try:
                self._mass = torch.ops.torchext.cross_entropy_mass(
                    target, self.weight, self.classes, options.ignore_index
                )
            except IndexError:  # which names another op
                self._check(target.long(), target.long() != options.ignore_index)
                raise
        elif self.indices:
            index = target.long()  # narrow ones would be compared in their own width, and wrap
            self.kept = index != options.ignore_index
            self._check(index, self.kept)
            if not source.kernel:
                # An ignored row has an lse, too: its class is any.
                target = torch.where(self.kept, index, 0)
        self.target = target
        self.positions = target.shape if self.indices else target.shape[:1] + target.shape[2:]

    def _check(self, target: Tensor, kept: Tensor) -> None:
        if not target.is_cpu:  # the device checks for itself: a look would wait for it
            return
        wrong = target[kept & ((target < 0) | (target >= self.classes))]
        if wrong.numel() > 0:
            raise IndexError(
                f"{self._op}: expected target in [0, {self.classes}) or ignore_index "
                f"({self.options.ignore_index}), but got: Target {wrong[0]} is out of bounds"
            )

    def mass(self) -> Tensor:
        """Returns what a mean divides by, in float64."""
        if not self.indices:
            # Made where it is used: a CUDA graph cannot capture a copy from the host.
            count, device = self.positions.numel(), self.target.device
            return torch.full((), count, dtype=torch.float64, device=device)
        mass = self._mass
        if mass is None:
            assert self.kept is not None
            chosen = self.kept
            if self.weight is not None:
                # A class that does not exist makes the loss NaN, and is not read with.
                index = torch.where(self.kept, self.target, 0).long().clamp(0, self.classes - 1)
                chosen = torch.where(self.kept, self.weight[index], 0)
            mass = chosen.sum(dtype=torch.float64)
        # As in `extras.mean_or`.
        nothing = math.inf if self.options.extras.ignored_mean == "zero" else math.nan
        return torch.where(mass == 0, nothing, mass)

    def by_kernel(
        self,
        source: Source,
        stats: Tensor,
        losses: Tensor | None,
        argmax: Tensor | None,
        of_loss: Tensor | None,
        of_lse: Tensor | None,
        first: int,
        last: int,
    ) -> None:
        """Does what `step` does in one call."""
        extras, options = self.options.extras, self.options
        gradient = None
        logits = source.logits(first, last)
        if of_loss is not None or of_lse is not None:
            gradient = source.room(first, last)
        _rows_of(source.kernel)(
            logits, self.target[first:last], self.weight, options.ignore_index,
            options.label_smoothing, extras.z_loss, extras.softcap or 0.0, extras.logit_scale,
            of_loss, of_lse, gradient, losses, stats, argmax,
        )  # fmt: skip
        if gradient is not None:
            source.take(gradient, first, last)

    def losses(self, z: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Returns the loss of each position, and the maxima and sums, (2, n, d1, ...)."""
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
        rows = self._keep(rows, first, last)
        if z_loss := self.options.extras.z_loss:
            rows = rows + self._keep(z_loss * log_sum(stats).square(), first, last)
        return rows, stats

    def _keep(self, values: Tensor, first: int, last: int) -> Tensor:
        return values if self.kept is None else torch.where(self.kept[first:last], values, 0)

    def gradient(
        self,
        z: Tensor,
        stats: Tensor,
        of_loss: Tensor | None,
        of_lse: Tensor | None,
        first: int,
        last: int,
    ) -> Tensor:
        """Returns the gradient of the logits but for softcap's factor, in the place of z.

        Args:
            z: the logits of rows [first, last), transformed.
            stats: their maxima and sums.
            of_loss: the gradient of each position's loss.
            of_lse: that of each position's lse.
            first: of the rows.
            last: of the rows.
        """
        smoothing, inner = self.options.label_smoothing, self.options.extras.logit_scale
        largest, total = stats
        target = self.target[first:last]
        kept = 1 - smoothing
        scale = torch.zeros_like(largest) if of_lse is None else of_lse * inner
        if of_loss is not None:
            of_loss = self._keep(of_loss * inner, first, last)
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


def _rows_of(kernel: int) -> Callable[..., None]:
    found: Callable[..., None]
    if kernel == _backend.TRITON:
        found = _triton.kernels("cross_entropy_extras").cross_entropy_extras_rows
    else:
        found = torch.ops.torchext.cross_entropy_extras_rows
    return found


def step(
    source: Source,
    targets: Targets,
    stats: Tensor,
    losses: Tensor | None,
    argmax: Tensor | None,
    of_loss: Tensor | None,
    of_lse: Tensor | None,
    first: int,
    last: int,
) -> None:
    """Computes what rows [first, last) give; all tensors but those of `source` are of all rows.

    Args:
        source: of the logits; takes their gradient.
        targets: the targets.
        stats: the maxima and sums, written with `losses`, else read.
        losses: of each position, to be written; None where backward makes the gradient again.
        argmax: of each position, to be written.
        of_loss: the gradient of each position's loss.
        of_lse: that of each position's lse.
        first: of the rows.
        last: of the rows.
    """
    optional = (losses, argmax, of_loss, of_lse)
    losses, argmax, of_loss, of_lse = (None if t is None else t[first:last] for t in optional)
    stats = stats[:, first:last]
    if source.kernel:
        targets.by_kernel(source, stats, losses, argmax, of_loss, of_lse, first, last)
        return
    factor = source.factor_of(first, last)
    z = transformed(source.logits(first, last), targets.options.extras, factor)
    if losses is not None:
        losses[:], stats[:] = targets.losses(z, first, last)
    if argmax is not None:
        argmax[:] = z.argmax(1)
    if of_loss is None and of_lse is None:
        return
    gradient = targets.gradient(z, stats, of_loss, of_lse, first, last)
    source.take(gradient if factor is None else gradient.mul_(factor), first, last)


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

"""Calls of the operator `cross_entropy_extras_rows` on CUDA and their truth: test_cuda_extras.py
runs them on a GPU, and test_cuda_emulated_extras.py on a CPU.

`run(name, *args)` calls an operator's CUDA kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchext import reference
from torchext.ops import extras as definition
from torchext.ops.extras import Extras

# Of the norm, beyond what the definition in torch's ops errs: a rounding of the result; of float64,
# of which the truth is made as well, that of sums of some thousand terms.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
EXTRAS: list[tuple[float, float, float]] = [  # z_loss, softcap, logit_scale
    (0.0, 0.0, 1.0),
    (0.1, 0.0, -1.5),
    (0.0, 3.0, 1.0),
    (1e-3, 30.0, 0.5),
]


class Rows:
    """The arguments of a call, and what the definition makes of them."""

    def __init__(
        self,
        logits: Tensor,
        extras: tuple[float, float, float],
        *,
        probabilities: bool = False,
        weighted: bool = False,
        smoothing: float = 0.0,
        narrow: bool = True,
    ) -> None:
        rows, classes = logits.shape
        options = {"device": logits.device}
        self.logits, self.extras, self.smoothing = logits, extras, smoothing
        self.acc = torch.float64 if logits.dtype is torch.float64 else torch.float32
        given = logits.dtype if narrow else self.acc
        self.target = torch.randint(classes, (rows,), dtype=torch.int32, **options)
        self.target[1::4] = -100
        if probabilities:
            self.target = torch.randn(rows, classes, **options).softmax(1).to(given)
        self.weight = (torch.rand(classes, **options) + 0.5).to(given) if weighted else None
        self.of_loss, self.of_lse = torch.randn(2, rows, dtype=self.acc, **options)

    def defined(self, dtype: torch.dtype) -> list[Tensor]:
        """Losses, lse and gradient by torch's ops, in a dtype."""
        leaf = self.logits.to(dtype, copy=True).requires_grad_()
        indexed = not self.target.is_floating_point()
        z_loss, softcap, logit_scale = self.extras
        loss, lse = definition.defined(
            reference.cross_entropy,
            Extras(z_loss, softcap or None, logit_scale, True),
            leaf,
            self.target.long() if indexed else self.target.to(dtype),
            None if self.weight is None else self.weight.to(dtype),
            -100,
            "none",
            self.smoothing,
        )
        upstream = [self.of_loss.to(loss.dtype), self.of_lse.to(lse.dtype)]
        (gradient,) = torch.autograd.grad((loss, lse), leaf, upstream)
        return [loss.detach(), lse.detach(), gradient]

    def call(
        self, run: Callable[..., Any], gradient: Tensor | None, stats: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, stats and argmax; given stats, from which a gradient is made, these alone."""
        rows = len(self.logits)
        losses = self.logits.new_full((rows,), float("nan"), dtype=self.acc)
        argmax = torch.full_like(losses, -1, dtype=torch.int64)
        forward = stats is None
        if stats is None:
            stats = self.logits.new_empty((2, rows), dtype=self.acc)
        upstream = (None, None) if gradient is None else (self.of_loss, self.of_lse)
        run(
            "cross_entropy_extras_rows", self.logits, self.target, self.weight, -100,
            self.smoothing, *self.extras, *upstream, gradient, losses if forward else None,
            stats, argmax if forward else None,
        )  # fmt: skip
        return losses, stats, argmax

    def check(self, run: Callable[..., Any]) -> None:
        """All at once, forward alone, backward from its stats, and in the logits' place."""
        truth, stock = self.defined(torch.float64), self.defined(self.logits.dtype)

        def close(found: list[Tensor], what: str) -> None:
            for i, (actual, expected, eager) in enumerate(zip(found, truth, stock, strict=True)):
                error = (actual.double() - expected).norm()
                floor = FLOOR[actual.dtype] * expected.norm() + 1e-6 * FLOOR[actual.dtype]
                allowed = floor + (eager.double() - expected).norm()
                assert error <= allowed, f"{what}: value {i}: {error:.3g} > {allowed:.3g}"

        gradient = torch.full_like(self.logits, float("nan"))
        losses, stats, argmax = self.call(run, gradient)
        lse = stats[0] + stats[1].log()
        close([losses, lse, gradient], "at once")
        z = self.logits.to(self.acc) * self.extras[2]
        # Capped logits are equal where others are not: then any of those.
        largest = z.gather(1, argmax[:, None]).squeeze(1)
        torch.testing.assert_close(largest, z.amax(1), rtol=1e-4, atol=1e-4)
        alone, same, _ = self.call(run, None)
        assert torch.equal(alone, losses)
        assert torch.equal(same, stats)
        again = torch.full_like(self.logits, float("nan"))
        self.call(run, again, stats)
        close([losses, lse, again], "from stats")
        before, self.logits = self.logits, self.logits.clone(memory_format=torch.preserve_format)
        losses, _, _ = self.call(run, self.logits)
        close([losses, lse, self.logits], "in place")
        self.logits = before


def check_not_finite(run: Callable[..., Any], classes: int, device: str = "cpu") -> None:
    """Rows of infinities and NaN give what torch's log_softmax and logsumexp make of them."""
    inf, nan = float("inf"), float("nan")
    logits = torch.randn(7, classes, device=device)
    logits[0, 3], logits[1, classes - 1], logits[2], logits[3, : classes // 2] = (
        nan,
        inf,
        -inf,
        -inf,
    )
    logits[4, 1], logits[4, 2], logits[5] = inf, nan, nan
    for softcap in (0.0, 4.0):
        case = Rows(logits, (0.1, softcap, 1.0))
        case.target.zero_()
        exact = case.defined(torch.float64)
        gradient = torch.empty_like(logits)
        losses, stats, argmax = case.call(run, gradient)
        lse = torch.where(stats[0].isinf(), stats[0], stats[0] + stats[1].log())
        for actual, expected in ((losses, exact[0]), (lse, exact[1])):
            torch.testing.assert_close(
                actual.double(), expected.double(), rtol=1e-5, atol=1e-5, equal_nan=True
            )
        lost = exact[2].isnan()
        assert gradient[lost].isnan().all()
        whole = ~lost.any(1)
        assert whole.sum() >= 2
        torch.testing.assert_close(gradient[whole].double(), exact[2][whole], rtol=1e-4, atol=1e-5)
        z = logits if not softcap else softcap * torch.tanh(logits / softcap)
        assert torch.equal(argmax, z.argmax(1))


def check_borders(run: Callable[..., Any], device: str = "cpu") -> None:
    """In place in a window of a larger tensor of NaN: nothing outside is read or written."""
    for dtype, width, window in (
        (torch.float32, 80, slice(3, 70)), (torch.float32, 80, slice(4, 72)),
        (torch.bfloat16, 2080, slice(8, 2051)), (torch.float16, 40, slice(1, 12)),
    ):  # fmt: skip
        large = torch.full((7, width), float("nan"), device=device, dtype=dtype)
        view = large[1:-1, window]
        view.copy_(torch.randn(view.shape))
        case = Rows(view, (0.1, 5.0, 1.0), weighted=True)
        losses, _, _ = case.call(run, view)
        assert losses.isfinite().all()
        assert view.isfinite().all()
        view.fill_(float("nan"))
        assert large.isnan().all()

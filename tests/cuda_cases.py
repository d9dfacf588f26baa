"""Calls of the native CUDA operators and their truth: test_cuda.py runs them on a GPU, and
test_cuda_emulated.py on a CPU.

`run(name, *args)` calls an operator's CUDA kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INF, NAN = float("inf"), float("nan")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def close(actual: Tensor, truth: Tensor, what: str) -> None:
    """Checks that every element is as near the truth as its dtype's rounding of the largest."""
    assert actual.shape == truth.shape, what
    truth = truth.detach()
    finite = truth[truth.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    floor = 1e-14 if actual.dtype == torch.float64 else 1e-6  # where terms cancel
    atol = TOLERANCE[actual.dtype] * largest + floor
    torch.testing.assert_close(
        actual.double(), truth, rtol=0, atol=atol, equal_nan=True, msg=lambda t: f"{what}: {t}"
    )


def check(
    run: Callable[..., Any],
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    smoothing: float = 0.0,
    ignore_index: int = -100,
) -> None:
    """Forward and backward, the one-read variant, and the one in place, against float64."""
    code = ("none", "mean", "sum").index(reduction)
    wide = x.detach().double().requires_grad_()
    probabilities = target.is_floating_point()
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    if not probabilities:
        options["ignore_index"] = ignore_index
    wide_target = target.double() if probabilities else target.long()
    truth = F.cross_entropy(
        wide, wide_target, None if weight is None else weight.double(), **options
    )
    upstream = torch.randn_like(truth).to(x.dtype)
    (gradient,) = torch.autograd.grad(truth, wide, upstream.double(), retain_graph=True)
    call = (x, target, weight)
    rest = (code, ignore_index, smoothing)
    loss, stats, _ = run("cross_entropy_forward", *call, *rest, False)
    close(loss, truth, "loss")
    found = run("cross_entropy_backward", upstream, *call, stats, *rest)
    close(found, gradient, "backward")
    again = run("cross_entropy_backward", upstream, *call, stats, *rest)
    assert torch.equal(found.nan_to_num(), again.nan_to_num())
    if reduction == "none":
        return
    (gradient,) = torch.autograd.grad(truth, wide)
    loss, _, one_read = run("cross_entropy_forward", *call, *rest, True)
    close(loss, truth, "loss of the one-read variant")
    close(one_read, gradient, "one-read gradient")
    if x.is_contiguous():
        place = x.detach().clone()
        loss = run("cross_entropy_forward_", place, target, weight, *rest)
        close(loss, truth, "loss in place")
        close(place, gradient, "gradient in place")


# Of the norm, beyond eager's own error in the dtype: one rounding of the result.
ROUNDING = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}


HEAD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "reduction": "sum", "weighted": True},
    {"bias": True, "smoothing": 0.2, "weighted": True},
    {"smoothing": 0.1, "reduction": "none", "bias": True},
    {"reduction": "none", "weighted": True, "ignore_index": 3},
    {"probabilities": True, "bias": True},
    {"probabilities": True, "smoothing": 0.2, "weighted": True, "reduction": "sum"},
    {"probabilities": True, "weighted": True, "reduction": "none"},
]


class Head:
    """The arguments of a linear_cross_entropy call, its truth, and what eager makes of it."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        probabilities: bool = False,
        bias: bool = False,
        weighted: bool = False,
        smoothing: float = 0.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: str = "cpu",
    ) -> None:
        rows, features, classes = shape
        input = torch.randn(rows, features, device=device)
        weight = torch.randn(classes, features, device=device) * 2 / features**0.5
        self.leaves = [input.to(dtype), weight.to(dtype)]
        self.bias = torch.randn(classes, device=device).to(dtype) if bias else None
        self.weight = (torch.rand(classes, device=device) + 0.1).to(dtype) if weighted else None
        if probabilities:
            self.target = torch.randn(rows, classes, device=device).softmax(-1).to(dtype)
        else:
            self.target = torch.randint(classes, (rows,), device=device)
            self.target[: rows // 3 : 2] = ignore_index
        self.reduction, self.smoothing, self.ignored = reduction, smoothing, ignore_index
        self.dtype = dtype
        size = (rows,) if reduction == "none" else ()
        # The loss is as wide as the sums; eager, whose loss is not, gets the same gradient of it.
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.upstream = torch.randn(size, device=device).to(dtype).to(self.wide)

    def stock(self, dtype: torch.dtype, upstream: Tensor | None) -> list[Tensor]:
        """The loss and its gradients, as eager makes them in a dtype."""
        tensors = [*self.leaves] + ([] if self.bias is None else [self.bias])
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        probabilities = self.target.is_floating_point()
        loss = F.cross_entropy(
            F.linear(*leaves),
            self.target.to(dtype) if probabilities else self.target.long(),
            None if self.weight is None else self.weight.to(dtype),
            ignore_index=-100 if probabilities else self.ignored,
            reduction=self.reduction,
            label_smoothing=self.smoothing,
        )
        upstream = torch.ones_like(loss) if upstream is None else upstream.to(dtype)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

    def arguments(self) -> tuple[Any, ...]:
        return (*self.leaves, self.target, self.bias, self.weight)

    def options(self) -> tuple[Any, ...]:
        code = ("none", "mean", "sum").index(self.reduction)
        return (code, self.ignored, self.smoothing)

    def compare(self, found: list[Tensor], upstream: Tensor | None, what: str) -> None:
        truth, eager = self.stock(torch.float64, upstream), self.stock(self.dtype, upstream)
        assert len(found) == len(truth)
        names = ("loss", "input", "linear_weight", "linear_bias")
        for name, actual, expected, stock in zip(names, found, truth, eager, strict=False):
            assert actual.shape == expected.shape
            assert actual.dtype == (self.wide if name == "loss" else self.dtype)
            allowed = (stock.double() - expected).norm()
            allowed += ROUNDING[self.dtype] * (expected.norm() + 1e-6)
            error = (actual.double() - expected).norm()
            assert error <= allowed, f"{what} {name}: {float(error):.3g} > {float(allowed):.3g}"

    def check(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """Both operators, by a float64 truth and eager's error; and that they give the same twice.

        `forward` and `backward` call the operators with these arguments.
        """
        wanted = (True, True, self.bias is not None)
        kept = 3 if self.bias is None else 4
        if self.reduction != "none":
            loss, _, *gradients = forward(*self.arguments(), *self.options(), *wanted)
            self.compare([loss, *gradients][:kept], None, "with the loss:")
            again = forward(*self.arguments(), *self.options(), *wanted)
            for one, other in zip(gradients, again[2:], strict=True):
                assert torch.equal(one, other)
        loss, stats, *none = forward(*self.arguments(), *self.options(), False, False, False)
        assert [gradient.numel() for gradient in none] == [0, 0, 0]
        arguments = (self.upstream, *self.arguments(), stats, *self.options())
        gradients = backward(*arguments, *wanted)
        self.compare([loss, *gradients][:kept], self.upstream, "from stats:")
        for one, other in zip(gradients, backward(*arguments, *wanted), strict=True):
            assert torch.equal(one, other)


def shifted(rows: int, classes: int) -> Tensor:
    """Rows that begin at no multiple of 16 bytes."""
    return torch.randn(rows, classes + 1)[:, 1:]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "no batch": lambda: torch.randn(7),
    "one class": lambda: torch.randn(4, 1),
    "few classes": lambda: torch.randn(37, 10),
    "aligned rows": lambda: torch.randn(3, 1000),
    "ragged rows": lambda: torch.randn(5, 129),
    "ragged rows of a block": lambda: torch.randn(2, 1543),
    "aligned rows of a block": lambda: torch.randn(1, 2056),
    "a slice of rows": lambda: torch.randn(4, 48)[:, :43],
    "gaps": lambda: torch.randn(6, 40)[::2, ::2],
    "positions": lambda: torch.randn(2, 5, 4, 4),
    "ragged positions": lambda: torch.randn(3, 7, 5),
    "positions of many classes": lambda: torch.randn(1, 70, 8),
    "transposed": lambda: torch.randn(33, 9).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 6).movedim(-1, 1),
    "no common stride": lambda: torch.randn(2, 5, 3, 8)[:, :, :, :4],
}


def make(
    layout: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, class indices, weights of the classes, and probabilities."""
    x = 3 * LAYOUTS[layout]()
    x = x.to(device, dtype)  # keeps the strides of what is dense
    if layout in ("a slice of rows", "gaps", "no common stride"):
        large = torch.randn([2 * size for size in x.shape]).to(x)
        view = large[tuple(slice(0, size) for size in x.shape)]
        x = view.copy_(x)
    classes = x.shape[0] if x.dim() == 1 else x.shape[1]
    positions = () if x.dim() == 1 else (x.shape[0], *x.shape[2:])
    target = torch.randint(classes, positions, device=device)
    if target.numel() > 2:
        target.view(-1)[1] = -100
    weight = (torch.rand(classes) + 0.1).to(x)
    probabilities = torch.randn(x.shape).softmax(0 if x.dim() == 1 else 1).to(x)
    return x, target, weight, probabilities


def check_borders(run: Callable[..., Any], dtype: torch.dtype, device: str = "cpu") -> None:
    """In place in a window of a larger tensor of NaN: nothing outside is read or written."""
    rows = [((5, 64), 43), ((5, 64), 10), ((4, 1600), 1543), ((4, 1600), 1544), ((4, 5184), 5000)]
    windows = [
        (size, (slice(1, -1), slice(at, at + count))) for size, count in rows for at in (3, 8)
    ]
    windows += [
        (size, (slice(0, 2), slice(1, -1), slice(at, at + count)))
        for size, count in (((2, 9, 40), 16), ((2, 9, 40), 13), ((2, 72, 40), 24))
        for at in (3, 8)
    ]
    for size, window in windows:
        large = torch.full(size, NAN, device=device, dtype=dtype)
        view = large[window]
        view.copy_(torch.randn(view.shape))
        target = torch.randint(view.shape[1], (view.shape[0], *view.shape[2:]), device=device)
        wide = view.to(torch.float64, copy=True).requires_grad_()
        truth = F.cross_entropy(wide, target)
        loss = run("cross_entropy_forward_", view, target, None, 1, -100, 0.0)
        close(loss, truth.detach(), f"loss {size} {window}")
        close(view, torch.autograd.grad(truth, wide)[0], f"gradient {size} {window}")
        view.fill_(NAN)
        assert large.isnan().all(), f"{size} {window}"

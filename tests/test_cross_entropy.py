"""cross_entropy against the stock op: values, gradients, layouts, special values.

Transforms of it are in test_transforms.py, bad input in test_errors.py, what concerns
`inplace_backward` in test_cross_entropy_inplace.py, orders of gradients in
test_cross_entropy_autograd.py, exact bits and the property test in test_cross_entropy_bits.py.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchext
from torchext import _triton
from torchext.testing import assert_close_to_truth, assert_drop_in

INF, NAN = math.inf, math.nan
REDUCTIONS = ("none", "mean", "sum")
# (C), (N, C), (N, C, d1, ...): one row, aligned, ragged, one class, several chunks of classes,
# full and partial tiles of positions.
SHAPES = [
    (5,),
    (1, 1),
    (1, 7),
    (4, 1),
    (70, 1),
    (16, 16),
    (33, 17),
    (3, 4100),
    (2, 5, 3),
    (3, 16, 1),
    (2, 1, 4),
    (2, 6, 4, 5),
    (1, 3, 131),
    (2, 3, 2, 2, 2),
]
Layout = Callable[[Tensor], Tensor]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x


def transposed(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def reversed_dims(x: Tensor) -> Tensor:
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def sliced(x: Tensor) -> Tensor:
    """A window of a larger tensor: an offset, and gaps in every dimension."""
    large = x.new_full([size + 3 for size in x.shape], NAN)
    window = large[tuple(slice(2, 2 + size) for size in x.shape)]
    return window.copy_(x)


def strided(x: Tensor) -> Tensor:
    """Every second element in every dimension."""
    large = x.new_full([2 * size for size in x.shape], NAN)
    window = large[tuple(slice(None, None, 2) for _ in x.shape)]
    return window.copy_(x)


def expanded(x: Tensor) -> Tensor:
    """The same memory for all batches (and for all d1 where there are any)."""
    if x.dim() == 1:
        return x[:1].expand(x.shape)
    return x[:1].expand(x.shape) if x.dim() == 2 else x[:, :, :1].expand(x.shape)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def overlapping(x: Tensor) -> Tensor:
    """Windows that begin one element apart, as `unfold` makes them: all strides are 1."""
    return x.flatten()[: sum(size - 1 for size in x.shape) + 1].as_strided(x.shape, [1] * x.dim())


LAYOUTS: list[Layout] = [
    contiguous,
    channels_last,
    transposed,
    reversed_dims,
    sliced,
    strided,
    expanded,
    overlapping,
]


def stock(input: Tensor, target: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The definition; stock takes no int32 class indices, and uint8 not everywhere."""
    if target.dtype in (torch.int32, torch.uint8):
        target = target.long()
    return F.cross_entropy(input, target, *args, **kwargs)  # type: ignore[arg-type]


def make_logits(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Logits of some units, so that no class has all the probability."""
    return 3 * torch.randn(shape, dtype=dtype, device=device)


def make_target(shape: tuple[int, ...], kind: torch.dtype | str, dtype: torch.dtype) -> Tensor:
    """Class indices of dtype `kind`, or probabilities."""
    if kind == "probabilities":
        dim = 1 if len(shape) > 1 else 0
        return torch.randn(shape).softmax(dim).to(dtype)
    assert isinstance(kind, torch.dtype)
    classes = shape[0] if len(shape) == 1 else shape[1]
    return torch.randint(min(classes, 256), (*shape[:1], *shape[2:])[: len(shape) - 1], dtype=kind)


def check(logits: Tensor, target: Tensor, weight: Tensor | None = None, **options: object) -> None:
    assert_drop_in(
        torchext.cross_entropy,
        stock,
        logits.detach().requires_grad_(),
        target,
        weight,
        **options,
    )


KINDS = [torch.int64, torch.int32, torch.uint8, "probabilities"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_every_option_on_every_shape(
    backend: str, device: str, dtype: torch.dtype, kind: object, smoothing: float, reduction: str
) -> None:
    for shape, weighted in itertools.product(SHAPES, [False, True]):
        classes = shape[0] if len(shape) == 1 else shape[1]
        logits = make_logits(shape, dtype, device)
        target = make_target(shape, kind, dtype).to(device)
        weight = 0.5 + torch.rand(classes, dtype=dtype, device=device) if weighted else None
        options: dict[str, object] = {"reduction": reduction, "label_smoothing": smoothing}
        if kind != "probabilities":
            # A class, or an index that is none.
            ignored = min(classes, 256) // 2 if weighted or kind == torch.uint8 else -100
            options["ignore_index"] = ignored
            if target.numel() > 2:
                target[-1] = ignored
        check(logits, target, weight, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_of_logits_and_probabilities(
    backend: str, device: str, layout: Layout, shape: tuple[int, ...]
) -> None:
    for dtype, kind, reduction in itertools.product(
        [torch.float32, torch.bfloat16], [torch.int64, "probabilities"], ["none", "mean"]
    ):
        logits = layout(make_logits(shape, dtype, device))
        target = make_target(shape, kind, dtype).to(device)
        check(logits, target, reduction=reduction)
        check(logits, target, reduction=reduction, label_smoothing=0.1)
        if kind == "probabilities":
            check(logits.contiguous(), layout(target), reduction=reduction)
            check(logits, layout(target), reduction=reduction)


def test_strides_of_targets_and_weights(backend: str, device: str, dtype: torch.dtype) -> None:
    logits = make_logits((6, 5, 4), dtype, device)
    target = torch.randint(5, (4, 12), device=device).t()[::2]
    weight = torch.rand(5, 3, dtype=dtype, device=device)[:, 1]
    check(logits, target, weight)
    check(logits, target[:1].expand(6, 4), weight[:1].expand(5))
    check(logits, target.int(), weight, reduction="none", label_smoothing=0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strides_of_the_upstream_gradient(
    backend: str, device: str, reduction: str, layout: Layout
) -> None:
    logits = make_logits((6, 5, 4), torch.float32, device)
    target = torch.randint(5, (6, 4), device=device)
    shape = (6, 4) if reduction == "none" else ()
    gradient = torch.randn(shape, device=device)
    if reduction == "none":
        gradient = layout(gradient)
    assert_drop_in(
        torchext.cross_entropy,
        F.cross_entropy,
        logits.requires_grad_(),
        target,
        reduction=reduction,
        grad_output=gradient,
    )


def test_the_gradient_has_the_layout_of_dense_logits(device: str) -> None:
    with torchext.use_backend("native"):
        for shape, layout in itertools.product([(6, 5), (6, 5, 4)], [contiguous, channels_last]):
            logits = layout(torch.randn(shape, device=device)).requires_grad_()
            loss = torchext.cross_entropy(logits, make_target(shape, torch.int64, logits.dtype))
            (gradient,) = torch.autograd.grad(loss, logits)
            assert gradient.stride() == logits.stride()


def test_all_targets_ignored(backend: str, device: str, dtype: torch.dtype) -> None:
    logits = make_logits((3, 4, 2), dtype, device)
    target = torch.full((3, 2), 2, device=device)
    for reduction, smoothing in itertools.product(REDUCTIONS, (0.0, 0.2)):
        check(logits, target, ignore_index=2, reduction=reduction, label_smoothing=smoothing)


def test_weights_of_zero(backend: str, device: str, dtype: torch.dtype) -> None:
    logits = make_logits((4, 3), dtype, device)
    target = torch.tensor([0, 1, 0, 1], device=device)
    for weight, reduction in itertools.product(([1.0, 0.0, 2.0], [0.0, 0.0, 1.0]), REDUCTIONS):
        values = torch.tensor(weight, dtype=dtype, device=device)
        check(logits, target, values, reduction=reduction)
        check(logits, target, values, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (3, 5, 0), (0, 0), (3, 0)], ids=str)
def test_empty(backend: str, device: str, shape: tuple[int, ...]) -> None:
    logits, positions = torch.randn(shape, device=device), (*shape[:1], *shape[2:])
    for reduction in REDUCTIONS:
        check(logits, torch.zeros(shape, device=device), reduction=reduction)
        if shape != (3, 0):  # else class 0 does not exist: an error, in test_errors.py
            for kind in (torch.int64, torch.int32):
                target = torch.zeros(positions, dtype=kind, device=device)
                check(logits, target, reduction=reduction)


@pytest.mark.parametrize("layout", [contiguous, transposed, channels_last])
@pytest.mark.parametrize("classes", [130_000, 131_073])
def test_huge_vocabulary(
    backend: str, device: str, dtype: torch.dtype, classes: int, layout: Layout
) -> None:
    if _triton.interpreted:
        classes //= 4 if layout is contiguous else 16  # still several slices
    logits = make_logits((3, classes), dtype, device)
    logits[1, : classes // 2] = -INF  # chunks before the first finite class
    logits[2, -1] = 40
    target = torch.tensor([classes - 1, classes - 2, 0], device=device)
    weight = torch.rand(classes, device=device).to(dtype)
    check(layout(logits), target, weight, reduction="none")
    logits[1, : classes // 2] = -4
    check(layout(logits), target, weight, label_smoothing=0.1, reduction="sum")
    logits = make_logits((8, classes), dtype, device)
    for reduction in ("none", "sum"):  # the gradient is made in backward, and in forward
        target = torch.arange(8, device=device)
        check(layout(logits), target, label_smoothing=0.1, reduction=reduction)


SPECIAL = {
    "large": [1e4, -1e4, 9.99e3, 0.0, 1.0],
    "large and equal": [-3e4, -3e4, -3e4, -3e4, -3e4],
    "masked": [0.5, -INF, -INF, 1.0, -INF],
    "all masked but one": [-INF, -INF, -INF, 2.0, -INF],
    "all masked": [-INF] * 5,
    "infinite": [1.0, INF, 0.0, 2.0, -INF],
    "two infinities": [INF, INF, 0.0, 2.0, 1.0],
    "NaN": [1.0, 2.0, NAN, 0.0, -INF],
    "NaN and infinity": [1.0, INF, NAN, 0.0, -INF],
    "all NaN": [NAN] * 5,
}


@pytest.mark.parametrize("layout", [contiguous, transposed, channels_last])
@pytest.mark.parametrize("row", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_values_are_stocks(
    backend: str, device: str, dtype: torch.dtype, row: list[float], layout: Layout
) -> None:
    logits, target = special_rows(row, dtype, device)
    probabilities = torch.rand(5, 5, 2, device=device).to(dtype)
    probabilities[:, 1:3] = 0
    for reduction in REDUCTIONS:
        check(layout(logits), target, reduction=reduction)
        check(layout(logits), target, reduction=reduction, label_smoothing=0.1)
        check(layout(logits), probabilities, reduction=reduction)
        check(layout(logits[:, :, 0]), target[:, 0], reduction=reduction)


@pytest.mark.parametrize("layout", [contiguous, transposed, channels_last])
@pytest.mark.parametrize("row", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_values_in_ignored_rows_are_stocks(
    backend: str, device: str, row: list[float], layout: Layout
) -> None:
    logits, target = special_rows(row, torch.float32, device)
    for reduction, smoothing in itertools.product(REDUCTIONS, (0.0, 0.1)):
        options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": 3}
        check(layout(logits), target, **options)
        check(layout(logits[:, :, 0]), target[:, 0], **options)


def special_rows(row: list[float], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Logits (5, 5, 2) whose positions 0 have the values of `row`, and every class as a target."""
    logits = torch.stack([torch.tensor(row).expand(5, 5), make_logits((5, 5), torch.float32)], 2)
    target = torch.arange(5, device=device)[:, None].expand(5, 2).clone()
    return logits.to(device, dtype), target


def test_scaled_float16_gradient_of_a_mean_does_not_underflow(backend: str, device: str) -> None:
    # No probability near 1, of which the target's gradient would be the rounding.
    logits = make_logits((4096, 8), torch.float16, device).clamp_(-2, 2).requires_grad_()
    target = torch.randint(8, (4096,), device=device)
    scaled = torchext.cross_entropy(logits, target) * 2.0**15
    (gradient,) = torch.autograd.grad(scaled, logits, torch.ones_like(scaled))
    truth = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(truth, target) * 2.0**15, truth)
    if backend != "eager":  # torch's own op rounds the gradient of the mean first, and loses some
        torch.testing.assert_close(gradient.double(), exact, rtol=2e-3, atol=2e-6)
    with torch.autocast(device, torch.float16):
        loss = torchext.cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss * 65536, logits)
    torch.testing.assert_close(gradient.double(), 2 * exact, rtol=1e-3, atol=2e-6)


def test_deprecated_arguments(backend: str, device: str) -> None:
    logits = make_logits((4, 5), torch.float32, device)
    target = torch.randint(5, (4,), device=device)
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        if size_average is None and reduce is None:
            continue
        for arguments in ((size_average, -100, reduce), (size_average, 2, reduce, "sum", 0.1)):
            with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
                ours = torchext.cross_entropy(logits, target, None, *arguments)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = F.cross_entropy(logits, target, None, *arguments)
            assert_close_to_truth(ours, expected, expected.double())


def test_positional_arguments_are_stocks(backend: str, device: str) -> None:
    logits = make_logits((4, 5), torch.float32, device).requires_grad_()
    target = torch.randint(5, (4,), device=device)
    weight = torch.rand(5, device=device)
    arguments = (logits, target, weight, None, 1, None, "sum", 0.2)
    assert_drop_in(torchext.cross_entropy, F.cross_entropy, *arguments)

"""cross_entropy to the bit (threads, batches, runs), and as a property over random calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import torchext
from torchext.testing import TOLERANCES, assert_drop_in

Result = tuple[Tensor, Tensor]


def loss_and_gradient(logits: Tensor, target: Tensor, **options: Any) -> Result:
    logits = logits.detach().requires_grad_()
    loss = torchext.cross_entropy(logits, target, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (gradient,) = torch.autograd.grad(loss, logits, upstream if loss.dim() else None)
    return loss.detach(), gradient


def assert_same_bits(left: Result, right: Result) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def rows(batch: int, classes: int, dtype: torch.dtype) -> Tensor:
    return 3 * torch.randn(batch, classes, dtype=dtype)


def columns(batch: int, classes: int, dtype: torch.dtype) -> Tensor:
    return 3 * torch.randn(classes, batch, dtype=dtype).t()


def images(batch: int, classes: int, dtype: torch.dtype) -> Tensor:
    return 3 * torch.randn(batch, classes, 7, dtype=dtype)


MAKERS = [rows, columns, images]
Maker = Callable[[int, int, torch.dtype], Tensor]


def target_for(logits: Tensor, kind: str) -> Tensor:
    if kind == "probabilities":
        return torch.randn(logits.shape).softmax(1).to(logits.dtype)
    target = torch.randint(logits.shape[1], (logits.shape[0], *logits.shape[2:]))
    target[1::5] = -100
    return target


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_one_class_has_a_gradient_of_zero(
    dtype: torch.dtype, maker: Maker, smoothing: float
) -> None:
    logits = maker(70, 1, dtype).requires_grad_()
    target = torch.zeros((70, *logits.shape[2:]), dtype=torch.int64)
    for weight in (None, 0.5 + torch.rand(1, dtype=dtype)):
        for reduction in ("none", "mean", "sum"):
            loss = torchext.cross_entropy(
                logits, target, weight, reduction=reduction, label_smoothing=smoothing
            )
            (gradient,) = torch.autograd.grad(loss, logits, 4 * torch.randn_like(loss))
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_any_number_of_threads_gives_the_same_bits(
    threads: None, dtype: torch.dtype, maker: Maker, kind: str, reduction: str
) -> None:
    logits = maker(301, 700, dtype)
    target = target_for(logits, kind)
    weight = torch.rand(700).to(dtype)
    results = []
    with torchext.use_backend("native"):
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(
                loss_and_gradient(
                    logits, target, weight=weight, reduction=reduction, label_smoothing=0.1
                )
            )
    for result in results[1:]:
        assert_same_bits(results[0], result)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [5, 64, 2500])
def test_a_row_has_the_same_bits_in_any_batch(
    dtype: torch.dtype, maker: Maker, kind: str, smoothing: float, classes: int
) -> None:
    """The loss of each row and, of a sum, its gradient; forward with and without a gradient."""
    logits = maker(75, classes, dtype)
    target = target_for(logits, kind)
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "sum"}
    with torchext.use_backend("native"):
        kept = {**options, "reduction": "none"}
        losses = torchext.cross_entropy(logits, target, **kept)
        gradient = loss_and_gradient(logits, target, **options)[1]
        for part in (slice(0, 1), slice(3, 4), slice(5, 22), slice(66, 75), slice(0, 64)):
            x, t = logits[part], target[part]
            assert torch.equal(torchext.cross_entropy(x, t, **kept), losses[part])
            assert torch.equal(loss_and_gradient(x, t, **options)[1], gradient[part])
            assert torch.equal(loss_and_gradient(x, t, **kept)[0], losses[part])


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_rows_have_the_same_bits_in_any_batch(
    dtype: torch.dtype, maker: Maker, kind: str, smoothing: float
) -> None:
    """Of losses without reduction, whose gradients are made in backward, and of their sum."""
    logits = maker(100, 48, dtype)
    target, weight = target_for(logits, kind), torch.rand(48).to(dtype)
    upstream = torch.randn(100, *logits.shape[2:]).to(dtype)

    def gradients(rows: slice) -> list[Tensor]:
        x = logits[rows].detach().requires_grad_()
        found = []
        for reduction, up in (("none", upstream[rows]), ("sum", None)):
            loss = torchext.cross_entropy(
                x, target[rows], weight, reduction=reduction, label_smoothing=smoothing
            )
            found += torch.autograd.grad(loss, x, up)
        return found

    with torchext.use_backend("native"):
        whole = gradients(slice(None))
        for row in range(100):
            for alone, together in zip(gradients(slice(row, row + 1)), whole, strict=True):
                assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("classes", [300, 2049, 20001])
def test_much_smoothing_loses_no_digits(maker: Maker, classes: int) -> None:
    """A sum of equal parts of the smoothing would be rounded to one side."""
    logits = maker(4, classes, torch.float32) / 30
    target = target_for(logits, "indices")
    options: dict[str, Any] = {"reduction": "none", "label_smoothing": 0.9}
    truth = F.cross_entropy(logits.double(), target, **options)
    with torchext.use_backend("native"):
        loss = torchext.cross_entropy(logits, target, **options)
    assert ((loss - truth).abs() <= 4e-7 * truth).all()


def test_the_loss_is_the_same_with_and_without_a_gradient(dtype: torch.dtype) -> None:
    for maker in MAKERS:
        logits = maker(33, 65, dtype)
        target = target_for(logits, "indices")
        with torchext.use_backend("native"):
            for reduction in ("none", "mean", "sum"):
                loss = torchext.cross_entropy(logits, target, reduction=reduction)
                again = loss_and_gradient(logits, target, reduction=reduction)[0]
                assert torch.equal(loss, again)


def test_small_probabilities_have_their_relative_precision() -> None:
    """A gradient far below the largest one is as precise as stock's, not only as small."""
    for maker in MAKERS:
        logits = maker(9, 400, torch.float32) * 5
        target = target_for(logits, "indices")
        exact = torch.zeros_like(logits, dtype=torch.float64).copy_(logits).requires_grad_()
        F.cross_entropy(exact, target, reduction="sum").backward()
        with torchext.use_backend("native"):
            gradient = loss_and_gradient(logits, target, reduction="sum")[1]
        assert exact.grad is not None
        error = (gradient.double() - exact.grad).abs()
        # The target's is a probability less 1, which cancels: its rounding is that of a 1.
        at_target = torch.zeros_like(error, dtype=torch.bool)
        at_target.scatter_(1, target.clamp(min=0).unsqueeze(1), True)
        assert not (error > 2e-5 * exact.grad.abs() + 1e-36 + 2e-7 * at_target).any()


@pytest.mark.parametrize("classes", [400, 2000, 30000])
def test_a_nearly_certain_class_keeps_its_digits(classes: int) -> None:
    """Classes that are summed one after the other: many small ones beside a 1."""
    logits = torch.full((40, classes), -13.7)
    target = torch.randint(classes, (40,))
    logits.scatter_(1, target.unsqueeze(1), 0.0)
    exact = logits.double().requires_grad_()
    truth = F.cross_entropy(exact, target, reduction="none")
    truth.sum().backward()
    assert exact.grad is not None
    with torchext.use_backend("native"):
        columns = logits.t().contiguous().t().requires_grad_()
        loss = torchext.cross_entropy(columns, target, reduction="none")
        loss.sum().backward()
    assert columns.grad is not None
    assert (loss - truth).abs().max() < 1e-6
    assert (columns.grad - exact.grad).abs().max() < 1e-6


@pytest.mark.parametrize("index", [-(2**63), 2**63 - 1, -1, 2**32, -(2**32), 5, 6])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_class_out_of_range_touches_no_memory(backend: str, index: int, reduction: str) -> None:
    for shape in [(4, 5), (4, 5, 3)]:
        logits = torch.randn(shape)
        target = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
        target[2] = index
        for x in (logits, logits.clone().requires_grad_()):
            for smoothing in (0.0, 0.5):
                with pytest.raises(IndexError, match=str(index)):
                    torchext.cross_entropy(
                        x, target, reduction=reduction, label_smoothing=smoothing
                    )
        # The same number as ignore_index is no class, and no error.
        options: dict[str, Any] = {"ignore_index": index, "reduction": reduction}
        assert_drop_in(
            torchext.cross_entropy, F.cross_entropy, logits.requires_grad_(), target, **options
        )


def test_backward_of_the_registered_op_checks_the_classes_too() -> None:
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 4])
    for grad_output, reduction in ((torch.tensor(1.0), 1), (torch.ones(3), 0)):
        with pytest.raises(IndexError, match="4"):
            torch.ops.torchext.cross_entropy_backward(
                grad_output, logits, target, None, torch.zeros(2, 3), reduction, -100, 0.0
            )


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits of any shape and strides, a target and options."""
    dims = draw(st.integers(1, 4))
    shape = [draw(st.integers(1, 9)) for _ in range(dims)]
    class_dim = min(dims - 1, 1)
    shape[class_dim] = draw(st.sampled_from([1, 2, 7, 16, 33, 130, 2049]))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    logits = relaid(draw, (scale * torch.randn(shape)).to(dtype))
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["none", "mean", "sum"]))}
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0]))
    if draw(st.booleans()):
        options["weight"] = relaid(draw, (0.1 + torch.rand(shape[class_dim])).to(dtype))
    if draw(st.booleans()):
        target = torch.randn(shape).softmax(class_dim).to(dtype)
    else:
        positions = shape[:1] * class_dim + shape[2:]
        target = torch.randint(shape[class_dim], positions)
        if draw(st.booleans()):
            options["ignore_index"] = draw(st.sampled_from([0, shape[class_dim] - 1]))
    return logits, relaid(draw, target), options


def relaid(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values in another order, with gaps, or from an offset on."""
    order = draw(st.permutations(range(x.dim())))
    step, offset = draw(st.sampled_from([(1, 0), (1, 0), (2, 0), (1, 3), (3, 1)]))
    sizes = [x.shape[i] for i in order]
    gap = draw(st.integers(0, x.dim() - 1)) if x.dim() else 0
    extent = [offset + step * size if i == gap else size for i, size in enumerate(sizes)]
    window = large = x.new_full(extent, 9)
    if x.dim():
        window = large.narrow(gap, offset, step * sizes[gap])
        window = window[(slice(None),) * gap + (slice(None, None, step),)]
    window = window.permute([order.index(i) for i in range(x.dim())])
    return window.copy_(x)


@settings(max_examples=50)
@given(call=calls())
def test_any_call_is_as_close_to_the_truth_as_stock(
    call: tuple[Tensor, Tensor, dict[str, Any]],
) -> None:
    logits, target, options = call
    with torchext.use_backend("native"):
        assert_drop_in(
            torchext.cross_entropy, F.cross_entropy, logits.requires_grad_(), target, **options
        )


@pytest.mark.parametrize("classes", [49, 64, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_do_not_disturb_their_neighbours(
    dtype: torch.dtype, classes: int, smoothing: float, inplace: bool
) -> None:
    """Rows of one chunk go through the kernel three at a time: runs of ignored ones at the start,
    in between, over blocks' ends and at the end, and rows with infinities and NaN among them."""
    logits = 3 * torch.randn(70, classes, dtype=dtype)
    logits[20] = -torch.inf
    logits[33, 5] = torch.nan
    logits[47, classes - 1] = torch.inf
    logits[48, :9] = -torch.inf
    for start, stop in [(0, 0), (0, 70), (0, 3), (15, 18), (19, 33), (30, 49), (67, 70), (1, 69)]:
        target = torch.randint(classes, (70,))
        target[start:stop] = -100
        options = {"label_smoothing": smoothing, "reduction": "sum"}
        with torchext.use_backend("native"):
            x = logits.clone().requires_grad_()
            y = x.clone() if inplace else x
            torchext.cross_entropy(y, target, inplace_backward=inplace, **options).backward()
            losses = torchext.cross_entropy(logits, target, **{**options, "reduction": "none"})
            assert x.grad is not None
            for row in range(70):
                alone = loss_and_gradient(logits[row : row + 1], target[row : row + 1], **options)
                assert torch.equal(alone[0].nan_to_num(7), losses[row].nan_to_num(7))
                assert torch.equal(alone[1][0].nan_to_num(7), x.grad[row].nan_to_num(7))

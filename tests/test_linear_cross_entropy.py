"""linear_cross_entropy: values and gradients against the eager definition in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchext
from torchext import reference

# Of the norm, beyond the error that eager makes in the dtype: one rounding of the result. Of a few
# values the errors are a matter of luck: low precision is judged on the larger shapes.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
SHAPES = [(7, 5, 11), (1, 3, 2), (300, 16, 60), (130, 8, 3000)]


class WithValue(torch.autograd.Function):
    """The given value, with the gradient of `input`."""

    @staticmethod
    def forward(ctx, input, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def gradients(function, tensors, upstream, **kwargs):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    loss = function(leaves, **kwargs)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (dtype, shape)
        for dtype in TOLERANCES
        for shape in SHAPES
        if dtype.itemsize > 2 or shape[0] > 9
    ],
    ids=str,
)
def test_values_and_gradients_match_the_truth(dtype, shape, probabilities, reduction):
    rows, features, classes = shape
    errors = []  # of 16-bit dtypes, for each draw and result: ours, eager's, the truth's norm
    for bias, weighted, smoothing in product((False, True), (False, True), (0.0, 0.2)):
        input = torch.randn(rows, features).to(dtype)
        linear_weight = (torch.randn(classes, features) * 0.5).to(dtype)
        linear_bias = torch.randn(classes).to(dtype) if bias else None
        weight = torch.rand(classes).to(dtype) if weighted else None
        if probabilities:
            target = torch.randn(rows, classes).softmax(-1).to(dtype)
        else:
            target = torch.randint(0, classes, (rows,))
            if rows > 1:
                target[0] = -100
        upstream = torch.randn(rows) if reduction == "none" else torch.randn(())
        upstream = upstream.to(dtype)

        def call(leaves, op, wide, target=target, weight=weight, smoothing=smoothing):
            return op(
                leaves[0],
                leaves[1],
                target.to(wide) if probabilities else target,
                linear_bias=leaves[2],
                weight=None if weight is None else weight.to(wide),
                reduction=reduction,
                label_smoothing=smoothing,
            )

        def on_logits(leaves, value, target=target, weight=weight, smoothing=smoothing):
            return reference.cross_entropy(
                WithValue.apply(F.linear(*leaves), value),
                target.double() if probabilities else target,
                weight=None if weight is None else weight.double(),
                reduction=reduction,
                label_smoothing=smoothing,
            )

        tensors = (input, linear_weight, linear_bias)
        doubles = [None if t is None else t.double() for t in tensors]
        truth = gradients(
            lambda leaves: call(leaves, reference.linear_cross_entropy, torch.float64),
            doubles,
            upstream,
        )
        eager, ours = (
            gradients(lambda leaves, op=op: call(leaves, op, dtype), tensors, upstream)
            for op in (reference.linear_cross_entropy, torchext.linear_cross_entropy)
        )
        if dtype.itemsize == 2:
            errors.append(
                [
                    [part.norm().item() ** 2 for part in (got.double() - t, stock.double() - t, t)]
                    for got, stock, t in zip(ours, eager, truth, strict=True)
                ]
            )
            # Logits of 16 bits are rounded alike in both, and in one draw what eager rounds
            # after that may happen to undo it. Here the truth is that of the rounded logits.
            logits = F.linear(*tensors).double()
            truth = gradients(lambda leaves, at=logits: on_logits(leaves, at), doubles, upstream)
        # A logit's gradient is softmax minus target: where both are nearly one, what is left keeps
        # the rounding of the softmax, in the dtype of the sums. It comes back times the factors.
        largest = 1.0 if weight is None or reduction == "mean" else weight.max().item()
        rounding = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
        rounding *= 2 * largest * upstream.norm().item()
        factors = [0.0, linear_weight.norm().item(), input.norm().item(), 1.0]
        for actual, stock, expected, factor in zip(ours, eager, truth, factors, strict=False):
            assert actual.dtype == dtype
            allowed = (stock.double() - expected).norm()
            allowed += TOLERANCES[dtype] * expected.norm() + rounding * factor
            assert (actual.double() - expected).norm() <= allowed, (bias, weighted, smoothing)
    for result in range(4 if errors else 0):
        draws = [draw[result] for draw in errors if result < len(draw)]  # the bias's only with one
        actual, stock, norm = torch.tensor(draws).sum(0).sqrt().tolist()
        assert actual <= stock + TOLERANCES[dtype] * norm, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("features", [20, 300, 784])
@pytest.mark.parametrize("classes", [1, 2, 5, 10, 11, 16])
def test_few_classes_in_any_batch(threads, classes, features, dtype):
    """A row's loss and gradient have the same bits; its logits may be dot products, or not."""
    input, target = torch.randn(300, features, dtype=dtype), torch.randint(classes, (300,))
    weight = torch.randn(classes, features + 3, dtype=dtype) / features**0.5
    weight = weight[:, 1:-2]  # rows that begin anywhere
    bias, upstream = torch.randn(2 * classes, dtype=dtype)[::2], torch.randn(300, dtype=dtype)

    def run(first, count):
        part = slice(first, first + count)
        with torchext.use_backend("native"):
            return gradients(
                lambda leaves: torchext.linear_cross_entropy(
                    leaves[0], weight, target[part], linear_bias=bias, reduction="none"
                ),
                (input[part],),
                upstream[part],
            )

    whole = run(0, 300)
    truth = F.cross_entropy(
        F.linear(input.double(), weight.double(), bias.double()), target, reduction="none"
    )
    torch.testing.assert_close(whole[0].double(), truth, rtol=2e-5, atol=2e-5)
    for count, first in product((1, 3), (0, 130, 297)):
        torch.set_num_threads(count)
        for rows in (1, 3):
            for actual, expected in zip(run(first, rows), whole, strict=True):
                assert torch.equal(actual, expected[first : first + rows])


def test_chunks_of_rows_give_what_one_chunk_gives():
    # 40,000 classes in float64: 256 rows a chunk, so that 600 rows are three, the last one short.
    input = torch.randn(600, 4, dtype=torch.float64)
    linear_weight = torch.randn(40000, 4, dtype=torch.float64)
    target = torch.randint(0, 40000, (600,))
    for reduction in ("mean", "none"):
        upstream = torch.randn(600) if reduction == "none" else torch.randn(())
        truth, ours = (
            gradients(
                lambda leaves, op=op: op(leaves[0], leaves[1], target, reduction=reduction),  # noqa: B023
                (input, linear_weight),
                upstream,
            )
            for op in (reference.linear_cross_entropy, torchext.linear_cross_entropy)
        )
        for actual, expected in zip(ours, truth, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_narrow_gradients_of_many_chunks_lose_no_digits(reduction):
    # 131,072 classes: 256 rows a chunk, and so 16 of them.
    rows, classes = 4096, 131072
    input = torch.rand(rows, 2).bfloat16()
    linear_weight = torch.randn(classes, 2).bfloat16()
    target = torch.randint(0, classes, (rows,))
    exact, narrow = torch.zeros(2, classes), torch.zeros(2, classes).bfloat16()
    for x, t in zip(input.split(256), target.split(256), strict=True):
        softmax = (x @ linear_weight.t()).float().softmax(1)
        softmax[torch.arange(256), t] -= 1
        part = x.t().float() @ softmax
        exact += part
        narrow += part.bfloat16()
    leaf = linear_weight.requires_grad_()
    loss = torchext.linear_cross_entropy(input, leaf, target, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    # The logits' gradient was rounded, too: twice in all. (Measured: 1.3, and 7.4 in bfloat16.)
    limit = 2 * (exact.bfloat16() - exact).norm()
    assert (grad.t() - exact).norm() <= limit
    assert (narrow - exact).norm() > limit  # a sum in bfloat16 would be seen


def test_only_the_gradients_asked_for_and_twice_the_same():
    input = torch.randn(20, 6, requires_grad=True)
    linear_weight = torch.randn(9, 6)
    target = torch.randint(0, 9, (20,))
    loss = torchext.linear_cross_entropy(input, linear_weight, target) * 3
    (first,) = torch.autograd.grad(loss, input, retain_graph=True)
    kept = first.clone()
    first.zero_()  # the caller's own: a second backward must not see it
    (second,) = torch.autograd.grad(loss, input)
    assert torch.equal(kept, second)
    assert linear_weight.grad is None


def test_second_derivatives_match_stock():
    linear_weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    input = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 7, (5,))

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return torchext.linear_cross_entropy(x, w, target)

    assert torch.autograd.gradcheck(loss, (input, linear_weight))
    assert torch.autograd.gradgradcheck(loss, (input, linear_weight))
    ours = torch.func.hessian(loss)(input, linear_weight)
    stock = torch.func.hessian(lambda x, w: F.cross_entropy(F.linear(x, w), target))(
        input, linear_weight
    )
    torch.testing.assert_close(ours, stock)


def test_leading_dimensions_and_autocast():
    input = torch.randn(2, 3, 4, requires_grad=True)
    linear_weight = torch.randn(5, 4)
    target = torch.randint(0, 5, (2, 3))
    logits = F.linear(input, linear_weight)
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    ours = torchext.linear_cross_entropy(input, linear_weight, target, reduction="none")
    assert ours.shape == (2, 3)
    torch.testing.assert_close(ours.flatten(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = F.cross_entropy(F.linear(input[0], linear_weight), target[0])
        ours = torchext.linear_cross_entropy(input[0], linear_weight, target[0])
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock)


def test_registered_operators_pass_opcheck():
    ops = torch.ops.torchext
    input, linear_weight = torch.randn(6, 4), torch.randn(5, 4)
    target, bias, weight = torch.randint(0, 5, (6,)), torch.randn(5), torch.rand(5)
    options = (1, -100, 0.1)
    for wanted in ((False, False, False), (True, True, True), (True, False, False)):
        forward = ops.linear_cross_entropy_forward.default
        tensors = (input, linear_weight, target, bias, weight)
        torch.library.opcheck(forward, (*tensors, *options, *wanted))
        grad = tuple(t.clone().requires_grad_() for t in (input, linear_weight))
        torch.library.opcheck(forward, (*grad, *tensors[2:], *options, *wanted[:2], False))
    stats = ops.linear_cross_entropy_forward(*tensors, *options, False, False, False)[1]
    torch.library.opcheck(
        ops.linear_cross_entropy_backward.default,
        (torch.randn(()), *tensors, stats, *options, True, True, True),
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target": torch.tensor([0, 1, 9])}, IndexError),
        ({"target": torch.tensor([0, 1])}, ValueError),
        ({"linear_weight": torch.randn(5, 3)}, RuntimeError),
        ({"linear_bias": torch.randn(4)}, RuntimeError),
        ({"weight": torch.randn(4)}, RuntimeError),
        ({"reduction": "average"}, ValueError),
        ({"label_smoothing": 2.0}, RuntimeError),
        ({"target": [0, 1, 2]}, TypeError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_bad_input_is_refused_by_name(change, error):
    call = {
        "input": torch.randn(3, 4),
        "linear_weight": torch.randn(5, 4),
        "target": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(error, match=f"linear_cross_entropy: .*{next(iter(change))}"):
        torchext.linear_cross_entropy(**{**call, **change})

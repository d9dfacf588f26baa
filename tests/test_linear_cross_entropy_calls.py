"""linear_cross_entropy under autocast, compiled, of K-dimensional weights: all by the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchext
from torchext import reference

# Of the norm, beyond the error that eager makes: some roundings of the sums, or one of the result.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture
def fused_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    """The eager definition, which is refused to the package meanwhile."""
    definition = reference.linear_cross_entropy

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the eager definition served the call")

    monkeypatch.setattr(reference, "linear_cross_entropy", refuse)
    yield definition


def results(
    function: Callable[..., Tensor],
    leaves: list[Tensor],
    target: Tensor,
    upstream: Tensor,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> list[Tensor]:
    """The loss and its gradients by the leaves: input, linear_weight and maybe linear_bias."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    input, linear_weight, *bias = leaves
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = function(
            input, linear_weight, target, linear_bias=bias[0] if bias else None, **options
        )
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


def compiled() -> Callable[..., Tensor]:
    """Compiled anew: each case is a graph of its own, and a function may have but eight."""
    torch.compiler.reset()
    return torch.compile(torchext.linear_cross_entropy, fullgraph=True, backend="aot_eager")


def widened(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}


def of_rounded_logits(
    leaves: list[Tensor], target: Tensor, narrow: torch.dtype, **options: Any
) -> Tensor:
    """The loss by exact arithmetic, but for what autocast rounds: the leaves, and the logits."""
    logits = F.linear(*(leaf.to(narrow).double() for leaf in leaves)).to(narrow)
    return F.cross_entropy(logits.double(), target, **widened(options))


def of_exact_sums(*shape: int) -> Tensor:
    """Numbers that autocast rounds, to multiples of 2^-7 below 4.

    Sixteen products of two such are summed exactly in float32, in any order: ours and stock round
    the same logits, and neither has the other neighbour of one by chance.
    """
    multiples = (torch.randn(shape) * 128).round().clamp(-511, 511) / 128
    return multiples * (1 + (2 * torch.rand(shape) - 1) * 2**-12.5)  # less than half of a step


def check(
    found: list[Tensor],
    eager: list[Tensor],
    truth: list[Tensor],
    case: Any,
    narrow: torch.dtype | None = None,
    rounded: Tensor | None = None,
) -> None:
    """Under autocast the gradients, of whatever dtype, were rounded to `narrow`; not the loss.

    But its logits were: sums in another order give some of them the other neighbour, and a sum of
    losses as much by chance. `rounded` is the loss that has the logits' roundings alone.
    """
    for i, (actual, stock, exact) in enumerate(zip(found, eager, truth, strict=True)):
        assert actual.dtype == stock.dtype and actual.shape == stock.shape
        assert exact.isfinite().all()
        allowed = FLOOR[actual.dtype if i == 0 or narrow is None else narrow] * (
            exact.norm() + 1e-3
        )
        if stock.isfinite().all():  # a sum in float16 overflows in stock
            error = (stock.double() - exact).norm()
            own = 0 if rounded is None or i > 0 else (rounded - exact).norm()
            allowed += max(error, own)
        assert (actual.double() - exact).norm() <= allowed, case


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_stocks(
    fused_alone: Callable[..., Tensor], narrow: torch.dtype, reduction: str
) -> None:
    for biased, weighted, smoothing in product((False, True), (False, True), (0.0, 0.1)):
        leaves = [of_exact_sums(200, 16), of_exact_sums(90, 16)]
        leaves += [of_exact_sums(90)] if biased else []
        target = torch.randint(90, (200,))
        target[3] = -100
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        options["weight"] = torch.rand(90) + 0.5 if weighted else None
        # As a loss scaler's: in float16 a mean's gradient of 1 / 200 alone would lose its digits.
        scale = 2.0**14 * 1.3 if reduction == "mean" else 50.0
        upstream = (torch.randn(200) if reduction == "none" else torch.randn(()).sign()) * scale
        call = (leaves, target, upstream)
        eager = results(fused_alone, *call, narrow, **options)
        assert eager[0].dtype == torch.float32
        doubles = ([leaf.double() for leaf in leaves], target, upstream.double())
        truth = results(fused_alone, *doubles, **widened(options))
        rounded = of_rounded_logits(leaves, target, narrow, **options)
        for function in (torchext.linear_cross_entropy, compiled()):
            found = results(function, *call, narrow, **options)
            check(found, eager, truth, options, narrow, rounded)


def test_a_loss_scaler_under_float16_loses_nothing() -> None:
    """Over 65,536 rows the mean's gradient is below float16's smallest number, and then scaled."""
    rows = 65536
    leaves = [torch.randn(rows, 4), torch.randn(6, 4)]
    target = torch.randint(6, (rows,))
    scale = torch.tensor(65536.0)
    call = (leaves, target, scale)
    eager = results(reference.linear_cross_entropy, *call, torch.float16)
    doubles = ([leaf.double() for leaf in leaves], target, scale.double())
    truth = results(reference.linear_cross_entropy, *doubles)
    found = results(torchext.linear_cross_entropy, *call, torch.float16)
    check(found, eager, truth, "scaled", torch.float16)
    assert (found[1] != 0).any(1).all()


def test_backward_inside_autocast_and_bfloat16_parameters() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        input = torch.randn(50, 8, dtype=dtype, requires_grad=True)
        linear_weight = torch.randn(7, 8, dtype=dtype, requires_grad=True)
        target = torch.randint(7, (50,))
        grads = []
        for function in (torchext.linear_cross_entropy, reference.linear_cross_entropy):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = function(input, linear_weight, target)
                assert loss.dtype == torch.float32
                grads.append(torch.autograd.grad(loss * 0.3, (input, linear_weight)))
        for ours, stock in zip(*grads, strict=True):
            assert ours.dtype == stock.dtype == dtype
            torch.testing.assert_close(ours, stock, rtol=2e-2, atol=1e-4)


def test_second_derivatives_under_autocast() -> None:
    input = torch.randn(9, 4, requires_grad=True)
    linear_weight = torch.randn(5, 4, requires_grad=True)
    target = torch.randint(5, (9,))
    direction = torch.randn(9, 4)
    found = []
    for function in (torchext.linear_cross_entropy, reference.linear_cross_entropy):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(input, linear_weight, target)
            (grad,) = torch.autograd.grad(loss, input, create_graph=True)
        found.append(torch.autograd.grad((grad * direction).sum(), (input, linear_weight)))
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-3)


def test_what_autocast_leaves_alone(fused_alone: Callable[..., Tensor]) -> None:
    """float64, and probabilities: of float32 while the logits are narrow."""
    input = torch.randn(5, 4, requires_grad=True)
    linear_weight = torch.randn(3, 4)
    target = torch.randn(5, 3).softmax(1)
    for dtype in (torch.float32, torch.float64):
        tensors = (input.to(dtype), linear_weight.to(dtype), target.to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = torchext.linear_cross_entropy(*tensors)
            stock = fused_alone(*tensors)
        assert ours.dtype == stock.dtype == dtype
        torch.testing.assert_close(ours, stock)
        torch.testing.assert_close(
            torch.autograd.grad(ours, input), torch.autograd.grad(stock, input)
        )


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("inner", [(1,), (3,), (2, 40), (2, 1, 3)], ids=str)
def test_k_dimensional_weights(
    fused_alone: Callable[..., Tensor],
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    reduction: str,
    kind: str,
    inner: tuple[int, ...],
) -> None:
    rows, classes, features = 60, 11, 6
    for biased, smoothing, weighted in ((False, 0.0, False), (True, 0.1, True)):
        leaves = [torch.randn(rows, features), torch.randn(classes, *inner, features)]
        leaves += [torch.randn(classes, *inner)] if biased else []
        leaves = [leaf.to(dtype) for leaf in leaves]
        if kind == "indices":
            target = torch.randint(classes, (rows, *inner), dtype=torch.int32)
            target[0] = -100
        else:
            target = torch.randn(rows, classes, *inner).softmax(1).to(dtype)
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        options["weight"] = (torch.rand(classes) + 0.5).to(dtype) if weighted else None
        upstream = (torch.randn(rows, *inner) if reduction == "none" else torch.randn(())).to(dtype)
        call = (leaves, target, upstream)
        eager = results(fused_alone, *call, autocast, **options)
        wide_target = target.double() if target.is_floating_point() else target
        doubles = ([leaf.double() for leaf in leaves], wide_target, upstream.double())
        truth = results(fused_alone, *doubles, **widened(options))
        functions = [torchext.linear_cross_entropy]
        if inner == (2, 1, 3):
            functions.append(compiled())
        for function in functions:
            found = results(function, *call, autocast, **options)
            check(found, eager, truth, options, autocast)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_k_dimensional_chunks(fused_alone: Callable[..., Tensor], reduction: str) -> None:
    # 40,000 logits a row in float64: 256 rows a chunk, so that 600 rows are three.
    leaves = [torch.randn(600, 4, dtype=torch.float64)]
    leaves += [torch.randn(5, 8000, 4, dtype=torch.float64)]
    target = torch.randint(5, (600, 8000))
    upstream = torch.randn(600, 8000) if reduction == "none" else torch.randn(())
    # A weight whose last dimension is not contiguous goes the same way.
    leaves[1] = leaves[1].movedim(0, 2).contiguous().movedim(2, 0)
    call = (leaves, target, upstream)
    found = results(torchext.linear_cross_entropy, *call, reduction=reduction)
    truth = results(fused_alone, *call, reduction=reduction)
    for actual, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-12)


def test_k_dimensional_derivatives_and_operators() -> None:
    input = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    linear_weight = torch.randn(5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (4, 2, 2))

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torchext.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")

    leaves = (input, linear_weight, bias)
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
    tensors = (input, linear_weight.flatten(1, 2), target.flatten(1), bias.flatten(1), None)
    detached = [None if t is None else t.detach() for t in tensors]
    for code, wanted in ((0, (False, False, False)), (1, (True, True, True))):
        forward = torch.ops.torchext.linear_cross_entropy_forward.default
        arguments = (code, -100, 0.1, *wanted)
        torch.library.opcheck(forward, (*detached, *arguments))
        stats = forward(*detached, *arguments)[1]
        upstream = torch.randn((4, 4) if code == 0 else (), dtype=torch.float64)
        torch.library.opcheck(
            torch.ops.torchext.linear_cross_entropy_backward.default,
            (upstream, *detached, stats, *arguments[:3], True, True, True),
        )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target": torch.zeros(3, 4, 2, dtype=torch.long)}, RuntimeError),  # 8 positions, too
        ({"target": torch.full((3, 2, 4), 5)}, IndexError),
        ({"target": torch.zeros(4, 2, 4, dtype=torch.long)}, ValueError),
        ({"linear_bias": torch.randn(5, 4, 2)}, RuntimeError),
        ({"input": torch.randn(3, 7)}, RuntimeError),
    ],
    ids=["target", "class", "batch", "linear_bias", "input"],
)
def test_k_dimensional_errors(change: dict[str, Tensor], error: type[Exception]) -> None:
    call = {
        "input": torch.randn(3, 6),
        "linear_weight": torch.randn(5, 2, 4, 6),
        "target": torch.zeros(3, 2, 4, dtype=torch.long),
    }
    with pytest.raises(error):
        torchext.linear_cross_entropy(**{**call, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (1,), (1, 8), (4, 8), (7,)], ids=str)
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_bias_that_would_be_broadcast_is_refused(
    shape: tuple[int, ...], differentiable: bool
) -> None:
    input, weight = torch.randn(4, 3), torch.randn(8, 3, requires_grad=differentiable)
    with pytest.raises(RuntimeError):
        torchext.linear_cross_entropy(
            input, weight, torch.tensor([0, 1, 2, 3]), linear_bias=torch.randn(shape)
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_classes_with_an_extra(reduction: str) -> None:
    tensors = (torch.randn(3, 4), torch.randn(0, 4), torch.zeros(3, 0))
    plain = torchext.linear_cross_entropy(*tensors, reduction=reduction)
    extra = torchext.linear_cross_entropy(*tensors, reduction=reduction, logit_scale=2.0)
    assert torch.equal(plain.isnan(), extra.isnan()) and plain.shape == extra.shape


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_training(dynamic: bool, reduction: str) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        options = {"linear_bias": b, "reduction": reduction, "label_smoothing": 0.1}
        return torchext.linear_cross_entropy(x * 2, w, t, **options) * 1.5

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    linear_weight, bias = torch.randn(7, 3, requires_grad=True), torch.randn(7, requires_grad=True)
    for rows in (4, 9, 17) if dynamic else (4,):
        input = torch.randn(rows, 3, requires_grad=True)
        target = torch.randint(0, 7, (rows,))
        stock = F.cross_entropy(
            F.linear(input * 2, linear_weight, bias),
            target,
            reduction=reduction,
            label_smoothing=0.1,
        )
        results = []
        upstream = torch.randn(stock.shape)
        for value in (compiled(input, linear_weight, bias, target), stock * 1.5):
            wanted = (input, linear_weight, bias)
            results.append((value, *torch.autograd.grad(value, wanted, upstream)))
        torch.testing.assert_close(*results)


def test_smoothing_in_float16_does_not_overflow_without_gradients() -> None:
    """Small calls without gradients are torch's ops, whose sum over the classes would."""
    x, weight = torch.randn(4, 5).half(), torch.randn(20000, 5).half()
    target = torch.arange(4)
    truth = F.cross_entropy(F.linear(x.double(), weight.double()), target, label_smoothing=0.1)
    found = torchext.linear_cross_entropy(x, weight, target, label_smoothing=0.1)
    torch.testing.assert_close(found.double(), truth, rtol=2e-3, atol=0)

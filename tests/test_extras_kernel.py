"""The kernels of the extras: given logits, against the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from test_extras import as_tuple, truth
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import torchext
from torchext import _backend, _triton
from torchext.ops import extras_logits

# Of the norm, beyond what the definition in torch's ops errs: a rounding of the result.
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
EXTRAS: list[dict[str, Any]] = [
    {"z_loss": 0.1},
    {"softcap": 3.0},
    {"softcap": 30.0, "logit_scale": 0.5, "return_argmax": True},
    {"return_lse": True},
    {"logit_scale": -1.5, "z_loss": 1e-3},
    {"z_loss": 0.2, "softcap": 5.0, "logit_scale": -2.0, "return_lse": True, "return_argmax": True},
]
OPERATOR = torch.ops.torchext.cross_entropy_extras.default


def fewest(device: str) -> int:
    """The fewest classes that a device's kernel serves; of one the gradient is all cancellation."""
    return 16 if device == "cpu" and not _triton.interpreted else 2


@pytest.fixture
def kernel_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuses the definition to calls that are not of the eager backend."""
    attempt = extras_logits.attempt

    def insist(*args: Any) -> Any:
        found = attempt(*args)
        assert _backend._active == "eager" or found is not None, "no kernel served the call"
        return found

    monkeypatch.setattr(extras_logits, "attempt", insist)
    yield


def results(
    logits: Tensor, target: Tensor, upstream: list[Tensor], function: Any = None, **options: Any
) -> list[Tensor]:
    """The values, then the gradient."""
    leaf = logits.detach().requires_grad_()
    values = as_tuple((function or torchext.cross_entropy)(leaf, target, **options))
    floating = [value for value in values if value.is_floating_point()]
    grads = [g.to(v.dtype) for g, v in zip(upstream, floating, strict=False)]
    (grad,) = torch.autograd.grad(floating, leaf, grads)
    return [*(value.detach() for value in values), grad]


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_against_float64(
    kernel_alone: None,
    device: str,
    backend: str,
    dtype: torch.dtype,
    extras: dict[str, Any],
    reduction: str,
) -> None:
    for classes, kind, weighted, smoothing in (
        (fewest(device), "indices", True, 0.1),
        (33, "probabilities", True, 0.2),
        (50, "indices", False, 0.1),
        (91, "indices", False, 0.0),
        (2100, "probabilities", False, 0.0),
        (5003, "indices", True, 0.0),
    ):
        rows = 11 if _triton.interpreted else 39
        # On both sides of where tanh has a polynomial, in one group of vectors and in others.
        logits = (torch.randn(rows, classes) * torch.rand(rows, 1) * 9).to(device, dtype)
        target = torch.randint(classes, (rows,), dtype=torch.int32, device=device)
        target[1 + torch.randperm(rows - 1)[: rows // 5]] = -100
        if kind == "probabilities":
            target = torch.randn(rows, classes).softmax(1).to(device, dtype)
        weight = (torch.rand(classes) + 0.5).to(device, dtype) if weighted else None
        options = {
            **extras, "reduction": reduction, "label_smoothing": smoothing, "weight": weight
        }  # fmt: skip
        upstream = [torch.randn(rows if reduction == "none" else ()), torch.randn(rows)]
        upstream = [grad.to(device, dtype) for grad in upstream]
        ours = results(logits, target, upstream, **options)
        with torchext.use_backend("eager"):
            eager = results(logits, target, upstream, **options)
        options["weight"] = double(weight)
        index = target.long() if kind == "indices" else target.double()
        exact = results(logits.double(), index, upstream, truth, **options)
        for actual, stock, expected in zip(ours, eager, exact, strict=True):
            assert actual.dtype == stock.dtype and actual.shape == stock.shape
            if not actual.is_floating_point():
                continue  # rounding makes classes equal: see test_argmax_is_the_first
            allowed = FLOOR[dtype] * expected.norm() + (stock.double() - expected).norm()
            assert (actual.double() - expected).norm() <= allowed, (classes, kind)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_rows_that_are_not_finite(
    kernel_alone: None, device: str, backend: str, dtype: torch.dtype, softcap: float | None
) -> None:
    logits = torch.randn(9, 40, device=device)
    logits[0, 3], logits[1, 39], logits[2], logits[3, :20] = (
        math.nan, math.inf, -math.inf, -math.inf
    )  # fmt: skip
    logits[4, 5], logits[4, 6], logits[5, 0], logits[6] = math.inf, math.nan, -math.inf, math.nan
    logits = logits.to(dtype)
    for target in ([5] * 9, [-100] * 6 + [5] * 3):
        target = torch.tensor(target, device=device)
        for extras in ({"z_loss": 0.1}, {"return_lse": True}, {"return_argmax": True}):
            options = {**extras, "softcap": softcap, "reduction": "none"}
            upstream = [torch.randn(9, device=device) for _ in range(2)]
            ours = results(logits, target, upstream, **options)
            with torchext.use_backend("eager"):
                exact = results(logits.double(), target, upstream, **options)
            near = {"rtol": 1e-5, "atol": 1e-5}
            if dtype.itemsize == 2:
                near = {"rtol": 1e-2, "atol": 1e-2}
            for actual, other in zip(ours[:-1], exact[:-1], strict=True):
                rounds = backend == "eager" and dtype.itemsize == 2 and softcap is not None
                if rounds and not other.is_floating_point():
                    # Torch's ops round the logits that they cap: two near the largest may be equal.
                    capped = softcap * (logits.double() / softcap).tanh()
                    actual, other = (capped.gather(1, at[:, None]) for at in (actual, other))
                torch.testing.assert_close(actual.to(other.dtype), other, equal_nan=True, **near)
            # A row of which torch's gradient is NaN in parts is NaN in ours in at least those.
            nan = exact[-1].isnan()
            assert ours[-1][nan].isnan().all()
            whole = ~nan.any(1)
            assert whole.sum() >= 3
            torch.testing.assert_close(ours[-1][whole].double(), exact[-1][whole], **near)


def test_bits_depend_on_the_row_alone(kernel_alone: None, device: str, backend: str) -> None:
    def same(actual: Tensor, expected: Tensor) -> bool:
        # Torch's ops promise no bits.
        return torch.equal(actual, expected) or (
            backend == "eager" and torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
        )

    rows = 45 if _triton.interpreted else 300
    logits = torch.randn(rows, 517, device=device) * 4
    target = torch.randint(517, (rows,), device=device)
    options = {"softcap": 6.0, "z_loss": 0.1, "label_smoothing": 0.1, "return_lse": True}
    upstream = [torch.randn((), device=device), torch.randn(rows, device=device)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(logits, target, upstream, **options)
    finally:
        torch.set_num_threads(threads)
    for found, expected in zip(results(logits, target, upstream, **options), one, strict=True):
        assert same(found, expected)
    upstream = [torch.randn(rows, device=device) for _ in range(2)]
    whole = results(logits, target, upstream, reduction="none", **options)
    for part in (slice(0, 1), slice(17, 40), slice(rows - 1, rows)):
        given = [grad[part] for grad in upstream]
        found = results(logits[part], target[part], given, reduction="none", **options)
        for actual, expected in zip(found, whole, strict=True):
            assert same(actual, expected[part])


def test_layouts() -> None:
    """Rows apart are read in place; what is no row of contiguous classes has the definition."""
    whole = torch.randn(12, 60)
    given = (whole[::2], whole[:6, 5:45], whole[:, :6].t(), whole[:6, ::2], whole[0].expand(6, 60))
    for logits in given:
        target = torch.randint(logits.shape[1], (len(logits),))
        before = logits.clone()
        found = results(logits, target, [torch.tensor(1.7)], softcap=2.0, z_loss=0.1)
        other = results(before, target, [torch.tensor(1.7)], softcap=2.0, z_loss=0.1)
        assert torch.equal(logits, before)
        for actual, expected in zip(found, other, strict=True):
            torch.testing.assert_close(actual, expected)
    target = torch.randn(6, 120).softmax(1)[:, ::2]
    found = results(whole[:6], target, [torch.tensor(1.7)], z_loss=0.1)
    other = results(whole[:6], target.clone(), [torch.tensor(1.7)], z_loss=0.1)
    for actual, expected in zip(found, other, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_overlap(kernel_alone: None, device: str, backend: str, reduction: str) -> None:
    """Their gradient is of its own format: one of theirs would overlap, or be transposed."""
    leaf = torch.randn(24, device=device, requires_grad=True)
    target = torch.randint(20, (5,), device=device)
    found, expected = [], []
    for logits, into in (
        (leaf.unfold(0, 20, 1), found),
        (leaf.unfold(0, 20, 1).contiguous(), expected),
    ):
        values = torchext.cross_entropy(
            logits, target, z_loss=0.1, return_lse=reduction == "none", reduction=reduction
        )
        total = sum(value.sum() for value in as_tuple(values))
        into.extend([total.detach(), *torch.autograd.grad(total, leaf)])
    for actual, other in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, other)


def test_upstream_gradients_with_the_negative_bit(
    kernel_alone: None, device: str, backend: str
) -> None:
    logits = torch.randn(6, 40, device=device, requires_grad=True)
    target = torch.randint(40, (6,), device=device)
    negative = torch.randn(6, dtype=torch.complex64, device=device).conj().imag
    assert negative.is_neg()
    loss, lse = torchext.cross_entropy(logits, target, z_loss=0.1, return_lse=True)
    mean = torchext.cross_entropy(logits, target, softcap=3.0)
    plain = torchext.cross_entropy(logits.repeat(20, 2), target.repeat(20))
    for value, upstream in (
        (lse, negative),
        (loss, negative[0]),
        (mean, negative[0]),
        (plain, negative[0]),
    ):
        (expected,) = torch.autograd.grad(value, logits, upstream.resolve_neg(), retain_graph=True)
        (found,) = torch.autograd.grad(value, logits, upstream, retain_graph=True)
        torch.testing.assert_close(found, expected)
        if value is not lse and value is not loss:  # they share a node
            (found,) = torch.autograd.grad(value, logits, upstream)
            torch.testing.assert_close(found, expected)


def test_argmax_is_the_first(kernel_alone: None, device: str, backend: str) -> None:
    logits = torch.randint(4, (50, 70), device=device).float()
    logits[3, 20] = logits[3, 40] = math.nan
    target = torch.zeros(50, dtype=torch.long, device=device)
    _, argmax = torchext.cross_entropy(logits, target, return_argmax=True, softcap=9.0)
    assert torch.equal(argmax, logits.argmax(1))


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_in_place(
    kernel_alone: None,
    device: str,
    backend: str,
    dtype: torch.dtype,
    extras: dict[str, Any],
    reduction: str,
) -> None:
    """The same, in the logits' memory; nothing happens where the logits are needed again."""
    upstream = torch.randn(12 if reduction == "none" else (), dtype=dtype, device=device)
    for kind in ("indices", "probabilities"):
        leaf = torch.randn(12, 70).to(device, dtype).requires_grad_()
        logits, target = leaf + 0, torch.randint(70, (12,), device=device)
        target[3] = -100
        if kind == "probabilities":
            target = torch.randn(12, 70).softmax(1).to(device, dtype)
        before = logits.detach().clone()
        options = {**extras, "reduction": reduction, "label_smoothing": 0.1}
        found = as_tuple(torchext.cross_entropy(logits, target, inplace_backward=True, **options))
        plain = as_tuple(torchext.cross_entropy(leaf, target, **options))
        for actual, expected in zip(found, plain, strict=True):
            torch.testing.assert_close(actual, expected)
        overwritten = reduction != "none" and not extras.get("return_lse")
        # A gradient of float16 would underflow before it is multiplied by a loss scale.
        overwritten = overwritten and backend != "eager" and dtype is not torch.float16
        assert torch.equal(logits.detach(), before) is not overwritten
        (grad,) = torch.autograd.grad(found[0], logits, upstream)
        assert (grad.data_ptr() == logits.data_ptr()) is overwritten
        (expected,) = torch.autograd.grad(plain[0], leaf, upstream)
        torch.testing.assert_close(grad, expected)


def test_in_place_is_known_to_autograd(kernel_alone: None) -> None:
    leaf, target = torch.randn(6, 40, requires_grad=True), torch.randint(40, (6,))
    kept = leaf.sin()
    squares = kept.square()  # saves kept for its own backward
    loss = torchext.cross_entropy(kept, target, softcap=3.0, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares.sum()).backward()
    with torch.no_grad():
        before = leaf.clone()
        torchext.cross_entropy(leaf, target, softcap=3.0, inplace_backward=True)
    assert torch.equal(leaf, before)
    logits = leaf + 0
    with pytest.raises(IndexError):
        torchext.cross_entropy(logits, target + 40, softcap=3.0, inplace_backward=True)
    assert torch.equal(logits, leaf)


def test_derivatives_and_backward_again(kernel_alone: None) -> None:
    logits = torch.randn(5, 18, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, -100, 17, 3])

    def both(x: Tensor) -> Tensor:
        total, lse = torchext.cross_entropy(
            x, target, z_loss=0.1, softcap=2.0, logit_scale=1.5, return_lse=True
        )
        return total + lse.square().sum()

    def mean(x: Tensor) -> Tensor:
        return torchext.cross_entropy(x, target, z_loss=0.1, softcap=2.0)  # type: ignore[no-any-return]

    for function in (both, mean):
        assert torch.autograd.gradcheck(function, logits)
        assert torch.autograd.gradgradcheck(function, logits)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = logits.detach().to(dtype).requires_grad_()
        loss, upstream = mean(x), torch.tensor(3.0, dtype=dtype)
        (first,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        kept = first.clone()
        first.zero_()
        assert torch.equal(torch.autograd.grad(loss, x, upstream)[0], kept)
    logits.detach_()
    assert not mean(logits).requires_grad


def test_transforms() -> None:
    logits, target = torch.randn(6, 20, dtype=torch.float64), torch.randint(20, (6,))

    def loss(x: Tensor) -> Tensor:
        return torchext.cross_entropy(x, target, z_loss=0.1, softcap=2.0)  # type: ignore[no-any-return]

    def definition(x: Tensor) -> Tensor:
        return truth(x, target, z_loss=0.1, softcap=2.0)[0]

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(loss)(logits), transform(definition)(logits))
    tangent = torch.randn_like(logits)
    found = torch.func.jvp(loss, (logits,), (tangent,))
    torch.testing.assert_close(found, torch.func.jvp(definition, (logits,), (tangent,)))
    stacked = torch.stack([logits, -logits])
    torch.testing.assert_close(torch.func.vmap(loss)(stacked), torch.func.vmap(definition)(stacked))


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_compiled(kernel_alone: None, extras: dict[str, Any]) -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append({node.target for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        torchext.cross_entropy, fullgraph=True, dynamic=True,
        backend=aot_autograd(fw_compiler=backend),
    )  # fmt: skip
    for rows, dtype, reduction in (
        (20, torch.float32, "mean"), (33, torch.float32, "mean"), (20, torch.bfloat16, "none")
    ):  # fmt: skip
        logits, target = torch.randn(rows, 40).to(dtype), torch.randint(40, (rows,))
        upstream = [torch.randn(rows if reduction == "none" else ()), torch.randn(rows)]
        call = (logits, target, upstream)
        found = results(*call, compiled, reduction=reduction, **extras)
        expected = results(*call, reduction=reduction, **extras)
        for actual, other in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, other)
    assert any(OPERATOR in targets for targets in graphs)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(kernel_alone: None, dtype: torch.dtype) -> None:
    """It computes in float32, as stock's cross_entropy does."""
    logits, target = torch.randn(20, 40).to(dtype), torch.randint(40, (20,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(logits, target, [torch.tensor(1.5)], softcap=3.0, z_loss=0.1)
    wide = results(logits.float(), target, [torch.tensor(1.5)], softcap=3.0, z_loss=0.1)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], wide[0])
    assert torch.equal(found[1], wide[1].to(dtype))


def test_errors_come_before_the_kernel() -> None:
    logits = torch.randn(6, 20, requires_grad=True)
    for wrong in (20, -1):
        target = torch.tensor([0, 1, 2, wrong, 4, 5])
        for reduction in ("mean", "none"):
            with pytest.raises(IndexError, match=rf"^cross_entropy: .*Target {wrong} is out of"):
                torchext.cross_entropy(logits, target, z_loss=0.1, reduction=reduction)
        with pytest.raises(IndexError, match=rf"^linear_cross_entropy: .*Target {wrong} is out of"):
            torchext.linear_cross_entropy(logits, torch.randn(20, 20), target, z_loss=0.1)
    with pytest.raises(ValueError, match="batch"):
        torchext.cross_entropy(logits, torch.zeros(5).long(), z_loss=0.1)
    with pytest.raises(RuntimeError, match="weight"):
        torchext.cross_entropy(logits, torch.zeros(6).long(), torch.ones(19), z_loss=0.1)

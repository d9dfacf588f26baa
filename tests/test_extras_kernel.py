"""The CPU's kernel of the extras: given logits, against the definition in float64."""

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
from torchext import _backend
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
FORWARD = torch.ops.torchext.cross_entropy_extras_forward.default
ROWS = torch.ops.torchext.cross_entropy_extras_rows.default
MASS = torch.ops.torchext.cross_entropy_mass.default
PRODUCT = torch.ops.torchext.product_out.default
OPERATOR = torch.ops.torchext.cross_entropy_extras.default


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
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_against_float64(
    kernel_alone: None, dtype: torch.dtype, extras: dict[str, Any], reduction: str
) -> None:
    for classes, kind, weighted, smoothing in (
        (16, "indices", True, 0.1),
        (33, "probabilities", True, 0.2),
        (50, "indices", False, 0.1),
        (91, "indices", False, 0.0),
        (2100, "probabilities", False, 0.0),
        (5003, "indices", True, 0.0),
    ):
        rows = 39
        # On both sides of where tanh has a polynomial, in one group of vectors and in others.
        logits = (torch.randn(rows, classes) * torch.rand(rows, 1) * 9).to(dtype)
        target = torch.randint(classes, (rows,), dtype=torch.int32)
        target[torch.rand(rows) < 0.2] = -100
        if kind == "probabilities":
            target = torch.randn(rows, classes).softmax(1).to(dtype)
        weight = (torch.rand(classes) + 0.5).to(dtype) if weighted else None
        options = {
            **extras, "reduction": reduction, "label_smoothing": smoothing, "weight": weight
        }  # fmt: skip
        upstream = [torch.randn(rows if reduction == "none" else ()), torch.randn(rows)]
        upstream = [grad.to(dtype) for grad in upstream]
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_not_finite(
    kernel_alone: None, dtype: torch.dtype, softcap: float | None
) -> None:
    logits = torch.randn(9, 40)
    logits[0, 3], logits[1, 39], logits[2], logits[3, :20] = (
        math.nan, math.inf, -math.inf, -math.inf
    )  # fmt: skip
    logits[4, 5], logits[4, 6], logits[5, 0], logits[6] = math.inf, math.nan, -math.inf, math.nan
    logits = logits.to(dtype)
    for target in (torch.full((9,), 5), torch.tensor([-100] * 6 + [5] * 3)):
        for extras in ({"z_loss": 0.1}, {"return_lse": True}, {"return_argmax": True}):
            options = {**extras, "softcap": softcap, "reduction": "none"}
            upstream = [torch.randn(9), torch.randn(9)]
            ours = results(logits, target, upstream, **options)
            with torchext.use_backend("eager"):
                exact = results(logits.double(), target, upstream, **options)
            near = {"rtol": 1e-5, "atol": 1e-5}
            if dtype == torch.bfloat16:
                near = {"rtol": 1e-2, "atol": 1e-2}
            for actual, other in zip(ours[:-1], exact[:-1], strict=True):
                torch.testing.assert_close(actual.to(other.dtype), other, equal_nan=True, **near)
            # A row of which torch's gradient is NaN in parts is NaN in ours in at least those.
            nan = exact[-1].isnan()
            assert ours[-1][nan].isnan().all()
            whole = ~nan.any(1)
            assert whole.sum() >= 3
            torch.testing.assert_close(ours[-1][whole].double(), exact[-1][whole], **near)


def test_bits_depend_on_the_row_alone(kernel_alone: None) -> None:
    logits, target = torch.randn(300, 517) * 4, torch.randint(517, (300,))
    options = {"softcap": 6.0, "z_loss": 0.1, "label_smoothing": 0.1, "return_lse": True}
    upstream = [torch.randn(()), torch.randn(300)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(logits, target, upstream, **options)
    finally:
        torch.set_num_threads(threads)
    for found, expected in zip(results(logits, target, upstream, **options), one, strict=True):
        assert torch.equal(found, expected)
    upstream = [torch.randn(300), torch.randn(300)]
    whole = results(logits, target, upstream, reduction="none", **options)
    for part in (slice(0, 1), slice(17, 40), slice(299, 300)):
        given = [grad[part] for grad in upstream]
        found = results(logits[part], target[part], given, reduction="none", **options)
        for actual, expected in zip(found, whole, strict=True):
            assert torch.equal(actual, expected[part])


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


def test_argmax_is_the_first(kernel_alone: None) -> None:
    logits = torch.randint(4, (50, 70)).float()
    logits[3, 20] = logits[3, 40] = math.nan
    _, argmax = torchext.cross_entropy(
        logits, torch.zeros(50).long(), return_argmax=True, softcap=9.0
    )
    assert torch.equal(argmax, logits.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_in_place(
    kernel_alone: None, dtype: torch.dtype, extras: dict[str, Any], reduction: str
) -> None:
    """The same, in the logits' memory; nothing happens where the logits are needed again."""
    upstream = torch.randn(12 if reduction == "none" else (), dtype=dtype)
    for kind in ("indices", "probabilities"):
        leaf = torch.randn(12, 70).to(dtype).requires_grad_()
        logits, target = leaf + 0, torch.randint(70, (12,))
        target[3] = -100
        if kind == "probabilities":
            target = torch.randn(12, 70).softmax(1).to(dtype)
        before = logits.detach().clone()
        options = {**extras, "reduction": reduction, "label_smoothing": 0.1}
        found = as_tuple(torchext.cross_entropy(logits, target, inplace_backward=True, **options))
        plain = as_tuple(torchext.cross_entropy(leaf, target, **options))
        for actual, expected in zip(found, plain, strict=True):
            torch.testing.assert_close(actual, expected)
        overwritten = reduction != "none" and not extras.get("return_lse")
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


def rows_of(dtype: torch.dtype, rows: int = 7, classes: int = 20) -> dict[str, Any]:
    """Arguments of the kernel's operator."""
    return {
        "input": torch.randn(rows, classes).to(dtype),
        "target": torch.randint(classes, (rows,)),
        "weight": torch.rand(classes),
        "grad_loss": torch.randn(rows),
        "grad_lse": torch.randn(rows),
        "gradient": torch.empty(rows, classes, dtype=dtype),
        "loss": torch.empty(rows),
        "stats": torch.empty(2, rows),
        "argmax": torch.empty(rows, dtype=torch.int64),
    }


def call_rows(given: dict[str, Any]) -> None:
    names = ("input", "target", "weight")
    last = ("grad_loss", "grad_lse", "gradient", "loss", "stats", "argmax")
    options = (-100, 0.1, 0.2, 5.0, 1.5)
    ROWS(*(given[name] for name in names), *options, *(given[name] for name in last))


def test_what_the_operators_refuse() -> None:
    call_rows(rows_of(torch.float32))
    wrong: dict[str, Tensor] = {
        "input": torch.randn(7, 15),
        "target": torch.randint(20, (6,)),
        "weight": torch.rand(19),
        "grad_loss": torch.randn(6),
        "grad_lse": torch.randn(7).double(),
        "gradient": torch.empty(20, 7).t(),
        "loss": torch.empty(14)[::2],
        "stats": torch.empty(7, 2).t(),
        "argmax": torch.empty(7, dtype=torch.int32),
    }
    for name, value in wrong.items():
        with pytest.raises(RuntimeError, match="^cross_entropy_extras_rows: expected"):
            call_rows({**rows_of(torch.float32), name: value})
    given = rows_of(torch.float32)
    given["target"][3] = 20
    given["loss"].fill_(7.0)
    with pytest.raises(IndexError, match="Target 20 is out of bounds"):
        call_rows(given)
    assert (given["loss"] == 7.0).all()
    for bad, weight in ((torch.randn(5), None), (torch.zeros(5).long(), torch.rand(3))):
        with pytest.raises(RuntimeError, match="^cross_entropy_mass: expected"):
            MASS(bad, weight, 4, -100)


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = rows_of(dtype)
        logits, target = given["input"], given["target"]
        options = (-100, 0.1, 0.2, 5.0, 1.5, False)
        for reduction, save in ((0, False), (1, True), (2, False)):
            wanted = (reduction == 0, reduction == 1, save)
            call = (logits, target, given["weight"].to(dtype), reduction, *options, *wanted)
            torch.library.opcheck(FORWARD, call)
        torch.library.opcheck(MASS, (target, None, 20, -100))
        kept = (given[name] for name in ("grad_loss", "grad_lse", "gradient", "loss", "stats"))
        call = (logits, target, given["weight"], *options[:5], *kept, given["argmax"])
        torch.library.opcheck(ROWS, call, test_utils=("test_schema", "test_faketensor"))
        plain = (target, None, given["weight"].to(dtype))
        for reduction in (0, 1):
            came = (reduction == 1, False, False)
            end = (reduction, False, False, False, *came)
            torch.library.opcheck(OPERATOR, (logits, None, *plain, *options[:5], *end))


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_product_out(dtype: torch.dtype) -> None:
    for rows, inner, columns in ((1, 5, 3), (40, 70, 33), (300, 200, 500)):
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).t()
        bias, before = torch.randn(columns).to(dtype), torch.randn(rows, columns).to(dtype)
        for given, accumulate in ((None, False), (bias, False), (None, True)):
            out = before.clone()
            PRODUCT(left, right, given, accumulate, out)
            expected = left.double() @ right.double()
            expected += before.double() if accumulate else 0 if given is None else bias.double()
            error = (out.double() - expected).norm()
            assert error <= 2 * FLOOR[dtype] * expected.norm()
            call = (left, right, given, accumulate, out)
            torch.library.opcheck(PRODUCT, call, test_utils=("test_schema", "test_faketensor"))
    for wrong in (
        (left, right.t(), None, False, out),
        (left, right.double().half(), None, False, out.double()),
        (left, right, bias[1:], False, out),
        (left, right, bias, True, out),
    ):
        with pytest.raises(RuntimeError, match="^product_out: expected"):
            PRODUCT(*wrong)


def test_the_operator_has_every_shape_of_logits() -> None:
    """Without a kernel too: few classes, inner dimensions, transposed rows."""
    for logits in (torch.randn(30, 9), torch.randn(4, 20, 3, 2), torch.randn(20, 30).t()):
        shape = logits.shape[:1] + logits.shape[2:]
        target = torch.randint(logits.shape[1], shape)
        options = (-100, 0.1, 0.2, 5.0, 1.5, 1, False, True, True)
        leaf = logits.clone().requires_grad_()
        loss, lse, argmax, *_ = OPERATOR(
            leaf, None, target, None, None, *options, False, False, False
        )
        flat = logits.movedim(1, -1).flatten(0, -2).double().requires_grad_()
        expected = truth(
            flat, target.flatten(), label_smoothing=0.1, z_loss=0.2, softcap=5.0, logit_scale=1.5,
            return_lse=True, return_argmax=True,
        )  # fmt: skip
        upstream = [torch.randn(()), torch.randn(shape)]
        (grad,) = torch.autograd.grad([loss, lse], leaf, upstream)
        doubles = [upstream[0].double(), upstream[1].flatten().double()]
        (exact,) = torch.autograd.grad(expected[:2], flat, doubles)
        near = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(loss.double(), expected[0], **near)
        torch.testing.assert_close(lse.flatten().double(), expected[1], **near)
        assert torch.equal(argmax.flatten(), expected[2])
        found = grad.movedim(1, -1).flatten(0, -2).double()
        torch.testing.assert_close(found, exact, **near)

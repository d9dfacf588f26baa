"""The ops under PyTorch's transforms: each gives what it gives of the stock ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, func
from torch.autograd.functional import hessian, jacobian

import torchext
from torchext.testing import assert_drop_in

Function = Callable[..., Tensor]


@dataclass
class Case:
    """An op as a function of the tensors that it is differentiated by, of four rows."""

    name: str
    ours: Function
    stock: Function
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype) for shape in self.shapes]


def stock_linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def loss_case(name: str, shape: tuple[int, ...], dense: bool = False, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(len(name))
    classes, positions = shape[1], (*shape[:1], *shape[2:])
    target = torch.randint(classes, positions, generator=generator)
    if options.pop("weighted", False):
        options["weight"] = 0.5 + torch.rand(classes, generator=generator, dtype=torch.float64)

    def with_target(op: Function) -> Function:
        if dense:
            return lambda x, t: op(x, t.softmax(1), **options)
        return lambda x: op(x, target, **options)

    shapes = (shape, shape) if dense else (shape,)
    return Case(name, with_target(torchext.cross_entropy), with_target(F.cross_entropy), shapes)


def stock_head(
    input: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Any = None, **options: Any
) -> Tensor:
    logits = F.linear(input, weight.flatten(0, -2), linear_bias)
    return F.cross_entropy(logits.unflatten(1, weight.shape[:-1]), target, **options)


def head_case(name: str, *of_weight: int, dense: bool = False, **options: Any) -> Case:
    """Four rows of 3 features, and a weight (C, ..., H)."""
    generator = torch.Generator().manual_seed(len(name))
    target = torch.randint(of_weight[0], (4, *of_weight[1:-1]), generator=generator)

    def with_target(op: Function) -> Function:
        if dense:
            return lambda x, w, b: op(x, w, b.softmax(1), linear_bias=b[0], **options)
        return lambda x, w: op(x, w, target, **options)

    shapes = ((4, 3), of_weight, (4, of_weight[0])) if dense else ((4, 3), of_weight)
    ours = with_target(torchext.linear_cross_entropy)
    return Case(f"linear_cross_entropy-{name}", ours, with_target(stock_head), shapes)


CASES = [
    loss_case("cross_entropy-mean", (4, 5)),
    loss_case("cross_entropy-none", (4, 5, 3), reduction="none"),
    loss_case("cross_entropy-sum-smoothed", (4, 5, 3), reduction="sum", label_smoothing=0.1),
    loss_case("cross_entropy-weighted-ignored", (4, 5), weighted=True, ignore_index=2),
    loss_case("cross_entropy-probabilities", (4, 5), dense=True),
    head_case("mean", 5, 3),
    head_case("none-smoothed", 5, 3, reduction="none", label_smoothing=0.1),
    head_case("sum-ignored-dimensions", 5, 2, 3, reduction="sum", ignore_index=1),
    head_case("probabilities", 5, 3, dense=True),
    Case("linear_relu", torchext.linear_relu, stock_linear_relu, ((4, 3), (5, 3), (5,))),
    Case("linear_relu-3d", torchext.linear_relu, stock_linear_relu, ((4, 2, 3), (5, 3))),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """The calls are small: `auto` would give them to stock."""
    with torchext.use_backend("native"):
        yield


def scalar(function: Function) -> Function:
    """The function's value times fixed random numbers, summed."""

    def weighted(*args: Tensor) -> Tensor:
        output = function(*args)
        return (output * torch.arange(1, output.numel() + 1).reshape(output.shape).sin()).sum()

    return weighted


def assert_same(ours: Any, stock: Any) -> None:
    torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-11)


def all_of(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.shapes)))


# Each takes a function and its inputs. The same line of code runs on ours and on stock.
TRANSFORMS: dict[str, Callable[[Function, list[Tensor], tuple[int, ...]], Any]] = {
    "grad": lambda f, x, n: func.grad(scalar(f), n)(*x),
    "grad of grad": lambda f, x, n: func.grad(scalar(lambda *y: func.grad(scalar(f))(*y)), n)(*x),
    "vjp": lambda f, x, n: (lambda out, pull: (out, pull(torch.cos(out))))(*func.vjp(f, *x)),
    "jvp": lambda f, x, n: func.jvp(f, tuple(x), tuple(y.sin() for y in x)),
    "linearize": lambda f, x, n: func.linearize(f, *x)[1](*[y.cos() for y in x]),
    "jacrev": lambda f, x, n: func.jacrev(f, n)(*x),
    "jacfwd": lambda f, x, n: func.jacfwd(f, n)(*x),
    "hessian": lambda f, x, n: func.hessian(scalar(f), n)(*x),
    "jacrev of jacrev": lambda f, x, n: func.jacrev(func.jacrev(scalar(f), n), n)(*x),
    "forward over reverse": lambda f, x, n: func.jvp(
        func.grad(scalar(f)), tuple(x), tuple(y.sin() for y in x)
    ),
    "functionalize": lambda f, x, n: func.functionalize(f)(*x),
    "vmap of the first": lambda f, x, n: func.vmap(f, (0, *[None] * (len(x) - 1)))(
        torch.stack([x[0], x[0] * 2, -x[0]]), *x[1:]
    ),
    "vmap of all": lambda f, x, n: func.vmap(f)(*[torch.stack([y, y * 2, -y]) for y in x]),
    "vmap in and out of the middle": lambda f, x, n: func.vmap(
        lambda y: f(y, *x[1:]).flatten(), in_dims=1, out_dims=1
    )(torch.stack([x[0], -x[0]], 1)),
    "vmap of grad": lambda f, x, n: func.vmap(func.grad(scalar(f), n))(
        *[torch.stack([y, y * 2, -y]) for y in x]
    ),
    "grad of vmap": lambda f, x, n: func.grad(scalar(func.vmap(f)), n)(
        *[torch.stack([y, y * 2]) for y in x]
    ),
    "vmap of jvp": lambda f, x, n: func.vmap(lambda *y: func.jvp(f, y, tuple(z.sin() for z in y)))(
        *[torch.stack([y, -y]) for y in x]
    ),
    "vmap in chunks": lambda f, x, n: func.vmap(f, chunk_size=2)(
        *[torch.stack([y, y * 2, -y]) for y in x]
    ),
    "autograd jacobian": lambda f, x, n: jacobian(f, tuple(x)),
    "autograd jacobian, vectorized": lambda f, x, n: jacobian(f, tuple(x), vectorize=True),
    "autograd jacobian, forward": lambda f, x, n: jacobian(
        f, tuple(x), vectorize=True, strategy="forward-mode"
    ),
    "autograd hessian": lambda f, x, n: hessian(scalar(f), tuple(x)),
    "autograd hessian, vectorized": lambda f, x, n: hessian(scalar(f), tuple(x), vectorize=True),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transform(case: Case, transform: Callable[..., Any]) -> None:
    inputs = case.inputs()
    ours = transform(case.ours, inputs, all_of(case))
    assert_same(ours, transform(case.stock, inputs, all_of(case)))


def test_vmap_over_an_in_dim_with_random_targets() -> None:
    logits, target = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(5, (3, 4))
    ours = func.vmap(torchext.cross_entropy)(logits, target)
    assert_same(ours, torch.stack(list(map(F.cross_entropy, logits, target))))
    ours = func.vmap(torchext.cross_entropy, in_dims=(None, 0))(logits[0], target)
    assert_same(ours, torch.stack([F.cross_entropy(logits[0], t) for t in target]))


def test_per_sample_gradients_of_a_model() -> None:
    model = torch.nn.Sequential(torchext.nn.LinearReLU(4, 6), torch.nn.Linear(6, 3)).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    data, target = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))

    def loss(p: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        logits = func.functional_call(model, p, (x[None],))
        return torchext.cross_entropy(logits, t[None])

    batched = func.vmap(func.grad(loss), (None, 0, 0))(parameters, data, target)
    for i in range(5):
        model.zero_grad()
        F.cross_entropy(model(data[i : i + 1]), target[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            assert_same(batched[name][i], parameter.grad)


def test_forward_mode(case: Case) -> None:
    inputs = case.inputs()
    tangents = [torch.randn_like(x) for x in inputs]
    results = []
    for function in (case.ours, case.stock):
        with fwAD.dual_level():
            duals = [fwAD.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
            results.append(tuple(fwAD.unpack_dual(function(*duals))))
    assert_same(*results)


def test_forward_mode_of_a_backward_whose_forward_was_before(case: Case) -> None:
    """The upstream gradient has a tangent: so has the gradient."""
    inputs, results, upstream = case.inputs(), [], None
    for function in (case.ours, case.stock):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        upstream = torch.randn_like(output) if upstream is None else upstream
        with fwAD.dual_level():
            dual = fwAD.make_dual(upstream, upstream.sin())
            gradients = torch.autograd.grad(output, leaves, dual)
            results.append([fwAD.unpack_dual(gradient).tangent for gradient in gradients])
    assert all(tangent is not None for tangent in results[0])
    assert_same(*results)


def test_batched_gradients(case: Case) -> None:
    inputs = case.inputs()
    for create_graph in (False, True):
        results = []
        for function in (case.ours, case.stock):
            leaves = [x.clone().requires_grad_() for x in inputs]
            output = function(*leaves)
            upstream = torch.linspace(-1, 1, 3 * output.numel(), dtype=torch.float64)
            gradients = torch.autograd.grad(
                output,
                leaves,
                upstream.reshape(3, *output.shape),
                is_grads_batched=True,
                create_graph=create_graph,
            )
            assert [g.requires_grad for g in gradients] == [create_graph] * len(leaves)
            results.append([g.detach() for g in gradients])
        assert_same(*results)


def test_second_and_third_derivatives(case: Case) -> None:
    inputs = case.inputs()
    leaves = [x.requires_grad_() for x in inputs]
    assert_drop_in(case.ours, case.stock, *leaves, order=2)
    results = []
    for function in (case.ours, case.stock):
        value = scalar(function)(*leaves)
        for _ in range(2):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((g**2).sum() for g in gradients)  # type: ignore[assignment]
        results.append(torch.autograd.grad(value, leaves))
    assert_same(*results)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(autocast_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The dtypes of result and gradients, and where autocast is switched off inside."""
    input, weight, bias = (torch.randn(s).to(dtype) for s in ((6, 4), (5, 4), (5,)))
    target = torch.randint(5, (6,))
    calls: list[tuple[Function, Function, list[Tensor]]] = [
        (torchext.linear_relu, stock_linear_relu, [input, weight, bias]),
        (torchext.linear_relu, stock_linear_relu, [input, weight]),
        (
            lambda x, w=None: torchext.cross_entropy(x, target, w),
            lambda x, w=None: F.cross_entropy(x, target, w),
            [input @ weight.t()],
        ),
        (
            lambda x: torchext.cross_entropy(x, x.detach().softmax(1), reduction="none"),
            lambda x: F.cross_entropy(x, x.detach().softmax(1), reduction="none"),
            [input @ weight.t()],
        ),
    ]
    for ours, stock, inputs in calls:
        results = []
        for function in (ours, stock):
            leaves = [x.detach().requires_grad_() for x in inputs]
            with torch.autocast("cpu", autocast_dtype):
                output = function(*leaves)
                with torch.autocast("cpu", enabled=False):
                    inner = function(*leaves)
            gradients = torch.autograd.grad(output.float().sum() + inner.float().sum(), leaves)
            results.append([output.detach(), inner.detach(), *gradients])
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


def test_autocast_mixes_dtypes_as_stock() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        x, w, b = torch.randn(3, 4).bfloat16(), torch.randn(5, 4), torch.randn(5)
        for function in (torchext.linear_relu, stock_linear_relu):
            assert function(x, w, b).dtype == torch.bfloat16
        logits, target, weight = x.float(), torch.tensor([0, 1, 2]), torch.rand(4).bfloat16()
        ours = torchext.cross_entropy(logits.bfloat16(), target, weight, label_smoothing=0.1)
        stock = F.cross_entropy(logits.bfloat16(), target, weight, label_smoothing=0.1)
        torch.testing.assert_close(ours, stock)
        ours = torchext.cross_entropy(logits, x.softmax(1))
        torch.testing.assert_close(ours, F.cross_entropy(logits, x.softmax(1)))

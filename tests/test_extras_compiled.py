"""The extras of linear_cross_entropy captured: compiled, exported, traced, they keep chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_extras_chunks import EXTRAS, check, chunks_alone, definition, results  # noqa: F401
from torch import Tensor, func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import torchext
from torchext.ops import extras_autograd

FORWARD = torch.ops.torchext.cross_entropy_extras.default
BACKWARD = torch.ops.torchext.cross_entropy_extras_backward.default
Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(**how: Any) -> Function:
    """Compiled anew: each case is a graph of its own, and a function may have but eight."""
    torch.compiler.reset()
    how = {"backend": "aot_eager", **how}
    return torch.compile(torchext.linear_cross_entropy, fullgraph=True, **how)


def case(
    kind: str,
    dtype: torch.dtype,
    biased: bool,
    inner: tuple[int, ...] = (),
    rows: int = 40,
    classes: int = 50,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Leaves, target, and upstream gradients of a scalar, of the positions and of the lse."""
    leaves = [torch.randn(rows, 12), torch.randn(classes, *inner, 12) * 0.5]
    leaves += [torch.randn(classes, *inner)] if biased else []
    target = torch.randint(classes, (rows, *inner), dtype=torch.int32)
    target[torch.rand(target.shape) < 0.2] = -100
    if kind == "probabilities":
        target = torch.randn(rows, classes, *inner).softmax(1).to(dtype)
    upstream = [torch.randn(shape).to(dtype) for shape in ((), (rows, *inner), (rows, *inner))]
    return [leaf.to(dtype) for leaf in leaves], target, upstream


def same(found: Any, expected: Any) -> None:
    """Up to the second rounding of the loss, which the operator gives in its sums' dtype."""
    for actual, other in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, other)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast", "kind", "inner"),
    [
        (torch.float64, None, "indices", (2, 3)),
        (torch.float32, None, "probabilities", ()),
        (torch.bfloat16, None, "indices", ()),
        (torch.float16, None, "probabilities", (2,)),
        (torch.float32, torch.bfloat16, "indices", ()),
        (torch.float32, torch.bfloat16, "probabilities", ()),
    ],
    ids=str,
)
def test_compiled_chunks_are_the_eager_ones(
    chunks_alone: None,  # noqa: F811
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    kind: str,
    inner: tuple[int, ...],
    extras: dict[str, Any],
    reduction: str,
) -> None:
    weighted = biased = "softcap" in extras or reduction == "sum"
    leaves, target, (scalar, of_loss, of_lse) = case(kind, dtype, biased, inner)
    upstream = [of_loss if reduction == "none" else scalar, of_lse]
    options = {
        **extras,
        "reduction": reduction,
        "weight": (torch.rand(50) + 0.5).to(dtype) if weighted else None,
        "label_smoothing": 0.1 if weighted else 0.0,
    }
    found = check(leaves, target, upstream, autocast, options, compiled())
    expected = results(leaves, target, upstream, autocast, **options)
    same(found[0], expected[0])
    same(found[1], expected[1])


@pytest.mark.parametrize("extras", EXTRAS[1:5:3], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dynamic_shapes(
    chunks_alone: None,  # noqa: F811
    extras: dict[str, Any],
    reduction: str,
) -> None:
    """One graph for every number of rows and classes, and of leading dimensions (B, T)."""
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(backend=counter, dynamic=True)
    for batch, length, classes in ((2, 9, 30), (3, 20, 41), (5, 7, 33)):
        leaves, target, (scalar, of_loss, of_lse) = case(
            "indices", torch.float32, True, (), batch * length, classes
        )
        leaves[0] = leaves[0].view(batch, length, -1)
        target, of_loss, of_lse = (t.view(batch, length) for t in (target, of_loss, of_lse))
        upstream = [of_loss if reduction == "none" else scalar, of_lse]
        options = {**extras, "reduction": reduction, "label_smoothing": 0.1}
        found = check(leaves, target, upstream, None, options, call)
        for ours, eager in zip(found, results(leaves, target, upstream, **options), strict=True):
            same(ours, eager)
    # Dynamo begins with an empty one, of the dispatch to tensor subclasses.
    assert sum(len(graph.graph.nodes) > 1 for graph in counter.graphs) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(chunks_alone: None, dynamic: bool) -> None:  # noqa: F811
    call = compiled(backend="inductor", dynamic=dynamic)
    for rows in (33, 50) if dynamic else (33,):
        for dtype, extras in (
            (torch.float32, EXTRAS[4]),
            (torch.bfloat16, {"softcap": 3.0, "z_loss": 0.1}),
        ):
            leaves, target, (scalar, _, of_lse) = case("indices", dtype, True, (), rows)
            found = check(leaves, target, [scalar, of_lse], None, extras, call)
            for ours, eager in zip(
                found, results(leaves, target, [scalar, of_lse], **extras), strict=True
            ):
                same(ours, eager)


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(found):
            if isinstance(leaf, Tensor):
                Largest.elements = max(Largest.elements, leaf.numel())
        return found


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_is_as_large_as_the_logits(
    chunks_alone: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    extras: dict[str, Any],
    reduction: str,
) -> None:
    """Neither in the graphs nor inside the operators."""
    rows, classes = 100, 90
    in_graphs: list[int] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
                in_graphs.append(value.numel() if isinstance(value, Tensor) else 0)
        return graph

    for name in ("forward", "again"):
        function = getattr(extras_autograd, name)

        def watched(*args: Any, function: Function = function) -> Any:
            with Largest():
                return function(*args)

        monkeypatch.setattr(extras_autograd, name, watched)
    Largest.elements = 0
    leaves, target, (scalar, of_loss, of_lse) = case(
        "indices", torch.float32, True, (), rows, classes
    )
    upstream = [of_loss if reduction == "none" else scalar, of_lse]
    call = compiled(backend=aot_autograd(fw_compiler=look))
    results(leaves, target, upstream, None, call, reduction=reduction, **extras)
    assert rows * 12 <= max(in_graphs) < rows * classes
    assert 16 * classes <= Largest.elements < rows * classes


class Head(torch.nn.Module):
    def __init__(self, **extras: Any) -> None:
        super().__init__()
        self.loss = torchext.nn.LinearCrossEntropyLoss(6, 9, bias=True, **extras)

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.loss(x, target)


@pytest.mark.parametrize("strict", [False, True])
def test_export(chunks_alone: None, strict: bool) -> None:  # noqa: F811
    rows = torch.export.Dim("rows", min=2)
    head = Head(**EXTRAS[4])
    program = torch.export.export(
        head,
        (torch.randn(20, 6), torch.randint(9, (20,))),
        dynamic_shapes=({0: rows}, {0: rows}),
        strict=strict,
    )
    program = program.run_decompositions()
    assert FORWARD in {node.target for node in program.graph.nodes}
    for size in (2, 37):
        x, target = torch.randn(size, 6), torch.randint(9, (size,))
        same(program.module()(x, target), head(x, target))
        x.requires_grad_()  # the exported call has no gradients that came with the loss
        found = program.module()(x, target)[0], head(x, target)[0]
        same(*(torch.autograd.grad(loss, x, torch.tensor(1.7)) for loss in found))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(chunks_alone: None, mode: str) -> None:  # noqa: F811
    linear_weight = torch.randn(9, 6)

    def gradient(x: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        loss, lse = torchext.linear_cross_entropy(
            x, linear_weight, target, z_loss=0.1, return_lse=True, reduction="none"
        )
        return loss, lse, *torch.autograd.grad((loss, lse), x, (upstream, upstream.cos()))

    def arguments(rows: int) -> tuple[Tensor, ...]:
        return torch.randn(rows, 6), torch.randint(9, (rows,)), torch.randn(rows)

    graph = make_fx(gradient, tracing_mode=mode, _allow_non_fake_inputs=True)(*arguments(20))
    assert {FORWARD, BACKWARD} <= {node.target for node in graph.graph.nodes}
    for rows in (20, 35) if mode == "symbolic" else (20,):
        given = arguments(rows)
        same(graph(*given), gradient(*given))


def test_what_looks_at_a_call_sees_the_operator(chunks_alone: None) -> None:  # noqa: F811
    leaves, target, (scalar, *_) = case("indices", torch.float32, False)
    for dtype in (torch.float32, torch.bfloat16):
        call = ([leaf.to(dtype) for leaf in leaves], target, [scalar])
        expected = results(*call, **EXTRAS[1])
        with torch.profiler.profile() as profile:
            found = results(*call, **EXTRAS[1])
        assert "torchext::cross_entropy_extras" in {event.name for event in profile.events()}
        with Largest():
            watched = results(*call, **EXTRAS[1])
        for ours in (found, watched):
            same(ours[0], expected[0])
            same(ours[1], expected[1])


def test_a_trace_needs_no_python() -> None:
    """It has the definition: the operator's kernel would not be there."""
    leaves, target, (scalar, *_) = case("indices", torch.float32, False)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return torchext.linear_cross_entropy(x, w, target, z_loss=0.1)  # type: ignore[no-any-return]

    traced = torch.jit.trace(loss, tuple(leaves), check_trace=False)
    assert "cross_entropy_extras" not in str(traced.graph)
    x, w = (leaf.requires_grad_() for leaf in leaves)
    torch.testing.assert_close(traced(x, w), loss(x, w))


def test_transforms_inside_a_compiled_call() -> None:
    leaves, target, _ = case("indices", torch.float64, False)
    x, w = leaves

    def loss(x: Tensor) -> Tensor:
        total, lse = torchext.linear_cross_entropy(
            x, w, target.long(), z_loss=0.1, softcap=3.0, return_lse=True
        )
        return total + lse.square().sum()

    for function in (
        func.grad(loss),
        lambda x: func.vmap(loss)(torch.stack([x, -x])),
        lambda x: func.jvp(loss, (x,), (x.sin(),)),
    ):
        torch.compiler.reset()
        call = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(call(x), function(x))


def sample(kind: str, dtype: torch.dtype, inner: tuple[int, ...], weighted: bool) -> list[Any]:
    """input, linear_weight, target, linear_bias, weight."""
    leaves, target, _ = case(kind, dtype, weighted, inner, 6, 5)
    x, w, *b = leaves
    return [x, w, target, b[0] if b else None, torch.rand(5).to(dtype) if weighted else None]


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("inner", [(), (2, 1)], ids=str)
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(kind: str, inner: tuple[int, ...], reduction: int) -> None:
    for weighted, softcap, lse in ((False, None, False), (True, 2.0, False), (True, 3.0, True)):
        tensors = sample(kind, torch.float32, inner, weighted)
        again = (-100, 0.1, 0.2, softcap, 1.5)
        options = (*again, reduction, reduction == 1, lse, lse)
        came = [reduction > 0 and not lse] * 3
        for grad, wanted in ((False, [False] * 3), (True, came)):
            leaves = [
                t.clone().requires_grad_(grad and i in (0, 1, 3)) if t is not None else None
                for i, t in enumerate(tensors)
            ]
            torch.library.opcheck(FORWARD, (*leaves, *options, *wanted))
        _, _, _, stats, mass, *_ = FORWARD(*tensors, *options, *[False] * 3)
        of_loss = torch.randn(stats[0].shape if reduction == 0 else ())
        of_lse = torch.randn_like(stats[0]) if lse else None
        for needed in ((True, True, True), (False, True, False), (True, False, True)):
            call = (of_loss, of_lse, *tensors, stats, mass, *again, *needed)
            torch.library.opcheck(BACKWARD, call)
        if lse:
            torch.library.opcheck(BACKWARD, (None, *call[1:]))


def test_the_operators_own_derivatives() -> None:
    """Twice, and again through the same graph, whose gradients must not have been scaled."""
    x, w, target, b, weight = sample("indices", torch.float64, (2, 2), True)
    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]

    def operator(came: bool, reduction: int, lse: bool) -> Function:
        options = (-100, 0.1, 0.2, 2.0, 1.5, reduction, False, lse, False, came, came, came)

        def call(x: Tensor, w: Tensor, b: Tensor) -> Any:
            return FORWARD(x, w, target, b, weight, *options)[: 2 if lse else 1]

        return call

    for came, reduction, lse in ((True, 1, False), (False, 0, True), (True, 2, True)):
        call = operator(came, reduction, lse)
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)
    (loss,) = operator(True, 1, False)(*leaves)
    upstream = torch.tensor(3.0, dtype=torch.float64)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    same(first, torch.autograd.grad(loss, leaves, upstream))


def test_what_the_operator_refuses() -> None:
    x, w, target, _, _ = sample("indices", torch.float32, (), False)
    options = (-100, 0.0, 0.1, None, 1.0, 0, False, False, False)
    nothing = (False, False, False)
    for wrong in (
        (x[:, :3], w, target, None, None),
        (x, w, target[:3], None, None),
        (x, w, target, w[0], None),
        (x[None], w, target[None], None, None),
        (x, w.double(), target, None, None),
    ):
        with pytest.raises(RuntimeError, match="^cross_entropy_extras: expected input"):
            FORWARD(*wrong, *options, *nothing)
    with pytest.raises(RuntimeError, match="expected reduction mean or sum"):
        FORWARD(x, w, target, None, None, *options, True, False, False)


def test_errors_and_what_is_empty(chunks_alone: None) -> None:  # noqa: F811
    x, w = torch.randn(20, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    for wrong in (9, -1):
        with pytest.raises(IndexError, match="is out of bounds"):
            compiled()(x, w, torch.full((20,), wrong), z_loss=0.1)
    # An exported call may come to have no rows.
    given = (torch.empty(0, 6), w, torch.empty(0, dtype=torch.long), None, None)
    options = (-100, 0.0, 0.1, 2.0, 1.0)
    for reduction in (0, 1, 2):
        wanted = (False, True, False)
        came = wanted if reduction else (False, False, False)
        loss, *_ = FORWARD(*given, *options, reduction, False, False, False, *came)
        stock = torch.nn.functional.cross_entropy(
            given[0] @ w.t(), given[2], reduction=("none", "mean", "sum")[reduction]
        )
        torch.testing.assert_close(loss, stock, equal_nan=True)
        (grad,) = torch.autograd.grad(loss, w, torch.ones_like(loss))
        assert torch.equal(grad, torch.zeros_like(w))


def test_the_definition_serves_what_is_empty_and_the_eager_backend() -> None:
    for rows, backend in ((0, "auto"), (5, "eager")):
        x, w = torch.randn(rows, 6), torch.randn(9, 6)
        target = torch.randint(9, (rows,))
        with torchext.use_backend(backend):
            found = compiled()(x, w, target, z_loss=0.1, reduction="none")
        torch.testing.assert_close(
            found, torchext.linear_cross_entropy(x, w, target, z_loss=0.1, reduction="none")
        )

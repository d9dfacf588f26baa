"""linear_cross_entropy with few logits, kept for backward: the bits of the other way, the calls of
the operators by hand, and who may change what in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchext
from torchext.ops import linear_cross_entropy_kept as kept

OPS = torch.ops.torchext
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Heads of few classes (narrow, by dot products, of more features than those) and of many.
SHAPES = ((7, 5, 3), (90, 300, 9), (40, 1030, 4), (33, 40, 16), (150, 70, 90), (1, 9, 1))


def draw(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rows, features, classes = shape
    target = torch.randint(classes, (rows,))
    target[0] = -100 if rows > 1 else 0
    return {
        "input": torch.randn(rows, features, dtype=dtype, requires_grad=True),
        "linear_weight": torch.randn(classes, features, dtype=dtype, requires_grad=True),
        "target": target,
        "linear_bias": torch.randn(classes, dtype=dtype, requires_grad=True),
    }


def results(call: dict[str, Tensor], upstream: Tensor, **options: Any) -> list[Tensor]:
    with torchext.use_backend("native"):
        loss = torchext.linear_cross_entropy(**call, **options)
    leaves = [tensor for tensor in call.values() if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_or_made_again_the_bits_are_the_same(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = draw(shape, dtype)
    upstream = torch.randn(shape[0], dtype=dtype)
    weight = torch.rand(shape[2], dtype=dtype)
    ran = []
    apply, keeps = kept.differentiable, kept.keeps
    monkeypatch.setattr(kept, "differentiable", lambda *args: ran.append(1) or apply(*args))
    for options in ({}, {"weight": weight}, {"label_smoothing": 0.1}):
        monkeypatch.setattr(kept, "keeps", keeps)
        ours = results(call, upstream, reduction="none", **options)
        assert ran.pop()
        monkeypatch.setattr(kept, "keeps", lambda *_: False)
        again = results(call, upstream, reduction="none", **options)
        assert not ran
        for one, other in zip(ours, again, strict=True):
            assert torch.equal(one, other)


def test_more_logits_than_are_kept() -> None:
    call = draw((2100, 8, 1024))
    assert not kept.keeps(call["input"], call["linear_weight"], 0)
    upstream = torch.randn(2100)
    found = results(call, upstream, reduction="none")
    leaves = [call[name] for name in ("input", "linear_weight", "linear_bias")]
    logits = F.linear(*(leaf.double() for leaf in leaves))
    loss = F.cross_entropy(logits, call["target"], reduction="none")
    truth = [loss, *torch.autograd.grad(loss, leaves, upstream.double())]
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_mean_in_bfloat16(scale: float) -> None:
    """Kept or not, a gradient is rounded once: no further from the truth than eager's."""
    call = draw((260, 130, 128), torch.bfloat16)
    leaves = [call[name] for name in ("input", "linear_weight", "linear_bias")]
    assert kept.keeps(*leaves[:2], 1)
    assert not kept.keeps(leaves[0][:100], leaves[1], 1)
    upstream = torch.tensor(scale, dtype=torch.bfloat16)
    found = results(call, upstream)[1:]
    stock = F.cross_entropy(F.linear(*leaves), call["target"])
    eager = torch.autograd.grad(stock, leaves, upstream)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = torch.autograd.grad(
        F.cross_entropy(F.linear(*wide), call["target"]), wide, upstream.double()
    )
    # Of the bias's few values the errors are a matter of luck.
    for ours, its, exact in list(zip(found, eager, truth, strict=True))[:2]:
        error, allowed = (torch.linalg.vector_norm(x.double() - exact) for x in (ours, its))
        assert error <= allowed * 1.02


def test_twice_through_the_graph_and_again_through_the_gradient() -> None:
    call = draw((20, 6, 30), torch.float64)
    leaves = [call[name] for name in ("input", "linear_weight", "linear_bias")]
    upstream = torch.randn(20, dtype=torch.float64)
    with torchext.use_backend("native"):
        loss = torchext.linear_cross_entropy(**call, reduction="none")
    first, second = (torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for _ in "12")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    stock = F.cross_entropy(F.linear(*leaves), call["target"], reduction="none")
    both = []
    for one in (loss, stock):
        grads = torch.autograd.grad(one, leaves, upstream, create_graph=True)
        both.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves))
    for ours, expected in zip(*both, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["input", "linear_weight"])
def test_what_backward_reads_may_not_change(name: str) -> None:
    call = draw((20, 6, 30))
    with torchext.use_backend("native"):
        loss = torchext.linear_cross_entropy(**call, reduction="none")
    with torch.no_grad():
        call[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 3, (5, 2))], ids=str)
def test_the_operators_pass_opcheck(shape: Any, dtype: torch.dtype) -> None:
    rows, features, classes = shape
    sizes = classes if isinstance(classes, tuple) else (classes,)
    input, linear_weight = torch.randn(rows, features), torch.randn(*sizes, features)
    target = torch.randint(sizes[0], (rows, *sizes[1:]))
    tensors = (input.to(dtype), linear_weight.to(dtype), target, torch.randn(sizes).to(dtype), None)
    for code in (0, 1):
        options = (code, -100, 0.1)
        torch.library.opcheck(OPS.linear_cross_entropy_kept_forward.default, (*tensors, *options))
        loss, stats, logits = OPS.linear_cross_entropy_kept_forward(*tensors, *options)
        torch.library.opcheck(
            OPS.linear_cross_entropy_kept_backward.default,
            (torch.randn_like(loss), logits, *tensors, stats, *options, True, True, True),
        )


def test_the_operator_has_its_gradient() -> None:
    call = draw((9, 4, 20), torch.float64)

    def loss(*leaves: Tensor) -> Tensor:
        input, linear_weight, bias = leaves
        rest = (bias, None, 0, -100, 0.0)
        operator = OPS.linear_cross_entropy_kept_forward
        return operator(input, linear_weight, call["target"], *rest)[0]  # type: ignore[no-any-return]

    leaves = tuple(call[name] for name in ("input", "linear_weight", "linear_bias"))
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[:, :-1],
        lambda logits: logits[:-1],
        lambda logits: logits.double(),
        lambda logits: logits.t().contiguous().t(),
        lambda logits: logits.new_empty(0),
    ],
    ids=["columns", "rows", "dtype", "layout", "nothing"],
)
@pytest.mark.parametrize("classes", [3, 30])
def test_logits_that_forward_did_not_keep_are_refused(classes: int, change: Any) -> None:
    call = draw((20, 6, classes))
    tensors = (*(tensor.detach() for tensor in call.values()), None)
    options = (0, -100, 0.0)
    loss, stats, logits = OPS.linear_cross_entropy_kept_forward(*tensors, *options)
    with pytest.raises(RuntimeError, match="linear_cross_entropy_backward: expected logits"):
        OPS.linear_cross_entropy_kept_backward(
            loss, change(logits), *tensors, stats, *options, True, True, True
        )

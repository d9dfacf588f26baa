"""The losses' extras against their definition in float64, with gradients."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchext
import torchext.nn

EXTRAS: list[dict[str, Any]] = [
    {"z_loss": 0.1},
    {"softcap": 3.0},
    {"logit_scale": 0.5},
    {"return_lse": True},
    {"return_argmax": True},
    {"ignored_mean": "zero"},
    {"z_loss": 0.2, "softcap": 5.0, "logit_scale": 2.0, "return_lse": True, "return_argmax": True},
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "weight": True},
    {"reduction": "none", "weight": True},
]


def truth(
    x: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_lse: bool = False,
    return_argmax: bool = False,
    ignored_mean: str = "nan",
) -> tuple[Tensor, ...]:
    """The definition, over rows (N, C), term by term."""
    z = x * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    lse = z.exp().sum(1).log()
    like = {"dtype": x.dtype, "device": x.device}  # not new_ones: under vmap it is batched
    ones = torch.ones(x.shape[1], **like) if weight is None else weight
    if target.is_floating_point():
        t, kept = target, torch.ones(len(x), **like)
        masses = kept
    else:
        kept = (target != -100).to(x.dtype)
        safe = target.clamp(min=0)
        t, masses = F.one_hot(safe, x.shape[1]).to(x.dtype), ones[safe] * kept
    q = ones * ((1 - label_smoothing) * t + label_smoothing / x.shape[1])
    rows = kept * (-(q * (z - lse[:, None])).sum(1) + z_loss * lse**2)
    loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / masses.sum()}[reduction]
    if reduction == "mean" and masses.sum() == 0 and ignored_mean == "zero":
        loss = rows.sum()
    return (loss, *([lse] if return_lse else []), *([z.argmax(1)] if return_argmax else []))


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check(
    found: Any, expected: tuple[Tensor, ...], leaves: list[Tensor], wide: list[Tensor]
) -> None:
    found = as_tuple(found)
    assert len(found) == len(expected)
    upstream = [torch.randn(value.shape, dtype=torch.float64) for value in expected]
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value.to(other.dtype), other, rtol=1e-5, atol=1e-5)
    floating = [i for i, value in enumerate(expected) if value.is_floating_point()]
    total = sum((found[i].double() * upstream[i]).sum() for i in floating)
    other_total = sum((expected[i] * upstream[i]).sum() for i in floating)
    grads = torch.autograd.grad(total, leaves)  # type: ignore[arg-type]
    others = torch.autograd.grad(other_total, wide)  # type: ignore[arg-type]
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad.double(), other, rtol=1e-4, atol=1e-5)


def targets(rows: int, classes: int, kind: str) -> Tensor:
    if kind == "probabilities":
        return torch.randn(rows, classes).softmax(1)
    target = torch.randint(classes, (rows,))
    target[1] = -100
    return target


def case(options: dict[str, Any], classes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    weight = torch.rand(classes) + 0.5 if options.get("weight") else None
    found = {**options, "weight": weight}
    return found, {**options, "weight": None if weight is None else weight.double()}


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("which", ["auto", "native", "eager"])
def test_cross_entropy(
    which: str, extras: dict[str, Any], options: dict[str, Any], kind: str
) -> None:
    x = torch.randn(7, 11, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    target = targets(7, 11, kind)
    ours, theirs = case(options, 11)
    double = target.double() if kind == "probabilities" else target
    with torchext.use_backend(which):
        found = torchext.cross_entropy(x, target, **ours, **extras)
    check(found, truth(wide, double, **theirs, **extras), [x], [wide])


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_linear_cross_entropy(extras: dict[str, Any], options: dict[str, Any], kind: str) -> None:
    tensors = [torch.randn(shape) for shape in ((7, 6), (11, 6), (11,))]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    target = targets(7, 11, kind)
    ours, theirs = case(options, 11)
    double = target.double() if kind == "probabilities" else target
    x, w, b = leaves
    found = torchext.linear_cross_entropy(x, w, target, linear_bias=b, **ours, **extras)
    expected = truth(F.linear(*wide), double, **theirs, **extras)
    check(found, expected, leaves, wide)


def test_shapes_of_positions_and_sequences() -> None:
    """(N, C, d) and (B, T, H): lse and argmax have the shape of the targets."""
    x, target = torch.randn(2, 5, 3), torch.randint(5, (2, 3))
    loss, lse, argmax = torchext.cross_entropy(
        x, target, reduction="none", z_loss=0.1, return_lse=True, return_argmax=True
    )
    assert loss.shape == lse.shape == argmax.shape == target.shape
    torch.testing.assert_close(lse, x.logsumexp(1))
    h, w = torch.randn(2, 3, 4), torch.randn(5, 4)
    loss, lse, argmax = torchext.linear_cross_entropy(
        h, w, target, reduction="none", return_lse=True, return_argmax=True
    )
    assert loss.shape == lse.shape == argmax.shape == target.shape
    assert torch.equal(argmax, (h @ w.T).argmax(-1))
    x = torch.randn(5)
    loss, lse = torchext.cross_entropy(x, torch.tensor(2), z_loss=0.1, return_lse=True)
    torch.testing.assert_close(loss, lse - x[2] + 0.1 * lse**2)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_over_no_target(weighted: bool) -> None:
    x, target = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    weight = torch.rand(5) if weighted else None
    for z_loss in (0.0, 0.1):
        nan = torchext.cross_entropy(x, target, weight, z_loss=z_loss)
        zero = torchext.cross_entropy(x, target, weight, z_loss=z_loss, ignored_mean="zero")
        assert torch.isnan(nan)
        assert zero == 0
        assert torch.equal(torch.autograd.grad(zero, x)[0], torch.zeros(3, 5))
    w = torch.randn(5, 4)
    h = torch.randn(3, 4, requires_grad=True)
    zero = torchext.linear_cross_entropy(h, w, target, weight=weight, ignored_mean="zero")
    assert zero == 0
    assert torch.equal(torch.autograd.grad(zero, h)[0], torch.zeros(3, 4))


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_modules(extras: dict[str, Any]) -> None:
    x, target = torch.randn(6, 8), torch.randint(5, (6,))
    head = torchext.nn.LinearCrossEntropyLoss(8, 5, bias=True, **extras)
    logits = head.linear(x)
    losses = torchext.nn.CrossEntropyLoss(**extras)(logits, target)
    expected = as_tuple(torchext.cross_entropy(logits, target, **extras))
    for found in (losses, head(x, target)):
        for value, other in zip(as_tuple(found), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_what_is_printed() -> None:
    """The extras in a module's repr, after what stock shows; the op's name in the graph."""
    assert repr(torchext.nn.CrossEntropyLoss()) == "CrossEntropyLoss()"
    module = torchext.nn.CrossEntropyLoss(softcap=3.0, return_lse=True)
    assert repr(module) == "CrossEntropyLoss(softcap=3.0, return_lse=True)"
    module = torchext.nn.CrossEntropyLoss(inplace_backward=True)
    assert repr(module) == "CrossEntropyLoss(inplace_backward=True)"
    head = torchext.nn.LinearCrossEntropyLoss(8, 5, z_loss=0.1)
    assert "label_smoothing=0.0, z_loss=0.1\n" in repr(head)
    assert "label_smoothing=0.0\n" in repr(torchext.nn.LinearCrossEntropyLoss(8, 5))
    logits = torch.randn(6, 20, requires_grad=True)
    loss = torchext.cross_entropy(logits, torch.zeros(6).long(), z_loss=0.1)
    assert "CrossEntropyExtras" in loss.grad_fn.name()


def test_second_derivatives_and_compile() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, -100])

    def loss(x: Tensor) -> Tensor:
        total, lse = torchext.cross_entropy(
            x, target, z_loss=0.1, softcap=2.0, logit_scale=1.5, return_lse=True
        )
        return total + lse.sum()

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))


def test_low_precision_lse_is_float32() -> None:
    x = torch.randn(4, 300, dtype=torch.bfloat16)
    loss, lse = torchext.cross_entropy(x, torch.arange(4), z_loss=1e-4, return_lse=True)
    assert loss.dtype == torch.bfloat16
    torch.testing.assert_close(lse, x.float().logsumexp(1))


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"softcap": 0.0}, "softcap above 0"),
        ({"ignored_mean": "none"}, "ignored_mean to be one of"),
    ],
)
def test_values_without_a_meaning(extras: dict[str, Any], message: str) -> None:
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=f"^cross_entropy: expected {message}"):
        torchext.cross_entropy(x, target, **extras)
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: expected {message}"):
        torchext.linear_cross_entropy(x, torch.randn(4, 4), target, **extras)


@pytest.mark.parametrize("name", ["logit_scale", "softcap", "z_loss"])
def test_a_scale_that_is_learned_is_the_functions(name: str) -> None:
    """A module would hold a parameter that is none of its own."""
    scale = torch.nn.Parameter(torch.tensor(2.0))
    x, target = torch.randn(3, 20), torch.tensor([0, 1, 2])
    torchext.cross_entropy(x, target, **{name: scale}).backward()
    assert scale.grad is not None and scale.grad != 0
    with pytest.raises(TypeError, match=f"^CrossEntropyLoss: expected {name} .*Parameter"):
        torchext.nn.CrossEntropyLoss(**{name: scale})
    with pytest.raises(TypeError, match=f"^LinearCrossEntropyLoss: expected {name} .*Parameter"):
        torchext.nn.LinearCrossEntropyLoss(4, 20, **{name: scale})


def test_torchscript_refuses_what_it_lacks() -> None:
    scripted = torch.jit.script(torchext.nn.CrossEntropyLoss(z_loss=0.1))
    with pytest.raises(Exception, match="TorchScript has no extras"):
        scripted(torch.randn(3, 4), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("extras", [{"z_loss": 0.1}, {"ignored_mean": "zero"}], ids=str)
@pytest.mark.parametrize("classes", [200, 256, 300])
def test_narrow_targets_do_not_wrap(
    dtype: torch.dtype, extras: dict[str, Any], classes: int
) -> None:
    """uint8 holds 156, which is -100 in its own width, and no 256."""
    target = torch.tensor([156, 1, 44, 3])
    x, weight = torch.randn(4, 6), torch.randn(classes, 6)
    for ignore_index in (-100, 2**32 + 44, 300):
        options = {"ignore_index": ignore_index, **extras}
        for function, tensors in (
            (torchext.cross_entropy, (x @ weight.t(),)),
            (torchext.linear_cross_entropy, (x, weight)),
        ):
            found = function(*tensors, target.to(dtype), **options)
            torch.testing.assert_close(found, function(*tensors, target, **options))


@pytest.mark.parametrize("rows", [[[math.nan] * 3], [[math.inf, math.nan, 0.0]], [[-math.inf] * 3]])
def test_lse_of_rows_that_are_not_finite(rows: list[list[float]]) -> None:
    logits = torch.tensor([*rows, [math.inf, 1.0, 2.0], [0.0, math.nan, 1.0], [1.0, 2.0, 3.0]])
    target = torch.zeros(len(logits), dtype=torch.long)
    _, lse = torchext.cross_entropy(logits, target, return_lse=True)
    torch.testing.assert_close(lse, torch.logsumexp(logits, 1), equal_nan=True)
    weight = torch.eye(3)
    _, lse = torchext.linear_cross_entropy(logits, weight, target, return_lse=True)
    expected = torch.logsumexp(F.linear(logits, weight), 1)
    torch.testing.assert_close(lse, expected, equal_nan=True)


@pytest.mark.parametrize("extras", [{"z_loss": 1e-5}, {"ignored_mean": "zero"}], ids=str)
def test_a_mean_of_float16_does_not_overflow_in_its_sum(extras: dict[str, Any]) -> None:
    logits, target = (3 * torch.randn(20000, 8)).half(), torch.randint(8, (20000,))
    loss = torchext.cross_entropy(logits, target, **extras)
    assert loss.dtype == torch.float16
    expected = torchext.cross_entropy(logits.double(), target, **extras)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    features, weight = logits, torch.eye(8).half()
    loss = torchext.linear_cross_entropy(features, weight, target, **extras)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("classes", [8, 20])
@pytest.mark.parametrize("extras", [{"return_argmax": True}, {"softcap": 1e4}, {"z_loss": 0.1}])
def test_a_mean_over_targets_without_weight(classes: int, extras: dict[str, Any]) -> None:
    """NaN, or 0 without a gradient, whatever label smoothing adds to it."""
    logits, target = torch.randn(4, classes, requires_grad=True), torch.tensor([0, 2, 0, 2])
    weight = torch.ones(classes)
    weight[::2] = 0
    features, head = torch.randn(4, 5, requires_grad=True), torch.randn(classes, 5)
    assert F.cross_entropy(logits, target, weight, label_smoothing=0.1).isnan()
    for backend in ("auto", "eager"):
        with torchext.use_backend(backend):
            options: dict[str, Any] = {"weight": weight, "label_smoothing": 0.1, **extras}
            for leaf, loss_of in (
                (logits, partial(torchext.cross_entropy, logits, target, **options)),
                (
                    features,
                    partial(torchext.linear_cross_entropy, features, head, target, **options),
                ),
            ):
                assert as_tuple(loss_of())[0].isnan()
                zero = as_tuple(loss_of(ignored_mean="zero"))[0]
                assert zero == 0 and not torch.autograd.grad(zero, leaf)[0].any()


@pytest.mark.parametrize(
    "extras", [{"softcap": 30.0}, {"z_loss": 0.1, "return_lse": True}], ids=str
)
@pytest.mark.parametrize("leading", [(), (6,), (2, 3)], ids=str)
def test_no_features(leading: tuple[int, ...], extras: dict[str, Any]) -> None:
    bias = torch.randn(5, requires_grad=True)
    x, weight, target = torch.randn(*leading, 0), torch.randn(5, 0), torch.randint(5, leading)
    found = torchext.linear_cross_entropy(x, weight, target, linear_bias=bias, **extras)
    rows = bias.expand(*leading, 5).reshape(-1, 5)
    expected = as_tuple(torchext.cross_entropy(rows, target.reshape(-1), **extras))
    torch.testing.assert_close(as_tuple(found)[0], expected[0])
    upstream = torch.randn(())
    torch.testing.assert_close(
        torch.autograd.grad(as_tuple(found)[0], bias, upstream),
        torch.autograd.grad(expected[0], bias, upstream),
    )


@pytest.mark.parametrize("softcap", [5.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_far_beyond_the_cap_have_their_gradients(dtype: torch.dtype, softcap: float) -> None:
    """Of 1 - tanh^2 nothing is left there but tanh's rounding."""
    size = torch.tensor([0.3, 1, 2, 4, 6, 8])[:, None] * softcap
    x = (torch.randn(6, 40).sign() * size * torch.empty(6, 40).uniform_(0.9, 1.1)).to(dtype)
    target, upstream = torch.randint(40, (6,)), torch.randn(6, dtype=dtype)
    leaf = x.clone().requires_grad_()
    with torchext.use_backend("native"):
        rows = torchext.cross_entropy(leaf, target, softcap=softcap, reduction="none")
    (found,) = torch.autograd.grad(rows, leaf, upstream)
    u = x.double() / softcap
    e = torch.exp(-2 * u.abs())
    of_z = (softcap * u.tanh()).softmax(1) - F.one_hot(target, 40)
    expected = upstream.double()[:, None] * of_z * 4 * e / (1 + e) ** 2
    errors = ((found.double() - expected) / expected).abs().mean(1)
    assert errors.max() < 40 * torch.finfo(dtype).eps

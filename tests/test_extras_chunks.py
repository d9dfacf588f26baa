"""The extras of linear_cross_entropy by chunks of rows: the whole logits' answer, without them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_extras_kernel import double
from test_linear_cross_entropy import WithValue
from torch import Tensor

import torchext
from torchext import _backend
from torchext.ops import extras as with_extras
from torchext.ops import extras_source

# Of the norm, beyond the error that the definition makes in the dtype: one rounding of the result,
# or some of the sums.
FLOOR = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
EXTRAS: list[dict[str, Any]] = [
    {"z_loss": 0.1},
    {"softcap": 3.0},
    {"logit_scale": 0.5, "return_argmax": True},
    {"return_lse": True},
    {"z_loss": 0.2, "softcap": 5.0, "logit_scale": -2.0, "return_lse": True, "return_argmax": True},
    {"z_loss": 0.2, "ignored_mean": "zero"},
]


@pytest.fixture
def chunks_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuses the whole logits to our calls, and makes chunks of 16 rows."""
    whole = with_extras._on_whole_logits

    def refuse(*args: Any) -> Any:
        assert _backend._active == "eager", "the whole logits served the call"
        return whole(*args)

    monkeypatch.setattr(with_extras, "_on_whole_logits", refuse)
    monkeypatch.setattr(extras_source, "_BYTES", {"cpu": 1})
    monkeypatch.setattr(extras_source, "_MIN_ROWS", 16)
    yield


def with_gradients(
    found: Any, upstream: list[Tensor], leaves: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    values = [found] if isinstance(found, Tensor) else list(found)
    floating = [value for value in values if value.is_floating_point()]
    grads = [g.to(v.dtype) for g, v in zip(upstream, floating, strict=False)]
    return [v.detach() for v in values], list(torch.autograd.grad(floating, leaves, grads))


def results(
    leaves: list[Tensor],
    target: Tensor,
    upstream: list[Tensor],
    autocast: torch.dtype | None = None,
    function: Callable[..., Any] = torchext.linear_cross_entropy,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """What a call gives, and the gradients by the leaves (input, linear_weight, linear_bias)."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    input, linear_weight, *bias = leaves
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        found = function(
            input, linear_weight, target, linear_bias=bias[0] if bias else None, **options
        )
    return with_gradients(found, upstream, leaves)


def definition(*args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    with torchext.use_backend("eager"):
        return results(*args, **kwargs)


def at_rounded_logits(
    leaves: list[Tensor],
    target: Tensor,
    upstream: list[Tensor],
    narrow: torch.dtype,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """What `results` would be if nothing were rounded but the tensors and the logits."""
    rounded = [leaf.to(narrow) for leaf in leaves]
    exact = [leaf.double().requires_grad_() for leaf in rounded]
    shape = leaves[1].shape[:-1]

    def logits_of(input: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        logits = F.linear(input, weight.flatten(0, -2), *(b.flatten() for b in bias))
        return logits.view(-1, *shape)

    logits = WithValue.apply(logits_of(*exact), logits_of(*rounded).double())
    with torchext.use_backend("eager"):
        found = torchext.cross_entropy(logits, target, **options)
    return with_gradients(found, upstream, exact)


def check(
    leaves: list[Tensor],
    target: Tensor,
    upstream: list[Tensor],
    autocast: torch.dtype | None,
    options: dict[str, Any],
    function: Callable[..., Any] = torchext.linear_cross_entropy,
) -> tuple[list[Tensor], list[Tensor]]:
    """The error against float64 is at most that of the whole logits in the same dtype.

    Logits of 16 bits are rounded alike in both, and in one draw what eager rounds after that may
    happen to undo it: the truth is that of the rounded logits.
    """
    ours = results(leaves, target, upstream, autocast, function, **options)
    eager = definition(leaves, target, upstream, autocast, **options)
    wide = {name: double(value) for name, value in options.items()}
    gradients = [double(gradient) for gradient in upstream]
    narrow = autocast or leaves[0].dtype
    if narrow.itemsize == 2:
        truth = at_rounded_logits(leaves, double(target), gradients, narrow, **wide)
    else:
        truth = definition([*map(double, leaves)], double(target), gradients, **wide)
    for found, stock, exact in zip(ours, eager, truth, strict=True):
        for actual, other, expected in zip(found, stock, exact, strict=True):
            assert actual.dtype == other.dtype and actual.shape == other.shape
            if not actual.is_floating_point():
                continue  # see test_argmax
            # Autocast rounds the gradients.
            allowed = FLOOR[narrow] * (expected.norm() + 1e-3)
            if other.isfinite().all():
                allowed += (other.double() - expected).norm()
            assert expected.isfinite().all()
            assert (actual.double() - expected).norm() <= allowed, options
    return ours


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
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
@pytest.mark.parametrize("inner", [(), (2, 3)], ids=str)
def test_chunks_are_the_definition(
    chunks_alone: None,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    extras: dict[str, Any],
    reduction: str,
    inner: tuple[int, ...],
) -> None:
    rows, classes, features = 70, 90, 12  # four whole chunks and one short one
    for kind, weighted, smoothing, biased in (
        ("indices", False, 0.0, False),
        ("indices", True, 0.1, True),
        ("indices", False, 0.1, False),
        ("probabilities", False, 0.0, True),
        ("probabilities", True, 0.2, False),
    ):
        leaves = [torch.randn(rows, features), torch.randn(classes, *inner, features) * 0.5]
        leaves += [torch.randn(classes, *inner)] if biased else []
        leaves = [leaf.to(dtype) for leaf in leaves]
        if kind == "indices":
            target = torch.randint(classes, (rows, *inner))
            target[torch.rand(target.shape) < 0.2] = -100
        else:
            target = torch.randn(rows, classes, *inner).softmax(1).to(dtype)
        options: dict[str, Any] = {
            **extras,
            "reduction": reduction,
            "label_smoothing": smoothing,
            "weight": (torch.rand(classes) + 0.5).to(dtype) if weighted else None,
        }
        positions = (rows, *inner)
        upstream = [torch.randn(positions if reduction == "none" else ()), torch.randn(positions)]
        upstream = [gradient.to(dtype) for gradient in upstream]
        check(leaves, target, upstream, autocast, options)


def test_without_a_kernel(chunks_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cross_entropy's operator does not serve, a chunk's loss is torch's."""
    monkeypatch.setattr(_backend, "route", lambda *args, **kwargs: _backend.TRITON)
    monkeypatch.setattr(extras_source, "kernel_of", lambda *args: 0)
    for kind in ("indices", "probabilities"):
        leaves = [torch.randn(40, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)]
        target = torch.randint(9, (40,))
        if kind == "probabilities":
            target = torch.randn(40, 9, dtype=torch.float64).softmax(1)
        options = {"z_loss": 0.1, "return_lse": True, "label_smoothing": 0.1}
        upstream = [torch.randn(()), torch.randn(40)]
        ours = results(leaves, target, upstream, **options)
        monkeypatch.setattr(extras_source, "_MIN_ROWS", 7)
        for found, exact in zip(ours, definition(leaves, target, upstream, **options), strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_argmax_is_the_largest_logits_class(chunks_alone: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        input, linear_weight = torch.randn(50, 8).to(dtype), torch.randn(30, 8).to(dtype)
        target = torch.randint(30, (5, 10))
        _, argmax = torchext.linear_cross_entropy(
            input.view(5, 10, 8), linear_weight, target, return_argmax=True, logit_scale=-1.0
        )
        logits = input.float() @ linear_weight.float().t()
        chosen = logits.gather(1, argmax.view(-1, 1))[:, 0]
        assert argmax.shape == target.shape
        torch.testing.assert_close(chosen, logits.amin(1), rtol=2e-2, atol=2e-2)


def test_a_mean_over_no_target(chunks_alone: None) -> None:
    input = torch.randn(20, 4, requires_grad=True)
    linear_weight, target = torch.randn(6, 4), torch.full((20,), -100)
    for weight in (None, torch.rand(6)):
        call = {"weight": weight, "z_loss": 0.1}
        assert torchext.linear_cross_entropy(input, linear_weight, target, **call).isnan()  # type: ignore[arg-type]
        loss = torchext.linear_cross_entropy(
            input,
            linear_weight,
            target,
            ignored_mean="zero",
            **call,  # type: ignore[arg-type]
        )
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, input)[0], torch.zeros_like(input))


def test_gradients_asked_for_alone_and_again(chunks_alone: None) -> None:
    input = torch.randn(40, 6, requires_grad=True)
    linear_weight, target = torch.randn(9, 6), torch.randint(9, (40,))
    linear_weight.requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        x, w = input.to(dtype), linear_weight.to(dtype)
        loss = torchext.linear_cross_entropy(x, w, target, z_loss=0.1)
        (first,) = torch.autograd.grad(loss, x, torch.tensor(2.0, dtype=dtype), retain_graph=True)
        kept = first.clone()
        first.zero_()  # the caller's own: a second backward must not see it
        (second,) = torch.autograd.grad(loss, x, torch.tensor(2.0, dtype=dtype))
        assert torch.equal(kept, second)
    with torch.no_grad():
        loss, lse = torchext.linear_cross_entropy(input, linear_weight, target, return_lse=True)
    assert not loss.requires_grad and not lse.requires_grad
    loss, lse = torchext.linear_cross_entropy(input, linear_weight, target, return_lse=True)
    (grad,) = torch.autograd.grad(lse.sum(), linear_weight)  # the lse alone
    logits = input @ linear_weight.t()
    torch.testing.assert_close(grad, logits.softmax(1).t() @ input)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = torchext.linear_cross_entropy(input, linear_weight, target, z_loss=0.1)
    (hooked,) = torch.autograd.grad(loss, input, torch.tensor(3.0))
    loss = torchext.linear_cross_entropy(input, linear_weight, target, z_loss=0.1)
    assert torch.equal(hooked, torch.autograd.grad(loss, input, torch.tensor(3.0))[0])


def test_an_extra_that_is_learned_takes_the_definition() -> None:
    input, linear_weight = torch.randn(6, 3), torch.randn(5, 3)
    target, scale = torch.randint(5, (6,)), torch.tensor(1.5, requires_grad=True)
    call: dict[str, Any] = {"z_loss": 0.1, "logit_scale": scale}
    loss = torchext.linear_cross_entropy(input, linear_weight, target, **call)
    stock = torchext.cross_entropy(input @ linear_weight.t(), target, **call)
    torch.testing.assert_close(torch.autograd.grad(loss, scale), torch.autograd.grad(stock, scale))


def test_transforms_take_the_definition() -> None:
    input = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    linear_weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (6,))

    def loss(x: Tensor, w: Tensor) -> Tensor:
        total, lse = torchext.linear_cross_entropy(
            x, w, target, z_loss=0.1, softcap=2.0, logit_scale=1.5, return_lse=True
        )
        return total + lse.square().sum()

    leaves = (input, linear_weight)
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
    grads = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(*leaves), grads)
    direction = torch.randn_like(input)
    _, tangent = torch.func.jvp(lambda x: loss(x, linear_weight), (input,), (direction,))
    torch.testing.assert_close(tangent, (grads[0] * direction).sum())
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), grads)

    def alone(x: Tensor) -> Tensor:
        """The lse without the loss, whose gradient is then None."""
        _, lse = torchext.linear_cross_entropy(x, linear_weight, target, return_lse=True)
        return lse

    assert torch.autograd.gradgradcheck(alone, input)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target": torch.tensor([0, 1, 5])}, IndexError),
        ({"target": torch.tensor([0, 1, -1])}, IndexError),
        ({"target": torch.tensor([0, 1])}, ValueError),
        ({"target": torch.tensor([[0, 1, 2]])}, ValueError),
        ({"linear_weight": torch.randn(5, 3)}, RuntimeError),
        ({"linear_weight": torch.randn(5, 4, dtype=torch.float64)}, RuntimeError),
        ({"linear_bias": torch.randn(4)}, RuntimeError),
        ({"weight": torch.randn(4)}, RuntimeError),
        ({"reduction": "average"}, ValueError),
        ({"label_smoothing": 2.0}, RuntimeError),
        ({"target": torch.rand(3, 5), "ignore_index": 1}, RuntimeError),
        ({"target": [0, 1, 2]}, TypeError),
        ({"input": torch.randn(1, 3, 4), "target": torch.zeros(3, 1).long()}, RuntimeError),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value.__name__,
)
def test_what_is_wrong_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    call: dict[str, Any] = {
        "input": torch.randn(3, 4),
        "linear_weight": torch.randn(5, 4),
        "target": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(error):
        torchext.linear_cross_entropy(**{**call, **change}, z_loss=0.1)


# Of 16,384 x 8,000 logits, 500 MiB of float32.
ROWS, CLASSES, FEATURES = 16384, 8000, 16
MEBIBYTE = 1 << 20


def peak_of(
    backend: str,
    dtype: torch.dtype,
    function: Callable[..., Any] = torchext.linear_cross_entropy,
    **options: Any,
) -> float:
    """Returns the MiB by which a call and its backward lift the process's peak memory."""

    def status(name: str) -> int:
        with open("/proc/self/status") as lines:
            (line,) = (line for line in lines if line.startswith(name + ":"))
        return int(line.split()[1])

    input = torch.randn(ROWS, FEATURES).to(dtype).requires_grad_()
    linear_weight = torch.randn(CLASSES, FEATURES).to(dtype).requires_grad_()
    target = torch.randint(CLASSES, (ROWS,))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is the present from now on
    before = status("VmRSS")
    with torchext.use_backend(backend):
        found = function(input, linear_weight, target, **options)
        loss = found if isinstance(found, Tensor) else found[0] + found[1].sum()
        loss.sum().backward()
    return (status("VmHWM") - before) / 1024


def measure() -> None:
    """The program of the test: the peaks as JSON."""
    cases: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.float32, {}),
        (torch.float32, {"z_loss": 0.1}),
        (torch.float32, {"z_loss": 0.1, "reduction": "none"}),
        (torch.float32, {"softcap": 3.0, "return_lse": True}),
        (torch.bfloat16, {"softcap": 3.0, "z_loss": 0.1}),
    ]
    peak_of("auto", torch.float32, z_loss=0.1)  # threads, libraries
    peaks = [peak_of("auto", dtype, **options) for dtype, options in cases]
    for dtype, options in cases[1:]:
        torch.compiler.reset()
        call = torch.compile(torchext.linear_cross_entropy, fullgraph=True, backend="aot_eager")
        peak_of("auto", dtype, call, **options)  # what the compiler itself takes
        peaks.append(peak_of("auto", dtype, call, **options))
    print(json.dumps(peaks))
    print(json.dumps(peak_of("eager", torch.float32, z_loss=0.1)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded() -> None:
    program = [sys.executable, __file__]
    output = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    peaks, whole = map(json.loads, output.splitlines())
    logits = ROWS * CLASSES * 4 / MEBIBYTE
    assert whole > 2 * logits  # the measure sees what is there
    buffer, slack = 64, 40
    bounds = (1, 1, 1, 2, 2.5)
    for peak, bound in zip(peaks, (*bounds, *bounds[1:]), strict=True):
        assert peak < bound * buffer + slack, peaks


if __name__ == "__main__":
    torch.set_num_threads(2)
    measure()

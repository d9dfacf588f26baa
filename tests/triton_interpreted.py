"""What the common suites cannot ask of the Triton kernels.

Run by test_triton.py, in a process with TRITON_INTERPRET=1: they are interpreted, on CPU tensors.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_extras import truth
from torch import Tensor
from torchext.triton_kernels import (
    common,
    cross_entropy,
    cross_entropy_call,
    linear_cross_entropy,
    linear_relu,
)

import torchext
from torchext import _backend, _triton, reference
from torchext.ops import cross_entropy_gpu, extras_chunks
from torchext.testing import assert_drop_in

OPS = torch.ops.torchext_triton
SHAPES = [(5,), (33, 17), (7, 1000), (2, 17000), (2, 5, 3, 4), (2, 1300, 2)]


def logits_for(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype)


def target_for(x: Tensor) -> Tensor:
    dim = min(x.dim() - 1, 1)
    return torch.randint(x.shape[dim], x.shape[:dim] + x.shape[dim + 1 :])


def test_every_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the truth, in both dtypes; and none of them is left out."""
    launched: set[str] = set()
    launch = common.launch

    def recorded(kernel: Any, *args: Any, **options: Any) -> None:
        launched.add(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(common, "launch", recorded)
    for dtype, shape in itertools.product((torch.float32, torch.float16), SHAPES):
        x = logits_for(shape, dtype).requires_grad_()
        with torchext.use_backend("triton"):
            assert_drop_in(
                torchext.cross_entropy, F.cross_entropy, x, target_for(x), label_smoothing=0.1
            )
    many = logits_for((20000, 3)).requires_grad_()
    with torchext.use_backend("triton"):
        assert_drop_in(torchext.cross_entropy, F.cross_entropy, many, target_for(many))
        for dtype in (torch.float32, torch.float16):
            tensors = [torch.randint(-2, 3, s).to(dtype) for s in ((300, 70), (33, 70), (33,))]
            leaves = [x.requires_grad_() for x in tensors]
            ours, stock = torchext.linear_relu(*leaves), F.relu(F.linear(*leaves))
            assert torch.equal(ours, stock)
            upstream = torch.randint(-2, 3, stock.shape).to(dtype)
            for result, other in zip(
                torch.autograd.grad(ours, leaves, upstream),
                torch.autograd.grad(stock, leaves, upstream),
                strict=True,
            ):
                assert torch.equal(result, other)
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    with torchext.use_backend("triton"), linear_cross_entropy.use_schedule("tiles"):
        assert_drop_in(
            torchext.linear_cross_entropy, reference.linear_cross_entropy, x, w, target_for(x)
        )
    with torchext.use_backend("triton"):
        torchext.cross_entropy(x, target_for(x), softcap=3.0)
    folder = Path(common.__file__).parent
    source = "".join(file.read_text() for file in folder.glob("*.py"))
    assert launched == set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))


def test_the_registered_operators_pass_opcheck() -> None:
    for shape, reduction, dense in itertools.product(((4, 5), (2, 3, 4)), (0, 1), (False, True)):
        x = logits_for(shape).requires_grad_()
        target = x.detach().softmax(1) if dense else target_for(x)
        weight = torch.rand(shape[1])
        options = (reduction, -100, 0.1)
        for gradient in (False, reduction != 0):
            call = (x, target, weight, *options, gradient)
            torch.library.opcheck(OPS.cross_entropy_forward.default, call)
        stats = OPS.cross_entropy_forward(x.detach(), target, weight, *options, False)[1]
        upstream = torch.randn(() if reduction else x[:, 0].shape)
        call = (upstream, x.detach(), target, weight, stats, *options)
        torch.library.opcheck(OPS.cross_entropy_backward.default, call)
    call = (logits_for((4, 5)), torch.tensor([0, 1, 2, 3]), None, 1, -100, 0.0)
    torch.library.opcheck(OPS.cross_entropy_forward_.default, call)
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,)))
    torch.library.opcheck(OPS.linear_relu_forward.default, (x, w, b))
    y = OPS.linear_relu_forward(x, w, b).detach()
    call = (torch.randn_like(y), y, x.detach(), w.detach(), True, False, True)
    torch.library.opcheck(OPS.linear_relu_backward.default, call)


def test_compile_takes_them_whole() -> None:
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    target = torch.randint(7, (6,))

    def loss(x: Tensor) -> Tensor:
        return torchext.cross_entropy(torchext.linear_relu(x, w), target)

    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module.forward

    with torchext.use_backend("triton"):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        gradients = torch.autograd.grad(compiled(x), (x, w))
    expected = torch.autograd.grad(F.cross_entropy(F.relu(F.linear(x, w)), target), (x, w))
    torch.testing.assert_close(gradients, expected)
    assert "torchext_triton.cross_entropy_forward" in graphs[0]
    assert "torchext_triton.linear_relu_forward" in graphs[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_extras_of_a_head(reduction: str, compiled: bool) -> None:
    """The chunks' logits have the same kernel; behind the operator that compile keeps, too."""
    shapes = ((9, 6), (11, 6), (11,))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    target = torch.randint(11, (9,))
    target[2] = -100
    extras = {"softcap": 4.0, "z_loss": 0.1, "return_lse": True, "return_argmax": True}
    head = torchext.linear_cross_entropy
    if compiled:
        torch.compiler.reset()
        head = torch.compile(head, fullgraph=True, backend="aot_eager")
    kernels = extras_chunks._rows_of
    ran: list[int] = []
    with pytest.MonkeyPatch.context() as patch, torchext.use_backend("triton"):
        patch.setattr(
            extras_chunks, "_rows_of", lambda kernel: ran.append(kernel) or kernels(kernel)
        )
        options = {"linear_bias": leaves[2], "reduction": reduction, **extras}
        loss, lse, argmax = head(*leaves[:2], target, **options)
        upstream = [torch.randn(loss.shape), torch.randn(lse.shape)]
        grads = torch.autograd.grad((loss, lse), leaves, upstream)
    assert set(ran) == {_backend.TRITON}
    exact = truth(F.linear(*wide), target, reduction=reduction, **extras)
    for found, expected in zip((loss, lse), exact, strict=False):
        torch.testing.assert_close(found, expected.float())
    assert torch.equal(argmax, exact[2])
    others = torch.autograd.grad(exact[:2], wide, [grad.double() for grad in upstream])
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other.float())


@pytest.mark.parametrize("index", [-(2**63), 2**63 - 1, -1, 2**32, 17000])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 17000)], ids=str)
def test_a_class_that_does_not_exist_gives_nan(
    monkeypatch: pytest.MonkeyPatch, index: int, shape: tuple[int, ...]
) -> None:
    """On a GPU nobody looks at the targets before the kernels: they may read nothing with them."""
    monkeypatch.setattr(cross_entropy, "check", lambda *_: None)
    x = logits_for(shape)
    target = target_for(x)
    target[2] = index
    ordinary = torch.tensor([0, 1, 3])
    for smoothing in (0.0, 0.1):
        loss, stats, _ = cross_entropy.cross_entropy_forward(
            x, target, None, 0, -100, smoothing, False
        )
        assert loss[2].isnan().all()
        assert not loss[ordinary].isnan().any()
        upstream = torch.ones_like(loss)
        gradient = cross_entropy.cross_entropy_backward(
            upstream, x, target, None, stats, 0, -100, smoothing
        )
        assert gradient[2].isnan().all()
        assert not gradient[ordinary].isnan().any()
        for reduction in (1, 2):
            loss = cross_entropy.cross_entropy_forward(
                x, target, torch.ones(shape[1]), reduction, -100, smoothing, False
            )[0]
            assert loss.isnan()


def test_a_class_that_does_not_exist_raises_on_the_cpu() -> None:
    with torchext.use_backend("triton"), pytest.raises(IndexError, match="Target 7"):
        torchext.cross_entropy(torch.randn(2, 5), torch.tensor([0, 7]))


def test_arguments_are_checked_as_the_native_operators_do() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=r"linear_relu: expected bias of shape \[5\]"):
        linear_relu.linear_relu_forward(x, w, torch.randn(4))
    with pytest.raises(RuntimeError, match="cross_entropy: expected weight of shape"):
        cross_entropy.cross_entropy_forward(x, target_for(x), torch.ones(3), 1, -100, 0.0, False)
    with torchext.use_backend("triton"), pytest.raises(RuntimeError):
        torchext.linear_relu(x, w.double())


@pytest.mark.parametrize("shape", [(33, 17), (33, 1000), (5, 17000), (9, 70, 3)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(shape: tuple[int, ...]) -> None:
    x = logits_for(shape)
    target = target_for(x)

    def result(part: slice) -> tuple[Tensor, Tensor]:
        leaf = x[part].clone().requires_grad_()
        losses = torchext.cross_entropy(leaf, target[part], reduction="none", label_smoothing=0.1)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    with torchext.use_backend("triton"):
        whole = result(slice(None))
        for part in (slice(0, 1), slice(1, 4), slice(3, None)):
            for one, all_of_them in zip(result(part), whole, strict=True):
                assert torch.equal(one, all_of_them[part])


@pytest.mark.parametrize("shape", [(4, 5), (3, 17000), (2, 5, 3)], ids=str)
def test_the_gradient_in_the_place_of_the_logits(shape: tuple[int, ...]) -> None:
    leaf = logits_for(shape).requires_grad_()
    target, results = target_for(leaf), []
    with torchext.use_backend("triton"):
        for inplace in (False, True):
            logits = leaf + 0
            before = logits.data_ptr()
            loss = 3 * torchext.cross_entropy(logits, target, inplace_backward=inplace)
            if inplace:
                assert logits.data_ptr() == before
                assert not torch.equal(logits, leaf)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("inplace", [False, True])
def test_what_serves_the_cuda_library(monkeypatch: pytest.MonkeyPatch, inplace: bool) -> None:
    """The library's operators by their CPU kernels, which serve as well.

    Gradients are multiplied in their own memory, or the logits', and nobody looks at the factor.
    """
    op = sys.modules["torchext.ops.cross_entropy"]
    made: list[int] = []

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        made[:] = [output[2].data_ptr()]
        op._setup_context(ctx, inputs, output)

    monkeypatch.setattr(cross_entropy_gpu, "_blocks_of_a_row", lambda device: 8)
    call = cross_entropy_gpu.library(setup, op._backward, op.inplace, op.apart, "CPU")
    leaf = logits_for((33, 300)).requires_grad_()
    target = target_for(leaf)
    for code, reduction in ((1, "mean"), (2, "sum"), (0, "none")):
        truth = F.cross_entropy(leaf, target, reduction=reduction, label_smoothing=0.1)
        upstream = torch.randn_like(truth)
        exact = torch.autograd.grad(truth, leaf, upstream)[0]
        logits = leaf + 0
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "item", lambda _: pytest.fail("the host looked"))
            loss = call(logits, target, None, code, -100, 0.1, inplace)
            assert inplace == (not torch.equal(logits, leaf)) or code == 0
            (found,) = torch.autograd.grad(loss, logits, upstream)
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)
        if code:
            assert found.data_ptr() == (logits.data_ptr() if inplace else made[0])


def test_one_pass_and_two_give_the_same() -> None:
    """The gradient of a sum: from forward, and from backward; nothing is multiplied by 1."""
    for shape in SHAPES:
        x = logits_for(shape)
        target = target_for(x)
        for reduction in (1, 2):
            options = (reduction, -100, 0.1)
            loss, _, gradient = cross_entropy.cross_entropy_forward(x, target, None, *options, True)
            again, stats, _ = cross_entropy.cross_entropy_forward(x, target, None, *options, False)
            assert torch.equal(loss, again)
            other = cross_entropy.cross_entropy_backward(
                torch.tensor(1.0), x, target, None, stats, *options
            )
            torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-7)
            kept = gradient.clone()
            cross_entropy.scale_(gradient, torch.tensor(1.0))
            assert torch.equal(gradient, kept)
            cross_entropy.scale_(gradient, torch.tensor(-2.5))
            assert torch.equal(gradient, kept * -2.5)


def test_bfloat16_is_not_the_interpreters() -> None:
    assert not _triton.serves(torch.zeros(1, dtype=torch.bfloat16))
    assert _triton.serves(torch.zeros(1))
    assert cross_entropy_call.one_pass(torch.zeros(2, 16384))
    assert not cross_entropy_call.one_pass(torch.zeros(2, 16385))

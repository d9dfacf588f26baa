"""linear_cross_entropy's Triton schedules: what the common suites cannot ask of them.

Run by test_triton.py, in a process with TRITON_INTERPRET=1: interpreted, on CPU tensors.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_linear_cross_entropy_backends import check, indices, leaves
from torch import Tensor
from torchext.triton_kernels import linear_cross_entropy, linear_cross_entropy_call
from torchext.triton_kernels import linear_cross_entropy_chunks as chunks

import torchext

OPS = torch.ops.torchext_triton
DTYPES = (torch.float32, torch.float16)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of few rows."""
    monkeypatch.setattr(chunks, "MIN_ROWS", 8)
    monkeypatch.setattr(chunks, "_ALIGNED_ROWS", 4)
    monkeypatch.setattr(chunks, "BUFFER_BYTES", 1)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_several_chunks(
    small_chunks: None, dtype: torch.dtype, reduction: str, dense: bool
) -> None:
    """The last one short; classes in registers, and not."""
    for rows, features, classes in ((21, 16, 33), (17, 7, 17000)):
        shape = (rows, features, classes)
        assert rows > 2 * chunks.rows_per_chunk(rows, classes, dtype.itemsize)
        target = torch.randn(rows, classes).softmax(1).to(dtype) if dense else indices(shape, "cpu")
        weight = (torch.rand(classes) + 0.1).to(dtype)
        with torchext.use_backend("triton"):
            for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
                check(leaves(shape, dtype, "cpu"), target, reduction=reduction, **options)


def test_rows_per_chunk() -> None:
    """As many as the buffer holds, shared out evenly; never more than are asked for."""
    for rows, classes, size in itertools.product(
        (1, 255, 600, 8192, 100_003), (1, 1000, 128_256, 2_000_000), (2, 4, 8)
    ):
        height = chunks.rows_per_chunk(rows, classes, size)
        count = -(-rows // height)
        assert (count - 1) * height < rows <= count * height
        assert height <= max(chunks.MIN_ROWS, chunks.BUFFER_BYTES // (classes * size))
    assert chunks.rows_per_chunk(8192, 128_256, 2) == 512


def test_the_workspace_is_what_the_design_allows() -> None:
    """8192 rows, 4096 features, 128256 classes, bfloat16: 1.2 GB beside inputs and gradients."""
    rows, features, classes = 8192, 4096, 128_256
    buffer = 2 * classes * chunks.rows_per_chunk(rows, classes, 2)
    gradient = torch.empty(classes, features, dtype=torch.bfloat16, device="meta")
    sums = chunks.WeightGradient(gradient, 16)._sums
    beside = (
        sum(t.untyped_storage().nbytes() for t, _ in sums) - gradient.untyped_storage().nbytes()
    )
    assert buffer + beside < 1.2e9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (7, 5), (1, 4), (33, 64)], ids=str)
def test_the_weight_gradient_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Sums that 16 bits would lose: each chunk adds less than half of the last place."""
    monkeypatch.setattr(chunks.WeightGradient, "_FIRST_STEP", 2)
    classes, features = shape
    exact = torch.zeros(shape, dtype=torch.float64)
    gradient = torch.full(shape, float("nan"), dtype=dtype)
    total = chunks.WeightGradient(gradient, 9)
    for step in range(9):
        left = torch.randint(1, 4, (2, classes)).to(dtype)
        right = torch.randint(1, 4, (2, features)).to(dtype) * (1024 if step == 0 else 0.125)
        total.add(left, right)
        exact += left.double().t() @ right.double()
    total.finish()
    assert torch.equal(gradient, exact.to(dtype))


def test_backward_makes_what_forward_makes(small_chunks: None) -> None:
    """The gradients of a sum or mean: with the loss, and from its statistics."""
    x, w, b = leaves((21, 6, 40), torch.float32, "cpu")
    assert b is not None
    tensors = (x.detach(), w.detach(), indices((21, 6, 40), "cpu"), b.detach(), torch.rand(40))
    for reduction in (1, 2):
        options = (reduction, -100, 0.1)
        loss, stats, *gradients = OPS.linear_cross_entropy_forward(*tensors, *options, *[True] * 3)
        plain, _, *nothing = OPS.linear_cross_entropy_forward(*tensors, *options, *[False] * 3)
        assert torch.equal(loss, plain)
        assert [t.numel() for t in nothing] == [0, 0, 0]
        again = OPS.linear_cross_entropy_backward(
            torch.tensor(-2.0), *tensors, stats, *options, *[True] * 3
        )
        for found, expected in zip(again, gradients, strict=True):
            torch.testing.assert_close(found, -2 * expected, rtol=1e-5, atol=1e-7)


def test_opcheck(small_chunks: None) -> None:
    for dense, reduction in itertools.product((False, True), (0, 1)):
        x, w, b = leaves((9, 4, 12), torch.float32, "cpu")
        target = torch.rand(9, 12).softmax(1) if dense else torch.randint(12, (9,))
        tensors = (target, b, torch.rand(12))
        options = (reduction, -100, 0.1)
        for wanted in itertools.product((False, reduction != 0), (False, reduction != 0)):
            call = (x, w, *tensors, *options, *wanted, False)
            torch.library.opcheck(OPS.linear_cross_entropy_forward.default, call)
        plain = [t.detach() for t in (x, w, *tensors) if t is not None]
        stats = OPS.linear_cross_entropy_forward(*plain, *options, *[False] * 3)[1]
        upstream = torch.randn(() if reduction else (9,))
        for wanted in ((True, True, True), (False, True, False)):
            torch.library.opcheck(
                OPS.linear_cross_entropy_backward.default,
                (upstream, *plain, stats, *options, *wanted),
            )


def test_compile_takes_it_whole() -> None:
    x, w, b = leaves((9, 4, 12), torch.float32, "cpu")
    target = torch.randint(12, (9,))
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module.forward

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torchext.linear_cross_entropy(x, w, target, linear_bias=b)  # type: ignore[no-any-return]

    assert b is not None
    with torchext.use_backend("triton"):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        gradients = torch.autograd.grad(3 * compiled(x, w, b), (x, w, b))
    with torchext.use_backend("eager"):
        expected = torch.autograd.grad(3 * loss(x, w, b), (x, w, b))
    torch.testing.assert_close(gradients, expected)
    assert "torchext_triton.linear_cross_entropy_forward" in graphs[0]


@pytest.mark.parametrize("index", [-(2**63), 2**63 - 1, -1, 2**32, 40])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_class_that_does_not_exist_gives_nan(
    monkeypatch: pytest.MonkeyPatch, index: int, smoothing: float
) -> None:
    """On a GPU nobody looks at the targets before the kernels: they may read nothing with them."""
    monkeypatch.setattr(linear_cross_entropy_call, "check_classes", lambda *_: None)
    x, w, _ = leaves((5, 4, 40), torch.float32, "cpu")
    target = indices((5, 4, 40), "cpu")
    target[3] = index
    call = (x.detach(), w.detach(), target, None, None)
    loss, stats, *_ = OPS.linear_cross_entropy_forward(*call, 0, -100, smoothing, *[False] * 3)
    assert loss.isnan().tolist() == [False, False, False, True, False]
    gradient = OPS.linear_cross_entropy_backward(
        torch.ones(5), *call, stats, 0, -100, smoothing, True, False, False
    )[0]
    assert gradient.isnan().any(1).tolist() == [False, False, False, True, False]
    assert OPS.linear_cross_entropy_forward(*call, 1, -100, smoothing, *[False] * 3)[0].isnan()


def test_what_is_wrong_is_said_in_the_native_words() -> None:
    x, w, b = leaves((3, 4, 5), torch.float32, "cpu")
    target = torch.tensor([0, 1, 2])
    forward = linear_cross_entropy.linear_cross_entropy_forward
    options = (1, -100, 0.0, False, False, False)
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: expected weight of shape \[5\]"):
        forward(x, w, target, b, torch.ones(4), *options)
    with pytest.raises(ValueError, match="linear_cross_entropy: expected target's batch size"):
        forward(x, w, target[:2], b, None, *options)
    with pytest.raises(RuntimeError, match="expected reduction mean or sum where gradients come"):
        forward(x, w, target, b, None, 0, -100, 0.0, True, False, False)
    with torchext.use_backend("triton"):
        with pytest.raises(IndexError, match="linear_cross_entropy: .*Target 9 is out of bounds"):
            torchext.linear_cross_entropy(x, w, torch.tensor([0, 9, 1]))
        with pytest.raises(RuntimeError, match="linear_cross_entropy: expected linear_bias"):
            torchext.linear_cross_entropy(x, w, target, linear_bias=torch.ones(4))


def test_no_rows() -> None:
    x, w, _ = leaves((0, 4, 5), torch.float32, "cpu")
    call = (x.detach(), w.detach(), torch.empty(0, dtype=torch.int64), None, None)
    for reduction, value in ((1, float("nan")), (2, 0.0)):
        loss, _, first, second, third = OPS.linear_cross_entropy_forward(
            *call, reduction, -100, 0.0, True, True, True
        )
        torch.testing.assert_close(float(loss), value, equal_nan=True)
        assert first.shape == (0, 4)
        assert torch.equal(second, torch.zeros(5, 4))
        assert torch.equal(third, torch.zeros(5))

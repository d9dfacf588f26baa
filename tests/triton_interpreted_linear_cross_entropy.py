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
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchext.triton_kernels import linear_cross_entropy, linear_cross_entropy_call
from torchext.triton_kernels import linear_cross_entropy_chunks as chunks
from torchext.triton_kernels import linear_cross_entropy_tiles as tiles

import torchext
from torchext import reference

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_tiles(dtype: torch.dtype, biased: bool, smoothing: float) -> None:
    """Several blocks of rows and classes, ragged; then of columns too."""
    with torchext.use_backend("triton"), linear_cross_entropy.use_schedule("tiles"):
        for reduction, shape in (
            ("none", (21, 16, 33)), ("mean", (18, 20, 40)), ("sum", (5, 140, 19))
        ):  # fmt: skip
            for weight in (None, (torch.rand(shape[2]) + 0.1).to(dtype)):
                check(
                    leaves(shape, dtype, "cpu", biased), indices(shape, "cpu"),
                    reduction=reduction, weight=weight, label_smoothing=smoothing,
                )  # fmt: skip


def test_tiles_of_several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary that more than one program reads, the last of them a part of a tile."""
    monkeypatch.setattr(tiles, "SLICE", 64)
    shape = (140, 8, 150)  # two groups of blocks of rows
    with torchext.use_backend("triton"), linear_cross_entropy.use_schedule("tiles"):
        for smoothing in (0.0, 0.2):
            x, w, b = leaves(shape, torch.float32, "cpu")
            assert b is not None
            with torch.no_grad():
                b += torch.linspace(0, 200, 150)  # the maximum moves from slice to slice
            check((x, w, b), indices(shape, "cpu"), label_smoothing=smoothing, reduction="none")


@pytest.mark.parametrize("wanted", range(1, 8))
def test_tiles_make_only_the_gradients_asked_for(wanted: int) -> None:
    """Of more columns than one program has; that of the bias alone is one program's."""
    shape = (9, 140, 21)
    tensors = leaves(shape, torch.float32, "cpu")
    for bit, tensor in enumerate(tensors):
        assert tensor is not None
        tensor.requires_grad_(bool(wanted >> bit & 1))
    with torchext.use_backend("triton"), linear_cross_entropy.use_schedule("tiles"):
        check(tensors, indices(shape, "cpu"))


def test_tiles_keep_no_logits() -> None:
    """Nothing that they allocate has as many elements as there are logits."""
    rows, features, classes = 200, 16, 300
    x, w, b = leaves((rows, features, classes), torch.float32, "cpu")
    target = indices((rows, features, classes), "cpu")
    largest: list[int] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
            return output

    for schedule, logits in (("tiles", False), ("chunks", True)):
        with linear_cross_entropy.use_schedule(schedule), Recorder():
            call = (x.detach(), w.detach(), target, None, None, 1, -100, 0.0)
            linear_cross_entropy.linear_cross_entropy_forward(*call, True, True, True)
        assert (max(largest) >= rows * classes) == logits
        largest.clear()


@pytest.mark.parametrize("first", ["chunks", "tiles"])
def test_either_schedule_makes_the_gradients_of_the_others_loss(first: str) -> None:
    second = {"chunks": "tiles", "tiles": "chunks"}[first]
    x, w, b = leaves((21, 6, 40), torch.float32, "cpu")
    target = indices((21, 6, 40), "cpu")
    results = []
    for schedule in (first, second):
        with torchext.use_backend("triton"), linear_cross_entropy.use_schedule(first):
            loss = torchext.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
        with linear_cross_entropy.use_schedule(schedule):
            results.append(torch.autograd.grad(loss.square().sum(), (x, w)))
    torch.testing.assert_close(*results)


def test_a_row_of_tiles_has_the_same_bits_in_any_batch() -> None:
    """Of whole numbers, whose products are exact: numpy makes others by the row's place."""
    x, w = torch.randint(-3, 4, (37, 20)).float(), torch.randint(-3, 4, (70, 20)).float()
    target = indices((37, 20, 70), "cpu")

    def result(part: slice) -> tuple[Tensor, Tensor]:
        call = (x[part], w, target[part], None, None, 0, -100, 0.1)
        loss, stats, *_ = OPS.linear_cross_entropy_forward(*call, False, False, False)
        return loss, stats.t()

    with linear_cross_entropy.use_schedule("tiles"):
        whole = result(slice(None))
        for part in (slice(0, 1), slice(1, 4), slice(3, None)):
            for one, all_of_them in zip(result(part), whole, strict=True):
                assert torch.equal(one, all_of_them[part])


def test_which_schedule_serves() -> None:
    """Shapes, dtype and target decide: nothing that changes from call to call."""

    def chosen(rows: int, features: int, classes: int, dtype: torch.dtype) -> bool:
        x, w = (torch.empty(n, features, dtype=dtype, device="meta") for n in (rows, classes))
        return linear_cross_entropy.by_tiles(x, w, torch.empty(rows, dtype=torch.int64))

    low, full = torch.bfloat16, torch.float32
    assert chosen(8192, 128, 65536, low)
    assert not chosen(8192, 129, 65536, low)
    assert not chosen(8191, 128, 65536, low)
    assert not chosen(8192, 128, 8192, low)  # the buffer holds them
    assert chosen(8192, 32, 65536, full)
    assert not chosen(8192, 64, 65536, full)
    assert not chosen(8192, 16, 65536, torch.float64)
    with linear_cross_entropy.use_schedule("chunks"):
        assert not chosen(8192, 128, 65536, low)
        with linear_cross_entropy.use_schedule("tiles"):
            assert chosen(2, 4096, 3, full)
            dense = torch.empty(2, 3)
            assert not linear_cross_entropy.by_tiles(torch.empty(2, 5), torch.empty(3, 5), dense)
        assert not chosen(2, 4096, 3, full)
    with pytest.raises(ValueError, match="use_schedule: expected name"):  # noqa: SIM117
        with linear_cross_entropy.use_schedule("rows"):
            pass


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


@pytest.mark.parametrize("schedule", ["chunks", "tiles"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_come_with_the_loss_or_in_backward(
    small_chunks: None, schedule: str, reduction: str
) -> None:
    """Those of a sum or mean, as the operators give them: both are the truth."""
    x, w, b = leaves((21, 6, 40), torch.float32, "cpu")
    assert b is not None
    target, weight = indices((21, 6, 40), "cpu"), torch.rand(40)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = reference.linear_cross_entropy(
        wide[0], wide[1], target, wide[2], weight.double(), reduction, None, 0.1
    )
    exact = torch.autograd.grad(truth, wide)
    tensors = (x.detach(), w.detach(), target, b.detach(), weight)
    options = (("none", "mean", "sum").index(reduction), -100, 0.1)
    upstream = torch.tensor(-3.0)
    with linear_cross_entropy.use_schedule(schedule):
        loss, stats, *gradients = OPS.linear_cross_entropy_forward(*tensors, *options, *[True] * 3)
        plain, _, *nothing = OPS.linear_cross_entropy_forward(*tensors, *options, *[False] * 3)
        again = OPS.linear_cross_entropy_backward(upstream, *tensors, stats, *options, *[True] * 3)
    assert torch.equal(loss, plain)
    assert [t.numel() for t in nothing] == [0, 0, 0]
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-6, atol=0)
    for found, other, expected in zip(gradients, again, exact, strict=True):
        allowed = 2e-6 * expected.norm()
        assert (found.double() - expected).norm() < allowed
        assert (other.double() / -3 - expected).norm() < allowed


@pytest.mark.parametrize(
    ("schedule", "reduction", "dense"),
    [("chunks", 1, False), ("chunks", 0, True), ("tiles", 1, False), ("tiles", 0, False)],
)
def test_opcheck(small_chunks: None, schedule: str, reduction: int, dense: bool) -> None:
    x, w, b = leaves((9, 4, 12), torch.float32, "cpu")
    target = torch.rand(9, 12).softmax(1) if dense else torch.randint(12, (9,))
    tensors = (target, b, torch.rand(12))
    options = (reduction, -100, 0.1)
    with linear_cross_entropy.use_schedule(schedule):
        for wanted in ((False, False, False), (False, reduction != 0, False)):
            call = (x, w, *tensors, *options, *wanted)
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
@pytest.mark.parametrize("schedule", ["chunks", "tiles"])
def test_a_class_that_does_not_exist_gives_nan(
    monkeypatch: pytest.MonkeyPatch, index: int, smoothing: float, schedule: str
) -> None:
    """On a GPU nobody looks at the targets before the kernels: they may read nothing with them."""
    monkeypatch.setattr(linear_cross_entropy_call, "check_classes", lambda *_: None)
    x, w, _ = leaves((5, 4, 40), torch.float32, "cpu")
    target = indices((5, 4, 40), "cpu")
    target[3] = index
    call = (x.detach(), w.detach(), target, None, None)
    with linear_cross_entropy.use_schedule(schedule):
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

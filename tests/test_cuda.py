"""The native CUDA library on a GPU: what the suites of the ops do not ask of it.

Routes by row length, tensors beyond 2^31 elements, streams, graph capture, no waiting for the
device, the assertion on a class out of range, the same bits every time. Left out without a GPU,
where test_cuda_emulated.py runs the same sources.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import INF, LAYOUTS, NAN, TOLERANCE, check, check_borders, close, make
from torch import Tensor

import torchext
from torchext import _native

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
    pytest.mark.skipif(
        bool(_native.cuda_missing) and "TORCHEXT_NEEDS_CUDA" not in os.environ,
        reason=_native.cuda_missing or "the library is there",
    ),
]


def run(name: str, *args: Any) -> Any:
    return getattr(torch.ops.torchext, name)(*args)


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    with torch.device("cuda"), torchext.use_backend("native"):
        yield


def test_the_library_is_loaded() -> None:
    assert _native.cuda_missing == ""
    for name in ("cross_entropy_forward", "cross_entropy_backward", "linear_relu_forward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torchext::{name}", "CUDA")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    x, target, weight, probabilities = make(layout, dtype, "cuda")
    for reduction in ("none", "mean", "sum"):
        check(run, x, target, None, reduction)
        check(run, x, target.int(), weight, reduction, 0.1)
        check(run, x, probabilities, weight, reduction, 0.2)


@pytest.mark.parametrize("classes", [64, 1024, 4096, 32768, 50257, 128256, 262144, 600001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_every_route(classes: int, dtype: torch.dtype) -> None:
    """Lanes, blocks, clusters of 2 to 8 blocks, two passes; aligned and not."""
    x = torch.randn(7, classes).to(dtype)
    target = torch.randint(classes, (7,))
    target[3], target[6] = -100, classes - 1
    check(run, x, target)
    check(run, x, target, torch.rand(classes).to(dtype) + 0.1, "sum", 0.1)
    check(run, torch.randn(7, classes + 1).to(dtype)[:, 1:], target, reduction="none")


@pytest.mark.parametrize("classes", [5, 1100, 40000])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_special_values(classes: int, value: float) -> None:
    x = torch.randn(3, classes)
    x[1, 3] = value
    nothing = torch.randn(3, classes)
    nothing[1] = -INF
    for logits in (x, nothing, x.t().contiguous().t()):
        for ignored in (-100, 1):
            check(run, logits, torch.arange(3), reduction="sum", ignore_index=ignored)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_nothing_outside_is_touched(dtype: torch.dtype) -> None:
    check_borders(run, dtype, "cuda")


def large(elements: int, dtype: torch.dtype) -> None:
    need = 3 * elements * dtype.itemsize
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of memory")


def test_rows_beyond_2_to_the_31_elements() -> None:
    rows, classes = 70_000, 32_768
    large(rows * classes, torch.bfloat16)
    x = torch.empty(rows, classes, dtype=torch.bfloat16).normal_()
    target = torch.randint(classes, (rows,))
    loss, stats, _ = run("cross_entropy_forward", x, target, None, 0, -100, 0.0, False)
    upstream = torch.randn_like(loss)
    gradient = run("cross_entropy_backward", upstream, x, target, None, stats, 0, -100, 0.0)
    last = slice(rows - 5, rows)
    wide = x[last].double().requires_grad_()
    truth = F.cross_entropy(wide, target[last], reduction="none")
    close(loss[last], truth.detach(), "loss")
    close(gradient[last], torch.autograd.grad(truth, wide, upstream[last].double())[0], "gradient")
    total = run("cross_entropy_forward_", x, target, None, 2, -100, 0.0)
    assert total.isfinite()
    ones = torch.autograd.grad(
        F.cross_entropy(wide, target[last], reduction="sum"), wide
    )[0]  # fmt: skip
    close(x[last], ones, "gradient in place")


def test_positions_beyond_2_to_the_31_elements() -> None:
    positions, classes = 120_000_000, 19
    large(positions * classes, torch.bfloat16)
    x = torch.empty(1, classes, positions, dtype=torch.bfloat16).normal_()
    target = torch.randint(classes, (1, positions), dtype=torch.uint8)
    loss, stats, _ = run("cross_entropy_forward", x, target, None, 1, -100, 0.0, False)
    gradient = run(
        "cross_entropy_backward", torch.ones_like(loss), x, target, None, stats, 2, -100, 0.0
    )
    last = slice(positions - 9, positions)
    wide = x[:, :, last].double().requires_grad_()
    truth = F.cross_entropy(wide, target[:, last].long(), reduction="sum")
    close(gradient[:, :, last], torch.autograd.grad(truth, wide)[0], "gradient")
    assert 2.5 < float(loss) < 4.5  # log 19 and the spread of the logits


def training(x: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    hidden = torchext.linear_relu(x, weight, bias)
    loss = torchext.cross_entropy(hidden, target)
    return [loss, *torch.autograd.grad(loss, (x, weight, bias))]


def network() -> tuple[Tensor, ...]:
    x, weight, bias = torch.randn(256, 96), torch.randn(4096, 96) / 10, torch.randn(4096)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    return tensors[0], torch.randint(4096, (256,)), tensors[1], tensors[2]


def test_nothing_waits_for_the_device() -> None:
    inputs = network()
    training(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("classes", [1000, 128256, 600001])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_row_is_read_once_for_its_gradient(inplace: bool, classes: int) -> None:
    """Made with the loss, multiplied in its own memory; in place where that is asked."""
    leaf = torch.randn(5, classes, requires_grad=True)
    logits, target = leaf * 1, torch.randint(classes, (5,))
    before, upstream = torch.cuda.memory_allocated(), torch.randn(())
    loss = torchext.cross_entropy(logits, target, inplace_backward=inplace)
    made = torch.cuda.memory_allocated() - before > 4 * leaf.numel() // 2
    assert made == (not inplace and classes < 600001)  # a longer one is read again, in backward
    (found,) = torch.autograd.grad(loss, logits, upstream)
    assert (found.data_ptr() == logits.data_ptr()) == inplace
    truth = F.cross_entropy(leaf.double(), target)
    close(loss, truth, "loss")
    close(found, torch.autograd.grad(truth, leaf, upstream.double())[0].double(), "gradient")


def test_a_graph_captures_forward_and_backward() -> None:
    inputs = network()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training(*inputs)
    for _ in range(2):
        with torch.no_grad():
            inputs[0].normal_()
            inputs[1].random_(4096)
        graph.replay()
        expected = training(*inputs)
        for found, wanted in zip(captured, expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("classes", [1000, 32768, 262144])
def test_a_graph_captures_the_one_read_variant(classes: int) -> None:
    x, target = torch.randn(16, classes), torch.randint(classes, (16,))
    rest = (target, None, 1, -100, 0.0, True)
    run("cross_entropy_forward", x, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("cross_entropy_forward", x, *rest)
    x.normal_()
    graph.replay()
    expected = run("cross_entropy_forward", x, *rest)
    assert torch.equal(captured[0], expected[0])
    assert torch.equal(captured[2], expected[2])


def test_the_current_stream_is_used() -> None:
    """Work of a side stream: what it waits for is slow, so that another stream would be early."""
    side = torch.cuda.Stream()
    x, target = torch.zeros(512, 8192), torch.randint(8192, (512,))
    source = torch.randn(512, 8192)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(source)
        loss, _, gradient = run("cross_entropy_forward", x, target, None, 1, -100, 0.0, True)
    side.synchronize()
    expected = run("cross_entropy_forward", source, target, None, 1, -100, 0.0, True)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[2])


def test_the_device_of_the_tensors_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(8, 2000, device="cuda:1")
    check(run, x, torch.randint(2000, (8,), device="cuda:1"))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("classes", [10, 1000, 1543, 8192, 50257, 131072])
def test_bits(classes: int) -> None:
    """The same from run to run, and for a row in any batch."""
    x, target = torch.randn(40, classes), torch.randint(classes, (40,))

    def losses(rows: slice) -> tuple[Tensor, Tensor]:
        part = x[rows].clone()
        loss, stats, _ = run("cross_entropy_forward", part, target[rows], None, 0, -100, 0.0, False)
        gradient = run("cross_entropy_backward", torch.ones_like(loss), part, target[rows], None,
                       stats, 0, -100, 0.0)  # fmt: skip
        return loss, gradient

    whole = losses(slice(0, 40))
    for rows in (slice(0, 40), slice(3, 4), slice(7, 40)):
        for found, wanted in zip(losses(rows), whole, strict=True):
            assert torch.equal(found, wanted[rows])


def test_the_bias_gradient_has_the_same_bits_every_time() -> None:
    grad, output = torch.randn(10_000, 777), torch.randn(10_000, 777).relu()
    args = (grad, output, torch.randn(10_000, 3), torch.randn(777, 3), False, False, True)
    found = run("linear_relu_backward", *args)[2]
    for _ in range(5):
        assert torch.equal(run("linear_relu_backward", *args)[2], found)
    close(found, torch.where(output <= 0, 0, grad).double().sum(0), "gradient of the bias")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (33, 17, 65), (256, 512, 1024), (4096, 784, 64)])
@pytest.mark.parametrize("biased", [True, False])
def test_relu_keeps_nan(shape: tuple[int, int, int], dtype: torch.dtype, biased: bool) -> None:
    """The library's epilogue must keep it, whichever of its kernels a shape gets."""
    rows, features, outputs = shape
    x, weight = torch.randn(rows, features).to(dtype), torch.randn(outputs, features).to(dtype)
    x[0, 0] = NAN
    bias = torch.randn(outputs).to(dtype) if biased else None
    output = run("linear_relu_forward", x, weight, bias)
    assert output[0].isnan().all()
    assert not output[1:].isnan().any()
    assert (output[1:] >= 0).all()


@pytest.mark.parametrize("index", [-1, 1000])
@pytest.mark.parametrize("call", ["forward", "backward", "mean"])
def test_a_class_out_of_range_ends_in_torchs_assertion(call: str, index: int) -> None:
    code = f"""
import torch, torchext
x, target = torch.randn(4, 1000, device="cuda"), torch.tensor([0, {index}, 1, 2], device="cuda")
ops = torch.ops.torchext
if {call!r} == "backward":
    stats = torch.ones(2, 4, device="cuda")
    ops.cross_entropy_backward(
        torch.ones(4, device="cuda"), x, target, None, stats, 0, -100, 0.0)
else:
    reduction = 1 if {call!r} == "mean" else 0
    ops.cross_entropy_forward(x, target, None, reduction, -100, 0.0, reduction == 1)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "t >= 0 && t < n_classes" in done.stdout + done.stderr
    assert "device-side assert triggered" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(6, 130).to(dtype).requires_grad_()
    target = torch.randint(130, (6,))
    weight = (torch.rand(130) + 0.1).to(dtype)
    ops = torch.ops.torchext
    for args in (
        (x, target, None, 1, -100, 0.0, False),
        (x, target, weight, 2, 3, 0.1, True),
        (x, target, weight, 0, -100, 0.1, False),
    ):
        torch.library.opcheck(ops.cross_entropy_forward, args)
    linear = [torch.randn(s).to(dtype).requires_grad_() for s in ((5, 16), (24, 16), (24,))]
    torch.library.opcheck(ops.linear_relu_forward, linear)


def test_compile_the_whole() -> None:
    inputs = network()
    compiled: Callable[..., list[Tensor]] = torch.compile(
        lambda *args: torchext.cross_entropy(torchext.linear_relu(*args[1:]), args[0]),
        fullgraph=True,
    )
    x, target, weight, bias = inputs
    loss = compiled(target, x, weight, bias)
    gradients = torch.autograd.grad(loss, (x, weight, bias))
    for found, wanted in zip([loss, *gradients], training(*inputs), strict=True):
        torch.testing.assert_close(found, wanted)


def test_empty() -> None:
    x, target = torch.randn(0, 9), torch.empty(0, dtype=torch.long)
    for reduction, value in ((1, NAN), (2, 0.0)):
        loss, _, gradient = run(
            "cross_entropy_forward", x, target, None, reduction, -100, 0.0, True
        )
        torch.testing.assert_close(float(loss), value, equal_nan=True)
        assert gradient.shape == (0, 9)
    assert run("linear_relu_forward", torch.randn(0, 4), torch.randn(3, 4), None).shape == (0, 3)
    grads = run("linear_relu_backward", torch.randn(0, 3), torch.randn(0, 3), torch.randn(0, 4),
                torch.randn(3, 4), True, True, True)  # fmt: skip
    assert [grad.shape for grad in grads] == [(0, 4), (3, 4), (3,)]
    assert not grads[1].any()
    assert not grads[2].any()

"""linear_cross_entropy's CUDA operators on a GPU: routes, memory, streams, graphs, the same bits.

Left out without a GPU, where test_cuda_emulated_head.py runs the same sources.
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
from cuda_cases import HEAD_OPTIONS, NAN, TOLERANCE, Head, close

from torchext import _native

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
    pytest.mark.skipif(
        bool(_native.cuda_missing) and "TORCHEXT_NEEDS_CUDA" not in os.environ,
        reason=_native.cuda_missing or "the library is there",
    ),
]
# In one piece; then more than 64 MiB of logits: in pieces, two of them ragged, of many rows to a
# feature and of few; and in chunks of rows, whose gradient is no place for logits.
SHAPES = [(37, 12, 50), (70, 5, 1543), (600, 700, 65544), (300, 1000, 131_073), (2000, 90, 32000)]
CHUNKS = (90_000, 40, 7000)


def forward(*arguments: Any) -> Any:
    return torch.ops.torchext.linear_cross_entropy_forward(*arguments)


def backward(*arguments: Any) -> Any:
    return torch.ops.torchext.linear_cross_entropy_backward(*arguments)


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    with torch.device("cuda"):
        yield


def test_the_operators_are_there() -> None:
    for name in ("forward", "backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"torchext::linear_cross_entropy_{name}", "CUDA"
        )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_values_and_gradients(
    shape: tuple[int, int, int], options: dict[str, Any], dtype: torch.dtype
) -> None:
    Head(shape, dtype, device="cuda", **options).check(forward, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_values_and_gradients_of_large_heads(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    Head(shape, dtype, device="cuda", bias=True, smoothing=0.1).check(forward, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_rows(dtype: torch.dtype) -> None:
    """Against blocks of rows in float64, whose logits would not fit as a whole."""
    rows, features, classes = CHUNKS
    head = Head((rows, features, classes), dtype, device="cuda", reduction="sum")
    loss, _, grad_input, grad_weight, _ = forward(
        *head.arguments(), *head.options(), True, True, False
    )
    weight = head.leaves[1].double().requires_grad_()
    total, of_weight = 0.0, torch.zeros_like(weight)
    for first in range(0, rows, 10_000):
        block = slice(first, first + 10_000)
        input = head.leaves[0][block].double().requires_grad_()
        truth = F.cross_entropy(input @ weight.t(), head.target[block], reduction="sum")
        for_input, for_weight = torch.autograd.grad(truth, (input, weight))
        total += float(truth)
        of_weight += for_weight
        close(grad_input[block], for_input, f"input from row {first}")
    torch.testing.assert_close(float(loss), total, rtol=TOLERANCE[dtype], atol=0)
    close(grad_weight, of_weight, "linear_weight")


def test_the_memory_of_the_largest_shape() -> None:
    """Within 1.2 GB of the inputs and gradients, where there are clusters."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("rows of 128,256 classes need clusters")
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of memory")
    rows, features, classes = 8192, 4096, 128_256
    input = torch.randn(rows, features, dtype=torch.bfloat16)
    weight = torch.randn(classes, features, dtype=torch.bfloat16) / 64
    target = torch.randint(classes, (rows,))
    arguments = (input, weight, target, None, None, 1, -100, 0.0, True, True, False)
    forward(*arguments)  # cuBLAS' own memory stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = forward(*arguments)
    torch.cuda.synchronize()
    gradients = sum(result.numel() * result.element_size() for result in results)
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1.2e9


def test_nothing_waits_for_the_device() -> None:
    for shape in SHAPES[:3]:
        head = Head(shape, torch.bfloat16, device="cuda", bias=True)
        call(head)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(head)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def call(head: Head) -> list[torch.Tensor]:
    loss, stats, *gradients = forward(*head.arguments(), *head.options(), True, True, True)
    rest = (*head.arguments(), stats, *head.options(), True, True, True)
    return [loss, stats, *gradients, *backward(head.upstream, *rest)]


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_graph_captures_both(shape: tuple[int, int, int]) -> None:
    head = Head(shape, torch.bfloat16, device="cuda", bias=True, weighted=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(head)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(head)
    for _ in range(2):
        head.leaves[0].normal_()
        head.target.random_(shape[2])
        head.upstream.normal_()
        graph.replay()
        for found, wanted in zip(captured, call(head), strict=True):
            torch.testing.assert_close(found, wanted)


def test_the_current_stream_is_used() -> None:
    """What the side stream waits for is slow, so that another stream would be early."""
    side = torch.cuda.Stream()
    for shape in SHAPES[:3]:
        head = Head(shape, torch.float32, device="cuda", bias=True)
        expected = call(head)
        source = head.leaves[0].clone()
        head.leaves[0].zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            head.leaves[0].copy_(source)
            found = call(head)
        side.synchronize()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_the_device_of_the_tensors_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    Head((40, 9, 60), torch.float32, device="cuda:1", bias=True).check(forward, backward)
    assert torch.cuda.current_device() == 0


def test_tensors_of_two_devices_are_refused() -> None:
    head = Head((4, 3, 5), torch.float32, device="cuda")
    input, weight, target, _, _ = head.arguments()
    with pytest.raises(RuntimeError, match="expected linear_bias on input's device"):
        forward(input, weight, target, torch.zeros(5, device="cpu"), None, 1, -100, 0.0, False,
                False, False)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.torchext
    for options in HEAD_OPTIONS:
        head = Head((6, 16, 130), dtype, device="cuda", **options)
        wanted = (False, False, False) if head.reduction == "none" else (True, True, False)
        leaves = [leaf.requires_grad_() for leaf in head.leaves]
        arguments = (*leaves, head.target, head.bias, head.weight, *head.options(), *wanted)
        torch.library.opcheck(ops.linear_cross_entropy_forward, arguments)


def test_empty() -> None:
    input, weight = torch.randn(0, 4), torch.randn(9, 4)
    target = torch.empty(0, dtype=torch.long)
    for code, value in ((1, NAN), (2, 0.0)):
        loss, stats, *gradients = forward(
            input, weight, target, torch.randn(9), None, code, -100, 0.0, True, True, True
        )
        torch.testing.assert_close(float(loss), value, equal_nan=True)
        assert stats.shape == (2, 0)
        assert [gradient.shape for gradient in gradients] == [(0, 4), (9, 4), (9,)]
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("index", [-1, 65544])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(600, 700, 65544), (6, 7, 65544)])
def test_a_class_out_of_range_ends_in_torchs_assertion(
    shape: tuple[int, int, int], direction: str, index: int
) -> None:
    rows, features, classes = shape
    code = f"""
import torch, torchext
torch.set_default_device("cuda")
x, weight = torch.randn({rows}, {features}), torch.randn({classes}, {features})
target = torch.randint({classes}, ({rows},))
target[3] = {index}
ops = torch.ops.torchext
if {direction!r} == "backward":
    ops.linear_cross_entropy_backward(
        torch.ones({rows}), x, weight, target, None, None, torch.ones(2, {rows}), 0, -100, 0.0,
        True, True, False)
else:
    ops.linear_cross_entropy_forward(
        x, weight, target, None, None, 2, -100, 0.0, True, True, False)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "t >= 0 && t < n_classes" in done.stdout + done.stderr
    assert "device-side assert triggered" in done.stderr


def test_compile_the_operators() -> None:
    head = Head((40, 12, 500), torch.float32, device="cuda", bias=True)
    arguments = (*head.arguments(), *head.options(), True, True, True)
    compiled: Callable[..., Any] = torch.compile(forward, fullgraph=True)
    for found, wanted in zip(compiled(*arguments), forward(*arguments), strict=True):
        torch.testing.assert_close(found, wanted)

"""linear_cross_entropy on a GPU: what its suites do not ask of it. Left out without one.

Waiting for the device, graph capture, memory; by the backends that serve CUDA tensors.
"""

from __future__ import annotations

import pytest
import torch
from test_linear_cross_entropy_backends import check
from torch import Tensor

import torchext
from torchext import _triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")

SHAPES = [(700, 256, 33000), (8192, 64, 16384)]


@pytest.fixture(autouse=True)
def only_kernels(device: str, backend: str) -> None:
    if device != "cuda" or backend == "eager":
        pytest.skip("about the kernels on a GPU")
    if backend == "native" and not _triton.has_native_cuda("linear_cross_entropy"):
        pytest.skip("the CUDA library has no linear_cross_entropy")


def network(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, features, classes = shape
    x = torch.randn(rows, features, device="cuda").to(dtype).requires_grad_()
    w = (torch.randn(classes, features, device="cuda") / features**0.5).to(dtype).requires_grad_()
    return x, w, torch.randint(classes, (rows,), device="cuda")


def step(x: Tensor, w: Tensor, target: Tensor, reduction: str = "mean") -> list[Tensor]:
    loss = torchext.linear_cross_entropy(x, w, target, reduction=reduction)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (x, w))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_and_a_graph_captures(
    device: str, backend: str, shape: tuple[int, int, int], reduction: str
) -> None:
    x, w, target = network(shape, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(x, w, target, reduction)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, w, target, reduction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, w, target, reduction)
    with torch.no_grad():
        x.normal_()
        target.random_(shape[2])
    graph.replay()
    for found, wanted in zip(captured, step(x, w, target, reduction), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_calls_are_as_near_the_truth_as_stock(
    device: str, backend: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Several chunks, and tiles chosen by the shape."""
    x, w, target = network(shape, dtype)
    check((x, w, None), target)


def test_memory(device: str, backend: str) -> None:
    """Beside inputs and gradients: 1.2 GB for a head whose logits alone are 2.1 GB."""
    x, w, target = network((8192, 4096, 128_256), torch.bfloat16)
    step(x[:512], w, target[:512])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step(x, w, target)
    gradients = sum(t.untyped_storage().nbytes() for t in results)
    assert torch.cuda.max_memory_allocated() - before - gradients < 1.2e9

"""The CUDA sources of both ops, run on the CPU: see cuda/emulated/cuda/gpu.cuh.

Compiled as C++, with threads, warps, shared memory and clusters played by fibers, they are held to
the truth as they stand: indexing, masks, reductions, routes, the host's code. Machine code, races
and speed are for a GPU (test_cuda.py).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import INF, LAYOUTS, NAN, TOLERANCE, check, check_borders, close, make, shifted

from torchext import _triton
from torchext.ops import cross_entropy_gpu


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy(emulated: Callable[..., Any], layout: str, dtype: torch.dtype) -> None:
    x, target, weight, probabilities = make(layout, dtype)
    check(emulated, x, target)
    check(emulated, x, target.int(), weight, "sum", 0.1)
    check(emulated, x, target, weight, "none")
    check(emulated, x, probabilities, weight, "mean", 0.2)


@pytest.mark.parametrize("classes", [5, 1100])
@pytest.mark.parametrize("value", ["+inf", "-inf", "nan", "inf and nan", "nothing but -inf"])
def test_special_values(emulated: Callable[..., Any], classes: int, value: str) -> None:
    x = torch.randn(3, classes)
    if value == "nothing but -inf":
        x[1] = -INF
    else:
        x[1, 3] = {"+inf": INF, "-inf": -INF, "nan": NAN, "inf and nan": NAN}[value]
        x[1, 4] = INF if value == "inf and nan" else 0.5
    target = torch.arange(3)
    for logits in (x, x.t().contiguous().t()):
        check(emulated, logits, target)
        check(emulated, logits, target, ignore_index=1, reduction="sum")
        check(emulated, logits, target, ignore_index=1, reduction="none")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_nothing_outside_is_touched(emulated: Callable[..., Any], dtype: torch.dtype) -> None:
    check_borders(emulated, dtype)


def test_a_mean_over_no_target_is_nan(emulated: Callable[..., Any]) -> None:
    check(emulated, torch.randn(3, 9), torch.full((3,), -100))
    check(emulated, torch.randn(2, 3, 4), torch.full((2, 4), -100))


def test_empty(emulated: Callable[..., Any]) -> None:
    x, target = torch.randn(0, 9), torch.empty(0, dtype=torch.long)
    for reduction, value in ((1, NAN), (2, 0.0)):
        loss, _, gradient = emulated(
            "cross_entropy_forward", x, target, None, reduction, -100, 0.0, True
        )
        torch.testing.assert_close(float(loss), value, equal_nan=True)
        assert gradient.shape == (0, 9)
    loss, stats, _ = emulated("cross_entropy_forward", x, target, None, 0, -100, 0.1, False)
    assert loss.shape == (0,)
    rest = (stats, 0, -100, 0.1)
    assert emulated("cross_entropy_backward", loss, x, target, None, *rest).shape == (0, 9)


@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_which_rows_stay_in_registers(
    emulated: Callable[..., Any],
    clusters: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python's rule is the kernels' own."""
    monkeypatch.setattr(cross_entropy_gpu, "_blocks_of_a_row", lambda device: 8 if clusters else 1)
    monkeypatch.setattr(_triton, "missing", lambda: "")
    if not clusters:
        monkeypatch.setenv("TORCHEXT_EMULATED_NO_CLUSTERS", "1")
    found = set()
    for power in range(9, 20):
        for classes in (1 << power, (1 << power) + 8, (1 << power) + 1):
            for x in (torch.empty(2, classes, dtype=dtype), shifted(2, classes).to(dtype)):
                target = torch.zeros(2, dtype=torch.long)
                for smoothing in (0.0, 0.1):
                    ours = cross_entropy_gpu.stays_in_registers(x, smoothing > 0)
                    kernels = torch.ops.torchext_emulated.stays_in_registers(x, target, smoothing)
                    assert ours == kernels, (classes, x.stride(), smoothing)
                    found.add(ours)
    assert found == {True, False}
    assert not cross_entropy_gpu.stays_in_registers(torch.empty(2, 9, 4, dtype=dtype), False)
    assert not cross_entropy_gpu.stays_in_registers(torch.empty(9, 2, dtype=dtype).t(), False)


@pytest.mark.parametrize("clusters", [True, False])
def test_large_rows(
    emulated: Callable[..., Any], clusters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row in the registers of a cluster; without clusters, in two passes."""
    if not clusters:
        monkeypatch.setenv("TORCHEXT_EMULATED_NO_CLUSTERS", "1")
    for x in (shifted(2, 17000), torch.randn(1, 33003).to(torch.bfloat16)):
        target = torch.tensor([x.shape[1] - 1] * x.shape[0])
        check(emulated, x, target)
    x = shifted(1, 9001)
    check(emulated, x, torch.tensor([9000]), torch.rand(9001), "sum", 0.1)


def test_rows_do_not_depend_on_their_batch(emulated: Callable[..., Any]) -> None:
    for classes in (10, 1000, 1543):
        x, target = torch.randn(9, classes), torch.randint(classes, (9,))
        rest = (0, -100, 0.0, False)
        whole = emulated("cross_entropy_forward", x, target, None, *rest)[0]
        for rows in (slice(2, 3), slice(4, 9)):
            part = emulated("cross_entropy_forward", x[rows].clone(), target[rows], None, *rest)[0]
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(7, 3, 5), (130, 8, 64), (70, 5, 33), (1, 4, 600), (0, 4, 3)])
def test_linear_relu(
    emulated: Callable[..., Any], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, inputs, outputs = shape
    x, weight, bias = (
        torch.randn(s).to(dtype) for s in ((rows, inputs), (outputs, inputs), outputs)
    )
    output = emulated("linear_relu_forward", x, weight, bias)
    torch.testing.assert_close(output, F.relu(F.linear(x, weight, bias)))
    torch.testing.assert_close(
        emulated("linear_relu_forward", x, weight, None), F.relu(F.linear(x, weight))
    )
    grad = torch.randn(rows, outputs).to(dtype)
    masked = torch.where(output <= 0, 0, grad)
    grads = emulated("linear_relu_backward", grad, output, x, weight, True, True, True)
    torch.testing.assert_close(grads[0], masked @ weight)
    torch.testing.assert_close(grads[1], masked.t() @ x)
    close(grads[2], masked.double().sum(0), "gradient of the bias")
    only = emulated("linear_relu_backward", grad, output, x, weight, False, False, True)
    assert torch.equal(only[2], grads[2])
    assert [g.numel() for g in only[:2]] == [0, 0]


def test_a_nan_counts_as_positive(emulated: Callable[..., Any]) -> None:
    output = torch.tensor([[NAN, 0.0, 1.0, -0.0]])
    args = (torch.ones(1, 4), output, torch.ones(1, 2), torch.ones(4, 2))
    grads = emulated("linear_relu_backward", *args, False, False, True)
    assert grads[2].tolist() == [1.0, 0.0, 1.0, 0.0]
    bias = torch.tensor([NAN, -1.0, 2.0])
    nothing = emulated("linear_relu_forward", torch.ones(2, 0), torch.ones(3, 0), bias)
    torch.testing.assert_close(nothing, torch.tensor([[NAN, 0.0, 2.0]] * 2), equal_nan=True)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_class_out_of_range_ends_in_torchs_assertion(emulated_library: Path, index: int) -> None:
    code = f"""
import torch, torchext
torch.ops.load_library({str(emulated_library)!r})
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
op = torch.ops.torchext.cross_entropy_forward.default
op._handle.redispatch_boxed(
    keys, torch.randn(2, 5), torch.tensor([0, {index}]), None, 1, -100, 0.0, False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "t >= 0 && t < n_classes" in done.stderr

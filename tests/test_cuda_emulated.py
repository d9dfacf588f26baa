"""The CUDA sources of both ops, run on the CPU: see cuda/emulated/cuda/gpu.cuh.

Compiled as C++, with threads, warps, shared memory and clusters played by fibers, they are held to
the truth as they stand: indexing, masks, reductions, routes, the host's code. Machine code, races
and speed are for a GPU (test_cuda.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import INF, LAYOUTS, NAN, TOLERANCE, check, check_borders, close, make, shifted

import torchext._native

ROOT = Path(__file__).resolve().parents[1]


def cuda_headers() -> Path | None:
    """The folder of cuda_runtime.h: beside nvcc, or where the toolkit is."""
    nvcc = shutil.which("nvcc")
    places = [Path("/usr/local/cuda/include")]
    if nvcc is not None:
        places.append(Path(nvcc).resolve().parents[1] / "include")
    return next((place for place in places if (place / "cuda_runtime.h").exists()), None)


def build(folder: Path, headers: Path) -> Path:
    """Compiles what is older than its sources; returns the library."""
    folder.mkdir(parents=True, exist_ok=True)
    torch_home = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY",
             "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'tests/cuda/emulated'}",
             f"-I{ROOT / 'csrc'}", "-isystem", str(torch_home / "include"),
             "-isystem", str(headers)]  # fmt: skip
    sources = [*ROOT.glob("csrc/cuda/*.c*"), ROOT / "tests/cuda/emulation.cpp"]
    parts = {".h", ".cuh"}
    included = [path for path in ROOT.glob("csrc/**/*") if path.suffix in parts]
    included += ROOT.glob("tests/cuda/emulated/cuda/*")
    newest = max(path.stat().st_mtime for path in [*included, Path(__file__)])
    objects = []
    for source in sources:
        if source.suffix == ".cuh":
            continue
        target = folder / f"{source.name}.o"
        objects.append(str(target))
        if target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
            continue
        subprocess.run(
            ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True
        )
    library = folder / "emulated.so"
    libraries = [f"-L{torch_home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", "-o", str(library), *objects, *libraries], check=True)
    return library


@pytest.fixture(scope="session")
def library() -> Path:
    headers = cuda_headers()
    if headers is None:
        assert not os.environ.get("CI"), "the headers of CUDA must be there in CI"
        pytest.skip("the headers of CUDA are not here")
    if torchext._native.cuda_missing == "":
        pytest.skip("the CUDA library itself is loaded")
    return build(ROOT / "build/emulated", headers)


@pytest.fixture(scope="session")
def run(library: Path) -> Callable[..., Any]:
    """Calls an operator's CUDA kernel, whatever its tensors' device."""
    torch.ops.load_library(library)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(name: str, *args: Any) -> Any:
        op = getattr(torch.ops.torchext, name).default
        return op._handle.redispatch_boxed(keys, *args)

    return call


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy(run: Callable[..., Any], layout: str, dtype: torch.dtype) -> None:
    x, target, weight, probabilities = make(layout, dtype)
    check(run, x, target)
    check(run, x, target.int(), weight, "sum", 0.1)
    check(run, x, target, weight, "none")
    check(run, x, probabilities, weight, "mean", 0.2)


@pytest.mark.parametrize("classes", [5, 1100])
@pytest.mark.parametrize("value", ["+inf", "-inf", "nan", "inf and nan", "nothing but -inf"])
def test_special_values(run: Callable[..., Any], classes: int, value: str) -> None:
    x = torch.randn(3, classes)
    if value == "nothing but -inf":
        x[1] = -INF
    else:
        x[1, 3] = {"+inf": INF, "-inf": -INF, "nan": NAN, "inf and nan": NAN}[value]
        x[1, 4] = INF if value == "inf and nan" else 0.5
    target = torch.arange(3)
    for logits in (x, x.t().contiguous().t()):
        check(run, logits, target)
        check(run, logits, target, ignore_index=1, reduction="sum")
        check(run, logits, target, ignore_index=1, reduction="none")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_nothing_outside_is_touched(run: Callable[..., Any], dtype: torch.dtype) -> None:
    check_borders(run, dtype)


def test_a_mean_over_no_target_is_nan(run: Callable[..., Any]) -> None:
    check(run, torch.randn(3, 9), torch.full((3,), -100))
    check(run, torch.randn(2, 3, 4), torch.full((2, 4), -100))


def test_empty(run: Callable[..., Any]) -> None:
    x, target = torch.randn(0, 9), torch.empty(0, dtype=torch.long)
    for reduction, value in ((1, NAN), (2, 0.0)):
        loss, _, gradient = run(
            "cross_entropy_forward", x, target, None, reduction, -100, 0.0, True
        )
        torch.testing.assert_close(float(loss), value, equal_nan=True)
        assert gradient.shape == (0, 9)
    loss, stats, _ = run("cross_entropy_forward", x, target, None, 0, -100, 0.1, False)
    assert loss.shape == (0,)
    rest = (stats, 0, -100, 0.1)
    assert run("cross_entropy_backward", loss, x, target, None, *rest).shape == (0, 9)


@pytest.mark.parametrize("clusters", [True, False])
def test_large_rows(
    run: Callable[..., Any], clusters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row in the registers of a cluster; without clusters, in two passes."""
    if not clusters:
        monkeypatch.setenv("TORCHEXT_EMULATED_NO_CLUSTERS", "1")
    for x in (shifted(2, 17000), torch.randn(1, 33003).to(torch.bfloat16)):
        target = torch.tensor([x.shape[1] - 1] * x.shape[0])
        check(run, x, target)
    x = shifted(1, 9001)
    check(run, x, torch.tensor([9000]), torch.rand(9001), "sum", 0.1)


def test_rows_do_not_depend_on_their_batch(run: Callable[..., Any]) -> None:
    for classes in (10, 1000, 1543):
        x, target = torch.randn(9, classes), torch.randint(classes, (9,))
        rest = (0, -100, 0.0, False)
        whole = run("cross_entropy_forward", x, target, None, *rest)[0]
        for rows in (slice(2, 3), slice(4, 9)):
            part = run("cross_entropy_forward", x[rows].clone(), target[rows], None, *rest)[0]
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(7, 3, 5), (130, 8, 64), (70, 5, 33), (1, 4, 600), (0, 4, 3)])
def test_linear_relu(
    run: Callable[..., Any], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, inputs, outputs = shape
    x, weight, bias = (
        torch.randn(s).to(dtype) for s in ((rows, inputs), (outputs, inputs), outputs)
    )
    output = run("linear_relu_forward", x, weight, bias)
    torch.testing.assert_close(output, F.relu(F.linear(x, weight, bias)))
    torch.testing.assert_close(
        run("linear_relu_forward", x, weight, None), F.relu(F.linear(x, weight))
    )
    grad = torch.randn(rows, outputs).to(dtype)
    masked = torch.where(output <= 0, 0, grad)
    grads = run("linear_relu_backward", grad, output, x, weight, True, True, True)
    torch.testing.assert_close(grads[0], masked @ weight)
    torch.testing.assert_close(grads[1], masked.t() @ x)
    close(grads[2], masked.double().sum(0), "gradient of the bias")
    only = run("linear_relu_backward", grad, output, x, weight, False, False, True)
    assert torch.equal(only[2], grads[2])
    assert [g.numel() for g in only[:2]] == [0, 0]


def test_a_nan_counts_as_positive(run: Callable[..., Any]) -> None:
    output = torch.tensor([[NAN, 0.0, 1.0, -0.0]])
    args = (torch.ones(1, 4), output, torch.ones(1, 2), torch.ones(4, 2))
    grads = run("linear_relu_backward", *args, False, False, True)
    assert grads[2].tolist() == [1.0, 0.0, 1.0, 0.0]
    bias = torch.tensor([NAN, -1.0, 2.0])
    nothing = run("linear_relu_forward", torch.ones(2, 0), torch.ones(3, 0), bias)
    torch.testing.assert_close(nothing, torch.tensor([[NAN, 0.0, 2.0]] * 2), equal_nan=True)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_class_out_of_range_ends_in_torchs_assertion(library: Path, index: int) -> None:
    code = f"""
import torch, torchext
torch.ops.load_library({str(library)!r})
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
op = torch.ops.torchext.cross_entropy_forward.default
op._handle.redispatch_boxed(
    keys, torch.randn(2, 5), torch.tensor([0, {index}]), None, 1, -100, 0.0, False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "t >= 0 && t < n_classes" in done.stderr

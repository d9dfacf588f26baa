"""Builds the CUDA sources for a CPU, and calls them: see cuda/emulated/cuda/gpu.cuh."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
    with (folder / "lock").open("w") as lock:  # pytest-xdist has several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder, headers)


def _build(folder: Path, headers: Path) -> Path:
    torch_home = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY",
             "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'tests/cuda/emulated'}",
             f"-I{ROOT / 'csrc'}", "-isystem", str(torch_home / "include"),
             "-isystem", str(headers)]  # fmt: skip
    sources = [*ROOT.glob("csrc/cuda/*.c*"), *ROOT.glob("tests/cuda/*.cpp")]
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
    if library.exists() and all(library.stat().st_mtime > Path(o).stat().st_mtime for o in objects):
        return library
    libraries = [f"-L{torch_home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", "-o", str(library), *objects, *libraries], check=True)
    return library


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    headers = cuda_headers()
    if headers is None:
        assert not os.environ.get("CI"), "the headers of CUDA must be there in CI"
        pytest.skip("the headers of CUDA are not here")
    if torchext._native.cuda_missing == "":
        pytest.skip("the CUDA library itself is loaded")
    return build(ROOT / "build/emulated", headers)


@pytest.fixture(scope="session")
def emulated(emulated_library: Path) -> Callable[..., Any]:
    """Calls an operator's CUDA kernel, whatever its tensors' device."""
    torch.ops.load_library(emulated_library)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(name: str, *args: Any) -> Any:
        op = getattr(torch.ops.torchext, name).default
        return op._handle.redispatch_boxed(keys, *args)

    return call

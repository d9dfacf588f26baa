"""``torchext info``: what this installation can do, and why not the rest."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import torchext
from torchext import _native


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options: it has none."""


def run(given: dict[str, Any]) -> int:
    """Print the table.

    Args:
        given: the options; none.

    Returns:
        The exit code.
    """
    previous = ""
    for label, text in _rows():
        print(f"{'' if label == previous else label:<12}{text}")
        previous = label
    return 0


def _rows() -> Iterator[tuple[str, str]]:
    yield "torchext", f"{torchext.__version__} ({Path(torchext.__file__).parent})"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "torch", torch.__version__
    yield "library", f"torchext._C {_library('torchext._C')}"
    reason = _native.cuda_missing
    state = f"not loaded: {reason}" if reason else _library("torchext._C_cuda")
    yield "library", f"torchext._C_cuda {state}"
    yield "devices", f"cpu     {_processor()}, {os.cpu_count()} logical cores"
    yield from (("devices", text) for text in _cuda_devices())
    yield "simd", f"{_native.simd_level()} (torch: {torch.backends.cpu.get_cpu_capability()})"
    yield "threads", str(torch.get_num_threads())
    for name, backend in torchext.backends().items():
        state = "available" if backend.available else f"not available: {backend.reason}"
        yield "backends", f"{name:<8}{state}"


def _library(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return "not built"
    loaded = os.path.realpath(spec.origin) in torch.ops.loaded_libraries
    return f"{'loaded' if loaded else 'not loaded'} ({spec.origin})"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _cuda_devices() -> Iterator[str]:
    if torch.version.cuda is None:
        yield "cuda    none: this torch is built without CUDA"
    elif not torch.cuda.is_available():
        yield f"cuda    none: no usable device (torch is built for CUDA {torch.version.cuda})"
    else:
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield (
                f"cuda:{index}  {device.name}, compute capability {device.major}.{device.minor}, "
                f"{device.total_memory / 2**30:.1f} GiB"
            )

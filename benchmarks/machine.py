"""Where it was measured: machine, versions, commit, date."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import torchext
from torchext import _native

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
_CACHE_BYTES = 32 << 20  # where the system does not say


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed of up to 32 MiB, until the process ends.

    By itself glibc gives the heap's end back to the system when enough of it is free, at a moment
    that depends on everything that ran before, and some later call, of whichever provider, faults
    it in page by page: 1024 x 1000 floats took 160 to 520 microseconds by that, and take 140 to
    164. In a training process such memory is in use again and again.

    Returns:
        Whether it is done: by glibc alone.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 32 << 20))


def describe(device: str) -> dict[str, Any]:
    """Returns what a reader needs to know of the machine.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "simd": f"torchext {_native.simd_level()}, torch {torch.backends.cpu.get_cpu_capability()}",
        "cache_mib": round(cache_bytes("cpu") / 2**20),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "huge_pages": _huge_pages(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


def name(device: str) -> str:
    """Returns the name of the folder for this machine's results."""
    machine = describe(device)
    text = machine["gpu"] if device == "cuda" else f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def versions() -> dict[str, str]:
    """Returns the versions of what is measured."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchext": torchext.__version__,
    }


def commit() -> str:
    """Returns the commit that is measured, ``-dirty`` behind it if the sources are not its own."""
    if not (text := _git("rev-parse", "--short=12", "HEAD")):
        return "unknown"
    sources = ["csrc", "torchext", "triton_kernels", "benchmarks/*.py", "examples", "setup.py"]
    changed = _git("status", "--porcelain", "--", *sources)
    return text + ("-dirty" if changed else "")


def now() -> str:
    """Returns the time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")


@lru_cache
def cache_bytes(device: str) -> int:
    """Returns the size of the last cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    try:
        for index in (3, 2):
            size = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size")
            if size.exists():
                return int(size.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        pass
    return _CACHE_BYTES


def available_bytes(device: str) -> int:
    """Returns how much memory can be taken; a lot where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 1 << 50


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _cpu_model() -> str:
    """The processor; a cloud that hides the model ("AMD EPYC") still tells family and number."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found and not re.search(r"\d", name):
        name += f" (family {found['cpu family']}, model {found.get('model', 'unknown')})"
    return name


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0]


def _git(*args: str) -> str:
    try:
        done = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()

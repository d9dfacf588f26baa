"""Peak memory of one call above its inputs: on the CPU that of a fresh process, on a GPU the
allocator's.

On the CPU it is the growth of the resident set: what is allocated and never touched does not count.
The inputs are there before; the gradients that the call gives are part of it. What a first call
leaves behind (a library's buffers) counts, but for compilers, whose own memory that would be.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, suites
from benchmarks.case import Case, Op, generator
from benchmarks.harness import Settings
from benchmarks.machine import ROOT
from benchmarks.providers import Provider, Task, providers_of
from benchmarks.results import Row

_MIB = 1 << 20
_TIMEOUT_S = 900
_WARM_UP_SIZE = 64


def measure(
    suite: str,
    op: Op,
    settings: Settings,
    rows: list[Row],
    progress: Callable[[str], object],
    end: float = math.inf,
) -> None:
    """Measures the peak memory of an op's providers, each in a process of its own on the CPU.

    Args:
        suite: its name.
        op: the op.
        settings: what to measure.
        rows: gets the rows.
        progress: called with the name of what comes next.
        end: of `time.monotonic`, after which the rest is left out.
    """
    for case in cases_of(op, settings):
        for provider in providers_of(op):
            if not settings.wants(provider.name) or provider.missing(op, case):
                continue
            if provider.name == "torchext native" and not settings.full:
                continue
            progress(f"memory: {case.label}, {provider.name}")
            row = Row(
                suite=suite, case=case.label, provider=provider.name, role=provider.role,
                version=provider.version(), op=case.op, size=case.size, dtype=case.dtype,
                direction=case.direction, device=case.device, options=case.variant,
                plot_size=float(case.shape[op.memory_axis]),
            )  # fmt: skip
            rows.append(row)
            if time.monotonic() > end:
                row.fail("skipped", f"the suite's {settings.budget:.0f} s were over")
                continue
            if provider.role == "limit":
                row.version = "the gradients alone"
                row.peak_mib, row.status = _gradients(op, case) / _MIB, "ok"
                continue
            try:
                row.peak_mib = _peak(case, provider.name) / _MIB
                row.status = "ok"
            except (RuntimeError, subprocess.SubprocessError) as error:
                row.fail("failed", " ".join(str(error).split())[-300:])


def cases_of(op: Op, settings: Settings) -> list[Case]:
    """The cases whose memory the settings ask for."""
    if not settings.memory or settings.shapes:
        return []
    presets = op.memory_presets(settings.full, settings.device)
    return [replace(case, device=settings.device) for case in presets]


def steps(op: Op, settings: Settings) -> int:
    """Returns how often `measure` will call `progress`."""
    return sum(
        not provider.missing(op, case)
        and settings.wants(provider.name)
        and (settings.full or provider.name != "torchext native")
        for case in cases_of(op, settings)
        for provider in providers_of(op)
    )


def _gradients(op: Op, case: Case) -> int:
    """The bytes of the gradients that any provider gives."""
    inputs = op.inputs(case, generator(case, 0))
    return sum(tensor.numel() * tensor.element_size() for tensor in inputs.wanted)


def _peak(case: Case, provider: str) -> int:
    """The peak of one provider on one case, in bytes."""
    if case.device != "cpu":
        return _cuda_peak(case, provider)
    order = {"case": case.to_dict(), "provider": provider, "threads": torch.get_num_threads()}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(order)],
        cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"exit code {done.returncode}")
    return int(done.stdout.split()[-1])


def _setup(case: Case, provider_name: str) -> tuple[Provider, Task]:
    op = suites.op(case.op)
    provider = next(each for each in providers_of(op) if each.name == provider_name)
    sets = [op.inputs(case, generator(case, 0))]
    return provider, provider.make(op, case, sets)


def _cuda_peak(case: Case, provider: str) -> int:
    _, task = _setup(case, provider)
    harness.warm_up(task)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _call(task)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def _call(task: Task) -> None:
    with task.context():
        for item in task.prepare(1):
            task.run(item)


def _cpu_peak(case: Case, provider_name: str) -> int:
    """In the fresh process."""
    axis = suites.op(case.op).memory_axis
    shape = list(case.shape)
    shape[axis] = min(shape[axis], _WARM_UP_SIZE)
    # Threads start, and code is read in, that is counted once only.
    harness.warm_up(_setup(replace(case, shape=tuple(shape)), provider_name)[-1])
    provider, task = _setup(case, provider_name)
    _trim()
    begin = _resident("VmRSS")
    if provider.compiles:
        _call(task)
        _trim()
        begin = _resident("VmRSS")
    _reset_peak()
    _call(task)
    return _peak_resident() - begin


def _trim() -> None:
    """Gives freed memory back to the system, so that its use is seen again."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}")


def _reset_peak() -> None:
    """From here on the peak is counted anew, where the system lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_resident() -> int:
    try:
        return _resident("VmHWM")
    except (OSError, RuntimeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    """The fresh process: prints the peak in bytes."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    print(_cpu_peak(Case.from_dict(order["case"]), order["provider"]))


if __name__ == "__main__":
    main()

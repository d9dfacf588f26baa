"""What a call costs beside its work (1 x 8 tensors), and what `import torchext` costs."""

from __future__ import annotations

import compileall
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks import harness, suites, under_pytest
from benchmarks.case import DIRECTIONS, Case, Op
from benchmarks.harness import Settings
from benchmarks.machine import ROOT, versions
from benchmarks.results import Row

_PROVIDERS = ("eager", "compile", "JAX", "torchext", "torchext native", "torchext triton")
_IMPORT_CASE = "import torchext, after import torch"
_IMPORT_CODE = """
import time
begin = time.perf_counter()
import torch
middle = time.perf_counter()
import torchext
end = time.perf_counter()
print((middle - begin) * 1e3, (end - middle) * 1e3)
"""


class Overhead:
    """The smallest call of each op, and the import in fresh processes."""

    name = "overhead"

    def steps(self, settings: Settings) -> int:
        return settings.passes * (len(_cases(settings)) + _import_rounds(settings))

    def run(self, settings: Settings, rows: list[Row], progress: Callable[[str], object]) -> None:
        wanted = tuple(name for name in _PROVIDERS if settings.wants(name))
        if cases := _cases(settings):
            narrowed = replace(settings, providers=wanted)
            harness.run_cases(self.name, cases, narrowed, rows, progress)
        if rounds := _import_rounds(settings):
            torch_row, our_row = (
                Row(self.name, _IMPORT_CASE, name, role, version=versions()[name], status="ok")
                for name, role in (("torch", "context"), ("torchext", "ours"))
            )
            rows += [torch_row, our_row]
            for _ in range(settings.passes * rounds):
                progress("import in a fresh process")
                torch_ms, our_ms = import_ms()
                torch_row.samples_ms.append(torch_ms)
                our_row.samples_ms.append(our_ms)


def _cases(settings: Settings) -> list[tuple[Op, Case]]:
    return [
        (op, replace(op.tiny(), direction=direction, device=settings.device))
        for op in suites.ops()
        for direction in DIRECTIONS
        if direction in (settings.directions or DIRECTIONS)
    ]


def _import_rounds(settings: Settings) -> int:
    if not settings.wants("torchext"):
        return 0
    return 6 if settings.full else 3


def import_ms() -> tuple[float, float]:
    """Milliseconds for `import torch`, and for `import torchext` after it, in a fresh process.

    Of compiled Python, as pip leaves what it installs, torch among it: from a source tree the first
    import compiles, and with PYTHONDONTWRITEBYTECODE every one (27 of 54 ms on a Zen 4).
    """
    for name in ("torchext", "triton_kernels"):
        compileall.compile_dir(ROOT / name, quiet=1)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_CODE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    torch_ms, our_ms = map(float, done.stdout.split())
    return torch_ms, our_ms


SUITE = Overhead()
_TINY = {op.name: op for op in suites.ops()}


@under_pytest.parametrize_cases([(op, op.tiny()) for op in _TINY.values()], _PROVIDERS)
def test_overhead(benchmark: Any, case: Case, provider: str) -> None:
    under_pytest.measure(benchmark, _TINY[case.op], case, provider)

"""The suites: a `bench_<name>.py` with an `OP` is one, and so is one with a `SUITE`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from benchmarks import harness
from benchmarks.case import Op
from benchmarks.harness import Settings
from benchmarks.providers import providers_of
from benchmarks.results import Row

_FOLDER = Path(__file__).parent
_LAST = ("overhead", "training")  # what is about no single op


class Suite(Protocol):
    """What one `--op` runs."""

    name: str

    def steps(self, settings: Settings) -> int:
        """Returns how often `run` will call `progress`."""

    def run(self, settings: Settings, rows: list[Row], progress: Callable[[str], object]) -> None:
        """Measures, and adds to the rows."""


class OpSuite:
    """The suite of one op."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.name = op.name

    def providers(self) -> list[str]:
        """The names for `--provider`."""
        return [provider.name for provider in providers_of(self.op)]

    def steps(self, settings: Settings) -> int:
        return settings.passes * len(harness.cases_of(self.op, settings))

    def run(self, settings: Settings, rows: list[Row], progress: Callable[[str], object]) -> None:
        cases = [(self.op, case) for case in harness.cases_of(self.op, settings)]
        harness.run_cases(self.name, cases, settings, rows, progress)


def names() -> list[str]:
    """The names for `--op`."""
    found = sorted(path.stem.removeprefix("bench_") for path in _FOLDER.glob("bench_*.py"))
    return [name for name in found if name not in _LAST] + [name for name in _LAST if name in found]


def get(name: str) -> Suite:
    """The suite of a name."""
    module = importlib.import_module(f"benchmarks.bench_{name}")
    suite: Suite = module.SUITE if hasattr(module, "SUITE") else OpSuite(module.OP)
    return suite


def ops() -> list[Op]:
    """All ops that have a benchmark."""
    modules = [importlib.import_module(f"benchmarks.bench_{name}") for name in names()]
    return [module.OP for module in modules if hasattr(module, "OP")]


def op(name: str) -> Op:
    """The op of a name."""
    found: Op = importlib.import_module(f"benchmarks.bench_{name}").OP
    return found

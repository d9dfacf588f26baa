"""The same tasks under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

One provider after the other, so that ratios are less sure than those of `python -m benchmarks`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from benchmarks import check, harness, machine
from benchmarks.case import Case, Inputs, Op
from benchmarks.providers import Task, providers_of
from torchext.testing import devices

try:
    import pytest
except ImportError:
    pytest = None  # type: ignore[assignment]

_ROUNDS = 20  # of calls that need preparation


def parametrize(op: Op) -> Any:
    """Gives a test function the op's quick cases, and for each the providers that are here."""
    return parametrize_cases(
        [
            (op, replace(case, device=device))
            for device in devices()
            for case in op.presets(full=False, device=device)
        ]
    )


def parametrize_cases(cases: Sequence[tuple[Op, Case]], only: Sequence[str] = ()) -> Any:
    """Gives a test function cases, and for each the providers that are here.

    Args:
        cases: ops and their cases.
        only: the providers to take; empty for all.
    """
    pairs = [
        (case, provider.name)
        for op, case in cases
        for provider in providers_of(op)
        if (not only or provider.name in only) and not provider.missing(op, case)
    ]
    ids = [f"{case.label}-{provider}".replace(" ", "-") for case, provider in pairs]
    return mark(("case", "provider"), pairs, ids)


def mark(names: str | Sequence[str], values: Sequence[Any], ids: Sequence[str]) -> Any:
    """`pytest.mark.parametrize`, or nothing where there is no pytest: `python -m benchmarks` needs
    none."""
    if pytest is None:
        return lambda function: function
    return pytest.mark.parametrize(names, values, ids=ids)


@lru_cache(maxsize=1)
def _prepared(op: Op, case: Case) -> tuple[list[Inputs], check.Truth]:
    sets = harness.input_sets(op, case)
    return sets, check.truth_of(op, case, sets[0])


def measure(benchmark: Any, op: Op, case: Case, provider_name: str) -> None:
    """Checks a provider, then times it.

    Args:
        benchmark: pytest-benchmark's fixture.
        op: the op.
        case: what to time.
        provider_name: who.
    """
    sets, truth = _prepared(op, case)
    provider = next(each for each in providers_of(op) if each.name == provider_name)
    task = provider.make(op, case, sets)
    if provider.role != "limit":
        try:
            check.check(task, truth, sets)
        except check.WrongResult as error:
            pytest.fail(f"{provider_name} is wrong and not timed: {error}")
    benchmark.extra_info["version"] = provider.version()
    time_task(benchmark, task, case.label, case.device)


def time_task(benchmark: Any, task: Task, group: str, device: str = "cpu") -> None:
    """Times a task by pytest-benchmark.

    Args:
        benchmark: the fixture.
        task: what to time.
        group: what its result is listed under.
        device: where it runs.
    """

    def run(item: Any) -> None:
        task.run(item)
        if device != "cpu":
            torch.accelerator.synchronize()

    machine.keep_freed_memory()
    benchmark.group = group
    harness.warm_up(task)
    with task.context(), harness.no_garbage_collection():
        if task.needs_preparation:
            benchmark.pedantic(run, setup=lambda: ((task.prepare(1)[0],), {}), rounds=_ROUNDS)
        else:
            items = itertools.cycle(task.prepare(64))
            benchmark(lambda: run(next(items)))

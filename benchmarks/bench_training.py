"""The whole job: training 784-64-10 on 60,000 generated images of 28 x 28, batch 100, SGD 0.01.

An epoch of each way to train, with where its time goes, and the step alone on batches that are
ready. The ways take turns: an epoch each, then the next round.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, training_jobs, under_pytest
from benchmarks.harness import Settings
from benchmarks.machine import versions
from benchmarks.providers import PlainTask, Task
from benchmarks.results import Row
from benchmarks.training_jobs import (
    BATCH,
    Batch,
    CppJob,
    CppStepJob,
    Data,
    JaxJob,
    Job,
    TextbookJob,
    TorchJob,
    find_trainer,
)

SAMPLES = 60_000
EPOCH = f"training epoch 784-64-10, {SAMPLES:,} images, batch {BATCH}, SGD"
STEP = f"training step 784-64-10, batch {BATCH}, SGD"
STEP_FUSED = f"training step 784-64-10, batch {BATCH}, SGD(fused=True)"
STEP_MOMENTUM = f"training step 784-64-10, batch {BATCH}, SGD(momentum=0.9)"
_CHECKED_STEPS = 20
_LOSS_TOLERANCE = 1e-4
_STEP_BATCHES = 64


@dataclass(frozen=True)
class Way:
    """A way to train: its name, whose it is, why it is not here, and how it is made."""

    name: str
    role: str
    make: Callable[[Data], Job]
    missing: str = ""


def ways() -> list[Way]:
    """The ways that an epoch is measured in."""
    trainer = find_trainer()
    no_trainer = "" if trainer else "the C++ trainer is not built (make train-cpp)"
    return [
        Way("(a) textbook loop", "other", TextbookJob, _not_installed("PIL", "pillow")),
        Way("(b) stock, our batches", "other", TorchJob),
        Way("(b) stock compiled, our batches", "other", partial(TorchJob, compiled=True)),
        Way("(c) torchext", "ours", partial(TorchJob, ours=True)),
        Way("(d) torchext compiled", "ours", partial(TorchJob, ours=True, compiled=True)),
        Way("(e) torchext C++", "ours", lambda data: _cpp(data), no_trainer),
        Way("(f) JAX", "other", JaxJob, _not_installed("jax", "jax")),
    ]


def _not_installed(module: str, package: str) -> str:
    return "" if importlib.util.find_spec(module) else f"{package} is not installed"


def step_ways(fused_sgd: bool | None = None, momentum: float = 0) -> list[Way]:
    """The ways that a step is measured in."""
    make = partial(TorchJob, fused_sgd=fused_sgd, momentum=momentum)
    ways = [
        Way("eager", "other", make),
        Way("compile", "other", partial(make, compiled=True)),
        Way("torchext", "ours", partial(make, ours=True)),
        Way("torchext compiled", "ours", partial(make, ours=True, compiled=True)),
    ]
    if not fused_sgd:
        no_compiler = "" if shutil.which("c++") else "no C++ compiler"
        job = partial(CppStepJob, momentum=momentum)
        ways.append(Way("torchext C++", "ours", job, no_compiler))
    if not fused_sgd and not momentum:
        ways.append(Way("JAX", "other", JaxJob, _not_installed("jax", "jax")))
    return ways


def _cpp(data: Data) -> CppJob:
    trainer = find_trainer()
    assert trainer is not None
    return CppJob(data, trainer)


class StepTask(Task):
    """One step of a job on one batch."""

    def __init__(self, job: Job, batches: list[Batch]) -> None:
        items: list[Any] = job.items(batches) if isinstance(job, JaxJob) else batches
        self._cycle: Iterator[Any] = itertools.cycle(items)
        self.run = job.step  # type: ignore[attr-defined]

    def prepare(self, count: int) -> list[Any]:
        return list(itertools.islice(self._cycle, count))


def gemms_task(batches: list[Batch]) -> Task:
    """The five GEMMs of a step, and nothing else: its limit."""
    weight = torch.randn(training_jobs.HIDDEN, training_jobs.PIXELS)
    out_weight = torch.randn(training_jobs.CLASSES, training_jobs.HIDDEN)
    gradient = torch.randn(BATCH, training_jobs.CLASSES)

    def gemms(images: Tensor) -> None:
        hidden = torch.mm(images, weight.t())
        torch.mm(hidden, out_weight.t())
        torch.mm(gradient.t(), hidden)
        torch.mm(torch.mm(gradient, out_weight).t(), images)

    return PlainTask(gemms, [(images,) for images, _ in batches])


def check_job(way: Way, data: Data, batches: list[Batch], truth: list[float]) -> str:
    """Trains some steps from the start; returns what is wrong with the losses, or nothing."""
    job = way.make(data)
    if isinstance(job, CppJob):
        stock = TorchJob(data)
        pairs = [(job.first_epoch_loss(), _epoch_loss(stock, data))]
    elif isinstance(job, TextbookJob):
        return ""  # the definition itself; its batches are others
    else:
        pairs = list(zip(job.losses(batches), truth, strict=True))
    for number, (loss, expected) in enumerate(pairs, 1):
        if not math.isclose(loss, expected, rel_tol=_LOSS_TOLERANCE):
            return f"loss {number} is {loss:.6f} instead of {expected:.6f}"
    return ""


def _check(data: Data, batches: list[Batch], momentum: float = 0) -> Callable[[Way], str]:
    first = batches[:_CHECKED_STEPS]
    truth = TorchJob(data, momentum=momentum).losses(first)
    return partial(check_job, data=data, batches=first, truth=truth)


def _epoch_loss(job: TorchJob, data: Data) -> float:
    losses = [job.step(batch).detach() for batch in data.batches.epoch(1)]
    return data.batches.epoch_loss(losses)


class Training:
    """An epoch of each way, then steps."""

    name = "training"

    def steps(self, settings: Settings) -> int:
        here = sum(settings.wants(way.name) and not way.missing for way in ways())
        return here * (1 + _rounds(settings)) + 3 * (1 + settings.passes)

    def run(self, settings: Settings, rows: list[Row], progress: Callable[[str], object]) -> None:
        data = Data(SAMPLES)
        batches = data.first(_STEP_BATCHES)
        self._epochs(data, settings, _check(data, batches), rows, progress)
        for case, fused, momentum in (
            (STEP, None, 0.0),
            (STEP_MOMENTUM, None, 0.9),
            (STEP_FUSED, True, 0.0),
        ):
            found, checked = step_ways(fused, momentum), _check(data, batches, momentum)
            self._steps(case, found, data, batches, settings, checked, rows, progress)

    def _epochs(
        self,
        data: Data,
        settings: Settings,
        checked: Callable[[Way], str],
        rows: list[Row],
        progress: Callable[[str], object],
    ) -> None:
        jobs: list[tuple[Row, Job]] = []
        for way in ways():
            if not settings.wants(way.name):
                continue
            row = self._row(EPOCH, way, "epoch")
            rows.append(row)
            if way.missing:
                continue
            progress(f"{way.name}: check and warm-up")
            if job := _ready(way, row, data, checked):
                jobs.append((row, job))
        parts: dict[str, list[dict[str, float]]] = {}
        for _ in range(_rounds(settings)):
            for row, job in jobs:
                progress(f"{row.provider}: an epoch")
                with harness.no_garbage_collection():
                    total_ms, parts_ms = job.epoch()
                row.samples_ms.append(total_ms)
                row.calls = SAMPLES // BATCH
                parts.setdefault(row.provider, []).append(parts_ms)
        for row, _ in jobs:
            for name in parts[row.provider][0]:
                middle = sorted(each[name] for each in parts[row.provider])
                row.parts_ms[name] = middle[len(middle) // 2]

    def _steps(
        self,
        case: str,
        ways: list[Way],
        data: Data,
        batches: list[Batch],
        settings: Settings,
        checked: Callable[[Way], str],
        rows: list[Row],
        progress: Callable[[str], object],
    ) -> None:
        tasks: dict[str, Task] = {}
        of_case: dict[str, Row] = {}
        progress(f"{case}: check and warm-up")
        for way in ways:
            if not settings.wants(way.name):
                continue
            row = of_case[way.name] = self._row(case, way, "step")
            rows.append(row)
            if not way.missing and (job := _ready(way, row, data, checked)):
                tasks[way.name] = StepTask(job, batches)
        if settings.wants("limit"):
            tasks["limit"] = gemms_task(batches)
            limit = Way("limit", "limit", TorchJob)
            row = of_case["limit"] = self._row(case, limit, "step")
            row.version, row.status = "its five GEMMs alone", "ok"
            rows.append(row)
        clock = harness.wall_clock
        calls = {
            name: harness.calls_of(task, harness.warm_up(task), settings, clock)
            for name, task in tasks.items()
        }
        for _ in range(settings.passes):
            progress(case)
            longer = replace(settings, seconds=2 * settings.seconds)
            for name, values in harness.interleave(tasks, calls, longer, clock).items():
                of_case[name].samples_ms += values
                of_case[name].calls = calls[name]

    def _row(self, case: str, way: Way, direction: str) -> Row:
        row = Row(
            self.name, case, way.name, way.role, op="training", dtype="float32", direction=direction
        )
        if way.missing:
            row.fail("missing", way.missing)
        else:
            row.version = f"torchext {versions()['torchext']}, torch {torch.__version__}"
        return row


def _ready(way: Way, row: Row, data: Data, checked: Callable[[Way], str]) -> Job | None:
    """Checks a way and warms it up; returns its job, or says in the row why not."""
    try:
        if wrong := checked(way):
            row.fail("wrong", wrong)
            return None
        job = way.make(data)
        job.warm_up()
    except Exception as error:  # a library of others can raise anything
        row.fail("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None
    row.status = "ok"
    return job


def _rounds(settings: Settings) -> int:
    return 3 if settings.passes <= 2 else 5


SUITE = Training()


@lru_cache
def _data() -> Data:
    return Data(SAMPLES)


def _here(found: list[Way]) -> Any:
    here = [way for way in found if not way.missing]
    return under_pytest.mark("way", here, [way.name for way in here])


@_here(ways())
def test_training_epoch(benchmark: Any, way: Way) -> None:
    job = way.make(_data())
    job.warm_up()
    benchmark.group = EPOCH
    benchmark.pedantic(job.epoch, rounds=2)


@_here(step_ways(None))
def test_training_step(benchmark: Any, way: Way) -> None:
    task = StepTask(way.make(_data()), _data().first(_STEP_BATCHES))
    under_pytest.time_task(benchmark, task, STEP)

"""The measurement: providers in turn, A B C A B C, in one process, and what comes of the times.

Every round times each provider once, so that what the machine does meanwhile meets all of them,
and ratios are of the same round. Warm-up and compilation are outside; so is everything that a task
prepares. A suite goes through its cases several times: the spread then has in it what changes over
minutes as well.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch

from benchmarks import check
from benchmarks.case import Case, Inputs, Op, Options, generator
from benchmarks.machine import available_bytes, cache_bytes
from benchmarks.providers import Provider, Task, providers_of
from benchmarks.results import Row

_WARM_UP_CALLS = 3
_LONG_CALL_MS = 100.0
_HOT_BYTES = 1 << 20  # inputs up to this stay where a network's last op would leave them: in cache
_TEMPORARIES = 8  # how many times its inputs an eager call may take


class Clock(Protocol):
    """Times calls of `run`, one for each item, in milliseconds together."""

    def __call__(self, run: Callable[[Any], object], items: Sequence[Any]) -> float: ...


def wall_clock(run: Callable[[Any], object], items: Sequence[Any]) -> float:
    """The CPU's clock."""
    begin = time.perf_counter_ns()
    for item in items:
        run(item)
    return (time.perf_counter_ns() - begin) / 1e6


def cuda_clock(run: Callable[[Any], object], items: Sequence[Any]) -> float:
    """The GPU's own clock, by events: its work and the gaps between, without the way back."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for item in items:
        run(item)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def graph_clock(run: Callable[[Any], object], items: Sequence[Any]) -> float:
    """The GPU's clock around a CUDA graph of the calls: without the host's time between them.

    What a call of some microseconds takes on a GPU is else hidden by what Python takes for it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for item in items:
            run(item)
    graph.replay()  # the first one loads it
    return cuda_clock(lambda captured: captured.replay(), [graph])


def clock_of(device: str, graphs: bool = False) -> Clock:
    """The clock of a device."""
    if device == "cpu":
        return wall_clock
    return graph_clock if graphs else cuda_clock


@dataclass(frozen=True)
class Settings:
    """How long and what to measure."""

    mode: str = "quick"
    device: str = "cpu"
    passes: int = 2  # how often a suite goes through its cases
    seconds: float = 0.8  # for the rounds of a case in a pass
    least_rounds: int = 4  # in a pass, however long they take,
    slow: float = 4.0  # unless two have taken so many seconds
    most_rounds: int = 25
    sample_ms: float = 2.0  # what one sample lasts at the least: short calls are repeated in it
    memory: bool = True
    cached: bool = False  # one input set, whatever its size
    graphs: bool = False  # on a GPU, calls as a CUDA graph replays them
    budget: float = 0.0  # seconds of a suite, after which its other cases are left out; 0: no end
    providers: tuple[str, ...] = ()  # empty: all
    directions: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    random: int = 0  # so many drawn shapes in place of the suites' own
    seed: int = 0  # of the drawing

    @property
    def full(self) -> bool:
        return self.mode == "full"

    def wants(self, provider: str) -> bool:
        return not self.providers or provider in self.providers


def cases_of(op: Op, settings: Settings) -> list[Case]:
    """The cases of an op that the settings ask for."""
    if settings.shapes or settings.random:
        given: list[tuple[tuple[int, ...], Options]]
        given = [(shape, ()) for shape in settings.shapes if op.accepts(shape)]
        random = Random(settings.seed)
        while len(given) < settings.random:
            if (one := op.drawn(random)) not in given:
                given.append(one)
        return [
            Case(op.name, shape, dtype, direction, settings.device, options)
            for shape, options in given
            for dtype in settings.dtypes or ("float32",)
            for direction in settings.directions or ("fwd+bwd",)
        ]
    return [
        replace(case, device=settings.device)
        for case in op.presets(settings.full, settings.device)
        if case.dtype in (settings.dtypes or (case.dtype,))
        and case.direction in (settings.directions or (case.direction,))
    ]


def input_sets(op: Op, case: Case, cached: bool = False) -> list[Inputs]:
    """Makes input sets: one that stays in cache if it is small, else as many as overflow it."""
    first = op.inputs(case, generator(case, 0))
    if cached or first.bytes <= _HOT_BYTES:
        return [first]
    sets = math.ceil(2 * cache_bytes(case.device) / first.bytes)
    return [first, *(op.inputs(case, generator(case, index)) for index in range(1, sets))]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector would stop in one provider's time for another's garbage."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def warm_up(task: Task, calls: int = _WARM_UP_CALLS) -> float:
    """Calls a task outside of any timing: libraries start, compilers compile.

    Returns:
        The milliseconds of its last call, about.
    """
    elapsed_ms = 0.0
    for number in range(calls):
        with task.context():
            items = task.prepare(1)
            begin = time.perf_counter()
            for item in items:
                task.run(item)
            if torch.cuda.is_initialized():  # a GPU's work is not over where its launch is
                torch.cuda.synchronize()
            elapsed_ms = 1e3 * (time.perf_counter() - begin)
        if number and elapsed_ms > _LONG_CALL_MS:
            break
    return elapsed_ms


def calls_of(task: Task, about_ms: float, settings: Settings, clock: Clock) -> int:
    """How many calls of a task make a sample, if one takes about so long.

    Of calls in a row, as in a sample: one alone would count what its memory and the caches cost
    after another's work, and two runs would choose different numbers.
    """
    if about_ms > 10 * settings.sample_ms:
        return 1
    most = max(1, task.most_calls - 1)  # a sample begins with one more
    calls = 1
    for _ in range(4):
        once = max(min(sample(task, calls, clock) for _ in range(3)), 1e-4)
        wanted = min(math.ceil(settings.sample_ms / once), most)
        if wanted <= calls:
            break
        calls = 2 if calls == 1 else wanted
    return calls


def sample(task: Task, calls: int, clock: Clock) -> float:
    """Times a task; returns milliseconds a call.

    Where a sample is of several calls, one more comes before them and is not timed: it finds memory
    and caches as another provider left them, which is not the time of this one.
    """
    first = 1 if 1 < calls < task.most_calls else 0
    with task.context():
        items = task.prepare(first + calls)
        for item in items[:first]:
            task.run(item)
        return clock(task.run, items[first:]) / calls


def interleave(
    tasks: dict[str, Task], calls: dict[str, int], settings: Settings, clock: Clock
) -> dict[str, list[float]]:
    """Times tasks in turn.

    Args:
        tasks: by name; warmed up.
        calls: how many calls of each make a sample.
        settings: how long.
        clock: of the device.

    Returns:
        The samples of each, milliseconds a call, all of one length.
    """
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    with no_garbage_collection():
        begin = time.perf_counter()
        for number in range(settings.most_rounds):
            elapsed = time.perf_counter() - begin
            if number >= 2 and elapsed > settings.slow:
                break
            if number >= settings.least_rounds and elapsed > settings.seconds:
                break
            for name in order if number % 2 == 0 else reversed(order):
                samples[name].append(sample(tasks[name], calls[name], clock))
            order = order[1:] + order[:1]
    return samples


class CaseRun:
    """One case and all its providers: made and checked once, timed in several passes."""

    def __init__(self, suite: str, op: Op, case: Case, settings: Settings) -> None:
        self._op, self._case, self._settings = op, case, settings
        self._calls: dict[str, int] = {}
        self._providers = {
            provider.name: provider
            for provider in providers_of(op)
            if settings.wants(provider.name) and not self._left_out(provider)
        }
        self.rows = {name: self._row(suite, provider) for name, provider in self._providers.items()}
        need = _TEMPORARIES * op.elements(case) * case.torch_dtype.itemsize
        if need > available_bytes(case.device):
            for row in self.rows.values():
                row.fail("skipped", f"needs about {need / 2**30:.0f} GiB of memory")
        if settings.graphs and case.direction == "bwd":
            self.leave_out("a graph cannot capture the backward of a forward outside it")

    def _left_out(self, provider: Provider) -> bool:
        """The quick run has no second measurement of what auto would choose anyway."""
        large = self._op.elements(self._case) > 1 << 18
        return provider.name == "torchext native" and large and not self._settings.full

    def _row(self, suite: str, provider: Provider) -> Row:
        op, case = self._op, self._case
        row = Row(
            suite=suite,
            case=case.label,
            provider=provider.name,
            role=provider.role,
            op=case.op,
            size=case.size,
            dtype=case.dtype,
            direction=case.direction,
            device=case.device,
            options=case.variant,
            traffic_bytes=op.traffic_bytes(case),
            flops=op.flops(case),
            plot_size=op.plot_size(case),
        )
        if reason := provider.missing(op, case):
            row.fail("missing", reason)
        else:
            row.version = provider.version()
        return row

    def leave_out(self, reason: str) -> None:
        """Says why what has not been measured yet will not be."""
        for row in self.rows.values():
            if row.status == "new":
                row.fail("skipped", reason)

    def run(self) -> None:
        """Goes through the rounds of one pass."""
        rows = {name: row for name, row in self.rows.items() if row.status in ("new", "ok")}
        if not any(row.role != "limit" for row in rows.values()):
            return
        tasks: dict[str, Task] = {}
        new = any(row.status == "new" for row in rows.values())
        try:
            sets = input_sets(self._op, self._case, self._settings.cached)
            truth = check.truth_of(self._op, self._case, sets[0]) if new else None
        except torch.OutOfMemoryError as error:
            self.leave_out(" ".join(str(error).split())[:100])
            return
        clock = clock_of(self._case.device, self._settings.graphs)
        for name, row in rows.items():
            try:
                task = self._providers[name].make(self._op, self._case, sets)
                if row.status == "new" and truth is not None:
                    if row.role != "limit":
                        row.errors = check.check(task, truth, sets)
                    row.status = "ok"
                    row.input_sets = len(sets)
                if name in self._calls:
                    warm_up(task, 1)
                else:
                    about_ms = warm_up(task)
                    self._calls[name] = calls_of(task, about_ms, self._settings, clock)
                tasks[name] = task
            except check.WrongResult as error:
                row.fail("wrong", str(error))
            except Exception as error:  # a library of others can raise anything
                row.fail("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        del truth
        for name, values in interleave(tasks, self._calls, self._settings, clock).items():
            rows[name].samples_ms += values
            rows[name].calls = self._calls[name]


def run_cases(
    suite: str,
    cases: Iterable[tuple[Op, Case]],
    settings: Settings,
    rows: list[Row],
    progress: Callable[[str], object],
) -> None:
    """Measures cases, all of them in each pass.

    Args:
        suite: its name.
        cases: what to measure.
        settings: how.
        rows: gets the rows, before the first of them is measured: an interruption loses nothing.
        progress: called with the name of what comes next.
    """
    runs = [CaseRun(suite, op, case, settings) for op, case in cases]
    rows += [row for run in runs for row in run.rows.values()]
    end = time.monotonic() + (settings.budget or math.inf)
    for _ in range(settings.passes):
        for run in runs:
            if time.monotonic() > end:
                run.leave_out(f"the suite's {settings.budget:.0f} s were over")
            elif run.rows:
                progress(next(iter(run.rows.values())).case)
                run.run()
                if settings.device == "cuda":
                    torch.cuda.empty_cache()  # what is cached is not there for the next case


def load_average() -> float:
    """How many processes wanted to run in the last minute; 0 where the system does not say."""
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return 0.0

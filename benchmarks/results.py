"""Rows of results, what is derived of them, and their files."""

from __future__ import annotations

import csv
import errno
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FORMAT = 2


@dataclass
class Row:
    """One provider on one case.

    Times are in milliseconds, of one call. Ratios are medians over the rounds of the two times of
    the same round.
    """

    suite: str
    case: str
    provider: str
    role: str  # ours, other or limit
    version: str = ""
    status: str = "new"  # ok, wrong, failed, missing or skipped
    reason: str = ""
    op: str = ""
    size: str = ""
    dtype: str = ""
    direction: str = ""
    device: str = "cpu"
    options: str = ""
    calls: int = 1  # in a sample; of an epoch its steps
    input_sets: int = 1
    errors: dict[str, float] = field(default_factory=dict)  # relative, of each result
    traffic_bytes: int | None = None
    flops: int | None = None
    plot_size: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    parts_ms: dict[str, float] = field(default_factory=dict)  # where the time of a job goes
    peak_mib: float | None = None  # above the inputs
    # Derived:
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    best_other: str = ""  # the fastest of the others
    times_as_fast: float | None = None  # as the best other: above 1 is faster
    times_as_fast_p10: float | None = None
    times_as_fast_p90: float | None = None
    of_limit: float | None = None  # its time over the limit's: 1 is the limit

    @property
    def measured(self) -> bool:
        return self.status == "ok" and self.median_ms is not None

    def fail(self, status: str, reason: str) -> None:
        """Says why there are no times."""
        self.status, self.reason = status, reason
        self.samples_ms = []


@dataclass
class Results:
    """What one run of one suite found, and where."""

    suite: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str  # UTC
    threads: int
    settings: dict[str, Any]
    load_before: float  # processes that wanted to run, of others
    absent: dict[str, str] = field(default_factory=dict)  # providers, and why they are not here
    rows: list[Row] = field(default_factory=list)
    memory: list[Row] = field(default_factory=list)

    def finish(self) -> None:
        """Derives what follows from the samples, and moves what is not here out of the rows."""
        measured = {row.provider for row in self.rows if row.status != "missing"}
        for row in self.rows:
            known = row.provider in measured or row.reason in self.absent.values()
            if row.status == "missing" and not known:
                self.absent[row.provider] = row.reason
        self.rows = [row for row in self.rows if row.status not in ("missing", "new")]
        for row in self.rows:
            if row.status == "ok" and not row.samples_ms:
                row.fail("failed", "interrupted before its first sample")
        derive(self.rows)

    def cases(self) -> dict[str, dict[str, Row]]:
        """The timed rows by case and provider, in the order of the run."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(row.case, {})[row.provider] = row
        return found


def derive(rows: Sequence[Row]) -> None:
    """Computes medians, spreads, rates and ratios.

    Args:
        rows: all rows of a suite, with their samples.
    """
    for row in rows:
        if row.samples_ms:
            row.median_ms, row.p10_ms, row.p90_ms = spread(row.samples_ms)
            seconds = row.median_ms / 1e3
            if row.traffic_bytes:
                row.gb_per_s = row.traffic_bytes / seconds / 1e9
            if row.flops:
                row.tflop_per_s = row.flops / seconds / 1e12
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if row.measured:
            by_case.setdefault(row.case, []).append(row)
    for group in by_case.values():
        others = [row for row in group if row.role == "other"]
        limits = [row for row in group if row.role == "limit"]
        best = min(others, key=lambda row: row.median_ms or 0.0, default=None)
        for row in group:
            if limits and row is not limits[0]:
                row.of_limit = spread(ratios(row, limits[0]))[0]
            if row.role == "ours" and best is not None:
                row.best_other = best.provider
                values = spread(ratios(best, row))
                row.times_as_fast, row.times_as_fast_p10, row.times_as_fast_p90 = values


def ratios(over: Row, under: Row) -> list[float]:
    """The ratios of two rows' times, round by round."""
    pairs = zip(over.samples_ms, under.samples_ms, strict=False)
    return [a / b for a, b in pairs]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, and the 10th and the 90th percentile.

    Not the quartiles, which half of all samples are outside of: of two runs every twelfth median
    was, too.
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), low, high


def save(results: Results, path: Path) -> None:
    """Writes a suite's results as JSON, a row a line so that a changed row is a changed line.

    Args:
        results: the results, derived.
        path: the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, **asdict(results)}
    rows, memory = head.pop("rows"), head.pop("memory")
    text = json.dumps(head, indent=1)[:-2]
    for key, values in (("rows", rows), ("memory", memory)):
        lines = ",\n  ".join(json.dumps(_compact(row), allow_nan=False) for row in values)
        text += f',\n "{key}": [' + (f"\n  {lines}\n ]" if lines else "]")
    path.write_text(text + "\n}\n")


def load(path: Path) -> Results:
    """Reads what `save` wrote.

    Args:
        path: the file.

    Raises:
        ValueError: where it is something else.
    """
    try:
        values = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        rows = [Row(**row) for row in values.pop("rows")]
        memory = [Row(**row) for row in values.pop("memory")]
        results = Results(**values, rows=rows, memory=memory)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not results of these benchmarks: {error}") from error
    derive(results.rows)
    return results


def load_folder(folder: Path) -> list[Results]:
    """Reads all results of a machine.

    Args:
        folder: where the JSON files are.

    Raises:
        FileNotFoundError: where there are none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(errno.ENOENT, "no results (*.json) there", str(folder))
    return [load(path) for path in paths]


def save_csv(everything: Iterable[Results], path: Path) -> None:
    """Writes the rows of all suites as one table, without the single samples.

    Args:
        everything: the results.
        path: the file.
    """
    left_out = {"samples_ms", "errors", "parts_ms"}
    names = [each.name for each in fields(Row) if each.name not in left_out]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, "samples", "worst_error"])
        for results in everything:
            for row in (*results.rows, *results.memory):
                values = [getattr(row, name) for name in names]
                worst = max(row.errors.values(), default="")
                written = [_rounded(value) for value in (*values, len(row.samples_ms), worst)]
                writer.writerow(["" if value is None else value for value in written])


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what is empty, numbers rounded to what they mean."""
    empty: tuple[Any, ...] = (None, "", [], {})
    return {name: _rounded(value) for name, value in row.items() if value not in empty}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < 1e6 else round(value)
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value

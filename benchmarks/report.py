"""Results as Markdown: tables, and what is not faster said as plainly as what is."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks import results as results_module
from benchmarks.results import Results, Row

NOISE_NOTE = (
    "Times are medians, in brackets the 10th and 90th percentiles; ratios are medians over rounds "
    "in which all providers took turns."
)


def markdown(everything: Sequence[Results], plots: Sequence[str]) -> str:
    """Returns the report of one machine.

    Args:
        everything: the results of its suites.
        plots: the files with plots, beside the report.
    """
    parts = ["# Benchmark results", "", f"{NOISE_NOTE} How it is done: benchmarks/README.md.", ""]
    for results in everything:
        parts += [f"## {results.suite}", "", provenance(results), ""]
        parts += suite_lines(results)
        parts += [f"![{name}]({name})" for name in plots if name.startswith(f"{results.suite}_")]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def provenance(results: Results) -> str:
    """Returns where and when the results are from, in a sentence."""
    machine = results.machine
    where = f"{machine['cpu']}, {machine['cores']} cores ({machine['simd']})"
    if "gpu" in machine:
        where = f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB), {where}"
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    busy = ""
    if results.load_before > 0.5:
        busy = f" **The machine was busy: load {results.load_before:.1f} before the run.**"
    return (
        f"{where}, {machine['memory_gib']} GiB, {results.threads} threads; {versions}; "
        f"commit {results.commit}, {results.date} UTC, `{results.settings['mode']}`.{busy}"
    )


def suite_lines(results: Results) -> list[str]:
    """All that is said of a suite's results."""
    if results.settings.get("random"):
        return [*drawn_lines(results), ""]
    lines = ways_tables(results) if is_job(results) else time_table(results)
    if results.memory:
        lines += ["", "Peak memory above the inputs, MiB:", "", *memory_table(results.memory)]
    lines += ["", *verdict(results.rows)]
    lines += _not_timed(results)
    if results.absent:
        absent = "; ".join(f"{name} ({why})" for name, why in results.absent.items())
        lines += ["", f"Not here: {absent}."]
    return [*lines, ""]


def _not_timed(results: Results) -> list[str]:
    faults = faults_of(results)
    return ["", "Not timed:", "", *(f"- {fault}" for fault in faults)] if faults else []


def time_table(results: Results) -> list[str]:
    """The lines of the table of times: a case a line, a provider a column."""
    names = ordered_providers(results.rows)
    head = ["", *names, "torchext: times as fast as the best other", "time over the limit's"]
    rates = any(row.gb_per_s or row.tflop_per_s for row in results.rows)
    lines = []
    for rows in results.cases().values():
        best = headline(rows)
        first = next(iter(rows.values()))
        cells = [case_text(first), *(time_cell(rows.get(name)) for name in names)]
        cells += [speed_cell(best), limit_cell(best)]
        if rates:
            cells.append(rate_cell(best))
        lines.append(cells)
    if rates:
        head.append("torchext's rate")
    return table([head, *lines])


_SLOWER = 1.03  # of the other's time, from which on a drawn case is said to be slower


def drawn_lines(results: Results) -> list[str]:
    """What is said of drawn cases: in how many of each kind it is slower, and which those are."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for rows in results.cases().values():
        if (row := headline(rows)) is not None and row.times_as_fast is not None:
            kinds.setdefault((row.dtype, row.direction), []).append(row)
    head = ["", "cases", "slower by more than 3 %", "by more than 10 %", "median of the ratios"]
    lines, slow = [], []
    for (dtype, direction), rows_of_kind in kinds.items():
        of_other = [1 / (row.times_as_fast or 1.0) for row in rows_of_kind]
        counts = (sum(ratio > bound for ratio in of_other) for bound in (_SLOWER, 1.1))
        cells = [str(len(of_other)), *map(str, counts), number(statistics.median(of_other))]
        lines.append([f"{dtype} {direction}", *cells])
        slow += [row for row, ratio in zip(rows_of_kind, of_other, strict=True) if ratio > _SLOWER]
    seed = results.settings["seed"]
    said = [f"Drawn cases (seed {seed}), torchext's time over the best other's:", ""]
    said += table([head, *lines])
    if slow:
        slow.sort(key=lambda row: row.times_as_fast or 0.0)
        said += [
            "",
            "Slower:",
            "",
            *table([["", "torchext", "of the other's time"], *map(_slow, slow)]),
        ]
    return [*said, *_not_timed(results)]


def _slow(row: Row) -> list[str]:
    low, high = row.times_as_fast_p90 or 1.0, row.times_as_fast_p10 or 1.0
    ratio = ratio_text((1 / (row.times_as_fast or 1.0), 1 / low, 1 / high))
    return [case_text(row), time_cell(row), ratio]


def case_text(row: Row) -> str:
    """A case's name, without the op's where the suite is that op's."""
    return row.case.removeprefix(f"{row.op} ") if row.suite == row.op else row.case


def headline(rows: dict[str, Row]) -> Row | None:
    """This package's row that stands for the case: what a user gets without asking."""
    ours = [row for row in rows.values() if row.role == "ours" and row.measured]
    plain = [row for row in ours if row.provider == "torchext"]
    return plain[0] if plain else min(ours, key=lambda row: row.median_ms or 0.0, default=None)


def is_job(results: Results) -> bool:
    """Whether the suite is a whole job, whose ways to do it are lines and not columns."""
    return any(row.direction == "epoch" for row in results.rows)


def ways_tables(results: Results) -> list[str]:
    """The lines of a table for each case, a way to do it a line."""
    lines = []
    for case, rows in results.cases().items():
        lines += [f"{case}:", "", *_ways_table(list(rows.values())), ""]
    return lines[:-1]


def _ways_table(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    steps = first.calls if first.direction == "epoch" else 1
    parts = list(dict.fromkeys(name for row in rows for name in row.parts_ms))
    head = ["", "time", *(["of a step"] if steps > 1 else []), *parts]
    head += [f"times as fast as {first.provider}", "time over the limit's"]
    lines = []
    for row in rows:
        cells = [row.provider, time_cell(row)]
        if steps > 1:
            cells.append(time_text((row.median_ms or 0.0) / steps) if row.measured else "–")
        cells += [time_text(row.parts_ms.get(name)) for name in parts]
        both = row.measured and first.measured
        cells += [ratio_text(ratio_between(first, row)) if both else "–", limit_cell(row)]
        lines.append(cells)
    return without_empty([head, *lines])


def without_empty(cells: list[list[str]]) -> list[str]:
    """The lines of a table, without the columns that hold nothing."""
    kept = [
        index
        for index in range(len(cells[0]))
        if index == 0 or any(line[index] not in ("", "–") for line in cells[1:])
    ]
    return table([[line[index] for index in kept] for line in cells])


def memory_table(rows: Sequence[Row]) -> list[str]:
    """The lines of the table of peak memory."""
    names = ordered_providers(rows)
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.provider] = row
    lines = []
    for found in by_case.values():
        cells = [found.get(name) for name in names]
        lines.append(
            [
                case_text(next(iter(found.values()))),
                *("–" if row is None else _mib(row) for row in cells),
            ]
        )
    head = ["", *("gradients alone" if name == "limit" else name for name in names)]
    return table([head, *lines])


def _mib(row: Row) -> str:
    return row.status if row.peak_mib is None else f"{row.peak_mib:.0f}"


def verdict(rows: Sequence[Row]) -> list[str]:
    """The lines that say where torchext is faster, where it is not, and where one cannot say."""
    ours = [row for row in rows if row.role == "ours" and row.times_as_fast is not None]
    if not ours:
        return []
    slower = [row for row in ours if (row.times_as_fast_p90 or 0.0) < 1.0]
    faster = [row for row in ours if (row.times_as_fast_p10 or 0.0) > 1.0]
    level = [row for row in ours if row not in slower and row not in faster]
    lines = [
        f"Of {len(ours)} comparisons with the best other, torchext is faster in {len(faster)}, "
        f"slower in {len(slower)}, and level in {len(level)} (the percentiles of the ratio have 1 "
        "between them)."
    ]
    items = [
        f"- slower: {case_text(row)}: {row.provider} takes {1 / (row.times_as_fast or 1.0):.2f} "
        f"times as long as {row.best_other}"
        for row in sorted(slower, key=lambda row: row.times_as_fast or 0.0)
    ]
    if level:
        names = (f"{case_text(row)} ({row.provider})" for row in level)
        items.append(f"- level: {'; '.join(names)}")
    return [*lines, "", *items] if items else lines


def faults_of(results: Results) -> list[str]:
    """What was refused or broke, and why."""
    return [
        f"{row.case}: {row.provider} is {row.status}: {row.reason}"
        for row in (*results.rows, *results.memory)
        if row.status in ("wrong", "failed", "skipped")
    ]


def ordered_providers(rows: Iterable[Row]) -> list[str]:
    """The providers that have results: ours first, then the others, then the limit."""
    rank = {"ours": 0, "context": 1, "other": 1, "limit": 2}
    found = {row.provider: rank[row.role] for row in rows}
    return sorted(found, key=lambda name: found[name])


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head, *lines = cells
    rule = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *lines)]


def time_cell(row: Row | None) -> str:
    """A time and its spread."""
    if row is None:
        return "–"
    if not row.measured or row.p10_ms is None or row.p90_ms is None:
        return row.status
    unit, factor = _unit(row.median_ms or 0.0)
    low, high = (number(value * factor) for value in (row.p10_ms, row.p90_ms))
    return f"{number((row.median_ms or 0.0) * factor)} {unit} ({low}–{high})"


def time_text(milliseconds: float | None) -> str:
    """A time alone, with its unit."""
    if milliseconds is None:
        return "–"
    unit, factor = _unit(milliseconds)
    return f"{number(milliseconds * factor)} {unit}"


def _unit(milliseconds: float) -> tuple[str, float]:
    if milliseconds < 1.0:
        return "µs", 1e3
    return ("ms", 1.0) if milliseconds < 1e3 else ("s", 1e-3)


def number(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def speed_cell(row: Row | None) -> str:
    """How many times as fast as the best other, and which that is."""
    if row is None or row.times_as_fast is None:
        return "–"
    low, high = row.times_as_fast_p10 or 0.0, row.times_as_fast_p90 or 0.0
    return f"{ratio_text((row.times_as_fast, low, high))} × {row.best_other}"


def ratio_text(ratio: tuple[float, float, float]) -> str:
    """A ratio and its spread."""
    return f"{ratio[0]:.2f} ({ratio[1]:.2f}–{ratio[2]:.2f})"


def limit_cell(row: Row | None) -> str:
    """The time over the limit's."""
    return "–" if row is None or row.of_limit is None else f"{row.of_limit:.2f}"


def rate_cell(row: Row | None) -> str:
    """GB/s or TFLOP/s."""
    if row is None:
        return "–"
    if row.tflop_per_s is not None:
        return f"{row.tflop_per_s:.3g} TFLOP/s"
    return "–" if row.gb_per_s is None else f"{row.gb_per_s:.3g} GB/s"


def ratio_between(over: Row, under: Row) -> tuple[float, float, float]:
    """The ratio of two rows' times: median and spread."""
    return results_module.spread(results_module.ratios(over, under))

"""The plots: time against size, ratios, memory, and where a training epoch goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks import suites
from benchmarks.report import case_text, headline, ordered_providers, ratio_between, time_text
from benchmarks.results import Results, Row

_COLOURS = {
    "torchext": "#0b5fa5",
    "torchext native": "#4a9ad4",
    "torchext triton": "#17b3a6",
    "torchext in place": "#17becf",
    "eager": "#8c8c8c",
    "compile": "#e07b00",
    "torch chunked": "#2e8b3d",
    "JAX": "#8e4fb8",
    "Liger-Kernel": "#c23b3b",
    "cut-cross-entropy": "#8a5a44",
    "quack": "#d76fb0",
    "limit": "#000000",
}
_PARTS = {
    "data": "#c9a227",
    "forward": "#0b5fa5",
    "backward": "#4a9ad4",
    "optimiser": "#2e8b3d",
    "steps": "#8e4fb8",
    "whole": "#8c8c8c",
}
_DPI = 130
_GAP = 0.8  # between groups of bars


def save_all(results: Results, folder: Path) -> list[str]:
    """Draws what a suite's results have something for.

    Args:
        results: the results.
        folder: where to; it must exist.

    Returns:
        The names of the files.
    """
    drawn = []
    for name, draw in (
        ("time", time_plot),
        ("ratio", ratio_plot),
        ("memory", memory_plot),
        ("epoch", epoch_plot),
    ):
        path = folder / f"{results.suite}_{name}.png"
        figure = draw(results)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        figure.savefig(path, dpi=_DPI)
        drawn.append(path.name)
    return drawn


def time_plot(results: Results) -> Figure | None:
    """Time against size, for plain float32 training calls."""
    rows = [
        row
        for row in results.rows
        if row.measured and row.plot_size and row.dtype == "float32" and not row.options
        if row.direction == "fwd+bwd" and results.suite == row.op
    ]
    if len({row.plot_size for row in rows}) < 2:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in ordered_providers(rows):
        own = sorted(
            (row for row in rows if row.provider == name), key=lambda row: row.plot_size or 0
        )
        middles = [row.median_ms or 0 for row in own]
        errors = [
            [middle - (row.p10_ms or 0) for row, middle in zip(own, middles, strict=True)],
            [(row.p90_ms or 0) - middle for row, middle in zip(own, middles, strict=True)],
        ]
        sizes = [row.plot_size or 0 for row in own]
        label = f"limit: {own[0].version}" if name == "limit" else name
        axes.errorbar(sizes, middles, yerr=errors, capsize=2, label=label, **_style(own[0]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_ticked_time))
    op = suites.op(results.suite)
    axes.set_xlabel(op.plot_size_label)
    axes.set_ylabel("time of a call, forward and backward")
    _finish(axes, f"{results.suite}, float32", results)
    _legend_below(figure, axes)
    return figure


def ratio_plot(results: Results) -> Figure | None:
    """How many times as fast torchext is as each of the others, case by case."""
    groups: list[tuple[str, list[tuple[str, tuple[float, float, float]]]]] = []
    for rows in results.cases().values():
        mine = headline(rows)
        others = [row for row in rows.values() if row.role == "other" and row.measured]
        if mine is not None and others and mine.direction != "epoch":
            ratios = [(row.provider, ratio_between(row, mine)) for row in others]
            groups.append((_two_lines(case_text(mine)), ratios))
    if not groups:
        return None
    count = sum(len(ratios) + _GAP for _, ratios in groups)
    figure = Figure(figsize=(8.5, 1.5 + 0.26 * count), layout="constrained")
    axes = figure.subplots()
    place, ticks = 0.0, []
    used: set[str] = set()
    for _, ratios in groups:
        ticks.append(place + (len(ratios) - 1) / 2)
        for name, ratio in ratios:
            _bar(axes, place, ratio, _colour(name), "" if name in used else name)
            used.add(name)
            place += 1
        place += _GAP
    axes.set_yticks(ticks, [label for label, _ in groups], fontsize=8)
    axes.set_ylim(place - _GAP, -1)
    every = [ratio for _, ratios in groups for _, ratio in ratios]
    low, high = min(0.7, *(ratio[1] for ratio in every)), max(2.0, *(ratio[2] for ratio in every))
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, high * 1.5)
    axes.axvline(1, color="black", linewidth=1)
    steps = [step * 10.0**power for power in range(-2, 4) for step in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([*steps, 0.7, 1.5, 3.0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("time of the others over torchext's (right of 1×: torchext is faster)")
    _finish(axes, f"{results.suite}: speed against the others", results)
    axes.grid(visible=False, axis="y")
    _legend_below(figure, axes)
    return figure


def _bar(
    axes: Any, place: float, ratio: tuple[float, float, float], colour: str, label: str
) -> None:
    """One ratio, from 1 to the median, with its spread and its number."""
    middle, low, high = ratio
    axes.barh(place, middle - 1, 0.85, left=1, color=colour, label=label)
    axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="black",
                  linewidth=0.8, capsize=2)  # fmt: skip
    axes.annotate(f"{middle:.2f}×", (max(high, 1.0), place), xytext=(5, 0),
                  textcoords="offset points", va="center", fontsize=8)  # fmt: skip


def memory_plot(results: Results) -> Figure | None:
    """Peak memory against the size that drives it."""
    rows = [row for row in results.memory if row.peak_mib is not None and row.plot_size]
    if not rows:
        return None
    op = suites.op(results.suite)
    case = _case_but(rows[0], op.memory_axis)  # at several sizes
    rows = [row for row in rows if _case_but(row, op.memory_axis) == case]
    if len({row.plot_size for row in rows}) < 2:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in ordered_providers(rows):
        own = sorted(
            (row for row in rows if row.provider == name), key=lambda row: row.plot_size or 0
        )
        sizes = [row.plot_size or 0 for row in own]
        label = "gradients alone" if name == "limit" else name
        axes.plot(sizes, [row.peak_mib or 0 for row in own], label=label, **_style(own[0]))
    sizes = sorted({row.plot_size or 0 for row in rows})
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1, linscale=0.3)
    axes.set_ylim(0, 2 * max(row.peak_mib or 0 for row in rows))
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(op.memory_label)
    axes.set_ylabel("peak memory above the inputs, MiB")
    _finish(axes, f"{results.suite} {case}: peak memory", results)
    _legend_below(figure, axes)
    return figure


def epoch_plot(results: Results) -> Figure | None:
    """Where a training epoch goes, for each way to train."""
    rows = [row for row in results.rows if row.direction == "epoch" and row.measured]
    if not rows:
        return None
    figure = Figure(figsize=(9, 1.4 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    used: set[str] = set()
    for place, row in enumerate(rows):
        left = 0.0
        for name, value in (row.parts_ms or {"whole": row.median_ms or 0}).items():
            label = "" if name in used else name
            axes.barh(place, value / 1e3, 0.7, left=left, color=_PARTS[name], label=label)
            used.add(name)
            left += value / 1e3
        share = f"  {time_text(row.median_ms)}"
        if row is not rows[0]:
            ratio = ratio_between(rows[0], row)[0]
            share += f"  ({ratio:.1f}× as fast as {rows[0].provider[:3]})"
        axes.annotate(share, (left, place), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.provider for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(row.median_ms or 0.0 for row in rows) / 1e3)
    axes.set_xlabel("seconds an epoch (60,000 images)")
    _finish(axes, "where a training epoch goes: 784-64-10, batch 100, SGD", results)
    _legend_below(figure, axes)
    return figure


def _two_lines(text: str) -> str:
    head, comma, tail = text.partition(", ")
    return f"{head},\n{tail}" if comma else head


def _case_but(row: Row, axis: int) -> str:
    sizes: list[str] = row.size.split("x")
    sizes[axis] = "…"
    return f"{' x '.join(sizes)} {row.dtype} {row.direction}"


def _style(row: Row) -> dict[str, Any]:
    """How a provider's line looks. Lines may lie on one another: ours are filled dots above the
    others' hollow squares, and the limit is dashed."""
    style: dict[str, Any] = {"color": _colour(row.provider), "linewidth": 1.5, "zorder": 3}
    if row.role == "limit":
        return {**style, "linestyle": "--", "zorder": 5}
    if row.role == "ours":
        return {**style, "marker": "o", "markersize": 4.5, "zorder": 4}
    return {**style, "marker": "s", "markersize": 8, "markerfacecolor": "none"}


def _colour(name: str) -> str:
    return _COLOURS.get(name, "#b9b9b9")


def _ticked_time(milliseconds: float, _: int) -> str:
    unit, factor = ("s", 1e-3) if milliseconds >= 1e3 else ("ms", 1.0)
    if milliseconds < 1.0:
        unit, factor = "µs", 1e3
    return f"{milliseconds * factor:g} {unit}"


def _finish(axes: Any, title: str, results: Results) -> None:
    machine = results.machine
    device = machine.get("gpu") or f"{machine['cpu']}, {results.threads} threads"
    where = f"{device}; torch {results.versions['torch']}; commit {results.commit}"
    # Of the figure, not of the axes: those may be narrow beside long labels.
    axes.figure.suptitle(f"{title}\n{where}", x=0.01, ha="left", fontsize=9)
    axes.grid(alpha=0.3, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, axes: Any) -> None:
    """Under the axes, where there are no data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)),
                      frameon=False, fontsize=9)  # fmt: skip

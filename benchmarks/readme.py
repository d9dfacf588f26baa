"""The README's performance section, made of the committed results.

Each figure is in a result file that the section links. `--check` tells whether the section is what
the committed results give.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.machine import RESULTS, ROOT
from benchmarks.report import time_text
from benchmarks.results import Results, Row, load

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
_PLOTS = ("cross_entropy_time.png", "linear_cross_entropy_memory.png", "training_epoch.png")
_OTHERS = ("eager", "compile", "torch chunked", "JAX", "limit")
_TABLES_NOTE = (
    "The limit is a copy of the same bytes, or the bare matrix products; the library's may be "
    "slower than ours. The counts below the tables are of calls without gradients, too, which the "
    "reports list."
)
_ORDER = ("cross_entropy", "linear_relu", "linear_cross_entropy", "overhead", "training")


def run(check: bool, path: Path = ROOT / "README.md", results: Path = RESULTS) -> int:
    """Writes the section, or says whether it is current; returns the exit code.

    Args:
        check: only say.
        path: the README.
        results: the folder of the machines' folders.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path}: expected the markers {BEGIN} and {END}")
    files = committed(results) if check else sorted(results.glob("*/*.json"))
    section = "\n".join(_section(files, path.parent))
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    made = f"{head}{BEGIN}\n{section}\n{END}{tail}"
    if not check:
        path.write_text(made)
        print(f"{path}: {'unchanged' if made == text else 'written'}, from {len(files)} files")
        return 0
    if made != text:
        print(f"{path}: its performance section is not that of the committed results; "
              "make it again: python -m benchmarks readme")  # fmt: skip
        return 1
    return 0


def committed(results: Path) -> list[Path]:
    """The machines' result files that git knows; all of them where there is no git."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z", "*.json"],
            cwd=results, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return sorted(results.glob("*/*.json"))
    # A machine's folder may have further runs in folders of its own.
    return sorted(results / name for name in done.stdout.split("\0") if name.count("/") == 1)


def _section(files: Sequence[Path], root: Path) -> list[str]:
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    lines, also = [], []
    kinds = set()
    machines = [(load(paths[0]), folder, paths) for folder, paths in sorted(folders.items())]
    for one, folder, paths in sorted(machines, key=lambda machine: machine[0].date, reverse=True):
        if (kind := "gpu" in one.machine) not in kinds:
            kinds.add(kind)
            lines += _machine(folder, paths, root)
        else:  # the newest of a CPU and of a GPU: the section is long enough
            page = f"{folder.relative_to(root)}/report.md"
            also.append(f"- The same on another machine: [{_title(one)}]({page})")
    if also:
        lines += [*also, ""]
    return lines or ["No results are committed yet: `make bench`."]


def _machine(folder: Path, paths: Sequence[Path], root: Path) -> list[str]:
    where = folder.relative_to(root)
    everything = [load(path) for path in paths]
    everything.sort(key=lambda each: _ORDER.index(each.suite) if each.suite in _ORDER else 99)
    lines = [f"### {_title(everything[0])}", "", f"{report.NOISE_NOTE} {_TABLES_NOTE}", ""]
    for results in everything:
        source = f"[{results.suite}.json]({where}/{results.suite}.json)"
        lines += [f"**{results.suite}** ({source}; commit {results.commit}, {results.date} UTC, "
                  f"torch {results.versions['torch']}, {results.threads} threads)", ""]  # fmt: skip
        # What the backend alone does is of interest to developers: it is in the report.
        rows = [row for row in results.rows if row.provider != "torchext native"]
        lines += [*_table(results), "", *report.verdict(rows), ""]
    lines += [f"All times with their spreads, single directions and memory: "
              f"[report.md]({where}/report.md).", ""]  # fmt: skip
    lines += [f"![{name}]({where}/{name})" for name in _PLOTS if (folder / name).is_file()]
    return [*lines, ""]


def _title(results: Results) -> str:
    machine = results.machine
    if "gpu" in machine:
        return str(machine["gpu"])
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['simd'].split(',')[0]}"


def _table(results: Results) -> list[str]:
    if report.is_job(results):
        return report.ways_tables(results)
    lines = []
    for rows in results.cases().values():
        ours = [row for row in rows.values() if row.role == "ours" and _shown(row)]
        for row in sorted(ours, key=lambda row: row.provider):
            time = time_text(row.median_ms) if row.measured else row.status
            others = [_cell(rows.get(name)) for name in _OTHERS]
            ratios = [report.speed_cell(row), report.limit_cell(row)]
            lines.append([_name(row), time, *others, *ratios])
    head = ["", "torchext", *_OTHERS]
    head += ["times as fast as the best other", "time over the limit's"]
    return report.without_empty([head, *lines])


def _shown(row: Row) -> bool:
    """Whether a row is in the README: of an op, its training calls."""
    return row.provider != "torchext native" and (row.suite != row.op or row.direction == "fwd+bwd")


def _name(row: Row) -> str:
    extra = row.provider.removeprefix("torchext").strip()
    name = report.case_text(row)
    return f"{name}, {extra}" if extra else name


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return time_text(row.median_ms) if row.measured else row.status

"""What got slower between two runs, beyond the noise that they print.

A case is slower where three things hold: its new 10th percentile is above its old 90th; its
median rose by more than the threshold; and so did its ratio to the same run's eager (or whichever
other provider both runs have), so that a slower machine is not taken for a slower kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import table, time_cell
from benchmarks.results import Results, Row, load, load_folder, spread

THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """One row in both runs.

    Attributes:
        old: in the first run.
        new: in the second.
        ratio: the new median over the old one.
        relative: the same, each over its own run's reference; None without one.
    """

    old: Row
    new: Row
    ratio: float
    relative: float | None

    def verdict(self, threshold: float) -> str:
        """Returns ``"slower"``, ``"faster"`` or ``""``."""
        for word, a, b, sign in (
            ("slower", self.old, self.new, 1),
            ("faster", self.new, self.old, -1),
        ):
            apart = (b.p10_ms or 0.0) > (a.p90_ms or 0.0)
            relative = self.ratio if self.relative is None else self.relative
            if apart and min(self.ratio**sign, relative**sign) > 1 + threshold:
                return word
        return ""


def changes(old: Sequence[Results], new: Sequence[Results]) -> list[Change]:
    """Pairs the rows of two runs.

    Args:
        old: the suites of the first.
        new: the suites of the second.
    """
    found = []
    before = {results.suite: results.cases() for results in old}
    for results in new:
        for case, rows in results.cases().items():
            previous = before.get(results.suite, {}).get(case, {})
            reference = _reference(previous, rows)
            for provider, row in rows.items():
                earlier = previous.get(provider)
                if earlier is None or not (row.measured and earlier.measured):
                    continue
                relative = None
                if reference is not None and provider != reference:
                    here = spread(_over(row, rows[reference]))[0]
                    relative = here / spread(_over(earlier, previous[reference]))[0]
                ratio = (row.median_ms or 0.0) / (earlier.median_ms or 1.0)
                found.append(Change(earlier, row, ratio, relative))
    return found


def _reference(old: dict[str, Row], new: dict[str, Row]) -> str | None:
    """The provider that both runs are measured against."""
    for name, row in old.items():
        there = new.get(name)
        if row.role in ("other", "context") and row.measured and there and there.measured:
            return name
    return None


def _over(row: Row, reference: Row) -> list[float]:
    pairs = zip(row.samples_ms, reference.samples_ms, strict=False)
    return [a / b for a, b in pairs]


def read(path: Path) -> list[Results]:
    """Reads a machine's folder or one suite's file.

    Args:
        path: the folder or file.
    """
    return load_folder(path) if path.is_dir() else [load(path)]


def run(old_path: Path, new_path: Path, threshold: float = THRESHOLD) -> int:
    """Prints what changed; returns the exit code: 1 if this package got slower or broke.

    Args:
        old_path: the first run.
        new_path: the second.
        threshold: by how much more a median must have risen.
    """
    old, new = read(old_path), read(new_path)
    pairs = changes(old, new)
    if not pairs:
        print(f"nothing to compare: no case is in both {old_path} and {new_path}")
        return 2
    for name, runs in (("before", old), ("after", new)):
        commits = ", ".join(sorted({results.commit for results in runs}))
        print(f"{name}: commit {commits}, {runs[0].date} UTC, {runs[0].machine['cpu']}")
    failed = False
    for word in ("slower", "faster"):
        chosen = [pair for pair in pairs if pair.verdict(threshold) == word]
        ours = [pair for pair in chosen if pair.new.role == "ours"]
        failed = failed or (word == "slower" and bool(ours))
        print(f"\n{word}: {len(ours)} of torchext, {len(chosen) - len(ours)} of the rest")
        if chosen:
            lines = [
                [
                    f"{pair.new.case}: {pair.new.provider}",
                    time_cell(pair.old),
                    time_cell(pair.new),
                    f"{pair.ratio:.2f}",
                    "–" if pair.relative is None else f"{pair.relative:.2f}",
                ]
                for pair in sorted(chosen, key=lambda pair: -pair.ratio)
            ]
            head = ["", "before", "after", "ratio", "ratio relative to the reference"]
            print("\n".join(table([head, *lines])))
    broken = _broken(old, new)
    for row in broken:
        print(f"\nno longer measured: {row.case}: {row.provider} is {row.status}: {row.reason}")
    failed = failed or any(row.role == "ours" for row in broken)
    same = sum(not pair.verdict(threshold) for pair in pairs)
    print(f"\n{same} of {len(pairs)} unchanged within the noise (threshold {threshold:.0%})")
    if missing := _missing(old, new):
        print(f"in one run only: {', '.join(missing)}")
    return int(failed)


def _broken(old: Sequence[Results], new: Sequence[Results]) -> list[Row]:
    """The rows that were measured before and are refused or failing now."""
    measured = {(row.case, row.provider) for results in old for row in results.rows if row.measured}
    return [
        row
        for results in new
        for row in results.rows
        if not row.measured and (row.case, row.provider) in measured
    ]


def _missing(old: Sequence[Results], new: Sequence[Results]) -> list[str]:
    sides = [
        {f"{row.case}: {row.provider}" for results in runs for row in results.rows if row.measured}
        for runs in (old, new)
    ]
    return sorted(sides[0] ^ sides[1])

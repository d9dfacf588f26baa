"""`python -m benchmarks`: measures, and writes JSON, CSV, a Markdown report and plots.

python -m benchmarks --quick                                  all suites
python -m benchmarks --op cross_entropy --shapes 256x50257 --dtype bfloat16
python -m benchmarks --op linear_relu --random 100 --seed 1    drawn shapes, against eager
python -m benchmarks compare DIR DIR                          what got slower
python -m benchmarks report DIR                               tables and plots again
python -m benchmarks readme [--check]                         the README's section
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, harness, machine, memory, readme, report, suites
from benchmarks.case import DIRECTIONS, parse_shape
from benchmarks.harness import Settings
from benchmarks.results import Results, load_folder, save, save_csv

_FULL = {
    "passes": 3, "seconds": 3.0, "least_rounds": 5, "most_rounds": 60, "slow": math.inf
}  # fmt: skip
_AGAINST_EAGER = ("torchext", "eager")
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"compare": _compare, "report": _report, "readme": _readme}
    try:
        if words and words[0] in commands:
            return commands[words[0]](words[1:])
        return _measure(words)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        what = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            what = f"{error.filename}: {error.strerror}"
        print(f"benchmarks: error: {what}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="minutes; the default")
    length.add_argument("--full", action="store_true", help="more cases, directions and rounds")
    add = parser.add_argument
    add("--op", nargs="+", action="extend", choices=suites.names(), metavar="NAME",
        help=f"suites, of {', '.join(suites.names())} (default: all)")  # fmt: skip
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--shapes", nargs="+", action="extend", type=_shape, metavar="AxB",
        help="shapes instead of the suites' own, such as 1024x1000")  # fmt: skip
    shapes.add_argument("--random", type=int, default=0, metavar="N",
        help="so many shapes drawn of usual sizes, most of them small, with options; "
        "without memory and plots, against eager where there is no --provider")  # fmt: skip
    add("--seed", type=int, default=0, help="of --random: the same shapes again")
    add("--direction", nargs="+", action="extend", choices=DIRECTIONS)
    add("--dtype", nargs="+", action="extend", choices=_DTYPES)
    add("--provider", nargs="+", action="extend", metavar="NAME",
        help="such as eager compile torchext limit (default: all that are here)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, help="of torch")
    add("--seconds", type=float, help="of rounds for a case in a pass")
    add("--budget", type=float, default=0.0, help="seconds of a suite (default: no end)")
    add("--passes", type=int, help="how often to go through all cases")
    add("--rounds", type=int, help="the fewest rounds in a pass")
    add("--cached", action="store_true", help="one input set: large inputs are not rotated")
    add("--graphs", action="store_true", help="on a GPU, calls as a CUDA graph replays them")
    add("--no-memory", action="store_true", help="no measurement of peak memory")
    add("--no-plots", action="store_true")
    add("--output", type=Path, metavar="DIR",
        help="for the results (default: benchmarks/results/<machine>; runs/benchmarks "
        "where options change what is measured)")  # fmt: skip
    return parser


def _shape(text: str) -> tuple[int, ...]:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _settings(options: argparse.Namespace) -> Settings:
    settings = Settings(
        mode="random" if options.random else "full" if options.full else "quick",
        device=options.device,
        memory=not (options.no_memory or options.random),
        cached=options.cached,
        graphs=options.graphs,
        budget=options.budget,
        providers=tuple(options.provider or (_AGAINST_EAGER if options.random else ())),
        directions=tuple(options.direction or ()),
        dtypes=tuple(options.dtype or ()),
        shapes=tuple(options.shapes or ()),
        random=options.random,
        seed=options.seed,
    )
    if options.random:  # many cases, each of few rounds
        settings = replace(settings, most_rounds=9)
    if options.full:
        settings = replace(settings, **_FULL)
    given = {
        "seconds": options.seconds,
        "passes": options.passes,
        "least_rounds": options.rounds,
        "slow": None if options.rounds is None else math.inf,
    }
    return replace(settings, **{key: value for key, value in given.items() if value is not None})


def _folder(settings: Settings) -> Path:
    """Where results go: what is not a suite's own set of cases must not take its place."""
    own = (
        settings.shapes,
        settings.random,
        settings.directions,
        settings.dtypes,
        settings.providers,
    )
    if any(own) or settings.cached or settings.graphs or not settings.memory:
        return machine.ROOT / "runs" / "benchmarks"
    return machine.RESULTS / machine.name(settings.device)


def _measure(words: Sequence[str]) -> int:
    options = _parser().parse_args(words)
    settings = _settings(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads {options.threads}: expected 1 or more")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.random < 0:
        raise ValueError(f"--random {options.random}: expected how many shapes to draw")
    chosen = [suites.get(name) for name in options.op or suites.names()]
    if options.op is None and (settings.shapes or settings.random or options.device != "cpu"):
        chosen = [suite for suite in chosen if isinstance(suite, suites.OpSuite)]
    chosen = [suite for suite in chosen if suite.steps(settings)]
    if not chosen:
        shapes = ", ".join(f"{op.name}: {op.shape_syntax}" for op in suites.ops())
        raise ValueError(f"no case is left by these options; shapes are {shapes}")
    of_ops = [suite for suite in chosen if isinstance(suite, suites.OpSuite)]
    if len(of_ops) == len(chosen):
        there = {provider for suite in of_ops for provider in suite.providers()}
        if unknown := [name for name in settings.providers if name not in there]:
            names = ", ".join(sorted(there))
            raise ValueError(f"--provider {unknown[0]}: there are {names}")
    folder = options.output or _folder(settings)
    kept = machine.keep_freed_memory()
    load = harness.load_average()
    print(f"results go to {folder}", file=sys.stderr)
    if load > 0.5:
        print(f"this machine is busy (load {load:.1f}): times will vary", file=sys.stderr)
    faults = 0
    for suite in chosen:
        results = Results(
            suite=suite.name,
            machine=machine.describe(options.device) | {"freed_memory_kept": kept},
            versions=machine.versions(),
            commit=machine.commit(),
            date=machine.now(),
            threads=torch.get_num_threads(),
            settings=asdict(settings),
            load_before=load,
        )
        interrupted = _run(suite, settings, results)
        results.finish()
        print("\n".join(["", f"## {suite.name}", "", *report.suite_lines(results)]), flush=True)
        if interrupted:  # where no report and no comparison takes it for a whole run
            unfinished = folder / "interrupted" / f"{suite.name}.json"
            save(results, unfinished)
            print(f"{suite.name} is not complete: {unfinished}", file=sys.stderr)
            raise KeyboardInterrupt
        save(results, folder / f"{suite.name}.json")
        faults += sum(row.role == "ours" and row.status != "ok" for row in results.rows)
    _write_report(folder, plots=not (options.no_plots or settings.random))
    return int(faults > 0)


def _run(suite: suites.Suite, settings: Settings, results: Results) -> bool:
    """Measures one suite; returns whether it was interrupted."""
    op = suite.op if isinstance(suite, suites.OpSuite) else None
    total = suite.steps(settings) + (memory.steps(op, settings) if op else 0)
    close, progress = _progress(total, suite.name)
    end = time.monotonic() + (settings.budget or math.inf)
    try:
        suite.run(settings, results.rows, progress)
        if op is not None:
            memory.measure(suite.name, op, settings, results.memory, progress, end)
    except KeyboardInterrupt:
        return True
    finally:
        close()
    return False


def _progress(total: int, name: str) -> tuple[Callable[[], object], Callable[[str], object]]:
    """A progress bar; without tqdm, or a terminal, a line for each step."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            bar: Any = tqdm(total=total, desc=name, leave=False, bar_format=_BAR)

            def advance(text: str) -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update()

            return bar.close, advance
    count = iter(range(1, total + 1))
    begin = time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(round(time.monotonic() - begin), 60)
        place = f"{name} {next(count, total)}/{total}, {minutes}:{seconds:02}"
        print(f"[{place}] {text}", file=sys.stderr, flush=True)

    return lambda: None, say


_BAR = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {elapsed}<{remaining} {postfix}"


def _write_report(folder: Path, plots: bool = True) -> None:
    everything = load_folder(folder)
    save_csv(everything, folder / "results.csv")
    drawn: list[str] = []
    if plots:
        try:
            from benchmarks import plots as plots_module
        except ImportError as error:
            print(f"no plots: {error}", file=sys.stderr)
        else:
            for results in everything:
                drawn += plots_module.save_all(results, folder)
    (folder / "report.md").write_text(report.markdown(everything, drawn))
    print(f"in {folder}: report.md, results.csv, {len(everything)} JSON files, {len(drawn)} plots")


def _compare(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare")
    parser.add_argument("before", type=Path, help="a folder of results, or one JSON file")
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold",
        type=float,
        default=compare.THRESHOLD,
        metavar="SHARE",
        help="by how much a median must have changed (default: %(default)s)",
    )
    options = parser.parse_args(words)
    return compare.run(options.before, options.after, options.threshold)


def _report(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report")
    parser.add_argument("folder", type=Path, help="a folder of results")
    _write_report(parser.parse_args(words).folder)
    return 0


def _readme(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme")
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    return readme.run(check=parser.parse_args(words).check)


if __name__ == "__main__":
    raise SystemExit(main())

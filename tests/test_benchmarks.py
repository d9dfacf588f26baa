"""The benchmarks: wrong providers are refused, times taken in turn, reports say what was found."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import torchext
from benchmarks import (
    check,
    compare,
    harness,
    machine,
    memory,
    providers,
    readme,
    results,
    suites,
)
from benchmarks.__main__ import main
from benchmarks.case import Case
from benchmarks.harness import Settings
from benchmarks.results import Results, Row, load_folder

BRIEF = Settings(passes=1, seconds=0.0, least_rounds=3, most_rounds=3, sample_ms=0.01)
CASES = {
    "linear_relu": Case("linear_relu", (16, 24, 40)),
    "cross_entropy": Case("cross_entropy", (32, 100)),
    "linear_cross_entropy": Case("linear_cross_entropy", (16, 24, 100)),
}


@pytest.fixture(autouse=True)
def two_threads(threads):
    torch.set_num_threads(min(2, torch.get_num_threads()))


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def _scaled(value):
    return 1.01 * value


def _provider(name, change):
    """The eager definition with something done to its value."""

    def make(op, case, sets):
        def function(*args, **kwargs):
            return change(op.reference(*args, **kwargs))

        return providers.TorchTask(function, sets, case.direction)

    return providers.Provider(name, "other", make, lambda: "none")


def _run(monkeypatch, case, *found):
    """Measures a case with the eager definition and others; returns the rows by provider."""
    op = suites.op(case.op)
    eager = providers.providers_of(op)[0]
    monkeypatch.setattr(harness, "providers_of", lambda op: [eager, *found])
    rows: list[Row] = []
    harness.run_cases("test", [(op, case)], BRIEF, rows, lambda text: None)
    results.derive(rows)
    assert rows[0].measured and len(rows[0].samples_ms) == 3
    return {row.provider: row for row in rows}


@pytest.mark.parametrize("change", [_scaled, _ScaledGradient.apply], ids=["value", "gradient"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", CASES)
def test_wrong_by_one_per_cent_is_refused(monkeypatch, op, dtype, change):
    case = replace(CASES[op], dtype=dtype)
    row = _run(monkeypatch, case, _provider("tampered", change))["tampered"]
    assert row.status == "wrong" and not row.samples_ms and row.median_ms is None
    assert "relative error" in row.reason or "times the truth" in row.reason


def test_tampered_inputs_are_refused(monkeypatch):
    case = CASES["cross_entropy"]

    def make(op, case, sets):
        def function(input, target):
            input.detach().zero_()
            return op.reference(input, target)

        return providers.TorchTask(function, sets, case.direction)

    thief = providers.Provider("thief", "other", make, lambda: "none")
    row = _run(monkeypatch, case, thief)["thief"]
    assert (row.status, row.reason) == ("wrong", "it changed its inputs")


def test_a_provider_that_raises_is_reported_and_the_others_timed(monkeypatch):
    def broken(value):
        raise RuntimeError("out of order")

    rows = _run(monkeypatch, CASES["cross_entropy"], _provider("broken", broken))
    assert rows["broken"].status == "failed" and "out of order" in rows["broken"].reason


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("op", CASES)
def test_right_providers_pass(op, dtype, direction):
    case = replace(CASES[op], dtype=dtype, direction=direction)
    op = suites.op(case.op)
    sets = harness.input_sets(op, case)
    truth = check.truth_of(op, case, sets[0])
    for provider in providers.providers_of(op):
        if provider.name in ("eager", "torchext", "torchext native"):
            errors = check.check(provider.make(op, case, sets), truth, sets)
            assert errors.keys() == truth.results.keys()


def test_in_place_calls_get_their_logits_back():
    case = CASES["cross_entropy"]
    op = suites.op(case.op)
    (provider,) = [each for each in op.peers() if each.name == "torchext in place"]
    sets = [op.inputs(case, torch.Generator().manual_seed(seed)) for seed in range(2)]
    task = provider.make(op, case, sets)
    truth = check.truth_of(op, case, sets[0])
    assert task.most_calls == 2
    for _ in range(3):
        harness.warm_up(task)
        check.check(task, truth, sets)


def test_every_op_has_a_benchmark():
    assert set(torchext.ops.__all__) <= set(suites.names())


def test_providers_take_turns():
    calls = []

    def task(name):
        return providers.PlainTask(calls.append, [(name,)])

    tasks = {name: task(name) for name in "abc"}
    settings = replace(BRIEF, least_rounds=4, most_rounds=4)
    samples = harness.interleave(tasks, dict.fromkeys("abc", 1), settings, harness.wall_clock)
    assert {len(values) for values in samples.values()} == {4}
    rounds = [calls[index : index + 3] for index in range(0, 12, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({each[0] for each in rounds}) > 1  # nobody is always first
    slow = replace(settings, slow=0.0)
    samples = harness.interleave(tasks, dict.fromkeys("abc", 1), slow, harness.wall_clock)
    assert {len(values) for values in samples.values()} == {2}


def test_a_sample_of_several_calls_begins_with_one_that_is_not_timed():
    calls = []
    task = providers.PlainTask(calls.append, [(number,) for number in range(10)])

    def clock(run, items):
        calls.append("clock")
        for item in items:
            run(item)
        return 6.0

    assert harness.sample(task, 3, clock) == 2
    assert calls == [0, "clock", 1, 2, 3]
    calls.clear()
    assert harness.sample(task, 1, clock) == 6  # a long call
    assert calls == ["clock", 4]


def test_a_sample_has_as_many_calls_as_last_long_in_a_row():
    """A call alone takes ten times as long here as one among others."""
    task = providers.PlainTask(lambda number: None, [(0,)])

    def clock(run, items):
        return 10.0 if len(items) == 1 else 1.0 * len(items)

    settings = replace(BRIEF, sample_ms=20.0)
    assert harness.calls_of(task, 1.0, settings, clock) == 20
    task.most_calls = 5
    assert harness.calls_of(task, 1.0, settings, clock) == 4
    assert harness.calls_of(task, 1000.0, settings, clock) == 1


def test_freed_memory_stays_with_the_process():
    code = """
import resource, torch
from benchmarks import machine
assert machine.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def call():
    return [torch.ones(1 << 20) for _ in range(4)]  # 4 MiB each
for _ in range(6):
    call()  # the heap finds its size
before = faults()
for _ in range(10):
    call()
print(faults() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=machine.ROOT, check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 1000  # of 40,960 pages; 20,000 without


def test_large_inputs_are_rotated_past_the_cache(monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 8 << 20)
    op = suites.op("cross_entropy")
    small, large = Case(op.name, (100, 10)), Case(op.name, (1024, 1000))
    assert len(harness.input_sets(op, small)) == 1
    sets = harness.input_sets(op, large)
    assert sum(inputs.bytes for inputs in sets) >= 16 << 20
    assert not torch.equal(sets[0].args["input"], sets[1].args["input"])
    assert len(harness.input_sets(op, large, cached=True)) == 1


def test_peak_memory_is_of_a_fresh_process():
    rows: list[Row] = []
    op = suites.op("cross_entropy")
    settings = replace(BRIEF, providers=("eager", "torchext", "limit"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(op), "memory_presets", lambda *_: [Case(op.name, (512, 8192))])
        assert memory.steps(op, settings) == 3
        memory.measure("test", op, settings, rows, lambda text: None)
    peaks = {row.provider: row.peak_mib for row in rows}
    assert peaks["limit"] == 16
    assert 15 < peaks["torchext"] < 24 < peaks["eager"] < 80


def _results(times, suite="cross_entropy"):
    """One case with samples around given medians, by provider."""
    rows = [
        Row(suite, "cross_entropy 8x8", name, role, status="ok", op="cross_entropy",
            plot_size=64.0, dtype="float32", direction="fwd+bwd",
            samples_ms=[time * factor for factor in (0.99, 1.0, 1.0, 1.01)])
        for (name, role), time in times.items()
    ]  # fmt: skip
    machine = {"cpu": "a CPU", "cores": 2, "simd": "AVX2", "memory_gib": 8.0}
    versions = {"python": "3.11", "torch": "2.13", "torchext": "0.1"}
    found = Results(suite, machine, versions, "abc", "2026-01-01 00:00", 2, {"mode": "quick"}, 0.0,
                    rows=rows)  # fmt: skip
    found.finish()
    return found


EAGER, OURS, LIMIT = ("eager", "other"), ("torchext", "ours"), ("limit", "limit")


def test_ratios_are_of_the_same_round():
    found = _results({EAGER: 4.0, ("compile", "other"): 3.0, OURS: 1.0, LIMIT: 0.5})
    (row,) = [row for row in found.rows if row.role == "ours"]
    assert (row.best_other, row.times_as_fast, row.of_limit) == ("compile", 3.0, 2.0)


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        ({EAGER: 4.0, OURS: 1.5}, 1, "slower: 1 of torchext"),
        ({EAGER: 4.0, OURS: 1.005}, 0, "slower: 0 of torchext"),
        ({EAGER: 6.0, OURS: 1.5}, 0, "slower: 0 of torchext"),  # all of the machine is slower
        ({EAGER: 4.0, OURS: 0.5}, 0, "faster: 1 of torchext"),
    ],
    ids=["slower", "noise", "machine", "faster"],
)
def test_compare(tmp_path, capsys, after, code, said):
    before, later = tmp_path / "before.json", tmp_path / "after.json"
    results.save(_results({EAGER: 4.0, OURS: 1.0}), before)
    results.save(_results(after), later)
    assert main(["compare", str(before), str(later)]) == code
    assert said in capsys.readouterr().out


def test_compare_tells_what_broke(tmp_path, capsys):
    before, later = tmp_path / "before.json", tmp_path / "after.json"
    results.save(_results({EAGER: 4.0, OURS: 1.0}), before)
    broken = _results({EAGER: 4.0, OURS: 1.0})
    broken.rows[1].fail("wrong", "value: 1.0100 times the truth")
    broken.rows[1].median_ms = None
    results.save(broken, later)
    assert compare.run(before, later) == 1
    assert "torchext is wrong: value: 1.0100 times the truth" in capsys.readouterr().out


def test_results_survive_their_file(tmp_path):
    found = _results({EAGER: 4.0, OURS: 1.0})
    results.save(found, tmp_path / "a.json")
    assert results.load(tmp_path / "a.json") == found
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="not results of these benchmarks"):
        results.load(tmp_path / "b.json")


def test_readme_section_is_of_the_results(tmp_path):
    page, folder = tmp_path / "README.md", tmp_path / "results"
    page.write_text(f"# a\n{readme.BEGIN}\nold\n{readme.END}\nrest\n")
    path = folder / "machine" / "cross_entropy.json"
    results.save(_results({EAGER: 4.0, OURS: 1.0, LIMIT: 0.5}), path)
    assert readme.run(check=True, path=page, results=folder) == 1
    assert readme.run(check=False, path=page, results=folder) == 0
    text = page.read_text()
    assert text.startswith("# a\n") and text.endswith("\nrest\n") and "old" not in text
    assert "| 8x8 | 1.00 ms | 4.00 ms | 500 µs | 4.00 (4.00–4.00) × eager | 2.00 |" in text
    assert "results/machine/cross_entropy.json" in text
    assert readme.run(check=True, path=page, results=folder) == 0
    results.save(_results({EAGER: 0.5, OURS: 1.0, LIMIT: 0.5}), path)
    assert readme.run(check=True, path=page, results=folder) == 1
    assert readme.run(check=False, path=page, results=folder) == 0
    assert "slower: 8x8: torchext takes 2.00 times as long as eager" in page.read_text()
    results.save(_results({EAGER: 4.0, OURS: 1.0, LIMIT: 0.5}), folder / "other" / path.name)
    assert readme.run(check=False, path=page, results=folder) == 0
    assert "results/other/report.md" in page.read_text()
    assert page.read_text().count("| 8x8 |") == 1


def test_command_writes_everything(tmp_path, capsys):
    options = "--op cross_entropy --shapes 16x32 64x64 --provider eager torchext limit"
    brief = f"--passes 2 --seconds 0 --rounds 2 --threads 1 --output {tmp_path}"
    assert main([*options.split(), *brief.split()]) == 0
    found = json.loads((tmp_path / "cross_entropy.json").read_text())
    assert found["threads"] == 1 and found["commit"] and found["machine"]["cpu"]
    assert found["versions"]["torch"] == torch.__version__
    assert {row["provider"] for row in found["rows"]} == {"eager", "torchext", "limit"}
    assert all(len(row["samples_ms"]) >= 4 for row in found["rows"])
    table = (tmp_path / "results.csv").read_text().splitlines()
    assert len(table) == 1 + 6 and table[0].startswith("suite,case,provider")
    report = (tmp_path / "report.md").read_text()
    assert "16x32 float32 fwd+bwd" in report and "cross_entropy_time.png" in report
    for name in ("time", "ratio"):
        assert (tmp_path / f"cross_entropy_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--shapes 3", "no case is left"),
        ("--random -1", "--random -1"),
        ("--threads 0", "--threads 0"),
        ("--op cross_entropy --provider eager,torchext", "eager,torchext: there are "),
        ("report nowhere", "nowhere: no results"),
        ("--op overhead --device cuda", "finds no CUDA device"),
    ],
)
def test_impossible_options_are_refused(capsys, tmp_path, words, says):
    if "cuda" in words and torch.cuda.is_available():
        words, says = "--shapes 7", "no case is left"
    before = [] if words.startswith("report") else ["--output", str(tmp_path)]
    assert main([*words.split(), *before]) == 2
    printed = capsys.readouterr().err
    assert "benchmarks: error:" in printed and says in printed
    assert not list(tmp_path.iterdir())


def test_what_was_measured_before_an_interruption_is_kept_apart(tmp_path, monkeypatch):
    """Where it stands for no whole run, and takes no earlier one's place."""
    folder = tmp_path / "results"
    options = "--op linear_relu --shapes 1x8x8 4x8x8 --provider eager torchext --passes 1 "
    brief = f"--seconds 0.01 --no-memory --no-plots --output {folder}"
    assert main([*options.split(), *brief.split()]) == 0
    whole = (folder / "linear_relu.json").read_text()
    run, runs = harness.CaseRun.run, []

    def interrupted(self):
        runs.append(self)
        if len(runs) == 2:
            raise KeyboardInterrupt
        run(self)

    monkeypatch.setattr(harness.CaseRun, "run", interrupted)
    assert main([*options.split(), *brief.split()]) == 130
    assert (folder / "linear_relu.json").read_text() == whole
    (kept,) = load_folder(folder / "interrupted")
    states = {(row.size, row.provider): row.status for row in kept.rows}
    assert states["1x8x8", "torchext"] == "ok"
    assert ("4x8x8", "torchext") not in states
    assert [results.suite for results in load_folder(folder)] == ["linear_relu"]

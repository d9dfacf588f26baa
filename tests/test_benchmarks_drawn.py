"""`python -m benchmarks --random`: drawn cases, and what is said of them."""

from __future__ import annotations

from benchmarks import harness, report, results, suites
from benchmarks.__main__ import main
from benchmarks.case import Case
from benchmarks.harness import Settings


def test_drawn_cases_are_those_of_the_seed_and_what_is_slower_is_said(tmp_path, monkeypatch):
    brief = f"--random 4 --seed 5 --passes 1 --seconds 0 --rounds 2 --output {tmp_path}"
    assert main(["--op", "cross_entropy", "linear_relu", *brief.split()]) == 0
    for name in ("cross_entropy", "linear_relu"):
        found = results.load(tmp_path / f"{name}.json")
        settings = Settings(random=4, seed=5)
        drawn = [case.label for case in harness.cases_of(suites.op(name), settings)]
        assert list(found.cases()) == drawn and len(set(drawn)) == 4
        assert {row.provider for row in found.rows} == {"eager", "torchext"}
    others = harness.cases_of(suites.op(name), Settings(random=4, seed=6))
    assert [case.label for case in others] != drawn
    for row in found.rows:
        slow = row.provider == "torchext" and row.case == drawn[0]
        row.samples_ms = [1.2 if slow else 1.0] * 2
    results.derive(found.rows)
    lines = report.drawn_lines(found)
    assert "| float32 fwd+bwd | 4 | 1 | 1 | 1.00 |" in lines
    (slower,) = (line for line in lines if "1.20 (1.20–1.20)" in line)
    assert slower.startswith(f"| {drawn[0].removeprefix('linear_relu ')} |")


def test_what_overflows_is_wrong_even_where_it_is_eager():
    case = Case("cross_entropy", (64, 10000), "float16", options=(("label_smoothing", 0.1),))
    settings = Settings(providers=("eager", "torchext"), seconds=0, least_rounds=2)
    run = harness.CaseRun("cross_entropy", suites.op("cross_entropy"), case, settings)
    run.run()
    assert run.rows["eager"].status == "wrong"
    assert run.rows["torchext"].status == "ok"

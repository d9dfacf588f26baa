"""Lets pytest find the benchmarks, which are no tests: `pytest benchmarks/ --benchmark-only`."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")

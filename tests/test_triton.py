"""The Triton backend on a machine without a GPU: its kernels interpreted, and compiled.

The common suites run once more in a process of their own, since TRITON_INTERPRET=1 must be set
before Triton is imported. In CI a missing Triton is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torchext
from torchext import _choice, _native, _triton

ROOT = Path(__file__).parents[1]


@pytest.fixture
def triton() -> None:
    if importlib.util.find_spec("triton") is None:
        if os.environ.get("CI"):
            pytest.fail("triton is not installed: pip install 'torchext[test]'")
        pytest.skip("triton is not installed")


def python(*arguments: str, **variables: str) -> str:
    """Runs Python in the project's folder; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


TRITON = ["--backend", "triton"]
# The second derivatives are stock's; linear_relu's gradcheck takes as long as all else of it.
PLAIN = ["-k", "not second and not gradcheck"]
SUITES = {
    "test_linear_relu.py": [*TRITON, "--sample", "6", *PLAIN],
    "test_cross_entropy.py": [*TRITON, "--sample", "6"],
    "test_cross_entropy_autograd.py": [*TRITON, *PLAIN],
    "test_extras_kernel.py": [*TRITON, "--sample", "8"],
    "test_linear_cross_entropy_backends.py": [*TRITON, "--sample", "8"],
    "triton_interpreted.py": [],
    "triton_interpreted_linear_cross_entropy.py": ["--sample", "2"],
    "triton_interpreted_linear_cross_entropy_calls.py": [],
}


@pytest.mark.skipif(_triton.interpreted, reason="this is such a process")
@pytest.mark.parametrize("file", SUITES)
def test_a_suite_in_the_interpreter(
    triton: None, request: pytest.FixtureRequest, file: str
) -> None:
    seed = str(request.config.option.seed)
    options = ["-q", "-p", "no:cacheprovider", "--seed", seed, *SUITES[file]]
    # What numpy says of NaN and infinities is what the tests of them look for.
    command = ["-W", "ignore::RuntimeWarning", "-m", "pytest", f"tests/{file}", *options]
    printed = python(*command, TRITON_INTERPRET="1")
    assert re.search(r"^[1-9]\d* passed", printed, re.MULTILINE)
    assert " skipped" not in printed or file == "triton_interpreted.py"


def test_kernels_compile_ahead_of_time(triton: None) -> None:
    """Some of them; .ci/run compiles all."""
    only = "cross_entropy 16384x1024 torch.float32 forward"
    printed = python("scripts/compile_triton.py", "--only", only, TRITON_INTERPRET="")
    for arch in ("sm_80", "sm_90a", "sm_100a"):
        assert re.search(rf"cross_entropy_rows_kernel +{arch} +\d+ +0 ", printed)


def test_triton_is_not_imported_before_it_serves_a_call() -> None:
    program = """
import sys, torch, torchext
x = torch.randn(300, 300, requires_grad=True)
torchext.cross_entropy(torchext.linear_relu(x, x), torch.arange(300)).backward()
assert "triton" in torchext.backends()
torchext.backends()
assert "triton" not in sys.modules
"""
    python("-c", program, TRITON_INTERPRET="")


def test_schemas_are_those_of_the_native_operators() -> None:
    for name in _triton.SCHEMAS:
        ours = str(getattr(torch.ops.torchext_triton, name).default._schema)
        native = str(getattr(torch.ops.torchext, name).default._schema)
        assert ours.replace("torchext_triton::", "torchext::") == native


def test_the_native_operators_have_a_cuda_kernel() -> None:
    for name in _triton.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torchext::{name}", "CUDA")


def test_a_backend_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_installed", False)
    assert torchext.backends()["triton"].reason == "triton is not installed"
    with (
        pytest.raises(RuntimeError, match="triton.*not installed"),
        torchext.use_backend("triton"),
    ):
        pass
    monkeypatch.setattr(_triton, "_installed", True)
    monkeypatch.setattr(_triton, "interpreted", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1 is not set" in torchext.backends()["triton"].reason
    monkeypatch.setattr(_triton, "interpreted", True)
    assert torchext.backends()["triton"].available


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        _choice,
        "MEASURED",
        (
            _choice.Measured("cross_entropy", 0, "eager", "a test"),
            _choice.Measured("cross_entropy", 1000, "triton", "a test"),
            _choice.Measured("linear_relu", 1000, "native", "a test"),
        ),
    )
    yield


def test_auto_without_a_measurement() -> None:
    for op in ("linear_relu", "cross_entropy", "linear_cross_entropy"):
        rest = [row for row in _choice.MEASURED if row.op != op]
        if len(rest) < len(_choice.MEASURED):
            continue
        assert _choice.choose(op, 10**9, ("native", "triton")) == "native"
        assert _choice.choose(op, 10**9, ("triton",)) == "triton"
        assert _choice.choose(op, 10**9, ()) == "eager"


def test_auto_takes_what_was_measured(measured: None) -> None:
    both = ("native", "triton")
    assert _choice.choose("cross_entropy", 999, both) == "eager"
    assert _choice.choose("cross_entropy", 1000, both) == "triton"
    assert _choice.choose("cross_entropy", 1000, ("native",)) == "eager"
    assert _choice.choose("linear_relu", 10**6, ("triton",)) == "triton"
    assert _choice.choose("linear_relu", 10**6, both) == "native"
    assert _choice.choose("linear_relu", 1, ()) == "eager"


def test_cuda_tensors_take_what_is_here() -> None:
    """Fake ones: what would be captured on a machine with a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert not _native.cpu_missing
    with FakeTensorMode():
        x = torch.empty(4, 5, device="cuda")
        target = torch.empty(4, dtype=torch.int64, device="cuda")
        for space in (torch.ops.torchext, torch.ops.torchext_triton):
            loss, stats, gradient = space.cross_entropy_forward(
                x, target, None, 1, -100, 0.0, False
            )
            assert loss.device.type == stats.device.type == gradient.device.type == "cuda"
            w = torch.empty(6, 5, device="cuda")
            results = space.linear_cross_entropy_forward(
                x, w, target, None, None, 1, -100, 0.0, True, True, False
            )
            assert [t.shape for t in results] == [(), (2, 4), (4, 5), (6, 5), (0,)]
            assert {t.device.type for t in results} == {"cuda"}

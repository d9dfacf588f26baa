"""What builds and checks the CUDA library says what it does, and fails where it should."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import torchext
from torchext import _native

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    """A program of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compile_cuda() -> ModuleType:
    return script("compile_cuda")


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    return script("gpu_check")


def setup_says(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_setup_says_why_there_are_no_cuda_kernels() -> None:
    assert "without CUDA kernels (torchext._C_cuda): TORCHEXT_CUDA=0" in setup_says(
        TORCHEXT_CUDA="0"
    )
    if torch.version.cuda is None:
        assert "is built without CUDA" in setup_says()


def test_setup_finds_the_toolkit_of_a_script_that_calls_nvcc(tmp_path: Path) -> None:
    """Torch would take the folder above the script, where no headers are."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    wanted = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "toolkit_of"]
    imports = [x for x in tree.body if isinstance(x, (ast.Import, ast.ImportFrom))][:5]
    found: dict[str, Any] = {}
    exec(compile(ast.Module([*imports, *wanted], []), "setup.py", "exec"), found)
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    for says, home in (("#$ TOP=/toolkit/bin/..", Path("/toolkit")), ("", tmp_path.resolve())):
        nvcc.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
        nvcc.chmod(0o755)
        assert found["toolkit_of"](str(nvcc)) == str(home)


def test_the_library_says_why_it_is_not_there() -> None:
    if torch.version.cuda is None:
        assert _native.cuda_missing == f"torch {torch.__version__} is built without CUDA"
    else:
        assert _native.cuda_missing == "" or "torchext._C_cuda" in _native.cuda_missing
    assert torchext.backends()["native"].available


def test_the_compile_check_reads_what_setup_builds_with(compile_cuda: Any) -> None:
    constants = compile_cuda.setup_constants()
    assert constants["CUDA_TARGETS"] == ["sm_80", "sm_90a", "sm_100a", "sm_120", "compute_90"]
    assert "-DTORCH_STABLE_ONLY" in constants["NVCC_FLAGS"]


def test_the_compile_check_needs_nvcc(
    compile_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compile_cuda, "CUDA_HOME", tmp_path)
    monkeypatch.setattr(compile_cuda.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="nvcc is missing"):
        compile_cuda.main.__globals__["tool"]("nvcc")


def test_the_compile_check_finds_faults(compile_cuda: Any) -> None:
    def faults(name: str, arch: str, spills: int = 0, *words: str) -> list[str]:
        found = compile_cuda.Counter(dict.fromkeys(words, 1))
        kernel = compile_cuda.Kernel(name, arch, 64, 0, spills, found)
        return list(compile_cuda.faults_of(kernel))

    wide = ("LDG.E.128", "STG.E.128")
    cluster = ("UCGABAR_ARV", "UCGABAR_WAIT", "LD.E")
    block = "cross_entropy_block_kernel<__nv_bfloat16, true, false>"
    assert faults(block, "sm_90a", 0, *wide, *cluster) == []
    assert faults(block, "sm_80", 0, *wide) == []
    assert faults(block, "sm_90a", 0, *wide) == [f"has no {word}" for word in cluster]
    assert faults(block, "sm_80", 8, *wide) == ["spills 8 bytes"]
    pieces = "cross_entropy_pieces_kernel<float, true, true>"
    assert faults(pieces, "sm_90a", 0, *wide) == [f"has no {word}" for word in cluster]
    assert faults("add_product_kernel<__half, true>", "sm_80", 0, wide[0]) == ["has no STG.E.128"]
    assert faults("partial_column_sums_kernel<float, true>", "sm_80", 0, wide[0]) == []
    assert faults("relu_mask_kernel<float, true>", "sm_80") == [f"has no {word}" for word in wide]
    assert faults("relu_mask_kernel<float, false>", "sm_80") == []
    assert faults("cross_entropy_stream_kernel<float, true>", "sm_80", 0, wide[0]) == []
    assert faults("relu_mask_kernel<double, true>", "sm_80", 8) == []  # reported alone


def test_the_gpu_check_shares_its_time(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stages leave is for the later ones; the last may take all; none is left without."""
    clock = [0.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    for took in (1.0, 0.25):  # of their limits
        clock[0] = 0.0
        check = gpu_check.Check(tmp_path)
        limits: list[float] = []

        def run(stage: Any, limit: float, took: float = took, limits: list[float] = limits) -> None:
            limits.append(limit)
            clock[0] += took * limit

        monkeypatch.setattr(check, "run", run)
        clock[0] += 150  # the build
        stages = gpu_check.stages(check, "python3", "this", tmp_path)
        check.run_all(stages)
        assert [stage.part for stage in stages] == ["tests"] * 5 + ["benchmarks"] * 4
        total = gpu_check.TOTAL_SECONDS - 150
        assert sum(limits) == pytest.approx(total) if took == 1 else clock[0] < total
        assert limits[-1] == pytest.approx(check.left() + took * limits[-1])
        assert min(limits) > 15


def test_a_stage_of_the_gpu_check(gpu_check: Any, tmp_path: Path) -> None:
    check, Stage = gpu_check.Check(tmp_path), gpu_check.Stage
    program = "import os, sys; print(sys.argv[1], os.environ['GIVEN'])"
    command = [sys.executable, "-c", program, "{seconds}"]
    check.run(Stage("one", "prints", command, 1, "tests", {"GIVEN": "here"}), 100)
    assert (check.stages[0].status, check.stages[0].last_line) == ("passed", "85 here")
    check.run(Stage("two", "sleeps", ["sleep", "30"], 1), 1)
    assert check.stages[1].status == "out of time"
    check.run(Stage("three", "fails", ["false"], 1), 10)
    assert check.stages[2].status == "failed with exit code 1"
    assert check.finish() == 1
    names = [
        stage["name"] for stage in json.loads((tmp_path / "summary.json").read_text())["stages"]
    ]
    assert names == ["one", "two", "three"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_the_gpu_check_fails_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "torch finds no CUDA device" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["passed"]
    assert [stage["name"] for stage in summary["stages"]] == ["info"]

"""Everything that needs a GPU, in one command without a network: build, tests, benchmarks.

    make gpu-check OUT=dir

Builds the package with this machine's own python3, torch, nvcc and Triton, runs the tests on CUDA
with each backend (up to 12 cases of each, drawn afresh), a small run under compute-sanitizer, and
the benchmarks. Each stage says what it does, has a time limit, and does not end the others when it
fails; all of them end within nine minutes. `dir` gets gpu_check.log, summary.json and
benchmarks.tar.gz; the benchmarks' results also go to benchmarks/results/<device>/. The exit code
says whether all stages passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 9 * 60 - 15
OWN_TESTS = [f"tests/test_cuda{part}.py" for part in ("", "_head", "_extras")]
PACKAGES = ("torch", "triton", "ninja", "setuptools", "numpy", "pytest", "xdist", "hypothesis",
            "expecttest", "matplotlib", "psutil", "liger_kernel", "quack",
            "cut_cross_entropy")  # fmt: skip


@dataclass
class Stage:
    """One stage: what it runs, for how long, and what came of it."""

    name: str
    what: str
    command: list[str]
    seconds: float  # at most
    reserve: float = 0.0  # that it leaves to the stages after it
    status: str = "not run"
    took: float = 0.0
    last_line: str = ""


class Check:
    """The run: its clock, its log, its environment."""

    def __init__(self, out: Path) -> None:
        """Begins a run whose results go to `out`."""
        self.begin = time.monotonic()
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "gpu_check.log").open("w")
        self.build = ROOT / "build/gpu"
        library = self.build / "lib"
        # The built package, not the source tree: `python -m` would put the tree first.
        self.environment = os.environ | {
            "PYTHONPATH": f"{library}{os.pathsep}{ROOT}",
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "TORCHEXT_NEEDS_CUDA": "1",  # tests of the CUDA library may not be left out
        }
        self.stages: list[Stage] = []

    def say(self, text: str = "") -> None:
        """Prints a line, and writes it to the log."""
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def left(self) -> float:
        """Returns the seconds that are left."""
        return TOTAL_SECONDS - (time.monotonic() - self.begin)

    def run(self, stage: Stage) -> None:
        """Runs a stage; what it prints goes to the screen and to the log."""
        self.stages.append(stage)
        limit = min(stage.seconds, self.left() - stage.reserve)
        self.say(f"\n== {stage.name}: {stage.what} (at most {max(limit, 0):.0f} s)")
        if limit < 5:
            stage.status = "no time was left"
            self.say(stage.status)
            return
        self.say(f"$ {' '.join(stage.command)}")
        begin = time.monotonic()
        process = subprocess.Popen(
            ["timeout", "--signal=INT", "--kill-after=5", f"{limit:.0f}", *stage.command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:
            self.say(line.rstrip("\n"))
            stage.last_line = line.strip() or stage.last_line
        code = process.wait()
        stage.took = round(time.monotonic() - begin, 1)
        stage.status = {0: "passed", 124: "out of time", 137: "out of time"}.get(
            code, f"failed with exit code {code}"
        )
        self.say(f"-- {stage.name}: {stage.status} after {stage.took:.0f} s")

    def finish(self) -> int:
        """Writes the summary; returns the exit code."""
        passed = all(stage.status in ("passed", "not here") for stage in self.stages)
        summary = {
            "passed": passed,
            "seconds": round(time.monotonic() - self.begin, 1),
            "stages": [asdict(stage) for stage in self.stages],
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        self.say("\n== summary")
        for stage in self.stages:
            self.say(
                f"{stage.name:22} {stage.status:24} {stage.took:6.0f} s  {stage.last_line[:90]}"
            )
        self.say(f"{'all passed' if passed else 'NOT all passed'}; in {self.out}")
        return int(not passed)


def info() -> None:
    """Prints what this machine has, and what it lacks."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            print(f"{name:18} missing")
            continue
        try:
            module = __import__(name)
            print(f"{name:18} {getattr(module, '__version__', 'here')}")
        except Exception as error:  # a package of others can raise anything
            print(f"{name:18} does not import: {error}")
    import torch

    print(f"CUDA of torch      {torch.version.cuda}")
    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no CUDA device")
    device = torch.cuda.get_device_properties(0)
    print(f"device             {device.name}, compute capability {device.major}.{device.minor}, "
          f"{device.total_memory / 2**30:.0f} GiB")  # fmt: skip
    for program in ("nvcc", "compute-sanitizer", "nvidia-smi"):
        print(f"{program:18} {shutil.which(program) or 'missing'}")
    source, target = (torch.empty(1 << 30, device="cuda") for _ in range(2))  # 4 GiB each
    source.normal_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    for event in events:
        target.copy_(source)
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))
    print(f"copy bandwidth     {2 * 4 * (1 << 30) / times[len(times) // 2] / 1e6:.0f} GB/s")


def sanitized() -> None:
    """A small run of each kernel, for compute-sanitizer: every route, layout and dtype once."""
    import torch
    from torchext.triton_kernels.linear_cross_entropy import use_schedule

    import torchext

    ops = torch.ops.torchext
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (10, 999, 5000, 50257, 131072):
            x = torch.randn(3, classes, device="cuda", dtype=dtype)
            target = torch.randint(classes, (3,), device="cuda")
            rest = (target, torch.rand(classes, device="cuda", dtype=dtype), 1, -100, 0.1)
            ops.cross_entropy_forward(x, *rest, True)
            loss, stats, _ = ops.cross_entropy_forward(x, *rest, False)
            ops.cross_entropy_backward(loss, x, *rest[:2], stats, *rest[2:])
            for backend, reduction in (("native", "mean"), ("native", "none"), ("triton", "none")):
                with torchext.use_backend(backend):
                    logits = x.clone().requires_grad_()
                    loss, lse, _ = torchext.cross_entropy(
                        logits, target, softcap=9.0, z_loss=0.1, reduction=reduction,
                        label_smoothing=0.1, return_lse=True, return_argmax=True,
                    )  # fmt: skip
                    (loss.sum() + lse.sum()).backward()
        for x in (torch.randn(2, 21, 9, 8, device="cuda"), torch.randn(70, 33, device="cuda").t()):
            logits = x.to(dtype).requires_grad_()
            positions = (x.shape[0], *x.shape[2:])
            target = torch.randint(x.shape[1], positions, device="cuda")
            with torchext.use_backend("native"):
                torchext.cross_entropy(logits, target).backward()
        x = torch.randn(130, 40, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(72, 40, device="cuda", dtype=dtype, requires_grad=True)
        with torchext.use_backend("native"):
            torchext.linear_relu(x, weight).sum().backward()
        # In one piece; and with more than 64 MiB of logits: in pieces, and slices of classes.
        for rows, features, classes in ((130, 40, 72), (300, 130, 131_072)):
            x = torch.randn(rows, features, device="cuda", dtype=dtype)
            weight = torch.randn(classes, features, device="cuda", dtype=dtype)
            bias = torch.randn(classes, device="cuda", dtype=dtype)
            target = torch.randint(classes, (rows,), device="cuda")
            rest = (target, bias, None)
            flags = (True, True, True)
            ops.linear_cross_entropy_forward(x, weight, *rest, 1, -100, 0.1, *flags)
            loss, stats, *_ = ops.linear_cross_entropy_forward(
                x, weight, *rest, 0, -100, 0.1, False, False, False
            )
            ops.linear_cross_entropy_backward(loss, x, weight, *rest, stats, 0, -100, 0.1, *flags)
        for schedule in ("chunks", "tiles"):
            head = [torch.randn(n, 72, device="cuda", dtype=dtype) for n in (300, 1003)]
            input, weight = (tensor.requires_grad_() for tensor in head)
            target = torch.randint(1003, (300,), device="cuda")
            with torchext.use_backend("triton"), use_schedule(schedule):
                torchext.linear_cross_entropy(input, weight, target).backward()
    torch.cuda.synchronize()
    print("all kernels ran")


def architecture() -> str:
    """Returns the compute capability to build for, as TORCH_CUDA_ARCH_LIST has it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if (major, minor) in ((9, 0), (10, 0)) else ''}"


def benchmark_results(check: Check, folder: Path) -> None:
    """Puts the benchmarks' results into one file."""
    if folder.exists() and any(folder.iterdir()):
        with tarfile.open(check.out / "benchmarks.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
        check.say(f"results: {folder} and {check.out / 'benchmarks.tar.gz'}")


def results_folder() -> Path:
    """Returns where this device's results go: benchmarks/results/<device>."""
    sys.path.append(str(ROOT))
    import re

    import torch

    name = torch.cuda.get_device_name(0).lower()
    return ROOT / "benchmarks/results" / re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def main() -> int:
    """Runs all stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-check", metavar="DIR")
    parser.add_argument("--stage", choices=("info", "sanitized"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is not None:
        {"info": info, "sanitized": sanitized}[options.stage]()
        return 0
    check = Check(options.out.resolve())
    python, this = sys.executable, str(Path(__file__).resolve())
    check.run(
        Stage("info", "what this machine has and lacks", [python, this, "--stage", "info"], 60)
    )
    if check.stages[0].status != "passed":
        return check.finish()
    check.environment["TORCH_CUDA_ARCH_LIST"] = architecture()
    build = [python, "setup.py", "build", "--build-base", str(check.build), "--build-lib",
             str(check.build / "lib")]  # fmt: skip
    check.run(Stage("build", f"both libraries, for {architecture()}", build, 200))
    pytest = [python, "-m", "pytest", "-q", "--no-header", "--tb=short", "--maxfail=40", "-p",
              "no:cacheprovider"]  # fmt: skip
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") is not None else []
    check.run(
        Stage(
            "tests: cuda",
            "what is CUDA's own: routes, streams, graphs, 2^31 elements, assertions",
            [*pytest, "--durations=5", *OWN_TESTS],
            100,
            reserve=260,
        )
    )
    for backend, reserve in (("native", 255), ("triton", 225)):
        check.run(
            Stage(
                f"tests: {backend}",
                f"the suites of the ops on CUDA, backend {backend} (up to 12 cases of a test)",
                [
                    *pytest,
                    *parallel,
                    "tests",
                    "-k",
                    f"cuda-{backend}",
                    "--backend",
                    backend,
                    "--sample",
                    "12",
                    *(f"--ignore={test}" for test in OWN_TESTS),
                ],
                90,
                reserve=reserve,
            )  # fmt: skip
        )
    sanitizer = shutil.which("compute-sanitizer")
    stage = Stage(
        "compute-sanitizer",
        "a small run of every kernel, looked at access by access",
        [sanitizer or "compute-sanitizer", "--error-exitcode=9", "--tool=memcheck", python, this,
         "--stage", "sanitized"],
        90,
        reserve=190,
    )  # fmt: skip
    if sanitizer is None:
        stage.status, stage.last_line = "not here", "compute-sanitizer is not on PATH"
        check.stages.append(stage)
    else:
        check.run(stage)
    folder = results_folder()
    head = "linear_cross_entropy"
    for op, seconds, reserve in (
        (head, 120, 100),
        ("cross_entropy", 150, 45),
        ("linear_relu", 70, 5),
    ):
        budget = min(seconds, check.left() - reserve) * 0.85
        command = [python, "-m", "benchmarks", "--device", "cuda", "--op", op,
                   "--passes", "1", "--seconds", "0.25", "--budget", f"{budget:.0f}",
                   "--output", str(folder)]  # fmt: skip
        what = "TFLOP/s against the bare GEMMs, eager, torch.compile"
        if op == "cross_entropy":
            what = "GB/s against a copy, eager, torch.compile and peers"
        if op == head:
            what += "; peak memory"
        else:
            command.append("--no-memory")
        check.run(Stage(f"benchmarks: {op}", what, command, seconds, reserve))
    benchmark_results(check, folder)
    return check.finish()


if __name__ == "__main__":
    raise SystemExit(main())

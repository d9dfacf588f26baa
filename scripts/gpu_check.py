"""Everything that needs a GPU, in one command without a network: build, tests, benchmarks.

    make gpu-check OUT=dir [ARGS="--part tests|benchmarks"]

Builds the package with this machine's own python3, torch, nvcc and Triton, runs the tests on CUDA
with each backend (some cases of each, drawn afresh), a small run under compute-sanitizer, and the
benchmarks. Each stage says what it does, and does not end the others when it fails; all of them end
within nine minutes, of which each has a share, and what the ones before it left. With `--part` the
tests or the benchmarks have all the time, and what a run before has built is built no more. `dir`
gets gpu_check.log, summary.json and benchmarks.tar.gz; the benchmarks' results also go to
benchmarks/results/<device>/. The exit code says whether all stages passed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 9 * 60 - 15
OWN_TESTS = [f"tests/test_cuda{part}.py" for part in ("", "_head", "_extras")]
PARTS = ("tests", "benchmarks")
PACKAGES = ("torch", "triton", "ninja", "setuptools", "numpy", "pytest", "pytest-xdist",
            "hypothesis", "expecttest", "matplotlib", "psutil", "liger-kernel", "quack-kernels",
            "cut-cross-entropy")  # fmt: skip


@dataclass
class Stage:
    """One stage: what it runs, for how long, and what came of it."""

    name: str
    what: str
    command: list[str]
    share: float  # of the time that is left, beside the shares of the stages after it
    part: str = ""  # of PARTS; none: of every run
    environment: dict[str, str] = field(default_factory=dict)
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

    def run_all(self, stages: list[Stage]) -> None:
        """Runs stages one after the other; each has its share of the time that is left."""
        for index, stage in enumerate(stages):
            rest = sum(later.share for later in stages[index:])
            self.run(stage, self.left() * stage.share / rest)

    def run(self, stage: Stage, limit: float) -> None:
        """Runs a stage for so many seconds; what it prints goes to the screen and to the log."""
        self.stages.append(stage)
        self.say(f"\n== {stage.name}: {stage.what} (at most {limit:.0f} s)")
        self.say(f"$ {' '.join(stage.command)}")
        begin = time.monotonic()
        process = subprocess.Popen(
            [
                "timeout",
                "--signal=INT",
                "--kill-after=5",
                f"{limit:.0f}",
                *(word.replace("{seconds}", f"{0.85 * limit:.0f}") for word in stage.command),
            ],
            cwd=ROOT,
            env=self.environment | stage.environment,
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
        lacking = [stage.name for stage in self.stages if stage.status == "not here"]
        but = f", but without {', '.join(lacking)}" if lacking else ""
        self.say(f"{'all passed' if passed else 'NOT all passed'}{but}; in {self.out}")
        return int(not passed)


def info() -> None:
    """Prints what this machine has, and what it lacks."""
    for name in PACKAGES:
        try:
            print(f"{name:18} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name:18} missing")
    import torch

    print(f"CUDA of torch      {torch.version.cuda}")
    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no CUDA device")
    device = torch.cuda.get_device_properties(0)
    print(f"device             {device.name}, compute capability {device.major}.{device.minor}, "
          f"{device.total_memory / 2**30:.0f} GiB")  # fmt: skip
    for program in ("nvcc", "compute-sanitizer", "nvidia-smi"):
        print(f"{program:18} {shutil.which(program) or 'missing'}")
    nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve()
    runtimes = sorted(nvcc.parents[1].glob("**/libcudart.so*"))  # what the library is linked with
    print(f"libcudart          {', '.join(map(str, runtimes)) or f'missing in {nvcc.parents[1]}'}")
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
    """A small run of each CUDA kernel: every route, layout and dtype once, for compute-sanitizer.

    Triton's keep masks of their own, and would take the sanitizer minutes to translate.
    """
    import torch

    import torchext

    ops = torch.ops.torchext
    for dtype in (torch.float32, torch.bfloat16):
        # In groups of lanes, blocks, clusters; in two passes.
        for classes in (10, 999, 5000, 50257, 131072, 262144, 300001):
            x = torch.randn(3, classes, device="cuda", dtype=dtype)
            target = torch.randint(classes, (3,), device="cuda")
            rest = (target, torch.rand(classes, device="cuda", dtype=dtype), 1, -100, 0.1)
            ops.cross_entropy_forward(x, *rest, True)
            loss, stats, _ = ops.cross_entropy_forward(x, *rest, False)
            ops.cross_entropy_backward(loss, x, *rest[:2], stats, *rest[2:])
            for reduction in ("mean", "none"):
                with torchext.use_backend("native"):
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


def stages(check: Check, python: str, this: str, folder: Path) -> list[Stage]:
    """Returns what comes after the build."""
    pytest = [python, "-m", "pytest", "-q", "--no-header", "--tb=short", "--maxfail=40", "-p",
              "no:cacheprovider"]  # fmt: skip
    workers = max(2, min(12, (os.cpu_count() or 2) - 2))

    def parallel(most: int) -> list[str]:
        here = importlib.util.find_spec("xdist") is not None
        return ["-n", str(min(most, workers))] if here else []

    result = [
        Stage(
            "tests: cuda",
            "what is CUDA's own: routes, streams, graphs, 2^31 elements, assertions",
            # Of 2^31 elements some: not twelve at a time.
            [*pytest, *parallel(6), "--durations=5", *OWN_TESTS],
            0.14,
            "tests",
        )
    ]
    # Triton compiles for each shape and measures configurations: few cases, the first of these.
    for backend, cases, share in (("native", 12, 0.13), ("triton", 4, 0.15), ("auto", 2, 0.05)):
        command = [*pytest, *parallel(12), "tests", "-k", f"cuda-{backend}", "--backend", backend,
                   "--sample", str(cases), *(f"--ignore={test}" for test in OWN_TESTS)]  # fmt: skip
        what = f"the suites of the ops on CUDA, backend {backend} (up to {cases} cases of a test)"
        stage = Stage(f"tests: {backend}", what, command, share, "tests")
        if backend == "triton":
            stage.environment["TORCHEXT_TRITON_AUTOTUNE"] = "0"
        result.append(stage)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        missing = Stage("compute-sanitizer", "", [], 0, "tests", status="not here",
                        last_line="compute-sanitizer is not on PATH")  # fmt: skip
        check.stages.append(missing)
    else:
        command = [sanitizer, "--error-exitcode=9", "--tool=memcheck", "--report-api-errors=no",
                   python, this, "--stage", "sanitized"]  # fmt: skip
        what = "a small run of every CUDA kernel, looked at access by access"
        # torch's cache would hand out parts of what the sanitizer takes for one allocation.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        result.append(Stage("compute-sanitizer", what, command, 0.13, "tests", alone))
    head = "linear_cross_entropy"
    for op, share in ((head, 0.16), ("cross_entropy", 0.16), ("linear_relu", 0.08)):
        command = [python, "-m", "benchmarks", "--device", "cuda", "--op", op,
                   "--passes", "1", "--seconds", "0.25", "--budget", "{seconds}",
                   "--output", str(folder)]  # fmt: skip
        what = "TFLOP/s against the bare GEMMs, eager, torch.compile"
        if op == "cross_entropy":
            what = "GB/s against a copy, eager, torch.compile and peers"
        if op == head:
            what += "; peak memory"
        else:
            command.append("--no-memory")
        result.append(Stage(f"benchmarks: {op}", what, command, share, "benchmarks"))
    # Calls so short that Python would be what is measured.
    command = [python, "-m", "benchmarks", "--device", "cuda", "--op", "cross_entropy",
               "linear_relu", "--shapes", "16384x1000", "16384x8192", "4096x784x64",
               "--dtype", "bfloat16", "float32", "--direction", "fwd", "fwd+bwd",
               "--provider", "eager", "torchext", "limit", "--graphs", "--passes", "1",
               "--seconds", "0.25", "--budget", "{seconds}", "--no-memory",
               "--output", str(folder / "graphs")]  # fmt: skip
    what = "short calls, as a CUDA graph replays them"
    result.append(Stage("benchmarks: graphs", what, command, 0.06, "benchmarks"))
    return result


def main() -> int:
    """Runs all stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-check", metavar="DIR")
    parser.add_argument("--part", choices=PARTS, help="the tests or the benchmarks alone")
    parser.add_argument("--stage", choices=("info", "sanitized"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is not None:
        {"info": info, "sanitized": sanitized}[options.stage]()
        return 0
    check = Check(options.out.resolve())
    python, this = sys.executable, str(Path(__file__).resolve())
    information = [python, this, "--stage", "info"]
    check.run(Stage("info", "what this machine has and lacks", information, 1), 120)
    if check.stages[0].status != "passed":
        return check.finish()
    check.environment["TORCH_CUDA_ARCH_LIST"] = architecture()
    build = [python, "setup.py", "build", "--build-base", str(check.build), "--build-lib",
             str(check.build / "lib")]  # fmt: skip
    check.run(Stage("build", f"both libraries, for {architecture()}", build, 1), 270)
    if check.stages[-1].status != "passed":
        return check.finish()
    folder = results_folder()
    parts = (options.part,) if options.part else PARTS
    check.run_all([s for s in stages(check, python, this, folder) if s.part in parts])
    benchmark_results(check, folder)
    return check.finish()


if __name__ == "__main__":
    raise SystemExit(main())

"""Compiles every CUDA kernel to machine code, without a GPU, and looks at what came out.

For each architecture of setup.py: registers and spills of each kernel, as ptxas reports them, and
in the machine code the 16-byte accesses and the cluster instructions that the design counts on.
Ends with an error where a source does not compile, a hot kernel spills, an instruction is not
there, or nvcc or cuobjdump is missing. The operators' host code is compiled too.

Usage: python scripts/compile_cuda.py [--arch sm_90a] [--only NAME] [--keep DIR]
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CUDA_HOME = Path("/usr/local/cuda")

# Kernels that stream logits or activations: these may not spill (double, which sums in registers of
# twice the size, is reported alone), and their wide forms must have 16-byte accesses.
HOT = re.compile(
    r"(cross_entropy_(group|block|pieces|stream|gradient|column|extras)|relu_mask|add_product|"
    r"partial_column_sums)_kernel<(?!double)"
)
WIDE = re.compile(r"_kernel<\w+, true")
CLUSTER = re.compile(r"cross_entropy_(block|pieces)_kernel")
WRITES = re.compile(r"(?!cross_entropy_stream|partial_column_sums)")  # these write little
INSTRUCTIONS = {
    "LDG.E.128": re.compile(r"\bLDG\.E\.(?:\w+\.)*128\b"),
    "STG.E.128": re.compile(r"\bSTG\.E\.(?:\w+\.)*128\b"),
    "UCGABAR_ARV": re.compile(r"\bUCGABAR_ARV\b"),
    "UCGABAR_WAIT": re.compile(r"\bUCGABAR_WAIT\b"),
    # Another block's shared memory has a generic address; on sm_90a nothing else here has one.
    "LD.E": re.compile(r"\bLD\.E\b"),
}
CLUSTER_INSTRUCTIONS = ("UCGABAR_ARV", "UCGABAR_WAIT", "LD.E")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass
class Kernel:
    """One kernel on one architecture."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    instructions: Counter[str] = field(default_factory=Counter)


def fail(message: str) -> None:
    """Ends the script with one line that says what is wrong."""
    sys.exit(f"compile_cuda: {message}")


def tool(name: str) -> str:
    """Returns the path of one of CUDA's tools, or ends the script."""
    places = [shutil.which(name), CUDA_HOME / "bin" / name]
    triton = find_spec("triton")  # its package carries cuobjdump
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin" / name)
    for place in places:
        if place is not None and Path(place).exists():
            return str(place)
    fail(f"{name} is missing: neither on PATH, nor in {CUDA_HOME}/bin, nor in triton's package")
    raise AssertionError


def setup_constants() -> dict[str, Any]:
    """Returns the lists of flags and targets that setup.py builds with."""
    found: dict[str, Any] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("DEFINES", "CUDA_TARGETS", "NVCC_FLAGS", "CXX_FLAGS", "MATH"):
                code = compile(ast.Expression(node.value), "setup.py", "eval")
                found[name] = eval(code, {}, found)
    return found


def run(command: list[str]) -> str:
    """Runs a command; returns all that it printed, or ends the script with it."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def demangled(names: list[str]) -> dict[str, str]:
    """Returns `kernel<scalar_t, ...>` for each mangled name."""
    text = run(["c++filt", *names]).splitlines()
    short = [re.sub(r"^.*::(\w+_kernel(?:<[^>]*>)?)\(.*$", r"\1", line) for line in text]
    return dict(zip(names, short, strict=True))


def compile_source(source: Path, targets: list[str], flags: list[str], to: Path) -> list[Kernel]:
    """Compiles one source for all targets; returns its kernels, with what they are made of."""
    codes = [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in targets]
    report = run(
        [tool("nvcc"), *flags, *codes, "-Xptxas=-v", "-Icsrc", "-c", str(source), "-o", str(to)]
    )  # fmt: skip
    matches = list(REPORT.finditer(report))
    names = demangled([match["name"] for match in matches])
    kernels = {
        (match["name"], match["arch"]): Kernel(
            names[match["name"]],
            match["arch"],
            int(match["registers"]),
            int(match["stack"]),
            int(match["stores"]) + int(match["loads"]),
        )
        for match in matches
    }
    for arch in (code for code in targets if code.startswith("sm_")):
        for part in run([tool("cuobjdump"), "-sass", "-arch", arch, str(to)]).split("Function : "):
            name, _, code = part.partition("\n")
            kernel = kernels.get((name.strip(), arch))
            if kernel is not None:
                for word, pattern in INSTRUCTIONS.items():
                    kernel.instructions[word] = len(pattern.findall(code))
    return list(kernels.values())


def faults_of(kernel: Kernel) -> list[str]:
    """Returns what is wrong with a kernel."""
    if not HOT.match(kernel.name):
        return []
    found = [f"spills {kernel.spills} bytes"] if kernel.spills else []
    wanted: list[str] = []
    if WIDE.search(kernel.name):
        wanted += ["LDG.E.128"] + (["STG.E.128"] if WRITES.match(kernel.name) else [])
    if CLUSTER.match(kernel.name) and kernel.arch != "sm_80":
        wanted += CLUSTER_INSTRUCTIONS
    return found + [f"has no {word}" for word in wanted if kernel.instructions[word] == 0]


def compile_host(source: Path, flags: list[str], defines: list[str]) -> None:
    """Compiles an operator's host code against the headers of the torch that is here."""
    origin = find_spec("torch")
    if origin is None or origin.origin is None:
        fail("torch is missing")
        return
    torch_headers = Path(origin.origin).parent / "include"
    nvcc = Path(tool("nvcc")).resolve()
    cuda = next((p for p in (CUDA_HOME, nvcc.parents[1]) if (p / "include").exists()), CUDA_HOME)
    run(
        ["g++", *flags, *defines, "-DUSE_CUDA", "-DPy_LIMITED_API=0x030a0000", "-Icsrc",
         "-Werror", "-isystem", str(torch_headers),
         "-isystem", str(torch_headers / "torch/csrc/api/include"),
         "-isystem", str(cuda / "include"), "-isystem", sysconfig.get_path("include"),
         "-fsyntax-only", str(source)]
    )  # fmt: skip


def table(kernels: list[Kernel], archs: list[str]) -> None:
    """Prints registers and spills of each kernel, an architecture a column."""
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, {})[kernel.arch] = kernel
    width = max(map(len, rows))
    print(f"\n{'registers (+ bytes spilt)':{width}}", *(f"{arch:>10}" for arch in archs))
    for name, of_arch in sorted(rows.items()):
        cells = []
        for arch in archs:
            kernel = of_arch[arch]
            spilt = f"+{kernel.spills}" if kernel.spills else ""
            cells.append(f"{kernel.registers}{spilt}")
        print(f"{name:{width}}", *(f"{cell:>10}" for cell in cells))
    print(f"\n{'instructions, all kernels':{width}}", *(f"{arch:>10}" for arch in archs))
    for word in INSTRUCTIONS:
        sums = [sum(k.instructions[word] for k in kernels if k.arch == arch) for arch in archs]
        print(f"{word:{width}}", *(f"{count:>10}" for count in sums))


def main() -> None:
    """Compiles, prints a table, and ends with an error where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", help="of setup.py's (default: all)")
    parser.add_argument("--only", default="", help="sources whose name has this in it")
    parser.add_argument("--keep", type=Path, help="where the object files stay")
    options = parser.parse_args()
    begin = time.monotonic()
    constants = setup_constants()
    targets = options.arch or constants["CUDA_TARGETS"]
    flags = ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__",
             "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__",
             "--expt-relaxed-constexpr", "-Xcompiler=-Wall,-Wextra,-Werror",
             "-Werror=all-warnings"]  # fmt: skip
    flags += constants["NVCC_FLAGS"]
    everything = Counter(p.stem for p in (ROOT / "csrc/cuda").glob("*.c*") if p.suffix != ".cuh")
    if twice := [stem for stem, count in everything.items() if count > 1]:
        fail(f"setup.py's builds would give several sources one object file: {', '.join(twice)}")
    sources = sorted(p for p in (ROOT / "csrc/cuda").glob("*.cu") if options.only in p.name)
    if not sources:
        fail(f"no source has {options.only!r} in its name")
    print(f"{tool('nvcc')}, {tool('cuobjdump')}: {', '.join(targets)}", flush=True)
    host_flags = [f for f in constants["CXX_FLAGS"] if f != "-O3"]
    kernels: list[Kernel] = []
    # A source a core: nvcc's own threads, of one source's three targets, would leave half idle.
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        work: dict[Future[Any], Path] = {}
        for source in sources:
            to = folder / f"{source.stem}.o"
            work[pool.submit(compile_source, source, targets, flags, to)] = source
        for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
            work[pool.submit(compile_host, source, host_flags, constants["DEFINES"])] = source
        try:
            for done in as_completed(work):
                found = done.result()
                what = "compiles" if found is None else f"{len(found)} kernels"
                seconds = time.monotonic() - begin
                print(f"{work[done].relative_to(ROOT)}: {what} ({seconds:.0f} s)", flush=True)
                kernels += found or []
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure none begins
    archs = [code for code in targets if code.startswith("sm_")]
    table(kernels, archs)
    faults = [f"{k.name} on {k.arch} {fault}" for k in kernels for fault in faults_of(k)]
    if faults:
        fail("; ".join(faults))
    spilt = sum(kernel.spills > 0 for kernel in kernels)
    print(f"all hot kernels as they should be; {spilt} of {len(kernels)} kernels spill")


if __name__ == "__main__":
    main()

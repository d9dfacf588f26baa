"""Compiles every Triton kernel ahead of time, without a GPU, for the GPUs that it is meant for.

The launchers run on tensors without memory, at the sizes that the benchmarks measure, and each of
their launches is compiled instead: what is proven is what a GPU would be given, with the block
sizes, the specialisations and all configurations of the autotuner. Prints registers, spills and
shared memory of each; ends with an error where a kernel of a hot path spills, where a kernel has no
case, or where Triton is missing.

Usage: python scripts/compile_triton.py [--only WORDS] [--capability 80|90|100] [--also FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

if importlib.util.find_spec("triton") is None:
    sys.exit("compile_triton: triton is not installed (pip install 'torchext[test]')")
os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no code

import triton
from torchext.triton_kernels import (
    common,
    cross_entropy,
    cross_entropy_extras,
    linear_cross_entropy,
    linear_relu,
    reductions,
)
from triton.backends.compiler import GPUTarget

# Compute capability, as `sm_` names it, and the bytes of shared memory that a block may have.
ARCHITECTURES = {80: ("sm_80", 166912), 90: ("sm_90a", 232448), 100: ("sm_100a", 232448)}
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Case(NamedTuple):
    """One call of a launcher. A hot one, which a benchmark has a bar for, may not spill."""

    name: str
    call: Callable[[], Any]
    hot: bool = True


class Target:
    """Stands for the driver of a GPU that is not here, as far as compiling asks it."""

    def __init__(self, capability: int) -> None:
        """Stands for a GPU of that compute capability."""
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """Returns what to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Returns a number of its own: compiled kernels are kept by device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Returns no stream: nothing is launched."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Returns where there is no memory."""
        return torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cross_entropy_cases() -> Iterator[Case]:
    """Every kernel of cross_entropy: plain at the sizes of the benchmarks, then the options."""

    def calls(
        name: str, x: torch.Tensor, target: torch.Tensor, weight: Any, smoothing: float, hot: bool
    ) -> Iterator[Case]:
        options = (1, -100, smoothing)
        classes = x.shape[1]
        acc = F64 if x.dtype is F64 else F32
        stats = empty(2, x.numel() // classes, dtype=acc)
        for gradient in (False, True):
            yield Case(
                f"{name} forward{'+gradient' * gradient}",
                lambda gradient=gradient: cross_entropy.cross_entropy_forward(
                    x, target, weight, *options, gradient
                ),
                hot,
            )
        for reduction in (0, 1):
            shape = () if reduction else (stats.shape[1],)
            upstream = empty(*shape, dtype=x.dtype)
            yield Case(
                f"{name} backward of {'mean' if reduction else 'none'}",
                lambda reduction=reduction, upstream=upstream: cross_entropy.cross_entropy_backward(
                    upstream, x, target, weight, stats, reduction, *options[1:]
                ),
                hot,
            )

    for dtype in (BF16, F32):
        for rows, classes in ((100, 10), (16384, 1024), (8192, 16384), (8192, 262144)):
            x = empty(rows, classes, dtype=dtype)
            name = f"cross_entropy {rows}x{classes} {dtype}"
            yield from calls(name, x, empty(rows), None, 0.0, True)
        x = empty(8, 19, 512, 512, dtype=dtype)
        yield from calls(f"images {dtype}", x, empty(8, 512, 512), None, 0.0, True)
    for dtype, rows, classes in (
        (F16, 512, 1000), (F32, 512, 1000), (F32, 64, 50257), (F64, 512, 1000), (F64, 64, 50257)
    ):  # fmt: skip
        x, weight = empty(rows, classes, dtype=dtype), empty(classes, dtype=dtype)
        name = f"cross_entropy {rows}x{classes} {dtype}"
        yield from calls(f"{name} smoothed", x, empty(rows), weight, 0.1, False)
        if dtype is not F16:
            yield from calls(f"{name} probabilities", x, x.clone(), None, 0.1, False)
    x = empty(8192, 32768, dtype=BF16)
    yield Case("scale", lambda: reductions.scale_(x, empty(dtype=BF16)))


def extras_cases() -> Iterator[Case]:
    """The extras' kernel: at once, forward alone, and from statistics."""

    def call(x: torch.Tensor, target: torch.Tensor, weight: Any, part: str, softcap: float) -> None:
        rows, acc = x.shape[0], F64 if x.dtype is F64 else F32
        of_rows = empty(rows, dtype=acc)
        forward, gradient = part != "gradient", part != "loss"
        cross_entropy_extras.cross_entropy_extras_rows(
            x, target, weight, -100, 0.0 if weight is None else 0.1, 1e-4, softcap, 0.5,
            of_rows if gradient else None, of_rows if part == "gradient" else None,
            x if gradient else None, of_rows if forward else None, empty(2, rows, dtype=acc),
            empty(rows) if part == "loss" else None,
        )  # fmt: skip

    for dtype in (BF16, F32, F64):  # float16 is bfloat16's code but for the conversions
        hot = dtype is not F64
        for rows, classes in ((16384, 1024), (8192, 128256)) if hot else ((1, 1), (64, 50257)):
            x, weight = empty(rows, classes, dtype=dtype), empty(classes, dtype=dtype)
            for part in ("loss and gradient", "loss", "gradient"):
                name = f"extras {rows}x{classes} {dtype} {part}"
                yield Case(name, partial(call, x, empty(rows), None, part, 30.0), hot)
            yield Case(
                f"extras {rows}x{classes} {dtype} without softcap",
                partial(call, x, empty(rows), None, "loss and gradient", 0.0),
                hot,
            )
            name = f"extras {rows}x{classes} {dtype} smoothed"
            yield Case(
                name, partial(call, x, empty(rows), weight, "loss and gradient", 30.0), False
            )
            name = f"extras {rows}x{classes} {dtype} probabilities"
            yield Case(name, partial(call, x, x.clone(), None, "gradient", 30.0), False)


def linear_relu_cases() -> Iterator[Case]:
    """Forward and both backward products, in all configurations, and the gradient of the bias."""
    for dtype in (BF16, F32, F64):  # float16 is bfloat16's code but for the type of the product
        for m, k, n in ((8192, 4096, 4096), (1797, 784, 10)):
            x, weight, bias = (empty(*s, dtype=dtype) for s in ((m, k), (n, k), (n,)))
            y = empty(m, n, dtype=dtype)
            name = f"linear_relu {m}x{k}x{n} {dtype}"
            hot = dtype is not F64 and m == 8192  # ragged sizes have no vector loads to spare
            yield Case(
                f"{name} forward",
                lambda x=x, weight=weight, bias=bias: linear_relu.linear_relu_forward(
                    x, weight, bias
                ),
                hot,
            )
            for part, wanted in (
                ("grad_input", (True, False, False)),
                ("grad_weight", (False, True, False)),
                ("grad_bias", (False, False, True)),
            ):
                yield Case(
                    f"{name} {part}",
                    lambda x=x, y=y, weight=weight, wanted=wanted: linear_relu.linear_relu_backward(
                        y, y, x, weight, *wanted
                    ),
                    hot,
                )


def linear_cross_entropy_cases() -> Iterator[Case]:
    """Both schedules; the chunks' kernels are cross_entropy's, in the place of the logits."""

    def call(schedule: str, backward: bool, tensors: tuple[Any, ...], options: Any) -> None:
        x, target = tensors[0], tensors[2]
        with linear_cross_entropy.use_schedule(schedule):
            if not backward:
                linear_cross_entropy.linear_cross_entropy_forward(*tensors, *options, *[True] * 3)
                return
            stats = empty(2, target.shape[0], dtype=F64 if x.dtype is F64 else F32)
            upstream = empty(*target.shape, dtype=stats.dtype)
            linear_cross_entropy.linear_cross_entropy_backward(
                upstream, *tensors, stats, 0, *options[1:], *[True] * 3
            )

    def case(
        dtype: torch.dtype, shape: tuple[int, int, int], schedule: str, backward: bool, plain: bool
    ) -> Case:
        rows, features, classes = shape
        x, w = (empty(n, features, dtype=dtype) for n in (rows, classes))
        of_classes = None if plain else empty(classes, dtype=dtype)
        tensors = (x, w, empty(rows), of_classes, of_classes)
        options = (1, -100, 0.0 if plain else 0.1)
        return Case(
            f"linear_cross_entropy {rows}x{features}x{classes} {dtype} {schedule} "
            f"{'' if plain else 'smoothed '}{'backward' if backward else 'forward+gradients'}",
            partial(call, schedule, backward, tensors, options),
            # Wide float32 products are nobody's hot path: no matrix units, and many times the work.
            hot=plain and rows == 8192 and (dtype is BF16 or features < 4096),
        )

    wide, ragged = (8192, 4096, 128256), (300, 70, 1003)
    for dtype in (BF16, F32):  # float16 is bfloat16's code but for the type of the product
        narrow = (8192, linear_cross_entropy.NARROW[dtype.itemsize], 65536)
        for backward in (False, True):
            yield case(dtype, narrow, "tiles", backward, True)
        yield case(dtype, wide, "tiles", True, True)
        yield case(dtype, wide, "chunks", False, True)
        yield case(dtype, ragged, "tiles", False, False)
    yield case(F64, ragged, "tiles", False, False)


class Usage(NamedTuple):
    """What ptxas gave a kernel: registers of a thread, bytes and instructions of spills."""

    registers: int
    stack: int
    spills: int


def usage(cubin: bytes) -> Usage:
    """Reads a cubin with the cuobjdump and nvdisasm that come with Triton."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def read(*command: str | Path) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = read(tools / "cuobjdump", "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
        if found is None:
            sys.exit(f"compile_triton: cuobjdump says nothing of registers: {resources!r}")
        registers, stack = map(int, found.groups())
        # nvdisasm takes half a second; what is spilt is on the stack.
        code = read(tools / "nvdisasm", "-c", file.name) if stack else ""
    return Usage(registers, stack, len(re.findall(r"\b(?:STL|LDL)\b", code)))


def kernels() -> set[str]:
    """The names of all kernels in triton_kernels/."""
    folder = Path(__file__).parents[1] / "triton_kernels"
    return {
        name
        for file in folder.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }


def compile_cases(capability: int, only: str) -> list[str]:
    """Compiles the cases for one architecture and prints the table; returns what is wrong."""
    arch, shared_limit = ARCHITECTURES[capability]
    seen: set[str] = set()
    compiled: set[str] = set()
    wrong: list[str] = []
    current: list[Any] = []

    def compile_instead(
        kernel: Any, grid: Any, device: torch.device, *args: Any, **options: Any
    ) -> None:
        built = kernel.warmup(*args, grid=(1,), **options)
        current.extend(built if isinstance(built, list) else [built])

    common.launch = compile_instead
    triton.runtime.driver.set_active(Target(capability))
    cases = (
        cross_entropy_cases(),
        extras_cases(),
        linear_relu_cases(),
        linear_cross_entropy_cases(),
    )
    for case in chain.from_iterable(cases):
        if only not in case.name:
            continue
        current.clear()
        case.call()
        for built in current:
            compiled.add(built.name)
            if built.hash in seen:
                continue
            seen.add(built.hash)
            used = usage(built.asm["cubin"])
            shared, warps = built.metadata.shared, built.metadata.num_warps
            print(
                f"{built.name:<40}{arch:<9}{used.registers:>9}{used.spills:>8}{shared:>9}"
                f"{warps:>7}  {case.name}",
                flush=True,
            )
            if case.hot and (used.spills or used.stack):
                wrong.append(f"{built.name} spills on {arch}: {case.name}")
            if shared > shared_limit:
                wrong.append(f"{built.name} needs {shared} bytes shared on {arch}: {case.name}")
    if not only:
        wrong += [f"{name} has no case" for name in sorted(kernels() - compiled)]
    print(
        f"{len(seen)} compilations of {len(compiled)} kernels for {arch} by Triton "
        f"{triton.__version__}"
    )
    return wrong


def main() -> None:
    """Compiles for each architecture in a process of its own, side by side, or for one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="compile the cases that have these words")
    parser.add_argument("--capability", type=int, choices=ARCHITECTURES, help="one architecture")
    parser.add_argument("--also", help="a folder with another Triton, which compiles for sm_90a")
    options = parser.parse_args()
    if options.capability is not None:
        if wrong := compile_cases(options.capability, options.only):
            sys.exit("compile_triton: " + "\n".join(wrong))
        return

    def compile_for(capability: int, folder: str | None) -> int:
        command = [sys.executable, __file__, f"--capability={capability}", f"--only={options.only}"]
        environment = os.environ | ({} if folder is None else {"PYTHONPATH": folder})
        done = subprocess.run(command, text=True, capture_output=True, env=environment)
        print(done.stdout + done.stderr, end="", flush=True)
        return done.returncode

    jobs = [(capability, None) for capability in ARCHITECTURES]
    jobs += [] if options.also is None else [(90, options.also)]
    print(f"{'kernel':<40}{'arch':<9}{'registers':>9}{'spills':>8}{'shared':>9}  warps  case")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(list(pool.map(compile_for, *zip(*jobs, strict=True)))):
            sys.exit("compile_triton: failed, see above")


if __name__ == "__main__":
    main()

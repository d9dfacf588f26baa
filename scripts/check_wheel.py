"""Checks a built wheel: its tags, what it ships, and that it needs only torch's stable ABI.

Usage: python scripts/check_wheel.py dist/torchext-*.whl
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SHIPPED = (
    "torchext/_C.abi3.so",
    "torchext/py.typed",
    "torchext/include/torchext/torchext.h",
    "torchext/include/torchext/optim.h",
    "torchext/include/torchext/ops/cross_entropy.h",
    "torchext/share/cmake/TorchExt/TorchExtConfig.cmake",
    "torchext/data/digits/train-images-idx3-ubyte",
    "torchext/ops/linear_relu.py",
    "torchext/nn/cross_entropy.py",
    "torchext/triton_kernels/linear_relu.py",
)
# What a library of the stable ABI may need of torch: C functions alone. A mangled C++ symbol of
# torch's (at::, c10::, torch::) would tie the wheel to one torch.
CXX_OF_TORCH = re.compile(r"_ZN?K?(2at|3c10|5torch)")


def fail(message: str) -> None:
    """Ends the check with one line that says what is wrong."""
    sys.exit(f"check_wheel: {message}")


def undefined_symbols(library: Path) -> list[str]:
    """Returns the names that a shared library leaves to others."""
    output = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[-1] for line in output.splitlines() if line.strip()]


def main(path: str) -> None:
    """Checks the wheel at `path`."""
    name = Path(path).name
    if "-cp310-abi3-" not in name:
        fail(f"expected a cp310-abi3 wheel, but got {name}")
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        names = set(wheel.namelist())
        for shipped in SHIPPED:
            if shipped not in names:
                fail(f"{name} lacks {shipped}")
        libraries = [name for name in names if name.endswith(".so")]
        symbols: list[str] = []
        for library in libraries:
            wheel.extract(library, folder)
            symbols += undefined_symbols(Path(folder) / library)
    unstable = [symbol for symbol in symbols if CXX_OF_TORCH.match(symbol)]
    if unstable:
        fail(f"{name} needs C++ symbols of torch: {unstable[:5]}")
    python = [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]
    if python:
        fail(f"{name} needs symbols of Python: {python[:5]}")
    print(f"{name}: {len(names)} files, {len(symbols)} symbols from outside, all stable")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail("usage: python scripts/check_wheel.py WHEEL")
    main(sys.argv[1])

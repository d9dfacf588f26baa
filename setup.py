"""Build the native libraries: ``torchext._C``, and with nvcc ``torchext._C_cuda``."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent.resolve()


def toolkit_of(nvcc: str) -> str:
    """Says where the toolkit of a compiler lies, which may be a script far from it."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1])


# Before torch looks, which takes the folder above nvcc.
named = os.environ.keys() & {"CUDA_HOME", "CUDA_PATH"}
if torch.version.cuda and not named and (nvcc := shutil.which("nvcc")):
    os.environ["CUDA_HOME"] = toolkit_of(nvcc)
from torch.utils import cpp_extension  # noqa: E402

# One wheel for every Python from 3.10 and every torch from 2.11 (the stable ABI of both).
DEFINES = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
]
# No -ffast-math: the kernels' vectors are explicit (csrc/cpu/simd.h), and the order of their sums
# is part of the result. No -march: the instruction set is chosen at run time.
MATH = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS = [
    "-O3",
    "-g0",  # over Python's own -g: 3.8 MB of library, 30 with it
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-maybe-uninitialized",  # of the products' unrolled tiles, falsely
    *DEFINES,
    *MATH,
]
# Machine code for Ampere, Hopper and the two Blackwells; the PTX is for what lies between and comes
# after. TORCH_CUDA_ARCH_LIST takes their place. scripts/compile_cuda.py reads these.
CUDA_TARGETS = ["sm_80", "sm_90a", "sm_100a", "sm_120", "compute_90"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", *DEFINES]


def gencodes(targets: list[str]) -> list[str]:
    return [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in targets]


def why_no_cuda() -> str:
    """Says why torchext._C_cuda is not built; nothing where it is."""
    if os.environ.get("TORCHEXT_CUDA", "1") == "0":
        return "TORCHEXT_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = Path(cpp_extension.CUDA_HOME or "/", "bin/nvcc")
    if not nvcc.exists() and shutil.which("nvcc") is None:
        return "nvcc is missing; install the CUDA toolkit, or set CUDA_HOME"
    return ""


def sources(*patterns: str) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)
    )


class BuildInOneFolder(cpp_extension.BuildExtension):
    """An editable install would compile in a temporary folder, and a wheel everything again."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_temp = "build/temp"


extensions = [
    cpp_extension.CppExtension(
        "torchext._C",
        sources("csrc/ops/*.cpp", "csrc/cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=sources("csrc/**/*.h"),
        py_limited_api=True,
    )
]
if reason := why_no_cuda():
    print(f"torchext: without CUDA kernels (torchext._C_cuda): {reason}")
else:
    own = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else gencodes(CUDA_TARGETS)
    extensions.append(
        cpp_extension.CUDAExtension(
            "torchext._C_cuda",
            sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={
                "cxx": [*CXX_FLAGS, "-DUSE_CUDA"],
                "nvcc": [*NVCC_FLAGS, "--threads=2", *own],
            },
            depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
            py_limited_api=True,
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildInOneFolder},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

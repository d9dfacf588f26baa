"""Build the native library ``torchext._C``."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent.resolve()

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
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    *DEFINES,
    *MATH,
]


def sources(*patterns: str) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)
    )


setup(
    ext_modules=[
        CppExtension(
            "torchext._C",
            sources("csrc/ops/*.cpp", "csrc/cpu/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": CXX_FLAGS},
            depends=sources("csrc/**/*.h"),
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

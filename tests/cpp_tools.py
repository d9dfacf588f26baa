"""What the tests of the C++ side share: the tools, and running programs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchext

ROOT = Path(__file__).parent.parent
# The programs of this environment first: cmake and ninja come from PyPI.
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
PREFIXES = f"{torchext.cmake_prefix_path()};{torch.utils.cmake_prefix_path}"


def run(*command, code=0, cwd=None, env=None):
    """Runs a program; returns what it printed on stdout, or on stderr if it is to fail."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stderr if code else done.stdout


def need_tools():
    missing = [name for name in ("g++", "cmake", "ninja") if not shutil.which(name, path=PATH)]
    if missing and os.environ.get("CI"):
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")

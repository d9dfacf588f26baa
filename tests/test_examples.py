"""The examples run as their docstrings say, and their heads agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GPT = Path(__file__).parent.parent / "examples" / "gpt" / "train.py"
SIZES = {"vocabulary": 600, "context": 16, "width": 32, "layers": 1, "batch": 2, "device": "cpu"}


def test_gpt_heads_agree() -> None:
    options = [f"--{name}={value}" for name, value in SIZES.items()]
    command = [sys.executable, str(GPT), *options, "--steps=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, names, *rows = done.stdout.splitlines()
    assert names.split()[0] == "head"
    losses = {row[:16].strip(): float(row[16:].split()[0]) for row in rows}
    assert {"stock", "torchext"} <= losses.keys()
    for loss in losses.values():
        assert loss == pytest.approx(losses["stock"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--vocabulary 10", "--vocabulary of 512 or more"),
        ("--batch 0", "--batch of 1 or more"),
        ("--device tpu", "invalid choice: 'tpu'"),
    ],
)
def test_gpt_refuses_what_it_cannot_do(words: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, str(GPT), *words.split()], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert says in done.stderr

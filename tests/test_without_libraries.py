"""The package where its native library is missing or broken: stock's answers, and the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Before torchext is imported: importlib finds no torchext._C, or one that is no library.
HIDE = """
import importlib.machinery, importlib.util, sys
find_spec = importlib.util.find_spec

def found(name, package=None):
    if name != "torchext._C":
        return find_spec(name, package)
    broken = sys.argv[1]
    return importlib.machinery.ModuleSpec(name, None, origin=broken) if broken else None

importlib.util.find_spec = found
"""

CALLS = """
import torch
import torch.nn.functional as F
import torchext

assert not torchext.backends()["native"].available
x, w, b = (torch.randn(*s, requires_grad=True) for s in ((5, 8), (8, 8), (8,)))
target, again = torch.randint(0, 8, (5,)), torch.randn(5)

def same(ours, stock):
    results = []
    for call in (ours, stock):
        output = call()
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(output, (x, w, b), upstream, allow_unused=True)
        results.append((output, *grads))
    for left, right in zip(*results, strict=True):
        assert left is right is None or torch.equal(left, right)

same(lambda: torchext.linear_relu(x, w, b), lambda: F.relu(F.linear(x, w, b)))
for options in ({}, {"reduction": "none", "label_smoothing": 0.1}, {"reduction": "sum"}):
    def stock():
        return F.cross_entropy(x, target, **options)

    def in_place():
        return torchext.cross_entropy(x, target, inplace_backward=True, **options)

    same(lambda: torchext.cross_entropy(x, target, **options), stock)
    same(in_place, stock)
    same(
        lambda: torchext.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        lambda: F.cross_entropy(F.linear(x, w, b), target, **options),
    )
scaled = 2.0 * torch.tanh(F.linear(x, w, b) / 2.0)
lse = scaled.logsumexp(1)
expected = F.cross_entropy(scaled, target) + (0.1 * lse**2).mean()
loss, of_rows = torchext.linear_cross_entropy(
    x, w, target, linear_bias=b, z_loss=0.1, softcap=2.0, return_lse=True
)
torch.testing.assert_close((loss, of_rows), (expected, lse))
torch.testing.assert_close(*(torch.autograd.grad(value, (x, w, b)) for value in (loss, expected)))

ours, stock = (torch.nn.Parameter(x.detach().clone()) for _ in range(2))
for parameter, optimiser in ((ours, torchext.optim.SGD), (stock, torch.optim.SGD)):
    steps = optimiser([parameter], lr=0.1, momentum=0.9)
    for _ in range(3):
        steps.zero_grad()
        (parameter * again[:, None]).sum().backward()
        steps.step()
assert torch.equal(ours, stock)

network = torch.nn.Sequential(torchext.nn.LinearReLU(8, 8), torchext.nn.LinearReLU(8, 8))
compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x), network(x))
with torchext.use_backend("auto"):
    torchext.cross_entropy(x, target)
try:
    with torchext.use_backend("native"):
        pass
except RuntimeError as error:
    print(error)
"""

COMMAND = """
from torchext.cli import main
sys.argv = ["torchext", *sys.argv[2:]]
sys.exit(main())
"""


def python(program: str, *arguments: str) -> str:
    """Runs a program; returns what it printed, and then what it complained of."""
    command = [sys.executable, "-c", HIDE + program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(params=["missing", "broken"])
def library(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Where it is found, and what is said of it."""
    if request.param == "missing":
        return "", "torchext._C is not in this installation"
    file = tmp_path / "_C.abi3.so"
    file.write_text("no library")
    return str(file), f"{file} could not be loaded: "


def test_every_call_is_stocks(library: tuple[str, str]) -> None:
    origin, reason = library
    assert f"backend 'native' is not available: {reason}" in python(CALLS, origin)


def test_info_says_why(library: tuple[str, str]) -> None:
    origin, reason = library
    assert f"native  not available: {reason}" in python(COMMAND, origin, "info")


def test_training_works(tmp_path: Path) -> None:
    printed = python(COMMAND, "", "train", "--epochs", "1", "--out", str(tmp_path))
    assert (tmp_path / "metrics.json").exists()
    reason = "torchext._C is not in this installation"
    assert f"no native kernels, so PyTorch's serve the fused layers: {reason}" in printed

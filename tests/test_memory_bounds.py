"""No kernel reads or writes outside its tensors: each ends, or begins, at a forbidden page.

A wrong access is a crash, so the calls run in a process of their own: this file is its program.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import torchext

PAGE = mmap.PAGESIZE
_areas: list[mmap.mmap] = []  # kept for as long as the process runs


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A contiguous copy with a forbidden page right behind its last (or before its first) byte."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    _areas.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (start, start + (pages + 1) * PAGE):
        if protect(ctypes.c_void_p(page), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.copy_(tensor.flatten()).view(tensor.shape)


def relaid(tensor: Tensor, layout: str, at_end: bool) -> Tensor:
    """(rows, classes) guarded as rows, as columns, or as (1, classes, positions)."""
    if layout == "rows":
        return guarded(tensor, at_end)
    columns = guarded(tensor.t(), at_end)
    return columns.t() if layout == "columns" else columns[None]


def check_cross_entropy(dtype: torch.dtype, at_end: bool) -> None:
    sizes = [(1, 1), (3, 5), (2, 16), (5, 33), (17, 7), (67, 3), (2, 2051)]
    options: list[dict[str, Any]] = [
        {"reduction": "mean"},
        {"reduction": "none"},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"reduction": "mean", "label_smoothing": 0.1, "inplace_backward": True},
    ]
    layouts = ("rows", "columns", "positions")
    for layout, (rows, classes), option, dense in itertools.product(
        layouts, sizes, options, (False, True)
    ):
        values = torch.randn(rows, classes)
        x = relaid(values.to(dtype), layout, at_end)
        if dense:
            target = relaid(values.softmax(1).to(dtype), layout, at_end)
        else:
            target = guarded(x.argmax(1), at_end)
        for weight in (None, guarded(torch.rand(classes).to(dtype), at_end)):
            torchext.cross_entropy(x, target, weight, **option)
            leaf = x.detach().requires_grad_()
            # Of a view the gradient may take the place, of a leaf it should not.
            loss = torchext.cross_entropy(leaf.view_as(leaf), target, weight, **option)
            upstream = guarded(torch.randn(max(loss.numel(), 1)).to(dtype), at_end)
            loss.backward(upstream.view(loss.shape))


def check_linear_relu(dtype: torch.dtype, at_end: bool) -> None:
    sizes = [(1, 1, 1), (3, 5, 7), (2, 16, 16), (5, 33, 9), (65, 3, 130), (4, 8, 1)]
    for (m, k, n), biased in itertools.product(sizes, (True, False)):
        shapes = ((m, k), (n, k), (n,), (m, n))
        *leaves, upstream = (guarded(torch.randn(s).to(dtype), at_end) for s in shapes)
        leaves = [leaf.requires_grad_() for leaf in leaves[: 3 if biased else 2]]
        output = torchext.linear_relu(*leaves)
        torch.autograd.grad(output, leaves, upstream)
        with torch.no_grad():
            torchext.linear_relu(*leaves)


def check_nothing(dtype: torch.dtype, at_end: bool) -> None:
    """A read of the forbidden page, to see that it is one."""
    tensor = guarded(torch.zeros(3, dtype=dtype), at_end)
    ctypes.string_at(tensor.data_ptr() - (0 if at_end else 1), 3 * tensor.element_size() + 1)


def run(op: str, seed: int) -> int:
    return subprocess.run([sys.executable, __file__, op, str(seed)]).returncode


@pytest.mark.parametrize("op", ["cross_entropy", "linear_relu"])
def test_no_access_outside_the_tensors(op: str, seed: int) -> None:
    assert run(op, seed) == 0


def test_an_access_outside_would_be_a_crash(seed: int) -> None:
    assert run("nothing", seed) < 0


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2]))
    with torchext.use_backend("native"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for at_end in (True, False):
                globals()[f"check_{sys.argv[1]}"](dtype, at_end)

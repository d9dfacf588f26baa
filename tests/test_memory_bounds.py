"""No kernel reads or writes outside its tensors: each ends, or begins, at a forbidden page.

A wrong access is a crash, so the calls run in a process of their own: this file is its program.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import torchext
from torchext.optim import SGD

PAGE = mmap.PAGESIZE
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST = 2**20  # multiplications of a drawn product


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A contiguous copy with a forbidden page right behind its last (or before its first) byte."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)  # lives as long as the tensor that takes its memory
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (start, start + (pages + 1) * PAGE):
        if protect(ctypes.c_void_p(page), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.copy_(tensor.flatten()).view(tensor.shape)


def relaid(tensor: Tensor, layout: str, at_end: bool) -> Tensor:
    """A matrix guarded as rows, rows with gaps between, columns, or as (1, columns, rows)."""
    if layout == "rows":
        return guarded(tensor, at_end)
    if layout == "gaps":  # none behind the last row
        rows, columns = tensor.shape
        stride = columns + random.choice((1, 3, 16))
        flat = guarded(torch.empty((rows - 1) * stride + columns, dtype=tensor.dtype), at_end)
        return flat.as_strided((rows, columns), (stride, 1)).copy_(tensor)
    columns = guarded(tensor.t(), at_end)
    return columns.t() if layout == "columns" else columns[None]


def drawn_size() -> int:
    """A few, about some vectors, or many: where the kernels take turns."""
    around = 16 * random.randint(1, 8) + random.randint(-2, 2)
    return random.choice((random.randint(1, 17), random.randint(1, 17), around, around, 1040))


def drawn_product(dtype: torch.dtype, at_end: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and perhaps a bias, laid out at random."""
    while (m := drawn_size()) * (k := drawn_size()) * (n := drawn_size()) > MOST:
        pass
    layouts = random.choices(("rows", "gaps", "columns"), (3, 1, 1), k=2)
    matrices = [
        relaid(torch.randn(shape).to(dtype), layout, at_end)
        for shape, layout in zip(((m, k), (n, k)), layouts, strict=True)
    ]
    bias = guarded(torch.randn(n).to(dtype), at_end) if random.random() < 0.6 else None
    print("input, weight:", *((x.shape, x.stride()) for x in matrices), flush=True)
    return matrices[0], matrices[1], bias


def some_require_grad(*tensors: Tensor | None) -> list[Tensor]:
    """Of the tensors those, drawn at random, that take a gradient: one at the least."""
    given = [tensor for tensor in tensors if tensor is not None]
    leaves = random.sample(given, random.randint(1, len(given)))
    return [leaf.requires_grad_() for leaf in leaves]


def check_linear_relu(dtype: torch.dtype, at_end: bool) -> None:
    for _ in range(60):
        product = drawn_product(dtype, at_end)
        torchext.linear_relu(*product)
        leaves = some_require_grad(*product)
        output = torchext.linear_relu(*product)
        upstream = guarded(torch.randn(output.shape).to(dtype), at_end)
        torch.autograd.grad(output, leaves, upstream)


def check_linear_cross_entropy(dtype: torch.dtype, at_end: bool) -> None:
    for _ in range(60):
        input, weight, bias = drawn_product(dtype, at_end)
        rows, classes = len(input), len(weight)
        options: dict[str, Any] = {
            "reduction": random.choice(("mean", "sum", "none")),
            "label_smoothing": random.choice((0.0, 0.1)),
            "z_loss": random.choice((0.0, 0.0, 1e-3)),
        }
        if random.random() < 0.3:
            target = guarded(torch.randn(rows, classes).softmax(1).to(dtype), at_end)
        else:
            target = guarded(torch.randint(classes, (rows,)), at_end)
        if random.random() < 0.3:
            options["weight"] = guarded(torch.rand(classes).to(dtype), at_end)
        print(options, target.dtype, flush=True)
        torchext.linear_cross_entropy(input, weight, target, linear_bias=bias, **options)
        leaves = some_require_grad(input, weight, bias)
        loss = torchext.linear_cross_entropy(input, weight, target, linear_bias=bias, **options)
        upstream = guarded(torch.randn(max(loss.numel(), 1)).to(dtype), at_end)
        torch.autograd.grad(loss, leaves, upstream.view(loss.shape))


def check_cross_entropy(dtype: torch.dtype, at_end: bool) -> None:
    sizes = [(1, 1), (3, 5), (2, 16), (5, 33), (17, 7), (67, 3), (2, 2051)]
    options: list[dict[str, Any]] = [
        {"reduction": "mean"},
        {"reduction": "none"},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"reduction": "mean", "label_smoothing": 0.1, "inplace_backward": True},
        {"reduction": "mean", "z_loss": 1e-3, "softcap": 10.0, "return_argmax": True},
    ]
    layouts = ("rows", "gaps", "columns", "positions")
    for layout, (rows, classes), option, dense in itertools.product(
        layouts, sizes, options, (False, True)
    ):
        values = torch.randn(rows, classes)
        x = relaid(values.to(dtype), layout, at_end)
        if dense:
            target = relaid(values.softmax(1).to(dtype), layout, at_end)
        else:
            target = guarded(x.argmax(1), at_end)
        print(layout, rows, classes, option, dense, flush=True)
        for weight in (None, guarded(torch.rand(classes).to(dtype), at_end)):
            torchext.cross_entropy(x, target, weight, **option)
            leaf = x.detach().requires_grad_()
            # Of a view the gradient may take the place, of a leaf it should not.
            loss = torchext.cross_entropy(leaf.view_as(leaf), target, weight, **option)
            if isinstance(loss, tuple):
                loss = loss[0]
            upstream = guarded(torch.randn(max(loss.numel(), 1)).to(dtype), at_end)
            loss.backward(upstream.view(loss.shape))


def check_sgd(dtype: torch.dtype, at_end: bool) -> None:
    for momentum, nesterov in ((0.0, False), (0.9, False), (0.9, True)):
        params = [guarded(torch.randn(drawn_size()).to(dtype), at_end) for _ in range(20)]
        optimizer = SGD(params, 0.1, momentum, weight_decay=0.01, nesterov=nesterov)
        for _ in range(3):
            for param in params:
                param.grad = guarded(torch.randn(param.shape).to(dtype), at_end)
            optimizer.step()
            for state in optimizer.state.values():
                if state["momentum_buffer"] is not None:
                    state["momentum_buffer"] = guarded(state["momentum_buffer"], at_end)


def check_nothing(dtype: torch.dtype, at_end: bool) -> None:
    """A read of the forbidden page, to see that it is one."""
    tensor = guarded(torch.zeros(3, dtype=dtype), at_end)
    ctypes.string_at(tensor.data_ptr() - (0 if at_end else 1), 3 * tensor.element_size() + 1)


def run(op: str, seed: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, op, str(seed)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy", "linear_relu", "sgd"])
def test_no_access_outside_the_tensors(op: str, seed: int) -> None:
    done = run(op, seed)
    assert done.returncode == 0, "the last call:\n" + "\n".join(done.stdout.splitlines()[-2:])


def test_an_access_outside_would_be_a_crash(seed: int) -> None:
    assert run("nothing", seed).returncode < 0


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2]))
    random.seed(int(sys.argv[2]))
    with torchext.use_backend("native"):
        for dtype, at_end in itertools.product(DTYPES, (True, False)):
            print(dtype, "behind" if at_end else "before")
            globals()[f"check_{sys.argv[1]}"](dtype, at_end)

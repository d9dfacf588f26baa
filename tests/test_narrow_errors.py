"""bfloat16 and float16 err no more than the stock ops do, in all, with no floor of rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrow_errors import Narrow
from test_pytorch_databases import samples, stock_linear_relu, truth_of

import torchext

pytestmark = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """Some calls are small: `auto` would give them to stock."""
    with torchext.use_backend("native"):
        yield


def test_cross_entropy_samples(dtype: torch.dtype) -> None:
    narrow = Narrow()
    for sample in samples("nn.functional.cross_entropy", "cpu", dtype):
        args = [x.detach() for x in sample.args]
        narrow.add(torchext.cross_entropy, F.cross_entropy, [sample.input, *args], sample.kwargs)
    assert narrow.ours <= narrow.eager


def test_cross_entropy_of_usual_sizes(dtype: torch.dtype) -> None:
    narrow = Narrow()
    options = itertools.product(("none", "mean", "sum"), (0.0, 0.1), (False, True))
    for reduction, label_smoothing, weighted in options:
        for shape in ((100, 10), (64, 1000), (33, 130), (4, 19, 8, 8)):
            logits = (3 * torch.randn(shape)).to(dtype).requires_grad_()
            target = torch.randint(shape[1], (shape[0], *shape[2:]))
            kwargs: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
            if weighted:
                kwargs["weight"] = torch.rand(shape[1]).to(dtype)
            narrow.add(torchext.cross_entropy, F.cross_entropy, [logits, target], kwargs)
    assert narrow.ours <= narrow.eager


def test_linear_relu(dtype: torch.dtype) -> None:
    """Each is rounded once, from sums in float32 of another order: 1 % is that order's luck."""
    narrow = Narrow()
    for rows, features, columns in ((5, 3, 4), (100, 64, 10), (33, 257, 65), (64, 784, 64)):
        for bias in (False, True):
            sizes = ((rows, features), (columns, features), (columns,))[: 2 + bias]
            arguments = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
            narrow.add(torchext.linear_relu, stock_linear_relu, arguments, {}, truth_of)
    assert narrow.ours <= 1.01 * narrow.eager

"""linear_relu to the bit: threads, batches. For products that our own kernel makes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import torchext
from torchext import _native

pytestmark = pytest.mark.skipif(
    _native.simd_level() in ("none", "baseline"), reason="without AVX2 products are the library's"
)

# rows, in_features, out_features: blocks of rows, of features and of both, each with a rest.
SHAPES = [(100, 784, 64), (7, 300, 33), (301, 513, 70), (130, 20, 4200), (150, 1030, 13)]
CASES = [(dtype, shape) for dtype in (torch.float32, torch.float64) for shape in SHAPES]
# The last ones are of several visits of out, and of several pieces.
MORE = [(70, 4100, 520), (1030, 600, 258), (1100, 2050, 40), (20, 2050, 4200)]
for wide in (torch.float32, torch.float64):
    if _native.own_products(wide):  # large ones, too: of few rows and of many by the same sums
        CASES += [(wide, shape) for shape in [(400, 784, 64), (4200, 260, 80), *MORE]]
for narrow in (torch.bfloat16, torch.float16):
    if narrow == torch.bfloat16 and _native.multiplies_pairs():
        even = [(100, 784, 64), (7, 300, 34), (301, 514, 70)]  # odd sums are the library's
        CASES += [(narrow, shape) for shape in even + MORE]
    elif _native.own_products(narrow):
        CASES += [(narrow, shape) for shape in SHAPES + MORE]
    if _native.own_products(narrow) or (narrow == torch.bfloat16 and _native.multiplies_pairs()):
        CASES += [(narrow, shape) for shape in [(301, 2048, 2), (1100, 2050, 4), (70, 4100, 8)]]
# inner and columns of products of few rows; in narrow numbers few enough to be always our own.
FEW = [(torch.float32, (2500, 24)), (torch.float64, (2500, 24))]
FEW += [(dtype, (272, columns)) for columns in range(1, 14) for dtype, _ in FEW[:2]]
FEW += [(dtype, (600, columns)) for columns in (12, 13, 25) for dtype, _ in FEW[:2]]
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
for dtype in FLOATING:
    shapes = ((784, 16), (300, 41), (18, 19), (10, 70), (3, 33), (2047, 3))
    FEW += [(dtype, shape) for shape in shapes]


def results(input: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (input, weight, bias)]
    output = torchext.linear_relu(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    threads: None, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    rows, inner, columns = shape
    sizes = ((rows, inner), (columns, inner), (columns,), (rows, columns))
    tensors = [torch.randn(size, dtype=dtype) for size in sizes]
    torch.set_num_threads(1)
    expected = results(*tensors)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for actual, first in zip(results(*tensors), expected, strict=True):
            assert torch.equal(actual, first)


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_any_batch_gives_a_row_the_same_bits(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    rows, inner, columns = shape
    input = torch.randn(rows, inner, dtype=dtype)
    weight, bias = torch.randn(columns, inner, dtype=dtype), torch.randn(columns, dtype=dtype)
    whole = torchext.linear_relu(input, weight, bias)
    gapped = torch.stack([input, input], -1)[..., 0]  # a row of one, too, with a step of two
    for begin, end in ((0, 1), (rows // 2, rows), (3, 5)):
        for features in (input, gapped):
            part = torchext.linear_relu(features[begin:end], weight, bias)
            assert torch.equal(part, whole[begin:end])


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_any_batch_gives_a_row_the_same_gradient(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """That of its input; and zero rows beside it leave those of weight and bias as they are."""
    rows, inner, columns = shape
    sizes = ((rows, inner), (columns, inner), (columns,), (rows, columns))
    input, weight, bias, upstream = (torch.randn(size, dtype=dtype) for size in sizes)
    whole = results(input, weight, bias, upstream)
    for features, gradient in ((input, upstream), (input, upstream.t().contiguous().t())):
        alone = results(features[:1], weight, bias, gradient[:1])
        assert torch.equal(alone[1], whole[1][:1])
    zeros = torch.zeros_like(upstream)
    zeros[0] = upstream[0]
    for actual, expected in zip(alone[2:], results(input, weight, bias, zeros)[2:], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("dtype", "shape"), FEW, ids=str)
def test_few_rows_have_the_bits_of_many(
    threads: None, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    inner, columns = shape
    input, weight = torch.randn(20, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    bias = torch.randn(columns, dtype=dtype)
    strided = torch.full((columns, 2 * inner), torch.nan, dtype=dtype)[:, :inner]
    strided.copy_(weight)
    for matrix in (weight, strided):
        whole = torchext.linear_relu(input, matrix, bias)
        for rows in range(1, 14):
            for count in (1, 3):
                torch.set_num_threads(count)
                part = torchext.linear_relu(input[7 : 7 + rows], matrix, bias)
                assert torch.equal(part, whole[7 : 7 + rows])
        expected = torch.relu(input.double() @ matrix.double().t() + bias.double())
        bound = torch.finfo(dtype).eps * inner**0.5
        assert (part.double() - expected[7 : 7 + rows]).abs().max() <= bound * expected.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("features", ["rows", "columns", "gapped"])
@pytest.mark.parametrize("weights", ["row", "column"])
def test_one_column_of_any_layout(dtype: torch.dtype, features: str, weights: str) -> None:
    """Which of the two is read along its rows is no matter of how many rows there are."""
    # Turned, 60 rows are more columns than dot products serve, three are not.
    input, weight = torch.randn(60, 784, dtype=dtype), torch.randn(1, 784, dtype=dtype)
    if features != "rows":
        input = input.t().contiguous().t() if features == "columns" else input.repeat(1, 2)[:, ::2]
    if weights == "column":
        weight = torch.randn(784, 3, dtype=dtype)[:, :1].t()
    bias = torch.full((1,), 100.0, dtype=dtype)
    whole = torchext.linear_relu(input, weight, bias)
    expected = torch.relu(input.double() @ weight.double().t() + bias.double())
    bound = torch.finfo(dtype).eps * 784**0.5
    assert (whole.double() - expected).abs().max() <= bound * expected.abs().max()
    for begin, rows in itertools.product(range(0, 24, 7), (1, 2, 3)):
        part = torchext.linear_relu(input[begin : begin + rows], weight, bias)
        assert torch.equal(part, whole[begin : begin + rows])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("inner", "columns"), [(784, 50), (1000, 41), (2500, 300)])
def test_few_rows_have_the_gradients_of_many(
    threads: None, dtype: torch.dtype, inner: int, columns: int
) -> None:
    """Of the input: 1000 and 2500 numbers are no whole panels, 300 steps are two sums."""
    if dtype.itemsize == 2 and not _native.own_products(dtype):
        columns = min(columns, 70)  # few enough to be our own products, or pairs
        if dtype == torch.bfloat16 and (columns % 2 or not _native.multiplies_pairs()):
            inner = min(inner, 2**18 // (9 * columns))  # those of more are the library's
    weight, upstream = torch.randn(columns, inner).to(dtype), torch.randn(9, columns).to(dtype)

    def gradient(rows: slice) -> Tensor:
        input = torch.zeros(9, inner, dtype=dtype)[rows].requires_grad_()
        output = torchext.linear_relu(input, weight, torch.ones(columns, dtype=dtype))
        return torch.autograd.grad(output, input, upstream[rows])[0]

    whole = gradient(slice(9))
    truth = upstream.double() @ weight.double()
    bound = 2 * torch.finfo(dtype).eps * columns**0.5
    assert (whole.double() - truth).abs().max() <= bound * truth.abs().max()
    for rows, count in itertools.product(range(1, 7), (1, 3)):
        torch.set_num_threads(count)
        assert torch.equal(gradient(slice(2, 2 + rows)), whole[2 : 2 + rows])


@pytest.mark.skipif(
    not _native.own_products(torch.float32), reason="products of this size are the library's here"
)
def test_more_threads_than_rows(threads: None) -> None:
    # Long sums for few columns: as many shares of work as threads, and more than there are rows.
    tensors = [torch.randn(size) for size in ((129, 8192), (64, 8192), (64,), (129, 64))]
    torch.set_num_threads(1)
    expected = results(*tensors)
    torch.set_num_threads(200)
    for actual, first in zip(results(*tensors), expected, strict=True):
        assert torch.equal(actual, first)

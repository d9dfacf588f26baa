"""linear_relu against the stock ops: values, gradients, shapes, strides, the jump at 0.

Random data are compared with the truth of float64, whose ReLU takes the branches of the result that
is judged (a pre-activation near 0 may round to either side). Small integers are exact in every
dtype: there results are equal, and many pre-activations are exactly 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchext
from torchext.testing import assert_drop_in

# (leading dimensions), in_features, out_features: aligned, ragged, one, none.
SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    ((), 5, 3),
    ((1,), 1, 1),
    ((4,), 16, 32),
    ((33,), 17, 65),
    ((130,), 70, 9),
    ((2, 3), 8, 5),
    ((2, 1, 3), 7, 4),
    ((2, 3, 2, 2), 6, 3),
    ((13,), 257, 33),
    ((100,), 784, 64),
    ((18,), 1030, 11),
    ((300,), 520, 70),
    ((700,), 784, 64),
    ((130,), 20, 4200),
    ((0,), 4, 3),
    ((2, 0, 3), 4, 5),
    ((3,), 0, 4),
    ((2, 3), 0, 4),
    ((), 0, 4),
    ((3,), 4, 0),
    ((2, 3), 4, 0),
    ((0,), 0, 0),
    ((0,), 784, 512),  # products of no inner steps, of many rows
    ((300,), 0, 600),
    ((300,), 70, 0),
]


def stock(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def truth_of(output: Tensor) -> Callable[..., Tensor]:
    """The linear function that is `stock` on the branches that the output took."""
    mask = (output > 0).double()

    def function(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, weight, bias) * mask

    return function


def check(*tensors: Tensor | None, grad_output: Tensor | None = None, order: int = 1) -> None:
    assert_drop_in(
        torchext.linear_relu,
        stock,
        *[None if x is None else x.detach().requires_grad_() for x in tensors],
        grad_output=grad_output,
        order=order,
        truth_of=truth_of,
    )


def make(
    shape: tuple[tuple[int, ...], int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    random: Callable[..., Tensor] = torch.randn,
) -> tuple[Tensor, Tensor, Tensor]:
    leading, in_features, out_features = shape
    sizes = ((*leading, in_features), (out_features, in_features), (out_features,))
    input, weight, bias = (random(size).to(device, dtype) for size in sizes)
    return input, weight, bias


def integers(size: tuple[int, ...]) -> Tensor:
    return torch.randint(-2, 3, size).float()


def gapped(x: Tensor) -> Tensor:
    """Every second element of a larger tensor, from an offset on, in every dimension."""
    large = x.new_full([2 * size + 1 for size in x.shape], float("nan"))
    return large[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)


def reversed_dims(x: Tensor) -> Tensor:
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def window(x: Tensor) -> Tensor:
    large = x.new_full([size + 3 for size in x.shape], float("nan"))
    return large[tuple(slice(2, 2 + size) for size in x.shape)].copy_(x)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def expanded_last(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def scalar(x: Tensor) -> Tensor:
    """What .sum() gives back: one element for all."""
    return torch.randn((), dtype=x.dtype, device=x.device).expand(x.shape)


LAYOUTS = [gapped, reversed_dims, window, expanded, expanded_last, scalar]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients(
    backend: str,
    device: str,
    dtype: torch.dtype,
    shape: tuple[tuple[int, ...], int, int],
    biased: bool,
) -> None:
    input, weight, bias = make(shape, dtype, device)
    check(input, weight, bias if biased else None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_data_give_equal_results(
    backend: str,
    device: str,
    dtype: torch.dtype,
    shape: tuple[tuple[int, ...], int, int],
    whole_sums: None,
) -> None:
    tensors = [x.requires_grad_() for x in make(shape, dtype, device, integers)]
    ours, expected = torchext.linear_relu(*tensors), stock(*tensors)
    assert torch.equal(ours, expected)
    upstream = integers(tuple(expected.shape)).to(device, dtype)
    gradients = torch.autograd.grad(ours, tensors, upstream)
    for result, other in zip(
        gradients, torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        assert torch.equal(result, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "bias", "grad_output", "all"])
@pytest.mark.parametrize("shape", [((5,), 7, 6), ((2, 3), 4, 5), ((), 4, 5), ((70,), 33, 40)])
def test_strides(
    backend: str,
    device: str,
    which: str,
    layout: Callable[[Tensor], Tensor],
    shape: tuple[tuple[int, ...], int, int],
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = dict(zip(("input", "weight", "bias"), make(shape, dtype), strict=True))
        tensors["grad_output"] = torch.randn(*shape[0], shape[2]).to(dtype)
        tensors = {name: x.to(device) for name, x in tensors.items()}  # would lose a layout
        tensors = {name: layout(x) if which in (name, "all") else x for name, x in tensors.items()}
        grad_output = tensors.pop("grad_output")
        check(*tensors.values(), grad_output=grad_output)
        check(tensors["input"], tensors["weight"], grad_output=grad_output)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
def test_strides_of_long_sums(backend: str, device: str, layout: Callable[..., Tensor]) -> None:
    for dtype, which in itertools.product((torch.float32, torch.float64), ((0,), (1,), (0, 1, 2))):
        tensors = make(((18,), 272, 11), dtype, device, integers)
        given = [layout(x) if i in which else x for i, x in enumerate(tensors)]
        assert torch.equal(torchext.linear_relu(*given), stock(*given))


def test_a_slice_of_a_larger_parameter(backend: str, device: str) -> None:
    parameters = torch.randn(4, 20, 30, device=device)
    check(torch.randn(3, 30, device=device), parameters[2], parameters[1, :, 3])
    check(torch.randn(3, 20, device=device), parameters[3].t(), parameters[1, 2])


def check_as_stock(*tensors: Tensor | None) -> None:
    """The same values and gradients, or an error of the same class."""
    try:
        stock(*tensors)  # type: ignore[arg-type]
    except Exception as error:
        with pytest.raises(type(error)):
            torchext.linear_relu(*tensors)
    else:
        check(*tensors)


@pytest.mark.parametrize("bias_shape", [(), (1,), (1, 5), (3, 5), (3, 1), (4,)], ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_a_bias_that_stock_broadcasts(
    backend: str, device: str, bias_shape: tuple[int, ...], leading: tuple[int, ...]
) -> None:
    input, weight, _ = make((leading, 4, 5), device=device)
    check_as_stock(input, weight, torch.randn(bias_shape, device=device))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_a_weight_of_one_dimension(
    backend: str, device: str, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    input, weight, bias = make((leading, 4, 1), dtype, device)
    for given in (None, bias[0], bias):
        check_as_stock(input, weight[0], given)


def test_the_gradient_at_zero_is_zero(backend: str, device: str, dtype: torch.dtype) -> None:
    input = torch.tensor([[1.0, 2.0], [1.0, -1.0]], dtype=dtype, device=device)
    weight = torch.tensor([[2.0, -1.0], [1.0, 1.0]], dtype=dtype, device=device)
    input.requires_grad_(), weight.requires_grad_()
    bias = torch.zeros(2, dtype=dtype, device=device, requires_grad=True)
    output = torchext.linear_relu(input, weight, bias)
    assert output.tolist() == [[0, 3], [3, 0]]
    upstream = torch.tensor([[5.0, 7.0], [11.0, 13.0]], dtype=dtype, device=device)
    gradients = torch.autograd.grad(output, (input, weight, bias), upstream)
    assert gradients[2].tolist() == [11, 7]
    assert gradients[0].tolist() == [[7, 7], [22, -11]]
    assert gradients[1].tolist() == [[11, -11], [7, 14]]


SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0]


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [((5,), 33, 19), ((3,), 1030, 9)], ids=str)
def test_special_values_are_stocks(
    backend: str,
    device: str,
    dtype: torch.dtype,
    value: float,
    which: int,
    shape: tuple[tuple[int, ...], int, int],
) -> None:
    """In input, weight, bias or the upstream gradient: the third number, or the last."""
    tensors = [*make(shape, dtype, device, integers)]
    tensors.append(integers((*shape[0], shape[2])).to(device, dtype))
    tensors[which].view(-1)[2 if shape[1] == 33 else -1] = value
    *leaves, upstream = tensors
    leaves = [x.requires_grad_() for x in leaves]
    ours, expected = torchext.linear_relu(*leaves), stock(*leaves)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    gradients = torch.autograd.grad(ours, leaves, upstream)
    for result, other in zip(
        gradients, torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(result, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_the_gradients_asked_for(backend: str, needed: tuple[bool, bool, bool]) -> None:
    tensors = [x.requires_grad_(need) for x, need in zip(make(((3,), 4, 5)), needed, strict=True)]
    assert_drop_in(torchext.linear_relu, stock, *tensors, truth_of=truth_of)
    output = torchext.linear_relu(*tensors)
    assert output.requires_grad == any(needed)
    if any(needed):
        output.sum().backward()
        assert [x.grad is not None for x in tensors] == list(needed)
    with torch.no_grad():
        assert not torchext.linear_relu(*tensors).requires_grad


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, True, True)]
)
def test_a_gradient_not_asked_for_is_not_computed(needed: tuple[bool, bool, bool]) -> None:
    """The first layer of a network needs none for its input."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            results = func(*args, **(kwargs or {}))
            if func is torch.ops.torchext.linear_relu_backward.default:
                sizes.append([gradient.numel() > 0 for gradient in results])
            return results

    tensors = [x.requires_grad_(need) for x, need in zip(make(((3,), 4, 5)), needed, strict=True)]
    sizes: list[list[bool]] = []
    with torchext.use_backend("native"):
        output = torchext.linear_relu(*tensors)
        with Recorder():
            output.sum().backward()
    assert sizes == [list(needed)]


@pytest.mark.parametrize("order", [1, 2])
def test_tensors_that_depend_on_each_other(backend: str, order: int) -> None:
    """Shared parameters and a history between the arguments: every path counts once."""

    def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: function(function(x, w, b), w, b)

    def same(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: function(w, w, b) * x.sum()

    def bias_of_weight(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: function(x, w, (w * b).sum(1))

    for compose in (twice, same, bias_of_weight):
        tensors = [x.double().requires_grad_() for x in make(((3,), 5, 5))]
        assert_drop_in(compose(torchext.linear_relu), compose(stock), *tensors, order=order)


def test_second_derivatives(backend: str, device: str) -> None:
    for shape in SHAPES:
        input, weight, bias = make(shape, torch.float64, device)
        for given in ((input, weight, bias), (input, weight)):
            assert_drop_in(
                torchext.linear_relu, stock, *[x.requires_grad_() for x in given], order=2
            )


def test_gradcheck(backend: str, device: str) -> None:
    for leading in ((), (3,), (2, 2)):
        tensors = [x.requires_grad_() for x in make((leading, 4, 3), torch.float64, device)]
        for given in (tensors, tensors[:2]):
            assert torch.autograd.gradcheck(
                torchext.linear_relu, given, check_batched_grad=True, check_forward_ad=True
            )
            assert torch.autograd.gradgradcheck(torchext.linear_relu, given)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.complex64, torch.bool], ids=str
)
def test_other_dtypes_do_as_stock(backend: str, device: str, dtype: torch.dtype) -> None:
    """The same values, or an error of the same class."""
    tensors = [x.abs().to(dtype) for x in make(((3,), 4, 5), device=device, random=integers)]
    for given in (tensors, tensors[:2]):
        try:
            expected = stock(*given)
        except Exception as error:
            with pytest.raises(type(error)):
                torchext.linear_relu(*given)
        else:
            assert torch.equal(torchext.linear_relu(*given), expected)


def test_a_change_of_the_output_raises_as_stocks_does(backend: str) -> None:
    for function in (torchext.linear_relu, stock):
        input, weight, bias = (x.requires_grad_() for x in make(((3,), 4, 5)))
        output = function(input, weight, bias)
        output.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_a_change_of_the_weight_raises_as_stocks_does(backend: str) -> None:
    for function in (torchext.linear_relu, stock):
        input, weight, bias = (x.requires_grad_() for x in make(((3,), 4, 5)))
        output = function(input, weight, bias)
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_backward_twice_gives_the_same(backend: str) -> None:
    tensors = [x.requires_grad_() for x in make(((3,), 4, 5))]
    output = torchext.linear_relu(*tensors)
    upstream = torch.randn_like(output)
    first = torch.autograd.grad(output, tensors, upstream, retain_graph=True)
    kept = [x.clone() for x in first]
    for gradient in first:
        gradient.zero_()
    for result, other in zip(torch.autograd.grad(output, tensors, upstream), kept, strict=True):
        assert torch.equal(result, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, tensors, upstream)


def test_any_number_of_threads_gives_the_same_gradient_of_the_bias(
    threads: None, dtype: torch.dtype
) -> None:
    input, weight, bias = make(((700,), 30, 300), dtype)
    bias.requires_grad_()
    upstream = torch.randn(700, 300).to(dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with torchext.use_backend("native"):
            mask = input.new_ones(700, 1)  # a product that no library splits differently
            output = torchext.linear_relu(mask, weight[:, :1].abs(), bias)
        results.append(torch.autograd.grad(output, bias, upstream)[0])
    assert all(torch.equal(result, results[0]) for result in results)

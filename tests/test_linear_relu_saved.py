"""linear_relu keeps for backward what stock keeps: the rest may change, or go."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

import torchext


@pytest.mark.parametrize("which", ["input", "weight", "bias"])
@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_changes_after_forward_are_as_stocks(which: str, frozen: str) -> None:
    """What no gradient needs may be changed in place; what one needs raises, as in stock."""
    tensors = {"input": torch.randn(33, 9), "weight": torch.randn(40, 9), "bias": torch.randn(40)}
    upstream = torch.randn(33, 40)
    outcomes = []
    for function in (torchext.linear_relu, lambda x, w, b: F.relu(F.linear(x, w, b))):
        leaves = {name: t.clone().requires_grad_(name != frozen) for name, t in tensors.items()}
        call = {name: leaf * 1 for name, leaf in leaves.items()}  # leaves may not be changed
        output = function(call["input"], call["weight"], call["bias"])
        with torch.no_grad():
            call[which].add_(1)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        try:
            outcomes.append(torch.autograd.grad(output, wanted, upstream))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            outcomes.append(None)
    ours, stock = outcomes
    assert (ours is None) == (stock is None)
    if ours is not None:
        torch.testing.assert_close(ours, stock)


def test_an_input_that_no_gradient_needs_is_let_go() -> None:
    """A frozen weight: activations before it cost no memory."""
    x = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(16, 32)
    hidden = x * 2
    alive = weakref.ref(hidden)
    output = torchext.linear_relu(hidden, weight)
    del hidden
    assert alive() is None
    (gradient,) = torch.autograd.grad(output.sum(), x)
    (expected,) = torch.autograd.grad(F.relu(F.linear(x * 2, weight)).sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 5), (2, 3, 40), (300, 130), (0, 4)], ids=str)
def test_a_sums_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One number that is all elements: the bits of as many numbers."""
    input = torch.randn(*shape[:-1], 7, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[-1], 7, dtype=dtype, requires_grad=True)
    bias = torch.randn(shape[-1], dtype=dtype, requires_grad=True)
    output = torchext.linear_relu(input, weight, bias)
    number = torch.randn((), dtype=dtype)
    found, expected = (
        torch.autograd.grad(output, (input, weight, bias), upstream, retain_graph=True)
        for upstream in (number.expand(shape), number.expand(shape).clone())
    )
    for actual, other in zip(found, expected, strict=True):
        assert torch.equal(actual, other)


@pytest.mark.parametrize("leading", [(), (7,), (0,), (2, 3)], ids=str)
def test_without_the_weights_gradient_the_input_is_not_read(leading: tuple[int, ...]) -> None:
    """The operator takes the weight in its place, whatever the shapes."""
    backward = torch.ops.torchext.linear_relu_backward
    input, weight = torch.randn(*leading, 9), torch.randn(5, 9)
    output, upstream = torch.randn(*leading, 5), torch.randn(*leading, 5)
    expected = backward(upstream, output, input, weight, True, False, True)
    for stand_in in (weight, input.double(), torch.ones(2, dtype=torch.int32)):
        actual = backward(upstream, output, stand_in, weight, True, False, True)
        for grad, other in zip(actual, expected, strict=True):
            assert grad.shape == other.shape and torch.equal(grad, other)
        assert actual[0].shape == input.shape
    for wrong in (torch.randn(*leading, 4), torch.randn(3, *leading, 5), output.double()):
        with pytest.raises(RuntimeError, match="linear_relu_backward: expected"):
            backward(wrong, output, weight, weight, True, False, True)

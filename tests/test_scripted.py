"""What TorchScript has no operator for: served by the stock ops, or refused, as in eager calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchext

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def gradients(module: nn.Module, target: Tensor, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The loss, and its gradients for a random gradient of its own."""
    torch.manual_seed(0)
    loss = module(x, target)
    return (loss, *torch.autograd.grad(loss, (x, *others), torch.randn_like(loss)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities_and_weights_have_their_gradients(reduction: str) -> None:
    x, target = torch.randn(4, 6, requires_grad=True), torch.rand(4, 6, requires_grad=True)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
    ours, stock = (
        torch.jit.script(kind(weight=torch.rand(6), **options))
        for kind in (torchext.nn.CrossEntropyLoss, nn.CrossEntropyLoss)
    )
    stock.weight.copy_(ours.weight)
    torch.testing.assert_close(
        gradients(ours, target, x, target), gradients(stock, target, x, target)
    )
    for module in (ours, stock):  # whose index loss has no gradient of its weights
        module.weight.requires_grad_()
        with pytest.raises((RuntimeError, torch.jit.Error), match="not differentiable"):
            module(x, torch.tensor([0, 5, 2, 2]))


@pytest.mark.parametrize("inner", [(), (3,), (2, 3)], ids=str)
def test_a_heads_probabilities_have_their_gradients(inner: tuple[int, ...]) -> None:
    for reduction in ("mean", "none"):
        head = torchext.nn.LinearCrossEntropyLoss(
            5, 6, out_features=inner, bias=True, reduction=reduction
        )
        leaves = (torch.randn(4, 5, requires_grad=True), *head.parameters())
        target = torch.rand(4, 6, *inner, requires_grad=True)
        scripted = torch.jit.script(head)
        found = gradients(scripted, target, *leaves, target)
        torch.testing.assert_close(found, gradients(head, target, *leaves, target))
        index = torch.randint(6, (4, *inner))
        torch.testing.assert_close(
            gradients(scripted, index, *leaves), gradients(head, index, *leaves)
        )


@pytest.mark.parametrize(
    ("shape", "target", "inner"),
    [
        ((2, 3, 5), (3, 2), ()),
        ((2, 3, 5), (6,), ()),
        ((6, 5), (2, 3), ()),
        ((1, 5), (), ()),
        ((4, 5), (4, 3, 2), (2, 3)),
        ((4, 5), (4, 6), (2, 3)),
    ],
    ids=str,
)
def test_targets_of_another_shape_are_refused(
    shape: tuple[int, ...], target: tuple[int, ...], inner: tuple[int, ...]
) -> None:
    head = torchext.nn.LinearCrossEntropyLoss(5, 6, out_features=inner)
    scripted = torch.jit.script(head)
    indices = torch.zeros(target, dtype=torch.long)
    probabilities = torch.rand(*target[:1], 6, *target[1:]) if target else torch.rand(7)
    for goal in (indices, probabilities):
        with pytest.raises((RuntimeError, ValueError)):
            head(torch.randn(shape), goal)
        with pytest.raises(torch.jit.Error, match="expected target of shape"):
            scripted(torch.randn(shape), goal)
    assert scripted(torch.randn(4, 5), torch.zeros(4, *inner, dtype=torch.long)).shape == ()


def test_dtypes_and_biases_that_the_operator_does_not_take() -> None:
    logits, target = torch.randn(3, 6).bfloat16(), torch.rand(3, 6)
    ours, stock = (torch.jit.script(m.CrossEntropyLoss()) for m in (torchext.nn, nn))
    torch.testing.assert_close(ours(logits, target), stock(logits, target))
    x, weight, bias = torch.randn(4, 5), torch.randn(6, 5), torch.randn(1)
    found = torch.jit.script(torchext.linear_relu)(x, weight, bias)
    torch.testing.assert_close(found, torchext.linear_relu(x, weight, bias))


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_of_no_classes(bias: bool) -> None:
    """All targets ignored: the operator divides by no number of classes."""
    head = torchext.nn.LinearCrossEntropyLoss(4, 0, bias=bias, reduction="sum")
    x, target = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    found = gradients(torch.jit.script(head), target, x)
    torch.testing.assert_close(found, (torch.tensor(0.0), torch.zeros(3, 4)))

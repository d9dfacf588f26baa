"""cross_entropy's inplace_backward: the value is the same, the memory is reused, autograd knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchext
from torchext.testing import assert_close_to_truth

SHAPES = [(7,), (1, 4), (33, 17), (4, 2100), (2, 5, 3, 4), (3, 70, 1)]
SERVED = [torch.float32, torch.float64, torch.bfloat16]
INPLACE_ERROR = "modified by an inplace operation"


@pytest.fixture(autouse=True)
def native() -> Any:
    with torchext.use_backend("native"):
        yield


def leaf_and_logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A leaf, and logits computed from it by an op that saves neither."""
    leaf = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    return leaf, leaf + 0


def target_for(logits: Tensor, kind: str = "indices") -> Tensor:
    dim = min(logits.dim() - 1, 1)
    if kind == "probabilities":
        return torch.randn(logits.shape).softmax(dim).to(logits.dtype)
    positions = logits.shape[:dim] + logits.shape[dim + 1 :]
    return torch.randint(logits.shape[dim], positions)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SERVED, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_value_and_gradient_are_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str
) -> None:
    classes = shape[min(len(shape) - 1, 1)]
    weight = (0.5 + torch.rand(classes)).to(dtype)
    for reduction in ("mean", "sum"):
        for smoothing, w in ((0.0, None), (0.1, None), (0.0, weight), (0.1, weight)):
            options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
            leaf, logits = leaf_and_logits(shape, dtype)
            target, upstream = target_for(logits, kind), torch.randn((), dtype=dtype)
            loss = torchext.cross_entropy(logits, target, w, inplace_backward=True, **options)
            (gradient,) = torch.autograd.grad(loss, leaf, upstream)
            results = []
            for x in (leaf.detach(), leaf.detach().double()):
                x.requires_grad_()
                dense = target if kind == "indices" else target.to(x.dtype)
                stock = F.cross_entropy(x, dense, None if w is None else w.to(x.dtype), **options)
                (stock_gradient,) = torch.autograd.grad(stock, x, upstream.to(x.dtype))
                results.append((stock.detach(), stock_gradient))
            assert_close_to_truth(loss.detach(), results[0][0], results[1][0], "loss")
            assert_close_to_truth(gradient, results[0][1], results[1][1], "gradient")


def test_the_memory_of_the_logits_is_the_gradients() -> None:
    leaf, logits = leaf_and_logits((4, 5))
    loss = torchext.cross_entropy(logits, target_for(logits), inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    leaf, logits = leaf_and_logits((4, 5))
    target = target_for(logits)
    torchext.cross_entropy(logits, target, inplace_backward=True)
    expected = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)[0]
    torch.testing.assert_close(logits.detach(), expected)


def test_the_version_counter_moves() -> None:
    _, logits = leaf_and_logits((4, 5))
    view, before = logits.detach(), logits._version
    torchext.cross_entropy(logits, target_for(logits), inplace_backward=True)
    assert logits._version == view._version > before


@pytest.mark.parametrize(
    "produce",
    [
        torch.exp,  # saves its output
        torch.tanh,
        lambda x: torchext.linear_relu(x, torch.eye(5)),
        lambda x: torch.log_softmax(x, 1),
    ],
)
def test_a_node_that_saved_the_logits_raises(produce: Any) -> None:
    leaf = torch.randn(4, 5, requires_grad=True)
    logits = produce(leaf)
    loss = torchext.cross_entropy(logits, target_for(logits), inplace_backward=True)
    with pytest.raises(RuntimeError, match=INPLACE_ERROR):
        loss.backward()


def test_another_user_of_the_logits_raises() -> None:
    leaf, logits = leaf_and_logits((4, 5))
    penalty = (logits**2).sum()
    loss = torchext.cross_entropy(logits, target_for(logits), inplace_backward=True)
    with pytest.raises(RuntimeError, match=INPLACE_ERROR):
        (loss + penalty).backward()


def test_a_user_of_a_view_of_the_logits_raises() -> None:
    leaf, logits = leaf_and_logits((4, 5))
    penalty = logits.view(20)[3:9].square().sum()
    loss = torchext.cross_entropy(logits, target_for(logits), inplace_backward=True)
    with pytest.raises(RuntimeError, match=INPLACE_ERROR):
        (loss + penalty).backward()


def test_a_change_of_the_logits_between_forward_and_backward_raises() -> None:
    _, logits = leaf_and_logits((4, 5))
    loss = torchext.cross_entropy(logits, target_for(logits), inplace_backward=True)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match=INPLACE_ERROR):
        loss.backward()


def test_two_losses_of_the_same_logits_raise() -> None:
    _, logits = leaf_and_logits((4, 5))
    target = target_for(logits)
    one = torchext.cross_entropy(logits, target, inplace_backward=True)
    other = torchext.cross_entropy(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match=INPLACE_ERROR):
        (one + other).backward()


def test_backward_again_gives_the_same() -> None:
    leaf, logits = leaf_and_logits((4, 5))
    target = target_for(logits)
    loss = torchext.cross_entropy(logits, target, inplace_backward=True)
    expected = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)[0]
    results = [
        torch.autograd.grad(loss, leaf, torch.tensor(factor), retain_graph=True)[0] / factor
        for factor in (1.0, 3.0, 1.0)
    ]
    results.append(torch.autograd.grad(loss, leaf, torch.tensor(2.0))[0] / 2)
    for result in results:
        torch.testing.assert_close(result, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)


def test_a_kept_gradient_is_not_changed_by_a_later_backward() -> None:
    """While the graph is retained, a gradient may not share the memory that backward scales."""
    leaf, logits = leaf_and_logits((4, 5))
    loss = torchext.cross_entropy(logits, target_for(logits), inplace_backward=True)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    torch.autograd.grad(loss, logits, torch.tensor(5.0))
    assert torch.equal(first, kept)


def test_a_second_derivative_raises() -> None:
    leaf, logits = leaf_and_logits((4, 5))
    loss = torchext.cross_entropy(logits, target_for(logits), inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_is_overwritten_without_a_gradient(reduction: str) -> None:
    for requires_grad, mode in ((True, torch.no_grad()), (False, torch.enable_grad())):
        logits = torch.randn(4, 5, requires_grad=requires_grad)
        before, version = logits.detach().clone(), logits._version
        options: dict[str, Any] = {"reduction": reduction, "inplace_backward": True}
        with mode:
            torchext.cross_entropy(logits, target_for(logits), **options)
        assert torch.equal(logits, before)
        assert logits._version == version


def test_no_overwrite_with_reduction_none_or_float16_or_gaps() -> None:
    """Where it has no effect, it is a call like any other."""
    cases = [
        (leaf_and_logits((4, 5)), "none"),
        (leaf_and_logits((4, 5), torch.float16), "mean"),
        ((leaf := torch.randn(4, 9, requires_grad=True), (leaf + 0)[:, ::2]), "mean"),
        ((leaf := torch.randn(1, 5, requires_grad=True), (leaf + 0).expand(4, 5)), "sum"),
    ]
    for (_, logits), reduction in cases:
        target, before = target_for(logits), logits.detach().clone()
        options = {"reduction": reduction}
        loss = torchext.cross_entropy(logits, target, inplace_backward=True, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.equal(logits, before)
        x = before.double().requires_grad_()
        (exact,) = torch.autograd.grad(F.cross_entropy(x, target, **options).sum(), x)
        torch.testing.assert_close(gradient.double(), exact, rtol=2e-3, atol=1e-5)


def test_a_bad_target_leaves_the_logits_alone() -> None:
    _, logits = leaf_and_logits((4, 5))
    before, version = logits.detach().clone(), logits._version
    with pytest.raises(IndexError):
        torchext.cross_entropy(logits, torch.tensor([0, 1, 2, 5]), inplace_backward=True)
    assert torch.equal(logits, before)
    assert logits._version == version


@pytest.mark.parametrize("shape", [(4, 5), (4, 3000), (2, 5, 70)], ids=str)
def test_probabilities_that_share_the_logits_memory(shape: tuple[int, ...]) -> None:
    leaf, logits = leaf_and_logits(shape)
    expected = torch.autograd.grad(F.cross_entropy(leaf, leaf.detach()), leaf)[0]
    loss = torchext.cross_entropy(logits, logits.detach(), inplace_backward=True)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaf)[0], expected, rtol=1e-4, atol=1e-5 * float(expected.max())
    )


@pytest.mark.parametrize("name", ["eager", "auto"])
def test_other_backends_and_transforms_take_it_too(name: str) -> None:
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])

    def loss(x: Tensor) -> Tensor:
        return torchext.cross_entropy(x + 0, target, inplace_backward=True)

    expected = torch.func.grad(lambda x: F.cross_entropy(x, target))(logits)
    with torchext.use_backend(name):
        x = logits.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(x), x)[0], expected)
        torch.testing.assert_close(torch.func.grad(loss)(logits), expected)


def test_training_with_it_is_training_without_it() -> None:
    target = torch.randint(7, (20,))
    data = torch.randn(20, 6)
    weights = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 7)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
        criterion = torchext.nn.CrossEntropyLoss(inplace_backward=inplace)
        for _ in range(5):
            optimizer.zero_grad()
            criterion(layer(data), target).backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])

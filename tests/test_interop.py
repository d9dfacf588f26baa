"""Both ops with what else looks into autograd: modes, subclasses, hooks, checkpoints, profiler."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchext

TARGET = torch.tensor([0, 4, 2, 1])


def fused(x: Tensor, w: Tensor) -> Tensor:
    return torchext.cross_entropy(torchext.linear_relu(x, w), TARGET)


def stock(x: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(F.relu(F.linear(x, w)), TARGET)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)


def gradients(function: Callable[..., Tensor], x: Tensor, w: Tensor, scale: float = 3.0) -> Any:
    loss = function(x, w)
    return [loss.detach(), *torch.autograd.grad(loss, (x, w), torch.tensor(scale))]


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    with torchext.use_backend("native"):
        yield


def test_torch_function_mode_sees_the_functions() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    x, w = data()
    with Mode():
        result = gradients(fused, x, w)
    assert torchext.linear_relu in seen
    assert torchext.cross_entropy in seen
    torch.testing.assert_close(result, gradients(stock, x, w))


class Wrapped(Tensor):
    """A subclass that changes nothing and says what it was given."""

    calls: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["input", "target", "weight", "bias"])
def test_subclasses_in_any_argument(which: str) -> None:
    Wrapped.calls.clear()
    x, w = torch.randn(4, 5), torch.rand(5)
    if which != "bias":
        args: list[Any] = [x, TARGET, w]
        position = ["input", "target", "weight"].index(which)
        args[position] = args[position].as_subclass(Wrapped)
        result, expected = torchext.cross_entropy(*args), F.cross_entropy(x, TARGET, w)
        function: Any = torchext.cross_entropy
    else:
        bias = torch.randn(4).as_subclass(Wrapped)
        result, expected = torchext.linear_relu(w, x, bias), F.relu(F.linear(w, x, bias))
        function = torchext.linear_relu
    assert function in Wrapped.calls
    assert type(result) is Wrapped
    torch.testing.assert_close(
        result.as_subclass(Tensor), torch.as_tensor(expected).as_subclass(Tensor)
    )


class Logged(Tensor):
    """A wrapper subclass with __torch_dispatch__, as DTensor and quantised tensors are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Logged) else x

        def wrap(x: Any) -> Any:
            return Logged(x) if isinstance(x, Tensor) else x

        tree_map = torch.utils._pytree.tree_map
        return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {})))


def test_wrapper_subclasses() -> None:
    x, w = (tensor.detach() for tensor in data())
    expected = stock(x, w)
    for given in ((Logged(x), w), (x, Logged(w)), (Logged(x), Logged(w))):
        result = fused(*given)
        assert isinstance(result, Logged)
        torch.testing.assert_close(result.inner, expected)


def test_dispatch_mode() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    x, w = data()
    with Mode():
        result = gradients(fused, x, w)
    assert any(func.namespace == "torchext" for func in seen)
    torch.testing.assert_close(result, gradients(stock, x, w))


def test_saved_tensors_hooks_give_what_is_used() -> None:
    x, w = data()
    packed: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        packed[len(packed)] = tensor.clone()
        return len(packed) - 1

    with saved_tensors_hooks(pack, packed.__getitem__):
        loss = fused(x, w)
    result = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (x, w), torch.tensor(3.0))
    expected = gradients(stock, x, w)[1:]
    torch.testing.assert_close(list(result), expected)
    torch.testing.assert_close(list(again), expected)
    assert len(packed) >= 3


def test_what_a_hook_keeps_is_not_overwritten() -> None:
    """A hook may hand out the same tensor for every backward of a graph, or show it to a user."""
    x = torch.randn(4, 5, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = torchext.cross_entropy(x, TARGET)
    before = [tensor.clone() for tensor in kept]
    torch.autograd.grad(loss, x, torch.tensor(3.0))
    for tensor, old in zip(kept, before, strict=True):
        assert torch.equal(tensor, old)


def test_saved_on_the_cpu() -> None:
    x, w = data()
    with save_on_cpu():
        loss = fused(x, w)
    result = torch.autograd.grad(loss, (x, w))
    torch.testing.assert_close(list(result), gradients(stock, x, w, 1.0)[1:])


def test_checkpoint() -> None:
    x, w = data()
    expected = gradients(stock, x, w)
    result = gradients(lambda *args: checkpoint(fused, *args, use_reentrant=False), x, w)
    torch.testing.assert_close(result, expected)
    checkpoint(fused, x, w, use_reentrant=True).backward(torch.tensor(3.0))  # supports no grad()
    torch.testing.assert_close([x.grad, w.grad], expected[1:])


def test_checkpoint_with_the_logits_overwritten() -> None:
    x, w = data()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return torchext.cross_entropy(F.linear(x, w), TARGET, inplace_backward=True)

    result = gradients(lambda *args: checkpoint(loss, *args, use_reentrant=False), x, w)
    expected = gradients(lambda x, w: F.cross_entropy(F.linear(x, w), TARGET), x, w)
    torch.testing.assert_close(result, expected)


def test_anomaly_mode_names_the_op() -> None:
    x, w = data()
    with torch.autograd.detect_anomaly(check_nan=True), pytest.warns(UserWarning):
        torch.testing.assert_close(gradients(fused, x, w), gradients(stock, x, w))
        with pytest.raises(RuntimeError, match="(?i)cross_entropy.*nan"):
            torchext.cross_entropy(x * float("nan"), TARGET).backward()


def test_the_profiler_shows_the_ops() -> None:
    x, w = data()
    with torch.profiler.profile(record_shapes=True) as profile:
        fused(x, w).backward()
    names = {event.key for event in profile.key_averages()}
    assert "torchext::linear_relu_forward" in names
    assert "torchext::cross_entropy_forward" in names


def test_hooks_on_tensors_and_nodes() -> None:
    x, w = data()
    seen: list[Tensor] = []
    hidden = torchext.linear_relu(x, w)
    hidden.register_hook(lambda g: seen.append(g) or g * 2)
    loss = torchext.cross_entropy(hidden, TARGET)
    assert loss.grad_fn is not None
    loss.grad_fn.register_hook(lambda into, out: seen.append(into[0]))
    loss.grad_fn.register_prehook(lambda out: (out[0] * 5,))
    result = torch.autograd.grad(loss, (x, w))
    torch.testing.assert_close(list(result), gradients(stock, x, w, 10.0)[1:])
    assert torch.equal(seen[0], seen[1])


def test_retained_and_intermediate_gradients() -> None:
    x, w = data()
    hidden = torchext.linear_relu(x, w)
    hidden.retain_grad()
    torchext.cross_entropy(hidden, TARGET).backward(torch.tensor(2.0))
    other = F.relu(F.linear(x, w)).detach().requires_grad_()
    F.cross_entropy(other, TARGET).backward(torch.tensor(2.0))
    torch.testing.assert_close(hidden.grad, other.grad)


def test_multi_gradient_hooks_and_inputs_of_backward() -> None:
    x, w = data()
    fused(x, w).backward(inputs=[w])
    assert x.grad is None
    torch.testing.assert_close(w.grad, gradients(stock, x, w, 1.0)[2])


def test_inference_mode() -> None:
    x, w = data()
    with torch.inference_mode():
        loss = fused(x, w)
    assert loss.is_inference()
    torch.testing.assert_close(loss, stock(x, w).detach())
    with torch.inference_mode():
        y = torch.randn(4, 5)
    for function in (torchext.cross_entropy, F.cross_entropy):
        assert function(y, TARGET).shape == ()


def test_grad_mode_is_the_callers() -> None:
    x, w = data()
    with torch.set_grad_enabled(False):
        assert not fused(x, w).requires_grad
        with torch.enable_grad():
            assert fused(x, w).requires_grad
    loss = fused(x, w)
    with torch.no_grad():
        result = torch.autograd.grad(loss, (x, w))
    torch.testing.assert_close(list(result), gradients(stock, x, w, 1.0)[1:])


def test_a_default_device_changes_nothing() -> None:
    x, w = data()
    with torch.device("meta"):
        loss = fused(x, w)
        result = torch.autograd.grad(loss, (x, w))
    assert not loss.is_meta
    torch.testing.assert_close(list(result), gradients(stock, x, w, 1.0)[1:])


def test_deterministic_mode() -> None:
    x, w = data()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(fused, x, w), gradients(fused, x, w)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_graphs_are_freed() -> None:
    """No cycle keeps logits or gradients until the garbage collector comes."""
    gc.disable()
    try:
        for inplace in (False, True):
            x = torch.randn(4, 5, requires_grad=True)
            logits = x + 0
            alive = weakref.ref(logits)
            loss = torchext.cross_entropy(logits, TARGET, inplace_backward=inplace)
            loss.backward()
            del logits, loss
            assert alive() is None
        x, w = data()
        hidden = torchext.linear_relu(x, w)
        alive = weakref.ref(hidden)
        hidden.sum().backward()
        del hidden
        assert alive() is None
    finally:
        gc.enable()


def test_checkpointed_and_shared_layers_train_alike() -> None:
    """One layer used three times, its gradients summed over the uses."""
    results = []
    for use_fused in (True, False):
        torch.manual_seed(2)
        layer = torchext.nn.LinearReLU(6, 6) if use_fused else nn.Linear(6, 6)
        x = torch.randn(4, 6)
        for _ in range(3):
            x = layer(x) if use_fused else layer(x).relu()
        x.square().sum().backward()
        results.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(results[0], results[1])

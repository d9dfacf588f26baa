"""use_backend and backends, and which implementation a call takes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchext
from torchext import _backend, _native, reference, testing


class Recorder(TorchDispatchMode):
    """The names of the operators of this package that a call dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchext":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls of the eager definitions."""
    made: list[str] = []

    def counted(name: str) -> Any:
        function = getattr(reference, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            made.append(name)
            return function(*args, **kwargs)  # type: ignore[no-any-return]

        return call

    for name in ("linear_relu", "cross_entropy"):
        monkeypatch.setattr(reference, name, counted(name))
    yield made


def both(x: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.ones(5, x.shape[-1], dtype=x.dtype, device=x.device)
    target = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return torchext.linear_relu(x, weight), torchext.cross_entropy(x, target)


def test_backends_say_what_is_here_and_why_not() -> None:
    found = torchext.backends()
    assert set(found) >= {"native", "eager"}
    assert found["native"].available
    assert found["native"].reason == ""
    assert found["eager"].available


def test_a_backend_that_is_missing_is_an_error_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "cpu_missing", "no such library")
    assert torchext.backends()["native"] == _backend.Availability(False, "no such library")
    with (
        pytest.raises(RuntimeError, match="native.*no such library"),
        torchext.use_backend("native"),
    ):
        pass


@pytest.mark.parametrize("name", ["", "cuda", "Native", None, 3])
def test_another_name_is_an_error(name: Any) -> None:
    with pytest.raises(ValueError, match="use_backend: expected name"), torchext.use_backend(name):
        pass


def test_blocks_nest_and_end_with_an_error() -> None:
    assert _backend._active == "auto"
    with torchext.use_backend("eager"):
        with torchext.use_backend("native"):
            assert _backend._active == "native"
        assert _backend._active == "eager"
        with pytest.raises(KeyError), torchext.use_backend("native"):
            raise KeyError
        assert _backend._active == "eager"
    assert _backend._active == "auto"


def test_eager_is_the_definition(calls: list[str]) -> None:
    with torchext.use_backend("eager"), Recorder() as recorder:
        both(torch.randn(3, 4))
    assert calls == ["linear_relu", "cross_entropy"]
    assert recorder.names == []


def test_native_is_the_kernel_for_any_size(calls: list[str]) -> None:
    with torchext.use_backend("native"), Recorder() as recorder:
        for rows in (1, 300):
            both(torch.randn(rows, 4))
    assert calls == []
    assert recorder.names == ["linear_relu_forward", "cross_entropy_forward"] * 2


def test_auto_is_the_kernel_for_large_calls(calls: list[str]) -> None:
    with Recorder() as recorder:
        both(torch.randn(2000, 300))
    assert calls == []
    assert recorder.names == ["linear_relu_forward", "cross_entropy_forward"]


def test_backward_follows_its_forward() -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    for name, other, expected in (("native", "eager", True), ("eager", "native", False)):
        with torchext.use_backend(name):
            output = torchext.linear_relu(torch.randn(3, 4), weight)
        with torchext.use_backend(other), Recorder() as recorder:
            output.sum().backward()
        assert ("linear_relu_backward" in recorder.names) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_dtype_is_served(dtype: torch.dtype, calls: list[str]) -> None:
    with torchext.use_backend("native"):
        both(torch.randn(3, 4).to(dtype))
    assert calls == []


def test_what_no_kernel_serves_takes_the_definition(calls: list[str]) -> None:
    x = torch.randn(3, 4)
    with torchext.use_backend("native"):
        both(x.to("meta"))
        torch.func.vmap(lambda y: torchext.linear_relu(y, x))(x)
        torchext.linear_relu(x.to(torch.int64), torch.ones(5, 4, dtype=torch.int64))
        torchext.cross_entropy(x, x.softmax(1).requires_grad_())
        torchext.cross_entropy(x, x.double().softmax(1))
    assert calls == ["linear_relu", "cross_entropy"] + ["linear_relu"] * 2 + ["cross_entropy"] * 2


def test_views_that_are_lazy_are_read_right() -> None:
    """The imaginary part of a conjugate is negated only when it is read.

    In float64: weights of both signs may leave a mean of little, with any error in float32.
    """
    z = torch.randn(4, 5, dtype=torch.complex128)
    x = z.conj().imag
    assert x.is_neg()
    weight, target = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    with torchext.use_backend("native"):
        for lazy, plain in ((x, x.resolve_neg()),):
            torch.testing.assert_close(
                torchext.linear_relu(lazy, weight), F.relu(F.linear(plain, weight))
            )
            torch.testing.assert_close(
                torchext.linear_relu(weight, lazy), F.relu(F.linear(weight, plain))
            )
            torch.testing.assert_close(
                torchext.linear_relu(torch.zeros(2, 3, dtype=torch.float64), weight.t(), lazy[0]),
                F.relu(plain[0]).expand(2, 5),
            )
            for args, expected in (
                ((lazy, target), (plain, target)),
                ((lazy, lazy.exp()), (plain, plain.exp())),
                ((weight[:, :5], target[:3], lazy[0]), (weight, target[:3], plain[0])),
                ((plain, lazy), (plain, plain)),
            ):
                for reduction in ("none", "mean"):
                    torch.testing.assert_close(
                        torchext.cross_entropy(*args, reduction=reduction),
                        F.cross_entropy(*expected, reduction=reduction),
                    )
            output = torchext.linear_relu(weight.requires_grad_(), plain)
            negated = torch.randn(3, 4, dtype=torch.complex128).conj().imag
            (gradient,) = torch.autograd.grad(output, weight, negated)
            stock = F.relu(F.linear(weight, plain))
            (expected_gradient,) = torch.autograd.grad(stock, weight, negated)
            torch.testing.assert_close(gradient, expected_gradient)


NO_MEMORY = {
    "zero": "torch._efficientzerotensor((4, 5))",
    "functional": "torch._to_functional_tensor(torch.randn(4, 5))",
}


@pytest.mark.parametrize("make", NO_MEMORY.values(), ids=NO_MEMORY.keys())
def test_tensors_without_memory_of_their_own(make: str) -> None:
    """Autograd's zeros and functionalisation's wrappers. Alone, since reading them is a crash."""
    program = f"""
import torch, torchext, torch.nn.functional as F
make = lambda: {make}
target, weight = torch.tensor([0, 1, 2, 3]), torch.randn(3, 5)
with torchext.use_backend("native"):
    for calls in (
        (torchext.cross_entropy, F.cross_entropy, lambda x: (x, target)),
        (torchext.linear_relu, lambda *a: F.relu(F.linear(*a)), lambda x: (x, weight)),
        (torchext.linear_relu, lambda *a: F.relu(F.linear(*a)), lambda x: (weight, x)),
    ):
        ours, stock, arguments = calls
        results = []
        for function in (ours, stock):
            x = make()
            results.append(function(*arguments(x)))
        assert results[0].shape == results[1].shape
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_threads_do_not_disturb_each_other() -> None:
    """The kernels of two threads at once, forward and backward, each with its own data."""
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(20):
                x = torch.randn(40, 30, generator=generator, requires_grad=True)
                w = torch.randn(20, 30, generator=generator, requires_grad=True)
                target = torch.randint(20, (40,), generator=generator)
                gradients = [
                    torch.autograd.grad(loss, (x, w))
                    for loss in (
                        torchext.cross_entropy(torchext.linear_relu(x, w), target),
                        F.cross_entropy(F.relu(F.linear(x, w)), target),
                    )
                ]
                torch.testing.assert_close(gradients[0], gradients[1])
        except BaseException as error:  # handed to the main thread
            errors.append(error)

    with torchext.use_backend("native"):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_devices_and_backends_for_tests() -> None:
    assert testing.devices()[0] == "cpu"
    assert testing.backends_for("cpu") == ["auto", "native", "eager"]
    assert set(testing.TOLERANCES) == set(_backend.FLOATING)


def test_the_comparison_with_the_truth_finds_wrong_results() -> None:
    """The suites' own measure: it passes what is as good as stock, and nothing else."""
    truth = torch.randn(50, dtype=torch.float64)
    eager = truth.float()
    testing.assert_close_to_truth(eager.clone(), eager, truth)
    wrong = [eager + 1e-4, eager.double(), eager[:49], eager.clone(), eager.clone()]
    wrong[3][7], wrong[4][7] = float("nan"), float("inf")
    for actual in wrong:
        with pytest.raises(AssertionError):
            testing.assert_close_to_truth(actual, eager, truth)
    nan = eager.clone()
    nan[3] = float("nan")
    exact = truth.clone()
    exact[3] = float("nan")
    testing.assert_close_to_truth(nan, nan, exact)
    with pytest.raises(AssertionError, match="NaN"):
        testing.assert_close_to_truth(eager, nan, exact)
    with pytest.raises(AssertionError):
        testing.assert_drop_in(torch.tanh, torch.atan, eager.requires_grad_())
    with pytest.raises(AssertionError):  # the same value, another gradient
        testing.assert_drop_in(lambda x: x.detach() + 0 * x, torch.clone, eager)
    with pytest.raises(AssertionError):  # an argument that changed
        testing.assert_drop_in(lambda x: x.data.add_(1) - 1 + 0 * x, torch.clone, eager)

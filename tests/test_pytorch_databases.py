"""Every sample of PyTorch's own test databases, as far as they ship in its wheel.

`op_db` has calls of `nn.functional.cross_entropy` and `nn.functional.linear` (with ReLU after it
here), `module_db` has inputs of `nn.CrossEntropyLoss`. Values, first and second derivatives are
stock's, with random upstream gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import torchext
from torchext.testing import assert_drop_in

OPS = {
    info.name: info
    for info in op_db
    if info.name in ("nn.functional.cross_entropy", "nn.functional.linear")
}
(LOSS,) = (info for info in module_db if info.module_cls is nn.CrossEntropyLoss)


def stock_linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def truth_of(output: Tensor) -> Callable[..., Tensor]:
    """The linear function on the branches of ReLU that the output took."""
    mask = (output > 0).double()
    return lambda *args: F.linear(*args) * mask


def samples(name: str, device: str, dtype: torch.dtype) -> list[Any]:
    return list(OPS[name].sample_inputs(device, dtype, requires_grad=True))


@pytest.mark.parametrize("order", [1, 2])
def test_cross_entropy_samples(backend: str, device: str, dtype: torch.dtype, order: int) -> None:
    found = samples("nn.functional.cross_entropy", device, dtype)
    for sample in found:
        # One derivative for the logits alone, where the kernel serves it, and one for all.
        for keep in (True, False):
            args = [x.detach().requires_grad_(x.requires_grad and keep) for x in sample.args]
            call = (sample.input, *args)
            assert_drop_in(
                torchext.cross_entropy, F.cross_entropy, *call, order=order, **sample.kwargs
            )
    assert len(found) > 0


@pytest.mark.parametrize("order", [1, 2])
def test_linear_samples(backend: str, device: str, dtype: torch.dtype, order: int) -> None:
    found = samples("nn.functional.linear", device, dtype)
    for sample in found:
        assert not sample.kwargs
        call = (sample.input, *sample.args)
        # Second derivatives in narrow dtypes are long sums of rounded products, in any order.
        assert_drop_in(
            torchext.linear_relu, stock_linear_relu, *call, order=order, truth_of=truth_of
        )
    assert len(found) > 0


@pytest.mark.parametrize(
    "dtype", sorted(OPS["nn.functional.linear"].supported_dtypes("cpu"), key=str), ids=str
)
def test_linear_samples_of_every_dtype(backend: str, device: str, dtype: torch.dtype) -> None:
    """Integers and complex numbers too: what stock computes, or its refusal."""
    found = list(OPS["nn.functional.linear"].sample_inputs(device, dtype))
    for sample in found:
        try:
            expected = stock_linear_relu(sample.input, *sample.args)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                torchext.linear_relu(sample.input, *sample.args)
        else:
            result = torchext.linear_relu(sample.input, *sample.args)
            torch.testing.assert_close(result, expected)
    assert len(found) > 0


def test_forward_over_reverse_of_the_samples(backend: str, device: str) -> None:
    for name, ours, stock in (
        ("nn.functional.cross_entropy", torchext.cross_entropy, F.cross_entropy),
        ("nn.functional.linear", torchext.linear_relu, stock_linear_relu),
    ):
        found = samples(name, device, torch.float64)
        for sample in found:
            results = []
            for function in (ours, stock):

                def value(x: Tensor, f: Any = function, s: Any = sample) -> Tensor:
                    args = [arg.detach() for arg in s.args]
                    return f(x, *args, **s.kwargs).sin().sum()

                x = sample.input.detach()
                results.append(torch.func.jvp(torch.func.grad(value), (x,), (x.cos(),)))
            torch.testing.assert_close(*results)
        assert len(found) > 0


def module_inputs(device: str, dtype: torch.dtype) -> list[Any]:
    return list(
        LOSS.module_inputs_func(LOSS, device=device, dtype=dtype, requires_grad=True, training=True)
    )


def rounded_terms(wide: Any, x: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """What the terms of a loss, and of its gradient, are rounded by.

    Class weights of both signs leave that of a small sum.
    """
    if wide.weight is None:
        return 0.0, 0.0
    x, target = x.detach().double(), target.double() if target.is_floating_point() else target
    rows, sizes = copy.deepcopy(wide), copy.deepcopy(wide)
    rows.reduction = sizes.reduction = "none"
    sizes.weight = sizes.weight.abs()
    terms = sizes(x, target)
    share = 1.0
    if wide.reduction == "mean":
        share = float((wide(x, target) / rows(x, target).sum()).abs())
    total = float(terms.max() if wide.reduction == "none" else terms.sum())
    # A logit's gradient is the softmax times a row's weight, less a weight.
    eps = torch.finfo(dtype).eps
    return eps * share * total, eps * share * 2 * float(sizes.weight.max())


def test_module_samples(backend: str, device: str, dtype: torch.dtype) -> None:
    found = module_inputs(device, dtype)
    for sample in found:
        build = sample.constructor_input
        ours = torchext.nn.CrossEntropyLoss(*build.args, **build.kwargs)
        stock = nn.CrossEntropyLoss(*build.args, **build.kwargs)
        input, target = sample.forward_input.args
        assert not sample.forward_input.kwargs
        wide = copy.deepcopy(stock).double()

        def reference(x: Tensor, t: Tensor, stock: Any = stock, wide: Any = wide) -> Tensor:
            module = wide if x.dtype == torch.float64 else stock
            return module(x, t)  # type: ignore[no-any-return]

        for order in (1, 2):
            floors = rounded_terms(wide, input, target.detach(), dtype)
            assert_drop_in(ours, reference, input, target.detach(), order=order, floors=floors)
        states = ours.state_dict(), stock.state_dict()
        assert list(states[0]) == list(states[1])
        for key in states[0]:
            assert torch.equal(states[0][key], states[1][key])
        ours.load_state_dict(states[1])
    assert len(found) > 0


@pytest.mark.skipif(
    LOSS.module_error_inputs_func is None, reason="this torch has no wrong calls of it"
)
def test_module_error_samples(backend: str, device: str) -> None:
    found = LOSS.module_error_inputs_func(
        LOSS, device=device, dtype=torch.float32, requires_grad=False, training=False
    )
    for sample in found:
        build = sample.module_error_input.constructor_input
        call = sample.module_error_input.forward_input
        errors = []
        for module_class in (torchext.nn.CrossEntropyLoss, nn.CrossEntropyLoss):
            with pytest.raises(Exception) as info:  # noqa: B017  # which one is the question
                module_class(*build.args, **build.kwargs)(*call.args, **call.kwargs)
            errors.append(info.type)
        assert errors[0] is errors[1] is sample.error_type
    assert len(found) > 0


@pytest.mark.parametrize("name", OPS)
def test_error_samples_of_functions(name: str, device: str) -> None:
    """torch 2.13 has none for these; when it does they run here."""
    if OPS[name].error_inputs_func is None:
        return
    ours = {"nn.functional.cross_entropy": torchext.cross_entropy}.get(name, torchext.linear_relu)
    for sample in OPS[name].error_inputs(device):
        call = sample.sample_input
        with torchext.use_backend("native"), pytest.raises(sample.error_type):
            ours(call.input, *call.args, **call.kwargs)

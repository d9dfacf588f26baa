"""Every sample of PyTorch's databases of linear_cross_entropy and its module, and every error.

Samples differ by `options`, too, which say how stock computes: ours has nothing to choose.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrow_errors import Narrow
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import torchext
from torchext import reference
from torchext.testing import assert_drop_in

NAME = "nn.functional.linear_cross_entropy"
INFOS = [info for info in op_db if info.name == NAME]
LOSSES = [info for info in module_db if info.module_cls.__name__ == "LinearCrossEntropyLoss"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]

pytestmark = pytest.mark.skipif(
    not INFOS or not LOSSES, reason="torch has linear_cross_entropy and its module from 2.13"
)


def without_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "options"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype) -> None:
    """Values and gradients, and in float64 second derivatives."""
    count, narrow = 0, Narrow()
    for sample in (s for i in INFOS for s in i.sample_inputs("cpu", dtype, requires_grad=True)):
        arguments, kwargs = [sample.input, *sample.args], without_options(sample.kwargs)
        if dtype == torch.bfloat16:
            ours, eager = torchext.linear_cross_entropy, reference.linear_cross_entropy
            narrow.add(ours, eager, arguments, kwargs)
        else:
            order = 2 if dtype == torch.float64 else 1
            ours, stock = torchext.linear_cross_entropy, F.linear_cross_entropy
            assert_drop_in(ours, stock, *arguments, order=order, **kwargs)
        count += 1
    assert count > 300
    assert narrow.ours <= narrow.eager


def test_error_samples() -> None:
    count = 0
    for info in INFOS:
        for sample in info.error_inputs("cpu"):
            call = sample.sample_input
            arguments, kwargs = (call.input, *call.args), without_options(call.kwargs)
            with pytest.raises(Exception) as stock:  # noqa: B017  # which one is the question
                F.linear_cross_entropy(*arguments, **kwargs)
            for extras in ({}, {"z_loss": 0.1}):
                with pytest.raises(Exception) as ours:  # noqa: B017
                    torchext.linear_cross_entropy(*arguments, **kwargs, **extras)
                assert ours.type is stock.type is sample.error_type
            count += 1
    assert count > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_samples(dtype: torch.dtype) -> None:
    (info,) = LOSSES
    count, narrow = 0, Narrow()
    for sample in info.module_inputs_func(info, "cpu", dtype, True, training=True):
        build = sample.constructor_input
        kwargs = {"dtype": dtype, **without_options(build.kwargs)}
        ours = torchext.nn.LinearCrossEntropyLoss(*build.args, **kwargs)
        stock = nn.LinearCrossEntropyLoss(*build.args, **kwargs)
        assert list(ours.state_dict()) == list(stock.state_dict())
        ours.load_state_dict(stock.state_dict())
        input, target = sample.forward_input.args
        parameters = [parameter.detach().requires_grad_() for parameter in stock.parameters()]
        arguments = [input, target.detach(), *parameters]
        if dtype == torch.bfloat16:
            narrow.add(called(ours), called(definition_of(ours)), arguments, {})
        else:
            assert_drop_in(called(ours), called(stock), *arguments)
        count += 1
    assert count > 800
    assert narrow.ours <= narrow.eager


def called(module: nn.Module) -> Any:
    """A module as a function of its parameters too, in float64 where they are."""
    wide = copy.deepcopy(module).double()

    def run(input: Tensor, target: Tensor, *parameters: Tensor) -> Tensor:
        chosen = wide if input.dtype == torch.float64 else module
        names = [name for name, _ in module.named_parameters()]
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(chosen, state, (input, target))  # type: ignore[no-any-return]

    return run


def definition_of(module: nn.Module) -> nn.Module:
    """The module, made of the two stock ops."""

    class Definition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(module)
            self.linear = self.inner.linear

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            with torchext.use_backend("eager"):
                return self.inner(input, target)  # type: ignore[no-any-return]

    return Definition()


def test_module_error_samples() -> None:
    (info,) = LOSSES
    count = 0
    for sample in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
    ):
        build = sample.module_error_input.constructor_input
        call = sample.module_error_input.forward_input
        errors = []
        for module in (torchext.nn.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss):
            with pytest.raises(Exception) as info_:  # noqa: B017
                loss = module(*build.args, **without_options(build.kwargs))
                loss(*call.args, **call.kwargs)
            errors.append(info_.type)
        assert errors[0] is errors[1] is sample.error_type
        count += 1
    assert count > 0

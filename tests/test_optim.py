"""`torchext.optim.SGD`: torch.optim.SGD to the bit, with all that hangs on an optimiser."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchext
from torchext import optim

SHAPES = ((64, 784), (64,), (3, 1000), (1,), (0, 4), (5, 17))


def pair(dtype: torch.dtype, **options: Any) -> tuple[torch.optim.SGD, torch.optim.SGD]:
    stock = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in SHAPES]
    ours = [param.detach().clone().requires_grad_() for param in stock]
    return torch.optim.SGD(stock, **options), optim.SGD(ours, **options)


def params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def random_gradients(*optimizers: torch.optim.Optimizer) -> None:
    for same in zip(*map(params, optimizers), strict=True):
        gradient = torch.randn_like(same[0])
        for param in same:
            param.grad = gradient.clone()


def assert_same(stock: torch.optim.Optimizer, ours: torch.optim.Optimizer) -> None:
    for first, second in zip(params(stock), params(ours), strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        momenta = [o.state[p].get("momentum_buffer") for o, p in ((stock, first), (ours, second))]
        assert (momenta[0] is None) == (momenta[1] is None)
        if momenta[0] is not None:
            torch.testing.assert_close(momenta[1], momenta[0], rtol=0, atol=0)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parameters of each call of the kernel."""
    calls: list[int] = []
    kernel = optim._kernel

    def counted(*arguments: Any) -> None:
        kernel(*arguments)
        calls.append(len(arguments[0]))

    monkeypatch.setattr(optim, "_kernel", counted)
    return calls


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lr=st.floats(1e-4, 1),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
)
def test_the_same_bits(dtype: torch.dtype, nesterov: bool, **options: Any) -> None:
    nesterov = nesterov and options["momentum"] > 0 and options["dampening"] == 0
    stock, ours = pair(dtype, nesterov=nesterov, **options)
    for _ in range(4):
        random_gradients(stock, ours)
        stock.step()
        ours.step()
    assert_same(stock, ours)


def test_the_kernel_makes_the_step(kernel_calls: list[int]) -> None:
    _, ours = pair(torch.float32, lr=0.1, momentum=0.9)
    for _ in range(3):
        random_gradients(ours)
        ours.step()
    assert kernel_calls == [len(SHAPES)] * 2  # the first step makes the momentum


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stock, ours = pair(torch.float32, lr=0.1, momentum=0.9)
        for _ in range(3):
            random_gradients(stock, ours)
            stock.step()
            ours.step()
    finally:
        torch.set_num_threads(before)
    assert_same(stock, ours)


def unusual(name: str, stock: torch.optim.SGD, ours: torch.optim.SGD) -> None:
    """Gives both optimisers something that the kernel does not serve, or not alone."""
    for optimizer in (stock, ours):
        first, *_, last = params(optimizer)
        if name == "no gradient":
            first.grad = None
        elif name == "strided gradient":
            first.grad = first.grad.t().contiguous().t()  # type: ignore[union-attr]
        elif name == "sparse gradient":
            last.grad = last.grad.to_sparse()  # type: ignore[union-attr]
        elif name == "lr of a tensor":
            optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
        elif name == "groups":
            optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)], "lr": 0.3})
            params(optimizer)[-1].grad = torch.tensor([1.0, 2.0, 3.0])
        elif name == "a group of bfloat16":
            half = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
            optimizer.add_param_group({"params": [half], "lr": 0.3})
            half.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "name",
    [
        "no gradient",
        "strided gradient",
        "sparse gradient",
        "lr of a tensor",
        "groups",
        "a group of bfloat16",
    ],
)
def test_what_the_kernel_does_not_serve(name: str, momentum: float) -> None:
    stock, ours = pair(torch.float32, lr=0.1, momentum=momentum)
    for _ in range(3):
        random_gradients(stock, ours)
        if "group" not in name or len(stock.param_groups) == 1:
            unusual(name, stock, ours)
        stock.step()
        ours.step()
    assert_same(stock, ours)


def test_closure_scheduler_state_dict_and_deepcopy() -> None:
    stock, ours = pair(torch.float64, lr=0.1, momentum=0.9)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (stock, ours)]
    for _ in range(5):
        random_gradients(stock, ours)
        assert stock.step(lambda: 3.0) == ours.step(lambda: 3.0) == 3.0
        random_gradients(stock, ours)
        stock.step()
        ours.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_same(stock, ours)
    state = ours.state_dict()
    assert state.keys() == stock.state_dict().keys()
    assert copy.deepcopy(ours).state_dict()["param_groups"] == state["param_groups"]
    fresh = optim.SGD([p.detach().clone().requires_grad_() for p in params(stock)], lr=1)
    fresh.load_state_dict(copy.deepcopy(stock.state_dict()))
    random_gradients(stock, fresh)
    stock.step()
    fresh.step()
    assert_same(stock, fresh)


def test_hooks_and_the_profiler_see_the_step() -> None:
    _, ours = pair(torch.float32, lr=0.1)
    seen: list[str] = []
    ours.register_step_pre_hook(lambda *_: seen.append("before"))
    ours.register_step_post_hook(lambda *_: seen.append("after"))
    random_gradients(ours)
    ours.step()
    assert seen == ["before", "after"]
    with torch.profiler.profile() as profile:
        ours.step()
        ours.zero_grad()
    names = {event.name for event in profile.events()}
    assert {"Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"} <= names


def test_a_changed_parameter_is_noticed() -> None:
    """Backward must not go through weights that the step changed."""
    weight = torch.randn(3, 3, requires_grad=True)
    ours = optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(3, 3)
    loss = (torch.randn(3, 3, requires_grad=True) @ weight).sum()
    ours.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_zero_grad() -> None:
    _, ours = pair(torch.float32, lr=0.1)
    random_gradients(ours)
    ours.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(param.grad) == 0 for param in params(ours))  # type: ignore[arg-type]
    ours.zero_grad()
    assert all(param.grad is None for param in params(ours))


def test_refusals_change_nothing() -> None:
    param, grad = torch.ones(4), torch.ones(3)
    for arguments, message in (
        (([param], [grad], []), r"grads\[0\]"),
        (([param], [], []), "as many grads"),
        (([param], [param], [param]), "0 momentum_buffers"),
        (([param.half()], [param.half()], []), "float32 or float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.torchext.sgd_(*arguments, 0.1, 0, 0, 0, False, False)
    assert torch.equal(param, torch.ones(4))


@pytest.mark.parametrize("what", ["gradient", "momentum"])
def test_a_refused_group_does_not_make_the_others_step_twice(what: str) -> None:
    stock, ours = pair(torch.float32, lr=0.1, momentum=0.9)
    for optimizer in (stock, ours):
        param = torch.ones(3, requires_grad=True)
        param.grad_dtype = None  # any
        optimizer.add_param_group({"params": [param], "lr": 0.3})
    for _ in range(3):
        random_gradients(stock, ours)
        for optimizer in (stock, ours):
            last = params(optimizer)[-1]
            assert last.grad is not None
            if what == "gradient":
                last.grad = last.grad.double()
            elif "momentum_buffer" in optimizer.state[last]:
                momentum = optimizer.state[last]["momentum_buffer"]
                optimizer.state[last]["momentum_buffer"] = momentum.double()
            optimizer.step()
    assert_same(stock, ours)


def test_momentum_of_another_shape_is_refused() -> None:
    for optimizer in pair(torch.float32, lr=0.1, momentum=0.9):
        weight = params(optimizer)[0]
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        momentum = optimizer.state[weight]["momentum_buffer"]
        optimizer.state[weight]["momentum_buffer"] = momentum.t().contiguous()
        before = weight.detach().clone()
        with pytest.raises(RuntimeError, match="size"):
            optimizer.step()
        torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0)


def test_opcheck() -> None:
    tensors = [[torch.randn(5, 3), torch.randn(2)] for _ in range(3)]
    torch.library.opcheck(
        torch.ops.torchext.sgd_.default, (*tensors, 0.1, 0.9, 0.1, 0.01, False, True)
    )


def test_use_backend_eager_takes_the_stock_step(kernel_calls: list[int]) -> None:
    _, ours = pair(torch.float32, lr=0.1)
    random_gradients(ours)
    with torchext.use_backend("eager"):
        ours.step()
    assert kernel_calls == []


def overlapping(optimizer: type[torch.optim.SGD], momentum: float) -> Tensor:
    """A flat buffer after some steps of parameters that are parts of it."""
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(400_000, generator=generator)
    parts = [flat, flat[:200_000], flat[100_000:300_000], flat[:300_000].view(100, 3000)]
    made = [torch.nn.Parameter(part) for part in parts]
    steps = optimizer(made, lr=0.1, weight_decay=0.1, momentum=momentum)
    for _ in range(10):
        for param in made:
            param.grad = torch.randn(param.shape, generator=generator)
        steps.step()
    return flat


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_that_share_memory_are_updated_one_after_another(momentum: float) -> None:
    assert torch.equal(overlapping(optim.SGD, momentum), overlapping(torch.optim.SGD, momentum))


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_factor_that_float32_does_not_hold_is_refused(option: str) -> None:
    for optimizer in (torch.optim.SGD, optim.SGD):
        param = torch.nn.Parameter(torch.ones(3))
        steps = optimizer([param], **{"lr": 0.1, "momentum": 0.5})
        param.grad = torch.ones(3)
        steps.step()
        before = param.detach().clone()
        steps.param_groups[0][option] = 1e39
        with pytest.raises(RuntimeError, match="without overflow"):
            steps.step()
        assert torch.equal(param, before)


def test_inference_tensors_are_refused_as_by_stock() -> None:
    for optimizer in (torch.optim.SGD, optim.SGD):
        with torch.inference_mode():
            param = torch.nn.Parameter(torch.ones(3))
            steps = optimizer([param], lr=0.1)
            param.grad = torch.ones(3)
            steps.step()
        with pytest.raises(RuntimeError, match="inference tensor"):
            steps.step()

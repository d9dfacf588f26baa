"""The modules: drop-ins for their stock namesakes in every way that a module is used."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

import torchext

PAIRS = [
    (torchext.nn.CrossEntropyLoss, nn.CrossEntropyLoss),
    (torchext.nn.LinearReLU, nn.Linear),
]
LOSSES: list[dict[str, Any]] = [
    {},
    {"weight": torch.linspace(0.5, 2, 5), "label_smoothing": 0.1},
    {"ignore_index": 2, "reduction": "sum"},
    {"reduction": "none"},
]


@pytest.fixture(autouse=True)
def native() -> Any:
    with torchext.use_backend("native"):
        yield


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_the_constructor_is_stocks_with_keyword_extras(ours: type, stock: type) -> None:
    expected = list(inspect.signature(stock).parameters.values())
    actual = list(inspect.signature(ours).parameters.values())
    for one, other in zip(actual, expected, strict=False):
        assert (one.name, one.kind, one.default) == (other.name, other.kind, other.default)
    assert all(extra.kind is inspect.Parameter.KEYWORD_ONLY for extra in actual[len(expected) :])
    assert issubclass(ours, stock)


def test_functions_have_stocks_signatures() -> None:
    for ours, stock in ((torchext.cross_entropy, nn.functional.cross_entropy),):
        expected = inspect.signature(stock).parameters
        actual = inspect.signature(ours).parameters
        assert list(actual)[: len(expected)] == list(expected)
        for name, parameter in expected.items():
            assert actual[name].default == parameter.default
            assert actual[name].kind == parameter.kind
        for name in list(actual)[len(expected) :]:
            assert actual[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(inspect.signature(torchext.linear_relu).parameters) == ["input", "weight", "bias"]


@pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch 2.13 was the first to have it"
)
def test_linear_cross_entropy_has_stocks_signature_but_for_options() -> None:
    for ours, stock in (
        (torchext.nn.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss),
        (torchext.linear_cross_entropy, nn.functional.linear_cross_entropy),
    ):
        expected = dict(inspect.signature(stock).parameters)
        del expected["options"]  # of its chunks, which here are the rule
        actual = dict(inspect.signature(ours).parameters)
        assert list(actual)[: len(expected)] == list(expected)
        for name, parameter in expected.items():
            assert (actual[name].kind, actual[name].default) == (parameter.kind, parameter.default)
        extras = [actual[name].kind for name in list(actual)[len(expected) :]]
        assert set(extras) == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_loss_forward_and_state(options: dict[str, Any]) -> None:
    ours, stock = torchext.nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())
    x, target = torch.randn(6, 5), torch.randint(5, (6,))
    torch.testing.assert_close(ours(x, target), stock(x, target))
    torch.testing.assert_close(ours(input=x, target=target), stock(x, target))
    with torch.no_grad():
        if ours.weight is not None:
            ours.weight.mul_(2), stock.weight.mul_(2)
    ours.double(), stock.double()
    torch.testing.assert_close(ours(x.double(), target), stock(x.double(), target))


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_loss_takes_positional_and_deprecated_arguments() -> None:
    weight = torch.rand(5)
    for arguments in ((weight, None, 2, None, "sum", 0.1), (None, False), (None, None, 1, False)):
        ours, stock = torchext.nn.CrossEntropyLoss(*arguments), nn.CrossEntropyLoss(*arguments)
        assert ours.reduction == stock.reduction
        x, target = torch.randn(6, 5), torch.randint(5, (6,))
        torch.testing.assert_close(ours(x, target), stock(x, target))


def test_linear_relu_has_linears_parameters() -> None:
    for bias, dtype in ((True, torch.float32), (False, torch.float64)):
        torch.manual_seed(3)
        ours = torchext.nn.LinearReLU(4, 5, bias=bias, dtype=dtype)
        torch.manual_seed(3)
        stock = nn.Linear(4, 5, bias=bias, dtype=dtype)
        assert list(ours.state_dict()) == list(stock.state_dict())
        for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
            assert torch.equal(one, other)
        x = torch.randn(3, 4, dtype=dtype)
        torch.testing.assert_close(ours(x), stock(x).relu())
        ours.load_state_dict(stock.state_dict())


def test_linear_relu_is_made_on_a_device() -> None:
    layer = torchext.nn.LinearReLU(4, 5, device="meta")
    assert layer(torch.empty(3, 4, device="meta")).shape == (3, 5)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(3, 4)).shape == (3, 5)
    with torch.device("meta"):
        assert torchext.nn.LinearReLU(2, 3).weight.is_meta


def test_representations() -> None:
    assert repr(torchext.nn.LinearReLU(4, 5)) == (
        "LinearReLU(in_features=4, out_features=5, bias=True)"
    )
    assert repr(torchext.nn.CrossEntropyLoss()).startswith("CrossEntropyLoss(")


MODULES = [
    lambda: torchext.nn.LinearReLU(4, 5),
    lambda: torchext.nn.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1, ignore_index=1),
    lambda: torchext.nn.CrossEntropyLoss(inplace_backward=True),
]


def output_of(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.CrossEntropyLoss):
        return module(x @ torch.ones(4, 5), torch.tensor([0, 1, 4]))  # type: ignore[no-any-return]
    return module(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", MODULES)
def test_copies_and_pickles(make: Any) -> None:
    module, x = make(), torch.randn(3, 4)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert type(other) is type(module)
        assert vars(other).keys() == vars(module).keys()
        torch.testing.assert_close(output_of(other, x), output_of(module, x))


def test_outputs_with_a_gradient_copy_and_pickle_as_stocks() -> None:
    """A detached result is an ordinary tensor."""
    x, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 4])
    loss = torchext.cross_entropy(x, target)
    assert type(loss) is Tensor
    assert loss.detach().item() == pickle.loads(pickle.dumps(loss.detach())).item()
    with pytest.raises(RuntimeError, match="[Oo]nly Tensors created explicitly"):
        copy.deepcopy(loss)


def test_parametrizations_and_functional_call() -> None:
    layer = torchext.nn.LinearReLU(4, 5)
    x = torch.randn(3, 4)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    expected = nn.functional.linear(x, layer.weight, layer.bias).relu()
    torch.testing.assert_close(layer(x), expected)
    nn.utils.parametrizations.weight_norm(other := torchext.nn.LinearReLU(4, 5))
    other(x).sum().backward()
    assert all(p.grad is not None for p in other.parameters())
    swapped = torch.func.functional_call(
        torchext.nn.LinearReLU(4, 5), {"weight": torch.ones(5, 4), "bias": torch.zeros(5)}, (x,)
    )
    torch.testing.assert_close(swapped, x.sum(1, keepdim=True).relu().expand(3, 5))


def _through(head: torchext.nn.LinearCrossEntropyLoss, x: Tensor, target: Tensor) -> list[Tensor]:
    """Loss and the input's gradient, and stock's of the same parameters, looked up as usual."""
    found = []
    for loss in (
        lambda given: head(given, target),
        lambda given: nn.functional.cross_entropy(
            nn.functional.linear(given, head.linear.weight, head.linear.bias), target, head.weight
        ),
    ):
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
        found += [value.detach(), *torch.autograd.grad(value, leaf)]
    return found


def test_the_heads_parameters_are_what_they_are_replaced_by() -> None:
    """Nothing is read where `nn.Module` would not find it: the modules look past its look-up."""
    x, target = torch.randn(6, 4), torch.randint(5, (6,))

    def check(head: torchext.nn.LinearCrossEntropyLoss) -> None:
        loss, gradient, *expected = _through(head, x, target)
        torch.testing.assert_close([loss, gradient], expected)

    head = torchext.nn.LinearCrossEntropyLoss(4, 5, bias=True, weight=torch.rand(5))
    check(head)
    parametrize.register_parametrization(head.linear, "weight", nn.Tanh())
    parametrize.register_parametrization(head.linear, "bias", nn.Tanh())
    check(head)
    head.linear = nn.Linear(4, 5)
    check(head)
    head.weight = torch.rand(5)
    check(head)
    head.weight = None
    check(head)
    del head.linear.weight  # as the old hooks of weight_norm do
    head.linear.weight = torch.randn(5, 4)
    check(head)
    other = torchext.nn.LinearCrossEntropyLoss(4, 5)
    swapped = {"linear.weight": torch.randn(5, 4)}
    torch.testing.assert_close(
        torch.func.functional_call(other, swapped, (x, target)),
        nn.functional.cross_entropy(x @ swapped["linear.weight"].T, target),
    )


def test_the_losss_weight_is_what_it_is_replaced_by() -> None:
    x, target = torch.randn(6, 5), torch.randint(5, (6,))
    ours, stock = torchext.nn.CrossEntropyLoss(weight=torch.rand(5)), nn.CrossEntropyLoss()
    for weight in (torch.rand(5), None, torch.rand(5)):
        ours.weight = stock.weight = weight
        torch.testing.assert_close(ours(x, target), stock(x, target))
    del ours.weight
    ours.weight = stock.weight = torch.rand(5)
    assert "weight" not in ours._buffers
    torch.testing.assert_close(ours(x, target), stock(x, target))


def test_hooks() -> None:
    layer, seen = torchext.nn.LinearReLU(4, 5), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.register_full_backward_hook(lambda module, given, got: seen.append(got[0].shape))
    layer(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert seen == [(3, 5), (3, 5)]


@pytest.mark.parametrize("name", ["native", "auto", "eager"])
def test_training_is_stocks_training(name: str) -> None:
    """Thirty steps in float64: the same parameters at the end."""
    data, target = torch.randn(64, 12, dtype=torch.float64), torch.randint(7, (64,))
    ends = []
    for fused in (True, False):
        torch.manual_seed(5)
        hidden = torchext.nn.LinearReLU(12, 9) if fused else nn.Linear(12, 9)
        layers = [hidden, *([] if fused else [nn.ReLU()]), nn.Linear(9, 7)]
        model = nn.Sequential(*layers).double()
        criterion = (torchext.nn if fused else nn).CrossEntropyLoss(label_smoothing=0.05)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with torchext.use_backend(name):
            for _ in range(30):
                optimizer.zero_grad()
                loss = criterion(model(data), target)
                loss.backward()
                optimizer.step()
        ends.append([loss.detach(), *(p.detach() for p in model.parameters())])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-10)


def test_public_names() -> None:
    for name in ("cross_entropy", "linear_relu", "nn", "use_backend", "backends"):
        assert name in torchext.__all__
    for name in torchext.__all__:
        assert getattr(torchext, name) is not None
    for name in ("CrossEntropyLoss", "LinearReLU"):
        assert name in torchext.nn.__all__

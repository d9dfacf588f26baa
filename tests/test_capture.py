"""Both ops captured: torch.compile, export, make_fx, fake and meta tensors, TorchScript."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import torchext


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


class Model(nn.Module):
    """The two ops, ours or stock, from the same parameters."""

    def __init__(self, fused: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torchext.nn.LinearReLU(6, 8) if fused else nn.Linear(6, 8)
        self.head = nn.Linear(8, 5)
        self.fused = fused
        self.loss = (torchext.nn if fused else nn).CrossEntropyLoss(**options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.first(x)
        return self.loss(self.head(x if self.fused else F.relu(x)), target)  # type: ignore[no-any-return]


def train_step(model: Callable[..., Tensor], x: Tensor, target: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    loss = model(x, target)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return [loss.detach(), gradient]


def batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6), torch.randint(5, (rows,))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["inductor"])
def test_compile_the_whole_model(compiler: str, dynamic: bool) -> None:
    fused, stock = Model(True, label_smoothing=0.1), Model(False, label_smoothing=0.1)
    compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (4, 9, 17) if dynamic else (4,):
        x, target = batch(rows)
        torch.testing.assert_close(train_step(compiled, x, target), train_step(stock, x, target))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, target), stock(x, target))


def test_dynamic_shapes_do_not_compile_again() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(Model(True), fullgraph=True, dynamic=True, backend=counter)
    for rows in (4, 9, 17, 333, 7000):  # below and above any size at which `auto` changes its mind
        compiled(*batch(rows))
    assert counter.frame_count == 1


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "ignore_index": 1},
    {"weight": torch.linspace(0.5, 2, 5), "label_smoothing": 0.2},
    {"inplace_backward": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_compile_every_kind_of_loss(options: dict[str, Any], dense: bool) -> None:
    if dense and "ignore_index" in options:
        options = {"reduction": "sum"}
    stock = {key: value for key, value in options.items() if key != "inplace_backward"}
    for shape in ((7, 5), (3, 5, 4), (5,)):
        x = torch.randn(shape)
        dim = min(x.dim() - 1, 1)
        target = x.sin().softmax(dim) if dense else x.cos().argmax(dim)
        compiled = torch.compile(
            lambda x, t: torchext.cross_entropy(x * 1, t, **options),
            fullgraph=True,
            backend="aot_eager",
        )
        expected = train_step(lambda x, t: F.cross_entropy(x, t, **stock), x, target)
        torch.testing.assert_close(train_step(compiled, x, target), expected)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced"])
def test_compile_with_strides(layout: str) -> None:
    """What the fake kernel says of strides is what the kernel gives."""
    x = torch.randn(6, 5, 4)
    x = {
        "transposed": lambda: x.movedim(0, -1).contiguous().movedim(-1, 0),
        "channels_last": lambda: x.movedim(1, -1).contiguous().movedim(-1, 1),
        "sliced": lambda: torch.randn(12, 5, 8)[::2, :, ::2],
    }[layout]()
    for logits, reduction in itertools.product((x, x[:, :, :1], x[:, :, 0]), ("mean", "none")):
        target = torch.randint(5, (6, *logits.shape[2:]))
        compiled = torch.compile(
            lambda x, t, r=reduction: torchext.cross_entropy(x, t, reduction=r),
            fullgraph=True,
            backend="aot_eager",
        )
        expected = train_step(
            lambda x, t, r=reduction: F.cross_entropy(x, t, reduction=r), logits, target
        )
        torch.testing.assert_close(train_step(compiled, logits, target), expected)


def test_compile_under_autocast_and_with_a_backend_chosen() -> None:
    x, target = batch(6)
    for name in ("native", "eager"):
        for model in (Model(True), Model(False)):
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            with torchext.use_backend(name), torch.autocast("cpu", torch.bfloat16):
                result = train_step(compiled, x, target)
                expected = train_step(model, x, target)
            assert result[0].dtype == expected[0].dtype == torch.float32
            torch.testing.assert_close(result, expected, rtol=3e-2, atol=3e-2)


def test_export_with_a_dynamic_batch() -> None:
    rows = torch.export.Dim("rows", min=2)
    for strict in (False, True):
        program = torch.export.export(
            Model(True), batch(4), dynamic_shapes=({0: rows}, {0: rows}), strict=strict
        )
        names = {str(node.target) for node in program.graph.nodes}
        assert any(name.startswith("torchext.linear_relu") for name in names)
        assert any(name.startswith("torchext.cross_entropy") for name in names)
        for size in (2, 9):
            x, target = batch(size)
            torch.testing.assert_close(program.module()(x, target), Model(False)(x, target))


@pytest.mark.parametrize("extras", [{"softcap": 3.0}, {"return_lse": True}], ids=str)
def test_export_extras_with_a_dynamic_batch(extras: dict[str, Any]) -> None:
    class Loss(nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Any:
            return torchext.cross_entropy(x, target, **extras)

    rows = torch.export.Dim("rows", min=2)
    given = (torch.randn(4, 20), torch.zeros(4, dtype=torch.long))
    program = torch.export.export(Loss(), given, dynamic_shapes=({0: rows}, {0: rows}))
    given = (torch.randn(7, 20), torch.arange(7))
    torch.testing.assert_close(program.module()(*given), Loss()(*given))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    weight = torch.randn(5, 6)

    def function(x: Tensor, target: Tensor) -> Tensor:
        return torchext.cross_entropy(torchext.linear_relu(x, weight), target)

    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*batch(4))
    for rows in (4, 9) if mode == "symbolic" else (4,):
        x, target = batch(rows)
        expected = F.cross_entropy(F.relu(F.linear(x, weight)), target)
        torch.testing.assert_close(graph(x, target), expected)


def test_make_fx_of_a_gradient() -> None:
    target = torch.tensor([0, 1, 4, 2])

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torchext.cross_entropy(x, target), x, torch.tensor(3.0))[0]

    graph = make_fx(gradient)(torch.randn(4, 5))
    x = torch.randn(4, 5, requires_grad=True)
    expected = torch.autograd.grad(3 * F.cross_entropy(x, target), x)[0]
    torch.testing.assert_close(graph(x.detach()), expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_fake_tensors_have_the_shapes_of_the_real_ones(reduction: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(6, 5, 4, dtype=dtype, requires_grad=True)
        target = torch.randint(5, (6, 4))
        real = train_step(lambda x, t: torchext.cross_entropy(x, t, reduction=reduction), x, target)
        with FakeTensorMode() as mode:
            fake = train_step(
                lambda x, t: torchext.cross_entropy(x, t, reduction=reduction),
                mode.from_tensor(x),
                mode.from_tensor(target),
            )
        for one, other in zip(fake, real, strict=True):
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def test_meta_tensors() -> None:
    x, weight, bias = (torch.empty(s, device="meta") for s in ((3, 4, 6), (5, 6), (5,)))
    output = torchext.linear_relu(x, weight, bias)
    assert output.is_meta
    assert output.shape == (3, 4, 5)
    target = torch.empty(3, 5, dtype=torch.int64, device="meta")
    for reduction in ("none", "mean"):
        ours = torchext.cross_entropy(output, target, reduction=reduction)
        assert ours.shape == F.cross_entropy(output, target, reduction=reduction).shape
        ops = torch.ops.torchext.cross_entropy_forward(
            output, target, None, ("none", "mean").index(reduction), -100, 0.0, False
        )
        assert ops[0].shape == ours.shape


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_script_the_loss(options: dict[str, Any]) -> None:
    module = torchext.nn.CrossEntropyLoss(**options)
    scripted = torch.jit.script(module)
    options = {key: value for key, value in options.items() if key != "inplace_backward"}
    stock = nn.CrossEntropyLoss(**options)
    for x, target in ((torch.randn(4, 5), torch.tensor([0, 3, 2, 4])),):
        torch.testing.assert_close(train_step(scripted, x, target), train_step(stock, x, target))


def test_script_the_functions() -> None:
    x = torch.randn(4, 5)
    scripted = torch.jit.script(torchext.linear_relu)
    weight, bias = torch.randn(3, 5, requires_grad=True), torch.randn(3)
    stock = F.relu(F.linear(x, weight, bias))
    torch.testing.assert_close(scripted(x, weight, bias), stock)
    torch.testing.assert_close(scripted(x, weight[0]), F.relu(F.linear(x, weight[0])))
    ours = torch.autograd.grad(scripted(x, weight, bias).square().sum(), weight)
    torch.testing.assert_close(ours, torch.autograd.grad(stock.square().sum(), weight))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("out_features", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_script_the_head_and_save_it(
    tmp_path: Any,
    reduction: str,
    probabilities: bool,
    out_features: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """The operator in the graph; loss and gradients of the module and of the one loaded again."""
    for options in (
        {"bias": True},
        {"weight": torch.rand(5) + 0.5, "label_smoothing": 0.1},
        {"ignore_index": 2} if not probabilities else {},
    ):
        module = torchext.nn.LinearCrossEntropyLoss(
            8, 5, out_features=out_features, reduction=reduction, **options
        ).to(dtype)
        scripted = torch.jit.script(module)
        assert "torchext::linear_cross_entropy_forward" in str(scripted.inlined_graph)
        scripted.save(tmp_path / "head.pt")
        loaded = torch.jit.load(tmp_path / "head.pt")
        cases = [((6, 8), (6, *out_features))]
        if not (out_features or probabilities):
            cases += [((8,), ()), ((2, 3, 8), (2, 3))]
        for input_shape, positions in cases:
            x = torch.randn(input_shape).to(dtype).requires_grad_()
            target = torch.randint(5, positions)
            if probabilities:
                target = torch.randn(6, 5, *out_features).softmax(1).to(dtype)
            with torchext.use_backend("native"):  # "auto" has torch's ops for such small calls
                stock = module(x, target)
            upstream = torch.randn_like(stock)
            expected = torch.autograd.grad(stock, (x, module.linear.weight), upstream)
            for other in (scripted, loaded):
                loss = other(x, target)
                assert loss.dtype == stock.dtype and loss.shape == stock.shape
                # A mean over no target but ignored ones is NaN.
                torch.testing.assert_close(loss, stock, equal_nan=True)
                found = torch.autograd.grad(loss, (x, other.linear.weight), upstream)
                torch.testing.assert_close(found, expected, equal_nan=True)


def test_script_refuses_what_the_head_refuses() -> None:
    head = torch.jit.script(torchext.nn.LinearCrossEntropyLoss(8, 5, ignore_index=1))
    with pytest.raises(Exception, match="no ignore_index with a target of probabilities"):
        head(torch.randn(3, 8), torch.rand(3, 5))
    with pytest.raises(Exception, match="TorchScript has no extras"):
        torch.jit.script(torchext.nn.LinearCrossEntropyLoss(8, 5, z_loss=0.1))(
            torch.randn(3, 8), torch.tensor([0, 1, 2])
        )


def test_script_a_model_and_save_it(tmp_path: Any) -> None:
    torch.jit.script(Model(True)).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    x, target = batch(7)
    torch.testing.assert_close(loaded(x, target), Model(False)(x, target))


def test_trace_with_gradients() -> None:
    traced = torch.jit.trace(Model(True), batch(4))
    for rows in (4, 9):
        x, target = batch(rows)
        expected = train_step(Model(False), x, target)
        torch.testing.assert_close(train_step(traced, x, target), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_traced_head(reduction: str) -> None:
    """The trace is checked without gradients, and serves calls with them and without."""
    head = torchext.nn.LinearCrossEntropyLoss(6, 5, bias=True, reduction=reduction)
    traced = torch.jit.trace(head, (torch.randn(4, 6), torch.randint(5, (4,))))
    x, target = torch.randn(9, 6, requires_grad=True), torch.randint(5, (9,))
    with torch.no_grad():
        torch.testing.assert_close(traced(x, target), head(x, target))
    leaves = (x, *head.parameters())
    upstream = torch.randn(9) if reduction == "none" else torch.randn(())
    found, expected = (
        torch.autograd.grad(module(x, target), leaves, upstream) for module in (traced, head)
    )
    torch.testing.assert_close(found, expected)


def test_opcheck_linear_relu() -> None:
    """Every op, with and without gradients, dynamic shapes, strides, leading dimensions."""
    forward, backward = (
        torch.ops.torchext.linear_relu_forward.default,
        torch.ops.torchext.linear_relu_backward.default,
    )
    for leading, grad, biased in [
        ((), False, True),
        ((3,), True, False),
        ((3,), True, True),
        ((2, 3), True, True),
        ((2, 0), True, True),
    ]:
        x, w = (torch.randn(*s, requires_grad=grad) for s in ((*leading, 4), (5, 4)))
        b = torch.randn(5, requires_grad=grad) if biased else None
        torch.library.opcheck(forward, (x, w, b))
        strided = torch.randn(4, 5, requires_grad=grad).t()
        torch.library.opcheck(forward, (x, strided, b))
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5)
    for needed in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(backward, (y.sin(), y.relu(), x, w, *needed))
    torch.library.opcheck(backward, (y.sin(), y.relu(), w, w, True, False, True))  # x is not read
    torch.library.opcheck(backward, (y[:1].expand(3, 5), y, x, w, True, True, True))
    torch.library.opcheck(backward, (y.t().contiguous().t(), y, x, w, True, True, True))


LOGITS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(4, 5),
    "unbatched": lambda: torch.randn(5),
    "positions": lambda: torch.randn(4, 5, 3, 2),
    "transposed": lambda: torch.randn(5, 4).t(),
    "transposed, one position": lambda: torch.randn(5, 4).t()[:, :, None],
    "channels last": lambda: torch.randn(4, 3, 5).transpose(1, 2),
    "one class": lambda: torch.randn(4, 1, 3),
    "one class, transposed": lambda: torch.randn(1, 4).t(),
    "one row of columns": lambda: torch.randn(5, 1).t(),
    "strided": lambda: torch.randn(8, 10, 3)[::2, ::2],
    "expanded": lambda: torch.randn(1, 5).expand(4, 5),
}


# opcheck's tests of shapes and strides, and with the slow one that compiles.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
EVERY = (*QUICK, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", LOGITS)
def test_opcheck_cross_entropy(name: str) -> None:
    op, x = torch.ops.torchext, LOGITS[name]().detach()
    dim = min(x.dim() - 1, 1)
    indices, dense, weight = x.argmax(dim), x.softmax(dim), torch.rand(x.shape[dim])
    utils = EVERY if name in ("rows", "positions") else QUICK
    for target, w, reduction, smoothing in (
        (indices, None, 0, 0.0),
        (indices.int(), weight, 1, 0.1),
        (dense, weight, 2, 0.0),
        (dense, None, 0, 0.1),
    ):
        args = (target, w, reduction, -100, smoothing)
        for logits, save in itertools.product((x, x.detach().requires_grad_()), (False, True)):
            if not save or reduction:
                sample = (logits, *args, save)
                torch.library.opcheck(op.cross_entropy_forward.default, sample, test_utils=utils)
        loss, stats, _ = op.cross_entropy_forward(x, *args, False)
        sample = (torch.randn_like(loss), x, *args[:2], stats, *args[2:])
        torch.library.opcheck(op.cross_entropy_backward.default, sample, test_utils=utils)
        if reduction and x.is_contiguous():
            sample = (x.clone(), *args)
            torch.library.opcheck(op.cross_entropy_forward_.default, sample, test_utils=utils)

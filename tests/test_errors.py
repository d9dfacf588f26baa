"""Bad input: the exception class of stock, and a message with op, argument, and what was received.

The class is what calling stock raises, here and now. `TABLE` has, for each call, the words that
the message must have beside the op's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchext

X = torch.linspace(-2, 2, 20).reshape(4, 5)  # logits
T = torch.tensor([0, 1, 2, 4])
P = X.softmax(1)
X3, T3 = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
I, W, B = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)  # noqa: E741


class Call:
    """One bad call and the words of its message: all of ``a|b``, either of ``a/b``."""

    def __init__(self, *args: Any, says: str, **kwargs: Any) -> None:
        self.args, self.kwargs, self.words = args, kwargs, says.split("|")


def target(*classes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(classes, dtype=dtype)


CROSS_ENTROPY = {
    # types
    "input is None": Call(None, T, says="input|NoneType"),
    "input is a list": Call([1.0], T, says="input|list"),
    "input is an array": Call(X.numpy(), T, says="input|ndarray"),
    "target is None": Call(X, None, says="target|NoneType"),
    "target is a list": Call(X, [0, 1, 2, 3], says="target|list"),
    "target is a number": Call(X, 3, says="target|int"),
    "weight is a list": Call(X, T, [1.0] * 5, says="weight|list"),
    "weight is a number": Call(X, T, 1.0, says="weight|float"),
    "ignore_index is a float": Call(X, T, ignore_index=1.0, says="ignore_index|float"),
    "ignore_index is None": Call(X, T, ignore_index=None, says="ignore_index|NoneType"),
    "ignore_index is a bool": Call(X, T, ignore_index=True, says="ignore_index|bool"),
    "ignore_index is text": Call(X, T, ignore_index="0", says="ignore_index|str"),
    "ignore_index overflows": Call(
        X, T, ignore_index=2**63, says="ignore_index|9223372036854775808"
    ),
    "label_smoothing is text": Call(X, T, label_smoothing="0", says="label_smoothing|str"),
    "label_smoothing is None": Call(X, T, label_smoothing=None, says="label_smoothing|NoneType"),
    # names
    "reduction": Call(X, T, reduction="avg", says="reduction|'avg'"),
    "reduction is None": Call(X, T, reduction=None, says="reduction|None"),
    "reduction is a list": Call(X, T, reduction=["mean"], says="reduction|['mean']"),
    "reduction is a number": Call(X, T, reduction=1, says="reduction|1"),
    # shapes
    "no dimensions": Call(X[0, 0], T[0], says="input|dimension"),
    "no dimensions, probability": Call(X[0, 0], P[0, 0], says="input|dimension"),
    "batch sizes": Call(X, T[:3], says="target|4|3"),
    "batch of none": Call(X, T[:0], says="target|4|0"),
    "d1": Call(X3, T3[:, :3], says="target|[2, 3, 4]|[2, 3]"),
    "d1 missing": Call(X3, T[:2], says="target|[2, 3, 4]|[2]"),
    "d1 too many": Call(X, T[:, None], says="target|[4, 5]|[4, 1]"),
    "unbatched": Call(X[0], T, says="target|[5]|[4]"),
    "unbatched, none": Call(X[0], T[:0], says="target|[5]|[0]"),
    "one class, index of input's shape": Call(X[0, :1], T[:1], says="target|[1]|Long/int64"),
    "indices of input's shape": Call(X, P.long(), says="target|[4, 5]|Long/int64"),
    "probabilities of another shape": Call(X, P[:, :3], says="target|[4, 5]|[4, 3]"),
    "probabilities of one row": Call(X, P[:1], says="target|[4, 5]|[1, 5]"),
    "probabilities for indices": Call(X, P[:, 0], says="target|[4, 5]|[4]"),
    "weight too short": Call(X, T, B[:4], says="weight|5|[4]"),
    "weight of two dimensions": Call(X, T, B[None], says="weight|5|[1, 5]"),
    "weight of no dimensions": Call(X, T, B[0], says="weight|5|[]"),
    "weight with probabilities": Call(X, P, B[:4], says="weight|5|[4]"),
    # dtypes
    "bool target": Call(X, T.bool(), says="target|Bool/bool"),
    "int16 target": Call(X, T.short(), says="target|Short/int16"),
    "float target": Call(X, T.float(), says="target|Float/float32"),
    "complex target": Call(X, P.to(torch.complex64), says="target|ComplexFloat/complex64"),
    "integer input": Call(X.long(), T, says="input|Long/int64"),
    "complex input": Call(X.to(torch.complex64), T, says="input|ComplexFloat/complex64"),
    "weight of another dtype": Call(X, T, B.double(), says="weight|Float/float32|Double/float64"),
    # values
    "class too large": Call(X, target(0, 1, 5, 2), says="target|5|out of bounds"),
    "class below zero": Call(X, target(0, 1, -1, 2), says="target|-1|out of bounds"),
    "class, int64 min": Call(X, target(0, 1, -(2**63), 2), says="target|-9223372036854775808"),
    "class in 3 dimensions": Call(X3, T3 + 3, says="target|3|out of bounds"),
    "class of no classes": Call(X[:, :0], T * 0, says="target|0|out of bounds"),
    "class, unbatched": Call(X[0], target(7)[0], says="target|7|out of bounds"),
    "class, weighted": Call(X, target(0, 1, 5, 2), B, says="target|5|out of bounds"),
    "class, smoothed": Call(X, target(9, 1, 3, 2), label_smoothing=0.1, says="target|9"),
    "class, none": Call(X, target(0, 1, 3, 77), reduction="none", says="target|77"),
    "label_smoothing above one": Call(X, T, label_smoothing=1.5, says="label_smoothing|1.5"),
    "label_smoothing, probabilities": Call(X, P, label_smoothing=2, says="label_smoothing|2"),
    "ignore_index with probabilities": Call(X, P, ignore_index=2, says="ignore_index|2"),
    # memory
    "sparse input": Call(X.to_sparse(), T, says="input|sparse"),
    "sparse target": Call(X, T.to_sparse(), says="target|sparse"),
    "mkldnn input": Call(X.to_mkldnn(), T, says="input|mkldnn"),
    "meta target": Call(X, T.to("meta"), says="target|meta"),
    # calls
    "no target": Call(X, says="target"),
    "unknown argument": Call(X, T, labels=T, says="labels"),
}

LINEAR_RELU = {
    "input is None": Call(None, W, says="input|NoneType"),
    "input is a list": Call([1.0], W, says="input|list"),
    "weight is None": Call(I, None, says="weight|NoneType"),
    "weight is an array": Call(I, W.numpy(), says="weight|ndarray"),
    "bias is a list": Call(I, W, [1.0] * 5, says="bias|list"),
    "bias is a number": Call(I, W, 1.0, says="bias|float"),
    "in_features": Call(I[:, :3], W, says="input|weight|[3, 3]|[5, 4]"),
    "in_features, one row": Call(I[0, :3], W, B, says="input|weight|[3]|[5, 4]"),
    "in_features, batched": Call(I[None, :, :3], W, B, says="input|weight|[1, 3, 3]|[5, 4]"),
    "no dimensions": Call(I[0, 0], W, says="input|dimension"),
    "weight of three dimensions": Call(I, W[None], says="weight|[1, 5, 4]"),
    "bias too short": Call(I, W, B[:4], says="bias|5|[4]"),
    "bias of no elements": Call(I, W, B[:0], says="bias|5|[0]"),
    "weight of another dtype": Call(I, W.double(), says="weight|Float/float32|Double/float64"),
    "half weight": Call(I, W.half(), B, says="weight|Float/float32|Half/float16"),
    "bias of another dtype": Call(I, W, B.double(), says="bias|Float/float32|Double/float64"),
    "integer weight": Call(I, W.long(), says="weight|Float/float32|Long/int64"),
    "complex bias": Call(
        I, W, B.to(torch.complex64), says="bias|Float/float32|ComplexFloat/complex64"
    ),
    "sparse bias": Call(I, W, B.to_sparse(), says="bias|sparse"),
    "no weight": Call(I, says="weight"),
    "unknown argument": Call(I, W, scale=2, says="scale"),
}

OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "cross_entropy": (torchext.cross_entropy, F.cross_entropy),
    "linear_relu": (
        torchext.linear_relu,
        lambda *args, **kwargs: F.relu(F.linear(*args, **kwargs)),
    ),
}
TABLE = [
    pytest.param(op, call, id=f"{op}: {name}")
    for op, calls in (("cross_entropy", CROSS_ENTROPY), ("linear_relu", LINEAR_RELU))
    for name, call in calls.items()
]


def raised(function: Callable[..., Tensor], call: Call) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: B017  # which one is the question
        function(*call.args, **call.kwargs)
    return info.value


@pytest.mark.parametrize("name", ["native", "auto"])
@pytest.mark.parametrize(("op", "call"), TABLE)
def test_bad_input(op: str, call: Call, name: str) -> None:
    ours, stock = OPS[op]
    expected = type(raised(stock, call))
    with torchext.use_backend(name):
        error = raised(ours, call)
    assert type(error) is expected
    for words in (op, *call.words):
        assert any(word in str(error) for word in words.split("/"))


@pytest.mark.parametrize("extras", [{"z_loss": 1e-3}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("call", CROSS_ENTROPY.values(), ids=CROSS_ENTROPY.keys())
def test_bad_input_beside_extras(call: Call, extras: dict[str, Any]) -> None:
    ours, stock = OPS["cross_entropy"]
    error = raised(ours, Call(*call.args, says="", **call.kwargs, **extras))
    assert type(error) is type(raised(stock, call))
    for words in ("cross_entropy", *call.words):
        assert any(word in str(error) for word in words.split("/"))


HEAD = (X, torch.eye(5), T)
EXTRAS = {
    "z_loss is text": Call(z_loss="a", says="z_loss|str"),
    "z_loss is None": Call(z_loss=None, return_lse=True, says="z_loss|NoneType"),
    "softcap is text": Call(softcap="a", says="softcap|str"),
    "logit_scale is a list": Call(logit_scale=[1.0], says="logit_scale|list"),
    "weight is a number": Call(weight=3, z_loss=0.1, says="weight|int"),
    "label_smoothing is None": Call(
        label_smoothing=None, z_loss=0.1, says="label_smoothing|NoneType"
    ),
}


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("call", EXTRAS.values(), ids=EXTRAS.keys())
def test_bad_extras(op: str, call: Call) -> None:
    args = (X, T) if op == "cross_entropy" else HEAD
    error = raised(getattr(torchext, op), Call(*args, says="", **call.kwargs))
    assert type(error) is TypeError
    assert all(word in str(error) for word in (op, *call.words))


def test_a_bias_that_is_no_tensor_beside_extras() -> None:
    with pytest.raises(TypeError, match="linear_cross_entropy: expected linear_bias .*int"):
        torchext.linear_cross_entropy(*HEAD, linear_bias=3, z_loss=0.1)


@pytest.mark.parametrize(("op", "call"), TABLE)
def test_bad_input_of_tensors_that_want_gradients(op: str, call: Call) -> None:
    """The path that saves for backward checks as much."""
    args = [
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in call.args
    ]
    if op == "cross_entropy":  # targets and weights stay as they are
        args[1:] = call.args[1:]
    wanted = Call(*args, says="", **call.kwargs)
    ours, stock = OPS[op]
    with torchext.use_backend("native"):
        assert type(raised(ours, wanted)) is type(raised(stock, wanted))


ACCEPTED = {
    "label_smoothing below zero": Call(X, T, label_smoothing=-0.1, says=""),
    "label_smoothing NaN": Call(X, T, label_smoothing=float("nan"), says=""),
    "label_smoothing below zero, probabilities": Call(X, P, label_smoothing=-0.1, says=""),
    "label_smoothing int": Call(X, T, label_smoothing=1, says=""),
    "label_smoothing bool": Call(X, T, label_smoothing=True, says=""),
    "label_smoothing tensor": Call(X, T, label_smoothing=torch.tensor(0.1), says=""),
    "label_smoothing numpy": Call(X, T, label_smoothing=X.numpy().mean() + 0.25, says=""),
    "ignore_index numpy": Call(X, T, ignore_index=T.numpy()[1], says=""),
    "ignore_index tensor": Call(X, T, ignore_index=torch.tensor(1), says=""),
    "ignore_index below zero with probabilities": Call(X, P, ignore_index=-1, says=""),
    "probabilities of another dtype": Call(X, P.double(), says=""),
    "half probabilities": Call(X, P.half(), says=""),
    "weight of another dtype with probabilities": Call(X, P, B.double(), says=""),
    "weight that broadcasts with probabilities": Call(X, P, B[:1], says=""),
    "unbatched with one target": Call(X[0], T[:1], says=""),
    "unbatched with one target, none": Call(X[0], T[:1], reduction="none", says=""),
}


@pytest.mark.parametrize("name", ["native", "auto"])
@pytest.mark.parametrize("call", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_odd_input_that_stock_takes(call: Call, name: str) -> None:
    """Or refuses: then so does ours, with the same class."""
    ours, stock = OPS["cross_entropy"]
    with torchext.use_backend(name):
        try:
            expected = stock(*call.args, **call.kwargs)
        except Exception as error:
            assert type(raised(ours, call)) is type(error)
        else:
            result = ours(*call.args, **call.kwargs)
            assert result.dtype == expected.dtype
            torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore:reduction='elementwise_mean' is deprecated")
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("name", ["native", "auto"])
def test_the_old_name_of_the_mean(op: str, name: str) -> None:
    ours = getattr(torchext, op)
    arguments = (X, T) if op == "cross_entropy" else (X, torch.eye(X.shape[1]), T)
    with torchext.use_backend(name):
        for extras in ({}, {"ignored_mean": "zero"}, {"logit_scale": 2.0}):
            torch.testing.assert_close(
                ours(*arguments, reduction="elementwise_mean", **extras),
                F.cross_entropy(X * extras.get("logit_scale", 1.0), T),
            )


def test_a_bad_call_leaves_the_next_one_alone() -> None:
    with torchext.use_backend("native"):
        for call in CROSS_ENTROPY.values():
            raised(torchext.cross_entropy, call)
        assert torch.equal(torchext.cross_entropy(X, T), torchext.cross_entropy(X, T))
        torch.testing.assert_close(torchext.cross_entropy(X, T), F.cross_entropy(X, T))

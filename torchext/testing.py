"""What tests of an op need: devices and backends, tolerances, comparison with the truth.

The measure of a result is the truth: the stock op in float64. A fused kernel may be no further from
it than the stock op in the same dtype is, plus a floor of rounding (`TOLERANCES`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchext import _triton
from torchext._backend import backends

Function = Callable[..., Tensor]


class Tolerance(NamedTuple):
    """How far a result may be from the truth; `rtol` is relative to the truth's largest element."""

    rtol: float
    atol: float


# Two roundings in the narrow dtypes (a gradient's own, and its product with the upstream one); sums
# of some thousand terms in the wide ones.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(2e-12, 1e-14),
    torch.float32: Tolerance(1e-6, 3e-7),
    torch.bfloat16: Tolerance(8e-3, 1e-6),
    torch.float16: Tolerance(1e-3, 1e-6),
}


def devices() -> list[str]:
    """Returns the types of the devices that are here, the CPU first."""
    found = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            found.append(accelerator.type)
    return found


def backends_for(device: str) -> list[str]:
    """Returns the names for `use_backend` that a device's tests go through.

    Args:
        device: a device type, as `devices` gives it.
    """
    on_cpu, on_cuda = device == "cpu", device == "cuda"
    serving = {
        "native": on_cpu or (on_cuda and _triton.has_native_cuda("cross_entropy")),
        "triton": on_cpu if _triton.interpreted else on_cuda,
    }
    here = backends()
    return ["auto", *(n for n, serves in serving.items() if serves and here[n].available), "eager"]


def derivatives(
    function: Function,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    grad_output: Tensor | None = None,
    directions: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Returns a function's value and its derivatives.

    Args:
        function: a function that gives one tensor.
        args: its arguments.
        kwargs: its keyword arguments.
        grad_output: the gradient of the value; without it there are no derivatives.
        directions: one tensor for each argument that requires a gradient; with them the second
            derivatives are computed too: those of the sum of the gradients times the directions.

    Returns:
        The value, the gradients of all arguments that require one, then the second derivatives for
        the same arguments and `grad_output`.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
    leaves = [
        leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    fresh_args, fresh_kwargs = pytree.tree_unflatten(leaves, spec)
    output = function(*fresh_args, **fresh_kwargs)
    results = [output.detach()]
    if grad_output is None or not wanted:
        return results
    grad_output = grad_output.detach().requires_grad_(bool(directions))
    gradients = torch.autograd.grad(output, wanted, grad_output, create_graph=bool(directions))
    results += [gradient.detach() for gradient in gradients]
    if directions:
        total = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        assert isinstance(total, Tensor)
        wanted = [*wanted, grad_output]
        second = torch.autograd.grad(total, wanted, materialize_grads=True)
        results += list(second)
    return results


def assert_close_to_truth(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    name: str = "result",
    *,
    eager_truth: Tensor | None = None,
    floor: float = 0.0,
) -> None:
    """Checks that a result is no further from the truth than the stock op's, plus a floor.

    Shape and dtype must be the stock op's, and so must NaN and infinities, except that a finite
    result may stand where the stock op alone overflows.

    Args:
        actual: the result.
        eager: the stock op's, in the same dtype.
        truth: the stock op's in float64.
        name: what the error calls the result.
        eager_truth: the truth of the stock op's result, where that is another: an op with a jump in
            its gradient may take another branch after another rounding.
        floor: added to the floor: of a sum that cancels, what its terms are rounded by.

    Raises:
        AssertionError: where it is further, or is of another shape or dtype.
    """
    for what in ("shape", "dtype", "device"):
        ours, stock = getattr(actual, what), getattr(eager, what)
        if ours != stock:
            raise AssertionError(f"{name}: {what} is {ours}, but should be {stock}")
    overflow = truth.isfinite() & ~eager.isfinite()
    special = ~(truth.isfinite() | overflow)
    torch.testing.assert_close(
        actual[special].double(),
        eager[special].double(),
        equal_nan=True,
        msg=lambda text: f"{name}: NaN and infinities should be the stock op's. {text}",
    )
    finite = truth.isfinite() & ~overflow
    if not finite.any():
        return
    wide, exact = actual[finite].double(), truth[finite].double()
    error = (wide - exact).abs()
    stock_truth = exact if eager_truth is None else eager_truth[finite].double()
    eager_error = (eager[finite].double() - stock_truth).abs().max()
    rtol, atol = TOLERANCES[actual.dtype]
    limit = eager_error + floor + atol + rtol * exact.abs().max()
    # Not `error > limit`: NaN is wrong too.
    if wrong := int((~(error <= limit)).sum()):
        worst = error.nan_to_num(nan=float("inf")).argmax()
        raise AssertionError(
            f"{name}: {wrong} of {error.numel()} elements are further from the truth than "
            f"{limit:.3g} (the stock op's own error is {eager_error:.3g}): {wide[worst]:.17g} "
            f"instead of {exact[worst]:.17g}, an error of {error[worst]:.3g}"
        )


def assert_drop_in(
    ours: Function,
    stock: Function,
    *args: Any,
    order: int = 1,
    grad_output: Tensor | None = None,
    truth_of: Callable[[Tensor], Function] | None = None,
    floors: tuple[float, float] = (0.0, 0.0),
    **kwargs: Any,
) -> None:
    """Checks that `ours` gives what `stock` gives, with and without gradients, and changes nothing.

    The upstream gradient is random. Every tensor that requires a gradient is differentiated.

    Args:
        ours: the function to check.
        stock: the definition.
        *args: arguments of both.
        order: 1: gradients; 2: second derivatives too; 0: the value alone.
        grad_output: the gradient of the value, instead of a random one.
        truth_of: gives, for a result, the function whose derivatives in float64 are its truth.
            For ops with a jump in the gradient, where another rounding is another branch.
        floors: of the value, and of the gradients for an upstream gradient of 1: see
            `assert_close_to_truth`.
        **kwargs: keyword arguments of both.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    before = [tensor.detach().clone() for tensor in tensors]
    output = derivatives(stock, args, kwargs)[0]
    directions: list[Tensor] = []
    if order and grad_output is None:
        grad_output = torch.randn_like(output)
    if order == 2:
        directions = [torch.randn_like(tensor) for tensor in tensors if tensor.requires_grad]
    actual = derivatives(ours, args, kwargs, grad_output, directions)
    with torch.no_grad():
        actual.append(derivatives(ours, args, kwargs)[0])
    for tensor, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor.detach(), old, rtol=0, atol=0, equal_nan=True)
    eager = derivatives(stock, args, kwargs, grad_output, directions)
    eager.append(eager[0])

    def exact(result: Tensor) -> list[Tensor]:
        function = stock if truth_of is None else truth_of(result)
        wide_args, wide_kwargs, wide_gradient, wide_directions = pytree.tree_map(
            _widened, (args, kwargs, grad_output, directions)
        )
        exact = derivatives(function, wide_args, wide_kwargs, wide_gradient, wide_directions)
        return [*exact, exact[0]]

    truths = exact(actual[0])
    eager_truths = truths if truth_of is None else exact(eager[0])
    names = ["value", *(f"gradient {i}" for i in range(len(directions) or len(actual) - 2))]
    names += [f"second derivative {i}" for i in range(len(actual) - len(names) - 1)]
    names.append("value without gradients")
    for name, result, other, truth, eager_truth in zip(
        names, actual, eager, truths, eager_truths, strict=True
    ):
        floor = floors[0] if name.startswith("value") else 0.0
        if name.startswith("gradient") and grad_output is not None and grad_output.numel():
            floor = floors[1] * grad_output.abs().max().item()
        assert_close_to_truth(result, other, truth, name, eager_truth=eager_truth, floor=floor)


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().double().requires_grad_(leaf.requires_grad)
    return leaf

"""Gives one op its one gradient formula, twice.

The registered operator (``torch.ops.torchext.*``, which compile, export and opcheck see) gets it by
`torch.library.register_autograd`. Eager calls take a plain `torch.autograd.Function` made of the
same formula, because that costs a third: no Python on the dispatcher's Autograd key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from torchext import _backend, _triton

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., Any]

_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def kernel(op: OpOverload, device: str = "CPU") -> Callable[..., Any]:
    """Returns a device's kernel of a registered operator, past the rest of the dispatcher.

    For plain strided tensors of that device in an ordinary call alone (`_backend.ordinary`): no
    autograd, no autocast, no modes, no lazy negation.
    """
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
    return partial(op._handle.redispatch_boxed, key)


def define(
    op: OpOverload,
    setup_context: SetupContext,
    backward: Backward,
    run: Callable[..., Any] | None = None,
) -> Callable[..., Tensor]:
    """Registers the gradient of `op`; returns the eager function that has the same gradient.

    Args:
        op: the registered operator. Its first output is the differentiable one, and the only one
            that the returned function gives.
        setup_context: ``setup_context(ctx, inputs, output)``, as `torch.library` has it.
        backward: ``backward(ctx, grad_output, *grads_of_further_outputs)``. In an eager call
            ``ctx.owned`` is True: the further outputs that setup_context saved are nobody else's.
        run: what the returned function calls; without it, the CPU kernel of `op`.
    """

    def setup_operator(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.owned = False
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(op._name, backward, setup_context=setup_operator)
    return eager(op, setup_context, backward, kernel(op) if run is None else run)


def eager(
    op: OpOverload, setup_context: SetupContext, backward: Backward, run: Callable[..., Any]
) -> Callable[..., Tensor]:
    """Returns the eager function of an operator by a kernel `run`: see `define`."""
    several = len(op._schema.returns) > 1

    def forward(ctx: Any, *args: Any) -> Tensor:
        output = run(*args)
        if _hooks(False) is not None:
            ctx.owned = False
        # set_materialize_grads, a call less: zeros in a gradient's place would be NaN by a NaN.
        ctx.materialize_grads = False
        setup_context(ctx, args, output)
        return output[0] if several else output  # type: ignore[no-any-return]

    nothing = (None,) * len(op._schema.arguments)

    def back(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return nothing if grad_output is None else backward(ctx, grad_output)

    # By the metaclass, so that the profiler and anomaly mode show the op's name.
    members = {"forward": staticmethod(forward), "backward": staticmethod(back)}
    make: Any = type(torch.autograd.Function)
    function = make(op._opname, (torch.autograd.Function,), members)
    # What the engine calls; torch's own only looks for `vjp` before it calls backward. Saves 1 us.
    function._backward_cls.apply = back
    function._backward_cls.owned = True  # of every ctx that says nothing else
    return fast_apply(function)


def with_kernel(backward: Backward, kernel: OpOverload) -> Backward:
    """Returns the formula with that backward kernel: ``backward(..., kernel=...)`` takes it."""

    def by_kernel(ctx: Any, *grads: Tensor | None) -> Any:
        return backward(ctx, *grads, kernel=kernel)

    return by_kernel


def keeps_graph() -> bool:
    """Whether backward may come through this graph again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def kept_by_hooks() -> bool:
    """Whether saved-tensor hooks are in force: what they keep must not be overwritten."""
    return _hooks(False) is not None


def fast_apply(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """Returns the function's ``apply`` past its functorch handling, which costs 1.5 us.

    Calls under functorch never get here (`_backend.ordinary`).
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[no-any-return, misc]


def scaled(
    gradients: Sequence[Tensor], grad_loss: Tensor, owned: bool
) -> tuple[Tensor, ...] | None:
    """Returns saved gradients of a loss times its own, in place where nobody will see it.

    None where that would not be stock's answer: 0 times an infinity or a NaN is no 0, and an
    infinity less another no infinity. Known of what a CPU call may look at; see `multiplied`.

    Args:
        gradients: what forward computed for a gradient of 1.
        grad_loss: the gradient of the loss, a scalar.
        owned: whether nobody else holds the saved gradients.
    """
    # A tracer must not see the value; autocast has no say in a product.
    look = type(grad_loss) in _backend.PLAIN and _backend.ordinary(any_backend=True, autocast=True)
    in_place = look and owned and not keeps_graph()
    if look and grad_loss.is_cpu and not _triton.interpreted:
        value = grad_loss.item()
        if not math.isfinite(value):
            return None
        if in_place and value != 1.0:
            for gradient in gradients:
                gradient.mul_(grad_loss)
    elif in_place:  # the value is the device's own
        for gradient in gradients:
            _triton.scale_(gradient, grad_loss)
    return tuple(gradients) if in_place else multiplied(gradients, grad_loss)


def multiplied(gradients: Sequence[Tensor], grad_loss: Tensor) -> tuple[Tensor, ...]:
    """Returns saved gradients of a loss times its own."""
    return tuple(gradient * grad_loss for gradient in gradients)


def unchanged(tensor: Tensor, version: int) -> Tensor:
    """Returns a tensor that forward kept without saving it, where it is what it was then.

    Args:
        tensor: what was kept.
        version: its version then.
    """
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a {type(tensor).__name__} of shape {list(tensor.shape)} is at version "
            f"{tensor._version}; expected version {version} instead"
        )
    return tensor


def may_scale(
    wanted: Sequence[bool], needed: Sequence[bool], dtype: torch.dtype, grad_loss: Tensor
) -> bool:
    """Whether gradients that forward made, times that of the loss, are what backward needs.

    Not where one is missing, nor where bfloat16 would be rounded twice: by a power of two it is
    not. On a GPU it may be: to look at the factor is to wait for it.

    Args:
        wanted: which of three forward made.
        needed: which of them backward needs.
        dtype: theirs.
        grad_loss: the gradient of the loss.
    """
    if wanted != needed and any(
        need and not want for want, need in zip(wanted, needed, strict=True)
    ):
        return False
    if dtype is not torch.bfloat16 or not grad_loss.is_cpu:
        return True
    look = _backend.ordinary(any_backend=True, autocast=True)
    return look and abs(math.frexp(grad_loss.item())[0]) in (0.5, 0.0)


def plain_backward(ctx: Any, grad_output: Tensor) -> bool:
    """Whether a backward may call the kernel past the dispatcher: an ordinary one of an eager call.

    What says no is looked at with `wants_reference`, or goes to the registered operator.
    """
    return (
        ctx.owned
        and type(grad_output) in _backend.PLAIN
        and not torch.is_grad_enabled()
        and _backend.ordinary()
        and not _is_batched(grad_output)
        and not grad_output.is_neg()
    )


def wanted(grads: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Returns three gradients, None for those that are not needed. A loop costs 1 us more."""
    first, second, third = grads
    return (
        first if needed[0] else None,
        second if needed[1] else None,
        third if needed[2] else None,
    )


def wants_reference(grad_output: Tensor, owned: bool = False) -> bool:
    """Whether a backward must be made of stock ops: it is itself differentiated, or batched.

    Or, in an eager call (`owned`), its gradient is a subclass: who knows what that means.
    """
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_batched(grad_output)  # is_grads_batched
        or (owned and type(grad_output) not in _backend.PLAIN)
    )


def reference_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_output: Tensor | tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of an eager definition, differentiable where grad mode asks for it.

    Args:
        function: the definition, a function of `tensors`.
        tensors: its differentiable arguments, with their history.
        needed: which of them want a gradient.
        grad_output: the gradient of the function's value, or those of its values.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views stand for the tensors, so that one that was made from another is differentiated
        # through its own part alone; what is differentiated again goes through them to the tensors.
        views = [
            tensor.view_as(tensor) if need and tensor is not None else tensor
            for tensor, need in zip(tensors, needed, strict=True)
        ]
        pairs = zip(views, needed, strict=True)
        wanted = [view for view, need in pairs if need and view is not None]
        output = function(*views)
        found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=again))
    return tuple(next(found) if need else None for need in needed)

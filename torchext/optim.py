"""Optimisers whose step is one native call for all parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, optimizer

from torchext import _autograd, _backend, _native

__all__ = ["SGD"]

_PLAIN = _backend.PLAIN
_in_dynamo = torch.compiler.is_dynamo_compiling
_profiling = torch._C._autograd._profiler_enabled
# Stock refuses some factors that float32 does not hold.
_MOST = torch.finfo(torch.float32).max
_NUMBER = (float, int)
_increment_version = torch._C._increment_version


class SGD(torch.optim.SGD):
    r"""`torch.optim.SGD` in one pass over all parameters, with the same result to the bit.

    .. math::
        g \leftarrow g + \lambda \theta, \qquad
        v \leftarrow \mu v + (1 - \tau) g, \qquad
        \theta \leftarrow \theta - \gamma v

    with learning rate :math:`\gamma`, momentum :math:`\mu`, dampening :math:`\tau` and weight decay
    :math:`\lambda`. Constructor, ``state_dict``, schedulers and hooks are those of
    `torch.optim.SGD`. Contiguous float32 and float64 parameters on the CPU are updated by one call;
    where a network is small, most of the stock step is the Python between its calls. Anything else
    (other dtypes and devices, sparse gradients, a tensor as learning rate, ``differentiable``,
    ``foreach``, ``fused``, hooks, the profiler, a first step with momentum) takes the stock step.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning",
    2013, in the form that `torch.optim.SGD` documents.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        if closure is None and self._plain():
            calls = []
            for group in self.param_groups:
                call = _arguments(group, self.state)
                if call is None:
                    break
                calls.append(call)
            else:
                if _run(calls):
                    return None
        return _stock_step()(self, closure)  # type: ignore[no-any-return]

    # The base class would wrap it for hooks and the profiler; `_plain` gives those the stock step.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients.

        Args:
            set_to_none: whether they become None, or zeros.
        """
        if not set_to_none or _in_dynamo() or _profiling():
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None
        return None

    def _plain(self) -> bool:
        """Whether nothing but the update is asked for."""
        return not (
            not _backend.ordinary()
            or _native.cpu_missing
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
            or getattr(self, "grad_scale", None) is not None
            or getattr(self, "found_inf", None) is not None
        )


def _arguments(group: dict[str, Any], state: dict[Tensor, Any]) -> tuple[Any, ...] | None:
    """One parameter group's arguments for the kernel, or None where it does not serve it."""
    lr, momentum = group["lr"], group["momentum"]
    dampening, weight_decay = group["dampening"], group["weight_decay"]
    if (
        group["foreach"]
        or group["fused"]
        or group["differentiable"]
        or not (isinstance(lr, _NUMBER) and -_MOST <= lr <= _MOST)
        or not (isinstance(momentum, _NUMBER) and -_MOST <= momentum <= _MOST)
        or not (isinstance(dampening, _NUMBER) and -_MOST <= dampening <= _MOST)
        or not (isinstance(weight_decay, _NUMBER) and -_MOST <= weight_decay <= _MOST)
    ):
        return None
    params, grads, buffers = [], [], []
    for param in group["params"]:
        grad = param.grad
        if grad is None:
            continue
        if type(param) not in _PLAIN or type(grad) is not Tensor or grad.is_neg():
            return None
        if param.is_inference():
            return None
        params.append(param)
        grads.append(grad)
        if momentum != 0:
            buffer = state[param].get("momentum_buffer")
            if buffer is None or buffer.is_inference():
                return None
            buffers.append(buffer)
    options = (lr, momentum, dampening, weight_decay, group["nesterov"], group["maximize"])
    return params, grads, buffers, *options


def _run(calls: list[tuple[Any, ...]]) -> bool:
    """Makes the step of every group; False, with nothing changed, where the kernel refuses one."""
    if len(calls) > 1:
        for params, grads, buffers, *_ in calls:
            if not all(map(_served, (*params, *grads, *buffers), 3 * params)):
                return False
    for params, grads, buffers, *options in calls:
        if params:
            try:
                _kernel(params, grads, buffers, *options)  # checks before it writes
            except RuntimeError:
                return False
            _increment_version(params + buffers if buffers else params)
    return True


def _served(tensor: Tensor, param: Tensor) -> bool:
    """What the kernel checks: with several groups, none is to be refused after another's step."""
    return (
        (param.dtype is torch.float32 or param.dtype is torch.float64)
        and tensor.dtype is param.dtype
        and tensor.shape == param.shape
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor._is_zerotensor()
    )


def _stock_step() -> Callable[..., Any]:
    """The stock step, with its hooks: torch wraps it when the first `torch.optim.SGD` is made."""
    step = torch.optim.SGD.step
    if getattr(step, "hooked", False):
        return step
    return Optimizer.profile_hook_step(step)


def _fake(*arguments: Any) -> None:
    return None


if not _native.cpu_missing:
    torch.library.register_fake("torchext::sgd_", _fake)
    _kernel = _autograd.kernel(torch.ops.torchext.sgd_.default)

"""Other libraries, each where it is installed: one small adapter each, which names its version.

None is a requirement. Written from the libraries' documentation and signatures: torch's chunked
path and JAX were run, the GPU libraries were not (there is no GPU in continuous integration), and
the check judges what they give before it is timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Inputs, Op
from benchmarks.providers import Provider, Task, TorchTask


def torch_peer(
    name: str,
    package: str,
    module: str,
    call: Callable[..., Callable[..., Tensor]],
    *,
    options: Sequence[str] = (),
    overwrites: str | None = None,
    devices: Sequence[str] = ("cuda",),
) -> Provider:
    """A library of torch functions.

    Args:
        name: as the tables show it.
        package: the name that it is installed by, for its version.
        module: what is imported.
        call: gives, for the imported module, a function of the op's arguments.
        options: the options of a case that it takes.
        overwrites: the argument that it destroys.
        devices: where it runs.
    """

    def make(op: Op, case: Case, sets: Sequence[Inputs]) -> Task:
        function = call(importlib.import_module(module))
        return TorchTask(function, sets, case.direction, overwrites=overwrites)

    def missing(op: Op, case: Case) -> str:
        if case.device not in devices:
            return f"{name} runs on {' and '.join(devices)} only"
        return _not_installed(package, module) or _not_taken(name, case, options)

    return Provider(name, "other", make, partial(_version, package), missing)


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _not_installed(package: str, module: str) -> str:
    top = module.partition(".")[0]
    return "" if importlib.util.find_spec(top) is not None else f"{package} is not installed"


def _not_taken(name: str, case: Case, options: Sequence[str]) -> str:
    return "; ".join(f"{name}: not with {key}" for key, _ in case.options if key not in options)


def torch_chunked() -> Provider:
    """torch's own linear_cross_entropy, chunked so that it never has all logits; since 2.13."""

    def make(op: Op, case: Case, sets: Sequence[Inputs]) -> Task:
        options = torch.nn.LinearCrossEntropyOptions()

        return TorchTask(partial(F.linear_cross_entropy, options=options), sets, case.direction)

    def missing(op: Op, case: Case) -> str:
        here = hasattr(F, "linear_cross_entropy")
        return "" if here else f"torch {torch.__version__} has no F.linear_cross_entropy"

    return Provider("torch chunked", "other", make, lambda: f"torch {torch.__version__}", missing)


def liger_cross_entropy() -> Provider:
    """Liger-Kernel (Triton). Its forward writes the gradient over the logits."""
    return torch_peer(
        "Liger-Kernel",
        "liger-kernel",
        "liger_kernel.transformers.functional",
        lambda module: module.liger_cross_entropy,
        options=("reduction", "label_smoothing"),
        overwrites="input",
    )


def liger_linear_cross_entropy() -> Provider:
    """Liger-Kernel (Triton), chunked over rows."""
    return torch_peer(
        "Liger-Kernel",
        "liger-kernel",
        "liger_kernel.transformers.functional",
        lambda module: module.liger_fused_linear_cross_entropy,
        options=("reduction", "label_smoothing"),
    )


def cut_cross_entropy() -> Provider:
    """Apple's cut-cross-entropy (Triton), in its exact form: the default one leaves out small
    gradients."""
    return torch_peer(
        "cut-cross-entropy",
        "cut-cross-entropy",
        "cut_cross_entropy",
        lambda module: partial(module.linear_cross_entropy, impl="cce_exact"),
        options=("reduction",),
    )


def quack_cross_entropy() -> Provider:
    """quack (CuTe DSL)."""

    def call(module: Any) -> Callable[..., Tensor]:
        def cross_entropy(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
            loss: Tensor = module.cross_entropy(input, target, reduction=reduction)
            return loss.to(input.dtype)  # it gives float32

        return cross_entropy

    return torch_peer("quack", "quack-kernels", "quack.cross_entropy", call, options=("reduction",))


def quack_linear_cross_entropy() -> Provider:
    """quack (CuTe DSL and cuBLAS), chunked over rows."""

    def call(module: Any) -> Callable[..., Tensor]:
        def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
            loss: Tensor = module.chunked_linear_cross_entropy(input, linear_weight, target)
            return loss.to(input.dtype)

        return linear_cross_entropy

    return torch_peer("quack", "quack-kernels", "quack.linear_cross_entropy", call)


class JaxTask(Task):
    """A jitted JAX function: its value, or its value and gradients, in one compiled call.

    Args:
        function: ``function(jax, *args, **options)`` of JAX arrays, in the op's order.
        sets: the input sets to go through.
        direction: ``"fwd"`` or ``"fwd+bwd"``.
    """

    def __init__(
        self, function: Callable[..., Any], sets: Sequence[Inputs], direction: str
    ) -> None:
        jax = importlib.import_module("jax")
        self._names = sets[0].wanted_names
        wanted = tuple(list(sets[0].args).index(name) for name in self._names)
        options = sets[0].kwargs

        def value(*args: Any) -> Any:
            return function(jax, *args, **options)

        def value_and_gradients(grad_output: Any, *args: Any) -> Any:
            def of_wanted(*differentiated: Any) -> Any:
                full = list(args)
                for index, arg in zip(wanted, differentiated, strict=True):
                    full[index] = arg
                return value(*full)

            result, pull = jax.vjp(of_wanted, *(args[index] for index in wanted))
            return result, pull(grad_output)

        self._both = direction == "fwd+bwd"
        self._function = jax.jit(value_and_gradients if self._both else value)
        self._block = jax.block_until_ready
        first = [_to_jax(arg) for arg in sets[0].positional]
        self._check = [_to_jax(sets[0].upstream), *first] if self._both else first
        self._cycle = itertools.cycle(
            [
                [*([_to_jax(inputs.grad_output)] if self._both else []),
                 *map(_to_jax, inputs.positional)]
                for inputs in sets
            ]
        )  # fmt: skip
        self.run = lambda args: self._block(self._function(*args))

    def prepare(self, count: int) -> list[Any]:
        return list(itertools.islice(self._cycle, count))

    def results(self) -> dict[str, Tensor]:
        found = self._function(*self._check)
        if not self._both:
            return {"value": _to_torch(found)}
        names = [f"gradient of {name}" for name in self._names]
        gradients = (_to_torch(gradient) for gradient in found[1])
        return {"value": _to_torch(found[0]), **dict(zip(names, gradients, strict=True))}


def _to_jax(tensor: Tensor | None) -> Any:
    """A copy as a JAX array; class indices become int32, JAX's own width."""
    if tensor is None:
        return None
    jnp = importlib.import_module("jax.numpy")
    if not tensor.is_floating_point():
        return jnp.array(tensor.to(torch.int32).numpy())
    name = str(tensor.dtype).removeprefix("torch.")
    return jnp.array(tensor.detach().float().numpy()).astype(name)


def _to_torch(array: Any) -> Tensor:
    numpy = importlib.import_module("numpy")
    return torch.from_numpy(numpy.array(array.astype("float32")))


def jax(function: Callable[..., Any], options: Sequence[str] = ()) -> Provider:
    """JAX, jitted, on the CPU.

    Args:
        function: ``function(jax, *args, **options)``: the op, as a JAX user writes it.
        options: the options of a case that it takes.
    """

    def make(op: Op, case: Case, sets: Sequence[Inputs]) -> Task:
        return JaxTask(function, sets, case.direction)

    def missing(op: Op, case: Case) -> str:
        if case.device != "cpu":
            return "JAX is compared on the CPU only"
        if case.dtype == "float64":
            return "JAX has no float64 by default"
        if case.direction == "bwd":
            return "a jitted JAX function has no backward of its own"
        return _not_installed("jax", "jax") or _not_taken("JAX", case, options)

    return Provider("JAX", "other", make, partial(_version, "jax"), missing, compiles=True)

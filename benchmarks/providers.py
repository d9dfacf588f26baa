"""What is compared: a provider makes, for a case, the task that the harness times."""

from __future__ import annotations

import itertools
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

import torchext
from benchmarks.case import Case, Inputs, Op

_PREPARED_BYTES = 256 << 20  # how much the prepared calls of one sample may hold


class Task(ABC):
    """One provider on one case: `prepare` outside the timing, `run` inside."""

    most_calls = 10_000  # that one `prepare` may serve
    needs_preparation = False  # whether an item can be used only once
    run: Callable[[Any], object]

    @abstractmethod
    def prepare(self, count: int) -> list[Any]:
        """Makes what `run` takes, for so many calls."""

    def context(self) -> AbstractContextManager[object]:
        """What holds around preparation and calls, outside the timing."""
        return ExitStack()

    def results(self) -> dict[str, Tensor]:
        """The value and the gradients of the first input set, for the upstream gradient of the
        check. A limit has none."""
        return {}


class TorchTask(Task):
    """A function of torch tensors, differentiated by autograd.

    Args:
        function: called with the op's arguments.
        sets: the input sets to go through.
        direction: see `Case`.
        backend: a name for `torchext.use_backend`, or None.
        overwrites: the argument that the function destroys, or None.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        sets: Sequence[Inputs],
        direction: str,
        *,
        backend: str | None = None,
        overwrites: str | None = None,
    ) -> None:
        self._function = function
        self._direction = direction
        self._backend = backend
        self._pristine: dict[int, Tensor] = {}
        if overwrites is not None:
            sets = [self._with_scratch(inputs, overwrites) for inputs in sets]
            self.most_calls = len(sets)
        elif direction == "bwd":
            self.most_calls = max(1, _PREPARED_BYTES // (2 * sets[0].bytes))
        self._first = sets[0]
        self._cycle = itertools.cycle(sets)
        self._overwrites = overwrites
        self.needs_preparation = overwrites is not None or direction == "bwd"
        self.run = {"fwd": self._forward, "bwd": self._backward, "fwd+bwd": self._both}[direction]

    def _with_scratch(self, inputs: Inputs, name: str) -> Inputs:
        pristine = inputs.args[name]
        assert pristine is not None
        scratch = pristine.detach().clone().requires_grad_(pristine.requires_grad)
        self._pristine[id(scratch)] = pristine
        return Inputs({**inputs.args, name: scratch}, inputs.grad_output, inputs.kwargs)

    def _restore(self, inputs: Inputs) -> None:
        if self._overwrites is not None:
            scratch = inputs.args[self._overwrites]
            assert scratch is not None
            with torch.no_grad():
                scratch.copy_(self._pristine[id(scratch)])

    def prepare(self, count: int) -> list[Any]:
        sets = list(itertools.islice(self._cycle, count))
        for inputs in sets:
            self._restore(inputs)
        if self._direction != "bwd":
            return sets
        return [(self._call(inputs), inputs.wanted, inputs.grad_output) for inputs in sets]

    def context(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        if self._backend is not None:
            stack.enter_context(torchext.use_backend(self._backend))
        if self._direction == "fwd":
            stack.enter_context(torch.no_grad())
        return stack

    def _call(self, inputs: Inputs) -> Tensor:
        return self._function(*inputs.positional, **inputs.kwargs)

    def _forward(self, inputs: Inputs) -> Tensor:
        return self._function(*inputs.positional, **inputs.kwargs)

    def _backward(self, prepared: tuple[Tensor, tuple[Tensor, ...], Tensor]) -> object:
        return torch.autograd.grad(*prepared)

    def _both(self, inputs: Inputs) -> object:
        output = self._function(*inputs.positional, **inputs.kwargs)
        return torch.autograd.grad(output, inputs.wanted, inputs.grad_output)

    def results(self) -> dict[str, Tensor]:
        inputs = self._first
        self._restore(inputs)
        with self.context():
            output = self._call(inputs)
            found = {"value": output.detach()}
            if self._direction != "fwd":
                gradients = torch.autograd.grad(output, inputs.wanted, inputs.upstream)
                names = [f"gradient of {name}" for name in inputs.wanted_names]
                found |= dict(zip(names, gradients, strict=True))
        return found


class PlainTask(Task):
    """A function without gradients, called with each of some tuples in turn: a limit."""

    def __init__(
        self, function: Callable[..., object], arguments: Sequence[tuple[Any, ...]]
    ) -> None:
        self._cycle = itertools.cycle(arguments)
        self.run = lambda args: function(*args)

    def prepare(self, count: int) -> list[Any]:
        return list(itertools.islice(self._cycle, count))

    def context(self) -> AbstractContextManager[object]:
        return torch.no_grad()


def copy_task(moved_bytes: int, sets: int, device: str) -> Task:
    """A copy into a ready buffer that reads and writes so many bytes together."""
    count = max(1, moved_bytes // 8)  # float32 elements read, and as many written
    pairs = [
        (torch.zeros(count, device=device), torch.ones(count, device=device)) for _ in range(sets)
    ]
    return PlainTask(Tensor.copy_, pairs)


@dataclass(frozen=True)
class Provider:
    """A way to compute an op.

    Attributes:
        name: as the tables show it.
        role: ``"ours"``, ``"other"`` or ``"limit"``.
        make: gives the task of a case on input sets.
        version: of the library that it is.
        missing: why it does not run a case here; empty where it does.
        compiles: whether its first call compiles, so that the memory of that call says nothing.
    """

    name: str
    role: str
    make: Callable[[Op, Case, Sequence[Inputs]], Task]
    version: Callable[[], str]
    missing: Callable[[Op, Case], str] = lambda op, case: ""
    compiles: bool = False


def _torch_version() -> str:
    return f"torch {torch.__version__}"


def _ours_version() -> str:
    return f"torchext {torchext.__version__}"


def _make_eager(op: Op, case: Case, sets: Sequence[Inputs]) -> Task:
    return TorchTask(op.stock(case), sets, case.direction)


_copies = itertools.count()
_compiled: dict[Case, Callable[..., Tensor]] = {}


def _make_compiled(op: Op, case: Case, sets: Sequence[Inputs]) -> Task:
    if case not in _compiled:
        # Compiler processes, started for later use, would take time from what is measured.
        torch._inductor.config.compile_threads = 1
        _compiled[case] = torch.compile(own_code(op.reference), dynamic=False, fullgraph=True)
    return TorchTask(_compiled[case], sets, case.direction)


def own_code(function: Any) -> Callable[..., Tensor]:
    """A copy with a code object of its own: Dynamo's cache, its guards and its limit of
    recompilations go by code object, and one case must not slow another."""
    name = f"{function.__name__}_{next(_copies)}"
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(
        code, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _make_ours(
    backend: str, extra: dict[str, Any], op: Op, case: Case, sets: Sequence[Inputs]
) -> Task:
    function = getattr(torchext, op.name)
    overwrites = "input" if extra.get("inplace_backward") and case.direction != "fwd" else None
    return TorchTask(
        partial(function, **extra) if extra else function,
        sets,
        case.direction,
        backend=backend,
        overwrites=overwrites,
    )


def _ours_missing(backend: str, op: Op, case: Case) -> str:
    if not hasattr(torchext, op.name):
        return f"torchext {torchext.__version__} has no {op.name}"
    here = torchext.backends()
    if backend == "auto":
        return ""
    if backend not in here:
        return f"torchext {torchext.__version__} has no backend {backend}"
    if backend == "triton" and case.device == "cpu":
        return "Triton on the CPU is an interpreter"
    return here[backend].reason


def ours(name: str, backend: str, **extra: Any) -> Provider:
    """This package, by a backend, with keyword arguments more."""
    return Provider(
        name,
        "ours",
        partial(_make_ours, backend, extra),
        _ours_version,
        partial(_ours_missing, backend),
    )


def _make_limit(op: Op, case: Case, sets: Sequence[Inputs]) -> Task:
    return op.limit(case, sets)


def providers_of(op: Op) -> list[Provider]:
    """All that can be asked for an op, whether it is here or not; the limit comes last."""
    return [
        Provider("eager", "other", _make_eager, _torch_version),
        Provider("compile", "other", _make_compiled, _torch_version, compiles=True),
        *op.peers(),
        ours("torchext", "auto"),
        ours("torchext native", "native"),
        ours("torchext triton", "triton"),
        Provider("limit", "limit", _make_limit, lambda: op.limit_name),
    ]

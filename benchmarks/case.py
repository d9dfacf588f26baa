"""What is measured: a case (one call), its inputs, and the op that knows both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.providers import Provider, Task

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Case:
    """One call: an op on a shape, in a dtype, on a device, in a direction, with options.

    Directions: ``fwd`` is inference (``no_grad``), ``bwd`` the backward of a training call alone,
    ``fwd+bwd`` a training call.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    direction: str = "fwd+bwd"
    device: str = "cpu"
    options: Options = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def variant(self) -> str:
        """The options, as the tables show them."""
        return " ".join(
            name if value is True else f"{name}={value}" for name, value in self.options
        )

    @property
    def label(self) -> str:
        device = "" if self.device == "cpu" else self.device
        parts = (self.op, self.size, self.dtype, self.direction, self.variant, device)
        return " ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Case:
        options = tuple((name, value) for name, value in values["options"])
        return Case(**{**values, "shape": tuple(values["shape"]), "options": options})


@dataclass
class Inputs:
    """The arguments of one call, in the op's order, and the gradient of its value."""

    args: dict[str, Tensor | None]
    grad_output: Tensor
    kwargs: dict[str, Any]

    @cached_property
    def positional(self) -> tuple[Tensor | None, ...]:
        return tuple(self.args.values())

    @cached_property
    def wanted(self) -> tuple[Tensor, ...]:
        return tuple(self.args[name] for name in self.wanted_names)  # type: ignore[misc]

    @cached_property
    def wanted_names(self) -> tuple[str, ...]:
        return tuple(
            name for name, arg in self.args.items() if arg is not None and arg.requires_grad
        )

    @property
    def bytes(self) -> int:
        tensors = [arg for arg in self.args.values() if arg is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @cached_property
    def upstream(self) -> Tensor:
        """A gradient of the value that is not one and not that of the timing, for the check."""
        generator = torch.Generator().manual_seed(7)
        noise = torch.rand(self.grad_output.shape, generator=generator) + 0.5
        return noise.to(self.grad_output)

    def widened(self, dtype: torch.dtype) -> Inputs:
        """A copy in a wider dtype, of the same values."""
        args = {name: _widened(arg, dtype) for name, arg in self.args.items()}
        wide = Inputs(args, self.grad_output.to(dtype), self.kwargs)
        wide.upstream = self.upstream.to(dtype)
        return wide


def _widened(arg: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if arg is None or not arg.is_floating_point():
        return arg
    return arg.detach().to(dtype).requires_grad_(arg.requires_grad)


class Op(ABC):
    """An op and its benchmark: `bench_<op>.py` has one."""

    name: str
    shape_syntax: str  # of --shapes
    memory_axis = -1  # which size of the shape the plot of memory goes along
    memory_label = "vocabulary (classes)"

    @property
    @abstractmethod
    def reference(self) -> Callable[..., Tensor]:
        """The eager definition, which is compiled, and in a wide dtype the truth."""

    def stock(self, case: Case) -> Callable[..., Tensor]:
        """The baseline: the case as a user of torch writes it, without the frames, keywords and
        checks of `reference` around it: up to 1 us, where a call of 1 x 8 takes 3."""
        return self.reference

    @abstractmethod
    def presets(self, full: bool, device: str) -> list[Case]:
        """The cases that are measured where the command names none; of a device's sizes."""

    @abstractmethod
    def tiny(self) -> Case:
        """The call of 1 x 8 whose time is overhead alone."""

    # What --random draws of: usual sizes, of shapes whose product is no more; and options.
    drawn_sizes: tuple[tuple[int, ...], ...]
    drawn_most: int
    drawn_options: tuple[Options, ...]

    def drawn(self, random: Random) -> tuple[tuple[int, ...], Options]:
        """Draws a shape, most often a small one, and options."""
        shape = tuple(random.choice(sizes) for sizes in self.drawn_sizes)
        if math.prod(shape) > self.drawn_most:
            return self.drawn(random)
        return shape, random.choice(self.drawn_options)

    def memory_presets(self, full: bool, device: str) -> list[Case]:
        """The cases whose peak memory is measured; of a device's sizes."""
        return []

    @abstractmethod
    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether a shape of the command line is one of this op."""

    @abstractmethod
    def inputs(self, case: Case, generator: torch.Generator) -> Inputs:
        """Makes the arguments of one call; what wants a gradient requires it."""

    @abstractmethod
    def limit(self, case: Case, sets: Sequence[Inputs]) -> Task:
        """The work that no implementation can leave out."""

    limit_name: str

    def elements(self, case: Case) -> int:
        """The elements of the largest tensor of the eager definition."""
        total = 1
        for size in case.shape:
            total *= size
        return total

    def traffic_bytes(self, case: Case) -> int | None:
        """The bytes that must be read and written at the least; GB/s are of these."""
        return None

    def flops(self, case: Case) -> int | None:
        """The operations that count; TFLOP/s are of these."""
        return None

    def plot_size(self, case: Case) -> float | None:
        """The place of a case on the time plot's axis of sizes; None for a case apart."""
        return float(self.elements(case))

    plot_size_label = "elements"

    def peers(self) -> list[Provider]:
        """Providers that only this op has."""
        return []


def training_factor(direction: str, fwd: int, bwd: int) -> int:
    """Picks what a direction does of the forward's and the backward's work."""
    return {"fwd": fwd, "bwd": bwd, "fwd+bwd": fwd + bwd}[direction]


def parse_shape(text: str) -> tuple[int, ...]:
    """Reads ``1024x1000``."""
    parts = text.lower().split("x")
    sizes = tuple(int(part) for part in parts if part.isdecimal())
    if len(sizes) < len(parts) or min(sizes) < 1:
        raise ValueError(f"expected a shape like 1024x1000, got {text!r}")
    return sizes


def generator(case: Case, index: int) -> torch.Generator:
    """The random numbers of the case's input set of that index: the same in every run."""
    return torch.Generator(device=case.device).manual_seed(1000 + index)

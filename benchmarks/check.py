"""Is a provider right? Asked before it is timed: a wrong answer in no time is worth nothing.

The truth is the eager definition in float64 (in float32 where the tensors are too large for that).
Two measures of each result, its value and every gradient:

* the error: the sum of |result - truth| over the sum of |truth|. Not the largest error: in a
  cross-entropy the target's element would hide all others. In narrow dtypes it is large for good
  reasons (a ReLU whose input rounds to the other side of 0);
* the scale: the median of result / truth. Rounding cancels out in it, so that one per cent is seen
  in bfloat16 too. A single number, such as a loss, has no median: there the rounding is let pass.

Where eager itself is further off than the tolerance, half as much again as eager is let pass, but
where eager is not finite (float16 losses with label smoothing overflow): then it is wrong itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, Op
from benchmarks.providers import Task, TorchTask

_FLOAT64_ELEMENTS = 1 << 25
_SLICE = 1 << 24  # elements compared at once: differences of all would be gigabytes
_RATIOS = 1 << 20  # of how many elements the median is taken
_FEW = 64  # elements: too few for their roundings to cancel out


class Tolerance(NamedTuple):
    """What is let pass: of the error, and of the scale of many and of few elements."""

    error: float
    scale: float
    scale_of_few: float


_TOLERANCES = {
    "float64": Tolerance(1e-8, 1e-8, 1e-8),
    "float32": Tolerance(2e-4, 1e-4, 1e-4),
    "float16": Tolerance(1e-2, 1e-3, 2e-3),
    "bfloat16": Tolerance(3e-2, 3e-3, 8e-3),
}
_EAGER_SLACK = 1.5


class WrongResult(Exception):
    """A provider's results are not the op's."""


@dataclass
class Truth:
    """What the results of a case must be."""

    case: Case
    results: dict[str, Tensor]
    dtype: str
    eager: dict[str, tuple[float, float]] = field(default_factory=dict)  # its measures


def truth_of(op: Op, case: Case, inputs: Inputs) -> Truth:
    """Computes the truth of a case, on its first input set.

    Args:
        op: its op.
        case: the case.
        inputs: its first input set.
    """
    dtype = torch.float64 if op.elements(case) <= _FLOAT64_ELEMENTS else torch.float32
    if case.dtype == "float64":
        dtype = torch.float64
    results = TorchTask(op.reference, [inputs.widened(dtype)], case.direction).results()
    truth = Truth(case, results, str(dtype).removeprefix("torch."))
    own = results
    if dtype is not case.torch_dtype:
        own = TorchTask(op.reference, [inputs], case.direction).results()
    truth.eager = {name: measures(own[name], exact) for name, exact in results.items()}
    for name, found in truth.eager.items():
        if not all(map(math.isfinite, found)):
            truth.eager[name] = (0.0, 1.0)
    return truth


def check(task: Task, truth: Truth, inputs: Sequence[Inputs]) -> dict[str, float]:
    """Judges a task by the truth.

    Args:
        task: what is to be timed.
        truth: what its results must be.
        inputs: the input sets that it shares with other tasks, which it must leave alone.

    Returns:
        The relative error of each result.

    Raises:
        WrongResult: where a result is missing, of another shape, or too far off.
    """
    before = _sums(inputs[0])
    actual = task.results()
    if _sums(inputs[0]) != before:
        raise WrongResult("it changed its inputs")
    if actual.keys() != truth.results.keys():
        raise WrongResult(f"gave {sorted(actual)} instead of {sorted(truth.results)}")
    errors = {}
    tolerance = _TOLERANCES[truth.case.dtype]
    for name, exact in truth.results.items():
        if actual[name].shape != exact.shape:
            shapes = f"{list(actual[name].shape)} instead of {list(exact.shape)}"
            raise WrongResult(f"{name}: shape {shapes}")
        errors[name], scale = measures(actual[name], exact)
        eager_error, eager_scale = truth.eager[name]
        most = max(tolerance.error, _EAGER_SLACK * eager_error)
        if not errors[name] <= most:
            raise WrongResult(f"{name}: relative error {errors[name]:.2g}, more than {most:.2g}")
        few = exact.numel() < _FEW
        most = tolerance.scale_of_few if few else tolerance.scale
        if not abs(scale - 1) <= max(most, _EAGER_SLACK * abs(eager_scale - 1)):
            raise WrongResult(f"{name}: {scale:.4f} times the truth")
    return errors


def measures(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Returns the relative error of a result and its scale.

    Args:
        actual: the result, of any floating dtype.
        exact: the truth, of the same shape.
    """
    error = size = 0.0
    flat, exact_flat = actual.detach().reshape(-1), exact.reshape(-1)
    for start in range(0, flat.numel(), _SLICE):
        truth = exact_flat[start : start + _SLICE]
        result = flat[start : start + _SLICE].to(truth)
        error += float((result - truth).abs().sum(dtype=torch.float64))
        size += float(truth.abs().sum(dtype=torch.float64))
    step = max(1, flat.numel() // _RATIOS)
    truth = exact_flat[::step].double()
    ratios = (flat[::step].to(truth) / truth)[truth != 0]
    scale = float(ratios.median()) if len(ratios) else 1.0
    return (error / size if size else error), scale


def _sums(inputs: Inputs) -> list[float]:
    tensors = [arg for arg in inputs.args.values() if arg is not None]
    return [float(tensor.detach().sum(dtype=torch.float64)) for tensor in tensors]

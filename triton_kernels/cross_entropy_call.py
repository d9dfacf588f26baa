"""One call of cross_entropy: its checks, and its tensors as the kernels walk them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torchext.triton_kernels.common import WIDE, Strides, accumulator, class_strides, refuse

INDICES = frozenset({torch.int64, torch.int32, torch.uint8})
FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
RESIDENT = {torch.float64: 4096}
"""Classes up to which a row stays in registers; float32 and narrower: `RESIDENT_NARROW`."""
RESIDENT_NARROW = 16384


def one_pass(input: Tensor) -> bool:
    """Whether the gradient of a sum or mean is written while the row is in registers.

    Larger rows are read again for it, which backward can do as well, knowing the upstream gradient.
    """
    return input.shape[min(input.dim() - 1, 1)] <= resident_classes(input.dtype)


def resident_classes(dtype: torch.dtype) -> int:
    """Classes up to which a row of that dtype stays in registers."""
    return RESIDENT.get(dtype, RESIDENT_NARROW)


class Call(NamedTuple):
    """One call's tensors as the kernels walk them: positions (outer, inner), classes strided."""

    input: Tensor
    target: Tensor | None  # class indices, contiguous
    probabilities: Tensor | None
    weight: Tensor | None
    outer: int
    inner: int
    classes: int
    ignore_index: int
    smoothing: float
    acc: torch.dtype
    input_strides: Strides
    probability_strides: Strides
    gradient: Tensor | None
    gradient_strides: Strides

    @property
    def positions(self) -> int:
        """The number of positions."""
        return self.outer * self.inner

    @property
    def rows(self) -> bool:
        """Whether a row's classes are contiguous (or there is but one)."""
        return self.input_strides.channel == 1 or self.classes == 1

    @property
    def resident(self) -> bool:
        """Whether rows fit the registers."""
        return self.rows and self.classes <= resident_classes(self.input.dtype)

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that every kernel has."""
        return {"SMOOTHING": self.smoothing, "ACC": WIDE.get(self.input.dtype, tl.float32)}


def _served(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> bool:
    """The conditions of csrc/ops/cross_entropy.h, whose words `refuse` gets."""
    if input.dim() < 1 or input.dtype not in FLOATING or reduction not in (0, 1, 2):
        return False
    classes = input.shape[min(input.dim() - 1, 1)]
    if target.dtype in INDICES:
        if input.dim() == 1:
            if target.numel() != 1 or target.dim() > 1 or (target.dim() == 1 and classes == 1):
                return False
        elif target.shape != input.shape[:1] + input.shape[2:]:
            return False
    elif target.dtype != input.dtype or target.shape != input.shape:
        return False
    if weight is not None and (weight.shape != (classes,) or weight.dtype != input.dtype):
        return False
    tensors = (target,) if weight is None else (target, weight)
    return all(tensor.device == input.device for tensor in tensors)


def check(operator: str, arguments: tuple[Any, ...], call: tuple[Any, ...]) -> None:
    """Refuses what no kernel takes; where the host may look, classes that do not exist too."""
    input, target, weight, reduction, ignore_index, label_smoothing = call
    indexed = target.dtype in INDICES
    if (
        not _served(input, target, weight, reduction)
        or label_smoothing > 1.0
        or not (indexed or ignore_index < 0)
    ):
        refuse(lambda: getattr(torch.ops.torchext, operator).default, "cross_entropy", arguments)
    if indexed:
        classes = input.shape[min(input.dim() - 1, 1)]
        check_classes("cross_entropy", target, classes, ignore_index)


def check_classes(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Refuses classes that do not exist, where the host may look without waiting for a device."""
    if not target.is_cpu:
        return
    index = target.long()
    wrong = ((index < 0) | (index >= classes)) & (index != ignore_index)
    if wrong.any():
        raise IndexError(
            f"{op}: expected target in [0, {classes}) or ignore_index "
            f"({ignore_index}), but got: Target {int(index[wrong][0])} is out of bounds."
        )


def walk(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    gradient: Tensor | None,
) -> Call:
    """Returns how the kernels walk a call's tensors, copied where they cannot be walked."""
    strides = class_strides(input)
    classes = input.shape[min(input.dim() - 1, 1)]
    outer = 1 if input.dim() == 1 else input.shape[0]
    inner = input[0, 0].numel() if input.dim() > 2 else 1
    if strides is None or not (
        strides.channel == 1
        or classes == 1
        or (strides.inner == 1 if inner > 1 else strides.outer == 1)
    ):
        # Neither classes nor positions are contiguous: a copy is read faster.
        input = input.contiguous()
        strides = class_strides(input)
    assert strides is not None
    found = [strides]
    probabilities = None
    if target.dtype not in INDICES:
        probabilities = target
        if (other := class_strides(probabilities)) is None:
            probabilities = probabilities.contiguous()
            other = class_strides(probabilities)
        assert other is not None
        found.append(other)
    if gradient is not None:
        dense = class_strides(gradient)
        assert dense is not None
        found.append(dense)
    if inner == 1:  # one dimension of positions, side by side where they can be
        found = [Strides(0, s.channel, s.outer) for s in found]
        outer, inner = 1, outer
    elif all(s.outer == inner * s.inner for s in found):
        found = [Strides(0, s.channel, s.inner) for s in found]
        outer, inner = 1, outer * inner
    if classes == 1:
        found = [s._replace(channel=1) for s in found]
    return Call(
        input,
        None if probabilities is not None else target.contiguous(),
        probabilities,
        None if weight is None else weight.contiguous(),
        outer,
        inner,
        classes,
        ignore_index,
        label_smoothing if label_smoothing > 0 else 0.0,
        accumulator(input.dtype),
        found[0],
        found[1] if probabilities is not None else Strides(0, 0, 0),
        gradient,
        found[-1] if gradient is not None else Strides(0, 0, 0),
    )

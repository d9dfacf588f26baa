"""Cross-entropy, against a copy that moves the bytes that it must move, into a ready buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers, under_pytest
from benchmarks.case import DIRECTIONS, Case, Inputs, Op, Options
from benchmarks.providers import Provider, Task, copy_task, ours

_BASE = (1024, 1000)  # (rows, classes)
_LARGE = (4096, 32000)
# The largest first: a run with a budget leaves out what comes last.
_GPU_SHAPES = ((8192, 262144), (16384, 65536), (16384, 32768), (16384, 8192), (16384, 1000))
_VARIANTS: tuple[Options, ...] = (
    (("probabilities", True),),
    (("label_smoothing", 0.1),),
    (("reduction", "none"),),
    (("softcap", 30.0),),
    (("z_loss", 1e-4),),
)
_DRAWN = (  # sizes of --random
    (1, 2, 4, 8, 16, 32, 64, 100, 128, 256, 512, 1000, 2048, 4096),
    (2, 3, 5, 8, 10, 16, 24, 32, 48, 64, 100, 200, 256, 500, 1000, 2000, 5000, 10000, 32000),
)
_MOST_DRAWN = 3 << 20  # logits
_INPLACE_ELEMENTS = 1 << 20  # from here on the in-place gradient is worth having
_INPLACE = "torchext in place"
_EXTRAS = {"softcap", "z_loss"}  # which stock has not


class CrossEntropy(Op):
    name = "cross_entropy"
    shape_syntax = "ROWSxCLASSES[xD1x...]"
    limit_name = "a copy of the same bytes"
    memory_axis = 1
    plot_size_label = "logits (rows x classes)"
    drawn_sizes, drawn_most = _DRAWN, _MOST_DRAWN
    drawn_options = ((), (), (), (), *_VARIANTS[:3])

    @property
    def reference(self) -> Callable[..., Tensor]:
        return _definition

    def stock(self, case: Case) -> Callable[..., Tensor]:
        return _definition if _EXTRAS & dict(case.options).keys() else F.cross_entropy

    def presets(self, full: bool, device: str) -> list[Case]:
        if device != "cpu":
            return [
                Case(self.name, shape, dtype, direction)
                for shape in (_GPU_SHAPES if full else _GPU_SHAPES[::2])
                for dtype in ("bfloat16", "float32")
                for direction in DIRECTIONS
            ]
        shapes = [(100, 10), (128, 1000), _BASE, (1024, 8000), _LARGE]
        cases = [Case(self.name, shape) for shape in shapes]
        cases.append(Case(self.name, (8, 21, 256, 256)))  # a segmentation
        cases.append(Case(self.name, (1024, 32000), "bfloat16"))
        cases += [Case(self.name, _BASE, options=options) for options in _VARIANTS]
        cases.append(Case(self.name, _BASE, direction="fwd"))
        if full:
            cases += [replace(case, direction="fwd") for case in cases[3:12]]
            cases += [replace(case, direction="bwd") for case in cases[2:12]]
            cases += [Case(self.name, (256, 50257)), Case(self.name, (1024, 32000))]
            cases += [Case(self.name, _BASE, dtype) for dtype in ("float64", "float16")]
        return cases

    def memory_presets(self, full: bool, device: str) -> list[Case]:
        classes = (1000, 8000, 32000, 128000) if full else (1000, 32000)
        rows = 2048 if device == "cpu" else 8192
        return [Case(self.name, (rows, count)) for count in classes]

    def tiny(self) -> Case:
        return Case(self.name, (1, 8))

    def accepts(self, shape: Sequence[int]) -> bool:
        return len(shape) == 2 or len(shape) > 3

    def inputs(self, case: Case, generator: torch.Generator) -> Inputs:
        options = dict(case.options)
        classes = case.shape[1]
        positions = (case.shape[0], *case.shape[2:])
        logits = torch.randn(case.shape, generator=generator, device=case.device)
        if options.pop("probabilities", False):
            noise = torch.randn(case.shape, generator=generator, device=case.device)
            target = noise.softmax(1).to(case.torch_dtype)
        else:
            target = torch.randint(classes, positions, generator=generator, device=case.device)
        upstream = torch.ones((), device=case.device, dtype=case.torch_dtype)
        if options.get("reduction") == "none":
            weights = torch.rand(positions, generator=generator, device=case.device)
            upstream = weights.to(case.torch_dtype)
        args = {"input": logits.to(case.torch_dtype).requires_grad_(), "target": target}
        return Inputs(args, upstream, options)

    def traffic_bytes(self, case: Case) -> int:
        # The logits are read; the gradient is written; probabilities are read like logits.
        tensors = {"fwd": 1, "bwd": 2, "fwd+bwd": 2}[case.direction]
        if ("probabilities", True) in case.options:
            tensors += 1
        positions = 8 * math.prod(case.shape) // case.shape[1]
        return tensors * math.prod(case.shape) * case.torch_dtype.itemsize + positions

    def plot_size(self, case: Case) -> float | None:
        return float(self.elements(case)) if len(case.shape) == 2 else None

    def limit(self, case: Case, sets: Sequence[Inputs]) -> Task:
        return copy_task(self.traffic_bytes(case), len(sets), case.device)

    def peers(self) -> list[Provider]:
        inplace = ours(_INPLACE, "auto", inplace_backward=True)
        return [
            peers.liger_cross_entropy(),
            peers.quack_cross_entropy(),
            peers.jax(_jax_cross_entropy, options=("label_smoothing", "reduction", "softcap")),
            replace(inplace, missing=self._no_inplace),
        ]

    def _no_inplace(self, op: Op, case: Case) -> str:
        if case.direction == "fwd":
            return "inplace_backward is for training"
        if case.shape[2:] or case.options or case.dtype == "float16":
            return "measured for plain calls only"
        small = self.elements(case) < _INPLACE_ELEMENTS
        return "measured for large calls only" if small else ""


def _definition(
    input: Tensor,
    target: Tensor,
    softcap: float | None = None,
    z_loss: float = 0.0,
    **options: Any,
) -> Tensor:
    """As a model has it that caps its logits, or adds the square of the lse, by torch's ops."""
    if softcap is not None:
        input = softcap * torch.tanh(input / softcap)
    loss = F.cross_entropy(input, target, **options)
    return loss + z_loss * input.logsumexp(1).square().mean() if z_loss else loss


def _jax_cross_entropy(
    jax: Any,
    input: Any,
    target: Any,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Any:
    jnp = jax.numpy
    if softcap is not None:
        input = softcap * jnp.tanh(input / softcap)
    log_p = jax.nn.log_softmax(input, axis=1)
    picked = jnp.take_along_axis(log_p, jnp.expand_dims(target, 1), axis=1).squeeze(1)
    loss = -(1 - label_smoothing) * picked - label_smoothing * log_p.mean(axis=1)
    return loss if reduction == "none" else loss.mean()


OP = CrossEntropy()


@under_pytest.parametrize(OP)
def test_cross_entropy(benchmark: Any, case: Case, provider: str) -> None:
    under_pytest.measure(benchmark, OP, case, provider)

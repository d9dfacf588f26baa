"""Linear + cross-entropy, against its GEMMs alone: logits, input's gradient, weight's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers, under_pytest
from benchmarks.case import Case, Inputs, Op, Options, training_factor
from benchmarks.providers import PlainTask, Provider, Task

# (rows, features, classes)
_SMALL, _MIDDLE, _BASE = (128, 64, 1000), (512, 256, 8000), (1024, 512, 32000)
_LARGE = (2048, 512, 32000)
_GPU_HEAD = (4096, 128256)
_DRAWN = (  # sizes of --random
    (1, 2, 8, 16, 64, 100, 256, 512, 1000),
    (8, 16, 64, 100, 256, 512, 784),
    (2, 5, 10, 16, 32, 64, 100, 500, 1000, 4000),
)
_MOST_DRAWN = 1 << 25  # multiplications
_NONE: Options = (("reduction", "none"),)
_SMOOTHING: Options = (("label_smoothing", 0.1),)


class LinearCrossEntropy(Op):
    name = "linear_cross_entropy"
    shape_syntax = "ROWSxFEATURESxCLASSES"
    limit_name = "its GEMMs alone (torch.mm, logits into a ready buffer)"
    memory_axis = 2
    plot_size_label = "logits (rows x classes)"
    drawn_sizes, drawn_most = _DRAWN, _MOST_DRAWN
    drawn_options = ((), (), (), _NONE, _SMOOTHING)

    @property
    def reference(self) -> Callable[..., Tensor]:
        return _reference

    def stock(self, case: Case) -> Callable[..., Tensor]:
        return _reference if "softcap" in dict(case.options) else _two_ops

    def presets(self, full: bool, device: str) -> list[Case]:
        if device != "cpu":
            rows = (2048, 4096, 8192) if full else (8192,)
            return [Case(self.name, (count, *_GPU_HEAD), "bfloat16") for count in rows]
        cases = [Case(self.name, shape) for shape in (_SMALL, _MIDDLE, _BASE, _LARGE)]
        if full:
            cases.append(Case(self.name, _LARGE, direction="fwd"))
            cases.append(Case(self.name, _BASE, "bfloat16"))
            cases.append(Case(self.name, _MIDDLE, options=_NONE))
            cases.append(Case(self.name, _MIDDLE, options=_SMOOTHING))
            cases.append(Case(self.name, _BASE, options=(("softcap", 30.0),)))
        return cases

    def memory_presets(self, full: bool, device: str) -> list[Case]:
        if device != "cpu":  # the last is the shape that the bar of 1.2 GB is for
            classes = (8000, 32000, _GPU_HEAD[1])
            return [Case(self.name, (8192, _GPU_HEAD[0], count), "bfloat16") for count in classes]
        classes = (2000, 8000, 32000, 128000) if full else (2000, 8000, 32000)
        cases = [Case(self.name, (*_LARGE[:2], count)) for count in classes]
        return [*cases, Case(self.name, _BASE)]

    def tiny(self) -> Case:
        return Case(self.name, (1, 8, 8))

    def accepts(self, shape: Sequence[int]) -> bool:
        return len(shape) == 3

    def inputs(self, case: Case, generator: torch.Generator) -> Inputs:
        rows, features, classes = case.shape

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=case.device) * scale
            return values.to(case.torch_dtype).requires_grad_()

        target = torch.randint(classes, (rows,), generator=generator, device=case.device)
        args: dict[str, Tensor | None] = {
            "input": normal(rows, features),
            "linear_weight": normal(classes, features, scale=features**-0.5),
            "target": target,
        }
        upstream = torch.ones((), device=case.device, dtype=case.torch_dtype)
        options = dict(case.options)
        if options.get("reduction") == "none":
            weights = torch.rand(rows, generator=generator, device=case.device)
            upstream = weights.to(case.torch_dtype)
        return Inputs(args, upstream, options)

    def elements(self, case: Case) -> int:
        rows, _, classes = case.shape
        return rows * classes

    def flops(self, case: Case) -> int:
        rows, features, classes = case.shape
        return training_factor(case.direction, 1, 2) * 2 * rows * features * classes

    def limit(self, case: Case, sets: Sequence[Inputs]) -> Task:
        rows, _, classes = case.shape
        logits = torch.empty(rows, classes, dtype=case.torch_dtype, device=case.device)
        logits.normal_()

        def forward(input: Tensor, weight: Tensor) -> object:
            return torch.mm(input, weight.t(), out=logits)

        def backward(input: Tensor, weight: Tensor) -> object:
            return torch.mm(logits, weight), torch.mm(logits.t(), input)

        def both(input: Tensor, weight: Tensor) -> object:
            return forward(input, weight), backward(input, weight)

        work = {"fwd": forward, "bwd": backward, "fwd+bwd": both}[case.direction]
        return PlainTask(work, [inputs.positional[:2] for inputs in sets])

    def peers(self) -> list[Provider]:
        return [
            peers.torch_chunked(),
            peers.liger_linear_cross_entropy(),
            peers.cut_cross_entropy(),
            peers.quack_linear_cross_entropy(),
            peers.jax(_jax_linear_cross_entropy),
        ]


def _reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    logits = F.linear(input, linear_weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target, **options)


def _two_ops(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight), target, **options)


def _jax_linear_cross_entropy(jax: Any, input: Any, linear_weight: Any, target: Any) -> Any:
    log_p = jax.nn.log_softmax(input @ linear_weight.T, axis=1)
    return -jax.numpy.take_along_axis(log_p, target[:, None], axis=1).mean()


OP = LinearCrossEntropy()


@under_pytest.parametrize(OP)
def test_linear_cross_entropy(benchmark: Any, case: Case, provider: str) -> None:
    under_pytest.measure(benchmark, OP, case, provider)

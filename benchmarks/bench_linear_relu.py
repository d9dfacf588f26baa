"""Linear + ReLU, against the bare GEMMs (`torch.mm`, which gives fresh tensors as the op does)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, under_pytest
from benchmarks.case import Case, Inputs, Op, Options, training_factor
from benchmarks.providers import PlainTask, Provider, Task
from torchext import reference

_SHAPES = (  # (rows, in_features, out_features)
    (1, 8, 8),
    (100, 784, 64),
    (64, 1024, 1024),
    (4096, 784, 64),
    (4096, 1024, 1024),
)
_GPU_SHAPES = ((4096, 4096, 4096), (8192, 4096, 16384))
# A network's first layer: nobody asks for the gradient of the data. And one that is not trained.
_NO_INPUT_GRAD: Options = (("no_input_grad", True),)
_NO_WEIGHT_GRAD: Options = (("no_weight_grad", True),)
_DRAWN = (  # sizes of --random
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 100, 128, 300, 500, 1000, 2000),
    (8, 16, 64, 100, 128, 200, 256, 512, 700, 784, 1024, 2047, 2048, 4096),
    (1, 2, 4, 8, 10, 16, 24, 32, 64, 100, 128, 200, 256, 512, 1024),
)
_MOST_DRAWN = 1 << 25  # multiplications


class LinearReLU(Op):
    name = "linear_relu"
    shape_syntax = "ROWSxINxOUT"
    limit_name = "its GEMMs alone (torch.mm)"
    memory_axis = 0
    memory_label = "rows"
    plot_size_label = "multiply-adds of the forward"
    drawn_sizes, drawn_most = _DRAWN, _MOST_DRAWN
    drawn_options = ((), (), _NO_INPUT_GRAD, _NO_WEIGHT_GRAD)

    @property
    def reference(self) -> Callable[..., Tensor]:
        return reference.linear_relu

    def presets(self, full: bool, device: str) -> list[Case]:
        cases = [Case(self.name, shape) for shape in _SHAPES]
        if device != "cpu":
            cases += [Case(self.name, shape, "bfloat16") for shape in _GPU_SHAPES]
        cases.append(Case(self.name, (100, 784, 64), options=_NO_INPUT_GRAD))
        cases.append(Case(self.name, (1024, 1024, 1024), "bfloat16"))
        # Small and narrow, where what the library's call costs shows, and of odd features.
        cases.append(Case(self.name, (16, 63, 65), "bfloat16"))
        cases.append(Case(self.name, _SHAPES[1], "float16"))
        alone = (1, 1024, 1024)  # a batch of one, as a server has it
        cases.append(Case(self.name, alone))
        forward = (_SHAPES[1], _SHAPES[3], alone)
        cases += [Case(self.name, shape, direction="fwd") for shape in forward]
        if full:
            cases += [Case(self.name, shape, direction="bwd") for shape in _SHAPES]
            left = (_SHAPES[0], _SHAPES[2], _SHAPES[4])
            cases += [Case(self.name, shape, direction="fwd") for shape in left]
            more = ((16, 64, 64), (1024, 784, 64), (512, 512, 512), (512, 768, 3072))
            cases += [Case(self.name, shape) for shape in more]
            cases += [Case(self.name, _SHAPES[3], dtype) for dtype in ("bfloat16", "float64")]
        return cases

    def memory_presets(self, full: bool, device: str) -> list[Case]:
        rows = (1024, 4096, 16384) if full else (4096,)
        return [Case(self.name, (count, 1024, 1024)) for count in rows]

    def tiny(self) -> Case:
        return Case(self.name, (1, 8, 8))

    def accepts(self, shape: Sequence[int]) -> bool:
        return len(shape) == 3

    def inputs(self, case: Case, generator: torch.Generator) -> Inputs:
        rows, features, out_features = case.shape

        def normal(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
            values = torch.randn(shape, generator=generator, device=case.device) * scale
            return values.to(case.torch_dtype).requires_grad_(grad)

        args: dict[str, Tensor | None] = {
            "input": normal(rows, features, grad=("no_input_grad", True) not in case.options),
            "weight": normal(
                out_features,
                features,
                scale=features**-0.5,
                grad=("no_weight_grad", True) not in case.options,
            ),
            "bias": normal(out_features),
        }
        return Inputs(args, normal(rows, out_features, grad=False), {})

    def flops(self, case: Case) -> int:
        rows, features, out_features = case.shape
        backward = 1 if case.options else 2
        gemms = training_factor(case.direction, 1, backward)
        return gemms * 2 * rows * features * out_features

    def elements(self, case: Case) -> int:
        rows, features, out_features = case.shape
        return max(rows * features, features * out_features, rows * out_features)

    def plot_size(self, case: Case) -> float:
        rows, features, out_features = case.shape
        return float(rows * features * out_features)

    def limit(self, case: Case, sets: Sequence[Inputs]) -> Task:
        no_input_grad = ("no_input_grad", True) in case.options
        no_weight_grad = ("no_weight_grad", True) in case.options

        def forward(input: Tensor, weight: Tensor, grad: Tensor) -> object:
            return torch.mm(input, weight.t())

        def backward(input: Tensor, weight: Tensor, grad: Tensor) -> object:
            return (
                None if no_input_grad else torch.mm(grad, weight),
                None if no_weight_grad else torch.mm(grad.t(), input),
            )

        def both(input: Tensor, weight: Tensor, grad: Tensor) -> object:
            return forward(input, weight, grad), backward(input, weight, grad)

        work = {"fwd": forward, "bwd": backward, "fwd+bwd": both}[case.direction]
        return PlainTask(work, [(*inputs.positional[:2], inputs.grad_output) for inputs in sets])

    def peers(self) -> list[Provider]:
        return [peers.jax(_jax_linear_relu, options=("no_input_grad",))]


def _jax_linear_relu(jax: Any, input: Any, weight: Any, bias: Any) -> Any:
    return jax.nn.relu(input @ weight.T + bias)


OP = LinearReLU()


@under_pytest.parametrize(OP)
def test_linear_relu(benchmark: Any, case: Case, provider: str) -> None:
    under_pytest.measure(benchmark, OP, case, provider)

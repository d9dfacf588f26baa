"""`LinearReLU`: `nn.Linear` and `nn.ReLU` in one module."""

import torch
from torch import Tensor, nn

from torchext.ops.linear_relu import linear_relu


class LinearReLU(nn.Linear):
    r"""Applies :math:`y = \max(x A^T + b, 0)`: :class:`torch.nn.Linear` and ReLU in one.

    Constructor, parameters, initialisation and ``state_dict`` are those of
    :class:`torch.nn.Linear`.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether there is a bias.
        device: where the parameters are made.
        dtype: the parameters' dtype.

    Shape:
        - input: :math:`(*, \text{in\_features})`
        - output: :math:`(*, \text{out\_features})`

    See :func:`torchext.linear_relu`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns the activations of `input`."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return linear_relu(input, self.weight, self.bias)
        else:
            # As nn.Module finds them, but that its __getattr__ is called after the usual look-up
            # has raised: 1 us each. Where a parametrization serves them they are not here.
            own = self._parameters
            weight = own["weight"] if "weight" in own else self.weight
            bias = own["bias"] if "bias" in own else self.bias
            return linear_relu(input, weight, bias)  # type: ignore[arg-type]

"""`LinearReLU`: `nn.Linear` and `nn.ReLU` in one module."""

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
        return linear_relu(input, self.weight, self.bias)

#include "ops/linear_relu.h"

STABLE_TORCH_LIBRARY_FRAGMENT(torchext, m) {
  m.def("linear_relu_forward(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  // A gradient that was not asked for comes back with no elements.
  m.def(
      "linear_relu_backward(Tensor grad_output, Tensor output, Tensor input, Tensor weight, "
      "bool input_grad, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)");
}

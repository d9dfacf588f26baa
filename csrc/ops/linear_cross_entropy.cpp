#include "ops/linear_cross_entropy.h"

// The loss has the dtype of the sums (float32, or float64 for float64), and so has `grad_output`:
// rounding it to input's dtype is the caller's, who does not under autocast. The gradients that are
// asked for come with the loss of a mean or sum (times nothing: backward multiplies by the gradient
// of the loss); what is not asked for has no elements. `stats`, shape (2, N), is each row's maximum
// and sum of exponentials: with them the second operator makes the logits again, a chunk of rows at
// a time, where the gradients did not come with the loss.
//
// On the CPU and by Triton's kernels linear_weight may be (C, D, H) too, with linear_bias (C, D),
// target (N, D) or (N, C, D), a loss of reduction none of shape (N, D), and stats (2, N * D).
//
// The two `kept` operators are of the CPU alone: the first gives the logits of all rows, as its
// kernels have them, from which the second makes the gradients, to the same bits.
STABLE_TORCH_LIBRARY_FRAGMENT(torchext, m) {
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, bool input_grad, bool linear_weight_grad, bool linear_bias_grad) "
      "-> (Tensor loss, Tensor stats, Tensor grad_input, Tensor grad_linear_weight, "
      "Tensor grad_linear_bias)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor linear_weight, "
      "Tensor target, Tensor? linear_bias, Tensor? weight, Tensor stats, int reduction, "
      "int ignore_index, float label_smoothing, bool input_grad, bool linear_weight_grad, "
      "bool linear_bias_grad) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_kept_forward(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor loss, Tensor stats, Tensor logits)");
  m.def(
      "linear_cross_entropy_kept_backward(Tensor grad_output, Tensor logits, Tensor input, "
      "Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, Tensor stats, "
      "int reduction, int ignore_index, float label_smoothing, bool input_grad, "
      "bool linear_weight_grad, bool linear_bias_grad) -> (Tensor, Tensor, Tensor)");
}

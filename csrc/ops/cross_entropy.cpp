#include "ops/cross_entropy.h"

// `stats` has the accumulation dtype and shape (2, positions): each row's maximum, and the sum of
// exp(logit - maximum); backward makes the softmax of them. With save_gradient, `gradient` is the
// gradient of the (mean or summed) loss, and stats has no elements; without, it is the other way
// round.
STABLE_TORCH_LIBRARY_FRAGMENT(torchext, m) {
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index, float label_smoothing, bool save_gradient) "
      "-> (Tensor loss, Tensor stats, Tensor gradient)");
  // The gradient takes the place of the logits.
  m.def(
      "cross_entropy_forward_(Tensor(a!) input, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index, float label_smoothing) -> Tensor");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
      "Tensor stats, int reduction, int ignore_index, float label_smoothing) -> Tensor");
}

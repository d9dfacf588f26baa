#include "ops/cross_entropy_extras.h"

STABLE_TORCH_LIBRARY_FRAGMENT(torchext, m) {
  // Rows of logits (N, C). With `loss`, what comes of them: loss, the maxima and sums of the
  // transformed logits (`stats`), and their argmax; without, stats are those of such a call.
  // `gradient`, which may be input, is what the gradients of each row's loss and lse give. softcap
  // is 0 for none.
  m.def(
      "cross_entropy_extras_rows(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, float logit_scale, Tensor? grad_loss, "
      "Tensor? grad_lse, Tensor(a!)? gradient, Tensor(b!)? loss, Tensor(c!) stats, "
      "Tensor(d!)? argmax) -> ()");
  // One call of a loss of logits, forward: lse, argmax and gradient (of a mean or sum) have no
  // elements where they are not asked for; mass is what a mean was divided by. The loss, lse and
  // stats are of float32 or wider.
  m.def(
      "cross_entropy_extras_forward(Tensor input, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale, "
      "bool ignored_mean_zero, bool return_lse, bool return_argmax, bool save_gradient) -> "
      "(Tensor loss, Tensor lse, Tensor argmax, Tensor stats, Tensor mass, Tensor gradient)");
  // What a mean over class indices divides by, in float64: how many are not ignored, or the sum of
  // their weights. Refuses indices that are none.
  m.def(
      "cross_entropy_mass(Tensor target, Tensor? weight, int classes, int ignore_index) -> Tensor");
}

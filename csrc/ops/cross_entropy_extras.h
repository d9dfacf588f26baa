// The rows of a loss with extras (z_loss, softcap, logit_scale): schema arguments and their checks.
// Formulas: torchext/ops/extras_chunks.py.
#pragma once

#include <optional>

#include "ops/cross_entropy.h"

namespace torchext {

// Rows of fewer classes are not served on the CPU: the widest vector has 16 floats.
constexpr int64_t kFewestClassesOfExtras = 16;

struct ExtrasRows {
  const Tensor& input;
  const Tensor& target;
  const std::optional<Tensor>& weight;  // of input's dtype, or that of the sums
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap, logit_scale;
  const Tensor& stats;
  std::optional<Tensor> grad_loss, grad_lse, gradient, loss, argmax;
};

inline void check_extras_rows(const ExtrasRows& call, int64_t fewest_classes) {
  const char* op = "cross_entropy_extras_rows: expected ";
  const Tensor& input = call.input;
  TORCHEXT_CHECK(is_floating(input.scalar_type()) && input.dim() == 2 &&
                     input.size(1) >= fewest_classes && input.stride(1) == 1,
                 op, "rows of at least ", fewest_classes,
                 " contiguous classes in float32, float64, bfloat16 or float16, but got shape ",
                 shape_string(input), " and dtype ", dtype_string(input));
  const int64_t rows = input.size(0), classes = input.size(1);
  const ScalarType sums = accumulation_dtype(input.scalar_type());
  const auto check = [&](const Tensor& tensor, const char* name, ScalarType dtype,
                         const std::vector<int64_t>& sizes) {
    TORCHEXT_CHECK(tensor.scalar_type() == dtype && sizes_of(tensor) == sizes, op, name,
                   " to have the shape that goes with input's ", shape_string(input),
                   " and the dtype of the sums, but got shape ", shape_string(tensor),
                   " and dtype ", dtype_string(tensor));
  };
  const Tensor& target = call.target;
  if (is_class_index(target.scalar_type())) {
    check(target, "target", target.scalar_type(), {rows});
  } else {
    const bool narrow = target.scalar_type() == input.scalar_type();
    check(target, "target", narrow ? target.scalar_type() : sums, {rows, classes});
  }
  TORCHEXT_CHECK(!(call.label_smoothing > 1.0), op, "label_smoothing of at most 1, but got ",
                 call.label_smoothing);
  if (call.weight) {
    const bool narrow = call.weight->scalar_type() == input.scalar_type();
    check(*call.weight, "weight", narrow ? input.scalar_type() : sums, {classes});
  }
  if (call.grad_loss) check(*call.grad_loss, "grad_loss", sums, {rows});
  if (call.grad_lse) check(*call.grad_lse, "grad_lse", sums, {rows});
  check(call.stats, "stats", sums, {2, rows});
  TORCHEXT_CHECK(rows <= 1 || call.stats.stride(1) == 1, op, "stats with contiguous rows");
  if (call.loss) check(*call.loss, "loss", sums, {rows});
  if (call.argmax) check(*call.argmax, "argmax", ScalarType::Long, {rows});
  for (const std::optional<Tensor>* out : {&call.loss, &call.argmax}) {
    TORCHEXT_CHECK(!*out || (*out)->is_contiguous(), op, "loss and argmax to be contiguous");
  }
  if (!call.gradient) return;
  check(*call.gradient, "gradient", input.scalar_type(), {rows, classes});
  TORCHEXT_CHECK(call.gradient->stride(1) == 1, op, "gradient with contiguous rows");
}

}  // namespace torchext

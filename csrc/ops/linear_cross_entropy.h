// linear_cross_entropy: the cross-entropy of logits = input @ linear_weight.T + linear_bias that
// never exist as a whole. Checks shared by every device.
#pragma once

#include <optional>

#include "common/checks.h"
#include "common/stable.h"
#include "ops/cross_entropy.h"

namespace torchext {

struct LinearCrossEntropyShape {
  int64_t rows;        // N
  int64_t features;    // H
  int64_t classes;     // C
  bool probabilities;  // the target is (N, C)
};

inline LinearCrossEntropyShape check_linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    int64_t reduction, double label_smoothing) {
  constexpr const char* kOp = "linear_cross_entropy";
  TORCHEXT_CHECK(input.dim() == 2, kOp, ": expected input of shape (N, in_features), but got ",
                 shape_string(input));
  TORCHEXT_CHECK(linear_weight.dim() == 2, kOp,
                 ": expected linear_weight of shape (C, in_features), but got ",
                 shape_string(linear_weight));
  TORCHEXT_CHECK(input.size(1) == linear_weight.size(1), kOp,
                 ": expected equal last dimensions (in_features) of input and linear_weight, but "
                 "got ",
                 input.size(1), " and ", linear_weight.size(1));
  TORCHEXT_CHECK(is_floating(input.scalar_type()), kOp,
                 ": expected input of dtype float32, float64, bfloat16 or float16, but got ",
                 dtype_string(input));
  TORCHEXT_CHECK(linear_weight.scalar_type() == input.scalar_type(), kOp,
                 ": expected linear_weight of input's dtype (", dtype_string(input), "), but got ",
                 dtype_string(linear_weight));
  TORCHEXT_CHECK_VALUE(reduction >= 0 && reduction <= 2, kOp,
                       ": expected reduction 0 (none), 1 (mean) or 2 (sum), but got ", reduction);
  TORCHEXT_CHECK(!(label_smoothing > 1.0), kOp,
                 ": expected label_smoothing between 0.0 and 1.0, but got ", label_smoothing);
  const LinearCrossEntropyShape shape{input.size(0), input.size(1), linear_weight.size(0),
                                      !is_class_index(target.scalar_type())};
  if (shape.probabilities) {
    TORCHEXT_CHECK(target.scalar_type() == input.scalar_type(), kOp,
                   ": expected target of class indices (int64, int32, uint8) or of probabilities "
                   "of input's dtype (",
                   dtype_string(input), "), but got ", dtype_string(target));
    TORCHEXT_CHECK(
        target.dim() == 2 && target.size(0) == shape.rows && target.size(1) == shape.classes, kOp,
        ": expected target of class probabilities of shape [", shape.rows, ", ", shape.classes,
        "], but got ", shape_string(target));
  } else {
    TORCHEXT_CHECK(target.dim() == 1, kOp, ": expected target of class indices of shape [",
                   shape.rows, "], but got ", shape_string(target));
    TORCHEXT_CHECK_VALUE(target.size(0) == shape.rows, kOp,
                         ": expected target's batch size to be input's (", shape.rows,
                         "), but got ", target.size(0));
  }
  for (const auto& [tensor, name] : {std::pair{&linear_bias, "linear_bias"}, {&weight, "weight"}}) {
    if (!*tensor) continue;
    TORCHEXT_CHECK((*tensor)->dim() == 1 && (*tensor)->size(0) == shape.classes, kOp, ": expected ",
                   name, " of shape [", shape.classes, "], but got ", shape_string(**tensor));
    TORCHEXT_CHECK((*tensor)->scalar_type() == input.scalar_type(), kOp, ": expected ", name,
                   " of input's dtype (", dtype_string(input), "), but got ",
                   dtype_string(**tensor));
  }
  return shape;
}

}  // namespace torchext
